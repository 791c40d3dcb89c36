"""The step that makes a rung: the types of the plan or the preset, blocks rounded and tried, scales tuned."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import evaluate, quantize
from bitladder.calibrate import why_no_gradients
from bitladder.engine import device_key, native
from bitladder.ladder import cost
from bitladder.ladder.context import Run, read_json, text_used
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.base import base_part, shared_base
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, write_recipe
from bitladder.refine import (
    ROUNDED_QUANT,
    TUNING,
    guard_json,
    guard_text,
    quantize_rounded,
    tune_in_place,
    tuning_texts,
)
from bitladder.text import Reading, Text

ROUNDED = "rounded"  # folder of the blocks of rungs in the work folder
TUNE = 5.0  # time of a token of tuning, of that of one that is decoded
# Types from which rungs draw a tensor's, about. In twelve planned rungs of the embedded model a tensor has 5.0
# different ones, in four 2.8, in two 1.8. The files of twelve presets take 0.52 of the time of twelve made one by one
# (benchmarks/results/ratios.json).
DRAWN, DRAWN_BY_PRESETS = 5.5, 7.5
KEPT = 2  # kinds of blocks that are kept: rounded ones, and the library's, with which the guard compares them
GUARD_CHUNKS = 2  # that decide a comparison of the guard, about. It tries each kind, then groups of layers, and layers.


class Quantize(Step):
    """model, imatrix, moments, plan → the quant and its recipe."""

    verb = "quantize"
    anywhere = True
    cache = ROUNDED

    def __init__(self, options: RunOptions, label: str) -> None:
        super().__init__(options, label)
        self.algorithms = (quantize.QUANTIZE,)
        if options.rounds:
            self.algorithms += (ROUNDED_QUANT, evaluate.BASE)
        if options.tunes:
            self.algorithms += (TUNING, evaluate.MEASURE)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the rung is made of; blocks are tried on a part of the calibration text."""
        options = self.options
        needs = ["convert", "imatrix"]
        needs += ["moments", "calibration"] if options.rounds else []
        needs += ["smooth", f"trial {self.label}"] if options.smooths else []
        needs += [f"plan {self.label}"] if options.plans else []
        return tuple(needs)

    def reads(self, run: Run | None = None) -> tuple[str, ...]:
        """Only what the rung is made of."""
        return read_for(self, run, self.label)

    @property
    def after(self) -> tuple[str, ...]:
        """The blocks of all rungs, from which this one is made."""
        return ("round",)

    def decides(self) -> Mapping[str, Any]:
        """The preset, how blocks are rounded and tried, and how scales are tuned."""
        options = self.options
        decides: dict[str, Any] = {"mode": options.mode, **preset_decides(options, self.label)}
        if options.rounds:
            refine = options.refine
            decides |= {"rounding": refine.rounding, "guard": refine.guard, "decoding": options.decoding}
            decides |= device_key(options.decoding.device)
        if options.tunes:
            decides |= {"tuning": options.refine.tuning, "reading": Reading()}
        return decides

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Scales are tuned only where torch is installed and knows the model."""
        return {"tuned": why_no_gradients(run.full) is None} if self.options.tunes else {}

    def parts(self, extent: Extent) -> list[Part]:
        """Rounding, the guard, and tuning."""
        drawn = DRAWN if self.options.plans else DRAWN_BY_PRESETS
        by_library = library_part(self.options.rungs, self.label, extent, drawn)
        if not self.options.rounds:
            return [by_library]
        guard_chunks = self.options.refine.guard.guard_chunks
        half = evaluate.decision_chunk(extent.chunk)
        tokens = min(guard_chunks, GUARD_CHUNKS) * half
        kinds = len({matrix.kind for matrix in extent.shape.matrices})
        evaluation = cost.swapping(extent.shape, 2, tokens, half, extent.shape.weights / kinds)
        parts = [
            *([] if len(self.options.rungs) > 1 else [rounding_part(self.options, extent)]),
            *shared_base(self, extent, guard_chunks * half, half),
            Part("guard", (2 + kinds) * evaluation, "guard"),
            Part("guard", 2 * extent.shape.blocks**0.5 * evaluation, "guard, layers"),
            by_library,
        ]
        if self.options.tunes:
            tried = self.options.refine.tuning.tune_guard_chunks * half
            tuning = TUNE * cost.decoding(extent.shape, extent.tuned, extent.chunk, logits=1)
            parts.append(Part("tune", tuning, rate="blas"))
            parts.append(base_part(extent, tried, half, cost.DECIDING))
            measured = cost.comparing(extent.shape, tried, half, quant=True, scored=cost.DECIDING)
            parts += 2 * [Part("divergence", measured)]
        return parts

    def memory(self, extent: Extent) -> float:
        """Rounding, and then the loaded model of the guard; or tuning."""
        if not self.options.rounds:
            return quantizing_bytes(extent)
        guard = cost.decoding_bytes(extent) + 8 * extent.shape.largest
        tuning = cost.PROCESS + cost.TORCH + cost.TUNED * extent.shape.weights if self.options.tunes else 0
        return max(cost.rounding_bytes(extent.shape, extent.rounding_threads), guard, tuning)

    def room(self, extent: Extent) -> Room:
        """The file, and while it is tuned a second one; blocks are kept for the other rungs."""
        size = quant_bytes(self.label, extent)
        alone = self.options.rounds and len(self.options.rungs) == 1
        blocks = cost.kept_blocks(extent.shape, KEPT * size, self.options.planning.cache_bytes) if alone else 0
        return Room(size, size, blocks)

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages for the guard; for tuning each calibration text without its end, and the ends."""
        options, n_ctx = self.options, self.options.decoding.n_ctx
        half = evaluate.decision_chunk(n_ctx)
        used: list[tuple[Text, int]] = []
        if options.rounds:
            used.append((guard_text(texts.calibration, options.refine.guard, n_ctx), half))
        if options.tunes and why_no_gradients(texts.full) is None:
            beginnings, ends = tuning_texts(texts.calibration, options.refine.tuning, n_ctx)
            used += [*((text, n_ctx) for text in beginnings), (ends, half)]
        return [CutText("--calibration", text, length) for text, length in used]

    def make(self, run: Run) -> Product:
        """Makes the file."""
        rung, options = self.label, self.options
        out = run.layout.quant(run.facts("convert")["stem"], rung)
        plan, types = types_of_rung(run, rung)
        smoothed, decoding = run.smoothed(rung), options.decoding
        files, facts = run.material(smoothed=smoothed), dict[str, Any]()
        if not options.rounds:
            result = quantize.quantize(
                files.model,
                out,
                types,
                imatrix=files.imatrix,
                threads=decoding.threads,
                progress=run.progress,
                same=run.by_library(smoothed=smoothed),
            )
        else:
            rounded = quantize_rounded(
                files,
                out,
                types,
                options.refine,
                guard_text(run.calibration, options.refine.guard, decoding.n_ctx),
                run.decoding,
                work=run.layout.material_work(smoothed=smoothed) / ROUNDED,
                progress=run.progress,
            )
            result = rounded.result
            facts["guard"] = None if rounded.guard is None else guard_json(rounded.guard)
            facts["tuned"] = tune_in_place(
                files.model, out, run.calibration, options.refine.tuning, decoding, run.progress
            )
        # Gradients add up in an order that follows from the threads. All else gives the same bytes again.
        facts["reproducible"] = not facts.get("tuned")
        recipe = recipe_of(run, result, out.name)
        if plan is not None:
            origin = f"bitladder run --mode {plan['mode']}: {plan['made']}"
            recipe = recipe.model_copy(update={"budget": f"{plan['mode']}, like {rung}", "made": origin})
        write_recipe(run.layout.recipe(rung), recipe)
        return Product([out, run.layout.recipe(rung)], {"bytes": result.bytes, "bpw": result.bpw, **facts})


