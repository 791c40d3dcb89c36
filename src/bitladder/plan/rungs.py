"""The rungs of a ladder with planned types: prices for a band of rungs, then a plan for each, compared with rivals.

A band is a fixed set of presets. Its prices serve each rung of it, whichever rungs a ladder has, so that another rung
changes no price. Rivals are other ways to spend the same bytes.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from bitladder.calibrate import Imatrix, TensorStatistics, tensor_statistics
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.plan.allocate.allocation import greedy
from bitladder.plan.allocate.problem import Problem
from bitladder.plan.corrections import Places
from bitladder.plan.feedback import TriedRecipe
from bitladder.plan.options import RivalOptions
from bitladder.plan.planner import Planner
from bitladder.plan.prices.menu import TypePrices
from bitladder.plan.result import bits_per_weight
from bitladder.plan.subject import Preset, Prices, Subject
from bitladder.plan.target import Target
from bitladder.quantize import RUNGS
from bitladder.refine import SMOOTHED_KEY

RungMode = Literal["quality", "size"]
# From the largest types to the smallest: a ladder seldom goes below 4 bits.
BANDS: tuple[tuple[str, ...], ...] = (
    ("IQ4_XS", *RUNGS[5:]),
    RUNGS[:5],
    ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_XS"),
)
# What tables call a statistic, and its value: tensors with larger values are taken to matter more.
STATISTICS: dict[str, Callable[[TensorStatistics], float | None]] = {
    "Σ(Act²)": lambda tensor: tensor.sum,
    "ZD": lambda tensor: tensor.zd,
    # A tensor matters more whose input is unlike the previous block's.
    "CosSim": lambda tensor: None if tensor.cossim is None else -tensor.cossim,
}


def band_of(rung: str) -> tuple[str, ...]:
    """The presets whose types are priced together with those of a rung; a preset that is seldom made is alone.

    Example:
        >>> band_of("Q3_K_M")
        ('IQ3_S', 'IQ3_M', 'Q3_K_S', 'Q3_K_M', 'Q3_K_L')
        >>> band_of("Q4_0")
        ('Q4_0',)
    """
    return next((band for band in BANDS if rung in band), (rung,))


def band_name(band: Sequence[str]) -> str:
    """What a band is called: by its first and last preset.

    Example:
        >>> band_name(band_of("Q3_K_M")), band_name(band_of("Q4_0"))
        ('IQ3_S-Q3_K_L', 'Q4_0')
    """
    return "-".join(dict.fromkeys((band[0], band[-1])))


def price_band(planner: Planner, band: Sequence[str]) -> TypePrices:
    """Prices every type that a rung of a band (names of presets) may need."""
    presets = [planner.subject.preset(rung) for rung in band]
    bpw = [8 * preset.bytes / planner.subject.weights() for preset in presets]
    prices = planner.price(planner.window(*bpw), *presets)
    return prices.model_copy(update={"rungs": list(band)})


def plan_rung(planner: Planner, rung: str, mode: RungMode, prices: TypePrices) -> dict[str, Any]:
    """Plans a rung.

    Parameters:
        planner: the model, text and options.
        rung: name of the preset that the rung replaces.
        mode: "quality" for the least KLD in the preset's bytes, "size" for the fewest bytes at its KLD.
        prices: prices of types, as of `price_band`.

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
    room = dataclasses.replace(preset, bytes=preset.bytes if target.max_bytes is None else target.max_bytes)
    others = rivals(subject, room, prices, planner.build, options) if options.simpler else {}
    if (smaller := fitted(planner.build(prices.predicted()), room)) is not None:
        others[f"preset {rung}, fitted"] = smaller
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


def rivals(
    subject: Subject, preset: Preset, prices: TypePrices, build: Callable[[Prices], Problem], options: RivalOptions
) -> dict[str, dict[str, str]]:
    """Recipes in at most the preset's bytes: the preset moved by statistics, and simpler allocations.

    Parameters:
        subject: the model.
        preset: the preset.
        prices: prices of types.
        build: makes a problem of prices.
        options: how far the preset is moved.

    Returns:
        Name → tensor → type.
    """
    problem = build(prices.predicted())
    recipes: dict[str, dict[str, str] | None] = {}
    if subject.imatrix is not None:
        for name, types in moved_presets(problem, preset, subject.imatrix, subject.places, options).items():
            recipes[f"preset moved by {name}"] = types
    recipes["weighted error"] = weighted_error(prices, build, Target("", max_bytes=preset.bytes))
    recipes["greedy"] = greedy(problem, preset.bytes).types
    return {name: types for name, types in recipes.items() if types is not None}


