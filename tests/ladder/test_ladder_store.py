import os
import pathlib
import shutil

import numpy as np
import pytest

from bitladder.calibrate import UnfinishedWork
from bitladder.errors import BitladderError, UsageError
from bitladder.files import write_text
from bitladder.ladder import store as module
from bitladder.ladder.steps.step import Product
from bitladder.ladder.store import open_store
from bitladder.rundir import Layout, Manifest, RunRecord, complete_manifest, load_manifest

INPUTS = {"code": 1, "options": {"n": 1}}


class Listener:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    warn = info


class Work:
    """Writes a file and counts how often."""

    def __init__(self, path: pathlib.Path, text: str = "result") -> None:
        self.path, self.text, self.calls = path, text, 0

    def __call__(self) -> Product:
        self.calls += 1
        write_text(self.path, self.text)
        return Product([self.path], {"calls": self.calls})


def once(folder: pathlib.Path, work: Work, inputs: dict | None = None, progress: Listener | None = None) -> None:
    with open_store(folder, progress=progress or Listener()) as store:
        store.ensure("step", inputs or INPUTS, work)


def test_complete_work_is_not_done_again(tmp_path):
    work = Work(tmp_path / "a.txt")
    once(tmp_path, work)
    before = (tmp_path / "ladder.json").read_bytes()
    with open_store(tmp_path) as store:
        record = store.ensure("step", INPUTS, work)
        assert store.made == []
        store.finish()
    assert work.calls == 1
    assert record.facts == {"calls": 1}
    assert (tmp_path / "ladder.json").read_bytes() == before


def test_a_changed_input_redoes_the_step_and_says_which(tmp_path):
    work, listener = Work(tmp_path / "a.txt"), Listener()
    once(tmp_path, work)
    once(tmp_path, work, {"code": 1, "options": {"n": 2}}, listener)
    assert work.calls == 2
    assert listener.lines == ["step: made again, because option n changed"]


def test_options_that_follow_from_added_steps_are_no_reason(tmp_path):
    work, listener = Work(tmp_path / "a.txt"), Listener()
    before = {"code": 1, "options": {"presets": ["A"]}, "quantize A": "…"}
    once(tmp_path, work, before)
    once(tmp_path, work, before | {"options": {"presets": ["A", "B"]}, "quantize B": "…"}, listener)
    assert listener.lines == ["step: made again, because quantize B was added"]


def test_a_crash_between_file_and_manifest_redoes_the_step(tmp_path, monkeypatch):
    work = Work(tmp_path / "a.txt")
    with open_store(tmp_path) as store, monkeypatch.context() as patched, pytest.raises(RuntimeError):

        def crash(*_):
            raise RuntimeError

        patched.setattr(Manifest, "save", crash)
        store.ensure("step", INPUTS, work)
    assert (tmp_path / "a.txt").exists()
    once(tmp_path, work)
    assert work.calls == 2
    once(tmp_path, work)
    assert work.calls == 2


def test_a_failure_while_redoing_leaves_the_old_entry_and_no_trust_in_it(tmp_path):
    work = Work(tmp_path / "a.txt")
    once(tmp_path, work)
    other = Work(tmp_path / "a.txt", "other result")

    def half() -> Product:
        other()
        raise BitladderError("no")

    with open_store(tmp_path) as store, pytest.raises(BitladderError):
        store.ensure("step", {"code": 2}, half)
    # Back to the first options: the key fits, the file does not.
    once(tmp_path, work)
    assert work.calls == 2
    assert (tmp_path / "a.txt").read_text() == "result"


@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped"])
def test_a_damaged_output_is_made_again(tmp_path, damage):
    work, listener = Work(tmp_path / "a.txt"), Listener()
    once(tmp_path, work)
    path = tmp_path / "a.txt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("resul" if damage == "shorter" else "rEsult")
    once(tmp_path, work, progress=listener)
    assert work.calls == 2
    assert path.read_text() == "result"
    assert ("a.txt is missing" if damage == "missing" else "a.txt was changed") in listener.lines[0]


def test_moving_or_copying_the_directory_redoes_nothing(tmp_path):
    work = Work(tmp_path / "one" / "a.txt")
    once(tmp_path / "one", work)
    (tmp_path / "one").rename(tmp_path / "two")
    once(tmp_path / "two", work)
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    once(tmp_path / "three", work)
    assert work.calls == 1


