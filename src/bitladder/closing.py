"""Objects that a `with` closes."""

from types import TracebackType
from typing import Self


class Closing:
    """The base of objects that hold native memory or a file. The end of a `with` calls `close`."""

    def close(self) -> None:
        """Frees it. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
