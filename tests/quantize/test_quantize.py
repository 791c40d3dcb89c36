"""Quants against llama-quantize, and against the library's own quantizer through the bindings."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from moe import write_moe
from quantize_reference import library_quantize, make_imatrix, make_model, same_metadata, same_tensors

from bitladder.calibrate import collect_imatrix
from bitladder.engine import Decoding, Request, preset_number, preset_types, presets
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile
from bitladder.quantize import RUNGS, QuantizeOptions, prepare, quantize, write, write_quant
from bitladder.text import Reading, load_text


@pytest.fixture(scope="module")
def imatrix(tiny_gguf, calibration_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect_imatrix(
        tiny_gguf,
        [load_text(str(calibration_text))],
        path,
        reading=Reading(chunks=8, spread=False),
        decoding=Decoding(n_ctx=128),
    )
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model, on which every preset is quick, and a random imatrix for it."""
    model = make_model(tmp_path_factory.mktemp("small"), num_hidden_layers=8, intermediate_size=256)
    return model, make_imatrix(model, model.parent / "imatrix.gguf")


def library(source, out, preset, imatrix=None):
    library_quantize(source, out, [*(["--imatrix", imatrix] if imatrix else []), preset])


@pytest.mark.parametrize("preset", [*RUNGS, "Q2_K", "Q4_0", "IQ2_XXS", "F16", "BF16", "F32", "TQ2_0"])
def test_every_preset_equals_the_library(preset, small, tmp_path):
    model, imatrix = small
    result = quantize(model, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    library(model, tmp_path / "theirs.gguf", preset, imatrix)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert result.bytes == (tmp_path / "ours.gguf").stat().st_size
    with GgufFile(result.path) as file:
        assert result.bpw == pytest.approx(file.bpw)


def test_without_imatrix_the_metadata_equal_the_library_s(tiny_gguf, tmp_path):
    quantize(tiny_gguf, tmp_path / "ours.gguf", "Q4_K_M")
    library(tiny_gguf, tmp_path / "theirs.gguf", "Q4_K_M")
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    same_metadata(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("preset", ["Q4_K_M", "IQ3_S", "Q3_K_L"])
def test_equals_llama_quantize_with_its_metadata(preset, tools, tiny_gguf, imatrix, tmp_path):
    result = quantize(tiny_gguf, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    tools.run("llama-quantize", "--imatrix", imatrix, tiny_gguf, tmp_path / "theirs.gguf", preset)
    same_tensors(result.path, tmp_path / "theirs.gguf")
    same_metadata(result.path, tmp_path / "theirs.gguf")
    with GgufFile(result.path) as ours:
        assert ours.get("quantize.imatrix.file") == "imatrix.gguf"


def test_experts_have_their_own_importance(tiny_gguf, calibration_text, tmp_path):
    write_moe(tiny_gguf, tmp_path / "moe.gguf")
    text = load_text(str(calibration_text))
    collect_imatrix(
        tmp_path / "moe.gguf",
        [text],
        tmp_path / "imatrix.gguf",
        reading=Reading(chunks=4, spread=False),
        decoding=Decoding(n_ctx=128),
    )
    for preset in ("Q3_K_M", "IQ4_NL"):
        quantize(tmp_path / "moe.gguf", tmp_path / "ours.gguf", preset, imatrix=tmp_path / "imatrix.gguf")
        library(tmp_path / "moe.gguf", tmp_path / "theirs.gguf", preset, tmp_path / "imatrix.gguf")
        same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_presets_come_from_the_library(tiny_gguf):
    assert presets()["Q4_K_M"] == 15 and preset_number("q4_k") == 15 and preset_number("f32") == 0
    chosen = preset_types(tiny_gguf, Request("Q4_K_M"))
    assert {kind.name for kind in chosen.types.values()} == {"f32", "q4_K", "q6_K"} and not chosen.misfits
    assert preset_types(tiny_gguf, Request("IQ2_XXS")).needs_imatrix


def test_types_of_presets_in_two_threads_at_once(tiny_gguf):
    """They are read from what the library logs, in pieces of lines: each thread must see its own."""
    requests = [Request("Q4_K_M"), Request("Q3_K_M", imatrix=True)] * 8
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda request: preset_types(tiny_gguf, request), requests))
    assert both == [preset_types(tiny_gguf, request) for request in requests]


def test_blocks_from_elsewhere_stand_in_for_the_librarys(tiny_gguf, tmp_path):
    name, usual, mixed = "blk.0.ffn_down.weight", tmp_path / "usual.gguf", tmp_path / "mixed.gguf"
    quantize(tiny_gguf, usual, "Q4_0", threads=1)
    with GgufFile(usual) as file:
        blocks = file.read(file.tensors[name])[::-1].copy()
    with prepare(tiny_gguf, QuantizeOptions("Q4_0")) as prepared:
        write(prepared, mixed, threads=1, blocks={name: lambda: blocks})
    with GgufFile(usual) as before, GgufFile(mixed) as after:
        for tensor in before.tensors.values():
            expected = blocks if tensor.name == name else before.read(tensor)
            assert np.array_equal(after.read(after.tensors[tensor.name]), expected), tensor.name


def test_tensors_of_the_same_type_are_copied_from_another_quant(tiny_gguf, tmp_path, monkeypatch):
    first, alone, copied = (tmp_path / f"{name}.gguf" for name in ("first", "alone", "copied"))
    quantize(tiny_gguf, first, "Q4_K_M", threads=1)
    quantize(tiny_gguf, alone, "Q4_K_S", threads=1)
    real, pieces = write_quant.quantize_rows, []

    def counting(weights, kind, importance):
        pieces.append(len(weights))
        return real(weights, kind, importance)

    monkeypatch.setattr(write_quant, "quantize_rows", counting)
    quantize(tiny_gguf, copied, "Q4_K_S", threads=1, same=[first])
    assert copied.read_bytes() == alone.read_bytes()
    with GgufFile(first) as one, GgufFile(alone) as other:
        new = [tensor for name, tensor in other.tensors.items() if tensor.type != one.tensors[name].type]
        assert 0 < len(new) < len(other.tensors) and sum(pieces) == sum(tensor.rows for tensor in new)
    with pytest.raises(UsageError, match="is an input"):
        quantize(tiny_gguf, first, "Q4_K_S", threads=1, same=[first])
