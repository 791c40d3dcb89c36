"""Trials on more than one copy of a model: two recipes at a time on this machine, and work on other machines.

A model decodes several chunks of a recipe side by side (`engine.Lanes`). With one chunk the threads of a context wait
for each other after each operation, and while Python scores rows and swaps weights. Another recipe has other weights,
so that it needs a copy of the model. No figure depends on it.

Other machines share the folder of rendered blocks. What they make is what would be made here: blocks under their keys
in the folder, errors, and lines of the journal. So whoever uses it afterwards finds it there, and goes on as if it had
been made here.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine import LANES, Decoding, lane_count, main_memory, side_by_side, type_by_name
from bitladder.files import Closing
from bitladder.machines import SHARES, shares
from bitladder.progress import SILENT, Progress
from bitladder.trial.journal import Journal, Wanted, recipe_key
from bitladder.trial.render import Renderer
from bitladder.trial.rounding_method import StockRounding
from bitladder.trial.swapped_model import SwappedModel

Doubles = npt.NDArray[np.float64]

COPY_SHARE = 1 / 16  # of main memory, that the weights of the copy may take
WORTH_A_COPY = 4  # recipes: loading takes about as long as measuring one or two
Pair = tuple[str, str]  # name of a tensor, and of a type


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


@dataclasses.dataclass(frozen=True)
class Helpers:
    """Other machines that render and measure.

    Parameters:
        call: does the work of a kind ("render" or "measure") on some shares, and returns the results in their order.
            A share of "render" is pairs of tensor and type, and bytes of blocks to keep; its result their errors. A
            share of "measure" is what is wanted; its result the measurements.
        count: machines.
        threads: threads of the largest of them.
    """

    call: Callable[[str, Sequence[Any], str, Progress], Sequence[Any]]
    count: int
    threads: int = 1

    def render(self, renderer: Renderer, pairs: Iterable[Pair], label: str, progress: Progress = SILENT) -> None:
        """Has tensors rendered into the renderer's folder. The renderer knows their errors then.

        Parameters:
            renderer: what would render them here.
            pairs: name of a tensor and name of a type.
            label: what the progress bar says.
            progress: where work is shown.
        """
        parts = rendering_shares(renderer, pairs, self.count, self.threads)
        sizes = [sum(renderer.nbytes(name, type_by_name(kind)) for name, kind in part) for part in parts]
        total, room = sum(sizes), max(renderer.room, 0)
        # Each share gets its part of the room, so that all together do not keep more than there is room for.
        given = [size if total <= room else size * room // total for size in sizes]
        for errors in self.call("render", list(zip(parts, given, strict=True)), label, progress):
            renderer.learn(errors)
        renderer.room = room - sum(given)

    def measure(self, journal: Journal, wanted: Iterable[Wanted], label: str, progress: Progress = SILENT) -> None:
        """Has recipes measured that the journal does not know. It knows them then.

        Parameters:
            journal: what would measure them here.
            wanted: the recipes.
            label: what the progress bar says.
            progress: where work is shown.
        """
        unknown = [each for each in wanted if not journal.knows(each[0], each[1])]
        # A machine loads the model for the first recipe: few shares, of recipes that stand beside each other.
        size = -(-len(unknown) // max(2 * self.count, 1)) or 1
        parts = [unknown[start : start + size] for start in range(0, len(unknown), size)]
        if parts:
            for measurements in self.call("measure", parts, label, progress):
                for measurement in measurements:
                    journal.learn(measurement)


def rendering_shares(renderer: Renderer, pairs: Iterable[Pair], count: int, threads: int) -> list[list[Pair]]:
    """Divides pairs of tensor and type between machines. All types of a tensor are in one share.

    Parameters:
        renderer: what would render them here.
        pairs: name of a tensor and name of a type.
        count: machines.
        threads: of each of them. A share has a tensor for each thread, if there are enough.
    """
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for name, kind in pairs:
        kinds[name].append(kind)
    tensors, names = renderer.file.tensors, list(kinds)
    costs = [float(len(kinds[name]) * tensors[name].elements * tensors[name].width) for name in names]
    together = 1 if isinstance(renderer.rounding, StockRounding) else threads
    most = max(count, min(SHARES * count, len(names) // together))
    return [[(names[piece], kind) for piece in share for kind in kinds[names[piece]]] for share in shares(costs, most)]
