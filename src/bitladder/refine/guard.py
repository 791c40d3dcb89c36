"""Rounding on trial: what raises the measured divergence on held-out text keeps the library's blocks.

A lower output error is no proof. At an attention sink, or on text unlike the calibration's, blocks with a lower
tr(ΔW H ΔWᵀ) can make a worse model. So the blocks of one kind of tensor after the other are put into the loaded
full-precision model, in which all others have the blocks that were kept so far, and stay if KLD falls. A kind that
raises it is tried in halves of its layers, down to single tensors.
"""

import dataclasses
from collections.abc import Mapping, Sequence

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
from bitladder.progress import SILENT, Progress
from bitladder.recipe.names import layer_of, short_kind
from bitladder.sensitivity.rendered import Renderer

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Some tensors of one kind, put in: by how much KLD changed (paired by token, nats), and whether they stayed."""

    kind: str
    tensors: tuple[str, ...]
    change: Figure
    kept: bool


@dataclasses.dataclass(frozen=True)
class GuardReport:
    """KLD of the library's blocks and of what was kept, their paired difference, and every trial in order.

    `stock` names the tensors that keep the library's blocks.
    """

    before: Figure
    after: Figure
    difference: Figure
    trials: tuple[Trial, ...]
    stock: tuple[str, ...]
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
        """Try the rounded blocks of these tensors, kind by kind.

        Raises BitladderError if decoding fails or logits are not finite.
        """
        groups: dict[str, list[str]] = {}
        for name in candidates:
            groups.setdefault(short_kind(name), []).append(name)
        with progress.task("guard", len(groups) + 1) as bar:
            for name in self._types:
                self._put(self._stock, (name,))
            before = now = self._kld()
            bar.advance()
            trials: list[Trial] = []
            for kind, names in groups.items():
                ordered = sorted(names, key=lambda name: -1 if layer_of(name) is None else layer_of(name) or 0)
                now = self._try(kind, tuple(ordered), now, trials)
                bar.note(f"KLD {now.mean():.5f}, {before.mean():.5f} with the library's blocks")
                bar.advance()
        kept = {name for trial in trials if trial.kept for name in trial.tensors}
        return GuardReport(
            mean(before),
            mean(now),
            mean(now - before),
            tuple(trials),
            tuple(name for name in candidates if name not in kept),
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

    def _put(self, renderer: Renderer, names: tuple[str, ...]) -> None:
        for name in names:
            self._weights.set(name, renderer.values(name, type_by_name(self._types[name])))

    def _kld(self) -> Doubles:
        return compare(self._context, self._base, self._chunks, self._workers).kld
