"""Prices against measured swaps that they were not fitted to."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.plan.options import PriceOptions
from bitladder.plan.prices.document import PriceCheck
from bitladder.progress import SILENT, Progress
from bitladder.trial import Measurements


def check_swaps(
    kld: Mapping[str, Mapping[str, float]],
    used: Mapping[str, str],
    measurements: Measurements,
    options: PriceOptions,
    progress: Progress = SILENT,
) -> PriceCheck | None:
    """Measures single swaps that no price was fitted to.

    Parameters:
        kld: tensor → type → price, nats per token.
        used: tensor → the type at which it was measured alone.
        measurements: what measures.
        options: how many swaps, and on how much text.
        progress: where the swaps are shown.

    Returns:
        The comparison; None for fewer than three swaps.
    """
    pairs = held_out({name: list(menu) for name, menu in kld.items()}, used, options.check_pairs, options.check_seed)
    if len(pairs) < 3:
        return None
    measured = []
    with progress.task("check single swaps", len(pairs)) as task:
        for name, kind in pairs.items():
            task.note(f"{name} {kind}")
            measured.append(measurements.measure({name: kind}, options.probe_chunks, "check").kld)
            task.advance()
    predicted = [kld[name][kind] for name, kind in pairs.items()]
    ratios = np.array(measured) / np.maximum(predicted, 1e-12)
    return PriceCheck(
        pairs=len(pairs),
        rank_correlation=rank_correlation(measured, predicted),
        median_ratio=float(np.median(ratios)),
    )


def held_out(menus: Mapping[str, Sequence[str]], used: Mapping[str, str], count: int, seed: int) -> dict[str, str]:
    """Draws `count` pairs tensor → type, none of which is in `used`."""
    draw = random.Random(seed)
    names = [name for name in sorted(menus) if any(kind != used.get(name) for kind in menus[name])]
    chosen = draw.sample(names, min(count, len(names)))
    return {name: draw.choice([kind for kind in menus[name] if kind != used.get(name)]) for name in chosen}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's ρ: Pearson's correlation of the ranks (equal values share a rank); 0 if either is constant.

    Example:
        >>> round(rank_correlation([1, 2, 3], [10, 30, 20]), 3)
        0.5
    """
    ranks = [_ranks(np.asarray(one, np.float64)) for one in (a, b)]
    if any(one.std() == 0 for one in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)
