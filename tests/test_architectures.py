"""Six architectures from `benchmarks/architectures.py --fixtures`: experts, recurrent blocks, latent attention, a
prediction head, logits that are capped. Their logits are those of transformers; then each goes the whole way."""

import ctypes
import json
import pathlib
import shutil

import numpy as np
import pytest
from heard import Heard
from reference_logits import native_logits

from bitladder.calibrate import read_imatrix
from bitladder.cli import invoke
from bitladder.convert import ConvertOptions
from bitladder.engine import Model, Request, preset_types
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile, prediction_tensors
from bitladder.ladder import diagnose
from bitladder.plan.subject import Subject
from bitladder.quantize import QuantizeOptions, prepare
from bitladder.refine import links_of
from bitladder.trial.swapped_model import _blocks

HERE = pathlib.Path(__file__).parent / "models"
NAMES = ("deepseek3", "falcon-h1", "gemma3-vision", "glm4moe-mtp", "gpt-oss", "qwen3moe")
TOKENS = list(range(300, 324))  # as in benchmarks/architectures.py
IMAGE_CHUNK = 1  # MTMD_INPUT_CHUNK_TYPE_IMAGE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A copy of the models, because a base is kept beside its model."""
    return shutil.copytree(HERE, tmp_path_factory.mktemp("architectures") / "models")


@pytest.fixture(scope="module")
def head_model(models):
    """The model with a prediction head."""
    return models / "glm4moe-mtp.gguf"


