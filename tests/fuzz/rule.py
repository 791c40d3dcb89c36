"""A parser that is fuzzed, and the rule for it: what is read, or one clear error; nothing else, and in bounds."""

import dataclasses
import pathlib
import resource
import signal
import traceback
from collections.abc import Callable, Iterable

from bitladder.errors import BitladderError

SECONDS = 5.0  # of the CPU for one input
BYTES = 1 << 30  # of memory for the whole process
LONGEST_LINE = 4000  # characters of an error


@dataclasses.dataclass(frozen=True)
class Place:
    """Folders: `prepared` has what is made once for all inputs and is not changed, `scratch` is for one input."""

    prepared: pathlib.Path
    scratch: pathlib.Path

    def file(self, name: str, data: bytes) -> pathlib.Path:
        """A file of the scratch folder with these bytes."""
        path = self.scratch / name
        path.write_bytes(data)
        return path


@dataclasses.dataclass(frozen=True)
class Parser:
    """A parser. The first byte of an input chooses one of the `names` of files, the others are its content.

    Parameters:
        name: its name on the command line.
        read: reads a file of that name and content, and uses all that was read.
        seeds: files that it takes, as (name, content).
        names: the names of files.
        prepares: whether it needs what `prepare` makes.
    """

    name: str
    read: Callable[[Place, str, bytes], None]
    seeds: Callable[[Place], Iterable[tuple[str, bytes]]]
    names: tuple[str, ...]
    prepares: bool = False

    def inputs(self, place: Place) -> list[bytes]:
        """The seeds as inputs."""
        return [bytes([self.names.index(name)]) + data for name, data in self.seeds(place)]

    def split(self, data: bytes) -> tuple[str, bytes]:
        """The name and the content that an input stands for."""
        return self.names[(data[0] if data else 0) % len(self.names)], data[1:]


class RuleError(Exception):
    """An input broke the rule without an exception of its own."""


class _TooLongError(BaseException):
    """Not an Exception, so that no parser takes it for a damaged file."""


def _alarm(number: int, frame: object) -> None:
    raise _TooLongError


def apply(parser: Parser, place: Place, data: bytes) -> bool:
    """Lets a parser read an input. Returns whether it was taken, and not refused.

    Raises:
        Exception: what the parser raised beside its own error.
        RuleError: it took too long or too much memory, or its error is no clear line.
    """
    name, content = parser.split(data)
    before = signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        parser.read(place, name, content)
        taken = True
    except BitladderError as error:
        taken = False
        if not str(error) or len(str(error)) > LONGEST_LINE:
            raise RuleError(f"an error of {len(str(error))} characters") from error
    except _TooLongError as error:
        raise RuleError(f"more than {SECONDS:.0f} s of the CPU") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if memory() > BYTES:
        raise RuleError(f"{memory() >> 20} MiB of memory")
    return taken


def memory() -> int:
    """The most bytes that the process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def signature(error: BaseException) -> str:
    """A name for the kind of an error: its type, and the last line of bitladder that it went through."""
    chain = [error] if error.__cause__ is None or not isinstance(error, RuleError) else [error, error.__cause__]
    frames = [frame for part in chain for frame in traceback.extract_tb(part.__traceback__)]
    ours = [frame for frame in frames if "bitladder" in pathlib.Path(frame.filename).parts] or frames
    where = f"{pathlib.Path(ours[-1].filename).stem}-{ours[-1].lineno}" if ours else "nowhere"
    return f"{type(error).__name__}-{where}"