def read_for(step: Step, run: Run | None, *rungs: str) -> tuple[str, ...]:
    """Of what a step needs, what it reads the files of to make some rungs, as `Step.reads` says.

    Of the two models, and their second moments, these are only those that the rungs are made of. Of trials facts
    suffice.
    """
    used = {False, True} if run is None else {run.smoothed(rung) for rung in rungs}
    unused = {name for smoothed, name in ((False, "moments"), (True, "smooth")) if smoothed not in used}
    return tuple(need for need in step.needs if not need.startswith("trial ") and need not in unused)


def types_of_rung(run: Run, rung: str) -> tuple[Any, quantize.QuantizeOptions]:
    """planned/RUNG.json, or None, and the types of the rung: those of the plan or of the preset."""
    plan = read_json(run.files(f"plan {rung}")[0]) if run.options.plans else None
    return plan, run.options.quantization(rung, None if plan is None else plan["types"])


def preset_decides(options: RunOptions, *rungs: str) -> dict[str, Any]:
    """What decides the types of presets."""
    presets = tuple(options.quantization(rung) for rung in rungs)
    return {"quantization": presets, "unreached_type": options.unreached_type}


def recipe_of(run: Run, result: quantize.QuantizeResult, name: str) -> Recipe:
    """The recipe of a quant called `name`, with what it was made from."""
    converted, calibrated = run.facts("convert"), run.facts("imatrix")
    return Recipe(
        model=str(converted["general"].get("name") or converted["stem"]),
        file=name,
        preset=result.preset,
        bytes=result.bytes,
        bpw=result.bpw,
        source=FileUsed(name=converted["file"], sha256=converted["sha256"]),
        imatrix=ImatrixUsed(
            name=run.layout.imatrix.name,
            sha256=run.sha256("imatrix"),
            chunks=calibrated["chunks"],
            n_ctx=run.options.decoding.n_ctx,
            texts=[text_used(text) for text in run.calibration],
        ),
        versions=native.versions(),
        tensors=result.types,
    )


