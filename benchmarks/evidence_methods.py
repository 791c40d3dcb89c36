"""How the files of benchmarks/evidence.py are made: by us with each effort, by rivals, and with each part left out.

A `Method` makes the quants of some rungs, each in at most the bytes of llama-quantize's file of that preset.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bitladder.calibrate import IMATRIX, MOMENTS
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.evaluate import MEASURE
from bitladder.files import sha256_file, write_json
from bitladder.keys import versions_of
from bitladder.ladder import RunOptions, Status, run
from bitladder.plan import PLANNING, PRICES, PlanDecoding, PlanInputs, Planner, PlanOptions, Target
from bitladder.progress import SILENT
from bitladder.quantize import QUANTIZE, QuantizeOptions, prepare, preset_names, quantize
from bitladder.refine import (
    ROUNDED_QUANT,
    SMOOTHING_TRIAL,
    TUNING,
    ModelFiles,
    RefineOptions,
    TuneOptions,
    guard_text,
    quantize_rounded,
)
from bitladder.rounding import RoundingOptions
from bitladder.rundir import Layout, load_manifest
from bitladder.trial import render_all

if TYPE_CHECKING:
    from evidence import Evidence

OF_RIVALS = versions_of(IMATRIX, MOMENTS, MEASURE, QUANTIZE, ROUNDED_QUANT)
OF_RUNS = OF_RIVALS | versions_of(PLANNING, PRICES, SMOOTHING_TRIAL, TUNING)
SEEDS = {"check_seed": PlanOptions().prices.check_seed, "tune_seed": TuneOptions().tune_seed}
REFERENCE, WHOLE = "llama-quantize, imatrix", "normal"
STEPS_OF_A_RUNG = ("trial", "plan", "quantize")
SHARED_STEPS = ("imatrix", "moments", "smooth", "price")
GPTQ_CHUNKS = 16  # of each calibration text; published settings take 128 sequences of 2048 tokens


@dataclasses.dataclass(frozen=True)
class Quant:
    """A file that is to be measured.

    Parameters:
        rung: the preset whose bytes it may have.
        path: the file; None where the method refuses the rung, and `facts` says why.
        cpu: CPU seconds by what was done. What several rungs share is in a name of its own.
        facts: what is worth knowing of how it came out.
        theirs: somebody else's file, which stays.
    """

    rung: str
    path: pathlib.Path | None
    cpu: Mapping[str, float] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    theirs: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to make quants.

    Parameters:
        name: what tables call it.
        group: "rivals", "ours", "parts" or "chunks".
        how: how a file is made, in a line that repeats it.
        decides: the options that decide its result.
        make: makes the quants of rungs, one after the other.
        algorithms: the versions of what makes and measures them.
    """

    name: str
    group: str
    how: str
    decides: Any
    make: Callable[["Evidence", tuple[str, ...]], Iterator[Quant]]
    algorithms: Mapping[str, int] = dataclasses.field(default_factory=lambda: OF_RIVALS)


def all_methods() -> list[Method]:
    """Every method, in the order of the tables."""
    return [*rivals(), *(runs("ours", EFFORTS)), *(runs("parts", PARTS)), *roundings(), *(runs("chunks", CHUNKS))]


def listed(methods: list[Method]) -> str:
    """The groups with their methods, for an error."""
    groups = dict.fromkeys(method.group for method in methods)
    return "; ".join(f"{group} ({', '.join(m.name for m in methods if m.group == group)})" for group in groups)


def of_somebody(name: str, how: str | None, sha256: str) -> Method:
    """The method of files that somebody else made."""
    return Method(name, "rivals", how or f"a file of {name} (--file)", sha256, _nothing)


def _nothing(_evidence: "Evidence", _rungs: tuple[str, ...]) -> Iterator[Quant]:
    yield from ()


# Ours, as `bitladder run` makes it. All have the same importance matrix.

