"""Damaged and hostile GGUF files: each is one clear line, never a surprise. The library's own reader is the judge."""

import ctypes
import os
import random
import re
import struct

import numpy as np
import pytest

from bitladder.calibrate import read_imatrix
from bitladder.cli import invoke
from bitladder.engine.native import llama
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile

U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10
HUGE = 1 << 60


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


def entry(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))
TOKENS = pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("cé"))
SCORES = pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ3f", F32, 3, 0, -1, -2))
METADATA = [ARCHITECTURE, TOKENS, SCORES, pair("x.flag", 7, b"\1"), pair("x.large", U64, struct.pack("<Q", 7))]
TENSORS = [entry("a.weight", (8, 3)), entry("b.weight", (32, 2), 8, 96), entry("c", (5,), 0, 192)]
DATA = bytes(range(212))  # 96 bytes of F32, 68 of Q8_0 padded to 96, 20 of F32


def gguf(metadata=METADATA, tensors=TENSORS, data=DATA, *, version=3, counts=None, magic=b"GGUF", alignment=32):
    tensor_count, value_count = counts or (len(tensors), len(metadata))
    head = magic + struct.pack("<IQQ", version, tensor_count, value_count) + b"".join([*metadata, *tensors])
    return head + bytes(-len(head) % alignment) + data


def with_value(kind, raw, key="x.bad"):
    return gguf([ARCHITECTURE, pair(key, kind, raw)])


def with_tensor(raw):
    return gguf(tensors=[raw])


