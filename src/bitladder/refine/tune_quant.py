"""A quant whose scales are tuned against the full precision, tried on held-out text and written."""

import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from bitladder.calibrate import (
    UnfinishedWork,
    check_logits,
    job_key,
    require_torch,
    torch_threads,
    why_no_gradients,
)
from bitladder.engine import Decoding, Model, Tokens, device_key, torch_device
from bitladder.errors import GradientsError, UsageError
from bitladder.evaluate import Figure, MeasureOptions, decision_chunk, decision_settings, mean, measure, paired_mean
from bitladder.files import refuse_inputs, replacing, sha256_file
from bitladder.gguf import open_model, refuse_other_model, refuse_other_vectors, shards_of
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.quantize import TUNE_KEY
from bitladder.refine.model_files import Bytes, copy_model
from bitladder.refine.options import TuneOptions
from bitladder.text import EXCERPTS, Reading, Text, excerpts, set_apart
from bitladder.trial import kept_base

TUNING = Algorithm(
    "tuning",
    (
        "F16 numbers of blocks move by gradients of the KLD of the whole model",
        "the forward pass is that of transformers' modules",
        "of several texts passages of each end are held out, and take turns",
        "experts are tuned too",
        "chunks of a check have half the length, and all their tokens but the first sixteenth are scored",
    ),
    uses=(EXCERPTS,),
)


@dataclasses.dataclass(frozen=True)
class TunedQuant:
    """A tuned quant.

    Parameters:
        kept: whether KLD on held-out text fell; if not, the file is the quant as it was.
        before: KLD of the quant as it was on held-out text, nats per token; None without such a text.
        after: KLD of the tuned quant.
        difference: after − before, paired.
        steps: how many steps were made, each on a chunk.
        n_ctx: tokens of a chunk.
        klds: KLD of each chunk as torch computes it, before its step.
    """

    kept: bool
    before: Figure | None
    after: Figure | None
    difference: Figure | None
    steps: int
    n_ctx: int
    klds: list[float] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class _Files:
    """The full-precision model, the quant, and the file to write."""

    full: pathlib.Path
    quant: pathlib.Path
    out: pathlib.Path


@TUNING.entry
def tune(
    full: pathlib.Path,
    quant: pathlib.Path,
    out: pathlib.Path,
    texts: Sequence[Text],
    held_out: Text | None,
    options: TuneOptions,
    decoding: Decoding,
    progress: Progress = SILENT,
) -> TunedQuant:
    """Tunes the scales of a quant for the predictions of its full-precision model.

    The F16 numbers of blocks move along gradients of the KLD, the integers stay: the file has the same types and bytes,
    and the same speed. An interrupted descent continues from the folder OUT.parts. Everything is in memory at once:
    some 20 bytes for each weight, and what a chunk leaves for the backward pass.

    Parameters:
        full: path of the full-precision model.
        quant: path of the quant.
        out: path to write.
        texts: what the scales are tuned on.
        held_out: a text that is neither among `texts` nor the one to judge by. KLD there must fall, or the quant is
            copied as it is. None tries nothing.
        options: how scales are tuned, and on how much.
        decoding: tokens of a chunk, and how models are decoded to try them.
        progress: where work is shown.

    Raises:
        BitladderError: torch is not installed or computes other logits, or the files are of different models.
    """
    require_torch()
    files = _Files(full, quant, out)
    refuse_inputs([out], [*shards_of(full), quant])
    if not texts:
        raise UsageError("tuning needs a text: pass -f")
    if not options.tune_chunks:
        raise UsageError("--tune-chunks is 0: nothing to tune on")
    with open_model(full) as source, open_model(quant) as quantized:
        refuse_other_model(quantized, source)
        refuse_other_vectors(quantized, source)
    with Model(full, vocab_only=True) as vocabulary:
        chunks = Reading(chunks=options.tune_chunks).rows(vocabulary, texts, decoding.n_ctx)
    with replacing(out) as temporary:  # opened first: a folder that cannot be written to is an error at once
        device = torch_device(decoding.device)
        decides = {"options": options, "n_ctx": decoding.n_ctx, **device_key(decoding.device)}
        key = job_key(full, texts, TUNING, quant=sha256_file(quant), **decides)
        keep = UnfinishedWork(out, key)
        blocks, klds = _descend(files, chunks, options, keep, decoding.threads, device, progress)
        remark = f"{len(chunks)} × {decoding.n_ctx} tokens, rate {options.tune_rate:g}"
        _write(quant, temporary, blocks, remark)
        before = after = difference = None
        if held_out is not None:
            settings = decision_settings(decoding, options.tune_guard_chunks)
            before, after, difference = _try(_Files(full, quant, temporary), held_out, settings, progress)
        kept = difference is None or difference.value < 0
        if not kept:
            shutil.copyfile(quant, temporary)
    keep.remove()
    return TunedQuant(kept, before, after, difference, len(chunks), decoding.n_ctx, klds)