EFFORTS: dict[str, dict[str, Any]] = {effort: {"effort": effort} for effort in ("fast", "normal", "high")}
STOCK = {"mode": "naive", "method": "stock", "smooth": False, "tune_chunks": 0}
PARTS: dict[str, dict[str, Any]] = {
    "only smoothed": STOCK | {"smooth": True},
    "only planned": STOCK | {"mode": "quality"},
    "only rounded": {"mode": "naive", "smooth": False},
    "without smoothing": {"smooth": False},
    "without order": {"order": False},
    "without planned types": {"mode": "naive"},
    "without rounding": {"method": "stock"},
    "without scales of blocks": {"method": "descent"},
    "without descent": {"method": "feedback"},
    "without the other side": {"two_sided": False},
    "and tuned, 16 chunks": {"tune_chunks": 16},
}
CHUNKS: dict[str, dict[str, Any]] = {
    f"only rounded, {count} chunks": {"mode": "naive", "smooth": False, "moments_chunks": count}
    for count in (2, 8, 32, 128)
}


def runs(group: str, variants: Mapping[str, Mapping[str, Any]]) -> list[Method]:
    """Methods that are runs with other options; those of parts and chunks change the effort `normal`."""
    methods = []
    for name, changes in variants.items():
        shown = " ".join(f"{option}={value}" for option, value in changes.items() if option != "effort")
        how = f"bitladder run --effort {changes.get('effort', WHOLE)}" + (f", {shown}" if shown else "")
        options = options_of("", pathlib.Path(), changes)
        decides = [options.mode, options.smooth, options.moments, options.refine, options.planning]
        methods.append(Method(name, group, how, decides, lambda e, rungs, c=changes: run_variant(e, rungs, c), OF_RUNS))
    return methods


def options_of(model: str, folder: pathlib.Path, changes: Mapping[str, Any]) -> RunOptions:
    """The options of a run: those of an effort, and the changes of a variant."""
    own = {name: value for name, value in changes.items() if name != "effort"}
    return RunOptions(model, folder).at_effort(changes.get("effort", WHOLE)).replace(**own)


def run_variant(evidence: "Evidence", rungs: tuple[str, ...], changes: Mapping[str, Any]) -> Iterator[Quant]:
    """The rungs of a run in the one run directory of the model. A run that was killed continues."""
    settings, folder = evidence.settings, evidence.work / "run"
    options = options_of(str(evidence.model), folder, changes).replace(
        rungs=rungs,
        calibration=tuple(settings.calibration),
        texts=(settings.first,),
        chunks=2,  # a run measures too; rows are measured on all texts afterwards
        imatrix_chunks=settings.imatrix_chunks,
        n_ctx=settings.n_ctx,
        threads=settings.threads,
        bench=False,
    )
    options = options.replace(planning=options.planning.replace(threads=settings.threads))
    steps = StepSeconds(folder, evidence.work / "steps.json")
    run(options, watch=steps.watch)
    steps.close()
    if sha256_file(Layout(folder).imatrix) != sha256_file(evidence.imatrix):
        raise BitladderError(f"{folder} has another importance matrix than the rivals")
    manifest = load_manifest(folder)
    assert manifest is not None
    for rung in rungs:
        record = manifest.steps[f"quantize {rung}"]
        own = [f"{verb} {rung}" for verb in STEPS_OF_A_RUNG]
        cpu = {verb: steps.seconds(name) for verb, name in zip(STEPS_OF_A_RUNG, own, strict=True)}
        cpu |= {f"shared: {name}": steps.seconds(name) for name in manifest.steps if name.split()[0] in SHARED_STEPS}
        facts = {"smoothed": False, "guard": record.facts.get("guard"), "tuned": bool(record.facts.get("tuned"))}
        if (trial := manifest.steps.get(f"trial {rung}")) is not None:
            facts["smoothed"] = trial.facts.get("smoothed", trial.facts.get("helps"))
        path = next(folder / output.path for output in record.outputs if output.path.endswith(".gguf"))
        copy = evidence.work / path.name  # the run keeps its own
        copy.unlink(missing_ok=True)
        copy.hardlink_to(path)
        yield Quant(rung, copy, {name: value for name, value in cpu.items() if value}, facts)


