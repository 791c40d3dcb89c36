"""Files of numbers: GGUF models and splits, imatrix, moments, base, log-probabilities, safetensors, kept results."""

import io
import math
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from bitladder.calibrate import (
    Imatrix,
    ImatrixEntry,
    LowRank,
    Moment,
    MomentsFile,
    MomentShape,
    Provenance,
    UnfinishedWork,
    compare_imatrices,
    find_gaps,
    read_imatrix,
    tensor_statistics,
    write_imatrix,
    writing_moments,
    zeros_in,
)
from bitladder.cli import outputs
from bitladder.compare.same_model import check_structure
from bitladder.errors import BitladderError
from bitladder.evaluate import LogitsFile, ResultFolder, Scores
from bitladder.evaluate.base.basefile import BaseFile, BaseHeader, write_header, write_record
from bitladder.evaluate.base.logits_base import LogitsBase
from bitladder.evaluate.divergence import BaseRows
from bitladder.evaluate.identity import identify
from bitladder.evaluate.several import _kept
from bitladder.files import seal
from bitladder.gguf import GgufFile, TensorPlan, Value, describe_kind, open_model, string, strings, u16, u32, writing
from bitladder.progress import SILENT
from bitladder.recipe import extract, recipe_toml
from fuzz.rule import Parser, Place

FEW = 1 << 22  # numbers of a matrix that is unpacked whole


def model_file(path: pathlib.Path, groups: int = 1) -> list[pathlib.Path]:
    """A file with the metadata and tensors of a tiny model, in one part or in several."""
    from bitladder.engine import type_by_name

    f32, q4 = type_by_name("f32"), type_by_name("q4_0")
    metadata: dict[str, Value] = {
        "general.architecture": string("llama"),
        "general.name": string("Tiny"),
        "general.file_type": u32(2),
        "tokenizer.ggml.tokens": strings(["a", "", "cé"]),
        "quantize.imatrix.file": string("i.gguf"),
        "quantize.imatrix.entries_count": u32(3),
        "x.small": u16(7),
    }
    plans = [
        TensorPlan("token_embd.weight", (32, 3), f32),
        TensorPlan("blk.0.attn_q.weight", (32, 2), q4),
        TensorPlan("output_norm.weight", (32,), f32),
    ]
    parts = [plans[index::groups] for index in range(groups)]
    with writing(path, metadata, parts) as writer:
        for part in parts:
            for plan in part:
                writer.write(plan.name, np.zeros(plan.nbytes, np.uint8))
    return sorted(path.parent.glob("seed*.gguf"))


def _use(file: GgufFile) -> None:
    for value in file.metadata.values():
        value.python()
    assert file.bpw >= 0 and isinstance(file.architecture, str) and describe_kind(file)
    assert sum(file.read(tensor).size for tensor in file.tensors.values()) == file.tensor_bytes <= file.size


def _read_gguf(place: Place, name: str, data: bytes) -> None:
    path = place.file("model.gguf", data)
    for is_kind in (outputs.is_full_model, outputs.is_quant, outputs.is_questions, outputs.is_recipe):
        is_kind(path)
    with GgufFile(path) as file:
        _use(file)
    with open_model(path) as file, open_model(place.file("other.gguf", _model_seed(place))) as other:
        check_structure(other, file)
        identify(path)
        assert recipe_toml(extract(path))


def _model_seed(place: Place) -> bytes:
    kept = place.scratch.parent / "seed-model"
    if not kept.exists():
        path = place.scratch / "seed.gguf"
        model_file(path)
        path.rename(kept)
    return kept.read_bytes()


GGUF = Parser("gguf", _read_gguf, lambda place: [("model.gguf", _model_seed(place))], ("model.gguf",))

_CUT = b"\n--- next shard ---\n"


def _read_split(place: Place, name: str, data: bytes) -> None:
    shards = data.split(_CUT)[:4]
    for old in place.scratch.glob("m-*.gguf"):
        old.unlink()
    for number, shard in enumerate(shards, 1):
        place.file(f"m-{number:05d}-of-{len(shards):05d}.gguf", shard)
    with GgufFile(place.scratch / f"m-00001-of-{len(shards):05d}.gguf") as file:
        _use(file)


