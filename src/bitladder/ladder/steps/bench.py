"""The step that measures tokens per second."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import evaluate
from bitladder.files import write_json
from bitladder.ladder import cost
from bitladder.ladder.context import BASE, Run
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.quantize import preset_decides
from bitladder.ladder.steps.step import Extent, Part, Product, Step
from bitladder.recipe import read_recipe
from bitladder.rundir import naive

GENERATED = evaluate.GENERATED  # what a generated token takes, in tokens of a prompt

# Rows of `Scores.bench` by label.
Rows = dict[str, list[dict[str, Any]]]


class Bench(Step):
    """all models, plain presets → tokens per second.

    It is one step for all: the models take turns, so that a busy moment of the machine hits all alike. A rung whose
    types differ from those of its preset takes turns with the preset.
    """

    verb = "bench"
    algorithms = (evaluate.BENCH,)

    def __init__(self, options: RunOptions, others: Sequence[str]) -> None:
        super().__init__(options)
        self._others = tuple(others)

    @property
    def needs(self) -> tuple[str, ...]:
        """All models, and presets that rungs may differ from."""
        rungs = [f"quantize {rung}" for rung in self.options.rungs]
        if self.options.plans:
            rungs += [f"preset {rung}" for rung in self.options.rungs]
        return ("convert", *rungs, *(f"file {name}" for name in self._others))

    def decides(self) -> Mapping[str, Any]:
        """What decides speeds, beside the machine. Here the numbers of threads and of layers on a GPU do."""
        decides: dict[str, Any] = {"bench_tests": self.options.bench_tests, "speed": self._speed()}
        if self.options.plans:
            decides |= {"mode": self.options.mode, **preset_decides(self.options, *self.options.rungs)}
        return decides

    def _speed(self) -> evaluate.SpeedOptions:
        decoding = self.options.decoding
        return evaluate.SpeedOptions(
            self.options.bench_repetitions, threads=decoding.threads, gpu_layers=decoding.gpu_layers
        )

    @property
    def _short(self) -> tuple[tuple[int, int], ...]:
        """The tests that presets take too: those that only read or only generate."""
        return tuple(test for test in self.options.bench_tests if 0 in test)

    def parts(self, extent: Extent) -> list[Part]:
        """Tokens read and generated. A warm-up reads the prompt, and generates one token."""
        repetitions, tests = self.options.bench_repetitions, self.options.bench_tests

        def speed(tests: Sequence[tuple[int, int]], full: int, quants: int) -> Part:
            speeds = [evaluate.SpeedTest(*test) for test in tests]
            tokens = sum(test.warming(GENERATED) + repetitions * test.work(GENERATED) for test in speeds)
            tokens *= full + quants / cost.quant_speed(extent.shape)
            return Part("speed", cost.decoding(extent.shape, tokens, extent.chunk))

        if not self.options.plans:
            return [speed(tests, 1, extent.models - 1)]
        rungs, rest = len(self.options.rungs), [test for test in tests if test not in self._short]
        of_rung = [speed(self._short, 0, 2), *([speed(rest, 0, 1)] if rest else [])]
        return [speed(tests, 1, extent.models - 1 - rungs), *rungs * of_rung]

    def make(self, run: Run) -> Product:
        """Measures, and writes the rows by label."""
        beside = [rung for rung in self.options.rungs if self._short and self._differs(run, rung)]
        alone = [label for label in (BASE, *self.options.rungs, *self._others) if label not in beside]
        rows = self._measured(run, {label: run.model(label) for label in alone}, self.options.bench_tests)
        for rung in beside:
            pair = {rung: run.model(rung), naive(rung): run.layout.preset(rung)}
            rows |= self._measured(run, pair, self._short)
            rest = [test for test in self.options.bench_tests if test not in self._short]
            if rest:
                rows[rung] += self._measured(run, {rung: run.model(rung)}, rest)[rung]
        write_json(run.layout.bench, rows)
        return Product([run.layout.bench])

    def _differs(self, run: Run, rung: str) -> bool:
        """Whether a rung has other types than its preset. A file of the same types is as fast."""
        if not self.options.plans:
            return False
        own, preset = (read_recipe(run.layout.recipe(label)).tensors for label in (rung, naive(rung)))
        return own != preset

    def _measured(self, run: Run, models: Mapping[str, pathlib.Path], tests: Sequence[tuple[int, int]]) -> Rows:
        """The rows of models that take turns, by label."""
        chosen = [evaluate.SpeedTest(*test) for test in tests]
        rows = evaluate.bench(list(models.values()), chosen, self._speed(), run.progress)
        # A file of somebody else can have the name of one of ours, so rows are matched by their place.
        return {
            label: [row.bench_row().model_dump() for row in rows[place * len(chosen) : (place + 1) * len(chosen)]]
            for place, label in enumerate(models)
        }
