"""Sizes on the command line: one grammar for all options."""

import re

import pytest

from bitladder.cli import invoke
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile
from bitladder.units import parse_size, size_text

OPTIONS = ("--size", "--vram", "--split-max-size")


def gguf_split_size(text):
    """What llama-gguf-split makes of --split-max-size: split_str_to_n_bytes of tools/gguf-split/gguf-split.cpp."""
    match = re.fullmatch(r"(\d+)([MG])", text)
    return int(match[1]) * {"M": 1000 * 1000, "G": 1000 * 1000 * 1000}[match[2]]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.7GiB", int(3.7 * 2**30)),
        ("3.7G", 3_700_000_000),
        ("4.2GB", 4_200_000_000),
        ("900MB", 900_000_000),
        ("123456", 123456),
        ("1kib", 1024),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size
    assert size_text(size).replace(",", "").count(str(size)) == 1


@pytest.mark.parametrize("text", ["1M", "300M", "2G", "17G"])
def test_sizes_as_llama_gguf_split_takes_them(text):
    assert parse_size(text) == gguf_split_size(text)


@pytest.mark.parametrize("text", ["", "big", "-3G", "-1M", "0", "0M", "G", "3X", "1e9", "3 GiBs"])
def test_what_is_no_size_is_refused(text):
    for option in OPTIONS:
        with pytest.raises(UsageError, match=option):
            parse_size(text, option)


def test_shards_take_the_sizes_that_plans_take(tiny_gguf, tmp_path):
    with GgufFile(tiny_gguf) as file:
        largest = max(tensor.nbytes for tensor in file.tensors.values())
    limit = 2 * largest / 2**20
    assert invoke(["quantize", "-q", "-m", str(tiny_gguf), "-o", str(tmp_path / "q.gguf"), "COPY"]) == 0
    options = ["-o", str(tmp_path / "s.gguf"), "--split-max-size", f"{limit:.6f}MiB"]
    assert invoke(["quantize", "-q", "-m", str(tiny_gguf), *options, "COPY"]) == 0
    shards = sorted(tmp_path.glob("s-*.gguf"))
    assert len(shards) > 1
    with GgufFile(shards[0]) as split, GgufFile(tmp_path / "q.gguf") as whole:
        assert set(split.tensors) == set(whole.tensors)
        for part in range(len(shards)):
            assert sum(tensor.nbytes for tensor in split.tensors.values() if tensor.part == part) <= 2 * largest
