"""A ladder whose blocks are chosen for the layers' outputs."""

import json

import pytest
from plain_options import plain_options

from bitladder.gguf import GgufFile
from bitladder.ladder import run
from bitladder.ladder.options import command_line
from bitladder.ladder.plan import steps_of
from bitladder.quantize import TUNE_KEY
from bitladder.report import write_card
from bitladder.rundir import Layout
from bitladder.text import load_text, set_apart


@pytest.fixture(scope="module")
def options(tiny_gguf, tmp_path_factory):
    return plain_options(
        model=str(tiny_gguf),
        out=tmp_path_factory.mktemp("rounded") / "ladder",
        rungs=("Q3_K_S",),
        chunks=6,
        imatrix_chunks=6,
        moments_chunks=6,
        n_ctx=256,
        bench=False,
        method="feedback",
        smooth=False,
        tune_chunks=0,
    )


def test_a_rung_has_less_divergence_than_its_preset_and_is_made_once(options):
    made = run(options)
    assert {"moments", "naive Q3_K_S", "quantize Q3_K_S"} <= set(made.made)
    folder = options.out
    layout = Layout(folder)
    assert layout.moments.is_file() and layout.plain_moments.is_file()
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


def test_a_rung_is_tuned_on_text_it_is_not_tried_on(options, tmp_path):
    texts = [load_text("pydoc:calibration")]
    first, end = set_apart(texts, 0.1)
    assert first[0].text + end[0].text == texts[0].text
    assert first[0].sha256 != texts[0].sha256
    tuned = options.replace(out=tmp_path / "ladder", tune_chunks=24, n_ctx=128)
    run(tuned)
    score = json.loads((tuned.out / "scores" / "Q3_K_S.json").read_text())
    assert score["tuned"] is True
    with GgufFile(next(tuned.out.glob("*-Q3_K_S.gguf"))) as file:
        assert file.get(TUNE_KEY).startswith("24 × 128 tokens")
    write_card(tuned.out)
    assert "rounding: feedback; tuned" in (tuned.out / "README.md").read_text()
    assert run(tuned).made == ()


def test_what_depends_on_rounding_is_planned(options):
    steps = {step.name: step for step in steps_of(options)}
    assert "moments" in steps["quantize Q3_K_S"].needs and "moments" not in steps["preset Q3_K_S"].needs
    stock = {step.name for step in steps_of(options.replace(method="stock"))}
    assert not {"moments", "naive Q3_K_S"} & stock
    planned = {step.name: step for step in steps_of(options.replace(mode="quality"))}
    assert "moments" in planned["price original IQ3_S-Q3_K_L"].needs
    line = command_line(options, "m.gguf")
    assert "--moments-chunks 6 --rounding feedback" in line
