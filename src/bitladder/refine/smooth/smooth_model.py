"""Writing a smoothed model: the same tensors and types, with scales moved between them, and proof that it computes
what the first one did.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Imatrix, read_imatrix, write_imatrix
from bitladder.engine.context import logit_differences, sequence_logits
from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing, sha256_file
from bitladder.gguf.reader import GgufFile
from bitladder.gguf.values import string
from bitladder.gguf.writer import GgufWriter, TensorPlan
from bitladder.progress import SILENT, Progress
from bitladder.quantize import DROPPED
from bitladder.refine.smooth.changes import Change, changed_imatrix, changed_rows, changes_of
from bitladder.refine.smooth.links import FLOATS, Link, SmoothingError, links_of
from bitladder.refine.smooth.order import Order, find_order
from bitladder.refine.smooth.pieces import column_squares
from bitladder.refine.smooth.scales import balance

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
KEY = "bitladder.smooth.imatrix.sha256"
# Of the logits' range. Products are the same but for what F16 rounds, which leaves 0.002 in 30 blocks; a scale that
# went astray in one of them left 0.1.
TOLERANCE = 0.01
CHECKED_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class SmoothResult:
    """The file, the importance matrix of its inputs, links used by kind, by what the order of channels multiplies the
    error of the head's rounded inputs (None: the order stayed), how far logits moved at most, as a fraction of their
    range, and what was done to each tensor."""

    path: pathlib.Path
    imatrix: pathlib.Path
    links: dict[str, int]
    head_noise: float | None
    moved: float
    changes: dict[str, Change] = dataclasses.field(repr=False)


def smooth_model(
    model: str | os.PathLike[str],
    imatrix: str | os.PathLike[str],
    out: str | os.PathLike[str],
    imatrix_out: str | os.PathLike[str],
    *,
    scales: bool = True,
    order: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SmoothResult:
    """Write a model whose channels are balanced (`balance`) and ordered (`order.find_order`), and the importance matrix
    of its inputs.

    Parameters: `model` an F32, F16 or BF16 GGUF; `imatrix` of its inputs; `scales` and `order` say which of the two is
    done. The logits of some tokens are compared; a kind of link that changes them is left out, with a warning, and so
    is the order. Raises SmoothingError for quantized weights, and if nothing can change or keeps the logits;
    BitladderError for an imatrix of another model and for scales that overflow.
    """
    out, imatrix_out = pathlib.Path(out), pathlib.Path(imatrix_out)
    digest, matrix = sha256_file(imatrix), read_imatrix(imatrix)
    with GgufFile(model) as file:
        for path in (out, imatrix_out):
            if path.exists() and any(path.samefile(one) for one in (*file.parts, pathlib.Path(imatrix))):
                raise UsageError(f"{path} is an input; name another output")
        if file.get(KEY):
            raise BitladderError(f"{file.path} is smoothed already")
        _refuse_other_imatrix(file, matrix, imatrix)
        found = _Parts(
            _scales(file, _links(file, matrix, imatrix), matrix, progress) if scales else [],
            find_order(file, threads=threads) if order else None,
        )
        if not found.names():
            raise SmoothingError(
                f"{file.path}: no other order of channels is known to be better; one is sought where embeddings are "
                "the head and their width is a multiple of 256"
            )
        before = _Logits(file.path, threads)
        with replacing(out) as temporary:
            moved = before.moved(_write(file, digest, found.changes(), temporary, progress))
            if moved > TOLERANCE:
                found = found.only(
                    [
                        name
                        for name in found.names()
                        if before.neutral(_write(file, digest, found.only([name]).changes(), temporary))
                    ]
                )
                progress.warn(
                    f"{file.path.name} reads channels elsewhere too: only {', '.join(found.names()) or 'nothing'} "
                    "can change"
                )
                moved = before.moved(_write(file, digest, found.changes(), temporary, progress))
            if not found.names() or moved > TOLERANCE:
                raise SmoothingError(f"{file.path}: no scale can move without changing the logits; do not smooth it")
    changes = found.changes()
    write_imatrix(changed_imatrix(matrix, changes), imatrix_out)
    noise = None if found.order is None else found.order.noise
    return SmoothResult(out, imatrix_out, found.links(), noise, moved, changes)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What can be done to a model: scales by link, and an order."""

    scales: list[tuple[Link, Floats]]
    order: Order | None

    def names(self) -> list[str]:
        """Kinds of links, and "order"."""
        return [*dict.fromkeys(link.kind for link, _ in self.scales), *(["order"] if self.order else [])]

    def only(self, names: Sequence[str]) -> "_Parts":
        """A part of it."""
        kept = [(link, scale) for link, scale in self.scales if link.kind in names]
        return _Parts(kept, self.order if "order" in names else None)

    def links(self) -> dict[str, int]:
        """How many links of each kind."""
        return dict(collections.Counter(link.kind for link, _ in self.scales))

    def changes(self) -> dict[str, Change]:
        return changes_of(self.scales, self.order)


