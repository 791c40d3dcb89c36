"""Ctrl-C while the library calls back into Python.

A signal is handled at the first Python instruction after it came. While the library computes that is the entry of a
callback, where no `try` can be yet: ctypes would print the exception and forget it.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def keeping_interrupts(keep: Callable[[BaseException], None]) -> Iterator[None]:
    """Inside the context, what SIGINT would raise is handed to `keep` instead of being raised.

    Does nothing outside the main thread (no signal is handled there) or where Python does not handle SIGINT.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return

    def quietly(number: int, frame: object) -> None:
        try:
            handler(number, frame)  # type: ignore[arg-type]
        except BaseException as error:
            keep(error)

    signal.signal(signal.SIGINT, quietly)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
