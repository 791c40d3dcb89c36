"""Damaged files of our own: what is only a cache is made again, what is not is named; no traceback, no hang."""

import bz2
import gzip
import io
import json
import lzma
import struct
import zipfile

import numpy as np
import pytest

from bitladder.calibrate import Imatrix, ImatrixEntry, UnfinishedWork, read_imatrix, write_imatrix
from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.evaluate import ResultFolder, load_task, parse_specs
from bitladder.evaluate.base.basefile import BaseHeader
from bitladder.files import read_arrays
from bitladder.progress import SILENT
from bitladder.rounding.second_moments import damped, upper_factor
from bitladder.trial import Journal


class Formula:
    def __init__(self):
        self.calls = 0

    def kld(self, types, chunks):
        self.calls += 1
        return np.full((chunks, 4), 0.25)


@pytest.mark.parametrize(
    "line",
    [
        b'{"context": "c", "key": "\xff"}',
        b"\xff\xfe\x00",
        b'{"context": "c", "key": "k", "label": "", "kld": [], "squares": [], "tokens": 4, "types": {}}',
        b'{"context": "c", "key": "k", "label": "", "kld": [NaN], "squares": [1], "tokens": 4, "types": {}}',
        b'{"context": "c", "key": "k", "label": "", "kld": [0.1], "squares": [], "tokens": 4, "types": {}}',
        b'{"context": "c", "key": 7, "label": "", "kld": ["a"], "squares": [1], "tokens": "4", "types": []}',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"context": "c", "kl',
    ],
)
def test_damaged_lines_of_a_journal_are_measured_again(line, tmp_path):
    path, types = tmp_path / "measured.jsonl", {"a": "q4_K"}
    first = Journal(path, "c", 4)
    first.measure(Formula(), types, 2, "one")
    good = path.read_bytes()
    path.write_bytes(line + b"\n" + good + line)
    again, formula = Journal(path, "c", 4), Formula()
    assert list(again.measurements) == list(first.measurements)
    assert again.measure(formula, types, 2).kld == 0.25 and not formula.calls
    path.write_bytes(good.replace(b"q4_K", b"q\xff_K"))
    damaged = Journal(path, "c", 4)
    damaged.measure(formula, types, 2)
    assert formula.calls == 1


@pytest.mark.parametrize("name", ["", "a/b.gguf", "..\\x", "/etc/passwd", "x\0y"])
def test_a_base_names_a_file_beside_it(name):
    known = dict.fromkeys(("model_sha256", "architecture", "vocabulary", "text", "text_sha256", "head"), "x")
    known |= {"head_type": "f16", "dtype": "f16", "exact": True, "max_difference": 0.0, "gpu": False, "algorithms": {}}
    known |= {"llama_cpp_commit": "x", "n_ctx": 64, "chunks": 1, "chunks_in_text": 1, "bos": None}
    known |= {"n_vocab": 8, "n_embd": 4}
    assert BaseHeader.model_validate(known | {"model": "f16 (1).gguf"})
    with pytest.raises(ValueError, match="model"):
        BaseHeader.model_validate(known | {"model": name})


TEXT = "A sentence that is a text to calibrate on and to measure with, and another one.\n" * 40


