"""What to do, decided before anything is done: from the options to the steps, without reading or writing."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

from bitladder.errors import UsageError
from bitladder.text.texts import BUILTIN

Kind = Literal[
    "convert",
    "base",
    "imatrix",
    "smooth",
    "trial",
    "moments",
    "price",
    "plan",
    "candidates",
    "quantize",
    "measure",
    "naive",
    "bench",
    "score",
]
Mode = Literal["quality", "size", "naive"]

# The version of each step's code: raise one when the step would give other bytes from the same inputs.
CODE: dict[Kind, int] = {
    "convert": 1,
    "base": 1,
    "imatrix": 1,
    "smooth": 1,
    "trial": 1,
    "moments": 2,
    "price": 1,
    "plan": 1,
    "candidates": 1,
    "quantize": 3,
    "measure": 2,
    "naive": 2,
    "bench": 1,
    "score": 3,
}

TASK_CTX = 768
# Prompt and generated tokens of each speed test, and how often each is repeated.
BENCH_TESTS, BENCH_REPETITIONS = ((512, 0), (0, 128), (1024, 1024)), 3
# Presets that do not quantize: the full-precision file is no rung.
FULL_PRECISION = ("ALL_F32", "F16", "BF16")
CALIBRATION = ("pydoc:calibration",)
TEXT = "pydoc:test"
MODE: Mode = "quality"  # of the command line
Rounding = Literal["stock", "feedback", "descent", "best"]
ROUNDING: Rounding = "best"  # of the command line
# Chunks of each calibration text, from all over it, on which second moments are collected.
MOMENTS_CHUNKS = 64
TUNE_CHUNKS = 64  # of the command line, on which the scales of a rung are tuned


class RunOptions(pydantic.BaseModel, frozen=True):
    """All that a run can be told.

    `model` is a checkpoint's directory, a hub id or a full-precision GGUF file. `rungs` are preset names, in order.
    `calibration` and `text` are specs as `text.texts.load_text` reads them. `chunks` (scored) and
    `imatrix_chunks` (of each calibration text) are of `n_ctx` tokens; None is all there are. `model_id` is the hub id
    of the model for the card, where it cannot be known from `model`; `datasets` are those of the calibration text, for
    the card too. `tasks` are specs as `evaluate.tasks.parse_specs` reads them, answered with a context of TASK_CTX
    tokens; `task_count` questions of each (None: all). `bench` asks for tokens per second in `bench_tests` (tokens of
    the prompt, tokens generated). `rounding` is how blocks are chosen; but for "stock" that needs second moments, of
    `moments_chunks` chunks of each calibration text; of a rung that is rounded so the scales are tuned on `tune_chunks`
    (0: not at all). `smooth` makes rungs of a model with balanced channels.
    `compare` names GGUF files of somebody else, or hub ids of some (`hub.fetch`).
    """

    model: str
    out: pathlib.Path
    rungs: tuple[str, ...]
    calibration: tuple[str, ...] = CALIBRATION
    text: str = TEXT
    chunks: int | None = pydantic.Field(None, ge=1)
    imatrix_chunks: int | None = pydantic.Field(None, ge=1)
    n_ctx: int = pydantic.Field(512, ge=2)
    tasks: str | None = None
    task_count: int | None = pydantic.Field(None, ge=1)
    bench: bool = True
    bench_tests: tuple[tuple[int, int], ...] = BENCH_TESTS
    compare: tuple[str, ...] = ()
    mode: Mode = "naive"
    rounding: Rounding = "stock"
    moments_chunks: int = pydantic.Field(MOMENTS_CHUNKS, ge=1)
    tune_chunks: int = pydantic.Field(0, ge=0)
    smooth: bool = False
    outtype: str = "auto"
    threads: int | None = pydantic.Field(None, ge=1)
    gpu_layers: int = 0
    converter: pathlib.Path | None = None
    quantized_by: str | None = None
    model_id: str | None = None
    datasets: tuple[str, ...] = ()


class Step(pydantic.BaseModel, frozen=True):
    """One thing to do, for a rung or a file of somebody else (`other`), or for neither.

    `needs` names what it reads: other steps, or "model", "converter", "text", "calibration", "tasks", "file NAME".
    `options` are those that decide the result; threads, for one, do not.
    """

    name: str
    kind: Kind
    rung: str | None = None
    other: str | None = None
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = {}


def choose_rungs(ladder: str, *, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The rungs of `--ladder`: "all" for the default ones, or preset names separated by commas, in any case.

    Raises UsageError that lists the `known` presets for a name that is none of them.
    """
    if ladder.strip().lower() == "all":
        return default
    known = tuple(name for name in known if name not in FULL_PRECISION)
    names = [name.strip().upper() for name in ladder.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"--ladder {', '.join(unknown) or 'is empty'}: the presets are {', '.join(known)}; all means "
            f"{', '.join(default)}"
        )
    return tuple(dict.fromkeys(names))


