"""How many tokens reached each expert of a mixture, and how much text would reach all of them.

What a router sends to an expert differs between experts by powers of ten. Shares of tokens are taken to be lognormal
over the experts of a layer, so that the experts that tokens reached tell how rare the others may be.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix
from bitladder.calibrate.inputs import Experts, Floats, WeightInput
from bitladder.calibrate.statistics.gaps import expert_lines, first_lines
from bitladder.engine import Multiplication

Counts = npt.NDArray[np.int64]


class ExpertCounter:
    """An observer that counts the tokens of each expert.

    Parameters:
        inputs: inputs of the model's weights. Only those of experts are watched, once in a block.
    """

    def __init__(self, inputs: Sequence[WeightInput]) -> None:
        self.counts = {shared.leader: np.zeros(shared.matrices, np.int64) for shared in inputs if shared.experts}

    def wants(self, seen: Multiplication) -> bool:
        """Whether these are experts, not seen under another name."""
        return seen.weight in self.counts

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Counts the tokens."""
        assert experts is not None
        counts = self.counts[seen.weight]
        counts += np.bincount(experts.reshape(-1), minlength=len(counts))

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays that grow, by name."""
        return {f"experts {name}": counts for name, counts in self.counts.items()}


def covered(counts: Iterable[Counts], wanted: int) -> bool:
    """Whether each expert has as many tokens as are wanted."""
    return all(int(each.min()) >= wanted for each in counts)


def expert_counts(imatrix: Imatrix) -> dict[str, Counts]:
    """The tokens of each expert, int64 [experts], by the name of its weight."""
    return {name: entry.counts for name, entry in imatrix.entries.items() if len(entry.counts) > 1}


def tokens_needed(counts: Counts, tokens: int, wanted: int) -> float | None:
    """The tokens of text after which each expert of a weight has as many as are wanted, as estimated.

    The logarithms of the counts are laid against the quantiles of a normal distribution. The line through them gives
    the counts of experts without a token, which are at most 1.

    Parameters:
        counts: tokens of each expert, int64 [experts].
        tokens: tokens of the text that was read.
        wanted: tokens that each expert should have.

    Returns:
        None if tokens reached fewer than three experts.

    Example:
        >>> tokens_needed(np.array([100, 50, 25]), 175, 100)
        700.0
    """
    ordered = np.sort(counts)
    reached = ordered > 0
    if reached.sum() < min(3, len(counts)) or not reached.any():
        return None
    fewest = float(ordered[0])
    if fewest == 0:
        # Blom's plotting positions.
        places = (np.arange(1, len(counts) + 1) - 0.375) / (len(counts) + 0.25)
        quantiles = np.array([NormalDist().inv_cdf(place) for place in places])
        slope, level = np.polyfit(quantiles[reached], np.log(ordered[reached]), 1)
        fewest = min(float(np.exp(level + slope * quantiles[0])), 1.0)
        return tokens * (1 + wanted / fewest)  # what was read tells nothing of when the next token comes
    return tokens * max(wanted / fewest, 1.0)


def coverage_warning(counts: Mapping[str, Counts], tokens: int, wanted: int | None) -> str | None:
    """A message that lists the experts without a token, or with fewer than wanted; None if there are none.

    Parameters:
        counts: tokens of each expert, int64 [experts], by weight.
        tokens: tokens of the text that was read.
        wanted: tokens that each expert should have, if somebody wants it.
    """
    least = wanted or 1
    short = {name: np.flatnonzero(each < least).tolist() for name, each in counts.items()}
    gaps = {name: (experts, len(counts[name])) for name, experts in short.items() if experts}
    if not gaps:
        return None
    lines = expert_lines(gaps, "never reached" if wanted is None else f"with fewer than {least} tokens")
    needs = [tokens_needed(counts[name], tokens, least) for name in gaps]
    return "; ".join(
        [
            "experts that no token reached count as the mean of the others of their layer",
            *first_lines(lines),
            "no estimate of the text that would reach them: too few experts were reached"
            if None in needs
            else f"an estimated {max(need for need in needs if need is not None):,.0f} tokens of such text would "
            f"reach them ({tokens:,} were read)",
        ]
    )
