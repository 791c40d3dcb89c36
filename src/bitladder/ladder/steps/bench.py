"""The step that measures tokens per second."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import evaluate
from bitladder.files import write_json
from bitladder.ladder import cost
from bitladder.ladder.context import BASE, Run
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.step import Extent, Part, Product, Step

GENERATED = 10  # a generated token takes the time of so many in a prompt


class Bench(Step):
    """all models → tokens per second.

    It is one step for all: the models take turns, so that a busy moment of the machine hits all alike.
    """

    verb = "bench"
    algorithms = (evaluate.BENCH,)

    def __init__(self, options: RunOptions, others: Sequence[str]) -> None:
        super().__init__(options)
        self._others = tuple(others)

    @property
    def needs(self) -> tuple[str, ...]:
        """All models."""
        rungs = (f"quantize {rung}" for rung in self.options.rungs)
        return ("convert", *rungs, *(f"file {name}" for name in self._others))

    def decides(self) -> Mapping[str, Any]:
        """What decides speeds, beside the machine. Here the numbers of threads and of layers on a GPU do."""
        return {"bench_tests": self.options.bench_tests, "speed": self._speed()}

    def _speed(self) -> evaluate.SpeedOptions:
        decoding = self.options.decoding
        return evaluate.SpeedOptions(
            self.options.bench_repetitions, threads=decoding.threads, gpu_layers=decoding.gpu_layers
        )

    def parts(self, extent: Extent) -> list[Part]:
        """Tokens read and generated, a warm-up included."""
        once = sum(prompt + GENERATED * generated for prompt, generated in self.options.bench_tests)
        tokens = once * (self.options.bench_repetitions + 1) * extent.models
        return [Part("speed", cost.decoding(extent.shape, tokens, extent.chunk))]

    def make(self, run: Run) -> Product:
        """Measures, and writes rows of `Scores.bench` by label."""
        labels = (BASE, *self.options.rungs, *self._others)
        tests = [evaluate.SpeedTest(*test) for test in self.options.bench_tests]
        paths = [run.model(label) for label in labels]
        rows = evaluate.bench(paths, tests, self._speed(), run.progress)
        # A file of somebody else can have the name of one of ours, so rows are matched by their place.
        by_label = {
            label: [row.bench_row().model_dump() for row in rows[place * len(tests) : (place + 1) * len(tests)]]
            for place, label in enumerate(labels)
        }
        write_json(run.layout.bench, by_label)
        return Product([run.layout.bench])
