"""Time left and what a run tells while it works, on a clock of our own."""

import dataclasses
import json
import pathlib
import shlex

import pytest
from click.testing import CliRunner
from plain_options import plain_options

from bitladder.cli import application
from bitladder.ladder.estimate import Machine, extent_of, shape_of
from bitladder.ladder.model_shape import Matrix, ModelShape
from bitladder.ladder.plan import steps_of
from bitladder.ladder.steps.step import Extent, Part
from bitladder.ladder.tracker import CLOSE, SPREAD, Best, Pace, TimeLeft, Tracker
from bitladder.progress import SILENT
from bitladder.rundir import Layout, RunLog
from bitladder.show.ladder_tables import RunDisplay, best_text, time_left_text
from bitladder.text import load_text
from bitladder.units import duration

PARTS = {
    "base": [Part("decode", 100.0, "base")],
    "quantize A": [Part("round", 10.0, "rounding"), Part("guard", 10.0, "guard")],
    "measure A": [Part("decode", 100.0, "divergence")],
    "quantize B": [Part("round", 20.0, "rounding"), Part("guard", 10.0, "guard")],
    "measure B": [Part("decode", 100.0, "divergence")],
}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def between(left, known, guessed=0.0):
    """Whether the time left is what is known, and what is only guessed, smaller or larger by the factor of a guess."""
    assert (left.least, left.most) == pytest.approx((known + guessed / SPREAD, known + guessed * SPREAD))
    assert (left.seconds is None) == (left.most > CLOSE**2 * left.least)
    return True


def test_time_left_follows_what_was_seen():
    pace = Pace(PARTS)
    pace.begin("base", 0)
    pace.bar("Base of model.gguf", 0)
    assert pace.left(0) is None  # nothing is known yet
    pace.advance(0.05)
    assert pace.left(5) is None  # less than a tenth of the time is over
    pace.advance(0.5)
    # 50 of 350 done in 10 s: 250 of that kind are left, and 50 of kinds whose rate is only guessed.
    assert between(pace.left(10), 10 / 50 * 250, 10 / 50 * 50)
    pace.end(20, made=True)
    assert between(pace.left(20), 20 / 100 * 200, 20 / 100 * 50)
    pace.begin("quantize A", 20)
    pace.bar("rounding", 20)
    pace.bar("guard", 50)  # rounding is over: 3 s for a unit of it, and none of a guard is known
    everything = (20 + 30) / (100 + 10)
    assert between(pace.left(50), 200 * 0.2 + 20 * 3, 20 * everything)
    # A guard that has lasted for its expected time may last as long as its kind may.
    assert pace.left(60).most == pytest.approx(200 * 0.2 + 20 * 3 + 20 * everything * SPREAD - 10)
    pace.end(60, made=True)
    assert between(pace.left(60), 200 * 0.2 + 20 * 3 + 10 * 1)
    pace.begin("measure A", 60)
    pace.bar("Divergence of A.gguf", 60)
    pace.end(80, made=True)
    pace.begin("quantize B", 80)
    pace.bar("rounding", 80)
    pace.advance(0.5)
    # What is under way goes on at its own rate: 10 of 20 units in 20 s.
    assert between(pace.left(100), 20 + 10 + 20)
    pace.advance(0.2)  # a share never falls
    assert between(pace.left(100), 20 + 10 + 20)
    pace.end(120, made=True)
    pace.begin("measure B", 120)
    pace.end(130, made=True)
    assert between(pace.left(130), 0)


def test_what_was_complete_tells_nothing_of_time():
    pace = Pace(PARTS)
    for step in ("base", "quantize A", "measure A", "quantize B"):
        pace.begin(step, 0)
        pace.end(0, made=False)
    assert pace.left(0) is None
    pace.begin("measure B", 0)
    pace.bar("divergence of b", 0)
    pace.advance(0.5)
    assert between(pace.left(1), 1)


def test_every_step_that_takes_time_has_parts(tiny_gguf):
    text = load_text("pydoc:test")
    for mode, method in (("naive", "stock"), ("quality", "best")):
        options = plain_options(rungs=("IQ3_S", "Q8_0"), mode=mode, method=method, chunks=8)
        shape = dataclasses.replace(shape_of(str(tiny_gguf)), bytes=None)
        extent = extent_of(options, shape, [text], [text], {"arc": 40}, models=3)
        parts = {step.name: step.parts(extent) for step in steps_of(options)}
        untimed = {"memory", "candidates", "score base", "price original IQ3_S-Q3_K_L", "price original IQ4_XS-Q8_0"}
        untimed |= {f"score {rung}{part}" for rung in ("IQ3_S", "Q8_0") for part in ("", ".naive")}
        assert {name for name, of_step in parts.items() if not of_step} == untimed & parts.keys()
        amounts = {name: sum(part.amount for part in of_step) for name, of_step in parts.items()}
        assert extent.text == 8 * 512
        assert amounts["quantize IQ3_S"] > amounts["quantize Q8_0"] > 0


# Runs of the embedded model and of one with 127M weights, recorded by benchmarks/pace.py: the command, how much there
# was to do, and the CPU seconds of each part. The amounts are those of today.
RECORDED = sorted((pathlib.Path(__file__).parent / "pace").glob("*.json"))
SLICES = 20


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_amounts_are_seconds_of_the_machine_that_recorded_them(path, monkeypatch):
    recording, options = json.loads(path.read_text()), []
    monkeypatch.setattr("bitladder.ladder.run", lambda options_of_run, **_: options.append(options_of_run))
    CliRunner().invoke(application, shlex.split(recording["command"])[1:])
    steps, extent = steps_of(options[0]), extent_in(recording)
    machine = Machine(**recording.get("machine", {}))
    seconds = sum(part["seconds"] for part in recording["parts"])
    expected = sum(machine.seconds(part) for step in steps for part in step.parts(extent))
    assert expected == pytest.approx(seconds, rel=0.3)


