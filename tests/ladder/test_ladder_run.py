"""Runs with quick stand-ins for the heavy steps; the last test is the real thing on the embedded model.

Started as a script (run, model, texts, seconds to spend per step), this file makes a ladder with the stand-ins: the
tests kill that process.
"""

import json
import os
import pathlib
import random
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from click.testing import CliRunner
from ladder_fakes import ALL_STEPS, RUNGS, SCORES, Fakes, Listener, contents, inputs_of, make_inputs
from plain_options import plain_options

from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile
from bitladder.ladder import run
from bitladder.progress import SILENT
from bitladder.report import read_unfinished, write_card
from bitladder.rundir import Layout, complete_manifest, last_command


@pytest.fixture
def fakes():
    made = Fakes()
    with made.patched():
        yield made


@pytest.fixture
def options(tmp_path):
    return make_inputs(tmp_path)


def test_a_run_makes_everything_and_again_nothing(options, fakes):
    result = run(options)
    assert list(result.made) == ALL_STEPS
    assert write_card(options.out)
    assert set(contents(options.out)) == {
        "README.md", "imatrix.gguf", "Toy-64-F16.gguf", ".planning/Toy-64-F16.text.txt.512.base", "bench.json",
        *(f"Toy-64-{rung}.gguf" for rung in RUNGS), *(f"recipes/{rung}.toml" for rung in RUNGS),
        *(f"{folder}/{name}.json" for folder in ("measured", "scores") for name in ("base", *RUNGS)),
        *(f"measured/{rung}.npz" for rung in RUNGS),
    }  # fmt: skip
    for one in result.scores:
        assert [test["test"] for test in one["bench"]] == ["pp512", "tg64"]
        nanoseconds = 1_000_000 * (options.out / one["model"]).read_bytes()[-1] + 1
        assert one["bench"][1]["tokens_per_second"]["value"] == pytest.approx(64e9 / nanoseconds)
    files = [f"Toy-64-{rung}.gguf" for rung in RUNGS]
    assert [one["model"] for one in result.scores] == ["Toy-64-F16.gguf", *files]
    # The library's blocks are made once: a rung copies from those before it what they have in the same type.
    assert fakes.copied == {rung: files[:place] for place, rung in enumerate(RUNGS)}
    with GgufFile(options.out / "Toy-64-F16.gguf") as file:
        assert file.get("general.basename") == "Toy"
    before = {path: path.stat().st_mtime_ns for path in options.out.rglob("*")}
    again = run(options)
    assert again.made == ()
    assert again.scores == result.scores
    assert not write_card(options.out)
    assert {path: path.stat().st_mtime_ns for path in options.out.rglob("*") if path != options.out} == {
        path: time_ns for path, time_ns in before.items() if path != options.out
    }
    assert str(options.out.parent) not in (options.out / "ladder.json").read_text()


def test_a_change_redoes_only_what_depends_on_it(options, fakes, tmp_path):
    run(options)
    measures = ["measure base", *(f"measure {rung}" for rung in RUNGS)]
    (tmp_path / "text.txt").write_text("other words " * 100)
    assert sorted(run(options).made) == sorted(["base", *measures, *SCORES])
    changed = options.replace(rungs=("Q6_K", *RUNGS), quantized_by="me")
    assert sorted(run(changed).made) == sorted(["quantize Q6_K", "measure Q6_K", "bench", "score Q6_K", *SCORES])
    silent = changed.replace(bench=False)
    result = run(silent)
    assert sorted(result.made) == sorted(["score Q6_K", *SCORES])
    assert not any("bench" in one for one in result.scores)
    assert list(run(silent.replace(threads=2)).made) == []
    (tmp_path / "calibration.txt").write_text("yet other words " * 100)
    assert "convert" not in run(silent).made
    assert list(run(silent.replace(rungs=("Q8_0",))).made) == []
    (options.out / "Toy-64-Q4_K_M.gguf").unlink()
    (options.out / "scores" / "Q8_0.json").write_text("{}")
    assert list(run(silent).made) == ["quantize Q4_K_M", "score Q8_0"]


def test_deleted_files_of_the_work_folder_are_made_again_when_a_step_reads_them(options, fakes):
    run(options)
    before, work = contents(options.out), Layout(options.out).work
    shutil.rmtree(work)
    assert run(options).made == () and not work.exists()
    more = options.replace(rungs=(*RUNGS, "Q6_K"), bench=False)
    result = run(more)
    assert sorted(result.made) == sorted([*SCORES, "base", "quantize Q6_K", "measure Q6_K", "score Q6_K"])
    after = contents(options.out)
    assert all(after[path] == content for path, content in before.items() if not path.startswith(("scores", "bench")))
    assert run(more).made == () and work.exists()
    assert run(more.replace(release=True)).made == () and not work.exists()
    assert contents(options.out) == {path: content for path, content in after.items() if ".planning" not in path}