def test_unchanged_files_are_hashed_once(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.write_text("x")
    counted = []
    real = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: counted.append(path) or real(path))
    for _ in range(2):
        with open_store(tmp_path / "run") as store:
            first = store.sha256(data, "model: data")
            store.finish()
    assert len(counted) == 1
    data.write_text("y")
    with open_store(tmp_path / "run") as store:
        assert store.sha256(data, "model: data") != first


def test_two_runs_in_one_directory(tmp_path):
    with open_store(tmp_path), pytest.raises(BitladderError, match=f"process {os.getpid()}"), open_store(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("99999\n")  # left by a killed run
    with open_store(tmp_path):
        pass


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    with open_store(tmp_path):
        pass
    (tmp_path / "scores").mkdir()
    trial = tmp_path / ".planning" / "smoothed" / ".trial.abc.tmp"
    trial.mkdir(parents=True)
    left = [tmp_path / ".x.gguf.abc.tmp", tmp_path / "scores" / ".Q4_K_M.json.abc.tmp", trial / "quant.gguf"]
    kept = [tmp_path / "mine.tmp", tmp_path / "imatrix.gguf.partial"]
    for path in left + kept:
        path.write_text("half")
    with open_store(tmp_path):
        pass
    assert [path.exists() for path in left + kept] == [False, False, False, True, True]
    assert not trial.exists()


def test_unfinished_work_without_its_key_does_not_stop_the_next_run(tmp_path):
    layout = Layout(tmp_path)
    outputs = [layout.imatrix, layout.moments, layout.smoothed.moments, tmp_path / ".x-Q4_K_M.gguf.tmp"]
    strange = tmp_path / "notes.parts"
    with open_store(tmp_path):
        for out in outputs:
            UnfinishedWork(out, "key").put("part", np.arange(3.0))
        strange.mkdir()
    for out in outputs[:3]:
        (out.with_name(f"{out.name}.parts") / "key").unlink()
    with open_store(tmp_path) as store:
        assert [UnfinishedWork(out, "key").has("part") for out in outputs] == [False, False, False, True]
        store.finish()
    assert not layout.unfinished() and strange.is_dir()


def test_a_directory_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("fine")
    with open_store(tmp_path):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="--out .*README.md"), open_store(tmp_path / "other"):
        pass
    assert (tmp_path / "other" / "README.md").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"), open_store(tmp_path / "notes.txt"):
        pass


def test_a_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / "ladder.json").write_text('{"schema_version": 7}')
    with pytest.raises(BitladderError, match="schema_version"), open_store(tmp_path):
        pass
    (tmp_path / "ladder.json").write_text("{")
    with pytest.raises(BitladderError, match="damaged"):
        load_manifest(tmp_path)


def test_a_run_counts_as_complete_only_when_it_is(tmp_path):
    run = RunRecord(command="c", model="m", model_id=None, rungs=("Q8_0",), n_ctx=512)
    work = Work(tmp_path / "a.txt")
    with pytest.raises(BitladderError, match="not a run directory"):
        complete_manifest(tmp_path)
    with open_store(tmp_path) as store:
        store.begin(run)
        store.ensure("step", INPUTS, work)
    with pytest.raises(BitladderError, match="not finished"):
        complete_manifest(tmp_path)
    with open_store(tmp_path) as store:
        store.begin(run)
        store.finish()
    assert complete_manifest(tmp_path)[1].complete
    # As soon as anything is made again, it is incomplete until the end.
    (tmp_path / "a.txt").unlink()
    with open_store(tmp_path) as store:
        store.begin(run)
        assert complete_manifest(tmp_path)
        store.ensure("step", INPUTS, work)
    with pytest.raises(BitladderError, match="not finished"):
        complete_manifest(tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({"plan A": 1}, {"plan A": 2}, "plan A changed"),
        ({"plan A": 1}, {"plan A": 1, "plan B": 1}, "plan B was added"),
        ({"plan A": 1, "plan B": 1, "plan C": 1}, {"plan C": 1}, "plan A and plan B were left out"),
        ({f"plan {rung}": 1 for rung in "ABCD"}, {}, "plan A, plan B, plan C and plan D were left out"),
        ({"plan A": 1, "options": {"n": 1}}, {"options": {"n": 2}}, "option n changed, plan A was left out"),
        ({}, {}, "its key changed"),
    ],
)
def test_why_a_step_is_made_again_says_what_came_and_went(before, now, why):
    assert module._difference(before, now) == why