@pytest.fixture(scope="module")
def imatrices(models, tmp_path_factory):
    """An importance matrix of each model."""
    folder = tmp_path_factory.mktemp("imatrix")
    for name in NAMES:
        words = ["-m", str(models / f"{name}.gguf"), "-f", "pydoc:calibration", "-c", "64", "--chunks", "4"]
        assert invoke(["imatrix", *words, "-o", str(folder / f"{name}.gguf"), "-q"]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    expected = np.load(HERE / f"{name}.npy")
    ours = native_logits(HERE / f"{name}.gguf", TOKENS)[:, : expected.shape[1]]
    # The library rounds the inputs of F16 matrices to F16.
    assert np.abs(ours - expected).max() < 4e-3 * np.ptp(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name, models, imatrices, tmp_path, capsys):
    model, imatrix = models / f"{name}.gguf", imatrices / f"{name}.gguf"
    m, quant, moments = ["-m", str(model)], tmp_path / "q.gguf", tmp_path / "moments.gguf"
    assert diagnose(str(model)).works
    calibrate = ["-f", "pydoc:calibration", "-c", "64", "--chunks", "2", "--weighting", "positions"]
    assert invoke(["calibrate", *m, *calibrate, "-o", str(moments), "-q"]) == 0
    rounding = ["--rounding", "feedback", "--moments", str(moments), "--guard", "none"]
    assert invoke(["quantize", "Q4_K_M", *m, "--imatrix", str(imatrix), "-o", str(quant), *rounding, "-q"]) == 0
    with GgufFile(model) as file, GgufFile(quant) as made:
        heads = set(prediction_tensors(file))
        expected = preset_types(model, Request("Q4_K_M", imatrix=True)).types
        for tensor, kind in expected.items():
            matrix = len(file.tensors[tensor].shape) > 1 and kind.quantized
            assert made.tensors[tensor].type.name == ("q8_0" if tensor in heads and matrix else kind.name), tensor
    with Model(quant):
        pass
    capsys.readouterr()
    text = ["-f", "pydoc:test", "-c", "64", "--chunks", "2", "--noise-chunks", "0", "--no-cache", "--json", "-q"]
    assert invoke(["eval", "-m", str(quant), "--base", str(model), *text]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kld"]["value"] < 0.2


def test_nothing_reaches_a_prediction_head_and_it_keeps_its_bits(head_model, imatrices):
    heard = Heard()
    with GgufFile(head_model) as file:
        heads = prediction_tensors(file)
        matrices = {name for name in heads if len(file.tensors[name].shape) > 1}
        assert {name.split(".")[1] for name in heads} == {"2"}
        assert not [link for link in links_of(file) if link.kind == "output_norm"]  # the head is shared
        assert 2 not in _blocks(file)[0]
    known = read_imatrix(imatrices / "glm4moe-mtp.gguf").entries
    assert not known.keys() & set(heads)
    expected = preset_types(head_model, Request("Q3_K_M", imatrix=True)).types
    changed = {name for name in matrices if expected[name].quantized}
    assert len(changed) > 5

    def types(**more):
        options = QuantizeOptions("Q3_K_M", **more)
        with prepare(head_model, options, imatrix=imatrices / "glm4moe-mtp.gguf", progress=heard) as prepared:
            return prepared.choice.types

    usual = types()
    assert {usual[name] for name in changed} == {"q8_0"}
    assert any("prediction heads" in line and "--unreached-type preset" in line for line in heard.warnings)
    others = expected.keys() - changed
    assert {name: usual[name] for name in others} == {name: expected[name].name for name in others}
    assert types(unreached_type="preset") == {name: kind.name for name, kind in expected.items()}
    assert {types(unreached_type="q5_K")[name] for name in changed} <= {"q5_K", "q5_1"}
    one = "blk.2.attn_q.weight"
    named = types(tensor_types=(f"{one}=q4_0",))
    assert named[one] == "q4_0"
    assert {named[name] for name in changed - {one}} == {"q8_0"}
    with pytest.raises(UsageError, match="--unreached-type"):
        types(unreached_type="q9")


def test_only_what_calibration_reaches_is_planned(head_model, imatrices):
    with Subject(head_model, imatrices / "glm4moe-mtp.gguf") as subject:
        heads = prediction_tensors(subject.file)
        assert subject.unreached and set(subject.unreached) <= set(heads)
        assert not set(subject.tensors) & set(heads)
        types, nbytes = subject.complete(dict.fromkeys(subject.tensors, "q4_0"))
        assert {types[name] for name in subject.unreached} == {"q8_0"}
        assert types.keys() == subject.file.tensors.keys()
        assert 0 < subject.header_bytes() < subject.overhead() < nbytes
    with Subject(head_model, imatrices / "glm4moe-mtp.gguf", "q5_1") as other:
        lower, smaller = other.complete(dict.fromkeys(other.tensors, "q4_0"))
        assert {lower[name] for name in other.unreached} == {"q5_1"} and smaller < nbytes
        assert {name: lower[name] for name in other.tensors} == {name: types[name] for name in other.tensors}
    for name in ("preset", "q9"):
        with pytest.raises(UsageError, match="--unreached-type"):
            Subject(head_model, None, name)
    with Subject(head_model, None) as subject:
        assert set(subject.unreached) <= set(heads) and subject.unreached


def test_the_doctor_sees_what_is_special(models, head_model):
    head = diagnose(str(head_model))
    with GgufFile(head_model) as file:
        assert head.prediction == sum(file.tensors[name].elements for name in prediction_tensors(file))
    assert (head.blocks, head.experts, head.experts_used) == (2, 4, 2)
    hybrid = diagnose(str(models / "falcon-h1.gguf"))
    assert hybrid.recurrent == (0, 1)
    assert "ssm_conv1d" in hybrid.recurrent_kept and "ssm_in" not in hybrid.recurrent_kept
    assert diagnose(str(models / "gpt-oss.gguf"), ConvertOptions()).experts == 4


def test_a_run_gives_prediction_heads_the_type_that_is_named(head_model, tmp_path, capsys):
    run = ["run", str(head_model), "-o", str(tmp_path / "ladder"), "--ladder", "Q3_K_M", "-c", "64", "--no-bench", "-q"]
    assert invoke([*run, "--unreached-type", "preset"]) == 2
    assert "--unreached-type preset needs --mode naive" in capsys.readouterr().err
    quick = ["--mode", "naive", "--rounding", "stock", "--chunks", "2", "--imatrix-chunks", "2"]
    assert invoke([*run, *quick, "--unreached-type", "q5_1"]) == 0
    with GgufFile(next((tmp_path / "ladder").glob("*-Q3_K_M.gguf"))) as quant:
        heads = {name for name in prediction_tensors(quant) if len(quant.tensors[name].shape) > 1}
        assert {quant.tensors[name].type.name for name in heads} <= {"q5_1", "f32"}
        assert any(quant.tensors[name].type.name == "q5_1" for name in heads)


def test_the_projector_makes_of_an_image_what_transformers_does():
    """By libmtmd, which comes with the library: it loads the projector beside the model."""
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    expected = np.load(HERE / "gemma3-vision.image.npy")
    image = np.tile(np.uint8([200, 100, 50]), 56 * 56)  # as in benchmarks/architectures.py
    with Model(HERE / "gemma3-vision.gguf") as model:
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.warmup, options.print_timings = False, 1, False, False
        context = mtmd.mtmd_init_from_file(bytes(HERE / "mmproj-gemma3-vision.gguf"), model.handle, options)
        assert context and mtmd.mtmd_support_vision(context)
        bitmap = mtmd.mtmd_bitmap_init(56, 56, image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks, marker = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_default_marker()
        prompt = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
            parts = [mtmd.mtmd_input_chunks_get(chunks, place) for place in range(mtmd.mtmd_input_chunks_size(chunks))]
            of_image = next(part for part in parts if mtmd.mtmd_input_chunk_get_type(part) == IMAGE_CHUNK)
            assert mtmd.mtmd_input_chunk_get_n_tokens(of_image) == len(expected)
            assert mtmd.mtmd_encode_chunk(context, of_image) == 0
            shape = len(expected), model.n_embd
            made = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
            mtmd.mtmd_free(context)
    # libmtmd differs by up to 7 % of the range from transformers: angles are below 15°, and random ones near 90°.
    lengths = np.linalg.norm(made, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((made * expected).sum(1) > 0.966 * lengths).all()