BIG_ENDIAN = struct.unpack("<I", struct.pack(">I", 3))[0]
BAD = {
    "empty file": (b"", "has only 0 bytes"),
    "23 bytes": (gguf()[:23], "has only 23 bytes"),
    "wrong magic": (gguf(magic=b"GGJT"), "begins with b'GGJT'"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "version 0": (gguf(version=0), "version 0 is not supported"),
    "version 1": (gguf(version=1), "version 1 is not supported"),
    "version 4": (gguf(version=4), "version 4 is not supported"),
    "big-endian": (gguf(version=BIG_ENDIAN), "big-endian"),
    "2^40 tensors": (gguf(counts=(1 << 40, 5)), "too many for"),
    "2^63 keys": (gguf(counts=(3, 1 << 63)), "too many for"),
    "more keys than there are": (gguf(counts=(0, 9)), "x.bad|ends inside|unknown type|key"),
    "more tensors than there are": (gguf(counts=(5, 5)), "a tensor name|ends inside|tensor"),
    "key of 2^60 bytes": (gguf([struct.pack("<Q", HUGE) + b"k"]), "a metadata key is .* bytes long"),
    "empty key": (gguf([pair("", U8, b"\1")]), "a metadata key is empty"),
    "key that is not UTF-8": (gguf([pair(b"x.\xff", U8, b"\1")]), "a metadata key is not UTF-8"),
    "key with a line break": (gguf([pair("x\ny", 99, b"")]), r"'x\\ny' has the unknown type 99"),
    "key twice": (gguf([ARCHITECTURE, ARCHITECTURE]), "general.architecture occurs twice"),
    "unknown type": (with_value(13, b""), "x.bad has the unknown type 13"),
    "string of 2^60 bytes": (with_value(STRING, struct.pack("<Q", HUGE)), f"x.bad is said to have {HUGE:,} bytes"),
    "string past the end": (with_value(STRING, struct.pack("<Q", 1 << 20)), "ends inside metadata key x.bad"),
    "array of 2^60 numbers": (with_value(ARRAY, struct.pack("<IQ", U32, HUGE)), f"x.bad is said to have {HUGE:,} el"),
    "array past the end": (with_value(ARRAY, struct.pack("<IQ", U64, 1 << 24)), "ends inside metadata key x.bad"),
    "strings past the end": (with_value(ARRAY, struct.pack("<IQ", STRING, 1 << 24)), "ends inside metadata key x.bad"),
    "string of 2^64-1 in an array": (
        with_value(ARRAY, struct.pack("<IQQ", STRING, 2, (1 << 64) - 1)),
        "ends inside metadata key x.bad",
    ),
    "nested array": (with_value(ARRAY, struct.pack("<IQIQ", ARRAY, 1, U8, 0)), "x.bad is an array of type 9"),
    "array of an unknown type": (with_value(ARRAY, struct.pack("<IQ", 77, 0)), "x.bad is an array of type 77"),
    "alignment 0": (with_value(U32, struct.pack("<I", 0), "general.alignment"), "general.alignment is not a power"),
    "alignment 48": (with_value(U32, struct.pack("<I", 48), "general.alignment"), "general.alignment is not a power"),
    "alignment as text": (with_value(STRING, text("32"), "general.alignment"), "general.alignment is not a power"),
    "alignment that moves data": (with_value(U32, struct.pack("<I", 64), "general.alignment"), "b.weight should lie"),
    "tensor twice": (gguf(tensors=[entry("a", (8, 3)), entry("a", (8, 3), 0, 96)]), "tensor a occurs twice"),
    "name of 64 bytes": (with_tensor(entry("n" * 64, (8,))), "a tensor name is 64 bytes long"),
    "name of 2^60 bytes": (with_tensor(struct.pack("<Q", HUGE)), "a tensor name is .* bytes long"),
    "name that is not UTF-8": (with_tensor(entry(b"\xc3(", (8,))), "a tensor name is not UTF-8"),
    "5 dimensions": (with_tensor(entry("a", (1, 1, 1, 1, 1))), "tensor a has 5 dimensions"),
    "2^32-1 dimensions": (with_tensor(text("a") + b"\xff" * 40), "tensor a has 4,294,967,295 dimensions"),
    "zero width": (with_tensor(entry("a", (0, 4))), "tensor a has the shape"),
    "no rows": (with_tensor(entry("a", (8, 0))), "tensor a has the shape"),
    "shape past 2^63": (with_tensor(entry("a", (1 << 32, 1 << 31))), "tensor a ends at byte"),
    "shape past 2^64": (with_tensor(entry("a", (1 << 40, 1 << 40, 1 << 40))), "tensor a ends at byte"),
    "shape that wraps to 16": (with_tensor(entry("a", (1 << 62, 4, 4))), "tensor a ends at byte"),
    "unknown tensor type": (with_tensor(entry("a", (8,), 99)), "tensor a has type number 99"),
    "removed tensor type": (with_tensor(entry("a", (32,), 4)), "tensor a has type number 4"),
    "half a block": (with_tensor(entry("a", (40,), 8)), "tensor a is q8_0, but 40"),
    "offset past the end": (with_tensor(entry("a", (8,), 0, 1 << 40)), "tensor a should lie at offset 0"),
    "offset of 2^64-32": (with_tensor(entry("a", (8,), 0, (1 << 64) - 32)), "tensor a should lie at offset 0"),
    "overlap": (gguf(tensors=[entry("a", (8, 3)), entry("b", (8, 3), 0, 64)]), "tensor b should lie at offset 96"),
    "gap": (gguf(tensors=[entry("a", (8, 3)), entry("b", (8,), 0, 128)]), "tensor b should lie at offset 96"),
    "odd offset": (gguf(tensors=[entry("a", (8, 3)), entry("b", (8,), 0, 97)]), "tensor b should lie at offset 96"),
    "no data": (gguf(data=b""), "tensor a.weight ends at byte"),
    "one byte short": (gguf()[:-1], "tensor c ends at byte"),
    "split.count as text": (with_value(STRING, text("3"), "split.count"), "split.count has the type number 8, not 2"),
}
# The library's parser does not look at the end of the file (its loader does), nor at what names are made of, takes
# tensors without elements, and knows nothing of splits.
STRICTER = {"no data", "one byte short", "key that is not UTF-8", "name that is not UTF-8", "zero width", "no rows"}
STRICTER |= {"split.count as text"}
GOOD = {
    "as it should be, without padding at the end": gguf(),
    "version 2": gguf(version=2),
    "no tensors": gguf(tensors=[], data=b""),
    "no metadata": gguf([]),
    "a scalar": with_tensor(entry("a", ())),
    "a name of 63 bytes": with_tensor(entry("n" * 63, (8,))),
    "an empty array": with_value(ARRAY, struct.pack("<IQ", STRING, 0)),
    "a string that is not UTF-8": with_value(STRING, text(b"\xff\xfe")),
    "more data than needed": gguf(data=DATA + bytes(100)),
    "alignment 8": gguf(
        [pair("general.alignment", U32, struct.pack("<I", 8))], [entry("a", (1,)), entry("b", (2,), 0, 8)], alignment=8
    ),
}


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@pytest.fixture(scope="module")
def library_reads():
    """Whether the library's own parser (gguf_init_from_file) takes a file."""
    library = llama.load_shared_library("ggml-base", llama._base_path)
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_free.argtypes = [ctypes.c_void_p]

    def reads(path):
        found = library.gguf_init_from_file(os.fsencode(path), _Parameters(True, None))
        if found:
            library.gguf_free(found)
        return bool(found)

    return reads


def read_all(path):
    """Everything a caller may ask of a file; returns the error's message, or None."""
    try:
        with GgufFile(path) as file:
            values = {key: value.python() for key, value in file.metadata.items()}
            assert len(values) == len(file.metadata)
            assert file.bpw >= 0 and isinstance(file.architecture, str)
            assert sum(file.read(tensor).size for tensor in file.tensors.values()) == file.tensor_bytes <= file.size
    except BitladderError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_line(name, tmp_path, library_reads):
    data, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    said = read_all(path)
    assert said and re.search(message, said) and "bad.gguf" in said and "\n" not in said and len(said) < 400, said
    assert library_reads(path) == (name in STRICTER)


@pytest.mark.parametrize("name", GOOD)
def test_what_the_library_reads_is_read(name, tmp_path, library_reads):
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD[name])
    assert library_reads(path) and read_all(path) is None


