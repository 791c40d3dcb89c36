"""The sums of an entry over each of several texts, kept in a folder of unfinished work and added up in their order."""

from collections.abc import Mapping, Sequence

import numpy as np

from bitladder.calibrate.gradients.entry_sums import COLUMNS, ROOTS, Array, EntryPlan, EntrySums
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.unfinished import UnfinishedWork


def kept_of_text(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Those arrays of an entry (`EntrySums.arrays`) that `add_text` needs of a text."""
    return {name: array for name, array in arrays.items() if not name.startswith(ROOTS)}


def clear_sums(arrays: Mapping[str, Array]) -> None:
    """Starts the sums of an entry again from 0."""
    for name, array in kept_of_text(arrays).items():
        if not name.endswith(COLUMNS):
            array[...] = 0


def add_text(arrays: Mapping[str, Array], text: Mapping[str, Array]) -> None:
    """Adds the sums of a text to those of an entry. The columns are the same for all texts."""
    for name, array in kept_of_text(arrays).items():
        if name.endswith(COLUMNS):
            array[...] = text[name]
        else:
            np.add(array, text[name], out=array)


def of_text(plan: EntryPlan, text: int) -> str:
    """The name of the piece with the sums of a text."""
    return f"{plan.names[0]}.text {text}"


def keep_text(work: UnfinishedWork, entry: EntrySums, text: int) -> None:
    """Keeps the sums of an entry over one text."""
    arrays = entry.arrays()
    work.put_arrays(of_text(entry.plan, text), kept_of_text(arrays))


def joined_entry(plan: EntryPlan, options: GradientOptions, length: int, works: Sequence[UnfinishedWork]) -> EntrySums:
    """The sums of an entry over all texts, from those that `keep_text` kept of each.

    Parameters:
        plan: the entry.
        options: how tokens are weighted.
        length: tokens of a chunk.
        works: where the sums of each text are.
    """
    entry = EntrySums(plan, options, length)
    arrays = entry.arrays()
    for text, work in enumerate(works):
        add_text(arrays, work.get_arrays(of_text(plan, text)))
    return entry
