"""Measures how fast a model is on this machine, as llama-bench does.

Prompt processing decodes random tokens in batches of `n_batch`. Text generation decodes random tokens one by one and
waits for each. A pass that is not timed warms up: the whole prompt and one generated token. Several models take turns,
repetition by repetition, so that a hot or busy machine slows all of them alike. Within a repetition all models get the
same token ids.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from bitladder.engine import (
    ACCEL,
    CPU,
    GPU,
    IGPU,
    MIN_CTX,
    Context,
    Decoding,
    Model,
    ThreadPool,
    Tokens,
    backend_names,
    main_memory,
    processors,
    threads_available,
)
from bitladder.errors import BitladderError, UsageError, overflow
from bitladder.evaluate.identity import parts
from bitladder.evaluate.speed_tests import SpeedOptions, SpeedRow, SpeedTest
from bitladder.files import Closing
from bitladder.gguf import open_model
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Bar, Progress
from bitladder.units import number_of

BENCH = Algorithm("bench", ("llama-bench's tests; models take turns, repetition by repetition",))

# Share of the main memory for models that take turns. With more, the system swaps their pages between turns.
_SHARE = 0.8


class SpeedError(BitladderError):
    """Some models could not be measured. `rows` are those of the other models, and of tests that were done before."""

    def __init__(self, message: str, rows: list[SpeedRow]) -> None:
        super().__init__(message)
        self.rows = rows


@BENCH.entry
def bench(
    models: Sequence[pathlib.Path],
    tests: Sequence[SpeedTest],
    options: SpeedOptions | None = None,
    progress: Progress = SILENT,
) -> list[SpeedRow]:
    """Measures the speed of models, in turns: A B A B.

    Parameters:
        models: the files to measure.
        tests: what to time.
        options: how to measure; None takes the defaults.
        progress: receives the progress.

    Returns:
        A row for each model and test, in the order of `models`, then of `tests`.

    Raises:
        UsageError: there are no models or no tests.
        BitladderError: a file is missing.
        SpeedError: a model does not load or does not decode; the error has the rows of the others.
    """
    if not tests or not models:
        raise UsageError(
            f"{number_of(len(models), 'model')}, {number_of(len(tests), 'test')}: there is nothing to measure"
        )
    models = list(dict.fromkeys(models))
    for path in models:
        if not path.exists():
            raise BitladderError(f"no such model file: {path}")
    options = options or SpeedOptions()
    threads = options.threads or threads_available()
    turns = [models] if _fit_together(models) else [[path] for path in models]
    if len(turns) > 1:
        progress.warn("the models do not fit into memory together: they are measured one after another, not in turns")
    # Tests differ in length: the bar counts what they take, not their number.
    work = sum(options.repetitions * test.work() + options.warmup * test.warming() for test in tests)
    with ThreadPool(threads) as pool, progress.task(f"Speed of {_listed(models)}", len(models) * work) as task:
        series = _Series(tests, options, threads, pool, task)
        for together in turns:
            series.measure(together)
    rows = [series.rows[path, test] for path in models for test in tests if (path, test) in series.rows]
    if series.failed:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in series.failed.items())
        raise SpeedError(
            f"{len(series.failed)} of {number_of(len(models), 'model')} could not be measured: {reasons}", rows
        )
    return rows


@dataclasses.dataclass
class _Series:
    """Measures all models; keeps the rows, and the reasons of failures."""

    tests: Sequence[SpeedTest]
    options: SpeedOptions
    threads: int
    pool: ThreadPool
    task: Bar
    rows: dict[tuple[pathlib.Path, SpeedTest], SpeedRow] = dataclasses.field(default_factory=dict)
    failed: dict[pathlib.Path, str] = dataclasses.field(default_factory=dict)

    def measure(self, paths: Sequence[pathlib.Path]) -> None:
        """Loads models and lets them take turns, test by test."""
        with contextlib.ExitStack() as stack:
            loaded: dict[pathlib.Path, Model] = {}
            for path in paths:
                with self._noting(path):
                    open_model(path).close()
                    loaded[path] = stack.enter_context(Model(path, gpu_layers=self.options.gpu_layers))
            for test in self.tests:
                self._test(test, {path: model for path, model in loaded.items() if path not in self.failed})

    def _test(self, test: SpeedTest, models: dict[pathlib.Path, Model]) -> None:
        began = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        samples: dict[pathlib.Path, list[int]] = {path: [] for path in models}
        runs: dict[pathlib.Path, _Run] = {}
        with contextlib.ExitStack() as stack:
            for path, model in models.items():
                with self._noting(path):
                    runs[path] = stack.enter_context(_Run(model, test, self.options, self.threads, self.pool))
                    if self.options.warmup:
                        runs[path].warm_up()
                        self.task.advance(test.warming())
            for repetition in range(self.options.repetitions):
                for path, run in runs.items():
                    if path not in self.failed:
                        self.task.note(f"{test.name} {path.name}")
                        with self._noting(path):
                            samples[path].append(run.sample(repetition))
                        self.task.advance(test.work())
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
            options=self.options,
            threads=self.threads,
            backend=backend_names(),
            cpu=processors(CPU, ACCEL),
            gpu=processors(GPU, IGPU),
            test_time=began,
            samples_ns=tuple(samples),
        )


class _Run(Closing):
    """A context for one test of one model."""

    def __init__(self, model: Model, test: SpeedTest, options: SpeedOptions, threads: int, pool: ThreadPool) -> None:
        self._model, self._test = model, test
        decoding = Decoding(
            n_ctx=max(test.tokens + test.n_depth, MIN_CTX),
            n_batch=options.n_batch,
            n_ubatch=options.n_ubatch,
            threads=threads,
        )
        self._context = Context(model, decoding, flash_attn=options.flash_attn, swa_full=False)
        self._context.attach(pool)

    def close(self) -> None:
        """Frees the memory."""
        self._context.close()

    def warm_up(self) -> None:
        """Decodes the whole prompt and one token, so that weights are in memory and threads run."""
        random = np.random.default_rng(0)
        self._process(self._tokens(random, self._test.n_prompt))
        self._generate(self._tokens(random, min(self._test.n_gen, 1)))
        if not np.isfinite(self._context.logits()).all():
            raise overflow(f"the logits of {self._model.name} are")

    def sample(self, repetition: int) -> int:
        """Times the test, in nanoseconds. The tokens depend only on the number of the repetition."""
        random = np.random.default_rng(repetition)
        prompt, generated = (self._tokens(random, count) for count in (self._test.n_prompt, self._test.n_gen))
        self._context.clear(data=False)
        self._process(self._tokens(random, self._test.n_depth))
        began = time.perf_counter_ns()
        self._process(prompt)
        self._generate(generated)
        return time.perf_counter_ns() - began

    def _tokens(self, random: np.random.Generator, count: int) -> Tokens:
        """Random ids. The first one is BOS if the vocabulary asks for it."""
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


def _fit_together(models: Sequence[pathlib.Path]) -> bool:
    """Whether all models fit into main memory together. It is true if the size of the memory is not known."""
    needed = sum(part.stat().st_size for path in models for part in parts(path) if part.is_file())
    return len(models) == 1 or not main_memory() or needed < _SHARE * main_memory()


def _listed(models: Sequence[pathlib.Path]) -> str:
    return models[0].name if len(models) == 1 else f"{number_of(len(models), 'model')} in turns"
