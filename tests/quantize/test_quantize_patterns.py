"""--tensor-type patterns: read as std::regex reads them, and harmless whatever they are."""

import time

import pytest
from quantize_reference import make_model

from bitladder.engine import Request, preset_types, type_by_name
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile
from bitladder.quantize import QuantizeOptions, prepare
from bitladder.recipe import exact_patterns, match_patterns, parse_tensor_type, read_tensor_types

PROBE = type_by_name("f64")  # no tensor has it, and any width holds it


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("patterns"), num_hidden_layers=12, vocab_size=400)


@pytest.fixture(scope="module")
def names(model):
    with GgufFile(model) as file:
        return list(file.tensors)


def library_finds(model, patterns):
    """Tensors that the library gives the probe's type, told the patterns as they are."""
    request = Request("Q8_0", overrides=tuple((pattern, PROBE) for pattern in patterns))
    return {name for name, kind in preset_types(model, request).types.items() if kind == PROBE}


@pytest.mark.parametrize(
    "pattern",
    [
        r"\.([0-9]|1[01257]|31)\.attn_k",
        "attn_v",
        ".",
        "",
        "^output",
        r"weight$",
        r"^blk\.\d+\.ffn_(up|gate)\.weight$",
        r"blk\.(\d)\1\.",
        r"\bffn",
        r"[[:digit:]]{2}\.attn_[^qv]",
        r"[\w.]*?_k\.",
        r"attn_(?!v|k)",
        r"attn_(?=[qk])\w",
        r"[^\d]1\.",
        r"(?:blk.1[01].*(?:up|down))|token_embd",
        r"1{1,2}\.[a-f]",
        r"a|b||c",
        r"\x61ttn_k",
        r"[a-f-]ttn|}]",
        r"attn-k|ffn.up",
        r"(.)\1n",
        r"k\.\w{6,}$",
    ],
)
def test_patterns_find_what_std_regex_finds(pattern, model, names):
    (match,) = match_patterns(model, [(pattern, "q8_0")] if pattern else [("()", "q8_0")], names)
    everything = library_finds(model, [".*"])
    assert set(match.names) & everything == library_finds(model, [pattern])


def test_exact_names_find_these_and_no_others(model, names):
    chosen = {name: PROBE for name in names if "1" in name or "output" in name}
    patterns = exact_patterns(chosen)
    assert len(patterns) < len(chosen) / 2
    assert library_finds(model, [pattern for pattern, _ in patterns]) == chosen.keys() & library_finds(model, [".*"])


def test_the_first_pattern_decides_and_the_table_says_so(model):
    types = ("attn_v|attn_q=q8_0", "attn=q5_k", "attn_v=q4_0", "_norm=q4_0")
    with prepare(model, QuantizeOptions("Q4_K_M", tensor_types=types)) as prepared:
        first, second, third, norms = prepared.choice.patterns
        assert len(first.decided) == len(first.matched) == 24
        # attn_norm is matched too, but never quantized.
        assert len(second.matched) == 60 and len(second.decided) == 24
        assert len(third.matched) == 12 and not third.decided
        assert len(norms.matched) == 25 and not norms.decided
        nothing = [line for line in prepared.choice.warnings if "decides nothing" in line]
        assert len(nothing) == 2 and "attn_v=q4_0" in nothing[0]
        why = {tensor.name: tensor.why for tensor in prepared.choice.tensors}
        assert why["blk.3.attn_v.weight"] == "--tensor-type attn_v|attn_q"
        assert why["blk.3.ffn_up.weight"] == "preset Q4_K_M" and why["blk.3.ffn_norm.weight"] == "kept"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attn_w", "matches no tensor"),
        ("attn(", "not an ECMAScript regular expression"),
        ("[a", "not an ECMAScript"),
        ("*a", "not an ECMAScript"),
        ("(?<=a)ttn", "not an ECMAScript"),
        ("(?i)attn", "not an ECMAScript"),
        ("(a{255}){255}{2}", "repetition of a repetition"),
        ("x{99999999}", "more than 255 repetitions"),
        ("((a{255}){255}){255}", "not an ECMAScript"),
        ("a++", "repetition of a repetition"),
        (r"\p{L}", "no certain meaning"),
        ("[]a]", "empty class"),
        ("[[.a.]]", "collating"),
        ("(" * 300 + "a" + ")" * 300, "more than 100 nested groups"),
        ("a" * 30_000, "more than 20,000"),
        (r"^((.|..)+)+[0-9]$", "backtracks too long"),
        (r"((\w|\.)*)*[0-9]$", "matches no tensor"),  # std::regex would search this one for hours
    ],
)
def test_bad_patterns_are_one_line_at_once(pattern, message, model, names):
    start = time.monotonic()
    with pytest.raises(UsageError, match=message) as caught:
        match_patterns(model, [(pattern, "q8_0")], names)
    assert pattern[:20] in str(caught.value).replace("\\\\", "\\") and "\n" not in str(caught.value)
    assert time.monotonic() - start < 20  # a hang is minutes


def test_the_wrong_one_of_many_is_named(model, names):
    types = [(name.replace(".", r"\."), "q8_0") for name in names]
    types.insert(70, ("attn(_v", "q8_0"))
    with pytest.raises(UsageError, match=r"pattern 'attn\(_v' is not an ECMAScript"):
        match_patterns(model, types, names)
    matches = match_patterns(model, [one for one in types if "(" not in one[0]], names)
    assert [match.first for match in matches] == [(name,) for name in names]


def test_upper_case_is_put_in_lower_case_and_said(model):
    with prepare(model, QuantizeOptions("Q8_0", tensor_types=("ATTN_V=Q4_0",))) as prepared:
        assert prepared.choice.types["blk.0.attn_v.weight"] == "q4_0"
        assert any("lower case" in line for line in prepared.choice.warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v", "PATTERN=TYPE"),
        ("=q8_0", "PATTERN=TYPE"),
        ("attn_v=", "PATTERN=TYPE"),
        ("attn_v=q9_k", "weights cannot be stored as 'q9_k'"),
        (
            "attn_v=q8_1",
            "weights cannot be stored as 'q8_1'",
        ),  # for work in progress: the library aborts when asked for it
        ("attn_v=i32", "weights cannot be stored as 'i32'"),
        ("attn(?=_v)=q8_0", 'cannot hold "="'),
    ],
)
def test_entries_that_are_none(text, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        parse_tensor_type(text)
    file = tmp_path / "types.txt"
    file.write_text(f"ffn=q8_0\n{text}\n")
    with pytest.raises(UsageError, match=r"types\.txt: .*" + message):
        read_tensor_types(file)


def test_a_file_of_entries(tmp_path):
    (tmp_path / "types.txt").write_text(" ffn_up=q8_0\tattn=Q4_K\n\nblk\\.1\\.=f16")
    assert read_tensor_types(tmp_path / "types.txt") == ("ffn_up=q8_0", "attn=Q4_K", "blk\\.1\\.=f16")
    with pytest.raises(UsageError, match="absent"):
        read_tensor_types(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="not a text file"):
        read_tensor_types(tmp_path / "binary")
