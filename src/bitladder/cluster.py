"""A Dask cluster as `Machines`: the only module that knows Dask (extra: cluster).

Before any work every worker is asked what it has installed and whether it sees the files of the run. A task asks again
where it begins, because a worker can join at any time.
"""

import contextlib
import importlib.metadata
import logging
import pathlib
import platform
import socket
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import TYPE_CHECKING, Any

from bitladder.engine import CPU, give_back_memory, kernels, processors, threads_available, versions
from bitladder.errors import BitladderError, UsageError, in_one_line
from bitladder.exchange import FLAG as SHARE
from bitladder.exchange import reaches, remove_objects, write_object
from bitladder.files import write_text
from bitladder.machines import Machines
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    from distributed import Client

FLAG = "--cluster"
CONNECT = 15  # seconds in which a scheduler must answer
WORKER = 60  # seconds in which the first worker must be there
# Packages whose versions decide bytes, or what is collected, beside those of `engine.versions`.
DECIDING = ("numpy", "numba", "torch", "transformers")
# Deaths of workers under one task after which the task is to blame: Dask's default.
DEATHS = 4


@contextlib.contextmanager
def connected(
    address: str,
    folder: pathlib.Path,
    files: Sequence[pathlib.Path] = (),
    *,
    share: str | None = None,
    last: Callable[[], None] | None = None,
    progress: Progress = SILENT,
) -> Iterator[Machines]:
    """The workers of a Dask cluster, after all of them were checked.

    Parameters:
        address: of the scheduler, such as tcp://10.0.0.1:8786, or the path of its scheduler file.
        folder: that all share.
        files: further files that all must see.
        share: URL below which files are exchanged instead. A folder there is made, and removed in the end.
        last: is called on each worker in the end. It must be importable there.
        progress: gets a warning of workers whose processor is another one.

    Raises:
        UsageError: Dask is not installed, nobody answers, or there is no worker.
        BitladderError: a worker has other versions, does not see a file, or does several tasks at once.
    """
    folder = folder.resolve()
    mark = folder / f".cluster-{uuid.uuid4().hex}.tmp"  # what a killed run leaves is swept
    own = None if share is None else f"{share.rstrip('/')}/{uuid.uuid4().hex}"
    with _client(address) as client:
        try:
            if own is None:
                write_text(mark, mark.name)
                sees = [str(path.resolve()) for path in (mark, *files)]
            else:
                sees = [f"{own}/mark"]
                write_object(sees[0], mark.name)
            needed = {"versions": installed(), "sees": sees}
            threads = _check(client, address, needed, progress)
            executor = _Workers(client, address, needed)
            try:
                yield Machines(executor, len(threads), max(threads), lambda: len(client.nthreads()), own)
            finally:
                executor.shutdown(wait=False)
                if last is not None:
                    with contextlib.suppress(Exception):  # of workers that have gone
                        client.run(last, on_error="ignore")
        finally:
            mark.unlink(missing_ok=True)
            if own is not None:
                remove_objects(own)


def installed() -> dict[str, str]:
    """The versions that decide bytes, by name; "none" for a package that is not installed."""
    by_name = {"Python": ".".join(platform.python_version_tuple()[:2]), **versions()}
    for name in DECIDING:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = "none"
    return by_name


def describe(sees: Sequence[str]) -> dict[str, Any]:
    """What a worker says of itself: its host, versions, processor and threads, and which of some files it lacks."""
    return {
        "host": socket.gethostname(),
        "versions": installed(),
        "processor": f"{processors(CPU)} ({kernels()})",
        "threads": threads_available(),
        "lacks": _lacking(sees),
    }


def _lacking(sees: Sequence[str]) -> list[str]:
    return [path for path in sees if not (reaches(path) if "://" in path else pathlib.Path(path).is_file())]


def why_unfit(worker: Mapping[str, Any], needed: Mapping[str, Any]) -> str | None:
    """Why a worker cannot take part, from what it says (`describe`); None if it can."""
    theirs, ours = worker["versions"], needed["versions"]
    differing = [name for name, version in ours.items() if theirs.get(name) != version]
    if differing:
        other = ", ".join(f"{name} {theirs.get(name, 'none')} and not {ours[name]}" for name in differing)
        return f"has {other}; install the same versions on all machines"
    if worker["lacks"] and "://" in worker["lacks"][0]:
        url = worker["lacks"][0].rsplit("/", 2)[0]
        return f"does not reach {SHARE} {url}; give it access, and the package that fsspec needs for such a URL"
    if needed["sees"][0] in worker["lacks"]:
        folder = pathlib.Path(needed["sees"][0]).parent
        return (
            f"does not see the run directory {folder}; put --out on a file system that all machines share, or give "
            f"{SHARE} URL"
        )
    if worker["lacks"]:
        return f"does not see {worker['lacks'][0]}; put it on a file system that all machines share"
    return None


