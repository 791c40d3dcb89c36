"""Figures as a person reads them: an error with two significant digits, the value to the same decimal place."""

import decimal
import math

from bitladder.evaluate import Figure

# A smaller value is written with a power of ten, because a plain decimal has too many zeros.
SMALLEST_PLAIN = 1e-3


def with_error(figure: Figure, scale: float = 1.0) -> str:
    """A figure with its error as text. Both are multiplied by `scale` (100 for percent).

    Example:
        >>> with_error(Figure(value=12.3456, error=0.0723))
        '12.346 ± 0.072'
    """
    value, error = figure.value * scale, figure.error * scale
    if not math.isfinite(value):
        return str(value)
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    # Rounding can add a digit (0.0996 → 0.10), so the decimal place is that of the rounded error.
    rounded = decimal.Decimal(f"{error:.1e}")
    exponent = rounded.adjusted() - 1
    if 0 < abs(value) < SMALLEST_PLAIN:
        digits = max(0, _magnitude(value) - exponent)
        return f"{value:.{digits}e} ± {error:.1e}"
    places = max(0, -exponent)
    return f"{value:.{places}f} ± {error:.{places}f}"


def percent(share: float, *, least: int = 2, most: int = 5) -> str:
    """A share of 1 in percent, with `least` to `most` decimals, so that its distance from 100 % has two digits.

    Example:
        >>> percent(0.99876)
        '99.88 %'
    """
    distance = abs(1 - share) * 100
    places = least if distance == 0 else min(most, max(least, 1 - _magnitude(distance)))
    return f"{share * 100:.{places}f} %"


def gigabytes(size: int) -> str:
    """A file's size in GB of 10⁹ bytes, with three significant digits and at least two decimals."""
    value = size / 1e9
    return f"{value:.{max(2, 2 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit; 0 for a value of 0."""
    return math.floor(math.log10(abs(value))) if value else 0