def _refuse_other_imatrix(file: GgufFile, matrix: Imatrix, path: str | os.PathLike[str]) -> None:
    """An order needs no entry of any link, but it moves columns of all of them."""
    for name, entry in matrix.entries.items():
        tensor = file.tensors.get(name)
        if tensor is not None and entry.sums.shape[1] != tensor.width:
            raise BitladderError(f"{path} belongs to another model: {name} has {entry.sums.shape[1]} columns there")
    if not matrix.entries.keys() & file.tensors.keys():
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")


def _links(file: GgufFile, matrix: Imatrix, path: str | os.PathLike[str]) -> list[Link]:
    links = [link for link in links_of(file) if _importance(matrix, link) is not None]
    if not links:
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")
    for link in links:
        _refuse_quantized(file, link)
    return links


def _scales(file: GgufFile, links: Sequence[Link], imatrix: Imatrix, progress: Progress) -> list[tuple[Link, Floats]]:
    found = []
    total = sum(file.tensors[name].elements for link in links for name in link.readers)
    with progress.task("balance channels", total) as task:
        for link in links:
            importance = _importance(imatrix, link)
            assert importance is not None
            squares = sum(column_squares(file, file.tensors[name], link.matrices, task) for name in link.readers)
            shape = (link.matrices, link.groups, link.repeats, link.size)
            shared = [np.asarray(one, np.float64).reshape(shape).sum(2) for one in (importance, squares)]
            rows = []
            for matrix in range(link.matrices):
                inputs, weights = (one[matrix].reshape(-1) for one in shared)
                rows.append(balance(inputs, weights))
            made = np.stack(rows).reshape(link.matrices, link.groups, 1, link.size)
            found.append((link, np.broadcast_to(made, shape).reshape(link.matrices, -1)))
    return found


def _importance(imatrix: Imatrix, link: Link) -> Doubles | None:
    """Mean squares of a link's channels, [matrices, channels], up to a factor; None if no reader has an entry.

    Experts that no token reached are taken to be like the others.
    """
    for name in link.readers:
        entry = imatrix.entries.get(name)
        if entry is None:
            continue
        sums = np.asarray(entry.sums, np.float64)
        if sums.shape[1] != link.groups * link.repeats * link.size or (link.matrices > 1 and len(sums) < link.matrices):
            raise BitladderError(f"the imatrix belongs to another model: {name} has {sums.shape[1]} columns there")
        whole: Doubles = sums.sum(axis=0)
        if link.matrices == 1:
            return whole[None]
        reached = sums.sum(axis=1, keepdims=True) > 0
        return np.asarray(np.where(reached, sums, whole))
    return None


def _write(
    file: GgufFile,
    digest: str,
    changes: Mapping[str, Change],
    path: pathlib.Path,
    progress: Progress = SILENT,
) -> pathlib.Path:
    metadata = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    metadata[KEY] = string(digest)
    plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
    with path.open("wb") as stream, progress.task("write the smoothed model", file.tensor_bytes) as task:
        writer = GgufWriter(stream, metadata, plans)
        for name, tensor in file.tensors.items():
            task.note(name)
            for data in changed_rows(file, tensor, changes.get(name, Change())):
                writer.write(name, data)
                task.advance(data.nbytes)
        writer.finish()
    return path


def _refuse_quantized(file: GgufFile, link: Link) -> None:
    for name in (*link.makers, *link.readers):
        kind = file.tensors[name].type.name
        if kind not in FLOATS:
            raise SmoothingError(
                f"{file.path}: {name} is {kind}; scales move between F32, F16 or BF16 weights only, so smooth the "
                "full-precision model"
            )


class _Logits:
    """The logits of a model, to compare others' with."""

    def __init__(self, path: pathlib.Path, threads: int | None) -> None:
        self._threads = threads
        self._logits = self._compute(path)

    def moved(self, path: pathlib.Path) -> float:
        """The largest difference from another file's logits, as a fraction of the range of ours at the position."""
        return float(logit_differences(self._compute(path), self._logits).max())

    def neutral(self, path: pathlib.Path) -> bool:
        """Whether another file computes the same."""
        return self.moved(path) <= TOLERANCE

    def _compute(self, path: pathlib.Path) -> Floats:
        with GgufFile(path) as file:
            vocabulary = file.tensors["token_embd.weight"].shape[1]
        tokens = np.random.default_rng(0).integers(0, vocabulary, CHECKED_TOKENS).astype(np.int32)
        return sequence_logits(path, tokens, threads=self._threads)
