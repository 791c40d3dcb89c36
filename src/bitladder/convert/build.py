"""From a checkpoint's directory to one GGUF file: the plan comes first, then tensors are streamed."""

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert import model_metadata
from bitladder.convert.checkpoint import Checkpoint
from bitladder.convert.checkpoint_files import Config, read_json
from bitladder.convert.families import Family, architectures, family_for, named_family
from bitladder.convert.options import ConvertOptions
from bitladder.convert.quantized import check_quantization
from bitladder.convert.tensors import (
    OUTTYPES,
    TensorCopy,
    check_finite,
    choose_outtype,
    encode,
    plan_copies,
)
from bitladder.convert.tokenizer import read_vocabulary, write_vocabulary
from bitladder.convert.upstream import Converter, converter_at, refuse_code, run_converter
from bitladder.convert.upstream_checks import check_converted, check_finite_file, known_to, refuse_incomplete
from bitladder.engine import Workers, lost_in
from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing
from bitladder.hub import fetch_checkpoint
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress

CONVERT = Algorithm(
    "convert",
    (
        "tensors, vocabulary and metadata as convert_hf_to_gguf.py writes them",
        "where places of a checkpoint differ, the one that transformers takes; all end tokens; FP8 is dequantized",
        "the projector of images or sounds beside the model",
    ),
)


@dataclasses.dataclass(frozen=True)
class ConvertResult:
    """The file that was written.

    Parameters:
        path: the GGUF file.
        architecture: the architecture as the GGUF names it.
        outtype: f16, bf16 or f32.
        tensors: number of tensors.
        bytes: size of the file.
        projector: the file of the projector of images or sounds; None if there is none.
    """

    path: pathlib.Path
    architecture: str
    outtype: str
    tensors: int
    bytes: int
    projector: pathlib.Path | None = None


