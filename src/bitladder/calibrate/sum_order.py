"""The order in which chunks are added up: by text, and one after the other though they are computed side by side.

The sums of each text are added up from 0, and then together in the order of the texts. So each of several machines can
read a text, and what they leave together has the bytes that one machine leaves. On one machine the sums of a text are
kept in the folder of unfinished work while those of the next one grow.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence


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


class Turns:
    """Lets chunks that are computed side by side add to shared sums in their order.

    Sums of floating-point numbers depend on the order. With turns they do not depend on how many chunks are computed at
    once. A chunk that comes later waits at each sum until those before it have left the sum.

    Parameters:
        chunks: numbers of the chunks.

    Example:
        >>> turns, sums = Turns(range(2)), []
        >>> def add(chunk):
        ...     with turns.of(chunk) as turn:
        ...         turn.wait("H")
        ...         sums.append(chunk)
        ...         turn.leave("H")
        ...
        >>> second = threading.Thread(target=add, args=(1,))
        >>> second.start()
        >>> add(0)
        >>> second.join()
        >>> sums
        [0, 1]
    """

    def __init__(self, chunks: range) -> None:
        self.chunks = chunks
        self._left: dict[int, set[str]] = {chunk: set() for chunk in chunks}  # sums that running chunks have left
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def of(self, chunk: int) -> Iterator["Turn"]:
        """While a chunk is computed. If that fails, no other chunk waits for it."""
        try:
            yield Turn(self, chunk)
        except BaseException as error:
            self.stop(error)
            raise
        self._change(lambda: self._left.pop(chunk))

    def wait(self, chunk: int, name: str) -> None:
        """Waits until all chunks before this one have left a sum. Raises as `check`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or all(name in left for other, left in self._left.items() if other < chunk)
            )
        self.check()

    def check(self) -> None:
        """Raises what another chunk raised: no chunk needs to go on."""
        if self._error is not None:
            raise self._error

    def leave(self, chunk: int, name: str) -> None:
        """This chunk will not add to a sum again."""
        self._change(lambda: self._left[chunk].add(name))

    def stop(self, error: BaseException) -> None:
        """Ends all chunks with this error where they wait or check, unless they end with another one already."""
        self._change(lambda: setattr(self, "_error", self._error or error))

    def _change(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class Turn:
    """A chunk among those that are computed side by side."""

    turns: Turns
    chunk: int

    def wait(self, name: str) -> None:
        """See `Turns.wait`."""
        self.turns.wait(self.chunk, name)

    def leave(self, name: str) -> None:
        """See `Turns.leave`."""
        self.turns.leave(self.chunk, name)
