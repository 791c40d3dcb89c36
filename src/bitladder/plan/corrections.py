"""Prices corrected by what whole recipes measured.

Near the recipes that were measured, the KLD is taken as Σ_t m[t, T]·price[t, T] with

    m[t, T] = 1 + a + b[kind] + c[kind, T] + d[kind, third of the layers],

each term small at first: a ridge regression, in which a term that nothing speaks for stays 0 and a type that was never
measured shares what was learnt of its kind and of everything. What is regressed are differences between recipes on the
same tokens, so that neither the noise of the text nor the KLD that no price explains (interactions) spoils them; the
level goes into an offset.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.plan.priced_problem import Prices
from bitladder.trial.journal import Measurement

Doubles = npt.NDArray[np.float64]
Places = Mapping[str, tuple[str, int | None]]

# Standard deviations of the terms before anything is measured.
ALL, KIND, TYPE, THIRD = 0.5, 0.4, 0.3, 0.3
LEAST = 0.1  # a price is never lowered further than to this
MISFIT = 0.1  # of a difference: what the model cannot say


@dataclasses.dataclass(frozen=True)
class Correction:
    """`factors` tensor → type → m; `offset` nats that the corrected prices of the reference leave unexplained."""

    factors: dict[str, dict[str, float]]
    offset: float

    def apply(self, prices: Prices) -> dict[str, dict[str, float]]:
        """The corrected prices."""
        return {
            name: {kind: cost * self.factors[name][kind] for kind, cost in menu.items()}
            for name, menu in prices.items()
        }


def correct(prices: Prices, places: Places, measured: Sequence[Measurement], reference: Measurement) -> Correction:
    """Fit the factors to measured recipes. `reference` is the one near which they should be right."""
    terms = _Terms(prices, places)
    origin = terms.row(reference.types)
    rows, values, noise = [], [], []
    for one in measured:
        if one.types == reference.types:
            continue
        count = min(len(one.chunks), len(reference.chunks))
        gaps = np.array(one.chunks[:count]) - np.array(reference.chunks[:count])
        row = terms.row(one.types) - origin
        gap = float(gaps.mean())
        spread = float(gaps.std() / np.sqrt(max(count - 1, 1))) if count > 1 else 0.3 * abs(gap)
        rows.append(row)
        values.append(gap - row[: terms.groups].sum())
        # Far from the reference the sum is less to be trusted.
        noise.append(np.sqrt(spread**2 + (MISFIT * gap) ** 2 + (0.005 * reference.kld) ** 2))
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
    """The terms a, b, c, d as columns; `row` sums prices by (kind, type, third), the finest grouping."""

    def __init__(self, prices: Prices, places: Places) -> None:
        self._prices = prices
        layers = [layer for _, layer in places.values() if layer is not None]
        count = max(layers, default=0) + 1
        self._place = {
            name: (kind, -1 if layer is None else 3 * layer // count) for name, (kind, layer) in places.items()
        }
        cells = sorted(
            {(kind, one, third) for name, (kind, third) in self._place.items() for one in prices.get(name, {})}
        )
        self._cell = {cell: index for index, cell in enumerate(cells)}
        self.groups = len(cells)
        columns: dict[tuple[str, ...], float] = {("all",): ALL}
        member: list[list[tuple[str, ...]]] = []
        for kind, one, third in cells:
            mine = [("all",), ("kind", kind), ("type", kind, one), ("third", kind, str(third))]
            columns |= {("kind", kind): KIND, ("type", kind, one): TYPE, ("third", kind, str(third)): THIRD}
            member.append(mine)
        number = {column: index for index, column in enumerate(columns)}
        self.spread = np.array(list(columns.values()))
        self._map = np.zeros((len(cells), len(columns)))
        for index, mine in enumerate(member):
            self._map[index, [number[column] for column in mine]] = 1.0

    def row(self, types: Mapping[str, str]) -> Doubles:
        """A recipe's price in each cell, [cells]."""
        found = np.zeros(self.groups)
        for name, one in types.items():
            if one in self._prices.get(name, {}):
                kind, third = self._place[name]
                found[self._cell[kind, one, third]] += self._prices[name][one]
        return found

    def features(self, row: Doubles) -> Doubles:
        """How a row of cells depends on the terms, [terms]."""
        return np.asarray(row @ self._map)

    def factors(self, solution: Doubles) -> dict[str, dict[str, float]]:
        """m for every tensor and type."""
        by_cell = np.maximum(1 + self._map @ solution, LEAST)
        found: dict[str, dict[str, float]] = {}
        for name, menu in self._prices.items():
            kind, third = self._place[name]
            found[name] = {one: float(by_cell[self._cell[kind, one, third]]) for one in menu}
        return found
