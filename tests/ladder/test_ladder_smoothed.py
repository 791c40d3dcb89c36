"""A ladder of a model with balanced channels, where that helps."""

import json
import shutil

import numpy as np
import pytest
from plain_options import plain_options

from bitladder.engine import dequantize_into, quantize_rows
from bitladder.gguf import GgufFile
from bitladder.ladder import run
from bitladder.ladder.options import command_line
from bitladder.ladder.plan import steps_of
from bitladder.quantize import quantize
from bitladder.refine import ModelFiles, smooth_model, verify
from bitladder.refine.smooth.smoothed_model import KEY
from bitladder.rundir import Layout

CHANNELS = slice(None, None, 16)


def unbalance(path, out):
    """The same model with some channels of v and up made large, and what reads them small: work for smoothing."""
    shutil.copy(path, out)
    with GgufFile(path) as file, out.open("r+b") as stream:
        for name, tensor in file.tensors.items():
            maker, reader = "attn_v.weight" in name or "ffn_up.weight" in name, "output.weight" in name[4:]
            if not (maker or reader or "ffn_down.weight" in name):
                continue
            weights = np.empty((tensor.rows, tensor.width), np.float32)
            dequantize_into(file.read(tensor), tensor.type, weights)
            if maker:
                weights[CHANNELS] *= 32
            else:
                weights[:, CHANNELS] /= 32
            stream.seek(file.data_start + tensor.offset)
            stream.write(quantize_rows(weights, tensor.type, None).tobytes())


def options_for(model, out):
    return plain_options(
        model=str(model),
        out=out,
        rungs=("Q4_K_M",),
        chunks=4,
        imatrix_chunks=6,
        n_ctx=256,
        bench=False,
        smooth=True,
    )


def test_rungs_are_made_of_the_smoothed_model_where_it_helps(tiny_gguf, tmp_path):
    model, folder = tmp_path / "odd-f16.gguf", tmp_path / "ladder"
    unbalance(tiny_gguf, model)
    options = options_for(model, folder)
    made = run(options)
    assert {"smooth", "naive Q4_K_M", "quantize Q4_K_M"} <= set(made.made)
    rung, naive = (json.loads((folder / "scores" / f"Q4_K_M{part}.json").read_text()) for part in ("", ".naive"))
    assert rung["kld"]["value"] < naive["kld"]["value"]
    steps = json.loads((folder / "ladder.json").read_text())["steps"]
    assert steps["trial Q4_K_M"]["facts"]["smoothed"] and set(steps["smooth"]["facts"]["links"]) == {"attn_v", "ffn_up"}
    tried = json.loads(Layout(folder).trial("Q4_K_M").read_text())
    assert tried["after"] < tried["before"] and rung["smoothed"] and "smoothed" not in naive
    quant = next(folder.glob("*-Q4_K_M.gguf"))
    with GgufFile(quant) as file:
        assert len(file.get(KEY)) == 64
    assert run(options).made == ()
    # Anybody can make the same again from the full precision and the imatrix.
    again = ModelFiles(tmp_path / "s.gguf", tmp_path / "si.gguf")
    smooth_model(ModelFiles(model, folder / "imatrix.gguf"), again)
    assert (tmp_path / "s.gguf").read_bytes() == Layout(folder).smoothed.model.read_bytes()
    quantize(tmp_path / "s.gguf", tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "si.gguf")
    with GgufFile(quant) as ours, GgufFile(tmp_path / "q.gguf") as again:
        for name, tensor in ours.tensors.items():
            assert (ours.read(tensor) == again.read(again.tensors[name])).all()
    assert not verify(quant, tmp_path / "s.gguf", imatrix=tmp_path / "si.gguf").differing
    # A rung that is added makes again what was deleted and it reads. The first one stays.
    before = quant.read_bytes()
    shutil.rmtree(Layout(folder).work)
    assert run(options).made == ()
    added = run(options.replace(rungs=("Q4_K_M", "Q8_0"), release=True)).made
    new = {"preset Q8_0", "trial Q8_0", "naive Q8_0", "quantize Q8_0", "measure Q8_0", "score Q8_0", "score Q8_0.naive"}
    assert set(added) == {"smooth", "base", *new} and quant.read_bytes() == before
    assert not Layout(folder).work.exists()


def test_presets_share_tensors_and_are_what_quantize_makes(tiny_gguf, tmp_path):
    presets = ("Q4_K_S", "Q4_K_M")
    folder = run(options_for(tiny_gguf, tmp_path / "ladder").replace(rungs=presets)).folder
    for preset in presets:
        alone = tmp_path / "alone.gguf"
        quantize(tiny_gguf, alone, preset, imatrix=folder / "imatrix.gguf")
        assert Layout(folder).preset(preset).read_bytes() == alone.read_bytes()


def test_where_it_does_not_help_rungs_are_made_of_the_model_as_it_is(tiny_gguf, tmp_path):
    result = run(options_for(tiny_gguf, tmp_path / "ladder"))
    tried = json.loads(Layout(result.folder).trial("Q4_K_M").read_text())
    assert tried["after"] >= tried["before"] and not tried["smoothed"]
    with GgufFile(next(result.folder.glob("*-Q4_K_M.gguf"))) as file:
        assert file.get(KEY) is None
    rung, naive = (json.loads((result.folder / "scores" / f"Q4_K_M{part}.json").read_text()) for part in ("", ".naive"))
    assert rung["kld"]["value"] == pytest.approx(naive["kld"]["value"])


def test_smoothing_is_planned_unless_all_is_stock(tiny_gguf, tmp_path):
    options = options_for(tiny_gguf, tmp_path / "out")
    steps = {step.name: step for step in steps_of(options)}
    assert "trial Q4_K_M" in steps["quantize Q4_K_M"].needs and "smooth" not in steps["preset Q4_K_M"].needs
    assert "--mode naive --rounding stock --smooth --no-bench" in command_line(options, "m.gguf")
    best = options.replace(mode="quality", method="best", smooth=None)
    steps = {step.name: step for step in steps_of(best)}
    assert "moments" in steps["smooth"].needs
    assert all("trial Q4_K_M" in steps[name].needs for name in ("plan Q4_K_M", "quantize Q4_K_M"))
    assert "smooth" in steps["price smoothed IQ4_XS-Q8_0"].needs
    assert "smooth" not in steps["price original IQ4_XS-Q8_0"].needs
    assert "smooth" not in command_line(best, "m.gguf")
    assert "--no-smooth" in command_line(best.replace(smooth=False), "m.gguf")
