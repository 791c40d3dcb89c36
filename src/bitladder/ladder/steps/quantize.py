"""The step that makes a rung: the types of the plan or the preset, blocks rounded and tried, scales tuned."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate, quantize
from bitladder.calibrate import why_no_gradients
from bitladder.engine import native
from bitladder.ladder.context import Run, read_json, text_used
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Step, TextsOfRun
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, write_recipe
from bitladder.refine import ROUNDED_QUANT, TUNING, guard_json, guard_text, quantize_rounded, tune_in_place
from bitladder.text import Reading, Text, set_apart

# Tokens decoded in the time that the library quantizes all weights; i-quants search a codebook for every block.
LIBRARY, LIBRARY_IQ = 2000, 13_000
TUNE = 5.6  # tokens decoded in the time that a token of tuning takes
ROUND, ROUND_WIDTH = 35_000, 55
# Evaluations of a guard, about: of kinds, of layers and their groups, and of single tensors.
GUARD_CHUNKS = 2  # that decide a comparison, about
GUARD_KINDS, GUARD_LAYERS, GUARD_TENSORS = 33, 7, 48


class Quantize(Step):
    """model, imatrix, moments, plan → the quant and its recipe."""

    verb = "quantize"

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

    def decides(self) -> Mapping[str, Any]:
        """The preset, how blocks are rounded and tried, and how scales are tuned."""
        options = self.options
        decides: dict[str, Any] = {"mode": options.mode, "quantization": quantize.QuantizeOptions(self.label)}
        if options.rounds:
            refine = options.refine
            decides |= {"rounding": refine.rounding, "guard": refine.guard, "decoding": options.decoding}
        if options.tunes:
            decides |= {"tuning": options.refine.tuning, "reading": Reading()}
        return decides

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Scales are tuned only where torch is installed and knows the model."""
        return {"tuned": why_no_gradients(run.full) is None} if self.options.tunes else {}

    def parts(self, extent: Extent) -> list[Part]:
        """Rounding, the guard, and tuning."""
        if not self.options.rounds:
            return [library_part(self.label)]
        tokens = min(self.options.refine.guard.guard_chunks, GUARD_CHUNKS) * extent.chunk
        parts = [
            Part(*round_amount(self.options, extent), "rounding"),
            Part("guard", GUARD_KINDS * tokens, "guard"),
            Part("guard", GUARD_LAYERS * tokens, "guard, layers"),
            Part("guard", GUARD_TENSORS * tokens, "guard, tensors"),
            library_part(self.label),
        ]
        if self.options.tunes:
            tried = 2 * self.options.refine.tuning.tune_guard_chunks * extent.chunk
            parts += [Part("tune", TUNE * extent.tuned), Part("divergence", tried)]
        return parts

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages for the guard; for tuning each calibration text without its end, and the ends."""
        options, n_ctx = self.options, self.options.decoding.n_ctx
        used: list[Text] = []
        if options.rounds:
            used.append(guard_text(texts.calibration, options.refine.guard, n_ctx))
        if options.tunes and why_no_gradients(texts.full) is None:
            beginnings, ends = set_apart(texts.calibration, options.refine.tuning.held_out_share)
            used += [*beginnings, ends]
        return [CutText("--calibration", text, n_ctx) for text in used]

    def make(self, run: Run) -> Product:
        """Makes the file."""
        rung, options = self.label, self.options
        out = run.layout.quant(run.facts("convert")["stem"], rung)
        plan = read_json(run.files(f"plan {rung}")[0]) if options.plans else None
        types = quantize.QuantizeOptions(rung, types=None if plan is None else plan["types"])
        smoothed, decoding = run.smoothed(rung), options.decoding
        files, facts = run.material(smoothed=smoothed), dict[str, Any]()
        if not options.rounds:
            result = quantize.quantize(
                files.model, out, types, imatrix=files.imatrix, threads=decoding.threads, progress=run.progress
            )
        else:
            rounded = quantize_rounded(
                files,
                out,
                types,
                options.refine,
                guard_text(run.calibration, options.refine.guard, decoding.n_ctx),
                decoding,
                work=run.layout.material_work(smoothed=smoothed) / "rendered",
                progress=run.progress,
            )
            result = rounded.result
            facts["guard"] = None if rounded.guard is None else guard_json(rounded.guard)
            facts["tuned"] = tune_in_place(
                files.model, out, run.calibration, options.refine.tuning, decoding, run.progress
            )
        recipe = recipe_of(run, result, out.name)
        if plan is not None:
            origin = f"bitladder run --mode {plan['mode']}: {plan['made']}"
            recipe = recipe.model_copy(update={"budget": f"{plan['mode']}, like {rung}", "made": origin})
        write_recipe(run.layout.recipe(rung), recipe)
        return Product([out, run.layout.recipe(rung)], {"bytes": result.bytes, "bpw": result.bpw, **facts})


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


def library_amount(rung: str) -> float:
    """The work of quantizing all weights by the library."""
    return LIBRARY_IQ if rung.startswith("IQ") else LIBRARY


def library_part(rung: str) -> Part:
    """Quantization by the library."""
    return Part("quantize iq" if rung.startswith("IQ") else "quantize", library_amount(rung), "quantize")


def round_amount(options: RunOptions, extent: Extent) -> tuple[str, float]:
    """The kind and the amount of the work of rounding all weights in one type."""
    if not options.rounds:
        return "quantize", LIBRARY
    # Per weight: some work of its own, and some in proportion to the width of a row (docs/rounding.md).
    width = extent.weights ** (1 / 3)
    return "rounding", ROUND + ROUND_WIDTH * width