def _split_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for count in (2, 3):
        folder = place.scratch / f"split{count}"
        folder.mkdir(exist_ok=True)
        yield "split", _CUT.join(path.read_bytes() for path in model_file(folder / "seed.gguf", count))


SPLIT = Parser("split", _read_split, _split_seeds, ("split",))


def _imatrix() -> Imatrix:
    rng = np.random.default_rng(0)
    entries = {
        "blk.0.attn_q.weight": ImatrixEntry(rng.random((1, 4)), np.array([7])),
        "blk.0.ffn_up_exps.weight": ImatrixEntry(rng.random((2, 4)), np.array([3, 0])),
        "output.weight": ImatrixEntry(np.zeros((1, 2)), np.array([3])),
    }
    return Imatrix(entries, ["t.txt"], 2, 4)


def _read_imatrix(place: Place, name: str, data: bytes) -> None:
    path = place.file(name, data)
    for finite in (False, True):
        matrix = read_imatrix(path, finite=finite)
        matrix.gaps(), matrix.zeros(), zeros_in(matrix, list(matrix.entries))
        find_gaps(matrix)
        tensor_statistics(matrix)
        compare_imatrices(matrix, _imatrix())
    total = Imatrix({}, [], 0, 4)
    total.add(matrix)
    total.add(read_imatrix(path))
    write_imatrix(total, place.scratch / "again.gguf")
    read_imatrix(place.scratch / "again.gguf")


def _imatrix_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for name, form in (("i.gguf", "gguf"), ("i.dat", "dat")):
        write_imatrix(_imatrix(), place.scratch / name, form)
        yield name, (place.scratch / name).read_bytes()


IMATRIX = Parser("imatrix", _read_imatrix, _imatrix_seeds, ("i.gguf", "i.dat"))


def _read_moments(place: Place, name: str, data: bytes) -> None:
    with MomentsFile(place.file(name, data)) as file:
        assert file.provenance
        for weight in file.names():
            shape = file.shape(weight)
            assert file.entry(weight) in file and len(file.counts(weight)) == shape.matrices
            if shape.n_in**2 < FEW and shape.n_out**2 < FEW:
                assert np.isfinite(file.read(weight).inputs).all()
            else:
                file.packed(weight)


def _moments_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    path = place.scratch / "m.gguf"
    shapes = {
        "blk.0.attn_q.weight": MomentShape(1, 3, 2),
        "blk.0.ffn_up_exps.weight": MomentShape(2, 2),
        "blk.0.attn_k.weight": MomentShape(1, 3, 4, rank=2),
    }
    provenance = Provenance(["t.txt"], 2, 8, "gradients", "ab")
    with writing_moments(path, provenance, shapes, {"blk.0.attn_k.weight": "blk.0.attn_q.weight"}) as writer:
        eye = np.eye(3, dtype=np.float32)[None]
        writer.write("blk.0.attn_q.weight", Moment(eye, np.array([8]), np.eye(2, dtype=np.float32)))
        writer.write("blk.0.ffn_up_exps.weight", Moment(np.stack([np.eye(2, dtype=np.float32)] * 2), np.array([8, 0])))
        half = np.full((4, 2), 0.5, np.float16)
        writer.write_outputs("blk.0.attn_k.weight", LowRank(half, np.ones((1, 4), np.float32)))
    yield "m.gguf", path.read_bytes()


MOMENTS = Parser("moments", _read_moments, _moments_seeds, ("m.gguf",))

_HASHES = ("model_sha256", "architecture", "vocabulary", "text", "text_sha256", "head", "llama_cpp_commit")


def _read_base(place: Place, name: str, data: bytes) -> None:
    file = BaseFile(place.file(name, data))
    try:
        assert file.header.inputs
        for chunk in range(file.header.chunks):
            assert len(file.rows(chunk).nll) == len(file.hidden(chunk)) == file.header.scored
        file.check()  # last: few inputs have the right checksum
    finally:
        file.close()


