"""`bitladder show`: the table's figures are the scores', the plot's places the logarithms', the front brute force's."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil

import pytest

from bitladder.cli import invoke
from bitladder.engine import Context, Decoding, Model, log
from bitladder.progress import SILENT
from bitladder.report import RunModel, read_run
from bitladder.rundir import Layout, RunLog, follow, last_command
from bitladder.rundir import manifest as run_manifest
from bitladder.show import deletable, next_steps
from bitladder.show.ladder_tables import front, pareto_plot
from bitladder.show.table import Point, scatter


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """A run with a preset by itself and a file of somebody else: figures of Q4_K_M, a little worse and larger."""
    folder = shutil.copytree(small_run, tmp_path_factory.mktemp("show") / "run")
    score = json.loads((folder / "scores" / "Q4_K_M.json").read_text())
    for name, role, factor, size in (("Q4_K_M.naive", "naive", 1.5, 10), ("owner_X", "third-party", 0.9, 999_999)):
        kld = score["kld"] | {"value": score["kld"]["value"] * factor}
        changed = score | {"role": role, "kld": kld, "bytes": score["bytes"] + size}
        (folder / "scores" / f"{name}.json").write_text(json.dumps(changed))
    speed = {"test": "pp512", "tokens_per_second": {"value": 321.5, "error": 2.5}, "stddev": 4.3, "repetitions": 3,
             "n_prompt": 512, "n_gen": 0, "n_depth": 0, "n_batch": 2048, "n_ubatch": 512, "threads": 1,
             "gpu_layers": 0, "flash_attn": "auto", "backend": "CPU", "cpu": "Some CPU"}  # fmt: skip
    timed = folder / "scores" / "Q8_0.json"
    timed.write_text(json.dumps(json.loads(timed.read_text()) | {"bench": [speed]}))
    manifest = json.loads((folder / "ladder.json").read_text())
    manifest["run"]["compared"] = ["owner_X"]
    (folder / "ladder.json").write_text(json.dumps(manifest))
    return folder


def test_table_and_plot(folder, capsys):
    assert invoke(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    lines = {line[2:].split("  ")[0].strip(): line for line in shown.splitlines()}
    for rung in ("Q4_K_M", "Q8_0"):
        score = json.loads((folder / "scores" / f"{rung}.json").read_text())
        assert f" {score['bpw']:.2f} " in lines[rung]
        assert f"{score['bytes'] / 1e9:.4g}" in lines[rung]
        written = lines[rung].split("± ")  # PPL, KLD, RMS Δp, same top
        assert float(written[1].split()[-1]) == pytest.approx(score["kld"]["value"], rel=0.02)
    assert [line[:1] for line in (lines["Q4_K_M"], lines["Q4_K_M preset ◇"], lines["owner_X †"])] == ["▸", " ", "▸"]
    # Only Q8_0 was timed, and the others' rows do not slip.
    assert lines["Q8_0"].endswith("321.5 ± 2.5") and lines["owner_X †"].rstrip().endswith("–")
    assert "● Q8_0" in shown and "† by others" in shown
    assert invoke(["show", str(folder), "--no-plot"]) == 0
    assert "●" not in capsys.readouterr().out


def test_json_is_what_the_run_wrote(folder, capsys):
    assert invoke(["show", str(folder), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [one["role"] for one in models] == ["base", "rung", "naive", "third-party", "rung"]
    assert [one["pareto"] for one in models] == [False, True, False, True, True]
    for one, name in zip(models, ("base", "Q4_K_M", "Q4_K_M.naive", "owner_X", "Q8_0"), strict=True):
        assert json.loads((folder / "scores" / f"{name}.json").read_text()).items() <= one.items()


def test_front_against_every_pair(folder):
    run, generator = read_run(folder), random.Random(3)
    model = run.rungs[0]
    for _ in range(50):
        made = []
        for number in range(8):
            size, kld = generator.randint(1, 6), generator.randint(1, 6) / 10
            scores = model.scores.model_copy(
                update={"bytes": size, "kld": model.scores.kld.model_copy(update={"value": kld})}
            )
            made.append(RunModel(str(number), "rung", scores))
        pairs = [(one.scores.bytes, one.scores.kld.value) for one in made]
        expected = {
            (size, kld)
            for size, kld in pairs
            if not any((a <= size and b < kld) or (a < size and b <= kld) for a, b in pairs)
        }
        assert {(one.scores.bytes, one.scores.kld.value) for one in front(made)} == expected


def test_equal_ratios_are_equally_far_apart():
    points = [Point(10.0**i, 10.0 ** (6 - 2 * i), "*") for i in range(4)]
    lines = scatter(points, width=70, height=25)
    found = [(row, line.index("*")) for row, line in enumerate(lines) if "*" in line]
    assert len(found) == 4
    for axis in (0, 1):
        steps = [b[axis] - a[axis] for a, b in itertools.pairwise(found)]
        assert max(steps) - min(steps) <= 1 and min(steps) > 0  # further right and lower down
    assert max(map(len, lines)) <= 70


def test_ticks_stand_where_their_values_are():
    lines = scatter([Point(1, 1, "*"), Point(1000, 1000, "*")], width=80, height=31)
    rows = [row for row, line in enumerate(lines) if "*" in line]
    ticks = {float(line.split("┤")[0]): row for row, line in enumerate(lines) if "┤" in line}
    for value, row in ticks.items():
        share = math.log10(value) / 3
        assert row == pytest.approx(rows[1] + (rows[0] - rows[1]) * share, abs=1.01)
    assert set(ticks) == {1, 10, 100, 1000}


@pytest.mark.parametrize("points", [[], [Point(0, 1, "*")], [Point(1, 0, "*")]])
def test_nothing_to_draw(points):
    assert scatter(points, width=60, height=10) == []


def test_one_point():
    lines = scatter([Point(3.2e9, 0.02, "●", "Q4_K_M")], width=60, height=8)
    assert sum("● Q4_K_M" in line for line in lines) == 1


def test_not_a_run(tmp_path, capsys):
    assert invoke(["show", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err


def test_what_comes_next(small_run, monkeypatch):
    """The largest rung that fits with the caches and buffers of its context, as llama.cpp reports them."""
    run = read_run(small_run)
    context = run.usual_context
    assert context in run.beside and f"-c {context}" in "\n".join(next_steps(run))
    sizes = [model.scores.bytes for model in run.rungs]
    with (
        Model(small_run / run.rungs[0].scores.model) as model,
        log.tapped() as pieces,
        Context(model, Decoding(n_ctx=context, threads=1)),
    ):
        pass
    beside = 2**20 * sum(map(float, re.findall(r"buffer size = +([\d.]+) MiB", "".join(pieces))))
    # Memories around the two files with what stands beside them.
    memories = [(sizes[0] + beside - 100) / 1e9, (sizes[0] + beside + 100) / 1e9, (sizes[1] + beside + 100) / 1e9]
    monkeypatch.setattr("bitladder.show.ladder_tables.USUAL_MEMORIES", memories)
    lines = "\n".join(next_steps(run))
    assert f"for {memories[0]} GB: no rung" in lines
    for memory, rung in zip(memories[1:], ("Q4_K_M", "Q8_0"), strict=True):
        (line,) = [line for line in lines.splitlines() if f"for {memory} GB" in line]
        (path,) = [word for word in shlex.split(line) if word.endswith(".gguf")]
        assert f": {rung}, llama-server -m " in line and pathlib.Path(path).samefile(
            next(small_run.glob(f"*{rung}.gguf"))
        )
    assert str(small_run / "README.md") in lines
    for repo, shown in ((None, "OWNER/NAME"), ("me/Tiny-GGUF", "me/Tiny-GGUF")):
        named = dataclasses.replace(run, record=run.record.model_copy(update={"repo": repo}))
        assert f"publish: bitladder push {small_run} {shown}" in next_steps(named)


def test_the_table_of_the_tutorial_is_what_is_printed(small_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert invoke(["show", str(small_run), "--no-plot"]) == 0
    head = capsys.readouterr().out.splitlines()[1]
    monkeypatch.setenv("COLUMNS", "200")
    assert invoke(["show", str(small_run), "--no-plot"]) == 0
    base = capsys.readouterr().out.splitlines()[3]
    tutorial = (pathlib.Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
    for line in (head, base.split("±")[0].rsplit(maxsplit=1)[0]):  # the perplexity is of another text
        assert " ".join(line.split()) in " ".join(tutorial.split())


def test_what_may_be_deleted_is_not_what_a_run_at_work_uses(small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    Layout(folder).work.mkdir(exist_ok=True)
    (Layout(folder).work / "x.base").write_bytes(b"1" * 1234)
    (line,) = deletable(read_run(folder))
    assert (
        f"may be deleted: {Layout(folder).work} (" in line
        and "A run that adds a rung would then repeat: base (" in line
    )
    Layout(folder).lock.write_text(f"{os.getpid()}\n")
    assert deletable(read_run(folder)) == []


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_plot_and_its_legend_are_no_wider_than_asked(folder, width):
    lines = pareto_plot(read_run(folder), width=width, height=8)
    assert max(map(len, lines)) <= width
    assert {"● a rung", "◇ a plain preset", "† by others"} <= set(re.split("   |\n", "\n".join(lines)))


@pytest.fixture
def extended(small_run, tmp_path):
    """A run that is extended by Q6_K and was stopped before it was made; its log knows the command."""
    folder = shutil.copytree(small_run, tmp_path / "run")
    manifest = json.loads((folder / "ladder.json").read_text())
    manifest["before"] = manifest["run"]
    manifest["run"] = manifest["run"] | {"rungs": ["Q4_K_M", "Q8_0", "Q6_K"], "complete": False}
    (folder / "ladder.json").write_text(json.dumps(manifest))
    RunLog(SILENT, Layout(folder), "bitladder run 'my model' --out d").begin()
    return folder


def test_a_run_that_is_extended_shows_the_ladder_before(extended, capsys):
    assert invoke(["show", str(extended), "--no-plot"]) == 0
    shown = capsys.readouterr()
    assert "Q8_0" in shown.out and "Q6_K" not in shown.out
    assert "Continue it with: bitladder run 'my model' --out d" in shown.err
    assert invoke(["push", str(extended), "someone/Tiny-GGUF", "--dry-run"]) == 0


def test_a_run_that_is_at_work_is_followed_and_not_started_again(extended, capsys):
    Layout(extended).lock.write_text(f"{os.getpid()}\n")
    assert invoke(["show", str(extended), "--no-plot"]) == 0
    shown = capsys.readouterr().err
    assert f"is at work. Follow it with: bitladder show {extended} --follow" in shown and "Continue" not in shown


def test_a_run_that_is_not_complete_shows_what_there_is(extended, capsys):
    manifest = json.loads((extended / "ladder.json").read_text())
    manifest["steps"]["quantize Q4_K_M"]["outputs"][0]["sha256"] = "0" * 64  # another file than was measured
    (extended / "ladder.json").write_text(json.dumps(manifest))
    assert invoke(["show", str(extended), "--json", "-q"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["complete"], shown["missing"]) == (False, ["Q6_K"])
    for model in shown["models"]:
        measured = json.loads((extended / "measured" / f"{model['label']}.json").read_text())
        assert measured.items() <= model.items()
    assert invoke(["show", str(extended)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    kld = json.loads((extended / "measured" / "Q8_0.json").read_text())["kld"]["value"]
    assert float(rows["Q8_0"].split(" ± ")[-2].split()[-1]) == pytest.approx(kld, rel=0.02)
    assert rows["Q6_K"].split()[1:] == ["–"] * 4
    for command in (["push", str(extended), "someone/Tiny-GGUF", "--dry-run"], ["card", str(extended)]):
        capsys.readouterr()
        assert invoke(command) == 1
        assert "not finished. Continue it with: bitladder run 'my model' --out d" in capsys.readouterr().err
    Layout(extended).lock.write_text(f"{os.getpid()}\n")
    assert invoke(["card", str(extended)]) == 1
    assert f"It is at work. Follow it with: bitladder show {extended} --follow" in capsys.readouterr().err


def test_follow_ends_with_the_run(extended):
    layout = Layout(extended)
    layout.lock.write_text(f"{os.getpid()}\n")  # a process that lives
    log = RunLog(SILENT, layout, "bitladder run m --out d")
    log.begin()
    script = [lambda: log.info("one"), lambda: log.warn("two\nlines"), layout.lock.unlink]
    lines = list(follow(extended, sleep=lambda _seconds: script.pop(0)()))
    assert [line[20:] for line in lines] == [
        "$ bitladder run 'my model' --out d", "$ bitladder run m --out d", "one", "warning: two lines",
    ]  # fmt: skip
    assert not script and last_command(extended) == "bitladder run m --out d"


def test_the_log_stays_small_and_is_followed_across_its_cut(extended, monkeypatch):
    monkeypatch.setattr(run_manifest, "LARGEST", 4000)
    monkeypatch.setattr(run_manifest, "KEPT", 1000)
    layout = Layout(extended)
    layout.lock.write_text(f"{os.getpid()}\n")
    log = RunLog(SILENT, layout, "bitladder run m --out d")
    log.begin()
    numbers = iter(range(400))

    def work(_seconds):
        for _ in range(5):
            log.write(f"line {next(numbers)}")
        if next(numbers) > 390:
            layout.lock.unlink()

    followed = [line[20:] for line in follow(extended, sleep=work)]
    assert followed[2:] == [f"line {number}" for number in range(396) if number % 6 != 5]
    assert layout.log.stat().st_size <= 4100


def test_who_stops_following_has_stopped_no_run(tmp_path, monkeypatch, capsys):
    def interrupted(folder):
        yield "made Q4_K_M"
        raise KeyboardInterrupt

    monkeypatch.setattr("bitladder.rundir.follow", interrupted)
    assert invoke(["show", str(tmp_path), "--follow"]) == 130
    assert capsys.readouterr() == ("made Q4_K_M\n", "")
