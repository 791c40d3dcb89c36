"""The rungs of a ladder with planned types: prices of all rungs together, then a plan for each."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bitladder.errors import BitladderError
from bitladder.plan.feedback import TriedRecipe
from bitladder.plan.planner import Planner
from bitladder.plan.prices.document import TypePrices
from bitladder.plan.result import bits_per_weight
from bitladder.plan.rivals import rivals
from bitladder.plan.target import Target
from bitladder.refine import SMOOTHED_KEY

RungMode = Literal["quality", "size"]


def price_rungs(planner: Planner, rungs: Sequence[str]) -> TypePrices:
    """Prices every type that one of several rungs (names of presets) may need."""
    presets = [planner.subject.preset(rung) for rung in rungs]
    bpw = [8 * preset.bytes / planner.subject.weights() for preset in presets]
    return planner.price(planner.window(*bpw), *presets)


def plan_rung(planner: Planner, rung: str, mode: RungMode, prices: TypePrices) -> dict[str, Any]:
    """Plans a rung.

    Parameters:
        planner: the model, text and options.
        rung: name of the preset that the rung replaces.
        mode: "quality" for the least KLD in the preset's bytes, "size" for the fewest bytes at its KLD.
        prices: prices of types, as of `price_rungs`.

    Returns:
        planned/RUNG.json: the types, and every recipe that was tried.

    Raises:
        BitladderError: no recipe meets the target.
    """
    subject = planner.subject
    preset = subject.preset(rung)
    if mode == "size":
        target = Target(f"KLD of {rung}", max_kld=planner.measured_kld(preset))
    else:
        # The file says of its rounding and smoothing what the preset's does not, and is not to be larger.
        marked = planner.renderer.rounding.key != "stock" or subject.file.get(SMOOTHED_KEY)
        target = Target(f"like {rung}", max_bytes=preset.bytes - (planner.options.metadata_bytes if marked else 0))
    options = planner.options.rivals
    others = rivals(subject, preset, prices, planner.build, options) if options.simpler else {}
    result = planner.plan(target, prices, preset, others)
    feedback = result.feedback
    if feedback is None:
        raise BitladderError(f"{rung}: a rung's recipes are measured; leave feedback on")
    return {
        "mode": mode,
        "made": feedback.best.name,
        "predicted_kld": result.predicted_kld,
        "text": {"name": planner.text.name, "sha256": planner.text.sha256},
        "n_ctx": planner.options.decoding.n_ctx,
        "chunks": planner.options.feedback.judging_chunks,
        "types": result.types,
        "candidates": [
            _row(
                recipe, rung, bits_per_weight(subject, result.types | recipe.types), recipe.types == feedback.best.types
            )
            for recipe in feedback.tried
        ],
    }


def candidates(plans: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """candidates.json: every recipe that was tried for all rungs. Raises BitladderError if there is no plan."""
    parts = list(plans)
    if not parts:
        raise BitladderError("no rung was planned")
    first = parts[0]
    return {
        "schema_version": 1,
        "text": first["text"],
        "n_ctx": first["n_ctx"],
        "chunks": first["chunks"],
        "candidates": [candidate for part in parts for candidate in part["candidates"]],
    }


def _row(recipe: TriedRecipe, rung: str, bpw: float, chosen: bool) -> dict[str, Any]:
    row = {
        "rung": rung,
        "name": recipe.name,
        "bytes": recipe.bytes,
        "bpw": bpw,
        "kld": {"value": recipe.figure.kld, "error": recipe.figure.error},
        "types": dict(collections.Counter(recipe.types.values()).most_common()),
        "naive": recipe.name == f"preset {rung}",
        "chosen": chosen,
    }
    return row if recipe.predicted is None else row | {"predicted_kld": recipe.predicted}