def test_what_was_done_before_an_error_stays(options, fakes):
    with (
        mock.patch("bitladder.evaluate.measure_base", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(options)
    with pytest.raises(BitladderError, match="not finished"):
        write_card(options.out)
    assert list(run(options).made) == ALL_STEPS[3:]


def test_the_complete_ladder_stays_while_it_is_extended(options, fakes):
    first = options.replace(rungs=("Q4_K_M", "Q8_0"), bench=False)
    run(first)
    write_card(options.out)
    card = (options.out / "README.md").read_text()
    extended = first.replace(rungs=(*first.rungs, "Q6_K"))
    with mock.patch("bitladder.evaluate.measure", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(extended)
    assert complete_manifest(options.out)[1].rungs == first.rungs
    unfinished = read_unfinished(options.out)
    assert (unfinished.record.rungs, sorted(unfinished.measured), unfinished.missing) == (
        extended.rungs,
        ["Q4_K_M", "Q8_0", "base"],
        ("Q6_K",),
    )
    assert not write_card(options.out) and (options.out / "README.md").read_text() == card
    assert run(extended).made == ("measure Q6_K", "score Q6_K")
    assert complete_manifest(options.out)[1].rungs == extended.rungs and read_unfinished(options.out) is None
    # Other rungs of the same names are no extension: what was measured is not of the files that are there.
    (pathlib.Path(options.calibration[0])).write_text("other words " * 100)
    with mock.patch("bitladder.evaluate.measure", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(extended)
    with pytest.raises(BitladderError, match="not finished"):
        write_card(options.out)


def test_rungs_that_are_not_named_are_told_or_kept(options, fakes):
    run(options)
    listener = Listener()
    listener.task = SILENT.task
    narrow = options.replace(rungs=("Q8_0",), bench=False)
    assert run(narrow, progress=listener).rungs == ("Q8_0",)
    told = [line for line in listener.infos if "--keep" in line]
    assert told == ["IQ3_S, Q4_K_M: not in the card, because --ladder does not name them (--keep does)"]
    listener.infos.clear()
    assert run(narrow.replace(keep=True), progress=listener).rungs == ("Q8_0", "IQ3_S", "Q4_K_M")
    assert not any("--keep" in line for line in listener.infos)
    assert complete_manifest(options.out)[1].rungs == ("Q8_0", "IQ3_S", "Q4_K_M")


def test_a_gguf_is_used_where_it_is(options, fakes, tmp_path):
    run(options)
    model = tmp_path / "Elsewhere-F16.gguf"
    model.write_bytes((options.out / "Toy-64-F16.gguf").read_bytes())
    listener = Listener()
    given = options.replace(model=str(model), out=tmp_path / "second", outtype="f16")
    run(given, progress=listener)
    write_card(given.out)
    assert "no effect" in listener.warnings[0]
    assert not (given.out / "Elsewhere-F16.gguf").exists()
    assert (given.out / "Toy-64-Q8_0.gguf").read_bytes() == (options.out / "Toy-64-Q8_0.gguf").read_bytes()
    assert "not part of this repository" in (given.out / "README.md").read_text()
    # Its checkpoint is the same model, and another checkpoint is not.
    other = shutil.copytree(options.model, tmp_path / "Other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    before = contents(given.out)
    with pytest.raises(UsageError, match=r"has the ladder of Elsewhere-F16.gguf, and Other converts to another file"):
        run(given.replace(model=str(other)))
    assert contents(given.out) == before and complete_manifest(given.out)[1].model == "Elsewhere-F16.gguf"
    assert run(options.replace(out=given.out)).made == ("convert",)
    # In the run directory itself it is the model, and stays.
    inside = options.replace(model=str(options.out / "Toy-64-F16.gguf"))
    assert run(inside).made == () and run(options).made == ()
    assert (options.out / "Toy-64-F16.gguf").exists()


def test_another_model_does_not_take_the_directory(options, fakes, tmp_path):
    run(options)
    before = contents(options.out)
    other = tmp_path / "Other"
    shutil.copytree(options.model, other)
    with (other / "model.safetensors").open("ab") as stream:
        stream.write(b"another")
    with pytest.raises(
        UsageError, match=r"has the ladder of .*, and Other is another model \(model.safetensors differs\); .*--replace"
    ):
        run(options.replace(model=str(other)))
    assert contents(options.out) == before
    # The same weights under another name are the same model; so is its full-precision file, wherever it lies.
    same = tmp_path / "Same"
    shutil.copytree(options.model, same)
    assert "quantize Q8_0" not in run(options.replace(model=str(same))).made
    moved = tmp_path / "moved.gguf"
    moved.write_bytes((options.out / "Toy-64-F16.gguf").read_bytes())
    record = json.loads((options.out / "ladder.json").read_text())["run"]
    assert run(options.replace(model=str(moved), outtype="auto")).made == ()
    assert json.loads((options.out / "ladder.json").read_text())["run"]["model"] == record["model"]
    assert run(options.replace(model=str(same))).made == ()
    # Another configuration with the same weights is another model. What is said about a model is not.
    (same / "README.md").write_text("A better description.")
    assert "quantize Q8_0" not in run(options.replace(model=str(same))).made
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    with pytest.raises(UsageError, match=r"Same is another model \(config.json differs\)"):
        run(options.replace(model=str(same)))
    result = run(options.replace(model=str(other), replace_model=True))
    assert "quantize Q8_0" in result.made
    assert "--replace" not in json.loads((options.out / "ladder.json").read_text())["run"]["command"]


def test_a_short_text_is_used_and_said(options, fakes):
    listener = Listener()
    run(options.replace(chunks=9, imatrix_chunks=9), progress=listener)
    assert listener.warnings == [
        "text.txt has only 3 chunks, fewer than --chunks 9",
        "the calibration text has only 5 chunks, fewer than --imatrix-chunks 9",
    ]


def test_what_cannot_work_is_said_before_work(options, fakes, tmp_path):
    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            run(options.replace(**changes))
        assert fakes.scored == []

    refused(UsageError, "--out", out=tmp_path / "toy")
    refused(UsageError, "--out .* is a file", out=tmp_path / "text.txt")
    refused(UsageError, "--converter", converter=tmp_path / "none.py")
    refused(BitladderError, "nothing.txt", texts=(str(tmp_path / "nothing.txt"),))
    refused(BitladderError, "is not a GGUF", model=str(tmp_path / "text.txt"))
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=100)):
        refused(BitladderError, "--out .* GB free")


def test_the_command(options, fakes):
    from bitladder.cli.run import run_command

    arguments = [options.model, "--out", str(options.out), "--ladder", "iq3_s,Q8_0", "--text", options.texts[0],
                 "--calibration", options.calibration[0], "--quantized-by", "me", "--mode", "naive",
                 "--rounding", "stock"]  # fmt: skip
    done = CliRunner().invoke(run_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert {"F16", "IQ3_S", "Q8_0"} <= set(done.stdout.split())
    assert last_command(options.out) == shlex.join(["bitladder", "run", *arguments])
    assert (options.out / "run.log").read_text().endswith(" done\n")
    assert "quantized_by: me" in (options.out / "README.md").read_text()
    again = CliRunner().invoke(run_command, [*arguments, "--json"], catch_exceptions=False)
    assert "nothing to do" in again.stderr
    assert [one["model"] for one in json.loads(again.stdout)] == [
        "Toy-64-F16.gguf", "Toy-64-IQ3_S.gguf", "Toy-64-Q8_0.gguf",
    ]  # fmt: skip
    wrong = CliRunner().invoke(run_command, [options.model, "--out", str(options.out), "--ladder", "Q99"])
    assert isinstance(wrong.exception, UsageError)
    assert "Q99" in str(wrong.exception)
    assert "Q4_K_M" in str(wrong.exception)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(options, fakes, tmp_path):
    run(options)
    write_card(options.out)
    wanted = contents(options.out)
    aside = tmp_path / "aside"
    options.out.rename(aside)
    dice = random.Random(5)
    kills = 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for attempt in range(30):
        # Killed early at first, then later and later: the longer ones get to the steps at the end.
        command = [sys.executable, __file__, str(tmp_path), "0.06"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(dice.uniform(0.0, 0.15 * 1.2**attempt))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        process.stdout.close()
        if process.returncode == 0:
            break
    else:
        raise AssertionError("never finished")
    assert kills > 1
    assert contents(options.out) == wanted
    assert run(options).made == ()


def test_the_real_thing_on_the_embedded_model(tiny_checkpoint, calibration_text, tmp_path):
    if not any(tiny_checkpoint.glob("*.safetensors")):
        pytest.skip("the embedded model is not there")
    options = plain_options(
        model=str(tiny_checkpoint), out=tmp_path / "out", rungs=("Q4_K_M",), texts=(str(calibration_text),),
        calibration=(str(calibration_text),), chunks=2, imatrix_chunks=2, n_ctx=64,
        tasks=f"continuation:{calibration_text}", task_count=8, bench_tests=((32, 0), (0, 8), (16, 8)),
    )  # fmt: skip
    result = run(options)
    write_card(options.out)
    card = (options.out / "README.md").read_text()
    assert "| Model | continuation |" in card
    assert "(8 questions of `calibration.txt`)" in card
    full, quant = result.scores
    assert quant["base"] == {"model": full["model"], "sha256": full["sha256"]}
    assert 0 < quant["kld"]["value"] < 0.5
    assert quant["ppl_base"]["value"] == pytest.approx(full["ppl"]["value"], rel=1e-4)
    assert quant["bytes"] < full["bytes"]
    assert quant["tasks"]["continuation"]["count"] == full["tasks"]["continuation"]["count"] == 8
    assert run(options).made == ()
    assert all(test["tokens_per_second"]["value"] > 0 for one in result.scores for test in one["bench"])
    again = run(options.replace(task_count=4)).made
    assert again == ("measure base", "measure Q4_K_M", "score base", "score Q4_K_M")


if __name__ == "__main__":
    with Fakes(float(sys.argv[2])).patched():
        print("ready", flush=True)
        given = inputs_of(pathlib.Path(sys.argv[1]))
        run(given)
        write_card(given.out)
