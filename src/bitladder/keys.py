"""What decides a result, and the one hash of it: versions of algorithms, options, and contents of inputs.

Steps of a run, rendered blocks, measurements, prices and unfinished work are all valid for as long as their key is the
same. Nothing else says whether they are valid.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_recorders: list[set[str]] = []


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The version of an algorithm. It stands beside the code, as a constant.

    Parameters:
        name: what the algorithm is called in keys.
        changes: the reason of each version, oldest first. Add a line when the same inputs give other results.
        uses: the algorithms whose results this one is made of.
    """

    name: str
    changes: tuple[str, ...]
    uses: tuple["Algorithm", ...] = ()

    @property
    def version(self) -> int:
        """The number of changes."""
        return len(self.changes)

    def versions(self) -> dict[str, int]:
        """The version of this algorithm and of all that it uses, by name."""
        all_versions = {self.name: self.version}
        for used in self.uses:
            all_versions |= used.versions()
        return dict(sorted(all_versions.items()))

    def entry(self, function: Callable[P, R]) -> Callable[P, R]:
        """Marks a function as the way into the algorithm: `recorded` notices each use, and its bytes repeat.

        OpenBLAS's sums depend on the number of its threads, so inside the function it has one.
        """

        @functools.wraps(function)
        def noticed(*args: P.args, **kwargs: P.kwargs) -> R:
            from bitladder.engine import single_threaded  # the door is opened late: most keys need no array

            for names in _recorders:
                names.add(self.name)
            with single_threaded():
                return function(*args, **kwargs)

        return noticed


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of all algorithms that are used while this is open. A test compares them with what a key holds."""
    names: set[str] = set()
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)


def versions_of(*algorithms: Algorithm) -> dict[str, int]:
    """The versions of several algorithms and of all that they use, by name."""
    return dict(
        sorted({name: number for algorithm in algorithms for name, number in algorithm.versions().items()}.items())
    )


def settled(value: Any) -> Any:
    """A value as JSON, for a key: `Options` by the fields that decide a result, other dataclasses whole.

    Raises TypeError for a path, because where a file lies decides nothing: give the hash of its content.
    """
    if hasattr(value, "deciding"):
        return settled(value.deciding())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: settled(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): settled(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [settled(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(settled(part) for part in value)
    if isinstance(value, pathlib.PurePath):
        raise TypeError(f"{value} is a path, which is in no key")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is in no key")


def key_of(inputs: Mapping[str, Any]) -> str:
    """The SHA-256 of all that decides a result, as hexadecimal digits. The order of names does not matter.

    Example:
        >>> key_of({"text": "a", "n_ctx": 512}) == key_of({"n_ctx": 512, "text": "a"})
        True
    """
    text = json.dumps(settled(inputs), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