def plan(options: RunOptions, others: Sequence[str] = ()) -> list[Step]:
    """The steps of a run, each after those it needs; `others` names the files of --compare."""
    # Where the layers are computed shows in the last digits of every figure, how many of them does not matter.
    device: dict[str, Any] = {"gpu": options.gpu_layers != 0}
    scored: dict[str, Any] = {"n_ctx": options.n_ctx, "chunks": options.chunks, **device}
    calibrated = {"n_ctx": options.n_ctx, "chunks": options.imatrix_chunks, **device}
    convert_needs = ("model", "converter") if options.converter else ("model",)
    based: dict[str, Any] = {**scored}
    asked: tuple[str, ...] = ()
    if options.tasks:
        scored |= {"task_count": options.task_count, "task_ctx": TASK_CTX}
        asked = ("tasks",)
    steps = [
        Step(name="convert", kind="convert", needs=convert_needs, options={"outtype": options.outtype}),
        Step(name="base", kind="base", needs=("convert", "text"), options=based),
        Step(name="measure base", kind="measure", needs=("convert", "base", "text", *asked), options=scored),
        Step(name="imatrix", kind="imatrix", needs=("convert", "calibration"), options=calibrated),
    ]
    planned, rounded = options.mode != "naive", options.rounding != "stock"
    chosen: dict[str, Any] = {"rounding": options.rounding} if rounded else {}
    tuned: dict[str, Any] = {"tune_chunks": options.tune_chunks} if rounded and options.tune_chunks else {}
    by_moments = ("moments",) if rounded else ()
    if rounded:
        taken = {"n_ctx": options.n_ctx, "chunks": options.moments_chunks, **device}
        steps.append(Step(name="moments", kind="moments", needs=("convert", "calibration"), options=taken))
    tried: dict[str, tuple[str, ...]] = dict.fromkeys(options.rungs, ())
    if options.smooth:
        steps += _smoothing(options, device, by_moments)
        tried = {rung: ("smooth", f"trial {rung}") for rung in options.rungs}
    if planned:
        steps += _planning(options, {**device, **chosen}, by_moments, tried)
    if planned or rounded or options.smooth:
        read = ("convert", "imatrix", "base", "text", *asked)
        for rung in options.rungs:
            how = {"preset": rung, **scored}
            steps.append(Step(name=f"naive {rung}", kind="naive", rung=rung, needs=read, options=how))
    quants = []
    for rung in options.rungs:
        types: dict[str, Any] = {"preset": rung, **chosen, **tuned}
        made_of: tuple[str, ...] = ("convert", "imatrix", *by_moments, *tried[rung])
        if rounded:  # its blocks are tried on a part of that text
            made_of = (*made_of, "calibration")
        if planned:
            types, made_of = types | {"mode": options.mode}, (*made_of, f"plan {rung}")
        quant = Step(name=f"quantize {rung}", kind="quantize", rung=rung, needs=made_of, options=types)
        needs = (quant.name, "convert", "base", "text", *asked)
        steps += [quant, Step(name=f"measure {rung}", kind="measure", rung=rung, needs=needs, options=scored)]
        quants.append(quant.name)
    files = tuple(f"file {name}" for name in others)
    for name, file in zip(others, files, strict=True):
        needs = (file, "convert", "base", "text", *asked)
        steps.append(Step(name=f"measure {name}", kind="measure", other=name, needs=needs, options=scored))
    timed: tuple[str, ...] = ()
    if options.bench:
        # One step for all: they take turns, so that a busy moment of the machine hits all alike.
        steps.append(
            Step(name="bench", kind="bench", needs=("convert", *quants, *files), options=_bench_options(options))
        )
        timed = ("bench",)
    return [*steps, *_scoring(options, others, timed)]


def _scoring(options: RunOptions, others: Sequence[str], timed: tuple[str, ...]) -> list[Step]:
    """What was measured, timed and planned of each model, put together."""
    steps = [Step(name="score base", kind="score", needs=("measure base", *timed))]
    for rung in options.rungs:
        needs = (f"measure {rung}", *timed)
        if options.mode != "naive":
            needs = (*needs, f"plan {rung}")
        if options.mode != "naive" or options.rounding != "stock" or options.smooth:
            needs = (*needs, f"naive {rung}")
        steps.append(Step(name=f"score {rung}", kind="score", rung=rung, needs=needs))
    for name in others:
        steps.append(Step(name=f"score {name}", kind="score", other=name, needs=(f"measure {name}", *timed)))
    return steps


