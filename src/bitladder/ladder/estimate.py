"""Time, memory and disk of a run before anything is loaded: from headers, the formulas of `cost`, and this machine."""

import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np

from bitladder import evaluate, hub
from bitladder.calibrate import MomentsOptions, usual_weighting
from bitladder.engine import (
    main_memory,
    products_per_second,
    quantize_rows,
    single_threaded,
    threads_available,
    type_by_name,
)
from bitladder.errors import UsageError
from bitladder.ladder import cost
from bitladder.ladder.model_shape import Matrix, ModelShape, outline_of_gguf, shape_of_checkpoint, shape_of_gguf
from bitladder.ladder.options import RunOptions, choose_rungs
from bitladder.ladder.plan import steps_of
from bitladder.ladder.steps.step import Extent, Part, Step
from bitladder.options import Effort
from bitladder.rounding import RoundingOptions, round_tensor
from bitladder.text import Text, load_text, load_texts
from bitladder.units import duration, number_of

CHARACTERS = 4  # of a token, about
ROUNDED = (256, 512)  # rows and width of a matrix that is rounded to see how fast that goes
# Those of a matrix that the library quantizes to q4_K, and the seconds of the reference core: those of a Xeon, divided
# by how much longer it took for Q4_K_M of the embedded model.
QUANTIZED, QUANTIZED_SECONDS = (256, 1024), 0.0295
PROBE = RoundingOptions(enough=0)  # how the first of them is rounded
SIDE = 1024  # of a matrix that is multiplied for the same reason
TURNS = 4  # the best counts: the CPU time of a virtual machine passes while its host does other work


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a core of this machine does while all threads work, as a multiple of the reference core of `cost`.

    Parameters:
        products: in the library's matrix products.
        blas: in NumPy's, and torch's.
        kernels: in rounding.
        quantization: in the library's.
        threads: threads that work at once.
    """

    products: float = 1.0
    blas: float = 1.0
    kernels: float = 1.0
    quantization: float = 1.0
    threads: int = 1

    def seconds(self, part: Part) -> float:
        """CPU time of a part of a step."""
        rates = {"products": self.products, "blas": self.blas, "kernels": self.kernels}
        return (part.amount - part.library) / rates[part.rate] + part.library / self.quantization


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a step of a run takes.

    Parameters:
        name: name of the step.
        seconds: wall time.
        core_seconds: CPU time.
        memory_bytes: the most memory, with the pages of the model's file.
        disk_bytes: the most that the run directory has while the step is at work.
    """

    name: str
    seconds: float
    core_seconds: float
    memory_bytes: int
    disk_bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Parameters:
        stages: its steps in their order.
        machine: what it was estimated for.
        kept_bytes: of the run directory at the end.
    """

    stages: tuple[Stage, ...]
    machine: Machine
    kept_bytes: int

    @property
    def seconds(self) -> float:
        """Wall time."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def core_seconds(self) -> float:
        """CPU time."""
        return sum(stage.core_seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """The most memory."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """The most that the run directory has at any time."""
        return max(stage.disk_bytes for stage in self.stages)

    def sums(self) -> dict[str, float]:
        """Time, memory and disk of the whole run, as JSON values."""
        return {name: getattr(self, name) for name in ("seconds", "core_seconds", "memory_bytes", "disk_bytes")}


def estimate(options: RunOptions, *, machine: Machine | None = None, shape: ModelShape | None = None) -> Estimate:
    """What a run with these options takes if nothing of it is there yet.

    Only headers are read: of a GGUF, of safetensors files, or config.json. Of a model on the hub nothing else is
    fetched.

    Parameters:
        options: the options of the run.
        machine: what a core does; None measures it, in some seconds.
        shape: of the model, if it is known; None reads it.

    Raises:
        UsageError: an option cannot be used.
        BitladderError: there is no such model, or its shape is not known.
    """
    inputs = _inputs(options, shape)
    return _estimate(options, inputs, machine or measure_machine(options.decoding.threads))


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What an estimate reads, whatever the effort is."""

    rungs: tuple[str, ...]
    shape: ModelShape
    texts: Sequence[Text]
    calibration: Sequence[Text]
    tasks: Sequence[evaluate.QuestionSet]


def _inputs(options: RunOptions, shape: ModelShape | None = None) -> _Inputs:
    return _Inputs(
        choose_rungs(options.rungs),
        shape or shape_of(options.model),
        load_texts(options.texts),
        [load_text(spec) for spec in options.calibration],
        tasks_of(options),
    )


def _estimate(options: RunOptions, inputs: _Inputs, machine: Machine) -> Estimate:
    options = options.replace(rungs=inputs.rungs)
    path = pathlib.Path(options.model)
    extent = extent_of(
        options,
        inputs.shape,
        inputs.texts,
        inputs.calibration,
        question_counts(inputs.tasks, options),
        models=1 + len(inputs.rungs) + len(options.compare),
        full=path if path.is_file() else None,
    )
    steps = steps_of(options, ["other"] * len(options.compare))
    return estimate_steps(steps, extent, machine, release=options.release)


def choose_effort(options: RunOptions, hours: float, keep: Container[str] = ()) -> RunOptions:
    """The options with the highest effort whose estimate is at most some hours.

    Parameters:
        options: the options of the run.
        hours: of wall time.
        keep: names of fields that no effort changes.

    Raises:
        UsageError: the least effort takes longer; the error says how long.
    """
    machine, inputs = measure_machine(options.decoding.threads), _inputs(options)
    for effort in reversed(get_args(Effort)):
        tried = options.at_effort(effort, keep)
        expected = _estimate(tried, inputs, machine)
        if expected.seconds <= 3600 * hours:
            return tried
    raise UsageError(
        f"--hours {hours:g}: with the least effort the run takes {in_words(expected)}; choose fewer rungs (--ladder) "
        "or fewer chunks (--chunks, --imatrix-chunks), or give more hours"
    )


def estimate_steps(steps: Sequence[Step], extent: Extent, machine: Machine, *, release: bool = False) -> Estimate:
    """What the steps of a run take.

    Parameters:
        steps: the steps that are not complete.
        extent: how much there is to do.
        machine: what a core does.
        release: whether files of the work folder are deleted after their last reader.
    """
    stages, kept, work = [], 0.0, dict[Step, float]()
    for index, step in enumerate(steps):
        parts = [(part, machine.seconds(part)) for part in step.parts(extent)]
        rounding = min(machine.threads, extent.rounding_threads)
        wall = sum(each / (rounding if part.kind == "rounding" else machine.threads) for part, each in parts)
        room = step.room(extent)
        kept += room.kept
        work[step] = room.work
        stages.append(
            Stage(
                step.name,
                wall,
                sum(each for _, each in parts),
                int(step.memory(extent)),
                int(kept + sum(work.values()) + room.beside),
            )
        )
        if release:
            left = steps[index + 1 :]
            work = {done: size for done, size in work.items() if any(_uses(later, done) for later in left)}
    return Estimate(tuple(stages), machine, int(kept + sum(work.values())))


def _uses(later: Step, earlier: Step) -> bool:
    """Whether a step may read what an earlier one left in the work folder."""
    return earlier.cache == later.cache if earlier.cache else earlier.name in later.reads()


def tasks_of(options: RunOptions) -> list[evaluate.QuestionSet]:
    """The questions of all benchmarks of a run."""
    return [evaluate.load_task(spec) for spec in evaluate.parse_specs(options.tasks)] if options.tasks else []


def question_counts(tasks: Sequence[evaluate.QuestionSet], options: RunOptions) -> dict[str, int]:
    """How many questions each model is asked, by benchmark."""
    return {task.name: min(len(task.items), options.task_count or len(task.items)) for task in tasks}


def shape_of(model: str) -> ModelShape:
    """The shape of a model: a GGUF, the directory of a checkpoint (or of a config.json), or either on the hub, of which
    only headers are fetched.

    Raises BitladderError if there is no such model, its shape is not known, or it is quantized already.
    """
    path = pathlib.Path(model)
    if path.is_file():
        return shape_of_gguf(path, model)
    if hub.names_file(model):
        with tempfile.TemporaryDirectory(prefix="bitladder.") as folder:
            return shape_of_gguf(outline_of_gguf(model, pathlib.Path(folder)), model)
    return shape_of_checkpoint(model, path if path.is_dir() else None)


def extent_of(
    options: RunOptions,
    shape: ModelShape,
    texts: Sequence[Text],
    calibration: Sequence[Text],
    questions: Mapping[str, int],
    *,
    models: int,
    full: pathlib.Path | None = None,
) -> Extent:
    """How much there is to do.

    Parameters:
        options: the options of the run.
        shape: of the model.
        texts: what is measured with.
        calibration: what is calibrated on.
        questions: asked of each model, by benchmark.
        models: files that are measured, with the full-precision model.
        full: MODEL if it is a GGUF. Its vocabulary counts the tokens; else a token has four characters.
    """

    def tokens(used: Sequence[Text], chunks: int | None) -> int:
        counts = [len(text.text) // CHARACTERS for text in used]
        return sum(min(count, chunks * options.decoding.n_ctx) if chunks else count for count in counts)

    threads = options.decoding.threads or threads_available()
    wide = 4 if options.conversion.outtype == "f32" else 2
    return Extent(
        shape=shape,
        text=tokens(texts, options.chunks),
        imatrix=tokens(calibration, options.imatrix_chunks),
        moments=tokens(calibration, options.moments.moments_chunks),
        plain_moments=tokens(calibration, options.moments.plain_share * options.moments.moments_chunks),
        tuned=tokens(calibration, options.refine.tuning.tune_chunks) if options.tunes else 0,
        chunk=options.decoding.n_ctx,
        questions=dict(questions),
        models=models,
        converted=0 if full is not None else wide * shape.weights,
        gradients=options.rounds and _by_gradients(full),
        threads=threads,
        rounding_threads=cost.rounding_threads(shape, threads, main_memory()) if main_memory() else threads,
        limit=MomentsOptions().memory_bytes(),
    )


def _by_gradients(full: pathlib.Path | None) -> bool:
    """Whether second moments are weighted by gradients. Of a checkpoint only torch is looked for."""
    if full is None:
        return importlib.util.find_spec("torch") is not None
    return usual_weighting(full) == "gradients"


def measure_machine(threads: int | None = None, *, rounds: bool = True) -> Machine:
    """What a core of this machine does while all threads work.

    CPU time is measured, so other work on the machine does not count. It takes two seconds; where kernels of
    rounding must be compiled, half a minute.

    Parameters:
        threads: threads of the CPU; None takes all.
        rounds: whether rounding is measured too.
    """
    count = threads or threads_available()
    rng = np.random.default_rng(0)
    square, rows = rng.standard_normal((SIDE, SIDE), np.float32), rng.standard_normal(QUANTIZED, np.float32)
    quantize = functools.partial(quantize_rows, rows, type_by_name("q4_K"), np.ones(QUANTIZED[1], np.float32))
    products, blas, kernels, quantization = 0.0, *3 * (float("inf"),)
    with single_threaded(), ThreadPoolExecutor(count) as pool:
        work = _rounding() if rounds else None
        if work:
            work()  # loads the kernels
        for _ in range(TURNS):
            products = max(products, products_per_second(type_by_name("f16"), count, seconds=0.1) / count)
            blas = min(blas, max(pool.map(lambda _: _best(lambda: square @ square, 0.1), range(count))))
            quantization = min(quantization, max(pool.map(lambda _: _best(quantize, 0.1), range(count))))
            if work:
                kernels = min(kernels, max(pool.map(lambda _: _best(work, 0.1), range(count))))
    return Machine(
        products / cost.PRODUCTS,
        2 * SIDE**3 / blas / cost.BLAS,
        cost.round_matrix(Matrix("rounded", *ROUNDED, 1), PROBE.passes) / kernels if work else 1.0,
        QUANTIZED_SECONDS / quantization,
        count,
    )


def _rounding() -> Callable[[], Any]:
    """Rounds a matrix, whenever it is called."""
    rng = np.random.default_rng(0)
    rows, width = ROUNDED
    kind = type_by_name("q4_K")
    weights = 0.02 * rng.standard_normal(ROUNDED, np.float32)
    inputs, outputs = (np.cov(rng.standard_normal((size, 2 * size), np.float32)) for size in (width, rows))
    stock = quantize_rows(weights, kind, np.ones(width, np.float32))
    moments = [moment.astype(np.float32) for moment in (inputs, outputs)]
    return lambda: round_tensor(weights, stock, kind.name, moments[0], PROBE, moments[1])


def _best(work: Callable[[], Any], seconds: float) -> float:
    """The least CPU seconds of this thread for some work that is done again and again."""
    best, began = float("inf"), time.thread_time()
    while time.thread_time() - began < seconds or best == float("inf"):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return best


def in_words(total: Estimate) -> str:
    """Time, memory and disk in a line."""
    hours = total.core_seconds / 3600
    minutes = number_of(round(total.core_seconds / 60), "core minute")
    cores = f"{hours:.1f} core hours" if hours >= 1 else minutes
    memory, disk = (f"{size / 1e9:.3g} GB" for size in (total.memory_bytes, total.disk_bytes))
    return f"{duration(total.seconds)} ({cores}), {memory} of memory, {disk} of disk"