class StepSeconds:
    """CPU seconds of each step of runs, by the key of its record.

    Parameters:
        folder: the run directory.
        out: the file in which seconds are kept.
    """

    def __init__(self, folder: pathlib.Path, out: pathlib.Path) -> None:
        self._folder, self._out, self._step, self._since = folder, out, "", time.process_time()
        self._there: str | None = None

    def watch(self, status: Status) -> None:
        """Notes the end of a step."""
        if status.step != self._step:
            self.close()
            self._step, self._since, self._there = status.step, time.process_time(), self._key(status.step)

    def close(self) -> None:
        """Keeps the seconds of the last step, if it was made."""
        key = self._key(self._step)
        if key and key != self._there:
            write_json(self._out, self._kept() | {key: time.process_time() - self._since})

    def seconds(self, step: str) -> float:
        """CPU seconds of a step of the run; 0 if it was not made."""
        return self._kept().get(self._key(step) or "", 0.0)

    def _key(self, step: str) -> str | None:
        manifest = load_manifest(self._folder) if self._folder.is_dir() else None
        record = manifest.steps.get(step) if manifest else None
        return f"{step} {record.key}" if record else None

    def _kept(self) -> dict[str, float]:
        return json.loads(self._out.read_text()) if self._out.exists() else {}


# Rivals, and roundings with other moments than a run collects.


def rivals() -> list[Method]:
    """What others do at the same bytes, by the library's kernels or by ours."""
    gptq = RoundingOptions(method="feedback", two_sided=False, damping=0.01, shrinkage=0, by_importance=True, passes=0)
    return [
        Method(REFERENCE, "rivals", "bitladder quantize --imatrix, bytes of llama-quantize", 1, _quantized(True)),
        Method("llama-quantize", "rivals", "bitladder quantize, bytes of llama-quantize", 1, _quantized(False)),
        Method(
            "embeddings and head Q8_0",
            "rivals",
            "the largest preset that fits with --token-embedding-type q8_0 --output-tensor-type q8_0, imatrix",
            1,
            _eight_bit_ends,
        ),
        Method(
            "weighted error, exact",
            "rivals",
            "types of least imatrix-weighted squared error in the bytes (exact solver), library's blocks, imatrix",
            2,
            _weighted_error,
        ),
        Method(
            "GPTQ",
            "rivals",
            "the preset's types, errors handed on column by column (act-order, damping 0.01, tokens alike, "
            f"{GPTQ_CHUNKS} chunks of each text), scales of llama-quantize without imatrix",
            gptq,
            lambda evidence, rungs: _rounded(evidence, rungs, gptq, "tokens", GPTQ_CHUNKS, imatrix=False),
        ),
    ]


def roundings() -> list[Method]:
    """The preset's types rounded with the moments of one weighting alone."""
    normal = RefineOptions().at_effort(WHOLE).rounding
    return [
        Method(
            f"only rounded, weighted by {weighting}",
            "parts",
            f"bitladder calibrate --weighting {weighting} --chunks 8; "
            "bitladder quantize --rounding best --effort normal",
            [normal, weighting],
            lambda evidence, rungs, weighting=weighting: _rounded(evidence, rungs, normal, weighting, 8, imatrix=True),
        )
        for weighting in ("gradients", "positions", "tokens")
    ]


def _quantized(weighted: bool) -> Callable[["Evidence", tuple[str, ...]], Iterator[Quant]]:
    def make(evidence: "Evidence", rungs: tuple[str, ...]) -> Iterator[Quant]:
        for rung in rungs:
            yield _by_library(evidence, rung, QuantizeOptions(rung), weighted=weighted)

    return make


def _by_library(evidence: "Evidence", rung: str, options: QuantizeOptions, *, weighted: bool = True) -> Quant:
    """A file with the library's blocks."""
    imatrix = evidence.imatrix if weighted else None
    if why := _refused(evidence, options, imatrix):
        return Quant(rung, None, facts={"refused": why})
    began, out = time.process_time(), evidence.work / "quant.gguf"
    quantize(evidence.model, out, options, imatrix=imatrix, threads=evidence.settings.threads)
    return Quant(rung, out, {"quantize": time.process_time() - began}, {"preset": options.preset})


