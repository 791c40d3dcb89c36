"""Sizes on the command line, one grammar for all options; and numbers of things in sentences."""

import ast
import pathlib
import re

import pytest

import bitladder
from bitladder.cli import invoke
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile
from bitladder.units import listed, number_of, parse_size, size_text, some_of

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


def test_one_thing_has_no_plural():
    assert [number_of(count, "chunk") for count in (0, 1, 2, 40960)] == [
        "0 chunks",
        "1 chunk",
        "2 chunks",
        "40,960 chunks",
    ]
    assert [number_of(count, "matrix", "matrices") for count in (1, 2)] == ["1 matrix", "2 matrices"]
    assert some_of(["a"], "tensor") == "tensor a"
    assert some_of(["a", "b", "c"], "tensor") == "3 tensors (a, …)"


# Things that are counted. A number before one of these words is a number_of: it may be 1.
COUNTED = re.findall(
    r"\w+",
    """answers blocks bytes candidates cells characters chunks choices columns elements endings entries experts files
    kinds lines matrices models passages passes questions records recipes rows rungs shards steps tensors texts
    threads tokens weights""",
)
# Numbers that are never 1: constants, widths, the tokens of a chunk, and measured ones.
NEVER_ONE = re.compile(
    r"_?[A-Z][A-Z_]*(\[-1\]| \+ [A-Z]+)?|with_error.*|', '.join.*|file\.tensors\[name\]\.width|"
    r"(\w+\.)*(n_ctx|n_ctx_train|chunk_size|width|n_vocab|context|base_tokens|sizes)"
)
ROUNDED = re.compile(r"[.+]")  # formats of measured numbers, and of differences


def plurals_by_hand(tree):
    """(line, what is counted) of f-strings that put the plural of a word behind a number."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        for number, text in zip(node.values, node.values[1:], strict=False):
            if not (isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant)):
                continue
            word = re.match(r" (?:more |right |metadata |different )?(\w+)", text.value)
            form = ast.unparse(number.format_spec) if number.format_spec else ""
            if not word or word[1] not in COUNTED or ROUNDED.search(form):
                continue
            if not NEVER_ONE.fullmatch(ast.unparse(number.value)):
                yield number.lineno, f"{ast.unparse(number.value)} {word[1]}"


def test_plurals_by_hand_are_seen():
    source = (
        'f"{len(a)} chunks of {n_ctx} tokens, {b:,} bytes, {c} {d} rungs, {e:.1f} bytes, {MOST} lines, {f} more lines"'
    )
    assert [what for _, what in plurals_by_hand(ast.parse(source))] == [
        "len(a) chunks",
        "b bytes",
        "d rungs",
        "f lines",
    ]


def test_no_plural_by_hand():
    package = pathlib.Path(bitladder.__file__).parent
    found = [
        f"{path.relative_to(package)}:{line}: {what}"
        for path in sorted(package.rglob("*.py"))
        for line, what in plurals_by_hand(ast.parse(path.read_text()))
    ]
    assert not found, found
    counted = re.compile(rf"\{{\{{ ([^}}]*) \}}\}} ({'|'.join(COUNTED)})\b")
    by_hand = {
        match[1]
        for path in (package / "report" / "templates").iterdir()
        for match in counted.finditer(path.read_text())
    }
    # Texts are counted only where there are several.
    several = {"run.texts | length"}
    assert by_hand - several == {"fitting.context"}  # "8k"


def test_all_names_of_a_list_have_one_and():
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
