"""Rounding on trial: what raises the measured divergence on held-out text keeps the library's blocks.

A lower output error is no proof. At an attention sink, or on text unlike the calibration's, blocks with a lower
tr(ΔW H ΔWᵀ) can make a worse model. So the blocks of one kind of tensor after the other are put into the loaded
full-precision model, in which all others have the blocks that were kept so far, and stay if KLD falls. A kind that
raises it is tried in halves of its layers, down to single tensors.

What harms in one layer can hide behind a kind that gains in all. So then blocks are taken out again: those of groups of
neighbouring layers, of each layer in the groups that gain least by them, and of each tensor in the layers that do. If a
kind was refused, the moments are not to be trusted, and every layer is looked at.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.model import Model
from bitladder.engine.types import type_by_name
from bitladder.engine.weights import Weights
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.divergence import compare_with_base
from bitladder.evaluate.figures import mean
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.scores import Figure
from bitladder.evaluate.settings import Settings
from bitladder.gguf.names import block_of, kind_of
from bitladder.progress import SILENT, Progress
from bitladder.trial.render import Renderer

Doubles = npt.NDArray[np.float64]
Key = TypeVar("Key")
# Parts at most that are looked into though they do no harm as a whole: with few tokens no gain is clear.
UNCLEAR = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """Some tensors with their rounded blocks and without: what these add to KLD (paired, nats), and whether they stay.

    `kind` is that of the tensors, or blk.7 for a layer's, blk.6-11 for those of several.
    """

    kind: str
    tensors: tuple[str, ...]
    change: Figure
    kept: bool


@dataclasses.dataclass(frozen=True)
class GuardReport:
    """KLD of the library's blocks and of what was kept, their paired difference, and every trial in order.

    `trials` are of blocks that were put in, `removals` of blocks that were in and were taken out, which for whole
    layers is a measurement only. `stock` names the tensors that keep the library's blocks, of `tried`.
    """

    before: Figure
    after: Figure
    difference: Figure
    trials: tuple[Trial, ...]
    removals: tuple[Trial, ...]
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

    Parameters: `base` the full-precision predictions of a text that was not calibrated on; `stock` and `rounded`
    renderers of the same file; `types` of the tensors that both render.
    """

    def __init__(
        self, base: HiddenBase, stock: Renderer, rounded: Renderer, types: Mapping[str, str], settings: Settings
    ) -> None:
        self._base, self._stock, self._rounded, self._types = base, stock, rounded, types
        self._chunks = settings.limit(len(base.chunks))
        self._model = Model(base.model.path, mmap=False, repack=False, gpu_layers=settings.gpu_layers)
        self._weights = Weights(self._model)
        self._context = settings.context(self._model)
        self._workers = Workers(settings.threads)

    def close(self) -> None:
        """Free the model."""
        self._workers.close()
        self._context.close()
        self._model.close()

    def run(self, candidates: Sequence[str], progress: Progress = SILENT) -> GuardReport:
        """Try the rounded blocks of these tensors, kind by kind, then those of the layers that gain least one by one.

        Raises BitladderError if decoding fails or logits are not finite.
        """
        kinds = _grouped(candidates, kind_of)
        with progress.task("guard", 1 + len(kinds)) as bar:
            for name in self._types:
                self._put(self._stock, (name,))
            before = now = self._kld()
            bar.advance()
            trials: list[Trial] = []
            for kind, names in kinds.items():
                ordered = sorted(names, key=lambda name: -1 if block_of(name) is None else block_of(name) or 0)
                now = self._try(kind, tuple(ordered), now, trials)
                bar.note(f"KLD {now.mean():.5f}, {before.mean():.5f} with the library's blocks")
                bar.advance()
        kept = {name for trial in trials if trial.kept for name in trial.tensors}
        removals: list[Trial] = []
        layers = _layers([name for name in candidates if name in kept])
        if all(trial.kept for trial in trials) and len(layers) > 3:
            layers = self._weakest(_neighbours(layers), now, removals, progress)
        tensors = self._weakest(layers, now, removals, progress)
        with progress.task("guard, tensors", len(tensors)) as bar:
            for tensor in tensors:
                change, without = self._without(tensor.names, now)
                removals.append(Trial(tensor.label, tensor.names, change, kept=change.value <= 0))
                if change.value > 0:
                    now = without
                else:
                    self._put(self._rounded, tensor.names)
                bar.advance()
        kept -= {name for trial in removals if not trial.kept for name in trial.tensors}
        return GuardReport(
            mean(before),
            mean(now),
            mean(now - before),
            tuple(trials),
            tuple(removals),
            tuple(name for name in candidates if name not in kept),
            len(candidates),
            before.size,
        )

    def _try(self, kind: str, names: tuple[str, ...], now: Doubles, trials: list[Trial]) -> Doubles:
        """The scores after trying some tensors, which stay or are taken out again."""
        self._put(self._rounded, names)
        with_them = self._kld()
        change = mean(with_them - now)
        trials.append(Trial(kind, names, change, kept=change.value < 0))
        if change.value < 0:
            return with_them
        self._put(self._stock, names)
        # Halves of what harms by less than its error would be tried on noise alone.
        if len(names) > 1 and change.value > change.error:
            middle = len(names) // 2
            now = self._try(kind, names[:middle], now, trials)
            now = self._try(kind, names[middle:], now, trials)
        return now

    def _weakest(self, parts: Sequence[_Part], now: Doubles, removals: list[Trial], progress: Progress) -> list[_Part]:
        """What is inside the parts that gain least: of one at least, and of those that harm or gain nothing clear."""
        gains = []
        with progress.task("guard, layers", len(parts)) as bar:
            for part in parts:
                change, _ = self._without(part.names, now)
                self._put(self._rounded, part.names)
                removals.append(Trial(part.label, part.names, change, kept=True))
                gains.append((change, part))
                bar.note(part.label)
                bar.advance()
        gains.sort(key=lambda pair: -pair[0].value)
        return [
            inner
            for place, (change, part) in enumerate(gains)
            if not place or change.value > (-change.error if place < UNCLEAR else 0)
            for inner in part.inside
        ]

    def _without(self, names: Sequence[str], now: Doubles) -> tuple[Figure, Doubles]:
        """What the rounded blocks of these tensors add to KLD, and the scores without them; they are out then."""
        self._put(self._stock, names)
        without = self._kld()
        return mean(now - without), without

    def _put(self, renderer: Renderer, names: Sequence[str]) -> None:
        for name in names:
            self._weights.set(name, renderer.values(name, type_by_name(self._types[name])))

    def _kld(self) -> Doubles:
        return compare_with_base(self._context, self._base, self._chunks, self._workers).kld


def _layers(names: Sequence[str]) -> list[_Part]:
    """Each layer and the tensors in it."""
    layers = _grouped([name for name in names if block_of(name) is not None], block_of)
    return [
        _Part(f"blk.{layer}", tuple(within), tuple(_Part(kind_of(name), (name,)) for name in within))
        for layer, within in sorted(layers.items(), key=lambda pair: pair[0] or 0)
    ]


def _neighbours(layers: Sequence[_Part]) -> list[_Part]:
    """Groups of neighbouring layers, about as many as layers in each."""
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
    """Names by what `key` says of them, in order of first appearance."""
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


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "kind": trial.kind,
        "tensors": list(trial.tensors),
        "change": trial.change.model_dump(),
        "kept": trial.kept,
    }