# Nine parameters: the input, the output, and what the command line can say of a conversion.
@CONVERT.entry
def convert(
    model: str | pathlib.Path,
    out: pathlib.Path,
    *,
    outtype: str = "auto",
    upstream: bool | None = None,
    converter: pathlib.Path | None = None,
    trust_remote_code: bool = False,
    projector: pathlib.Path | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Writes a checkpoint as a GGUF file.

    One tensor is in memory at a time. `out` appears when it is complete. The same input gives the same bytes.

    Parameters:
        model: directory of the checkpoint, or a hub id.
        out: the file to write.
        outtype: type of the matrices, f16, bf16, f32, or auto: bf16 for a bfloat16 checkpoint, otherwise f16. Vectors
            are always F32.
        upstream: whether llama.cpp's own converter converts; None: only what bitladder does not convert itself.
        converter: convert_hf_to_gguf.py, a folder with it, or llama-cpp-python's source archive, to use as llama.cpp's
            converter instead of downloading it. A script runs with this Python.
        trust_remote_code: whether llama.cpp's converter may run Python code that the checkpoint brings.
        projector: the file to write a projector of images or sounds to, if llama.cpp's converter knows the
            checkpoint's; None for none.
        threads: threads of the CPU; None takes all. llama.cpp's converter has its own.
        progress: is told how much is done.

    Raises:
        BitladderError: a file, tensor or setting prevents it; the message names it.
    """
    if outtype not in (*OUTTYPES, "auto"):
        raise UsageError(f"--outtype {outtype} is not one of {', '.join(OUTTYPES)}, auto")
    folder = fetch_checkpoint(model)
    if uses_upstream(folder, upstream=upstream, converter=converter):
        names = _refuse_for_upstream(folder, trust_remote_code)
        program = converter_at(converter, progress)
        progress.info(f"{', '.join(names) or folder.name}: llama.cpp's converter ({program.script.name}) converts it")
        beside = projector if projector is not None and _has_projector(folder, converter, progress) else None
        with replacing(out) as temporary:
            run_converter(program, folder, temporary, outtype, progress)
            more = _convert_projector(program, folder, beside, outtype, progress) if beside is not None else 0
            converted = check_converted(temporary, folder, progress, more)
        size = pathlib.Path(out).stat().st_size
        return ConvertResult(
            pathlib.Path(out),
            converted.architecture,
            converted.outtype,
            converted.tensors,
            size,
            beside if more else None,
        )
    with _gguf_warnings(progress):
        checkpoint = Checkpoint(folder, progress)
        family = family_for(checkpoint.config)
        check_quantization(checkpoint.quantization, checkpoint.tensors, progress)
        decided = choose_outtype(checkpoint, outtype)
        if outtype == "auto":
            progress.info(f"outtype {decided}, by the checkpoint's weights")
        copies = plan_copies(checkpoint, family, decided, progress)
        with replacing(out) as temporary:
            tensors = write_file(
                temporary, checkpoint, family, copies, outtype=decided, threads=threads, progress=progress
            )
    name = gguf.MODEL_ARCH_NAMES[family.arch]
    return ConvertResult(pathlib.Path(out), name, decided, tensors, pathlib.Path(out).stat().st_size)


def _has_projector(folder: pathlib.Path, converter: pathlib.Path | None, progress: Progress) -> bool:
    """Whether llama.cpp's converter knows the projector of a checkpoint. One that has no list knows none."""
    try:
        return known_to(converter, read_json(folder / "config.json"), progress).projector
    except BitladderError:
        return False


def _convert_projector(
    program: Converter, folder: pathlib.Path, out: pathlib.Path, outtype: str, progress: Progress
) -> int:
    """Writes the projector, and returns its number of weights. One that cannot be converted is a warning, and 0."""
    try:
        with replacing(out) as temporary:
            run_converter(program, folder, temporary, outtype, progress, projector=True)
            return check_finite_file(temporary, progress)
    except BitladderError as error:
        progress.warn(f"the model is converted without its projector of images or sounds: {error}")
        return 0


def refuse_checkpoint(folder: pathlib.Path, options: ConvertOptions) -> None:
    """Refuses what `convert` would refuse by the configuration and the headers of a checkpoint. No weights are read
    but a head that may be tied.

    Parameters:
        folder: directory of the checkpoint.
        options: how it would be converted.

    Raises:
        BitladderError: the checkpoint cannot be converted; the message names the file, tensor or setting.
    """
    if uses_upstream(folder, upstream=options.upstream, converter=options.converter):
        _refuse_for_upstream(folder, options.trust_remote_code)
        return
    checkpoint = Checkpoint(folder)
    family = family_for(checkpoint.config)
    check_quantization(checkpoint.quantization, checkpoint.tensors, SILENT)
    plan_copies(checkpoint, family, choose_outtype(checkpoint, options.outtype), SILENT)


def _refuse_for_upstream(folder: pathlib.Path, trusted: bool) -> list[str]:
    """Refuses what llama.cpp's converter is not given. Returns the names of the checkpoint's architectures."""
    config = Config(read_json(folder / "config.json"), folder / "config.json")
    names = architectures(config)
    refuse_code(folder, names, trusted=trusted)
    refuse_incomplete(config.values, config.path)
    return names


def uses_upstream(folder: pathlib.Path, *, upstream: bool | None, converter: pathlib.Path | None) -> bool:
    """Whether llama.cpp's own converter converts a checkpoint. The parameters are those of `convert`."""
    if converter is not None or upstream is not None:
        return converter is not None or bool(upstream)
    return named_family(Config(read_json(folder / "config.json"), folder / "config.json")) is None


def default_name(model: str | pathlib.Path, outtype: str = "auto") -> str:
    """The file name of a model by GGUF's naming convention, such as SmolLM2-135M-BF16.gguf. Reads no weights.

    Raises BitladderError as `convert` does.
    """
    folder = fetch_checkpoint(model)
    checkpoint = Checkpoint(folder)
    decided = choose_outtype(checkpoint, outtype)
    metadata = model_metadata.read_metadata(folder, checkpoint.config, checkpoint.parameters, SILENT)
    return model_metadata.default_file_name(metadata, decided)


# Nine parameters: what is written, its form, and which parts are left out.
def write_file(
    path: pathlib.Path,
    checkpoint: Checkpoint,
    family: Family,
    copies: list[TensorCopy],
    *,
    outtype: str,
    progress: Progress,
    threads: int | None = None,
    vocabulary: bool = True,
    weights: bool = True,
) -> int:
    """Writes the file: all metadata, then the tensors one by one. Returns the number of tensors.

    Without `weights` a hole stands for them, and nothing is read. Without `vocabulary` it is left out.
    """
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    try:
        parameters = sum(checkpoint.tensors[source].elements for source in {copy.source for copy in copies})
        writer.add_type(gguf.GGUFType.MODEL)
        model_metadata.read_metadata(checkpoint.folder, checkpoint.config, parameters, progress).set_gguf_meta_model(
            writer
        )
        extra = family.describe(writer, progress)
        writer.add_file_type(OUTTYPES[outtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if vocabulary:
            write_vocabulary(
                read_vocabulary(checkpoint.folder, family.vocab, progress), checkpoint.folder, writer, progress
            )
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for copy in copies:
            writer.add_tensor_info(copy.name, copy.shape, np.dtype(np.uint16), copy.bytes, raw_dtype=copy.type)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if weights:
            with (
                Workers(threads) as workers,
                progress.task("Converting", sum(copy.bytes for copy in copies)) as bar,
            ):
                for values in extra.values():
                    writer.write_tensor_data(values)
                for copy in copies:
                    bar.note(copy.name)
                    writer.write_tensor_data(_load(checkpoint, family, copy, workers, progress))
                    bar.advance(copy.bytes)
    finally:
        writer.close()
    if not weights:
        add_hole(path, [*(values.nbytes for values in extra.values()), *(copy.bytes for copy in copies)])
    return len(extra) + len(copies)


def add_hole(path: pathlib.Path, sizes: Iterable[int]) -> None:
    """Makes a file as long as it is with tensors of these sizes, in bytes. A hole takes no room on the disk."""
    align = gguf.GGUF_DEFAULT_ALIGNMENT
    os.truncate(path, sum(gguf.GGUFWriter.ggml_pad(size, align) for size in (path.stat().st_size, *sizes)))


def _load(
    checkpoint: Checkpoint, family: Family, copy: TensorCopy, workers: Workers, progress: Progress
) -> NDArray[np.generic]:
    raw = checkpoint.read(copy.source)
    try:
        stored, lost = encode(copy.source, family.arrange(copy.source, raw), copy.type, workers)
    except BitladderError:
        check_finite(copy.source, raw)  # names the place in the checkpoint
        raise
    if lost:
        rows = stored.size // stored.shape[-1]
        progress.warn(lost_in(copy.source, lost, rows, "f16", "convert with --outtype bf16"))
    return stored


@contextlib.contextmanager
def _gguf_warnings(progress: Progress) -> Iterator[None]:
    """Inside the context, warnings that the gguf package logs go to `progress` instead of stderr."""
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
        """Passes a record on, unless it is about pairs of texts, which no language model reads."""
        message = record.getMessage()
        if "<pair>" not in message:
            self.progress.warn(message)
