"""Collecting an importance matrix: decode texts, watch every multiplication, add up the squares of its inputs.

Which inputs count, and how, follows llama-imatrix: weights of blocks (and the output head on request), dense inputs
of at least 16 tokens, experts token by token.
"""

import dataclasses
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model, Tokens
from bitladder.engine.native import versions
from bitladder.engine.observe import Multiplication
from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing, sha256_bytes
from bitladder.gguf.names import in_main_block
from bitladder.gguf.reader import GgufFile
from bitladder.progress import SILENT, Progress
from bitladder.text.chunks import text_chunks
from bitladder.text.texts import Text

Floats = npt.NDArray[np.float32]
SAVE_SECONDS = 60.0
MIN_CTX = 16


@dataclasses.dataclass(frozen=True)
class ImatrixOptions:
    """What decides the result: chunks of `n_ctx` tokens, how many of each text, which one is first, which weights."""

    n_ctx: int = 512
    chunks: int | None = None
    from_chunk: int = 0
    parse_special: bool = False
    process_output: bool = False


@dataclasses.dataclass(frozen=True)
class ImatrixResult:
    """The file, how many weights it covers, how many chunks were read, and experts without data by weight."""

    path: pathlib.Path
    entries: int
    chunks: int
    gaps: dict[str, list[int]]


class Collector:
    """The observer that adds up. Sums of one batch are float32, the total float64, so that no token is lost in it."""

    def __init__(self, process_output: bool = False) -> None:
        self.entries: dict[str, Entry] = {}
        self.process_output = process_output
        self._shared: tuple[int, str, Floats] | None = None

    def wants(self, seen: Multiplication) -> bool:
        """Block weights, and the head if asked for; dense inputs of fewer than 16 tokens are left out."""
        if not (seen.experts or seen.tokens >= MIN_CTX):
            return False
        return in_main_block(seen.weight) or (self.process_output and seen.weight == "output.weight")

    def see(self, seen: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        """Add the squares of these inputs."""
        if experts is not None:
            self._see_experts(seen, inputs, experts)
            return
        matrices = seen.shape[2] * seen.shape[3]
        sums = self._squares(seen, inputs, matrices)
        entry = self.entries.get(seen.weight)
        if entry is None:
            entry = Entry(np.zeros((1, matrices * inputs.shape[2])), np.zeros(1, np.int64))
            self.entries[seen.weight] = entry
        entry.sums += sums.reshape(1, -1)
        entry.counts += inputs.shape[0] * inputs.shape[1] // matrices

    def _squares(self, seen: Multiplication, inputs: Floats, matrices: int) -> Floats:
        # Q, K and V multiply the same input one after the other, and so do gate and up: it is squared once.
        if self._shared and self._shared[0] == seen.input_id and self._shared[1] != seen.weight:
            return self._shared[2]
        sums = np.zeros((matrices, inputs.shape[2]), np.float32)
        for index, matrix in enumerate(inputs):
            sums[index % matrices] += np.einsum("ij,ij->j", matrix, matrix)
        if not np.isfinite(sums).all():
            raise BitladderError(
                f"the input of {seen.weight} has values that are not finite: the model is damaged or overflows F16; "
                "convert it with --outtype bf16 or f32"
            )
        self._shared = (seen.input_id, seen.weight, sums)
        return sums

    def _see_experts(self, seen: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32]) -> None:
        count, used = seen.shape[2], experts.shape[1]
        entry = self.entries.get(seen.weight)
        if entry is None:
            entry = Entry(np.zeros((count, inputs.shape[2])), np.zeros(count, np.int64))
            self.entries[seen.weight] = entry
        for expert in np.unique(experts):
            tokens, slots = np.nonzero(experts == expert)
            rows = inputs[tokens, slots % inputs.shape[1] if used > 1 else 0]
            entry.sums[expert] += np.einsum("ij,ij->j", rows, rows)
            entry.counts[expert] += len(tokens)
            if not np.isfinite(entry.sums[expert]).all():
                raise BitladderError(f"the input of {seen.weight}, expert {expert}, has values that are not finite")


