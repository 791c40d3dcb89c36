"""The options of a run."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Literal

from bitladder.calibrate import RoundingMomentsOptions
from bitladder.convert import ConvertOptions
from bitladder.engine import Decoding
from bitladder.errors import UsageError, did_you_mean
from bitladder.hub import DATA_SETS
from bitladder.options import Effort, Options, option, words
from bitladder.plan import PlanOptions
from bitladder.quantize import LADDERS, QuantizeOptions, preset_names, unreached_option
from bitladder.refine import RefineOptions
from bitladder.text import BUILTIN, answers_option

Mode = Literal["quality", "size", "naive"]
# Presets that do not quantize: the full-precision file is no rung.
FULL_PRECISION = ("ALL_F32", "F16", "BF16")
USUAL = ("seed",)


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
    """The options of a run. Raises UsageError for a value outside its limits.

    `model` is the directory of a checkpoint, an id of the hub, or a full-precision GGUF file.
    """

    model: str
    out: pathlib.Path = option(
        ...,
        "-o",
        "--out",
        names="file",
        writes="folder",
        metavar="DIR",
        help="Directory of the run. An interrupted run continues there.",
    )
    replace_model: bool = option(
        False,
        "--replace",
        decides=False,
        hidden=True,
        help="Make the ladder of MODEL in a directory that has the ladder of another model.",
    )
    keep: bool = option(
        False,
        "--keep",
        decides=False,
        hidden=True,
        help="Keep the rungs in the card that the directory has and --ladder does not name.",
    )
    release: bool = option(
        False,
        "--release",
        decides=False,
        hidden=True,
        help="Delete files that only steps read, such as second moments, when no later step of the run reads them. "
        "Another rung makes them again.",
    )
    cluster: str | None = option(
        None,
        "--cluster",
        decides=False,
        hidden=True,
        metavar="ADDRESS",
        help="Dask scheduler whose workers share the work and see --out (docs/scale-out.md).",
        unset="this machine alone",
    )
    share: str | None = option(
        None,
        "--share",
        decides=False,
        hidden=True,
        metavar="URL",
        help="Folder of an object store, such as s3://BUCKET/FOLDER, through which the machines of --cluster exchange "
        "files.",
        unset="all machines see --out",
    )
    effort: Effort = option(
        "normal",
        "--effort",
        decides=False,
        help="How much time may be spent (docs/cost.md); an option that you give counts more.",
    )
    rungs: tuple[str, ...] = option(
        USUAL,
        "--ladder",
        commas=True,
        names="ladder",
        metavar="RUNGS",
        help="Presets or ladders, separated by commas: seed (the usual twelve), publish (Q2_K to Q8_0), low (2 to 3.5 "
        "bits).",
    )
    calibration: tuple[str, ...] = option(
        (BUILTIN[0],),
        "--calibration",
        names="text",
        metavar="TEXT",
        help="Text to calibrate on: a file, or a built-in text.",
        group="Texts",
    )
    texts: tuple[str, ...] = option(
        (BUILTIN[1],),
        "--text",
        names="text",
        metavar="TEXT",
        help="Text to measure on. Several count alike.",
        group="Texts",
    )
    assistant_only: bool = answers_option(group="Texts")
    chunks: int | None = option(
        30,
        "--chunks",
        least=1,
        metavar="N",
        unset="all",
        help="Measure on at most N chunks of each text.",
        group="Texts",
        efforts={"fast": 20, "high": None},
    )
    imatrix_chunks: int | None = option(
        48,
        "--imatrix-chunks",
        least=1,
        metavar="N",
        unset="all",
        help="Use at most N chunks of each calibration text for the importance matrix.",
        group="Texts",
        efforts={"fast": 16, "high": None},
    )
    expert_coverage: int | None = option(
        None,
        "--expert-coverage",
        least=1,
        metavar="N",
        unset="no more text than for other models",
        help="Calibrate on until each expert of a mixture has N tokens, or the texts end.",
    )
    unreached_type: str = unreached_option(or_preset=True)
    mode: Mode = option(
        "quality",
        "--mode",
        help="quality: best file at the preset's size; size: smallest file at the preset's quality; naive: the "
        "preset's types.",
    )
    moments: RoundingMomentsOptions = option(RoundingMomentsOptions)
    refine: RefineOptions = option(RefineOptions)
    planning: PlanOptions = option(PlanOptions, closed=True)
    smooth: bool | None = option(
        None,
        "--smooth/--no-smooth",
        unset="yes, except with --mode naive --rounding stock",
        help="Rescale channels first: the same model, less quantization loss.",
        group="Smoothing",
    )
    tasks: str | None = option(
        None,
        "--tasks",
        names="tasks",
        metavar="TASKS",
        help="Benchmarks to score with, as for eval: NAME:FILE,… or continuation:TEXT.",
        group="Measuring",
    )
    task_count: int | None = option(
        None,
        "--task-count",
        least=1,
        metavar="N",
        unset="all",
        help="Questions of each task, drawn at random.",
        group="Measuring",
    )
    task_ctx: int = 768
    compare: tuple[str, ...] = option(
        (),
        "--compare",
        names="model",
        metavar="MODEL",
        help="GGUF of another maker to measure with the ladder: a file, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf.",
        group="Measuring",
    )
    bench: bool = option(True, "--bench/--no-bench", help="Measure tokens per second.", group="Measuring")
    bench_tests: tuple[tuple[int, int], ...] = option(
        ((512, 0), (0, 64)), efforts={"high": ((512, 0), (0, 128), (1024, 1024))}
    )
    bench_repetitions: int = option(1, efforts={"high": 3})
    conversion: ConvertOptions = option(ConvertOptions)
    decoding: Decoding = option(Decoding)
    quantized_by: str | None = option(
        None,
        "--quantized-by",
        metavar="NAME",
        decides=False,
        help="Name of the maker of the quants, for the card.",
        group="Model card",
    )
    model_id: str | None = option(
        None,
        "--base-model",
        metavar="ID",
        decides=False,
        help="Hub id of MODEL, for the card of a local model.",
        group="Model card",
    )
    repo: str | None = option(
        None,
        "--repo",
        metavar="OWNER/NAME",
        decides=False,
        help="Repository of the hub that the ladder is for: the card then has download links and commands.",
        group="Model card",
    )
    datasets: tuple[str, ...] = option(
        (),
        "--calibration-dataset",
        metavar="ID",
        decides=False,
        help="Hub id of a data set that the calibration text is from, for the card.",
        group="Model card",
    )

    def quantization(self, rung: str, types: Mapping[str, str] | None = None) -> QuantizeOptions:
        """The options of a quant: of a preset, or of a plan's types in its place."""
        return QuantizeOptions(rung, types=types, unreached_type=self.unreached_type)

    @property
    def plans(self) -> bool:
        """Whether types are planned."""
        return self.mode != "naive"

    @property
    def rounds(self) -> bool:
        """Whether blocks are chosen for the output of their layer."""
        return self.refine.rounding.method != "stock"

    @property
    def smooths(self) -> bool:
        """Whether a smoothed model is tried. The default is yes, unless all blocks are those of llama-quantize."""
        return self.plans or self.rounds if self.smooth is None else self.smooth

    @property
    def tunes(self) -> bool:
        """Whether scales are tuned where torch is installed."""
        return self.rounds and self.refine.tuning.tune_chunks > 0

    @property
    def betters(self) -> bool:
        """Whether rungs differ from the presets. Then the presets are measured too."""
        return self.plans or self.rounds or self.smooths