def test_a_scalar_is_a_row_of_one(tmp_path):
    (tmp_path / "scalar.gguf").write_bytes(GOOD["a scalar"])
    with GgufFile(tmp_path / "scalar.gguf") as file:
        assert file.tensors["a"].shape == (1,) and file.read(file.tensors["a"]).tobytes() == DATA[:4]


def test_every_truncation_is_noticed(tmp_path):
    whole, path = gguf(), tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_all(path), f"{size} of {len(whole)} bytes were taken for a file"


INTERESTING = [0, 1, 2, 4, 8, 9, 12, 13, 63, 64, 255, 1 << 16, 1 << 31, 1 << 40, HUGE, 1 << 63, (1 << 64) - 1]


def damaged(data, chance):
    """A copy of the bytes with up to three things wrong with it."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(max(1, len(data) - 8))
        what = chance.randrange(5)
        if what == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[place] = chance.randrange(256)
        elif what == 2:
            data[place : place + 8] = struct.pack("<Q", chance.choice(INTERESTING))
        elif what == 3:
            data[place : place + 4] = struct.pack("<I", chance.choice(INTERESTING) & 0xFFFFFFFF)
        else:
            del data[place : place + chance.choice([1, 4, 8, 100])]
    return bytes(data)


def test_random_damage_is_read_or_refused_and_never_read_by_us_alone(tmp_path, library_reads):
    chance, path = random.Random(1), tmp_path / "damaged.gguf"
    header = gguf(data=b"")
    taken = 0
    for _ in range(3000):
        path.write_bytes(damaged(header, chance) + DATA)
        said = read_all(path)
        assert said is None or ("\n" not in said and len(said) < 500), said
        if said is None:
            taken += 1
            assert library_reads(path), path
    assert 0 < taken < 3000


def test_a_header_alone_decides_how_much_is_read(tmp_path):
    """A sparse file of a terabyte with a header of lies is refused at once."""
    for name in ("key of 2^60 bytes", "strings past the end", "no data"):
        path = tmp_path / "sparse.gguf"
        path.write_bytes(BAD[name][0].replace(struct.pack("<Q", HUGE), struct.pack("<Q", 1 << 39)))
        if name != "no data":
            os.truncate(path, 1 << 40)
        assert read_all(path)


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {"": "a directory", "absent.gguf": "No such file", "pipe": "not a regular file", "loop": "symbolic links"}
    for name, message in cases.items():
        with pytest.raises(BitladderError, match=f"cannot open .*{message}"):
            GgufFile(tmp_path / name)
    with pytest.raises(BitladderError, match="cannot open /dev/null: it is not a regular file"):
        GgufFile("/dev/null")
    with pytest.raises(BitladderError, match="cannot open"):
        GgufFile("zero\0byte")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.gguf").write_bytes(gguf())
    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may read everything, so no mode would do
    with pytest.raises(BitladderError, match=r"cannot open .*secret.gguf: Permission denied"):
        GgufFile(tmp_path / "secret.gguf")


def test_a_file_cut_while_it_is_open(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf())
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        assert np.array_equal(file.read(file.tensors["a.weight"]).reshape(-1)[:4], [0, 1, 2, 3])
        with pytest.raises(BitladderError, match="ends inside tensor c"):
            file.read(file.tensors["c"])


@pytest.mark.parametrize(
    "name", ["empty file", "wrong magic", "2^40 tensors", "overlap", "one byte short", "zero width"]
)
def test_every_verb_says_it_in_one_line(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data, _ = BAD[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    sums = [entry("b.weight.in_sum2", (8, 1)), entry("b.weight.counts", (1, 1), 0, 32)]
    about = [pair("general.type", STRING, text("imatrix")), pair("imatrix.chunk_count", U32, struct.pack("<I", 1))]
    about += [pair("imatrix.chunk_size", U32, struct.pack("<I", 512))]
    about += [pair("imatrix.datasets", ARRAY, struct.pack("<IQ", STRING, 1) + text("t"))]
    (tmp_path / "imatrix.gguf").write_bytes(gguf(about, sums))
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ["quantize", "-m", "bad.gguf", "-o", "out.gguf", "Q8_0"],
        ["eval", "-m", "bad.gguf", "-f", "pydoc:test"],
        ["imatrix", "-m", "bad.gguf", "-f", "pydoc:test", "-o", "out.gguf"],
        ["stats", "imatrix.gguf", "-m", "bad.gguf"],
        ["stats", "bad.gguf"],
        ["run", "bad.gguf", "--out", "ladder", "--text", "pydoc:test"],
    ):
        assert invoke(arguments) == 1, arguments
        captured = capfd.readouterr()
        assert not captured.out and captured.err.count("\n") == 1, captured.err
        assert "bad.gguf" in captured.err, captured.err
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "changed",
    [
        pair("imatrix.datasets", U32, struct.pack("<I", 1)),
        pair("imatrix.chunk_count", STRING, text("one")),
        pair("imatrix.chunk_size", STRING, text("512")),
        pair("general.type", U32, struct.pack("<I", 1)),
    ],
)
def test_an_imatrix_with_metadata_of_other_types(changed, tmp_path):
    about = {b"general.type": pair("general.type", STRING, text("imatrix"))}
    about[b"imatrix.chunk_count"] = pair("imatrix.chunk_count", U32, struct.pack("<I", 1))
    about[b"imatrix.chunk_size"] = pair("imatrix.chunk_size", U32, struct.pack("<I", 512))
    about[b"imatrix.datasets"] = pair("imatrix.datasets", ARRAY, struct.pack("<IQ", STRING, 1) + text("t"))
    about[changed[8 : 8 + struct.unpack_from("<Q", changed)[0]]] = changed
    sums = [entry("b.weight.in_sum2", (8, 1)), entry("b.weight.counts", (1, 1), 0, 32)]
    (tmp_path / "imatrix.gguf").write_bytes(gguf(list(about.values()), sums, np.ones(16, np.float32).tobytes()))
    with pytest.raises(BitladderError, match=r"imatrix\.gguf"):
        read_imatrix(tmp_path / "imatrix.gguf")
