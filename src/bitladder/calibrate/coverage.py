"""How well an importance matrix covers a model: experts that no token or few reached, weights without an entry, zeros.

What a router sends to an expert differs between experts by powers of ten. Shares of tokens are taken to be lognormal
over the experts of a layer, so that the experts that tokens reached tell how rare the others may be, and how much text
would reach all.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry
from bitladder.calibrate.inputs import Experts, Floats, WeightInput
from bitladder.engine import Multiplication
from bitladder.errors import BitladderError
from bitladder.gguf import TensorInfo, imatrix_order, imatrix_place, open_model, ranges
from bitladder.units import number_of

MOST_LINES = 8  # of experts, in a message or a card
_WHY = {
    "token_embd": "looked up, not multiplied: it never has one",
    "output": "collected only with imatrix --process-output",
}
Counts = npt.NDArray[np.int64]


@dataclasses.dataclass
class Gaps:
    """What an imatrix lacks, by weight, in the order of blocks.

    Parameters:
        unreached: experts without a token, and the number of all experts.
        perhaps_unreached: the same, guessed from a .dat file, which has no counts of experts and gives those without a
            token a mean of exactly 1. It is empty without a model, which has the number of experts.
        no_data: entries without a single token.
        not_finite: how many values are NaN or infinite.
        negative: how many values are negative, which no sum of squares is.
        zero_columns: how many columns of the other matrices that tokens reached are 0.
        zero: matrices whose values are all 0 although tokens reached them, and the number of all matrices.
        without_entry: weights of the model with at least two dimensions but no entry; None without a model.
        not_in_model: entries without a weight in the model; None without a model.
    """

    unreached: dict[str, tuple[list[int], int]]
    perhaps_unreached: dict[str, tuple[list[int], int]]
    no_data: list[str]
    not_finite: dict[str, int]
    negative: dict[str, int]
    zero: dict[str, tuple[list[int], int]]
    zero_columns: dict[str, int]
    without_entry: list[str] | None = None
    not_in_model: list[str] | None = None

    def of_kinds(self, kinds: Collection[str]) -> "Gaps":
        """Only the gaps of weights of these kinds; all gaps if no kind is named."""

        def keep(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: what for name, what in value.items() if imatrix_place(name)[1] in kinds}
            return None if value is None else [name for name in value if imatrix_place(name)[1] in kinds]

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Gaps(**{name: keep(value) for name, value in fields.items()}) if kinds else self

    def to_json(self) -> dict[str, Any]:
        """As JSON: experts as {"count", "of", "experts"}, the rest as it is."""
        document = dataclasses.asdict(self)
        for field in ("unreached", "perhaps_unreached", "zero"):
            document[field] = {
                name: {"count": len(experts), "of": of, "experts": experts}
                for name, (experts, of) in getattr(self, field).items()
            }
        return document

    def lines(self) -> list[str]:
        """The gaps as lines for a person. Weights with the same gap share a line."""
        lines = expert_lines(self.unreached, "never reached")
        lines += expert_lines(self.perhaps_unreached, "perhaps never reached (all their means are exactly 1)")
        for name, count in self.not_finite.items():
            lines.append(f"{name}: {number_of(count, 'value')} not finite; compute it again")
        for name, count in self.negative.items():
            lines.append(f"{name}: {number_of(count, 'value')} negative, which no sum of squares is; compute it again")
        alike = [name for name, (_, of) in self.zero.items() if of == 1]
        if alike:
            lines.append(f"all 0 although tokens reached them, so that columns count alike: {listed(alike)}")
        experts = {name: what for name, what in self.zero.items() if what[1] > 1}
        lines += expert_lines(experts, "reached, but with inputs of 0")
        if self.zero_columns:
            columns = [f"{name} {count}" for name, count in self.zero_columns.items()]
            more = f", and {len(columns) - 8} more" if len(columns) > 8 else ""
            lines.append(f"columns that are 0 on this text, and cost nothing there: {', '.join(columns[:8])}{more}")
        if self.no_data:
            lines.append("entries without a single token: " + listed(self.no_data))
        if self.without_entry:
            weights = number_of(len(self.without_entry), "weight")
            lines.append(f"{weights} of the model without an entry: {listed(self.without_entry)}")
        if self.not_in_model:
            lines.append(f"entries that the model has no weight for: {listed(self.not_in_model)}")
        return lines


def find_gaps(imatrix: Imatrix, model: str | os.PathLike[str] | None = None) -> Gaps:
    """All gaps of an imatrix.

    Parameters:
        imatrix: the matrix.
        model: path of the model's GGUF, whose header says which weights there are; or None.

    Raises:
        BitladderError: the file is not a model, or its weights have other widths than the entries.
    """
    names = sorted(imatrix.entries, key=imatrix_order)
    entries = {name: imatrix.entries[name] for name in names}
    unreached = {name: np.flatnonzero(entry.counts <= 0).tolist() for name, entry in entries.items()}
    bad = {name: int((~np.isfinite(entry.sums)).sum()) for name, entry in entries.items()}
    empty = [name for name in names if len(unreached[name]) == len(entries[name].counts)]
    gaps = Gaps(
        unreached={n: (who, len(entries[n].counts)) for n, who in unreached.items() if who and n not in empty},
        perhaps_unreached={},
        no_data=empty,
        not_finite={name: count for name, count in bad.items() if count},
        negative={name: count for name, entry in entries.items() if (count := int((entry.sums < 0).sum()))},
        zero_columns={name: count for name, entry in entries.items() if (count := _zero_columns(entry))},
        zero={name: (zero, len(entry.counts)) for name, entry in entries.items() if (zero := entry.zero())},
    )
    if model is None:
        return gaps
    weights = _weights(pathlib.Path(model))
    gaps.without_entry = sorted((n for n, t in weights.items() if t.rows > 1 and n not in entries), key=imatrix_order)
    gaps.not_in_model = [name for name in names if name not in weights]
    for name in names:
        if name not in weights:
            continue
        columns, experts = _columns(weights[name])
        if entries[name].sums.size != columns:
            raise BitladderError(
                f"{name} has {number_of(entries[name].sums.size, 'column')} in the imatrix but {columns:,} in {model}: "
                "the imatrix is of another model"
            )
        if imatrix.legacy and experts > 1:
            means = entries[name].means().reshape(experts, -1)
            if guessed := np.flatnonzero((means == 1).all(axis=1)).tolist():
                gaps.perhaps_unreached[name] = guessed, experts
    if len(gaps.not_in_model) == len(names):
        raise BitladderError(f"{model} has none of the weights of the imatrix, such as {names[0]}: it is another model")
    return gaps


def _zero_columns(entry: ImatrixEntry) -> int:
    sums = entry.sums.reshape(len(entry.counts), -1)
    counted = (entry.counts > 0) & sums.any(axis=1)
    return int((sums[counted] == 0).sum())


def _weights(path: pathlib.Path) -> dict[str, TensorInfo]:
    with open_model(path) as file:
        return dict(file.tensors)


def _columns(tensor: TensorInfo) -> tuple[int, int]:
    """Columns over all matrices of a weight, and the number of matrices."""
    experts = tensor.rows // tensor.rows_per_matrix
    return tensor.width * experts, experts


def expert_lines(gaps: Mapping[str, tuple[list[int], int]], what: str) -> list[str]:
    """Experts by weight, and the number of all experts, as lines for a person. Weights of a block share a line."""
    shared: dict[tuple[int | None, str, int, int], list[str]] = {}
    for name, (experts, of) in gaps.items():
        layer, kind = imatrix_place(name)
        shared.setdefault((layer, ranges(experts), len(experts), of), []).append(kind)
    return [
        f"{'' if layer is None else f'block {layer}: '}{count} of {number_of(of, 'expert')} {what} in "
        f"{', '.join(kinds)}: {experts}"
        for (layer, experts, count, of), kinds in shared.items()
    ]


def first_lines(lines: list[str]) -> list[str]:
    """The first lines of a list of experts, and how many more there are."""
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"and {number_of(more, 'more line')} (bitladder stats)"]


def listed(names: list[str]) -> str:
    """Names, with those of one kind together: "attn_q of blocks 0-3, output.weight (why)"."""
    blocks: dict[str, list[int]] = {}
    others = []
    for name in names:
        layer, kind = imatrix_place(name)
        if layer is None:
            others.append(f"{name} ({_WHY[kind]})" if kind in _WHY else name)
        else:
            blocks.setdefault(kind, []).append(layer)
    return "; ".join(
        [
            f"{kind} of {'block' if len(layers) == 1 else 'blocks'} {ranges(sorted(layers))}"
            for kind, layers in blocks.items()
        ]
        + others
    )


class _ChosenExperts:
    """An observer that keeps how often each expert was chosen."""

    def __init__(self, wanted: Mapping[str, Counts]) -> None:
        self._wanted = wanted
        self._parts: list[tuple[str, Counts]] = []

    def wants(self, seen: Multiplication) -> bool:
        """Whether these are experts, not seen under another name."""
        return seen.weight in self._wanted

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Counts the tokens."""
        assert experts is not None
        self._parts.append((seen.weight, np.bincount(experts.reshape(-1), minlength=len(self._wanted[seen.weight]))))

    def take(self) -> list[tuple[str, Counts]]:
        """What was kept since the last call."""
        parts, self._parts = self._parts, []
        return parts


class ExpertCounts:
    """The tokens of each expert.

    Parameters:
        inputs: inputs of the model's weights. Only those of experts are watched, once in a block.
    """

    label = "experts"

    def __init__(self, inputs: Sequence[WeightInput]) -> None:
        self.counts = {shared.leader: np.zeros(shared.matrices, np.int64) for shared in inputs if shared.experts}

    def observer(self) -> _ChosenExperts:
        """An observer whose counts can be added."""
        return _ChosenExperts(self.counts)

    def add(self, parts: Sequence[tuple[str, Counts]]) -> None:
        """Adds what an observer kept."""
        for name, counts in parts:
            self.counts[name] += counts

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
    lines = expert_lines(gaps, "never reached" if wanted is None else f"with fewer than {number_of(least, 'token')}")
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
