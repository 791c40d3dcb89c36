"""Figures as a person reads them: an error to two significant digits, a value to the same place."""

import decimal
import math

import pydantic

# Below this a plain decimal is mostly zeros, and hard to read.
SMALLEST_PLAIN = 1e-3


class Figure(pydantic.BaseModel):
    """A measured figure with its standard error, in the unit of the value."""

    value: float
    error: float


def with_error(figure: Figure, scale: float = 1.0) -> str:
    """Such as "12.346 ± 0.072": both times `scale` (100 for percent), the error to two significant digits."""
    value, error = figure.value * scale, figure.error * scale
    if not math.isfinite(value):
        return str(value)
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    # Rounding may carry into another digit (0.0996 → 0.10), so the place is taken from the rounded error.
    rounded = decimal.Decimal(f"{error:.1e}")
    exponent = rounded.adjusted() - 1
    if 0 < abs(value) < SMALLEST_PLAIN:
        digits = max(0, _magnitude(value) - exponent)
        return f"{value:.{digits}e} ± {error:.1e}"
    places = max(0, -exponent)
    return f"{value:.{places}f} ± {error:.{places}f}"


def percent(share: float, *, least: int = 2, most: int = 5) -> str:
    """A share of 1 in percent, with enough digits that its distance from 100 % has two."""
    distance = abs(1 - share) * 100
    places = least if distance == 0 else min(most, max(least, 1 - _magnitude(distance)))
    return f"{share * 100:.{places}f} %"


def gigabytes(size: int) -> str:
    """A file's size in GB of 10⁹ bytes, three significant digits and at least two decimals."""
    value = size / 1e9
    return f"{value:.{max(2, 2 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit; 0 for zero."""
    return math.floor(math.log10(abs(value))) if value else 0
