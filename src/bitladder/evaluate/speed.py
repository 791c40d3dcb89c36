"""How fast a model is on this machine, measured as llama-bench measures it.

Prompt processing decodes random tokens in batches of `n_batch`; text generation decodes random tokens one by one and
waits for each. A run without the clock warms up: the whole prompt, one generated token. Several models take turns,
repetition by repetition, so that a machine that grows hot or busy slows them all alike; within a repetition all get
the same token ids.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from bitladder.closing import Closing
from bitladder.engine.context import Context
from bitladder.engine.decoding import MIN_CTX, Decoding
from bitladder.engine.devices import ACCEL, CPU, GPU, IGPU, ThreadPool, backend_names, main_memory, processors
from bitladder.engine.model import Model, Tokens
from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate.identity import parts
from bitladder.evaluate.speed_rows import SpeedRow, SpeedSettings
from bitladder.evaluate.speed_tests import SpeedTest
from bitladder.progress import SILENT, Progress, Task

# Share of the main memory that models measured in turns may take; more, and pages would go out and in between turns.
_SHARE = 0.8


class SpeedError(BitladderError):
    """Some models could not be measured; `rows` are those of the others, and of tests done before."""

    def __init__(self, message: str, rows: list[SpeedRow]) -> None:
        super().__init__(message)
        self.rows = rows


def bench(
    models: Sequence[pathlib.Path],
    tests: Sequence[SpeedTest],
    repetitions: int = 5,
    settings: SpeedSettings | None = None,
    progress: Progress = SILENT,
) -> list[SpeedRow]:
    """Measure the speed of models, in turns: A B A B.

    Returns a row for each model and test, in the order of `models`, then of `tests`. Raises UsageError if there is
    nothing to do, BitladderError at once if a file is missing, and SpeedError at the end, with all rows there are, if
    a model does not load or does not decode.
    """
    if repetitions < 1 or not tests or not models:
        raise UsageError(f"{len(models)} models, {len(tests)} tests, -r {repetitions}: there is nothing to measure")
    models = list(dict.fromkeys(models))
    for path in models:
        if not path.is_file():
            raise BitladderError(f"no such model file: {path}")
    settings = settings or SpeedSettings()
    threads = settings.threads or threads_available()
    turns = [models] if _fit(models) else [[path] for path in models]
    if len(turns) > 1:
        progress.warn("the models do not fit into memory together: they are measured one after another, not in turns")
    steps = len(models) * len(tests) * (repetitions + settings.warmup)
    with ThreadPool(threads) as pool, progress.task(f"Speed of {_listed(models)}", steps) as task:
        series = _Series(tests, repetitions, settings, threads, pool, task)
        for together in turns:
            series.measure(together)
    rows = [series.rows[path, test] for path in models for test in tests if (path, test) in series.rows]
    if series.failed:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in series.failed.items())
        raise SpeedError(f"{len(series.failed)} of {len(models)} models could not be measured: {reasons}", rows)
    return rows


@dataclasses.dataclass
class _Series:
    """The measuring of all models: what was found, and which of them failed."""

    tests: Sequence[SpeedTest]
    repetitions: int
    settings: SpeedSettings
    threads: int
    pool: ThreadPool
    task: Task
    rows: dict[tuple[pathlib.Path, SpeedTest], SpeedRow] = dataclasses.field(default_factory=dict)
    failed: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict)

    def measure(self, paths: Sequence[pathlib.Path]) -> None:
        """Load models and take turns with them, test by test."""
        with contextlib.ExitStack() as stack:
            loaded: dict[pathlib.Path, Model] = {}
            for path in paths:
                with self._noting(path):
                    loaded[path] = stack.enter_context(Model(path, gpu_layers=self.settings.gpu_layers))
            for test in self.tests:
                self._test(test, {path: model for path, model in loaded.items() if path not in self.failed})

    def _test(self, test: SpeedTest, models: dict[pathlib.Path, Model]) -> None:
        began = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        samples: dict[pathlib.Path, list[int]] = {path: [] for path in models}
        runs: dict[pathlib.Path, _Run] = {}
        with contextlib.ExitStack() as stack:
            for path, model in models.items():
                with self._noting(path):
                    runs[path] = stack.enter_context(_Run(model, test, self.settings, self.threads, self.pool))
                    if self.settings.warmup:
                        runs[path].warm_up()
                        self.task.advance()
            for repetition in range(self.repetitions):
                for path, run in runs.items():
                    if path not in self.failed:
                        self.task.note(f"{test.name} {path.name}")
                        with self._noting(path):
                            samples[path].append(run.sample(repetition))
                        self.task.advance()
        for path, model in models.items():
            if path not in self.failed:
                self.rows[path, test] = self._row(path, model, test, began, samples[path])

    @contextlib.contextmanager
    def _noting(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except BitladderError as error:
            self.failed[path] = str(error)

    def _row(self, path: pathlib.Path, model: Model, test: SpeedTest, began: str, samples: list[int]) -> SpeedRow:
        return SpeedRow(
            model=path.name,
            model_type=model.description,
            size=model.size,
            n_params=model.n_params,
            test=test,
            settings=self.settings,
            threads=self.threads,
            backend=backend_names(),
            cpu=processors(CPU, ACCEL),
            gpu=processors(GPU, IGPU),
            test_time=began,
            samples_ns=tuple(samples),
        )


class _Run(Closing):
    """A context for one test of one model."""

    def __init__(self, model: Model, test: SpeedTest, settings: SpeedSettings, threads: int, pool: ThreadPool) -> None:
        self._model, self._test = model, test
        decoding = Decoding(
            n_ctx=max(test.tokens + test.n_depth, MIN_CTX),
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            threads=threads,
        )
        self._context = Context(model, decoding, flash_attn=settings.flash_attn, swa_full=False)
        self._context.attach(pool)

    def close(self) -> None:
        """Free the memory."""
        self._context.close()

    def warm_up(self) -> None:
        """The whole prompt and one token, so that weights are in memory and threads awake."""
        random = np.random.default_rng(0)
        self._process(self._tokens(random, self._test.n_prompt))
        self._generate(self._tokens(random, min(self._test.n_gen, 1)))

    def sample(self, repetition: int) -> int:
        """Nanoseconds that the test takes. The tokens depend on the repetition's number only."""
        random = np.random.default_rng(repetition)
        prompt, generated = (self._tokens(random, count) for count in (self._test.n_prompt, self._test.n_gen))
        self._context.clear(data=False)
        self._process(self._tokens(random, self._test.n_depth))
        began = time.perf_counter_ns()
        self._process(prompt)
        self._generate(generated)
        return time.perf_counter_ns() - began

    def _tokens(self, random: np.random.Generator, count: int) -> Tokens:
        """Random ids, the first of them BOS where the vocabulary asks for it."""
        tokens = random.integers(self._model.n_vocab, size=count, dtype=np.int32)
        if self._model.add_bos and self._model.bos >= 0:
            tokens[:1] = self._model.bos
        return tokens

    def _process(self, tokens: Tokens) -> None:
        for start in range(0, len(tokens), self._context.n_batch):
            self._context.advance(tokens[start : start + self._context.n_batch])
        self._context.synchronize()

    def _generate(self, tokens: Tokens) -> None:
        for index in range(len(tokens)):
            self._context.advance(tokens[index : index + 1])
            self._context.synchronize()


def _fit(models: Sequence[pathlib.Path]) -> bool:
    """Whether all models fit into main memory together; yes if the system does not say."""
    needed = sum(part.stat().st_size for path in models for part in parts(path) if part.is_file())
    return len(models) == 1 or not main_memory() or needed < _SHARE * main_memory()


def _listed(models: Sequence[pathlib.Path]) -> str:
    return models[0].name if len(models) == 1 else f"{len(models)} models in turns"
