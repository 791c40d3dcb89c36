"""Which file to take: the rungs worth their size, and a sentence on when, from what was measured and not from names."""

import dataclasses
import math
from collections.abc import Sequence

from bitladder.report.best import NOISE
from bitladder.report.numbers import Figure
from bitladder.report.rundir import Measured
from bitladder.report.scores import Scores

# Mean KLD up to which a sentence holds, nats per token. On the model of benchmarks/results the likeliest token is
# another one at 4, 12 and 20 % of places where the first three end.
LEVELS = (
    (0.003, "you want what can hardly be told from full precision"),
    (0.03, "quality comes first and memory allows it"),
    (0.1, "you want a balance of size and quality"),
    (0.3, "memory is short and some loss is acceptable"),
)
WORST = "nothing larger fits"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rung that is worth its size, and when to use it."""

    model: Measured
    when: str


def choices(rungs: Sequence[Measured]) -> list[Choice]:
    """The rungs whose size pays, smallest first, each with its sentence."""
    chosen = worth_their_size([(one.label, one.scores) for one in rungs])
    models = [one for one in sorted(rungs, key=lambda one: one.size) if one.label in chosen]
    return [Choice(one, _when(one.scores)) for one in models]


def worth_their_size(rungs: Sequence[tuple[str, Scores]]) -> list[str]:
    """The rungs whose divergence is lower than that of every smaller one, by more than noise, smallest first.

    The noise is taken as if the measurements were independent. They share their text, so this is on the careful side.
    """
    chosen: list[tuple[str, Figure]] = []
    for label, scores in by_size(rungs):
        if scores.kld is None:
            continue
        if not chosen or chosen[-1][1].value - scores.kld.value > NOISE * math.hypot(
            chosen[-1][1].error, scores.kld.error
        ):
            chosen.append((label, scores.kld))
    return [label for label, _ in chosen]


def by_size(rungs: Sequence[tuple[str, Scores]]) -> list[tuple[str, Scores]]:
    """Rungs from the smallest file to the largest."""
    return sorted(rungs, key=lambda rung: (rung[1].bytes, rung[0]))


def _when(scores: Scores) -> str:
    """When to take a file, and how often greedy decoding would take another token."""
    assert scores.kld is not None
    kld = scores.kld.value
    sentence = next((text for limit, text in LEVELS if kld <= limit), WORST)
    if scores.same_top_p is None:
        return sentence
    return f"{sentence} (the likeliest token is another one at {100 * (1 - scores.same_top_p.value):.2g} % of places)"