def tune_in_place(
    full: pathlib.Path,
    quant: pathlib.Path,
    calibration: Sequence[Text],
    options: TuneOptions,
    decoding: Decoding,
    progress: Progress = SILENT,
) -> bool:
    """Tunes a quant on calibration texts, and tries that on the end of each. The quant stays if that does not help.

    Parameters:
        full: path of the full-precision model.
        quant: path of the quant, which is replaced.
        calibration: the texts.
        options: how scales are tuned; with 0 chunks nothing is done.
        decoding: as for `tune`.
        progress: where work is shown; says why nothing is tuned.

    Returns:
        Whether the quant has tuned scales now.
    """
    if not options.tune_chunks:
        return False
    reason = why_no_gradients(full)
    if reason is not None:
        progress.info(f"scales are not tuned: {reason}")
        return False
    texts, held_out = tuning_texts(calibration, options, decoding.n_ctx)
    out = quant.with_name(f".{quant.name}.tmp")
    try:
        tuned = tune(full, quant, out, texts, held_out, options, decoding, progress)
        out.replace(quant)
    except GradientsError as error:
        progress.info(f"scales are not tuned: {error}")
        return False
    finally:
        out.unlink(missing_ok=True)
    if not tuned.kept:
        progress.info(f"{quant.name}: tuned scales increase the KLD on held-out text; the quant is not changed")
    return tuned.kept


def tuning_texts(calibration: Sequence[Text], options: TuneOptions, n_ctx: int) -> tuple[list[Text], Text]:
    """What scales are tuned on in a run, each calibration text without its end, and the ends, on which that is tried.

    Parameters:
        calibration: the texts.
        options: the share of a text that is its end, and how many chunks of the ends are used.
        n_ctx: tokens of a chunk.
    """
    texts, ends = set_apart(calibration, options.held_out_share)
    return texts, ends[0] if len(ends) == 1 else excerpts(ends, options.tune_guard_chunks, decision_chunk(n_ctx))


def _try(files: _Files, text: Text, settings: MeasureOptions, progress: Progress) -> tuple[Figure, Figure, Figure]:
    """KLD of the quant as it was and tuned, and their paired difference."""
    with (
        tempfile.TemporaryDirectory(dir=files.out.parent, prefix=".tune.", suffix=".tmp") as folder,
        kept_base(pathlib.Path(folder), files.full, text, settings, progress) as base,
    ):
        before, after = (
            measure(path, text, settings, base=base, progress=progress).arrays["kld"]
            for path in (files.quant, files.out)
        )
        return mean(before), mean(after), paired_mean(after, before, len(base.chunks))


def _descend(
    files: _Files,
    chunks: Tokens,
    options: TuneOptions,
    keep: UnfinishedWork,
    threads: int | None,
    device: str | None,
    progress: Progress,
) -> tuple[dict[str, Bytes], list[float]]:
    """Blocks by tensor after the descent, and the KLD of each chunk before its step."""
    from bitladder.calibrate import TorchModel
    from bitladder.refine.student import Student, descend

    with (
        torch_threads(threads),
        TorchModel(files.full, memory=1 << 62, threads=threads, device=device) as teacher,
        Student(files.quant, threads=threads, device=device) as student,
    ):
        check_logits(files.full, teacher.checked(chunks[0]), threads=threads, ours=teacher)
        klds = descend(student, teacher, chunks, options, keep=keep, progress=progress)
        return {name: scales.blocks() for name, scales in student.scales.items()}, klds


def _write(quant: pathlib.Path, out: pathlib.Path, blocks: dict[str, Bytes], remark: str) -> None:
    with open_model(quant) as file:
        copy_model(
            file,
            out,
            (TUNE_KEY, remark),
            lambda tensor: (lambda: blocks[tensor.name] if tensor.name in blocks else file.read(tensor),),
            label="write the tuned quant",
        )
