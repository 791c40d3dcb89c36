"""One figure of every tensor as layers × kinds, and the colours it is drawn in."""

import dataclasses
import math
from collections.abc import Iterable

from bitladder.calibrate.statistics.compare_imatrices import TensorDifference
from bitladder.calibrate.statistics.figures import TensorStatistics
from bitladder.calibrate.statistics.groups import weighted_mean
from bitladder.errors import BitladderError
from bitladder.show.imatrix.tables import Column

Colour = tuple[int, int, int]
# Dark to light, told apart in grey and by the colour-blind (the anchors of matplotlib's viridis and RdBu).
_RISING: list[Colour] = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
_SIGNED: list[Colour] = [(33, 102, 172), (247, 247, 247), (178, 24, 43)]


@dataclasses.dataclass(frozen=True)
class Grid:
    """`values` [layers][kinds], None where there is none; the layer None is what lies outside of blocks."""

    column: Column
    layers: list[int | None]
    kinds: list[str]
    values: list[list[float | None]]

    def span(self) -> tuple[float, float]:
        """The least and the largest finite value (of a logarithmic scale: above 0); around 0 if signed."""
        found = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        if self.column.scale == "signed":
            most = max(map(abs, found), default=0.0)
            return -most, most
        if self.column.scale == "log":
            found = [v for v in found if v > 0]
        return min(found, default=0.0), max(found, default=0.0)

    def place(self, value: float) -> float:
        """Where a value lies on the scale: 0 to 1."""
        least, most = self.span()
        value = min(max(value, least), most)
        if self.column.scale == "log" and least > 0:
            value, least, most = math.log(value), math.log(least), math.log(most)
        return (value - least) / (most - least) if most > least else 0.5

    def colour(self, value: float) -> Colour:
        """The red, green and blue (0–255) of a value."""
        anchors = _SIGNED if self.column.scale == "signed" else _RISING
        position = self.place(value) * (len(anchors) - 1)
        index = min(int(position), len(anchors) - 2)
        one, two, share = anchors[index], anchors[index + 1], position - index
        red, green, blue = (round(x + share * (y - x)) for x, y in zip(one, two, strict=True))
        return red, green, blue

    def short(self, value: float | None) -> str:
        """The value in three digits."""
        if value is None or not math.isfinite(value):
            return self.column.cell(value)
        shown = value * 100 if self.column.percent else value
        whole = 1000 <= abs(shown) < 1e6
        return f"{shown:.0f}" if whole else f"{shown:.3g}"

    def title(self) -> str:
        """What is shown, with its unit."""
        unit = ", in %" if self.column.percent and "%" not in self.column.heading else ""
        return f"{self.column.heading}{unit} by layer and kind"

    def legend(self) -> str:
        """The ends of the scale."""
        least, most = self.span()
        scale = " (logarithmic)" if self.column.scale == "log" else ""
        return f"from {self.column.cell(least)} to {self.column.cell(most)}{scale}"


def make_grid(rows: Iterable[TensorStatistics | TensorDifference], column: Column) -> Grid:
    """Lay one column of tensor rows out as layers × kinds; tensors that share a place are averaged, weighted by N.

    Raises BitladderError if no tensor has a value.
    """
    places: dict[tuple[int | None, str], list[tuple[int, float | None]]] = {}
    for row in rows:
        places.setdefault((row.layer, row.kind or ""), []).append((row.n, getattr(row, column.name)))
    if all(value is None for found in places.values() for _, value in found):
        raise BitladderError(f"no tensor has a {column.heading}: there is nothing to draw")
    layers = sorted({layer for layer, _ in places}, key=lambda layer: (layer is None, layer))
    kinds = sorted({kind for _, kind in places})
    values = [[weighted_mean(places.get((layer, kind), [])) for kind in kinds] for layer in layers]
    return Grid(column, layers, kinds, values)


def on_top(colour: Colour) -> Colour:
    """Black or white, whichever is read better on a colour (its luma by Rec. 601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
