"""Rounding on trial: what raises the measured divergence on held-out text keeps the library's blocks.

A lower output error is no proof. At an attention sink, or on text unlike the calibration's, blocks with a lower
tr(ΔW H ΔWᵀ) can make a worse model. So the blocks of one kind of tensor after the other are put into the loaded
full-precision model, in which all others have the blocks that were kept so far, and stay if KLD falls. A kind that
raises it is tried in halves of its layers, down to single tensors.

What harms in one layer only can hide behind a kind that gains in all. So then each layer's blocks are taken out again,
and of the layers that gain least by them each tensor's: the last one, and those that do harm or gain no more than the
error of their gain.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.model import Model
from bitladder.engine.observe import Weights
from bitladder.engine.types import type_by_name
from bitladder.evaluate.base import HiddenBase
from bitladder.evaluate.divergence import compare
from bitladder.evaluate.figures import mean
from bitladder.evaluate.rows import Workers
from bitladder.evaluate.scores import Figure
from bitladder.evaluate.settings import Settings
from bitladder.progress import SILENT, Progress, Task
from bitladder.recipe.names import layer_of, short_kind
from bitladder.sensitivity.rendered import Renderer

Doubles = npt.NDArray[np.float64]
Key = TypeVar("Key")
# Layers at most that are tried tensor by tensor though they do no harm as a whole: with few tokens no gain is clear.
UNCLEAR = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """Some tensors with their rounded blocks and without: what these add to KLD (paired, nats), and whether they stay.

    `kind` is that of the tensors, or blk.7 for a layer's.
    """

    kind: str
    tensors: tuple[str, ...]
    change: Figure
    kept: bool


@dataclasses.dataclass(frozen=True)
class GuardReport:
    """KLD of the library's blocks and of what was kept, their paired difference, and every trial in order.

    `trials` are of blocks that were put in, `removals` of blocks that were in and were taken out, which for a whole
    layer is a measurement only. `stock` names the tensors that keep the library's blocks, of `tried`.
    """

    before: Figure
    after: Figure
    difference: Figure
    trials: tuple[Trial, ...]
    removals: tuple[Trial, ...]
    stock: tuple[str, ...]
    tried: int
    tokens: int


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
        kinds = _grouped(candidates, short_kind)
        layers = _grouped([name for name in candidates if layer_of(name) is not None], layer_of)
        with progress.task("guard", 2 + len(kinds) + len(layers)) as bar:
            for name in self._types:
                self._put(self._stock, (name,))
            before = now = self._kld()
            bar.advance()
            trials: list[Trial] = []
            for kind, names in kinds.items():
                ordered = sorted(names, key=lambda name: -1 if layer_of(name) is None else layer_of(name) or 0)
                now = self._try(kind, tuple(ordered), now, trials)
                bar.note(f"KLD {now.mean():.5f}, {before.mean():.5f} with the library's blocks")
                bar.advance()
            kept = {name for trial in trials if trial.kept for name in trial.tensors}
            removals: list[Trial] = []
            within = {layer: [name for name in names if name in kept] for layer, names in layers.items()}
            now = self._doubt(within, now, removals, bar)
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

    def _doubt(
        self, layers: Mapping[int | None, Sequence[str]], now: Doubles, removals: list[Trial], bar: Task
    ) -> Doubles:
        """The scores after measuring what each layer gains, and trying single tensors of those that gain least."""
        gains = []
        for layer, names in layers.items():
            if names:
                change, _ = self._without(names, now)
                self._put(self._rounded, names)
                gains.append(Trial(f"blk.{layer}", tuple(names), change, kept=True))
            bar.advance()
        removals += gains
        gains.sort(key=lambda trial: -trial.change.value)
        for place, trial in enumerate(gains):
            unclear = trial.change.value > (-trial.change.error if place < UNCLEAR else 0)
            if place and not unclear:
                break
            for name in trial.tensors:
                change, without = self._without((name,), now)
                removals.append(Trial(short_kind(name), (name,), change, kept=change.value <= 0))
                if change.value > 0:
                    now = without
                else:
                    self._put(self._rounded, (name,))
        return now

    def _without(self, names: Sequence[str], now: Doubles) -> tuple[Figure, Doubles]:
        """What the rounded blocks of these tensors add to KLD, and the scores without them; they are out then."""
        self._put(self._stock, names)
        without = self._kld()
        return mean(now - without), without

    def _put(self, renderer: Renderer, names: Sequence[str]) -> None:
        for name in names:
            self._weights.set(name, renderer.values(name, type_by_name(self._types[name])))

    def _kld(self) -> Doubles:
        return compare(self._context, self._base, self._chunks, self._workers).kld


def _grouped(names: Sequence[str], key: Callable[[str], Key]) -> dict[Key, list[str]]:
    """Names by what `key` says of them, in order of first appearance."""
    groups: dict[Key, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups
