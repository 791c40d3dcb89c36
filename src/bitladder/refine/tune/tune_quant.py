"""A quant whose blocks' scales are tuned against the full precision, tried on held-out text and written."""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import UnfinishedWork, job_key
from bitladder.calibrate.gradients import CHECKED_TOKENS, check_logits, require_torch, torch_threads
from bitladder.engine.model import Model, Tokens
from bitladder.errors import UsageError
from bitladder.evaluate import Figure, Settings, load_or_compute_base, mean, measure, paired_mean
from bitladder.files import replacing, sha256_file
from bitladder.gguf.reader import GgufFile, refuse_other_model, refuse_other_vectors
from bitladder.gguf.values import string
from bitladder.gguf.writer import GgufWriter, TensorPlan
from bitladder.progress import SILENT, Progress
from bitladder.quantize import DROPPED, TUNE_KEY
from bitladder.text.chunks import Reading
from bitladder.text.texts import Text

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """How to tune.

    `chunks` of each text, of `n_ctx` tokens, from all over it (None: all there are). `rate` and `seed` as of
    `descend.Schedule`.
    """

    n_ctx: int = 512
    chunks: int | None = None
    rate: float = 3e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What became of it.

    `before`, `after` and their paired `difference`: KLD on held-out text, nats per token (None without one). `kept` is
    whether it fell; if not, the file is the quant as it was. `steps` of so many tokens were made, and `seen` are the
    KLDs of their chunks in torch, each before its step.
    """

    path: pathlib.Path
    kept: bool
    before: Figure | None
    after: Figure | None
    difference: Figure | None
    steps: int
    n_ctx: int
    seen: list[float] = dataclasses.field(repr=False)


def tune(
    full: str | os.PathLike[str],
    quant: str | os.PathLike[str],
    out: str | os.PathLike[str],
    texts: Sequence[Text],
    options: TuneOptions | None = None,
    *,
    held_out: tuple[Text, Settings] | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Tuned:
    """Tune a quant's scales for the predictions of its full-precision model.

    A block's F16 numbers are moved by gradients of the KLD over `texts`, the integers stay: the file has the same
    types and bytes, and its speed. `held_out`: a text that is neither among `texts` nor the one to judge by, and how to
    measure it; KLD there must fall, or the quant is copied as it is. What an interrupted descent left in the folder
    OUT.parts is gone on with.
    Everything is in memory at once, some 20 bytes for each weight and what a chunk leaves for its way back. Raises
    BitladderError if torch is not installed, if it does not compute what the library does, or if the two files are not
    of one model.
    """
    require_torch()
    options = options or TuneOptions()
    full, quant, out = pathlib.Path(full), pathlib.Path(quant), pathlib.Path(out)
    if out.exists() and any(out.samefile(one) for one in (full, quant)):
        raise UsageError(f"{out} is an input; name another output")
    if not texts:
        raise UsageError("tuning needs a text: pass -f")
    with GgufFile(full) as source, GgufFile(quant) as made:
        refuse_other_model(made, source)
        refuse_other_vectors(made, source)
    with Model(full, vocab_only=True) as vocabulary:
        chunks = Reading(chunks=options.chunks).rows(vocabulary, texts, options.n_ctx)
    with replacing(out) as temporary:  # opened first: a folder that cannot be written to is told of at once
        keep = UnfinishedWork(out, job_key(full, texts, quant=sha256_file(quant), options=options))
        blocks, seen = _moved(full, quant, chunks, options, keep, threads, progress)
        _write(quant, temporary, blocks, f"{len(chunks)} × {options.n_ctx} tokens, rate {options.rate:g}")
        before = after = difference = None
        if held_out is not None:
            before, after, difference = _tried(full, quant, temporary, *held_out, progress)
        kept = difference is None or difference.value < 0
        if not kept:
            shutil.copyfile(quant, temporary)
    keep.remove()
    return Tuned(out, kept, before, after, difference, len(chunks), options.n_ctx, seen)


def _tried(
    full: pathlib.Path, quant: pathlib.Path, tuned: pathlib.Path, text: Text, settings: Settings, progress: Progress
) -> tuple[Figure, Figure, Figure]:
    """KLD of the quant as it was and tuned, and their paired difference."""
    with (
        tempfile.TemporaryDirectory(dir=tuned.parent, prefix=".tune.") as folder,
        load_or_compute_base(full, text, settings, path=pathlib.Path(folder) / "base", progress=progress) as base,
    ):
        before, after = (
            measure(path, text, settings, base=base, progress=progress).arrays["kld"] for path in (quant, tuned)
        )
        return mean(before), mean(after), paired_mean(after, before, len(base.chunks))


def _moved(
    full: pathlib.Path,
    quant: pathlib.Path,
    chunks: Tokens,
    options: TuneOptions,
    keep: UnfinishedWork,
    threads: int | None,
    progress: Progress,
) -> tuple[dict[str, Bytes], list[float]]:
    """Blocks by tensor after the descent, and the KLD seen on the way."""
    from bitladder.calibrate.gradients.forward import TorchModel
    from bitladder.refine.tune.descend import Schedule, descend
    from bitladder.refine.tune.student import Student

    with (
        torch_threads(threads),
        TorchModel(full, memory=1 << 62, threads=threads) as teacher,
        Student(quant, threads=threads) as student,
    ):
        check_logits(full, chunks[0, :CHECKED_TOKENS], threads=threads, ours=teacher)
        seen = descend(student, teacher, chunks, Schedule(options.rate, options.seed), keep=keep, progress=progress)
        return {name: scales.blocks() for name, scales in student.scales.items()}, seen


def _write(
    quant: pathlib.Path,
    out: pathlib.Path,
    blocks: dict[str, Bytes],
    said: str,
) -> None:
    with GgufFile(quant) as file, out.open("wb") as stream:
        metadata = {key: value for key, value in file.metadata.items() if key not in DROPPED} | {TUNE_KEY: string(said)}
        plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
        writer = GgufWriter(stream, metadata, plans)
        for name, tensor in file.tensors.items():
            writer.write(name, blocks[name] if name in blocks else file.read(tensor))
        writer.finish()
