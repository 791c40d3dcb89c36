"""Rendering and measuring on other machines, which share the folder of rendered blocks.

What they make is what would be made here: blocks under their keys in the folder, errors, and lines of the journal. So
whoever uses it afterwards finds it there, and goes on as if it had been made here.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bitladder.engine import type_by_name
from bitladder.machines import SHARES, shares
from bitladder.progress import SILENT, Progress
from bitladder.trial.journal import Journal, Wanted
from bitladder.trial.render import Renderer
from bitladder.trial.rounding_method import StockRounding

Pair = tuple[str, str]  # name of a tensor, and of a type


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
