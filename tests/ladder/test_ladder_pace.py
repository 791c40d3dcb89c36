"""Time left and what a run tells while it works, on a clock of our own."""

import pytest

from bitladder.ladder import RunOptions
from bitladder.ladder.pace import Pace, amounts
from bitladder.ladder.plan import plan
from bitladder.ladder.tracker import Best, Tracker
from bitladder.progress import SILENT
from bitladder.show.run_display import RunDisplay, duration, line

KINDS = {"base": "base", "quantize A": "quantize", "measure A": "measure", "quantize B": "quantize",
         "measure B": "measure"}  # fmt: skip
AMOUNTS = {"base": 100.0, "quantize A": 10.0, "measure A": 100.0, "quantize B": 20.0, "measure B": 100.0}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_time_left_follows_what_was_seen():
    pace = Pace(KINDS, AMOUNTS)
    pace.begin("base", 0)
    assert pace.left(0) is None  # nothing is known yet
    pace.advance(0.25)
    # 25 of 330 done in 5 s, at the same rate everywhere: 305 are left.
    assert pace.left(5) == pytest.approx(5 / 25 * 305)
    pace.end(20, made=True)
    assert pace.left(20) == pytest.approx(20 / 100 * 230)
    pace.begin("quantize A", 20)
    pace.end(50, made=True)  # 3 s for one unit of quantizing: now that kind is known by itself
    known = (20 + 30) / (100 + 10)  # measuring has not been seen, and takes what all work took so far
    assert pace.left(50) == pytest.approx(200 * known + 20 * 3)
    pace.begin("measure A", 50)
    pace.end(60, made=True)
    assert pace.left(60) == pytest.approx(20 * 3 + 100 * 0.1)
    pace.begin("quantize B", 60)
    pace.advance(0.5)
    assert pace.left(80) == pytest.approx(10 * (30 + 20) / (10 + 10) + 10)
    pace.advance(0.2)  # a second bar of the same step does not take anything back
    assert pace.left(80) == pytest.approx(10 * (30 + 20) / (10 + 10) + 10)
    pace.end(90, made=True)
    pace.begin("measure B", 90)
    pace.end(100, made=True)
    assert pace.left(100) == 0


def test_what_was_complete_tells_nothing_of_time():
    pace = Pace(KINDS, AMOUNTS)
    for step in ("base", "quantize A", "measure A"):
        pace.begin(step, 0)
        pace.end(0, made=False)
    assert pace.left(0) is None
    pace.begin("quantize B", 0)
    pace.advance(0.5)
    assert pace.left(1) == pytest.approx(0.1 * 10 + 0.1 * 100)


def test_every_step_has_an_amount():
    for mode in ("naive", "quality"):
        options = RunOptions(model="m", out="o", rungs=("IQ3_S", "Q8_0"), mode=mode, rounding="stock")
        steps = plan(options)
        found = amounts(steps, options, text_tokens=4096, calibration_tokens=8192, questions=0)
        assert found.keys() == {step.name for step in steps}
        assert found["measure Q8_0"] == 4096 and found["imatrix"] == 8192
        assert found["quantize IQ3_S"] > found["quantize Q8_0"] > 0
        better = options.model_copy(update={"rounding": "best"})
        slower = amounts(plan(better), better, text_tokens=4096, calibration_tokens=8192, questions=0)
        assert slower["quantize Q8_0"] > found["quantize Q8_0"] and slower["moments"] > 0


def test_tracker_tells_the_step_the_share_and_the_best():
    clock, told = Clock(), []
    tracker = Tracker(Pace(KINDS, AMOUNTS), 5, SILENT, told.append, clock)
    with tracker.step("base", lambda: True):
        assert not told[-1].working  # nothing has begun: the step may be complete
        with tracker.task("Base", 4) as task:
            clock.now += 10
            task.advance(2)
            assert told[-1].working and told[-1].seconds_left == pytest.approx(10 / 50 * 280)
            with tracker.task("inner", 10) as inner:
                inner.advance(10)  # not the step's own bar
            assert told[-1].seconds_left == pytest.approx(10 / 50 * 280)
    assert (told[-1].step, told[-1].number, told[-1].count) == ("base", 1, 5)
    with tracker.step("measure A", lambda: True):
        tracker.found_scores("A", {"bytes": 7, "kld": {"value": 0.2, "error": 0.01}}, "naive")
        tracker.found("A", Best("worse", 7, 0.3, 0.01))
        assert told[-1].best == {"A": Best("naive", 7, 0.2, 0.01)}
        tracker.found("A", Best("exact", 6, 0.1, 0.01))
        tracker.found_scores("B", {"bytes": 7})  # no divergence was measured
        assert told[-1].best == {"A": Best("exact", 6, 0.1, 0.01)}


def test_a_failed_step_is_not_over():
    told = []
    tracker = Tracker(Pace(KINDS, AMOUNTS), 5, SILENT, told.append, Clock())
    with pytest.raises(KeyError), tracker.step("base", lambda: True):
        raise KeyError
    assert len(told) == 1


def test_lines_for_a_pipe(capsys):
    from bitladder.show.output import Output

    output = Output()
    display, clock = RunDisplay(output, ["A", "B"]), Clock()
    tracker = Tracker(Pace(KINDS, AMOUNTS), 5, output.progress, display.watch, clock)
    with display.shown():
        with tracker.step("base", lambda: False):
            pass  # complete from before: no word about it
        with tracker.step("measure A", lambda: True):
            with tracker.task("Divergence of A.gguf", 2) as task:
                clock.now += 60
                task.advance(1)
            tracker.found("A", Best("", 5_722_176, 0.00893, 0.00038))
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
    assert line(Best("exact", 83_847_296, 0.0719, 0.0007)) == "83.85 MB, KLD 0.07190 ± 0.00070 (exact)"
    assert line(Best("", 5_000_000_000, 0.1, 0.01)) == "5.000 GB, KLD 0.100 ± 0.010"
