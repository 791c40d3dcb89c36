"""A problem's constraints as limits on sums over the chosen items."""

import dataclasses
import math

from bitladder.plan.allocate.choices import Choices, Index, Values
from bitladder.plan.allocate.problem import Problem

# Limits on floating-point sums hold to this fraction: a limit that is itself such a sum must allow what it came from.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Limit:
    """The chosen items' `values` [items] must sum to at most `most`: exactly if they are integers."""

    values: Values
    most: float

    def holds(self, chosen: Index) -> bool:
        """Whether one item per group keeps the limit."""
        return self.room(self.values[chosen]) >= 0

    def room(self, values: Values) -> float:
        """What `values`, one per group, leave of the limit; an int, exact, if sums are."""
        return int(self.most) - int(values.sum()) if self.integral else self.slackened - math.fsum(values)

    @property
    def integral(self) -> bool:
        """Whether sums are exact."""
        return self.values.dtype.kind == "i"

    @property
    def slackened(self) -> float:
        """`most`, and a little more for rounding."""
        return self.most + TOLERANCE * abs(self.most)


def total(values: Values, chosen: Index) -> float:
    """The sum over chosen items: an int, exact, of integers; the correctly rounded sum of floats."""
    return int(values[chosen].sum()) if values.dtype.kind == "i" else math.fsum(values[chosen])


def size_limits(problem: Problem, choices: Choices, max_bytes: int | None) -> list[Limit]:
    """The limit on the file, if there is one, and then the others."""
    size = [] if max_bytes is None else [Limit(choices.nbytes, max_bytes - problem.fixed_bytes)]
    return size + side_limits(problem, choices)


def side_limits(problem: Problem, choices: Choices) -> list[Limit]:
    """The limits on parts of the file and on time."""
    time = [] if problem.max_seconds is None else [Limit(choices.seconds, problem.max_seconds)]
    return cap_limits(problem, choices) + time


def cap_limits(problem: Problem, choices: Choices) -> list[Limit]:
    """The limits on parts of the file."""
    return [Limit(row, cap.max_bytes) for row, cap in zip(choices.caps, problem.caps, strict=True)]
