"""How long each part of a run takes, beside the amounts of work that the time left is estimated from.

    python benchmarks/pace.py examples/tiny-olmo2 --out /tmp/run --ladder Q4_K_M,Q6_K -t 1 --record run.json

makes a ladder as `bitladder run` does, and prints for each kind of part its amount, its seconds and the seconds of a
thousand units. Times are CPU seconds of the process: with -t 1 other work of the machine does not count. `--record`
keeps the sequence of parts; `tests/ladder/pace/` has such files.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from bitladder.cli.options import options_from
from bitladder.ladder import RunOptions, Status, run
from bitladder.ladder.estimate import measure_machine
from bitladder.ladder.options import command_line
from bitladder.progress import SILENT, Bar


class Recorder:
    """A Progress that keeps the seconds of the outermost bars, and of each step what lies outside of bars."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self._step, self._depth, self._since = "", 0, time.process_time()

    def watch(self, status: Status) -> None:
        """Notes the step."""
        if status.step != self._step:
            self._note("")
            self._step = status.step
            sys.stderr.write(f"{status.step}\n")

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """A bar. Bars within it belong to it."""
        self._depth += 1
        if self._depth == 1:
            self._note("")
        try:
            with SILENT.task(label, total) as bar:
                yield bar
        finally:
            self._depth -= 1
            if not self._depth:
                self._note(label)

    def info(self, text: str) -> None:
        """Is not shown."""

    def warn(self, text: str) -> None:
        """Is not shown."""

    def finish(self) -> None:
        """The run is over."""
        self._note("")

    def _note(self, label: str) -> None:
        now = time.process_time()
        seconds, self._since = now - self._since, now
        if self._step and (label or seconds > 0.05):
            self.parts.append({"step": self._step, "bar": label, "seconds": round(seconds, 3)})


def amounts_of(options: RunOptions) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How much there is to do in a run, and the parts of its steps with their amounts, as JSON."""
    from bitladder.ladder import choose_rungs
    from bitladder.ladder.estimate import extent_of, question_counts, shape_of, tasks_of
    from bitladder.ladder.plan import steps_of
    from bitladder.text import load_text, load_texts

    rungs = choose_rungs(options.rungs)
    options = options.replace(rungs=rungs)
    questions = question_counts(tasks_of(options), options)
    shape = shape_of(options.model)
    texts, calibration = load_texts(options.texts), [load_text(spec) for spec in options.calibration]
    extent = extent_of(options, shape, texts, calibration, questions, models=1 + len(rungs))
    parts = [
        {"step": step.name, **dataclasses.asdict(part)} for step in steps_of(options) for part in step.parts(extent)
    ]
    return dataclasses.asdict(extent), parts


def table(parts: list[dict[str, Any]], amounts: list[dict[str, Any]]) -> str:
    """Amount, seconds and seconds of a thousand units, for each kind of part."""
    left = list(amounts)
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for done in parts:
        same = [part for part in left if part["step"] == done["step"]]
        part = next((part for part in same if (part["label"] or part["kind"]) in done["bar"].lower()), None)
        kind = f"({done['step'].split()[0]})" if part is None or not done["bar"] else part["kind"]
        if part is not None and done["bar"]:
            left.remove(part)
            kinds[kind][0] += part["amount"]
        kinds[kind][1] += done["seconds"]
    total = sum(seconds for _, seconds in kinds.values())
    lines = [f"{'part':24} {'amount':>9} {'seconds':>9} {'share':>6} {'s / 1000':>9}"]
    for kind, (amount, seconds) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        rate = f"{1000 * seconds / amount:9.3f}" if amount else ""
        lines.append(f"{kind:24} {amount:9.0f} {seconds:9.1f} {seconds / total:6.1%} {rate}")
    return "\n".join(lines)


@click.command()
@click.argument("model", required=False)
@options_from(RunOptions, arguments=("model",))
@click.option("--record", type=click.Path(path_type=pathlib.Path), help="JSON file for the sequence of parts.")
def main(options: RunOptions, record: pathlib.Path | None) -> None:
    """Makes a ladder, and prints how long each kind of part took."""
    recorder = Recorder()
    extent, amounts = amounts_of(options)
    run(options, progress=recorder, watch=recorder.watch)
    recorder.finish()
    machine = dataclasses.asdict(measure_machine(options.decoding.threads))
    recording = {"command": command_line(options, options.model), "extent": extent}
    recording |= {"machine": machine, "parts": recorder.parts}
    if record:
        record.write_text(json.dumps(recording, indent=1) + "\n")
    click.echo(table(recorder.parts, amounts))


if __name__ == "__main__":
    main()