def library_part(rungs: Sequence[str], rung: str, extent: Extent, drawn: float = DRAWN_BY_PRESETS) -> Part:
    """Quantization by the library of what no earlier rung has in the same type."""
    kind, new = "quantize iq" if rung.startswith("IQ") else "quantize", (1 - 1 / drawn) ** rungs.index(rung)
    amount = new * cost.by_library(extent.shape, rung)
    return Part(kind, amount, "quantize", library=amount)


def quantizing_bytes(extent: Extent) -> float:
    """Bytes of memory that the library's kernels need."""
    return cost.PROCESS + 8 * extent.shape.largest


def rounding_part(options: RunOptions, extent: Extent, types: float = 1) -> Part:
    """The work of rounding all weights as they are in a rung, in some types."""
    return round_part(options, extent, "rounding", passes=options.refine.rounding.passes, types=types)


def round_part(
    options: RunOptions, extent: Extent, label: str, *, passes: int, types: float = 1, library: float = 1
) -> Part:
    """The work of making the blocks of all weights in some types; the library takes a multiple of the time of Q4_K."""
    library *= types * cost.by_library(extent.shape, "")
    if not options.rounds:
        return Part("quantize", library, label, library=library)
    if options.refine.rounding.method == "feedback":
        passes = 0
    seconds = cost.rounding(extent.shape, passes, types) + library
    return Part("rounding", seconds, label, rate="kernels", library=library)


# Bits per weight of a preset, for a model of 7B weights or more. The embeddings are a larger share of a small model,
# which needs more.
NOMINAL_BPW = {
    "IQ1_S": 2.0,
    "IQ1_M": 2.2,
    "IQ2_XXS": 2.4,
    "IQ2_XS": 2.6,
    "IQ2_S": 2.8,
    "IQ2_M": 2.9,
    "Q2_K_S": 3.0,
    "Q2_K": 3.2,
    "IQ3_XXS": 3.3,
    "IQ3_XS": 3.5,
    "IQ3_S": 3.6,
    "IQ3_M": 3.8,
    "Q3_K_S": 3.6,
    "Q3_K_M": 4.0,
    "Q3_K_L": 4.3,
    "IQ4_XS": 4.4,
    "IQ4_NL": 4.6,
    "Q4_K_S": 4.7,
    "Q4_K_M": 4.9,
    "Q5_K_S": 5.6,
    "Q5_K_M": 5.7,
    "Q6_K": 6.6,
    "Q8_0": 8.5,
}
OTHER_BPW = 8.5
MARGIN = 1.1


def quant_bytes(rung: str, extent: Extent) -> float:
    """About the bytes of a preset's file."""
    return extent.shape.weights * NOMINAL_BPW.get(rung, OTHER_BPW) * MARGIN / 8
