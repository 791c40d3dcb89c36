"""From a checkpoint directory to one GGUF file: plan, then stream."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert import model_metadata
from bitladder.convert.checkpoint import Checkpoint
from bitladder.convert.encode import check_finite, encode
from bitladder.convert.external import run_converter
from bitladder.convert.family import Family
from bitladder.convert.tensor_map import OUTTYPES, Move, choose_outtype, family_for, plan_moves
from bitladder.convert.tokenizer import read_vocabulary
from bitladder.convert.vocabulary import write_vocabulary
from bitladder.errors import UsageError
from bitladder.files import replacing
from bitladder.hub.checkpoints import resolve
from bitladder.progress import SILENT, Progress


@dataclasses.dataclass(frozen=True)
class ConvertResult:
    """What was written: `architecture` in GGUF's terms, `outtype` as decided, how many tensors and bytes."""

    path: pathlib.Path
    architecture: str
    outtype: str
    tensors: int
    bytes: int


def convert(
    model: str | pathlib.Path,
    out: pathlib.Path,
    *,
    outtype: str = "auto",
    converter: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Write the checkpoint `model` (a directory or a hub id) as the GGUF file `out`.

    `outtype` is f16, bf16, f32 or auto (bf16 for a bfloat16 checkpoint, otherwise f16); vectors are always F32. With
    `converter`, a script such as llama.cpp's convert_hf_to_gguf.py does the work. One tensor is in memory at a time,
    and `out` appears only when it is complete; the same input gives the same bytes. Raises BitladderError naming the
    file, tensor or setting that prevents it.
    """
    if outtype not in (*OUTTYPES, "auto"):
        raise UsageError(f"--outtype {outtype} is not one of {', '.join(OUTTYPES)}, auto")
    folder = resolve(model)
    if converter is not None:
        with replacing(out) as temporary:
            architecture, tensors = run_converter(converter, folder, temporary, outtype, progress)
        return ConvertResult(pathlib.Path(out), architecture, outtype, tensors, pathlib.Path(out).stat().st_size)
    with _heard(progress):
        checkpoint = Checkpoint(folder)
        family = family_for(checkpoint.config)
        decided = choose_outtype(checkpoint, outtype)
        if outtype == "auto":
            progress.info(f"outtype {decided}, by the checkpoint's weights")
        moves = plan_moves(checkpoint, family, decided)
        with replacing(out) as temporary:
            tensors = _write(temporary, checkpoint, family, moves, outtype=decided, progress=progress)
    name = gguf.MODEL_ARCH_NAMES[family.arch]
    return ConvertResult(pathlib.Path(out), name, decided, tensors, pathlib.Path(out).stat().st_size)


def default_name(model: str | pathlib.Path, outtype: str = "auto") -> str:
    """The file name GGUF's naming convention gives the model, such as SmolLM2-135M-BF16.gguf. Reads no weights.

    Raises BitladderError as `convert` does.
    """
    folder = resolve(model)
    checkpoint = Checkpoint(folder)
    decided = choose_outtype(checkpoint, outtype)
    parameters = sum(tensor.elements for tensor in checkpoint.tensors.values())
    return model_metadata.file_name(model_metadata.read_metadata(folder, checkpoint.config, parameters), decided)


def _write(
    path: pathlib.Path,
    checkpoint: Checkpoint,
    family: Family,
    moves: list[Move],
    *,
    outtype: str,
    progress: Progress,
) -> int:
    """Write the file: all metadata first, then the tensors one by one. Returns their number."""
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        parameters = sum(checkpoint.tensors[source].elements for source in {move.source for move in moves})
        writer.add_type(gguf.GGUFType.MODEL)
        model_metadata.read_metadata(checkpoint.folder, checkpoint.config, parameters).set_gguf_meta_model(writer)
        extra = family.describe(writer)
        writer.add_file_type(OUTTYPES[outtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_vocabulary(
            read_vocabulary(checkpoint.folder, family.vocab, progress), checkpoint.folder, writer, progress
        )
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for move in moves:
            writer.add_tensor_info(move.name, move.shape, np.dtype(np.uint16), move.bytes, raw_dtype=move.type)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("Converting", sum(move.bytes for move in moves)) as task:
            for values in extra.values():
                writer.write_tensor_data(values)
            for move in moves:
                task.note(move.name)
                writer.write_tensor_data(_load(checkpoint, family, move))
                task.advance(move.bytes)
    finally:
        writer.close()
    return len(extra) + len(moves)


def _load(checkpoint: Checkpoint, family: Family, move: Move) -> NDArray[np.generic]:
    raw = checkpoint.read(move.source)
    check_finite(move.source, raw)
    return encode(move.source, family.arrange(move.source, raw), move.type)


@contextlib.contextmanager
def _heard(progress: Progress) -> Iterator[None]:
    """Warnings that the gguf package logs reach `progress` instead of stderr."""
    logger = logging.getLogger("gguf")
    handler = _ToProgress(progress)
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagated
        logger.removeHandler(handler)


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on, unless it is about pairs of texts, which no language model here is given."""
        message = record.getMessage()
        if "<pair>" not in message:
            self.progress.warn(message)