def _refused(evidence: "Evidence", options: QuantizeOptions, imatrix: pathlib.Path | None) -> str:
    """Why a preset cannot be made, or nothing: the library wants an importance matrix for it."""
    try:
        with prepare(evidence.model, options, imatrix=imatrix, progress=SILENT):
            return ""
    except BitladderError as error:
        return str(error)


def _eight_bit_ends(evidence: "Evidence", rungs: tuple[str, ...]) -> Iterator[Quant]:
    sizes = {}
    for name in preset_names():
        options = QuantizeOptions(name, token_embedding_type="q8_0", output_tensor_type="q8_0")
        if not name.startswith(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ")):
            continue
        with prepare(evidence.model, options, imatrix=evidence.imatrix, progress=SILENT) as prepared:
            sizes[name] = prepared.bytes, options
    for rung in rungs:
        with prepare(evidence.model, QuantizeOptions(rung), imatrix=evidence.imatrix, progress=SILENT) as prepared:
            fitting = [size for size in sizes.values() if size[0] <= prepared.bytes]
        if not fitting:
            yield Quant(rung, None, facts={"refused": "no preset fits with embeddings and head in Q8_0"})
            continue
        yield _by_library(evidence, rung, max(fitting, key=lambda size: size[0])[1])


def _weighted_error(evidence: "Evidence", rungs: tuple[str, ...]) -> Iterator[Quant]:
    """Types from one bit below the target's to four above; each tensor is rendered once in each type."""
    options = PlanOptions(menu="iq", bpw_below=1.0, bpw_above=4.0)
    options = options.replace(decoding=PlanDecoding(threads=evidence.settings.threads))
    inputs = PlanInputs(evidence.model, evidence.imatrix, evidence.calibration, work=evidence.work / "errors")
    with Planner(inputs, options) as planner:
        for rung in rungs:
            began, preset = time.process_time(), planner.subject.preset(rung)
            window = planner.window(8 * preset.bytes / planner.subject.weights())
            errors: dict[str, dict[str, float]] = {}
            pairs = [(name, kind.name) for name, menu in planner.menus(window, preset).items() for kind in menu]
            for (name, kind), error in render_all(planner.renderer, pairs).items():
                errors.setdefault(name, {})[kind] = error
            types = Target(rung, max_bytes=preset.bytes).solve(planner.build(errors)).types
            whole = planner.subject.complete(planner.full_types() | types)[0]
            seconds = time.process_time() - began
            quant = _by_library(evidence, rung, QuantizeOptions(types=whole))
            moved = sum(type_by_name(kind) != type_by_name(preset.types[name]) for name, kind in whole.items())
            facts = {"tensors of another type than the preset's": moved}
            yield dataclasses.replace(quant, cpu={"errors and types": seconds, **quant.cpu}, facts=facts)


def _rounded(
    evidence: "Evidence",
    rungs: tuple[str, ...],
    rounding: RoundingOptions,
    weighting: str,
    chunks: int,
    *,
    imatrix: bool,
) -> Iterator[Quant]:
    """The preset's types with rounded blocks; the guard tries them only where we make them."""
    settings, refine = evidence.settings, RefineOptions().at_effort(WHOLE).replace(rounding=rounding)
    moments = evidence.moments(weighting, chunks)
    files = ModelFiles(evidence.model, evidence.imatrix if imatrix else None, (moments,))
    held_out = guard_text(evidence.calibration, refine.guard, settings.n_ctx) if imatrix else None
    for rung in rungs:
        options = QuantizeOptions(rung)
        if why := _refused(evidence, options, files.imatrix):
            yield Quant(rung, None, facts={"refused": why})
            continue
        began, out, work = time.process_time(), evidence.work / "quant.gguf", evidence.work / "rounded"
        made = quantize_rounded(files, out, options, refine, held_out, evidence.decoding, work=work)
        cpu = {
            "quantize": time.process_time() - began,
            f"shared: moments by {weighting}": evidence.cpu[f"moments-{weighting}"],
        }
        yield Quant(rung, out, cpu, {"stock tensors": len(made.guard.stock) if made.guard else 0})


__all__ = [
    "REFERENCE",
    "SEEDS",
    "WHOLE",
    "Method",
    "Quant",
    "all_methods",
    "listed",
    "of_somebody",
]
