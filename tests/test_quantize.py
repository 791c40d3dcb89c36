"""Quants against llama-quantize, and against the library's own quantizer through the bindings."""

import ctypes
import os

import numpy as np
import pytest
from moe import write_moe

from bitladder.calibrate import collect_imatrix, read_imatrix
from bitladder.calibrate.texts import load_text
from bitladder.engine.native import llama
from bitladder.engine.presets import preset_number, preset_types, presets
from bitladder.errors import BitladderError
from bitladder.model.reader import GgufFile
from bitladder.quantize import RUNGS, quantize


@pytest.fixture(scope="module")
def imatrix(tiny_gguf, calibration_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect_imatrix(tiny_gguf, [load_text(str(calibration_text))], path, n_ctx=128, chunks=8)
    return path


def library_quantize(source, out, preset, imatrix=None):
    """llama_model_quantize through the bindings, with the imatrix as llama-quantize passes it."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = preset_number(preset)
    keep = []
    if imatrix is not None:
        entries = read_imatrix(imatrix).entries
        data = (llama.llama_model_imatrix_data * (len(entries) + 1))()
        for slot, (name, entry) in zip(data, entries.items(), strict=False):
            values = np.ascontiguousarray(entry.means().reshape(-1))
            keep.append(values)
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = data
    assert llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0


def same_tensors(ours, theirs):
    with GgufFile(ours) as a, GgufFile(theirs) as b:
        assert list(a.tensors) == list(b.tensors)
        for name, tensor in a.tensors.items():
            assert tensor == b.tensors[name], name
            assert np.array_equal(a.read(tensor), b.read(tensor)), name


@pytest.mark.parametrize("preset", RUNGS)
def test_every_rung_equals_the_library(preset, tiny_gguf, imatrix, tmp_path):
    result = quantize(tiny_gguf, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    library_quantize(tiny_gguf, tmp_path / "theirs.gguf", preset, imatrix)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert result.bytes == (tmp_path / "ours.gguf").stat().st_size
    with GgufFile(result.path) as file:
        assert result.bpw == pytest.approx(file.bpw)


@pytest.mark.parametrize("preset", ["Q2_K", "Q4_0", "IQ2_XS", "F16", "BF16", "F32", "TQ2_0"])
def test_other_presets_equal_the_library(preset, tiny_gguf, imatrix, tmp_path):
    quantize(tiny_gguf, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    library_quantize(tiny_gguf, tmp_path / "theirs.gguf", preset, imatrix)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_without_imatrix_the_file_equals_the_library_s(tiny_gguf, tmp_path):
    quantize(tiny_gguf, tmp_path / "ours.gguf", "Q4_K_M")
    library_quantize(tiny_gguf, tmp_path / "theirs.gguf", "Q4_K_M")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("preset", ["Q4_K_M", "IQ3_S", "Q3_K_L"])
def test_equals_llama_quantize_with_its_metadata(preset, tools, tiny_gguf, imatrix, tmp_path):
    result = quantize(tiny_gguf, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    tools.run("llama-quantize", "--imatrix", imatrix, tiny_gguf, tmp_path / "theirs.gguf", preset)
    same_tensors(result.path, tmp_path / "theirs.gguf")
    with GgufFile(result.path) as ours, GgufFile(tmp_path / "theirs.gguf") as theirs:
        assert list(ours.metadata) == list(theirs.metadata)
        paths = {"quantize.imatrix.file"}  # theirs is the path as typed, ours the name
        assert all(ours.metadata[key] == theirs.metadata[key] for key in ours.metadata if key not in paths)
        assert ours.get("quantize.imatrix.file") == "imatrix.gguf"


def test_experts_have_their_own_importance(tiny_gguf, calibration_text, tmp_path):
    write_moe(tiny_gguf, tmp_path / "moe.gguf")
    text = load_text(str(calibration_text))
    collect_imatrix(tmp_path / "moe.gguf", [text], tmp_path / "imatrix.gguf", n_ctx=128, chunks=4)
    for preset in ("Q3_K_M", "IQ4_NL"):
        quantize(tmp_path / "moe.gguf", tmp_path / "ours.gguf", preset, imatrix=tmp_path / "imatrix.gguf")
        library_quantize(tmp_path / "moe.gguf", tmp_path / "theirs.gguf", preset, tmp_path / "imatrix.gguf")
        same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_presets_come_from_the_library(tiny_gguf):
    assert presets()["Q4_K_M"] == 15 and preset_number("q4_k") == 15 and preset_number("f32") == 0
    chosen = preset_types(tiny_gguf, "Q4_K_M", imatrix=False)
    assert {kind.name for kind in chosen.types.values()} == {"f32", "q4_K", "q6_K"} and chosen.fallbacks == 0
    assert preset_types(tiny_gguf, "IQ2_XXS", imatrix=False).needs_imatrix


def test_errors_come_before_anything_is_written(tiny_gguf, imatrix, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(BitladderError, match="Q9_K"):
        quantize(tiny_gguf, out, "Q9_K")
    with pytest.raises(BitladderError, match="pass --imatrix"):
        quantize(tiny_gguf, out, "IQ2_XXS")
    write_moe(tiny_gguf, tmp_path / "moe.gguf")
    text = load_text("pydoc:test")
    collect_imatrix(tmp_path / "moe.gguf", [text], tmp_path / "other.gguf", n_ctx=128, chunks=2)
    with pytest.raises(BitladderError, match=r"no entry for blk\.0\.ffn_gate\.weight"):
        quantize(tiny_gguf, out, "IQ2_XXS", imatrix=tmp_path / "other.gguf")
    with pytest.raises(BitladderError, match="is the input"):
        quantize(tiny_gguf, tiny_gguf, "Q4_K_M")
    quantize(tiny_gguf, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(BitladderError, match="already q8_0"):
        quantize(tmp_path / "q8.gguf", out, "Q4_K_M")
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_nan_weights_are_named(tiny_gguf, tmp_path):
    bad = tmp_path / "bad.gguf"
    data = bytearray(tiny_gguf.read_bytes())
    with GgufFile(tiny_gguf) as file:
        tensor = file.tensors["blk.2.attn_q.weight"]
        place = file.data_start + tensor.offset + 2 * (3 * 256 + 5)
    data[place : place + 2] = np.float16(np.nan).tobytes()
    bad.write_bytes(data)
    with pytest.raises(BitladderError, match=r"blk\.2\.attn_q\.weight has the weight nan at index 773"):
        quantize(bad, tmp_path / "out.gguf", "Q4_K_M")
    assert not (tmp_path / "out.gguf").exists()
