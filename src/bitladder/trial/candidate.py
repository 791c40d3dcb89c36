"""A loaded model whose weights are swapped for rendered ones: a recipe is measured without writing or loading a file.

The loaded model is the full-precision one and its weights become the values that the blocks stand for, rounded to the
type of the file (F16, mostly). On the CPU the inputs of swapped weights are rounded as their types' kernels round them
(engine.activations): with K-quants of 5 and 6 bits that may be half of the loss. On a GPU they are not.
"""

import contextlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.activations import KernelInputs
from bitladder.engine.context import Context
from bitladder.engine.model import Model
from bitladder.engine.types import type_by_name
from bitladder.engine.weights import Weights
from bitladder.errors import BitladderError
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.divergence import compare_with_base
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.settings import Settings
from bitladder.trial.render import Renderer

Doubles = npt.NDArray[np.float64]


class Candidate(Closing):
    """The model of a base, loaded once, in which any recipe can be put on.

    Parameters: `base` what it is compared with; `renderer` of the same file. Raises BitladderError if it cannot be
    loaded, or if its weights cannot be replaced.
    """

    def __init__(self, base: HiddenBase, renderer: Renderer, settings: Settings) -> None:
        self.base, self.renderer = base, renderer
        self._wears: dict[str, str] = {}
        with contextlib.ExitStack() as opened:
            self._model = opened.enter_context(
                Model(base.model.path, mmap=False, repack=False, gpu_layers=settings.gpu_layers)
            )
            self._weights = Weights(self._model)
            self._inputs = KernelInputs() if settings.gpu_layers == 0 else None
            self._context = opened.enter_context(Context(self._model, settings, callback=self._inputs))
            self._workers = opened.enter_context(Workers(settings.threads))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Free the model."""
        self._opened.close()

    def names(self) -> set[str]:
        """The weights that can be swapped: those that the graph reads."""
        return set(self._weights.names())

    def put_on(self, types: Mapping[str, str]) -> None:
        """Give these tensors these types, and all others their full precision."""
        file = self.renderer.file
        wanted = {name: kind for name, kind in types.items() if kind != file.tensors[name].type.name}
        for name in sorted(self._wears.keys() | wanted.keys()):
            kind = wanted.get(name)
            if kind == self._wears.get(name):
                continue
            if kind is None:
                self._weights.set_bytes(name, file.read(file.tensors[name]))
                del self._wears[name]
            else:
                self._weights.set(name, self.renderer.values(name, type_by_name(kind)))
                self._wears[name] = kind
        if self._inputs is not None:
            self._inputs.pretend({name: type_by_name(kind) for name, kind in self._wears.items()})

    def kld(self, types: Mapping[str, str], chunks: int) -> Doubles:
        """The divergence of a recipe from full precision over the base's first `chunks` chunks, nats per token.

        Returns float64 [chunks, scored]. Raises BitladderError if decoding fails or logits are not finite.
        """
        count = min(chunks, len(self.base.chunks))
        if count < 1:
            raise BitladderError("a recipe is measured on at least one chunk")
        self.put_on(types)
        return compare_with_base(self._context, self.base, count, self._workers).kld.reshape(count, -1)
