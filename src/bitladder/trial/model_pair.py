"""Recipes that are measured on one chunk, two at a time: each has a copy of the model.

A model decodes several chunks of a recipe side by side (`engine.Lanes`). With one chunk the threads of a context wait
for each other after each operation, and while Python scores rows and swaps weights. Another recipe has other weights,
so that it needs a copy of the model. No figure depends on it.
"""

import collections
import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine import LANES, Decoding, lane_count, main_memory, side_by_side
from bitladder.files import Closing
from bitladder.trial.journal import recipe_key
from bitladder.trial.swapped_model import SwappedModel

Doubles = npt.NDArray[np.float64]

COPY_SHARE = 1 / 16  # of main memory, that the weights of the copy may take
WORTH_A_COPY = 4  # recipes: loading takes about as long as measuring one or two


def copies(nbytes: float, decoding: Decoding) -> bool:
    """Whether a model has a copy for recipes side by side.

    Parameters:
        nbytes: of the model's weights.
        decoding: how it is decoded.
    """
    return lane_count(decoding) > 1 and nbytes <= COPY_SHARE * main_memory()


class ModelPair(Closing):
    """A swapped model, and a copy of it. Both are loaded when they are needed (a `journal.Measures`).

    Parameters:
        load: loads the model.
        copied: whether it may have a copy (`copies`).
    """

    def __init__(self, load: Callable[[], SwappedModel], copied: bool) -> None:
        self._load, self._copied = load, copied
        self._models: list[SwappedModel] = []
        self._opened = contextlib.ExitStack()
        self._expected: collections.deque[str] = collections.deque()
        self._results: Iterator[Doubles] = iter(())

    def close(self) -> None:
        """Ends what is measured, and frees the models. A recipe that is measured later loads them again."""
        self._forget()
        self._models.clear()
        self._opened.close()

    def model(self, number: int = 0) -> SwappedModel:
        """The model (0) or its copy (1)."""
        while len(self._models) <= number:
            model = self._models[0].copy() if self._models else self._load()
            self._models.append(self._opened.enter_context(model))
        return self._models[number]

    def expect(self, recipes: Sequence[Mapping[str, str]]) -> None:
        """Says which recipes will be asked for next, on one chunk, and in which order.

        Parameters:
            recipes: for each the type of each tensor that differs from full precision, by name.
        """
        self._forget()
        # The last of an odd number is measured with all threads.
        recipes = recipes[: len(recipes) // LANES * LANES]
        if not self._copied or len(recipes) < (WORTH_A_COPY if len(self._models) < LANES else LANES):
            return
        models = self.model(0), self.model(1)
        self._expected.extend(map(recipe_key, recipes))
        self._results = side_by_side(
            [model.lane._replace(number=number) for number, model in enumerate(models)],
            range(len(recipes)),
            lambda lane, place: models[lane.number].kld_beside(recipes[place]),
        )

    def kld(self, types: Mapping[str, str], chunks: int) -> Doubles:
        """See `journal.Measures`."""
        if chunks != 1 or not self._expected or self._expected[0] != recipe_key(types):
            self._forget()
            return self.model().kld(types, chunks)
        self._expected.popleft()
        try:
            return next(self._results)
        except BaseException:
            self._expected.clear()
            raise
        finally:
            if not self._expected:
                self._forget()

    def _forget(self) -> None:
        """Ends what is measured ahead."""
        self._expected.clear()
        if isinstance(self._results, Generator):
            self._results.close()
        self._results = iter(())