def collect_imatrix(
    model: str | os.PathLike[str],
    texts: Sequence[Text],
    out: str | os.PathLike[str],
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    from_chunk: int = 0,
    parse_special: bool = False,
    process_output: bool = False,
    in_files: Sequence[str | os.PathLike[str]] = (),
    form: str = "gguf",
    n_batch: int = 2048,
    n_ubatch: int = 512,
    threads: int | None = None,
    gpu_layers: int = 0,
    save_seconds: float = SAVE_SECONDS,
    progress: Progress = SILENT,
) -> ImatrixResult:
    """Compute the importance matrix of a model over some texts and write it.

    Parameters: every text is cut into chunks of `n_ctx` tokens; `from_chunk` are skipped at its start and at most
    `chunks` used. `in_files` are matrices to add (without texts, they are only merged). `form` is "gguf" or "dat".
    `n_batch` tokens are decoded together (several chunks side by side), `n_ubatch` computed at once.
    What was read is kept in `out`.partial every `save_seconds`, and a run that was cut short goes on from there.
    Raises BitladderError: text too short, values not finite, files of another model.
    """
    out = pathlib.Path(out)
    if n_ctx < MIN_CTX:
        raise UsageError(f"-c {n_ctx} is too short: inputs of fewer than {MIN_CTX} tokens are not collected")
    options = ImatrixOptions(n_ctx, chunks, from_chunk, parse_special, process_output)
    total = Imatrix({}, [], 0, n_ctx)
    read = 0
    for path in in_files:
        total.add(read_imatrix(path))
    if texts:
        partial = _Partial(out, model, texts, options, save_seconds)
        with Model(model, gpu_layers=gpu_layers) as loaded:
            plan = [
                text_chunks(loaded, text, n_ctx, chunks=chunks, from_chunk=from_chunk, parse_special=parse_special)
                for text in texts
            ]
            collector = Collector(process_output)
            done = partial.load(collector, progress)
            layout = {"n_batch": n_batch, "n_ubatch": n_ubatch, "threads": threads}
            _decode(loaded, np.concatenate(plan), collector, done, partial, layout, progress)
        fresh = Imatrix(collector.entries, [text.name for text in texts], 0, n_ctx)
        total.add(fresh)
        read = sum(map(len, plan))
    if not total.entries:
        raise BitladderError("nothing to do: give a text (-f) or matrices to merge (--in-file)")
    write_imatrix(total, out, form)
    if texts:
        partial.remove()
    gaps = total.gaps()
    if gaps:
        experts = sum(map(len, gaps.values()))
        progress.warn(
            f"{experts} experts in {len(gaps)} weights were reached by no token; they would be quantized as if all "
            "their columns mattered alike. Use more, or more varied, calibration text"
        )
    return ImatrixResult(out, len(total.entries), read or total.chunk_count, gaps)


def _decode(
    model: Model,
    chunks: Tokens,
    collector: Collector,
    done: int,
    partial: "_Partial",
    layout: dict[str, int | None],
    progress: Progress,
) -> None:
    n_ctx = chunks.shape[1]
    n_batch = layout["n_batch"] or n_ctx
    side_by_side = max(1, n_batch // n_ctx)
    step = min(n_batch, n_ctx)
    # The head is not needed, but all tokens must be outputs: the last block drops the others early.
    with (
        Context(
            model,
            Decoding(
                n_ctx=n_ctx,
                n_batch=side_by_side * step,
                n_ubatch=layout["n_ubatch"] or 512,
                threads=layout["threads"],
            ),
            n_seq=side_by_side,
            observer=collector,
            skip_head=not collector.process_output,
        ) as context,
        progress.task("imatrix", len(chunks)) as bar,
    ):
        bar.advance(done)
        for start in range(done, len(chunks), side_by_side):
            rows = chunks[start : start + side_by_side]
            context.clear()
            for first in range(0, n_ctx, step):
                piece = rows[:, first : first + step]
                width = piece.shape[1]
                context.decode(
                    piece.reshape(-1),
                    np.tile(np.arange(first, first + width, dtype=np.int32), len(rows)),
                    np.repeat(np.arange(len(rows), dtype=np.int32), width),
                    np.ones(piece.size, np.bool_),
                )
            bar.advance(len(rows))
            partial.save(collector, start + len(rows))


class _Partial:
    """What a run that is cut short leaves beside its output: the sums so far, and a key that says of what."""

    def __init__(
        self,
        out: pathlib.Path,
        model: str | os.PathLike[str],
        texts: Sequence[Text],
        options: ImatrixOptions,
        seconds: float,
    ) -> None:
        self.path = out.with_name(out.name + ".partial")
        with GgufFile(model) as file:
            stats = [part.stat() for part in file.parts]
            header = [list(file.tensors), *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
        what = [header, [text.sha256 for text in texts], dataclasses.asdict(options), versions()]
        self._key = sha256_bytes(json.dumps(what).encode())
        self._seconds = seconds
        self._saved = time.monotonic()

    def load(self, collector: Collector, progress: Progress) -> int:
        """Fill the collector from the file if it is of the same job; return how many chunks are done."""
        if not self.path.exists():
            return 0
        try:
            with np.load(self.path, allow_pickle=False) as data:
                if str(data["key"]) != self._key:
                    return 0
                for name in data["names"].tolist():
                    collector.entries[name] = Entry(data[f"{name} sums"], data[f"{name} counts"])
                done = int(data["done"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            progress.warn(f"{self.path.name} cannot be read; starting from the first chunk")
            collector.entries.clear()
            return 0
        progress.info(f"going on after {done} chunks ({self.path.name})")
        return done

    def save(self, collector: Collector, done: int) -> None:
        """Write the file if it is time to."""
        if time.monotonic() - self._saved < self._seconds:
            return
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        for name, entry in collector.entries.items():
            arrays[f"{name} sums"], arrays[f"{name} counts"] = entry.sums, entry.counts
        with replacing(self.path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, key=self._key, names=list(collector.entries), done=done, **arrays)  # type: ignore[arg-type]
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the output is complete."""
        self.path.unlink(missing_ok=True)
