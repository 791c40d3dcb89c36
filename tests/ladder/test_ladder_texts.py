"""A run that measures on two texts: figures on each and their mean, in scores, card, report and terminal."""

import json
import math
import shutil

import numpy as np
import pytest
from plain_options import plain_options

from bitladder.cli import invoke
from bitladder.ladder import run
from bitladder.report import read_run, render_card, render_report
from bitladder.rundir import Layout
from bitladder.text import load_text

NAMES = ("prose.txt", "code.txt")
OPTIONS = {"rungs": ("Q4_0",), "chunks": 9, "imatrix_chunks": 4, "n_ctx": 64, "bench": False, "threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    """A run with the preset beside a rung of the smoothed model."""
    made = tmp_path_factory.mktemp("texts")
    text = load_text("pydoc:test").text
    for name, start in zip(NAMES, (0, 50_000), strict=True):
        (made / name).write_text(text[start : start + 6_000])
    files = tuple(str(made / name) for name in NAMES)
    run(plain_options(model=str(tiny_gguf), out=made / "run", texts=files, smooth=True, **OPTIONS))
    return made / "run"


def scores(folder, label):
    return json.loads((folder / "scores" / f"{label}.json").read_text())


def test_every_model_has_figures_on_each_text(folder):
    base = scores(folder, "base")
    assert [text["text"]["name"] for text in base["texts"]] == list(NAMES)
    logs = [math.log(text["ppl"]["value"]) for text in base["texts"]]
    assert math.log(base["ppl"]["value"]) == pytest.approx(np.mean(logs))
    bases = {path.name for path in Layout(folder).work.glob("*.base")}
    assert bases == {f"tiny-f16.{name}.64.base" for name in NAMES}
    for label in ("Q4_0", "Q4_0.naive"):
        score = scores(folder, label)
        klds = [text["kld"]["value"] for text in score["texts"]]
        assert score["kld"]["value"] == pytest.approx(np.mean(klds)) and klds[0] != klds[1]
    score, preset = scores(folder, "Q4_0"), scores(folder, "Q4_0.naive")
    for mine, theirs in zip(score["texts"], preset["texts"], strict=True):
        assert mine["paired"]["kld"]["value"] == pytest.approx(mine["kld"]["value"] - theirs["kld"]["value"])
    assert score["paired"]["kld"]["value"] == pytest.approx(score["kld"]["value"] - preset["kld"]["value"])


def test_card_report_and_terminal_show_each_text(folder, capsys):
    card, report = render_card(folder), render_report(folder)
    assert "means over 2 texts, each of which counts alike" in card
    heads = "| Model | KLD, prose.txt | KLD − preset's, prose.txt | KLD, code.txt | KLD − preset's, code.txt |"
    assert heads in card
    for text in scores(folder, "base")["texts"]:
        row = next(line for line in card.splitlines() if text["text"]["sha256"] in line)
        assert row.startswith(f"| `{text['text']['sha256']}` | {text['text']['name']}")
    assert '{"mean of the texts": {' in report and '"prose.txt": {' in report
    assert "KLD on each text" in report
    (rung,) = read_run(folder).on(1).rungs
    assert rung.scores.kld.value == scores(folder, "Q4_0")["texts"][1]["kld"]["value"]
    assert invoke(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "prose.txt + code.txt" in shown and "KLD on each text" in shown


def test_what_is_better_on_one_text_and_worse_on_another_is_named(folder, tmp_path):
    """Figures that a quant of another size might have: as good in the mean, but not on each text."""
    changed = tmp_path / "run"
    shutil.copytree(folder, changed)
    path = changed / "scores" / "Q4_0.json"
    score = json.loads(path.read_text())
    for text, gap in zip(score["texts"], (0.01, -0.02), strict=True):
        text["paired"]["kld"] = {"value": gap, "error": 0.001}
    path.write_text(json.dumps(score))
    sentence = "+0.0100 ± 0.0010 on prose.txt, −0.0200 ± 0.0010 on code.txt"
    assert sentence not in render_card(folder)
    card = render_card(changed)
    assert "Better on one text, worse on another" in card and sentence in card
    assert sentence in render_report(changed)