def extent_in(recording):
    """How much there was to do in a recorded run."""
    shape = dict(recording["extent"]["shape"])
    shape["matrices"] = tuple(Matrix(**matrix) for matrix in shape["matrices"])
    return Extent(**recording["extent"] | {"shape": ModelShape(**shape)})


def replayed(recording, options):
    """(time, estimate of the time left) during a recorded run, and its whole time."""
    extent, steps = extent_in(recording), steps_of(options)
    pace = Pace({step.name: step.parts(extent) for step in steps})
    now, current, moments, names = 0.0, "", [], iter([step.name for step in steps])
    for part in recording["parts"]:
        while part["step"] != current:  # steps without a record took no time
            if current:
                pace.end(now, made=True)
            current = next(names)
            pace.begin(current, now)
        if part["bar"]:
            pace.bar(part["bar"], now)
        for number in range(1, SLICES + 1):
            now += part["seconds"] / SLICES
            if part["bar"]:
                pace.advance(number / SLICES)
            moments.append((now, pace.left(now)))
    return moments, now


@pytest.mark.parametrize("path", RECORDED, ids=[path.stem for path in RECORDED])
def test_time_left_of_recorded_runs(path, monkeypatch):
    recording, options = json.loads(path.read_text()), []
    monkeypatch.setattr("bitladder.ladder.run", lambda options_of_run, **_: options.append(options_of_run))
    CliRunner().invoke(application, shlex.split(recording["command"])[1:])
    moments, total = replayed(recording, options[0])
    for now, estimate in moments:
        left = total - now
        if now < 0.1 * total / 1.5:
            assert estimate is None, f"{now:.1f} of {total:.1f} s"
        elif estimate is None:
            assert now < 0.1 * total * 1.5, f"nothing is said after {now:.1f} of {total:.1f} s"
        else:
            close = estimate.least - 0.02 * total < left < estimate.most + 0.02 * total
            if estimate.seconds is not None:
                close = left / CLOSE - 0.02 * total < estimate.seconds < left * CLOSE + 0.02 * total
            assert close, f"{estimate} after {now:.1f} of {total:.1f} s"


def test_tracker_tells_the_step_the_share_and_the_best():
    clock, told = Clock(), []
    tracker = Tracker(Pace(PARTS), 5, ("A", "B"), SILENT, told.append, clock)
    with tracker.step("base", 1, lambda: True):
        assert not told[-1].working  # nothing has begun: the step may be complete
        with tracker.task("Base", 4) as task:
            clock.now += 10
            task.advance(2)
            assert told[-1].working and between(told[-1].left, 10 / 50 * 250, 10 / 50 * 50)
            with tracker.task("inner", 10) as inner:
                inner.advance(10)  # not the step's own bar
            assert between(told[-1].left, 10 / 50 * 250, 10 / 50 * 50)
    assert (told[-1].step, told[-1].number, told[-1].count) == ("base", 1, 5)
    with tracker.step("measure A", 2, lambda: True):
        tracker.rung_scored("A", {"bytes": 7, "kld": {"value": 0.2, "error": 0.01}}, "naive")
        tracker.rung_tried("A", Best("worse", 7, 0.3, 0.01))
        assert told[-1].best == {"A": Best("naive", 7, 0.2, 0.01)}
        tracker.rung_tried("A", Best("exact", 6, 0.1, 0.01))
        tracker.rung_scored("B", {"bytes": 7})  # no divergence was measured
        assert told[-1].best == {"A": Best("exact", 6, 0.1, 0.01)}


def test_a_failed_step_is_not_over():
    told = []
    tracker = Tracker(Pace(PARTS), 5, ("A", "B"), SILENT, told.append, Clock())
    with pytest.raises(KeyError), tracker.step("base", 1, lambda: True):
        raise KeyError
    assert len(told) == 1


def test_lines_for_a_pipe(tmp_path, capsys):
    from bitladder.show import Output

    output = Output()
    log = RunLog(output.progress, Layout(tmp_path), "bitladder run")
    display, clock = RunDisplay(output, log), Clock()
    tracker = Tracker(Pace(PARTS), 5, ("A", "B"), log, display.watch, clock)
    with display.shown():
        with tracker.step("base", 1, lambda: False):
            pass  # complete from before: no word about it
        with tracker.step("measure A", 2, lambda: True):
            with tracker.task("Divergence of A.gguf", 2) as task:
                clock.now += 60
                task.advance(1)
            tracker.rung_tried("A", Best("", 5_722_176, 0.00893, 0.00038))
    said = capsys.readouterr().err.splitlines()
    assert said == ["[2/5] measure A", "Divergence of A.gguf", "A: 5.72 MB, KLD 0.00893 ± 0.00038"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "about 10 s"), (34, "about 30 s"), (54, "about 50 s"), (58, "about 1 min"), (600, "about 10 min"),
     (3599, "about 1 h 0 min"), (7325, "about 2 h 2 min")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_line_about_the_best():
    assert best_text(Best("exact", 83_847_296, 0.0719, 0.0007)) == "83.85 MB, KLD 0.07190 ± 0.00070 (exact)"
    assert best_text(Best("", 5_000_000_000, 0.1, 0.01)) == "5.000 GB, KLD 0.100 ± 0.010"


def test_a_time_left_that_is_not_known_well_is_a_range():
    assert time_left_text(TimeLeft(300, 480)) == "about 6 min"
    assert time_left_text(TimeLeft(240, 720)) == "4 min to 12 min"
    assert time_left_text(TimeLeft(2, 12)) == "about 10 s"
