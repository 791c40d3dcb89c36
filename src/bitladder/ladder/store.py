"""The run directory as a store of steps. A complete step is not done again.

A step has a key: a hash of the contents of the files that it reads, the options that decide its result, the versions of
its algorithms, and the library. Files are written under a temporary name and renamed. The entry in the manifest comes
after them. If a run is killed, either the entry is there and the files are whole, or the step is done again. No key has
a path in it, so a run directory can be moved.
"""

import contextlib
import errno
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
from bitladder.units import listed


class Store:
    """An open run directory (`open_store`). `made` names the steps that did work since it was opened."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, progress: Progress) -> None:
        self.folder = folder
        self.manifest = manifest
        self.made: list[str] = []
        self._progress = progress
        self._changed = False

    def begin(self, run: RunRecord) -> None:
        """Records the run. If its record differs from the last one, the directory is incomplete until `finish`."""
        last = self.manifest.run
        if last is None or last.model_copy(update={"complete": False}) != run:
            self._reopen(run)

    def withdraw(self) -> None:
        """Takes the record of a run that is refused back. The last one that was complete, if any, counts again."""
        self.manifest.run, self.manifest.before = self.manifest.before, None
        self._save()

    def finish(self) -> None:
        """Records that all steps of the run are complete, and removes what unfinished steps left."""
        run = self.manifest.run
        if run is not None and not run.complete:
            self.manifest.run, self.manifest.before = run.model_copy(update={"complete": True}), None
            self._changed = True
        if self._changed:
            self._save()
        # Every step is complete: unfinished work is of steps that this run does not have, or has with other options.
        for path in Layout(self.folder).unfinished():
            shutil.rmtree(path, ignore_errors=True)
        _sweep(self.folder)  # of machines that died

    def complete(self, name: str, inputs: Mapping[str, Any]) -> StepRecord | None:
        """The record of a step that `ensure` would not do, or None."""
        last = self.manifest.steps.get(name)
        return last if last is not None and self._why_again(last, {"step": name, **inputs}) is None else None

    def ensure(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[], Product], *, whole: bool = False
    ) -> StepRecord:
        """Does a step unless it is complete with the same inputs.

        Parameters:
            name: name of the step.
            inputs: everything that the result depends on, as JSON.
            work: does the step.
            whole: whether a step is not complete if files of it were deleted in the work folder.

        Returns:
            The record of the step.
        """
        inputs = {"step": name, **inputs}
        last = self.manifest.steps.get(name)
        if last is not None:
            reason = self._why_again(last, inputs, whole=whole)
            if reason is None:
                return last
            self._progress.info(f"{name}: made again, because {reason}")
        run = self.manifest.run
        if run is not None and run.complete:
            self._reopen(run.model_copy(update={"complete": False}))
        began = time.monotonic()
        product = work()
        seconds = round(time.monotonic() - began, 3) if product.seconds is None else product.seconds
        outputs = [self._output(path) for path in product.files]
        record = StepRecord(
            key=key_of(inputs), inputs=inputs, outputs=outputs, facts=dict(product.facts), seconds=seconds
        )
        self.manifest.steps[name] = record
        self._save()
        self.made.append(name)
        self._tell_left_over(last, record)
        return record

    def _reopen(self, run: RunRecord) -> None:
        """Records a run that is not complete, and keeps the record of the last one that was."""
        if self.manifest.run is not None and self.manifest.run.complete:
            self.manifest.before = self.manifest.run
        self.manifest.run = run
        self._save()

    def release(self, record: StepRecord) -> None:
        """Deletes the files of a step that are in the work folder."""
        for output in record.outputs:
            path = self.path(output)
            if self._in_work(output) and path.is_file():
                path.unlink()
                self._progress.info(f"{output.path} is deleted: no later step reads it")

    def _in_work(self, output: OutputFile) -> bool:
        return self.path(output).is_relative_to(Layout(self.folder).work)

    def path(self, output: OutputFile) -> pathlib.Path:
        """The path of a recorded file."""
        return self.folder / output.path

    def sha256(self, path: pathlib.Path, label: str) -> str:
        """The content hash of a file. The file is read again only if its size, time of change or inode changed.

        Parameters:
            path: the file. The first shard of a split model stands for all shards (`gguf.joined_sha256`).
            label: the name of the file in the cache: a path relative to the run directory, or a name for a file
                outside of it.
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

    def _why_again(self, last: StepRecord, inputs: Mapping[str, Any], *, whole: bool = False) -> str | None:
        """The reason why a recorded step is not valid; None if it is valid."""
        if last.key != key_of(inputs):
            return _difference(last.inputs, inputs)
        for output in last.outputs:
            path = self.path(output)
            if not path.is_file():
                if not whole and self._in_work(output):
                    continue
                return f"{output.path} is missing"
            if path.stat().st_size != output.bytes or self.sha256(path, output.path) != output.sha256:
                return f"{output.path} was changed after it was written"
        return None

    def _tell_left_over(self, last: StepRecord | None, record: StepRecord) -> None:
        """Names the files that the step wrote before under other names. The user can delete them."""
        names = {output.path for output in record.outputs}
        for output in last.outputs if last and names else []:
            if output.path not in names and self.path(output).exists():
                self._progress.info(f"{output.path} is from an earlier run and no longer part of the ladder")

    def _save(self) -> None:
        self.manifest.save(self.folder)
        self._changed = False


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between inputs, such as "option n changed" or "plan Q4_K_M was left out"."""
    names = _differing(before, now)
    added = [name for name in names if name in now and name not in before]
    gone = [name for name in names if name in before and name not in now]
    changed = [name for name in names if name not in (*added, *gone)]
    parts = [f"{listed(changed)} changed"] if changed else []
    for those, what in ((added, "added"), (gone, "left out")):
        if those:
            parts.append(f"{listed(those)} {'was' if len(those) == 1 else 'were'} {what}")
    return ", ".join(parts) or "its key changed"


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of inputs that differ. Of options and versions these are the names within them."""
    names: list[str] = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name in ("options", "versions") and isinstance(old, Mapping) and isinstance(new, Mapping):
            parts = [part for part in {**old, **new} if old.get(part) != new.get(part)]
            if before.keys() != now.keys():  # what a list of options has for steps that were added is told with these
                parts = [part for part in parts if not _grew(old.get(part), new.get(part))]
            names += [f"{name.removesuffix('s')} {part}" for part in parts]
        else:
            names.append(name)
    return names


