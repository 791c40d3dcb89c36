"""Rounded blocks are tried on held-out text: what raises the measured divergence keeps the library's blocks.

A lower output error is no proof. At an attention sink, or on text unlike the calibration's, blocks with a lower
tr(ΔW H ΔWᵀ) can make a worse model. The guard tries the rounded blocks of one kind of tensor after the other in the
loaded full-precision model. All other tensors have the blocks that were kept so far. A kind harms if it raises KLD by
more than the standard error of the comparison: what raises it by less has the lower output error in its favour. A kind
that harms is tried in halves of its layers, down to single tensors.

A layer that harms can hide behind a kind that gains in all others. So blocks are then taken out again: those of groups
of neighbouring layers, of each layer in the groups that gain nothing clear, and of each tensor in layers that harm. If
a kind harmed, the moments are doubtful: every layer is examined, and the tensors of those that gain nothing clear, of
at least one.

Two sets of blocks are compared on the same tokens: on one chunk, then on twice as many, until the difference is clear,
or clearly too small to matter. Most are after one chunk.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.engine import Decoding, type_by_name
from bitladder.evaluate import Figure, HiddenBase, mean
from bitladder.files import Closing
from bitladder.gguf import block_of, kind_of
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.refine.options import GuardOptions
from bitladder.trial import SWAPPED_KLD, Rendered, Renderer, SwappedModel

Doubles = npt.NDArray[np.float64]
Key = TypeVar("Key")

GUARD = Algorithm(
    "guard",
    (
        "kinds of tensors are tried, and halves of those that harm",
        "blocks of the layers that gain least are taken out again, tensor by tensor",
        "groups of layers are examined first, then layers, then tensors",
        "inputs are rounded as the kernels round them, as where recipes are planned",
        "a comparison ends with the first chunks that decide it",
        "where every kind was kept, tensors are tried only in layers that harm or gain nothing clear",
        "blocks go back where they harm by more than the error of the comparison: a kind was refused for "
        "0.0008 ± 0.0014, and all layers were examined for it; tensors are tried only in layers that harm",
        "chunks have half the length, and all their tokens but the first sixteenth are scored",
    ),
    uses=(SWAPPED_KLD,),
)


@dataclasses.dataclass(frozen=True)
class GuardTrial:
    """Some tensors with rounded blocks and with the library's.

    Parameters:
        kind: the kind of the tensors; blk.7 for those of a layer, blk.6-11 for those of several layers.
        tensors: their names.
        change: what the rounded blocks add to KLD, paired by token, nats.
        kept: whether they stay.
    """

    kind: str
    tensors: tuple[str, ...]
    change: Figure
    kept: bool


@dataclasses.dataclass(frozen=True)
class GuardReport:
    """What the guard measured.

    Parameters:
        before: KLD with the library's blocks, nats per token.
        after: KLD with the blocks that were kept.
        difference: after − before, paired by token.
        trials: rounded blocks that were put in, in order.
        removals: rounded blocks that were taken out, in order; for whole layers a measurement only.
        stock: tensors that keep the library's blocks, of those tried.
        tried: how many tensors were tried.
        tokens: how many tokens were scored.
    """

    before: Figure
    after: Figure
    difference: Figure
    trials: tuple[GuardTrial, ...]
    removals: tuple[GuardTrial, ...]
    stock: tuple[str, ...]
    tried: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """Tensors that are taken out together, and the smaller parts inside."""

    label: str
    names: tuple[str, ...]
    inside: tuple["_Part", ...] = ()


class Guard(Closing):
    """The loaded model in which blocks are tried.

    Parameters:
        base: full-precision predictions of a text that was not calibrated on.
        stock: renders the library's blocks.
        rounded: renders the rounded blocks of the same file.
        types: type of each tensor that changes, by name.
        options: how blocks are tried.
        decoding: how to decode; the context length must be the base's.
    """

    def __init__(
        self,
        base: HiddenBase,
        stock: Renderer,
        rounded: Renderer,
        types: Mapping[str, str],
        options: GuardOptions,
        decoding: Decoding,
    ) -> None:
        self._stock = {name: Rendered(stock, type_by_name(kind)) for name, kind in types.items()}
        self._rounded = {name: Rendered(rounded, type_by_name(kind)) for name, kind in types.items()}
        self._options = options
        self._in: frozenset[str] = frozenset()  # tensors that have rounded blocks now
        self._measured: dict[frozenset[str], list[Doubles]] = {}  # KLD of each token, chunk by chunk
        self._model = SwappedModel(base, stock, decoding)

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    @GUARD.entry
    def run(self, candidates: Sequence[str], progress: Progress = SILENT) -> GuardReport:
        """Tries the rounded blocks of these tensors. Raises BitladderError if logits are not finite."""
        stock: frozenset[str] = frozenset()
        self._in = stock
        kinds = _grouped(candidates, kind_of)
        trials: list[GuardTrial] = []
        with progress.task("guard", len(kinds)) as bar:
            for kind, names in kinds.items():
                ordered = sorted(names, key=lambda name: -1 if block_of(name) is None else block_of(name) or 0)
                self._try(kind, tuple(ordered), trials)
                bar.note(f"{kind}: KLD {trials[-1].change.value:+z.5f}")
                bar.advance()
        removals = self._examine(candidates, all(trial.kept for trial in trials), progress)
        self._change(self._in, stock)
        before, after = self._both(self._in, stock)
        return GuardReport(
            mean(before),
            mean(after),
            mean(after - before),
            tuple(trials),
            tuple(removals),
            tuple(name for name in candidates if name not in self._in),
            len(candidates),
            before.size,
        )

    def _try(self, kind: str, names: tuple[str, ...], trials: list[GuardTrial]) -> None:
        """Puts in the rounded blocks of some tensors, of all or of those halves that gain."""
        change = self._change(self._in.union(names), self._in)
        trials.append(GuardTrial(kind, names, change, kept=not _harms(change)))
        if not _harms(change):
            self._in = self._in.union(names)
        elif len(names) > 1:
            middle = len(names) // 2
            self._try(kind, names[:middle], trials)
            self._try(kind, names[middle:], trials)

    def _examine(self, candidates: Sequence[str], trusted: bool, progress: Progress) -> list[GuardTrial]:
        """Takes blocks out again where they gain least; returns all removals.

        `trusted` is whether every kind was kept.
        """
        removals: list[GuardTrial] = []
        layers = _layers([name for name in candidates if name in self._in])
        if trusted and len(layers) > self._options.single_layers:
            layers = self._weakest(_neighbours(layers), removals, progress, least=0, unclear=self._options.unclear)
        least, unclear = (0, 0) if trusted else (1, self._options.unclear)
        tensors = self._weakest(layers, removals, progress, least=least, unclear=unclear)
        with progress.task("guard, tensors", len(tensors)) as bar:
            for tensor in tensors:
                change = self._change(self._in, self._in.difference(tensor.names))
                removals.append(GuardTrial(tensor.label, tensor.names, change, kept=not _harms(change)))
                if _harms(change):
                    self._in = self._in.difference(tensor.names)
                bar.advance()
        return removals

    def _weakest(
        self, parts: Sequence[_Part], removals: list[GuardTrial], progress: Progress, *, least: int, unclear: int
    ) -> list[_Part]:
        """The parts inside those that harm, inside up to `unclear` that gain no more than their ±, and inside at least
        `least` of those that gain least."""
        gains = []
        if not parts:
            return []
        with progress.task("guard, layers", len(parts)) as bar:
            for part in parts:
                change = self._change(self._in, self._in.difference(part.names))
                removals.append(GuardTrial(part.label, part.names, change, kept=True))
                gains.append((change, part))
                bar.note(part.label)
                bar.advance()
        gains.sort(key=lambda pair: -pair[0].value)
        return [
            inner
            for place, (change, part) in enumerate(gains)
            if place < least or _harms(change) or (place < unclear and change.value > -change.error)
            for inner in part.inside
        ]

    def _change(self, rounded: frozenset[str], without: frozenset[str]) -> Figure:
        """What some rounded blocks add to KLD, paired by token, on as many chunks as it takes to decide that.

        Parameters:
            rounded: tensors that have rounded blocks.
            without: those of them that have rounded blocks in the other model.
        """
        options, count = self._options, 1
        while True:
            before, after = (self._kld(names, count) for names in (without, rounded))
            change, level = mean(after - before), options.negligible * float(before.mean())
            clear = options.sure * change.error
            if count == self._chunks or abs(change.value) > clear or abs(change.value) + clear < level:
                return change
            count = min(2 * count, self._chunks)

    @property
    def _chunks(self) -> int:
        return min(self._options.guard_chunks, len(self._model.base.chunks))

    def _kld(self, rounded: frozenset[str], count: int) -> Doubles:
        """KLD of each token of the first chunks, nats, with the rounded blocks of these tensors."""
        known = self._measured.setdefault(rounded, [])
        if len(known) < count:
            swaps = {name: self._rounded[name] if name in rounded else stock for name, stock in self._stock.items()}
            known.extend(self._model.kld_with(swaps, count - len(known), first=len(known)))
        return np.concatenate(known[:count])

    def _both(self, rounded: frozenset[str], without: frozenset[str]) -> tuple[Doubles, Doubles]:
        """KLD of each token without and with rounded blocks, on all chunks that both were measured on."""
        count = min(len(self._measured[rounded]), len(self._measured[without]))
        return self._kld(without, count), self._kld(rounded, count)


def _harms(change: Figure) -> bool:
    """Whether KLD rises by more than the standard error. A difference that is no number harms."""
    return not change.value <= change.error


def _layers(names: Sequence[str]) -> list[_Part]:
    """Each layer and the tensors in it."""
    layers = _grouped([name for name in names if block_of(name) is not None], block_of)
    return [
        _Part(f"blk.{layer}", tuple(within), tuple(_Part(kind_of(name), (name,)) for name in within))
        for layer, within in sorted(layers.items(), key=lambda pair: pair[0] or 0)
    ]


def _neighbours(layers: Sequence[_Part]) -> list[_Part]:
    """Groups of neighbouring layers, about as many groups as layers in each."""
    size = math.isqrt(len(layers))
    groups = [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]
    return [
        _Part(
            f"{group[0].label}-{group[-1].label.removeprefix('blk.')}",
            tuple(name for layer in group for name in layer.names),
            group,
        )
        for group in groups
    ]


def _grouped(names: Sequence[str], key: Callable[[str], Key]) -> dict[Key, list[str]]:
    """Names by their key, in order of first appearance."""
    groups: dict[Key, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def guard_json(guard: GuardReport) -> dict[str, Any]:
    """A guard's report as JSON values."""
    return {
        "before": guard.before.model_dump(),
        "after": guard.after.model_dump(),
        "difference": guard.difference.model_dump(),
        "tokens": guard.tokens,
        "stock": list(guard.stock),
        "tried": guard.tried,
        "trials": [_trial_json(trial) for trial in guard.trials],
        "removals": [_trial_json(trial) for trial in guard.removals],
    }


def _trial_json(trial: GuardTrial) -> dict[str, Any]:
    return {
        "kind": trial.kind,
        "tensors": list(trial.tensors),
        "change": trial.change.model_dump(),
        "kept": trial.kept,
    }
