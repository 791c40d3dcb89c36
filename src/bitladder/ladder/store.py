"""The run directory as a store of steps: what is complete is not done again, what is cut short is never taken for it.

A step is keyed by a hash of everything it depends on: the contents of the files it reads, the options that decide
its result, the versions of its algorithms, the library. Files are written under a temporary name and renamed; the
manifest's entry comes after them. So whenever a run is killed, either the entry is there and the files are whole, or
the step is done again.
Paths are in no key: a run directory can be moved.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bitladder.errors import BitladderError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import joined_sha256, shards_of
from bitladder.keys import key_of
from bitladder.ladder.steps.step import Product
from bitladder.progress import SILENT, Progress
from bitladder.rundir import CachedHash, Layout, Manifest, OutputFile, RunRecord, StepRecord, load_manifest


class Store:
    """An open run directory; `made` names the steps that were really done since it was opened. See `open_store`."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, progress: Progress) -> None:
        self.folder = folder
        self.manifest = manifest
        self.made: list[str] = []
        self._progress = progress
        self._changed = False

    def begin(self, run: RunRecord) -> None:
        """Note what this run is asked for. Until `finish`, the directory counts as incomplete if anything changed."""
        last = self.manifest.run
        if last is None or last.model_copy(update={"complete": False}) != run:
            self.manifest.run = run
            self._save()

    def finish(self) -> None:
        """All steps of the run are done."""
        run = self.manifest.run
        if run is not None and not run.complete:
            self.manifest.run = run.model_copy(update={"complete": True})
            self._changed = True
        if self._changed:
            self._save()

    def ensure(self, name: str, inputs: Mapping[str, Any], work: Callable[[], Product]) -> StepRecord:
        """The record of step `name`, after doing `work` if it is not complete with exactly these `inputs` (JSON)."""
        inputs = {"step": name, **inputs}
        key = key_of(inputs)
        last = self.manifest.steps.get(name)
        if last is not None:
            reason = self._why_again(last, key, inputs)
            if reason is None:
                return last
            self._progress.info(f"{name}: made again, because {reason}")
        run = self.manifest.run
        if run is not None and run.complete:
            self.manifest.run = run.model_copy(update={"complete": False})
            self._save()
        began = time.monotonic()
        product = work()
        seconds = round(time.monotonic() - began, 3)
        outputs = [self._output(path) for path in product.files]
        record = StepRecord(key=key, inputs=inputs, outputs=outputs, facts=dict(product.facts), seconds=seconds)
        self.manifest.steps[name] = record
        self._save()
        self.made.append(name)
        self._tell_left_over(last, record)
        return record

    def present(self) -> list[str]:
        """The steps whose files are all there, made of whatever."""
        steps = self.manifest.steps.items()
        return [name for name, step in steps if all(self.path(output).is_file() for output in step.outputs)]

    def path(self, output: OutputFile) -> pathlib.Path:
        """Where a recorded file is."""
        return self.folder / output.path

    def sha256(self, path: pathlib.Path, label: str) -> str:
        """The content hash of a file, read again only if its size, time of change or inode differ from last time.

        `label` names the file in the cache: a path relative to the run directory, or a name for one outside of it.
        The first shard of a split model stands for all of them (see shards.joined_sha256).
        """
        parts = shards_of(path)
        if len(parts) > 1:
            return joined_sha256([self._sha256(part, f"{label}: {part.name}") for part in parts])
        return self._sha256(path, label)

    def _sha256(self, path: pathlib.Path, label: str) -> str:
        try:
            status = path.stat()
        except OSError as error:
            raise BitladderError(f"cannot read {path}: {error.strerror}") from error
        seen = (status.st_size, status.st_mtime_ns, status.st_ino)
        cached = self.manifest.hashes.get(label)
        if cached is None or (cached.bytes, cached.mtime_ns, cached.inode) != seen:
            cached = CachedHash(bytes=seen[0], mtime_ns=seen[1], inode=seen[2], sha256=sha256_file(path))
            self.manifest.hashes[label] = cached
            self._changed = True
        return cached.sha256

    def _output(self, path: pathlib.Path) -> OutputFile:
        label = path.relative_to(self.folder).as_posix()
        return OutputFile(path=label, bytes=path.stat().st_size, sha256=self.sha256(path, label))

    def _why_again(self, last: StepRecord, key: str, inputs: Mapping[str, Any]) -> str | None:
        """Why a recorded step does not count, in words; None if it does."""
        if last.key != key:
            return f"{' and '.join(_differing(last.inputs, inputs)) or 'its key'} changed"
        for output in last.outputs:
            path = self.path(output)
            if not path.is_file():
                return f"{output.path} is missing"
            if path.stat().st_size != output.bytes or self.sha256(path, output.path) != output.sha256:
                return f"{output.path} was changed after it was written"
        return None

    def _tell_left_over(self, last: StepRecord | None, record: StepRecord) -> None:
        """Files that an earlier form of the step made under other names are the user's to keep or delete."""
        names = {output.path for output in record.outputs}
        for output in last.outputs if last and names else []:
            if output.path not in names and self.path(output).exists():
                self._progress.info(f"{output.path} is from an earlier run and no longer part of the ladder")

    def _save(self) -> None:
        self.manifest.save(self.folder)
        self._changed = False


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of inputs that differ; of options and versions, their own names."""
    names: list[str] = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name in ("options", "versions") and isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{name.removesuffix('s')} {part}" for part in {**old, **new} if old.get(part) != new.get(part)]
        else:
            names.append(name)
    return names


@contextlib.contextmanager
def open_store(
    folder: pathlib.Path, *, keep: pathlib.Path | None = None, progress: Progress = SILENT
) -> Iterator[Store]:
    """Open (or create) a run directory under its lock, without what a killed run left half-written.

    `keep` is a file that may lie there beforehand (the model itself, with all its shards). Raises UsageError if the
    directory holds files that no run has made, BitladderError if another run is at work there or the manifest is
    damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--out {folder} is a file; name a directory") from None
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from error
    with locked(folder):
        manifest = load_manifest(folder)
        if manifest is None:
            _refuse_strangers(folder, keep)
            manifest = Manifest()
            manifest.save(folder)
        _sweep(folder)
        yield Store(folder, manifest, progress)