def _grew(old: Any, new: Any) -> bool:
    """Whether one of two lists has all that the other one has."""
    if not (isinstance(old, list) and isinstance(new, list)):
        return False
    return all(part in new for part in old) or all(part in old for part in new)


@contextlib.contextmanager
def open_store(
    folder: pathlib.Path, *, keep: pathlib.Path | None = None, progress: Progress = SILENT
) -> Iterator[Store]:
    """Opens or creates a run directory under its lock, and removes temporary files of a killed run.

    A run that is refused before it begins leaves no directory.

    Parameters:
        folder: the directory.
        keep: a file that can be there beforehand: the model, with all its shards.
        progress: gets remarks.

    Raises:
        UsageError: the directory has files that are not of a run.
        BitladderError: another run is at work there, or the manifest is damaged.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--out {folder} is a file; name a directory") from None
    except OSError as error:
        kind = UsageError if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) else BitladderError
        raise kind(f"--out {folder} cannot be made: {error.strerror}") from error
    try:
        with locked(folder):
            manifest = load_manifest(folder)
            if manifest is None:
                _refuse_strangers(folder, keep)
                manifest = Manifest()
                manifest.save(folder)
            _sweep(folder)
            try:
                yield Store(folder, manifest, progress)
            except BaseException:
                if manifest.run is None and not manifest.steps:  # the run was refused
                    Layout(folder).manifest.unlink(missing_ok=True)
                raise
    finally:
        if new:
            with contextlib.suppress(OSError):  # it has files of a run that began
                folder.rmdir()


def _refuse_strangers(folder: pathlib.Path, keep: pathlib.Path | None) -> None:
    kept = shards_of(keep) if keep is not None else ()
    for pattern in Layout(folder).written_by_runs():
        for path in sorted(folder.glob(pattern)):
            if not any(part.exists() and path.samefile(part) for part in kept):
                raise UsageError(
                    f"--out {folder} already has {path.name}, which bitladder run did not make; name another directory"
                )


def _sweep(folder: pathlib.Path) -> None:
    """Removes what a killed run was writing: files and folders called .NAME.tmp. The lock is held.

    Unfinished work without its key goes too, since nothing says what it is of.
    """
    layout = Layout(folder)
    places = [path for place in layout.with_temporary_files() for path in place.glob(".*.tmp")]
    damaged = [path for path in layout.unfinished() if not (path / "key").is_file()]
    for path in [*places, *layout.work.rglob(".*.tmp"), *damaged]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the directory. The system releases it when the process ends.

    Raises BitladderError with the number of the process if another run is at work there.
    """
    descriptor = _open_lock(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            # A killed run leaves the file, which does no harm. So does a disk that can no longer be written to.
            with contextlib.suppress(OSError):
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
        # If the last holder removed the file after it was opened here, the lock is on a file without a name.
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
        # Some network file systems have no locks. The run works there without one.
        return True
    return True
