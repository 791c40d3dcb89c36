"""The columns of each table: names, headings as llama-imatrix prints them, and how a person reads a value."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bitladder.errors import UsageError

DASH = "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """`name` in JSON and CSV, `heading` for people.

    `digits` after the point, None for text and whole numbers; `percent` shows a fraction times 100. `scale` is how
    colours follow values: "log" for what spans powers of ten, "linear", or "signed" around 0.
    """

    name: str
    heading: str
    digits: int | None = None
    percent: bool = False
    scale: str = "linear"
    also: tuple[str, ...] = ()

    @property
    def numeric(self) -> bool:
        """Whether it is a figure, which can be drawn, and not a name."""
        return self.digits is not None or self.name == "n"

    def cell(self, value: Any) -> str:
        """The value as text; a dash for None."""
        if value is None:
            return DASH
        if self.digits is None:
            return str(value)
        if math.isinf(value):
            return "∞"
        shown = value * 100 if self.percent else value
        sign = "+" if self.scale == "signed" else ""
        # What the digits would round to 0 keeps two of its own.
        small = 0 < abs(shown) < 0.5 * 10**-self.digits
        text = f"{shown:{sign}.1e}" if small else f"{shown:{sign}.{self.digits}f}"
        return text + ("%" if self.percent else "")


_LAYER, _KIND, _N = Column("layer", "Layer"), Column("kind", "Tensor"), Column("n", "N")
_COSSIM = Column("cossim", "CosSim", 4)

TENSOR = (
    _LAYER,
    _KIND,
    Column("sum", "Σ(Act²)", 2, scale="log", also=("Σ",)),
    Column("min", "Min", 4, scale="log"),
    Column("max", "Max", 4, scale="log"),
    Column("mean", "μ", 4, scale="log"),
    Column("std", "σ", 4, scale="log"),
    Column("active", "% Active", 2, percent=True),
    _N,
    Column("entropy", "Entropy", 4),
    Column("entropy_norm", "E (norm)", 2, percent=True, also=("E(norm)",)),
    Column("zd", "ZD", 2, percent=True),
    _COSSIM,
)
_GROUP = (
    Column("tensors", "Tensors"),
    Column("sum", "μΣ(Act²)", 2, scale="log"),
    Column("active", "μ% Active", 2, percent=True),
    _N,
    Column("entropy_norm", "μE (norm)", 2, percent=True, also=("μE(norm)",)),
    Column("zd", "μZD", 4, percent=True),
    Column("cossim", "μCosSim", 4),
)
LAYER, KIND = (_LAYER, *_GROUP), (_KIND, *_GROUP)
_DIFFERENCE = (
    _N,
    Column("sum_a", "Σ(Act²) A", 2, scale="log"),
    Column("sum_b", "Σ(Act²) B", 2, scale="log"),
    Column("change", "Change", 2, percent=True, scale="signed"),
    Column("cosine", "Cosine", 6),
)
DIFFERENCE = {
    "tensor": (_LAYER, _KIND, *_DIFFERENCE),
    "layer": (_LAYER, _GROUP[0], *_DIFFERENCE),
    "kind": (_KIND, _GROUP[0], *_DIFFERENCE),
}
STATISTICS = {"tensor": TENSOR, "layer": LAYER, "kind": KIND}


def find_column(columns: Sequence[Column], wanted: str, *, numeric: bool = False) -> Column:
    """The column of that name or heading, in any case. Raises UsageError that lists them."""
    offered = [column for column in columns if column.numeric or not numeric]
    for fold in (str, str.casefold):
        for column in offered:
            if fold(wanted) in [fold(name) for name in (column.name, column.heading, *column.also)]:
                return column
    raise UsageError(f"no such column: {wanted!r}; there are {', '.join(column.name for column in offered)}")
