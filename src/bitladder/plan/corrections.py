"""Prices corrected by measurements of whole recipes.

Near the recipes that were measured, the KLD is modelled as Σ_t m[t, T]·price[t, T] with

    m[t, T] = 1 + a + b[kind] + c[kind, T] + d[kind, third of the layers].

Each term is small beforehand: a ridge regression, in which a term without evidence stays 0, and a type that was never
measured shares what is known of its kind and of all tensors. The regression is on differences between recipes on the
same tokens. So neither the noise of the text nor the KLD that no price explains (interactions) disturbs it. The level
goes into an offset.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.plan.options import CorrectionOptions
from bitladder.plan.subject import Prices
from bitladder.trial import MeasuredRecipe

Doubles = npt.NDArray[np.float64]
Places = Mapping[str, tuple[str, int | None]]  # tensor → (kind, layer)


@dataclasses.dataclass(frozen=True)
class Correction:
    """Factors of prices: tensor → type → m; and the KLD of the reference that corrected prices do not explain."""

    factors: dict[str, dict[str, float]]
    offset: float

    def apply(self, prices: Prices) -> dict[str, dict[str, float]]:
        """The corrected prices.

        Example:
            >>> Correction({"a": {"q4_K": 2.0}}, 0.0).apply({"a": {"q4_K": 0.5}})
            {'a': {'q4_K': 1.0}}
        """
        return {
            name: {kind: cost * self.factors[name][kind] for kind, cost in menu.items()}
            for name, menu in prices.items()
        }


def correct(
    prices: Prices,
    places: Places,
    measured: Sequence[MeasuredRecipe],
    reference: MeasuredRecipe,
    options: CorrectionOptions,
) -> Correction:
    """Fits the factors to measured recipes.

    Parameters:
        prices: tensor → type → nats per token.
        places: tensor → (kind, layer).
        measured: recipes, measured on the same text.
        reference: the recipe near which the factors should be right.
        options: spreads of the terms, and noise.
    """
    terms = _Terms(prices, places, options)
    origin = terms.row(reference.types)
    rows, values, noise = [], [], []
    for recipe in measured:
        if recipe.types == reference.types:
            continue
        count = min(len(recipe.chunks), len(reference.chunks))
        gaps = np.array(recipe.chunks[:count]) - np.array(reference.chunks[:count])
        row = terms.row(recipe.types) - origin
        gap = float(gaps.mean())
        spread = float(gaps.std() / np.sqrt(max(count - 1, 1))) if count > 1 else 0.3 * abs(gap)
        rows.append(row)
        values.append(gap - row.sum())
        # Far from the reference the model is less reliable.
        noise.append(np.sqrt(spread**2 + (options.misfit * gap) ** 2 + (options.level_noise * reference.kld) ** 2))
    if rows:
        design = np.array([terms.features(row) for row in rows]) / np.array(noise)[:, None]
        target = np.array(values) / np.array(noise)
        solution = np.linalg.solve(design.T @ design + np.diag(1 / terms.spread**2), design.T @ target)
    else:
        solution = np.zeros(len(terms.spread))
    factors = terms.factors(solution)
    level = sum(
        prices[name][kind] * factors[name][kind] for name, kind in reference.types.items() if kind in prices[name]
    )
    return Correction(factors, reference.kld - level)


class _Terms:
    """The terms a, b, c, d as columns. The finest grouping of prices is a cell: (kind, type, third of the layers)."""

    def __init__(self, prices: Prices, places: Places, options: CorrectionOptions) -> None:
        self._prices, self._least = prices, options.least_factor
        layers = [layer for _, layer in places.values() if layer is not None]
        count = max(layers, default=0) + 1
        self._place = {
            name: (kind, -1 if layer is None else 3 * layer // count) for name, (kind, layer) in places.items()
        }
        cells = sorted(
            {
                (kind, type_name, third)
                for name, (kind, third) in self._place.items()
                for type_name in prices.get(name, {})
            }
        )
        self._cell = {cell: index for index, cell in enumerate(cells)}
        columns: dict[tuple[str, ...], float] = {}
        members: list[list[tuple[str, ...]]] = []
        for kind, type_name, third in cells:
            spreads = {
                ("all",): options.spread_all,
                ("kind", kind): options.spread_kind,
                ("type", kind, type_name): options.spread_type,
                ("third", kind, str(third)): options.spread_third,
            }
            columns |= spreads
            members.append(list(spreads))
        number = {column: index for index, column in enumerate(columns)}
        self.spread = np.array(list(columns.values()))
        self._map = np.zeros((len(cells), len(columns)))
        for index, names in enumerate(members):
            self._map[index, [number[name] for name in names]] = 1.0

    def row(self, types: Mapping[str, str]) -> Doubles:
        """A recipe's price in each cell, shape [cells]."""
        sums = np.zeros(len(self._cell))
        for name, type_name in types.items():
            if type_name in self._prices.get(name, {}):
                kind, third = self._place[name]
                sums[self._cell[kind, type_name, third]] += self._prices[name][type_name]
        return sums

    def features(self, row: Doubles) -> Doubles:
        """How a row of cells depends on the terms, shape [terms]."""
        return np.asarray(row @ self._map)

    def factors(self, solution: Doubles) -> dict[str, dict[str, float]]:
        """m for every tensor and type."""
        by_cell = np.maximum(1 + self._map @ solution, self._least)
        factors: dict[str, dict[str, float]] = {}
        for name, menu in self._prices.items():
            kind, third = self._place[name]
            factors[name] = {type_name: float(by_cell[self._cell[kind, type_name, third]]) for type_name in menu}
        return factors
