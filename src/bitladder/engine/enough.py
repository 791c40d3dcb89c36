"""Watching a graph only as far as somebody needs it."""

from typing import Any, Protocol

from bitladder.engine.observe import Observer, Trampoline


class SatisfiedObserver(Observer, Protocol):
    """An observer that knows when it has seen enough of a computation."""

    def satisfied(self) -> bool:
        """Whether the rest of this computation need not be done."""


class Enough(Trampoline):
    """A Trampoline that ends each computation (of -ub tokens) as soon as its observer is satisfied.

    The logits are then whatever lay in their memory. What was computed up to there is right, the cache included: the
    next piece of the same sequence can be watched as far again.
    """

    def __init__(self, observer: SatisfiedObserver) -> None:
        super().__init__(observer)
        self._watcher = observer

    def _call(self, address: int, ask: bool, data: Any) -> bool:
        if self._error is None and self._watcher.satisfied():
            return ask  # "yes" before the next node and "no" after it: that stops the computation
        return super()._call(address, ask, data)