@contextlib.contextmanager
def _client(address: str) -> Iterator["Client"]:
    try:
        import dask
        import distributed
    except ImportError as error:
        raise UsageError(f"{FLAG} needs Dask: pip install 'bitladder[cluster]'") from error
    # What goes wrong is told in one line by who meets it.
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)
    file = pathlib.Path(address)
    where = {"scheduler_file": str(file)} if file.is_file() else {"address": address}
    # One that does not come to be waits half a minute when it is forgotten, and prints a traceback.
    kind = type("Client", (distributed.Client,), {"__del__": lambda _: None})
    # The texts of a run go with each task: some MB.
    settings = dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})
    try:
        with settings:
            try:
                client = kind(**where, timeout=CONNECT, set_as_default=False)
            except (OSError, TimeoutError, ValueError, TypeError) as error:
                reason = in_one_line(error)
                raise UsageError(f"{FLAG} {address}: no Dask scheduler answers there ({reason})") from error
            with contextlib.closing(client):
                yield client
    finally:
        log.setLevel(level)


def _check(client: "Client", address: str, needed: Mapping[str, Any], progress: Progress) -> list[int]:
    """The threads of each worker, after all were found fit."""
    with contextlib.suppress(TimeoutError):
        client.wait_for_workers(1, timeout=WORKER)
    tasks: dict[str, int] = client.nthreads()
    if not tasks:
        start = f"dask worker {address} --nthreads 1 --memory-limit 0"
        raise UsageError(f"{FLAG} {address}: the scheduler has no worker; start one with: {start}")
    if several := [worker for worker, count in tasks.items() if count > 1]:
        raise BitladderError(
            f"{FLAG}: the worker {several[0]} does {tasks[several[0]]} tasks at once, and each takes all its threads; "
            "start it with --nthreads 1 --memory-limit 0"
        )
    # Asked first without our code, which a worker may not have.
    for worker, version in client.run(importlib.metadata.version, "bitladder", on_error="return").items():
        if isinstance(version, BaseException):
            raise BitladderError(f"{FLAG}: the worker {worker} has no bitladder; install the same version there")
    workers = client.run(describe, needed["sees"], on_error="return")
    own = describe(())
    for worker, described in workers.items():
        if isinstance(described, BaseException):
            raise BitladderError(
                f"{FLAG}: the worker {worker} cannot load bitladder: {' '.join(str(described).split())}"
            )
        if reason := why_unfit(described, needed):
            raise BitladderError(f"{FLAG}: the worker {worker} ({described['host']}) {reason}")
    if others := [described["host"] for described in workers.values() if described["processor"] != own["processor"]]:
        progress.warn(
            f"{FLAG}: {', '.join(dict.fromkeys(others))} have another processor than this machine; the last bits of "
            "what they compute may differ, and so files from those of this machine alone"
        )
    return [described["threads"] for described in workers.values()]


class _Workers(Executor):
    """Tasks on the workers of a cluster, with checks before each task, and errors of one line.

    Unlike Dask's own executor it lets go of a result once it is here: a task whose result died with a worker would be
    done again, though nobody wants it.
    """

    def __init__(self, client: "Client", address: str, needed: Mapping[str, Any]) -> None:
        self._client, self._address, self._needed = client, address, needed
        self._tasks: weakref.WeakSet[Any] = weakref.WeakSet()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `concurrent.futures.Executor`."""
        task = self._client.submit(on_worker, self._needed, fn, args, kwargs, pure=False)
        self._tasks.add(task)
        future: Future[Any] = Future()
        task.add_done_callback(lambda _: self._pass_on(task, future))
        future.add_done_callback(lambda _: task.cancel() if future.cancelled() else None)
        return future

    def _pass_on(self, task: Any, future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(task.result())
        except CancelledError:
            future.set_exception(
                BitladderError(f"{FLAG} {self._address}: the scheduler has gone; give the command again to go on")
            )
        except BaseException as error:
            future.set_exception(_in_words(error))
        finally:
            task.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor`. Without `wait` what is at work is cancelled too."""
        tasks = list(self._tasks)
        if wait and not cancel_futures:
            for task in tasks:
                task.exception()
        else:
            self._client.cancel(tasks)


def _in_words(error: BaseException) -> BaseException:
    """An error of Dask's as one of ours; any other as it is."""
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return BitladderError(
            f"{FLAG}: {DEATHS} workers died at the same task, the last on {error.last_worker.address}; look into "
            "its log (for want of memory, take larger machines or fewer threads)"
        )
    return error


def on_worker(needed: Mapping[str, Any], fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls a function on a worker, if the worker is fit. Raises BitladderError if it is not."""
    described = {"versions": installed(), "lacks": _lacking(needed["sees"])}
    if reason := why_unfit(described, needed):
        raise BitladderError(f"{FLAG}: a worker on {socket.gethostname()} {reason}")
    try:
        return fn(*args, **kwargs)
    finally:
        give_back_memory()  # a worker lives on