def _refuse_strangers(folder: pathlib.Path, keep: pathlib.Path | None) -> None:
    kept = shards_of(keep) if keep is not None else ()
    for pattern in Layout(folder).written_by_runs():
        for path in sorted(folder.glob(pattern)):
            if not any(part.exists() and path.samefile(part) for part in kept):
                raise UsageError(
                    f"--out {folder} already has {path.name}, which bitladder run did not make; name another directory"
                )


def _sweep(folder: pathlib.Path) -> None:
    """Removes what a killed run was writing: files and folders called .NAME.tmp. The lock is held."""
    layout = Layout(folder)
    places = [path for place in layout.with_temporary_files() for path in place.glob(".*.tmp")]
    for path in [*places, *layout.work.rglob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the directory's lock. The system gives it back when the process ends, however it ends.

    Raises BitladderError, with the number of the process that holds it, if another run is at work there.
    """
    descriptor = _open_lock(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            # Nobody else can hold it now; a killed run leaves the file, which does no harm.
            Layout(folder).lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open_lock(folder: pathlib.Path) -> int:
    """The lock file, opened and locked."""
    path = Layout(folder).lock
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BitladderError(f"cannot write in {folder}: {error.strerror}") from error
        if not _lock(descriptor):
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise BitladderError(f"another bitladder runs in {folder} (process {holder}); wait until it ends")
        # The last holder may have removed the file after it was opened here: then the lock is on no name any more.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if sys.platform == "win32":  # no advisory locks of this kind there
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have no locks at all: better without one than not to run there.
        return True
    return True