def _base_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for dtype, item in (("f16", np.float16), ("bf16", np.uint16), ("f32", np.float32)):
        header = BaseHeader(
            model="f16.gguf", n_ctx=8, chunks=2, chunks_in_text=5, bos=None, n_vocab=8, n_embd=4, head_type="f16",
            dtype=dtype, exact=True, max_difference=0.0, gpu=False, algorithms={"base": 1},
            **dict.fromkeys(_HASHES, "x"),
        )  # fmt: skip
        stream = io.BytesIO()
        write_header(stream, header, np.zeros((2, 8), np.int32))
        zeros = np.zeros(header.scored, np.float32)
        for _ in range(2):
            rows = BaseRows(zeros.astype(float), zeros.astype(np.int32), zeros)
            write_record(stream, np.zeros((header.scored, 4), item), rows)
        path = place.file("b.base", stream.getvalue())
        seal(path)
        yield "b.base", path.read_bytes()


BASE = Parser("base", _read_base, _base_seeds, ("b.base",))


def _read_logits(place: Place, name: str, data: bytes) -> None:
    with LogitsBase(LogitsFile(place.file(name, data)), None) as base:
        for chunk in range(base.layout.chunks):
            base.rows(chunk)


def _logits_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    for n_vocab in (4, 5):
        row = struct.pack("<ff", 0, -math.log(n_vocab)) + bytes(2 * (n_vocab + n_vocab % 2))
        yield "l.kld", struct.pack("<8sIii", b"_logits_", 8, n_vocab, 2) + struct.pack("<16i", *[1] * 16) + row * 6


LOGITS = Parser("logits", _read_logits, _logits_seeds, ("l.kld",))


_SCORES = {"model": "m.gguf", "sha256": "ab", "bytes": 5, "bpw": 4.5, "versions": {}}
_SCORES |= {"n_ctx": 8, "chunks": 1, "tokens_scored": 3, "ppl": {"value": 2.0, "error": 0.1}}
_INPUTS = {"kind": "measure"}


def _read_results(place: Place, name: str, data: bytes) -> None:
    if name == "result":
        folder = ResultFolder(place.scratch / "results")
        path = folder._path(_INPUTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        kept = _kept(folder, _INPUTS, Scores, {"model": "other.gguf"})
        if kept is None:
            raise BitladderError("the result does not count: it is measured again")
        assert kept[0].model == "other.gguf" and all(values.shape is not None for values in kept[1].values())
        return
    work = UnfinishedWork(place.scratch / "out", "key")
    work.path(name).write_bytes(data)
    if name == "state":
        heard: list[str] = []
        arrays = {"sums": np.zeros((2, 3), np.float32)}
        if not work.load_state("pass", arrays, _Hears(heard)):
            raise BitladderError("the state does not count: the pass starts again")
    elif name == "piece":
        assert work.get(name).ndim >= 0
    else:
        assert work.read_row(name, 0, (2, 3)).shape == (2, 3)


class _Hears(type(SILENT)):  # type: ignore[misc]
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def warn(self, message: str) -> None:
        self._lines.append(message)

    info = warn


def _results_seeds(place: Place) -> Iterator[tuple[str, bytes]]:
    folder = ResultFolder(place.scratch / "seeds")
    folder.put(_INPUTS, _SCORES, {"nll": np.zeros(3)})
    yield "result", folder._path(_INPUTS).read_bytes()
    stream = io.BytesIO()
    np.savez(stream, label="pass", done=3, sums=np.ones((2, 3), np.float32))
    yield "state", stream.getvalue()
    work = UnfinishedWork(place.scratch / "seed", "key")
    work.put("piece", np.ones((4, 5), np.float32))
    work.append_row("row", 0, np.ones((2, 3), np.float32))
    for name in ("piece", "row"):
        yield name, work.path(name).read_bytes()


RESULTS = Parser("results", _read_results, _results_seeds, ("result", "state", "piece", "row"))


ALL = (GGUF, SPLIT, IMATRIX, MOMENTS, BASE, LOGITS, RESULTS)
