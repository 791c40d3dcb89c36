"""Which chunks are of which text. The sums of each text are added up from 0, and then together in their order.

So each of several machines can read a text, and what they leave together has the bytes that one machine leaves. On one
machine the sums of a text are kept in the folder of unfinished work while those of the next one grow.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class ByText:
    """Chunks by text.

    Parameters:
        counts: chunks of each text; all chunks are in the order of the texts.
        only: number of the one text that is read; None reads all.

    Example:
        >>> list(ByText((3, 2)).chosen), list(ByText((3, 2)).chunks(1))
        ([0, 1], [3, 4])
    """

    counts: tuple[int, ...]
    only: int | None = None

    @property
    def chosen(self) -> Sequence[int]:
        """Numbers of the texts that are read."""
        return range(len(self.counts)) if self.only is None else (self.only,)

    def chunks(self, text: int) -> range:
        """Numbers of the chunks of a text."""
        first = sum(self.counts[:text])
        return range(first, first + self.counts[text])
