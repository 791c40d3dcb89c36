"""Files that -ngl does not change, made by both paths: on a library for the CPU they are the same to the last byte."""

import pytest

from bitladder.calibrate import MomentsOptions, collect_imatrix, collect_moments
from bitladder.cli import invoke
from bitladder.engine import Decoding
from bitladder.files import sha256_file
from bitladder.quantize import QuantizeOptions
from bitladder.refine import GuardOptions, ModelFiles, RefineOptions, quantize_rounded
from bitladder.rounding import RoundingOptions
from bitladder.text import Reading, load_text

N_CTX = 128
LAYERS = (0, 99)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {layers: tmp_path_factory.mktemp(f"ngl{layers}") for layers in LAYERS}


def both(folders, name, make):
    """Makes a file by both paths, and says whether they are the same."""
    for layers, folder in folders.items():
        make(folder / name, Decoding(n_ctx=N_CTX, gpu_layers=layers))
    return len({sha256_file(folder / name) for folder in folders.values()}) == 1


@pytest.fixture(scope="module")
def calibrated(tiny_gguf, folders):
    """Whether each file of calibration is the same by both paths, by name."""
    texts, reading = [load_text("pydoc:calibration")], Reading(chunks=4)

    def imatrix(out, decoding):
        collect_imatrix(tiny_gguf, texts, out, reading=reading, decoding=decoding)

    def moments(out, decoding):
        options = MomentsOptions(weighting=out.stem)
        collect_moments(tiny_gguf, texts, out, reading=reading, decoding=decoding, options=options)

    makers = {"imatrix.gguf": imatrix, "tokens.gguf": moments, "positions.gguf": moments}
    return {name: both(folders, name, make) for name, make in makers.items()}


def test_calibration(calibrated):
    assert all(calibrated.values()), calibrated


def test_rounded_quants_with_a_guard(tiny_gguf, folders, calibrated):
    """The guard compares on other rounded inputs, and keeps the same blocks."""
    refine = RefineOptions(rounding=RoundingOptions("feedback"), guard=GuardOptions(guard_chunks=2))

    def make(out, decoding):
        files = ModelFiles(tiny_gguf, out.parent / "imatrix.gguf", (out.parent / "tokens.gguf",))
        quantize_rounded(files, out, QuantizeOptions("Q3_K_S"), refine, load_text("pydoc:test"), decoding)

    assert both(folders, "quant.gguf", make)


def test_options_without_effect_are_named(tiny_gguf, tmp_path, capsys):
    made = ["quantize", "-m", str(tiny_gguf), "-o", str(tmp_path / "q.gguf"), "Q8_0"]
    assert invoke([*made, "-ngl", "9"]) == 0
    assert "--gpu-layers has no effect with --rounding stock" in capsys.readouterr().err