def _smoothing(options: RunOptions, device: dict[str, Any], more: tuple[str, ...]) -> list[Step]:
    """The smoothed model, and for each rung whether it is better made of it."""
    needs = ("convert", "imatrix")
    steps = [Step(name="smooth", kind="smooth", needs=(*needs, *more))]
    for rung in options.rungs:
        how = {"preset": rung, "n_ctx": options.n_ctx, **device}
        # It is tried on a part of the calibration text.
        read = (*needs, "smooth", "calibration")
        steps.append(Step(name=f"trial {rung}", kind="trial", rung=rung, needs=read, options=how))
    return steps


def _planning(
    options: RunOptions, device: dict[str, Any], more: tuple[str, ...], tried: Mapping[str, tuple[str, ...]]
) -> list[Step]:
    """Prices, a plan for each rung, and all that was tried. `more` and, by rung, `tried` are read too."""
    needs = ("convert", "imatrix", "calibration", *more)
    all_tried = tuple(dict.fromkeys(step for steps in tried.values() for step in steps))
    priced = {"rungs": sorted(options.rungs), **device}
    steps = [Step(name="price", kind="price", needs=(*needs, *all_tried), options=priced)]
    for rung in options.rungs:
        how = {"preset": rung, "mode": options.mode, **device}
        read = ("price", *needs, *tried[rung])
        steps.append(Step(name=f"plan {rung}", kind="plan", rung=rung, needs=read, options=how))
    plans = tuple(f"plan {rung}" for rung in options.rungs)
    return [*steps, Step(name="candidates", kind="candidates", needs=plans)]


def _bench_options(options: RunOptions) -> dict[str, Any]:
    """What decides tokens per second, beside the machine. Here the numbers of threads and of layers matter."""
    return {
        "tests": [list(test) for test in options.bench_tests],
        "repetitions": BENCH_REPETITIONS,
        "threads": options.threads,
        "gpu_layers": options.gpu_layers,
    }


def command_line(options: RunOptions, model: str, default_rungs: tuple[str, ...]) -> str:
    """The command that repeats the run, for the card: names instead of paths, defaults left out."""
    words = ["bitladder", "run", model, "--out", _name(str(options.out))]
    if options.rungs != default_rungs:
        words += ["--ladder", ",".join(options.rungs)]
    if options.calibration != CALIBRATION:
        for spec in options.calibration:
            words += ["--calibration", _name(spec)]
    for spec in options.compare:
        words += ["--compare", _name(spec) if pathlib.Path(spec).is_file() else spec]
    for dataset in options.datasets:
        words += ["--calibration-dataset", dataset]
    given = {
        "--text": (_name(options.text), TEXT),
        "--tasks": (_task_names(options.tasks) if options.tasks else None, None),
        "--task-count": (options.task_count, None),
        "--chunks": (options.chunks, None),
        "--imatrix-chunks": (options.imatrix_chunks, None),
        "-c": (options.n_ctx, 512),
        "--outtype": (options.outtype, "auto"),
        "-t": (options.threads, None),
        "-ngl": (options.gpu_layers, 0),
        "--converter": (_name(str(options.converter)) if options.converter else None, None),
        "--quantized-by": (options.quantized_by, None),
        "--base-model": (options.model_id, None),
        "--mode": (options.mode, MODE),
        "--rounding": (options.rounding, ROUNDING),
        "--moments-chunks": (options.moments_chunks, MOMENTS_CHUNKS),
        "--tune-chunks": (TUNE_CHUNKS if options.rounding == "stock" else options.tune_chunks, TUNE_CHUNKS),
    }
    for option, (value, default) in given.items():
        if value != default:
            words += [option, str(value)]
    if options.smooth != smooths(options.mode, options.rounding):
        words.append("--smooth" if options.smooth else "--no-smooth")
    if not options.bench:
        words.append("--no-bench")
    return shlex.join(words)


def smooths(mode: str, rounding: str) -> bool:
    """Whether channels are balanced if nothing is said: unless all is to be as llama-quantize makes it."""
    return mode != "naive" or rounding != "stock"


def _task_names(specs: str) -> str:
    """Task specs with files by their last part."""
    parts = (spec.strip().partition(":") for spec in specs.split(","))
    return ",".join(name + colon + (_name(source) if source else "") for name, colon, source in parts)


def _name(path: str) -> str:
    """The last part of a path; the name of a built-in text stays as it is."""
    if path in BUILTIN:
        return path
    return pathlib.PurePath(path).name or pathlib.Path(path).resolve().name
