"""What a run would do with a model, from headers and small files only: nothing is converted, loaded or written."""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

from bitladder import hub
from bitladder.calibrate import why_no_gradients
from bitladder.convert import Checkpoint, ConvertOptions, Outline, architectures, write_outline
from bitladder.engine import Request, preset_types
from bitladder.errors import BitladderError
from bitladder.gguf import (
    EMBEDDING,
    HEAD,
    GgufFile,
    TensorInfo,
    block_of,
    kind_of,
    name_in_block,
    open_model,
    prediction_tensors,
)
from bitladder.ladder.model_shape import (
    ModelShape,
    outline_of_gguf,
    quantized_tensor,
    shape_of_checkpoint,
    shape_of_gguf,
)
from bitladder.progress import SILENT, Progress
from bitladder.quantize import substitutes
from bitladder.recipe import changeable
from bitladder.refine import SmoothingError, links_of
from bitladder.units import number_of, some_of

# Types of which the usual ladder is made.
LADDER_TYPES = ("iq3_s", "q3_K", "q4_K", "q5_K", "q6_K")
# Beginnings of the kinds that only recurrent blocks have: state spaces, short convolutions, RWKV.
RECURRENT = ("ssm_", "shortconv", "time_mix_", "wkv_")


@dataclasses.dataclass(frozen=True)
class WidthMisfit:
    """A width of rows that super-blocks of 256 weights do not divide.

    Parameters:
        width: weights in a row.
        kinds: the kinds of tensors that have it.
        weights: number of weights of these tensors.
        instead: type → the type that llama-quantize uses instead.
    """

    width: int
    kinds: tuple[str, ...]
    weights: int
    instead: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What would happen to a model.

    Parameters:
        model: as the user named it.
        source: "GGUF", "checkpoint" or "checkpoint on the hub".
        reasons: why it cannot work; empty if it works.
        remarks: what else should be known.
        classes: the class names in config.json.
        architecture: as the GGUF names it; None if it is not known.
        converter: who converts it, "bitladder" or "llama.cpp"; None for a GGUF.
        encoding: the type of most weights.
        weights: number of weights of the text model.
        blocks: number of blocks, without prediction heads.
        tokenizer: kind and pre-tokenizer, or the files with their sizes.
        tied_head: whether the head is the embeddings.
        experts: experts of a block; 0 for a dense model.
        experts_used: experts that a token goes to.
        expert_share: fraction of the weights that are in experts.
        recurrent: numbers of the recurrent blocks.
        recurrent_kept: kinds of recurrent blocks that llama-quantize leaves in full precision; None if not known.
        prediction: number of weights in heads that predict further tokens, which no text reaches.
        perception: number of weights of parts for images or sounds.
        projector: whether they are converted to a projector beside the model.
        misfits: widths that cannot hold super-blocks.
        no_gradients: why second moments are weighted by positions; None if by gradients.
        links: kind → number of places where smoothing can move scales; empty if there is none.
        shape: the matrices, from which the cost of a run follows; None if they are not known.
    """

    model: str
    source: str
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    architecture: str | None = None
    converter: str | None = None
    encoding: str | None = None
    weights: int = 0
    blocks: int = 0
    tokenizer: str | None = None
    tied_head: bool | None = None
    experts: int = 0
    experts_used: int = 0
    expert_share: float = 0.0
    recurrent: tuple[int, ...] = ()
    recurrent_kept: tuple[str, ...] | None = None
    prediction: int = 0
    perception: int = 0
    projector: bool = False
    misfits: tuple[WidthMisfit, ...] = ()
    no_gradients: str | None = None
    links: dict[str, int] = dataclasses.field(default_factory=dict)
    shape: ModelShape | None = None

    @property
    def works(self) -> bool:
        """Whether nothing that was looked at prevents a run."""
        return not self.reasons


def diagnose(model: str, options: ConvertOptions | None = None, *, progress: Progress = SILENT) -> Diagnosis:
    """Says what a run would do with a model.

    Of a GGUF the header is read; of a checkpoint config.json, the headers of the weights and, where bitladder converts
    it itself, the tokenizer. Of what is on the hub only small files and headers are fetched.

    Parameters:
        model: a GGUF file or the directory of a checkpoint, here or on the hub.
        options: how it would be converted.
        progress: is told of a download.

    Raises:
        BitladderError: there is no such model, or the hub does not give it.
    """
    options, path = options or ConvertOptions(), pathlib.Path(model)
    if path.is_file():
        return _of_gguf(Diagnosis(model, "GGUF"), path)
    with tempfile.TemporaryDirectory(prefix="bitladder.") as temporary:
        if hub.names_file(model):
            about = _of_gguf(Diagnosis(model, "GGUF on the hub"), outline_of_gguf(model, pathlib.Path(temporary)))
            reasons = tuple(_without(reason, pathlib.Path(temporary), model) for reason in about.reasons)
            return dataclasses.replace(about, reasons=reasons)
        folder = path
        if not path.is_dir():
            folder = pathlib.Path(temporary) / model.rpartition("/")[2]
            folder.mkdir()
            hub.fetch_outline(model, folder)
        about = Diagnosis(model, "checkpoint" if path.is_dir() else "checkpoint on the hub")
        remarks: list[str] = []
        heard = _Heard(progress, remarks)
        try:
            checkpoint = Checkpoint(folder, heard)
            classes = tuple(architectures(checkpoint.config))
            about = dataclasses.replace(about, classes=classes, weights=checkpoint.parameters)
            target = pathlib.Path(temporary) / "outline.gguf"
            outline = write_outline(folder, target, options, vocabulary=path.is_dir(), progress=heard)
        except BitladderError as error:
            reason = _without(str(error), folder, model)
            return dataclasses.replace(about, reasons=(reason,), remarks=tuple(remarks))
        about = _of_outline(about, outline)
        about = dataclasses.replace(
            about, remarks=(*about.remarks, *(_without(line, folder, model) for line in remarks))
        )
        return _with_shape(about, lambda: shape_of_checkpoint(model, folder))


def _with_shape(about: Diagnosis, shape: Callable[[], ModelShape]) -> Diagnosis:
    """The diagnosis with a shape, or with the reason why it is not known."""
    try:
        return dataclasses.replace(about, shape=shape())
    except BitladderError as error:
        return dataclasses.replace(about, remarks=(*about.remarks, f"what a run takes is not known: {error}"))


class _Heard:
    """Progress whose warnings become remarks."""

    def __init__(self, progress: Progress, remarks: list[str]) -> None:
        self.task, self.info = progress.task, progress.info
        self.warn: Callable[[str], None] = remarks.append


def _without(text: str, folder: pathlib.Path, model: str) -> str:
    return text.replace(str(folder), model)


def _of_gguf(about: Diagnosis, path: pathlib.Path) -> Diagnosis:
    """The diagnosis of a GGUF, with its shape if it works."""
    reasons: list[str] = []
    try:
        with open_model(path) as file:
            about = _facts(about, file, exact=True)
            if quantized := quantized_tensor(file):
                reasons.append(
                    f"{quantized.name} is {quantized.type.name} already; start from an F16, BF16 or F32 model"
                )
            if file.get("tokenizer.ggml.model") is None:
                reasons.append("it has no tokenizer, so no text can be measured; convert it again")
            else:
                about = dataclasses.replace(about, tokenizer=_tokenizer(file))
        preset_types(path, Request("Q8_0"))
    except BitladderError as error:
        reasons.append(str(error))
    about = dataclasses.replace(about, reasons=tuple(reasons))
    return _with_shape(about, lambda: shape_of_gguf(path)) if about.works else about


def _tokenizer(file: GgufFile) -> str:
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    return f"{kind} ({pre})" if pre else str(kind)


def _of_outline(about: Diagnosis, outline: Outline) -> Diagnosis:
    """The diagnosis of a checkpoint."""
    remarks = []
    if outline.unmatched:
        remarks.append(
            f"not counted here: {some_of(list(outline.unmatched), 'matrix', 'matrices')}, "
            f"{number_of(sum(outline.unmatched.values()), 'weight')}; only the converter knows the names in the GGUF"
        )
    with open_model(outline.path) as file:
        files = ", ".join(f"{name} ({number_of(size, 'byte')})" for name, size in outline.tokenizer.items())
        known = _tokenizer(file) + ": " if file.get("tokenizer.ggml.model") is not None else ""
        about = dataclasses.replace(
            about,
            converter="bitladder" if outline.native else "llama.cpp",
            tokenizer=known + files,
            perception=outline.perception,
            projector=outline.projector and outline.perception > 0,
            remarks=tuple(remarks),
        )
        about = _facts(about, file, exact=outline.native)
    return dataclasses.replace(about, prediction=about.prediction + outline.prediction)


def _facts(about: Diagnosis, file: GgufFile, *, exact: bool) -> Diagnosis:
    """What names, shapes and metadata of a GGUF say. `exact` is false where a converter may name some otherwise."""
    arch, tensors = file.architecture, file.tensors
    heads = set(prediction_tensors(file))
    blocks = {block for name in tensors if name not in heads and (block := block_of(name)) is not None}
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.type.name] += tensor.elements
    weights = sum(sizes.values())
    expert_weights = sum(tensor.elements for name, tensor in tensors.items() if "_exps." in name)
    recurrent = sorted({block_of(name) or 0 for name in tensors if name_in_block(name).startswith(RECURRENT)})
    links: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(SmoothingError):
        links.update(link.kind for link in links_of(file))
    kept = None
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    if exact:
        with contextlib.suppress(BitladderError):  # the caller asks the library again and gets its words
            can_change = changeable(file)
            matrices = [tensor for tensor in matrices if tensor.name in can_change]
            kept = tuple(
                sorted(
                    {
                        kind_of(name)
                        for name in tensors
                        if name_in_block(name).startswith(RECURRENT) and name not in can_change
                    }
                )
            )
    else:
        matrices = [tensor for tensor in matrices if "norm" not in tensor.name and tensor.name.endswith(".weight")]
    return dataclasses.replace(
        about,
        architecture=arch,
        encoding=sizes.most_common(1)[0][0].upper() if sizes else None,
        weights=weights,
        blocks=len(blocks),
        tied_head=HEAD not in tensors if EMBEDDING in tensors else None,
        experts=_number(file, "expert_count"),
        experts_used=_number(file, "expert_used_count"),
        expert_share=expert_weights / weights if weights else 0.0,
        recurrent=tuple(recurrent),
        recurrent_kept=kept,
        prediction=sum(tensors[name].elements for name in heads),
        misfits=_misfits(matrices),
        no_gradients=why_no_gradients(file.path),
        links=dict(links),
    )


def _number(file: GgufFile, key: str) -> int:
    """A number of the metadata; the largest of one for each block."""
    value = file.get(f"{file.architecture}.{key}", 0)
    values = value if isinstance(value, list) else [value]
    return max((number for number in values if isinstance(number, int)), default=0)


def _misfits(matrices: list[TensorInfo]) -> tuple[WidthMisfit, ...]:
    """The widths of matrices that cannot hold the types of the ladder."""
    by_width: dict[int, list[TensorInfo]] = collections.defaultdict(list)
    for tensor in matrices:
        by_width[tensor.width].append(tensor)
    return tuple(
        WidthMisfit(
            width,
            tuple(dict.fromkeys(kind_of(tensor.name) for tensor in by_width[width])),
            sum(tensor.elements for tensor in by_width[width]),
            instead,
        )
        for width, instead in substitutes(by_width, LADDER_TYPES).items()
    )