@pytest.mark.parametrize("value", [None, [], "x", {}, {"ppl": "y"}, 3.5, {"model": 1}])
def test_a_damaged_result_is_measured_again(value, tiny_gguf, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT)
    command = ["eval", "-m", str(tiny_gguf), "-f", str(tmp_path / "t.txt"), "-c", "64", "--chunks", "1", "--json", "-q"]
    command += ["-t", "1", "--cache", str(tmp_path / "cache")]
    assert invoke(command) == 0
    known = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "cache").rglob("*.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "json"}
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    for kept in (arrays, {}, {"nll": np.zeros(3)}, {name: array[:, None] for name, array in arrays.items()}):
        np.savez(path, json=data, **kept)
        assert invoke(command) == 0
        assert json.loads(capsys.readouterr().out)["ppl"] == known["ppl"]
    assert ResultFolder(tmp_path / "cache")


def zipped(name, body, packed=zipfile.ZIP_STORED, entry=None):
    """A zip archive of one member. `entry` (place, value) changes a byte of its entry in the archive's directory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        archive.writestr(name, body)
    data = bytearray(stream.getvalue())
    if entry:
        data[data.index(b"PK\x01\x02") + entry[0]] = entry[1]
    return bytes(data)


def npy(array, old=b"", new=b""):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue().replace(old, new) if old else stream.getvalue()


DAMAGED = {
    "empty": b"",
    "not an archive": b"PK\x03\x04 and then nothing",
    "an array alone": npy(np.zeros(3)),
    "a header with an open quote": npy(np.zeros(3), b"'shape': (3,)", b"'shape': (3,'"),
    "pickled": npy(np.array([{}], object)),
    "a member that is no array": zipped("json.npy", b"text"),
    "a member with an open quote": zipped("json.npy", npy(np.zeros(3), b"'shape': (3,)", b"'shape': (3,'")),
    "a shape beyond the memory": zipped("json.npy", npy(np.zeros(3), b"'shape': (3,), }  ", b"'shape': (1<<60,) }")),
    "strongly encrypted": zipped("json.npy", npy(np.zeros(3)), entry=(8, 0x41)),
    "of another version": zipped("json.npy", npy(np.zeros(3)), entry=(6, 0xFF)),
    "packed": zipped("json.npy", npy(np.zeros(1 << 20)), packed=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_arrays_are_one_error(name, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(BitladderError, match=r"x\.npz is damaged"):
        read_arrays(path)
    results = ResultFolder(tmp_path)
    results.put({"a": 1}, {}, {})
    (kept,) = tmp_path.rglob("??/*.npz")
    assert results.get({"a": 1}) == ({}, {})
    kept.write_bytes(DAMAGED[name])
    assert results.get({"a": 1}) is None
    work = UnfinishedWork(tmp_path / "out", "key")
    for piece in ("piece", "state"):
        work.path(piece).write_bytes(DAMAGED[name])
    if name != "an array alone":
        with pytest.raises(BitladderError, match="piece is damaged"):
            work.get("piece")
    assert work.load_state("label", {"json": np.zeros(3)}, SILENT) == 0


def test_an_imatrix_that_no_program_writes(tmp_path, capsys):
    entry = ImatrixEntry(np.ones((1, 4)), np.array([7]))
    good = Imatrix({"blk.0.attn_q.weight": entry}, ["t"], 3, 4)
    for form, old, new, says in (
        ("gguf", struct.pack("<f", 7), struct.pack("<f", 1e30), "no numbers of tokens"),
        (
            "gguf",
            b"imatrix.chunk_count\x04\0\0\0\x03",
            b"imatrix.chunk_count\x05\0\0\0\xff\xff\xff\xff",
            "wrong type or size",
        ),
        ("dat", struct.pack("<ii", 2, 4), struct.pack("<ii", 2, 0), "has 0 sums"),
        ("dat", struct.pack("<ii", 2, 4), struct.pack("<ii", 2, -1), "has -1 sums"),
    ):
        path = tmp_path / f"i.{form}"
        write_imatrix(good, path, form)
        data = path.read_bytes()
        at = data.index(old)
        path.write_bytes(data[:at] + new + data[at + len(new) :])
        for command in (["stats", str(path)], ["imatrix", "--in-file", str(path), "-o", str(tmp_path / "o.gguf")]):
            assert invoke([*command, "-q"]) == 1
            assert says in capsys.readouterr().err
    most = ImatrixEntry(np.ones((1, 4)), np.array([2**52]))
    write_imatrix(Imatrix({"blk.0.attn_q.weight": most}, ["t"], 2**50, 4), tmp_path / "most.gguf")
    assert read_imatrix(tmp_path / "most.gguf").chunk_count == 2**32 - 1


def test_task_files_do_not_fill_the_memory(tmp_path):
    for suffix, pack in ((".bz2", bz2.compress), (".gz", gzip.compress), (".xz", lzma.compress)):
        path = tmp_path / f"bomb.jsonl{suffix}"
        path.write_bytes(pack(b" " * (1 << 27)))
        with pytest.raises(BitladderError, match="more than 64 MiB"):
            load_task(parse_specs(f"arc:{path}")[0])
    body = struct.pack("<I", 1 << 15) + b"x" * (1 << 15)  # a text, two answers, their labels, and no second list
    body += struct.pack("<III", 2, 1, 97)[:8] + b"a" + struct.pack("<I", 1) + b"b" + struct.pack("<iiI", 1, 0, 0)
    count = 1000
    start = 4 * (count + 1)
    (tmp_path / "same.bin").write_bytes(struct.pack(f"<{count + 1}I", count, *[start] * count) + body)
    with pytest.raises(BitladderError, match="overlap"):
        load_task(parse_specs(f"mmlu:{tmp_path / 'same.bin'}")[0])


@pytest.mark.parametrize("line", ['{"a": ' + "9" * 6000 + "}", "[" * 100_000, '{"ctx": "y", "label": "--1"}'])
@pytest.mark.parametrize("task", ["arc", "hellaswag", "winogrande"])
def test_odd_records_are_named(line, task, tmp_path):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(BitladderError, match=r"q\.jsonl"):
        load_task(parse_specs(f"{task}:{tmp_path / 'q.jsonl'}")[0])


def test_factoring_ends():
    rng = np.random.default_rng(0)
    for trial in range(1, 20):
        matrix = rng.standard_normal((6, 6))
        matrix = matrix + matrix.T - trial * np.eye(6)
        with pytest.raises(BitladderError, match="collect them again"):
            damped(-np.eye(6) - matrix @ matrix, 0.01)
        with pytest.raises(BitladderError, match="positive definite"):
            upper_factor(-1e6 * np.eye(6) * trial + np.tri(6) + np.tri(6).T)
    # A matrix that is only a little indefinite is raised, as before.
    upper, d = upper_factor(np.ones((4, 4)))
    assert np.abs(upper @ np.diag(d) @ upper.T - 1).max() < 1e-6


def test_deep_recipes_and_odd_patterns(tiny_gguf, tmp_path, capsys):
    (tmp_path / "deep.toml").write_text("[tensors]\n" + ".".join("a" * 3000) + ' = "q4_K"\n')
    (tmp_path / "digits.toml").write_text("bytes = " + "9" * 6000 + "\n")
    for name in ("deep.toml", "digits.toml"):
        assert invoke(["recipe", "show", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err
    (tmp_path / "t.txt").write_bytes(b"\0(=q8_0\n")
    command = ["quantize", "-m", str(tiny_gguf), "-o", str(tmp_path / "q.gguf"), "Q4_0"]
    assert invoke([*command, "--tensor-type-file", str(tmp_path / "t.txt")]) == 2
    assert "not a regular expression" in capsys.readouterr().err
