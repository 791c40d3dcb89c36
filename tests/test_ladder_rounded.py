"""A ladder whose blocks are chosen for the layers' outputs."""

import json

import pytest

from bitladder.ladder import RunOptions, run
from bitladder.ladder.plan import command_line, plan
from bitladder.ladder.rounded import MOMENTS, PLAIN
from bitladder.model.reader import GgufFile
from bitladder.quantize import RUNGS


@pytest.fixture(scope="module")
def options(tiny_gguf, tmp_path_factory):
    return RunOptions(
        model=str(tiny_gguf),
        out=tmp_path_factory.mktemp("rounded") / "ladder",
        rungs=("Q3_K_S",),
        chunks=6,
        imatrix_chunks=6,
        moments_chunks=6,
        n_ctx=256,
        bench=False,
        rounding="feedback",
    )


def test_a_rung_has_less_divergence_than_its_preset_and_is_made_once(options):
    made = run(options)
    assert {"moments", "naive Q3_K_S", "quantize Q3_K_S"} <= set(made.made)
    folder = options.out
    assert (folder / MOMENTS).is_file() and (folder / PLAIN).is_file()
    rung, naive = (json.loads((folder / "scores" / f"Q3_K_S{part}.json").read_text()) for part in ("", ".naive"))
    assert rung["rounding"] == "feedback" and naive["role"] == "naive"
    assert rung["kld"]["value"] < naive["kld"]["value"]
    gain = rung["paired"]["kld"]
    assert gain["value"] == pytest.approx(rung["kld"]["value"] - naive["kld"]["value"])
    assert gain["value"] < -gain["error"] < 0
    with GgufFile(next(folder.glob("*-Q3_K_S.gguf"))) as file:
        assert file.get("bitladder.rounding") == "feedback"
    guard = json.loads((folder / "ladder.json").read_text())["steps"]["quantize Q3_K_S"]["facts"]["guard"]
    assert guard["after"]["value"] < guard["before"]["value"]
    assert run(options).made == ()


def test_what_depends_on_rounding_is_planned(options):
    steps = {step.name: step for step in plan(options)}
    assert "moments" in steps["quantize Q3_K_S"].needs and "moments" not in steps["naive Q3_K_S"].needs
    stock = {step.name for step in plan(options.model_copy(update={"rounding": "stock"}))}
    assert not {"moments", "naive Q3_K_S"} & stock
    planned = {step.name: step for step in plan(options.model_copy(update={"mode": "quality"}))}
    assert "moments" in planned["price"].needs
    assert "--rounding feedback --moments-chunks 6" in command_line(options, "m.gguf", RUNGS)
