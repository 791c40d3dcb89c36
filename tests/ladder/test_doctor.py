"""`bitladder doctor`: what it says of a model is what happens to it, and it reads next to nothing."""

import importlib
import json
import pathlib
import shutil

import fake_hub
import pytest
import tiny_models
import transformers

from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Request, preset_types
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.ladder import Machine, RunOptions, diagnose
from bitladder.quantize import QuantizeOptions, quantize

CONVERTER = {
    "convert_hf_to_gguf.py": "raise SystemExit('this must not run')",
    "conversion/__init__.py": """
TEXT_MODEL_MAP: dict[str, str] = {"Qwen3MoeForCausalLM": "qwen", "LfmForCausalLM": "lfm2", "OldForCausalLM": "gone"}
MMPROJ_MODEL_MAP: dict[str, str] = {"SeeingModel": "qwen"}
""",
    "conversion/qwen.py": """
import no_such_module
@ModelBase.register("OtherForCausalLM")
class Other(TextModel):
    model_arch = gguf.MODEL_ARCH.QWEN3
@ModelBase.register("Qwen3MoeForCausalLM")
class Moe(TextModel):
    model_arch = gguf.MODEL_ARCH.QWEN3MOE
""",
    "gguf-py/gguf/constants.py": """
    MODEL_ARCH.QWEN3:            "qwen3",
    MODEL_ARCH.QWEN3MOE:         "qwen3moe",
""",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint whose rows are 96, 160 and 64 weights wide."""
    folder = tmp_path_factory.mktemp("doctor") / "Tiny"
    tiny_models.llama(folder, hidden_size=96, intermediate_size=160, num_attention_heads=4, head_dim=16)
    tiny_models.train_byte_level(folder)
    return folder


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """The layout of llama.cpp's converter, with one architecture."""
    folder = tmp_path_factory.mktemp("converter")
    for name, text in CONVERTER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts with a vision part and a prediction head that nobody knows."""
    folder = tmp_path_factory.mktemp("doctor") / "Mixture"
    config = transformers.Qwen3MoeConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tiny_models.train_byte_level(folder)
    return folder


def test_the_file_that_conversion_writes_is_foreseen(llama, tmp_path):
    foreseen = diagnose(str(llama))
    convert(llama, tmp_path / "F.gguf")
    happened = diagnose(str(tmp_path / "F.gguf"))
    assert foreseen.works and happened.works
    assert (foreseen.converter, happened.converter) == ("bitladder", None)
    for field in ("architecture", "encoding", "weights", "blocks", "tied_head", "misfits", "links", "no_gradients"):
        assert getattr(foreseen, field) == getattr(happened, field), field
    assert happened.tokenizer and foreseen.tokenizer.startswith(happened.tokenizer)
    with GgufFile(tmp_path / "F.gguf") as file:
        assert happened.weights == sum(tensor.elements for tensor in file.tensors.values())


def test_types_that_do_not_fit_are_those_that_the_library_writes(llama, tmp_path):
    convert(llama, tmp_path / "F.gguf")
    about = diagnose(str(tmp_path / "F.gguf"))
    assert {misfit.width for misfit in about.misfits} == {96, 160, 64}
    for kind in ("q4_K", "q6_K", "iq3_s"):
        quantize(tmp_path / "F.gguf", tmp_path / "q.gguf", QuantizeOptions("Q8_0", tensor_types=(f"blk={kind}",)))
        with GgufFile(tmp_path / "q.gguf") as file:
            for misfit in about.misfits:
                used = {t.type.name for t in file.tensors.values() if t.width == misfit.width and "blk" in t.name
                        and len(t.shape) > 1}  # fmt: skip
                assert used == {misfit.instead[kind]}


def test_where_scales_can_move(tiny_checkpoint, llama):
    """A norm that meets the head may move scales if the head is not tied; OLMo 2 has no norms before its matrices."""
    about = diagnose(str(tiny_checkpoint))
    assert about.misfits == ()
    assert about.tied_head is False  # llama.cpp's OLMo 2 has it written out
    assert about.links == {"attn_v": 8, "ffn_up": 8, "output_norm": 1}
    assert diagnose(str(llama)).links == {"attn_norm": 2, "ffn_norm": 2, "attn_v": 2, "ffn_up": 2, "output_norm": 1}


def test_a_quantized_file_cannot_be_used(llama, tmp_path, capsys):
    convert(llama, tmp_path / "F.gguf")
    quantize(tmp_path / "F.gguf", tmp_path / "q.gguf", QuantizeOptions("Q8_0"))
    assert invoke(["doctor", str(tmp_path / "q.gguf"), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["works"] is False
    assert "already; start from an F16" in shown["reasons"][0]


def test_an_architecture_that_the_library_does_not_know(tiny_gguf, tmp_path, capsys):
    data = tiny_gguf.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data.replace(b"olmo2", b"olmo9"))
    with pytest.raises(BitladderError):
        preset_types(tmp_path / "x.gguf", Request("Q8_0"))
    assert invoke(["doctor", str(tmp_path / "x.gguf")]) == 1
    assert "unknown model architecture: 'olmo9'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not valid JSON"),
        (lambda folder: tiny_models.configure(folder, num_hidden_layers=3), "no tensor model.layers.2"),
        (lambda folder: tiny_models.configure(folder, quantization_config={"quant_method": "bitnet"}), "bitnet"),
        (lambda folder: tiny_models.configure(folder, hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    ],
)
def test_why_a_checkpoint_cannot_work(llama, tmp_path, change, words, capsys):
    folder = shutil.copytree(llama, tmp_path / "Tiny")
    change(folder)
    about = diagnose(str(folder))
    assert not about.works and words in about.reasons[0]
    with pytest.raises(BitladderError):
        convert(folder, tmp_path / "F.gguf")
    assert invoke(["doctor", str(folder)]) == 1
    assert "cannot work" in capsys.readouterr().out


def test_a_model_for_the_other_converter(mixture, converter):
    from bitladder.convert import ConvertOptions

    about = diagnose(str(mixture), ConvertOptions(converter=converter))
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert about.works and about.remarks == ()
    assert (about.architecture, about.converter, about.blocks, about.tied_head) == ("qwen3moe", "llama.cpp", 2, True)
    assert about.weights == model.num_parameters()
    assert (about.experts, about.experts_used) == (6, 2)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert about.expert_share == pytest.approx(in_experts / about.weights)
    assert {misfit.width for misfit in about.misfits} == {64, 32}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NobodyForCausalLM", "known neither to bitladder nor"),
        ("OldForCausalLM", "list of architectures cannot be read"),
    ],
)
def test_what_no_converter_knows(mixture, converter, tmp_path, name, words):
    from bitladder.convert import ConvertOptions

    folder = shutil.copytree(mixture, tmp_path / "Other")
    tiny_models.configure(folder, architectures=[name])
    assert words in diagnose(str(folder), ConvertOptions(converter=converter)).reasons[0]


def test_of_a_checkpoint_on_the_hub_little_is_fetched(llama, tmp_path, monkeypatch):
    folder = shutil.copytree(llama, tmp_path / "Tiny")
    shutil.rmtree(tmp_path / "big", ignore_errors=True)
    tiny_models.llama(folder, hidden_size=96, intermediate_size=4000, num_attention_heads=4, head_dim=16)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with fake_hub.instead_of_the_hub(monkeypatch, tmp_path / "cache") as server:
        server.add("someone/Tiny", files)
        about = diagnose("someone/Tiny")
        assert server.sent < 130_000 < len(files["model.safetensors"]) / 10
        assert "tokenizer.json" not in server.downloads
        assert about.shape and about.shape.weights == about.weights  # what a run takes needs nothing further
        with pytest.raises(BitladderError, match=r"someone/Nothing.*no such repository"):
            diagnose("someone/Nothing")
    here = diagnose(str(folder))
    assert about.works and about.source == "checkpoint on the hub"
    for field in ("architecture", "weights", "blocks", "misfits", "links", "converter", "encoding"):
        assert getattr(about, field) == getattr(here, field), field


def test_what_is_no_model(tmp_path, capsys):
    assert invoke(["doctor", str(tmp_path / "no" / "such" / "folder")]) == 2
    assert "no hub id" in capsys.readouterr().err
    (tmp_path / "x.gguf").write_text("nothing")
    assert invoke(["doctor", str(tmp_path / "x.gguf")]) == 1
    assert "not a GGUF file" in " ".join(capsys.readouterr().out.split())


def test_what_a_run_takes_is_what_estimate_says(llama, monkeypatch, capsys):
    module = importlib.import_module("bitladder.ladder.estimate")
    monkeypatch.setattr(module, "measure_machine", lambda threads=None: Machine())
    assert invoke(["doctor", str(llama), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = module.estimate(RunOptions(model=str(llama), out=pathlib.Path("ladder")))
    assert shown["estimate"]["core_seconds"] == pytest.approx(expected.core_seconds)
    assert shown["estimate"]["disk_bytes"] == expected.disk_bytes > 0
    assert invoke(["doctor", str(llama)]) == 0
    assert "it works" in capsys.readouterr().out
