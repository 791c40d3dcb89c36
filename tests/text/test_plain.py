"""What is not UTF-8 text is recognised, and what is, or nearly is, is kept byte by byte."""

import bz2
import gzip
import io
import lzma
import zipfile

import pytest

from bitladder.errors import BitladderError
from bitladder.evaluate import load_task, parse_specs
from bitladder.text import load_text

WORDS = "It costs 3 € in the café, naïve as it is. " * 200


def zipped(data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (WORDS.encode("utf-16"), "UTF-16"),
        (b"\xfe\xff" + WORDS.encode("utf-16-be"), "UTF-16"),
        (WORDS.encode("utf-16-le"), "UTF-16"),
        (WORDS.encode("utf-16-be"), "UTF-16"),
        (WORDS.encode("utf-32"), "UTF-32"),
        (WORDS.encode("cp1252"), "WINDOWS-1252"),
        (("é" * 30).encode("latin-1"), "WINDOWS-1252"),
        (b"text\0text" * 100, "zero byte at 4"),
        (gzip.compress(WORDS.encode()), "gzip"),
        (bz2.compress(WORDS.encode()), "bzip2"),
        (lzma.compress(WORDS.encode()), "xz"),
        (zipped(WORDS), "zip"),
        (b"%PDF-1.7\n" + bytes(range(256)), "PDF"),
        (b"PAR1" + bytes(200), "Parquet"),
    ],
)
def test_what_is_no_text_is_named(data, what, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(BitladderError, match=what) as caught:
        load_text(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "q.jsonl").write_bytes(data)
    with pytest.raises(BitladderError, match=what):
        load_task(parse_specs(f"arc:{tmp_path / 'q.jsonl'}")[0])


@pytest.mark.parametrize(
    "data",
    [
        WORDS.encode(),
        "é".encode()[1:] + WORDS.encode() + "€".encode()[:2],  # cut inside characters, as head -c cuts
        WORDS.encode() * 10 + b"\xe9" + WORDS.encode() * 10,  # a stray byte
    ],
)
def test_text_keeps_its_bytes(data, tmp_path):
    (tmp_path / "t.txt").write_bytes(data)
    assert load_text(str(tmp_path / "t.txt")).text.encode("utf-8", "surrogateescape") == data