def choose_rungs(rungs: tuple[str, ...]) -> tuple[str, ...]:
    """The presets that `rungs` names, each once.

    Parameters:
        rungs: names of presets and of ladders (`quantize.LADDERS`), in upper or lower case.

    Raises:
        UsageError: a name is neither, or does not quantize; the error names the closest ones, or lists all.

    Example:
        >>> choose_rungs(("q6_k", "low"))[:3]
        ('Q6_K', 'IQ2_XXS', 'IQ2_XS')
    """
    known = [name for name in preset_names() if name not in FULL_PRECISION]
    chosen: list[str] = []
    unknown: list[str] = []
    for name in rungs:
        chosen += LADDERS.get(name.lower(), (name.upper(),))
        unknown += [] if name.lower() in LADDERS or name.upper() in known else [name]
    if unknown or not rungs:
        names = [*LADDERS, *known]
        close = did_you_mean(unknown[0] if unknown else "", names, "the ladders and presets are")
        raise UsageError(f"--ladder: no preset {', '.join(unknown) or 'is named'}{close}")
    return tuple(dict.fromkeys(chosen))


def command_line(options: RunOptions, model: str) -> str:
    """The command that repeats a run, for the card. It has names instead of paths, and no defaults."""
    rungs = next(((name,) for name, ladder in LADDERS.items() if ladder == options.rungs), options.rungs)
    shown: Mapping[str, Callable[[Any], Any]] = {
        "file": _last_part,
        "text": _last_part,
        "tasks": _task_names,
        "model": lambda name: _last_part(name) if pathlib.Path(name).is_file() else name,
    }
    return shlex.join(["bitladder", "run", model, *words(options.replace(rungs=rungs), shown)])


def _task_names(specs: str) -> str:
    """Task specs with the last part of each file."""
    parts = (spec.strip().partition(":") for spec in specs.split(","))
    return ",".join(name + colon + (_last_part(source) if source else "") for name, colon, source in parts)


def _last_part(path: str | pathlib.Path) -> str:
    """The last part of a path. The name of a built-in text, or of a data set of the hub, stays as it is."""
    if path in BUILTIN or str(path).startswith(DATA_SETS):
        return str(path)
    return pathlib.PurePath(path).name or pathlib.Path(path).resolve().name