def fitted(problem: Problem, preset: Preset) -> dict[str, str] | None:
    """A preset's own recipe in bytes that are fewer than its file's: the cheapest steps down until it fits.

    Without it no recipe as good as the preset may compete where the file needs room for more metadata.

    Parameters:
        problem: menus with prices, and the bytes of each type.
        preset: the preset, with the bytes that the recipe may have.

    Returns:
        Tensor → type; None if the preset fits as it is, cannot be made to, or has a type that is on no menu.
    """
    types = {name: preset.types[name] for name in problem.options}
    menus = {name: {option.type: option for option in menu} for name, menu in problem.options.items()}
    if any(kind not in menus[name] for name, kind in types.items()) or _size(problem, types) <= preset.bytes:
        return None
    while _size(problem, types) > preset.bytes:
        steps = [
            (option.cost - menus[name][kind].cost, name, option.type)
            for name, kind in types.items()
            for option in menus[name].values()
            if option.nbytes < menus[name][kind].nbytes
        ]
        if not steps:
            return None
        _, name, kind = min(steps)
        types[name] = kind
    return types


def weighted_error(prices: TypePrices, build: Callable[[Prices], Problem], target: Target) -> dict[str, str]:
    """The exact solution for the importance-weighted squared error alone, as if that were the loss."""
    errors = {name: dict(tensor.error) for name, tensor in prices.tensors.items()}
    return target.solve(build(errors)).types


def moved_presets(
    problem: Problem, preset: Preset, imatrix: Imatrix, places: Places, options: RivalOptions
) -> dict[str, dict[str, str] | None]:
    """The preset moved by each statistic of the tensors' inputs.

    In each kind the quarter with the largest values goes a type up, the quarter with the smallest a type down. Where
    that is too large, fewer go up. A recipe is None if every kind has too few tensors for quarters.

    Parameters:
        problem: menus, and the bytes of each type.
        preset: where the recipes start from, and the most bytes they may have.
        imatrix: the importance matrix.
        places: tensor → (kind, layer).
        options: which share of tensors moves, and how far.
    """
    statistics = list(tensor_statistics(imatrix))
    recipes = {}
    for label, statistic in STATISTICS.items():
        values = {tensor.tensor: value for tensor in statistics if (value := statistic(tensor)) is not None}
        recipes[label] = _moved(problem, preset, values, places, options)
    return recipes


def _moved(
    problem: Problem, preset: Preset, values: Mapping[str, float], places: Places, options: RivalOptions
) -> dict[str, str] | None:
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for name in problem.options:
        if name in values and preset.types[name] in {option.type for option in problem.options[name]}:
            by_kind[places[name][0]].append(name)
    types, raised = {name: preset.types[name] for name in problem.options}, []
    for names in by_kind.values():
        ranked = sorted(names, key=lambda name: values[name])
        count = len(ranked) // options.moved_share
        for name in ranked[:count]:
            types[name] = _neighbour(problem, name, preset.types[name], -options.moved_bpw)
        raised += [(rank, name) for rank, name in enumerate(reversed(ranked[len(ranked) - count :]))]
    if not raised:
        return None
    for _, name in sorted(raised):
        higher = types | {name: _neighbour(problem, name, preset.types[name], options.moved_bpw)}
        if _size(problem, higher) <= preset.bytes:
            types = higher
    return types


def _neighbour(problem: Problem, name: str, kind: str, bpw: float) -> str:
    """The nearest type of a menu that is at least `bpw` bits per weight larger (or, if negative, smaller)."""
    gaps = {option.type: _bpw(option.type) - _bpw(kind) for option in problem.options[name]}
    menu = [type_name for type_name, gap in gaps.items() if (gap >= bpw if bpw > 0 else gap <= bpw)]
    return min(menu, key=lambda type_name: (abs(gaps[type_name]), type_name)) if menu else kind


def _bpw(kind: str) -> float:
    return type_by_name(kind).bpw


def _size(problem: Problem, types: Mapping[str, str]) -> int:
    menus = {name: {option.type: option.nbytes for option in menu} for name, menu in problem.options.items()}
    return problem.fixed_bytes + sum(menus[name][kind] for name, kind in types.items())
