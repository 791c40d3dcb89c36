"""What is opened is closed at the end of a `with`."""

from types import TracebackType
from typing import Self


class Closing:
    """A base for objects that hold something native or a file: leaving the `with` calls `close`."""

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
