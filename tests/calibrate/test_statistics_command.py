"""`bitladder stats`: gaps, comparisons, and every form of output."""

import csv
import io
import json
import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from moe import write_moe

from bitladder.calibrate import (
    Imatrix,
    ImatrixEntry,
    compare_imatrices,
    find_gaps,
    grouped_differences,
    read_imatrix,
    write_imatrix,
)
from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile

EXPERTS = [f"blk.{block}.ffn_{kind}_exps.weight" for block in (0, 1) for kind in ("down", "gate", "up")]


@pytest.fixture(scope="module")
def moe(tiny_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(tiny_gguf, path)
    return path


def random_matrix(model, seed, **changed) -> Imatrix:
    """An entry for each weight in the blocks; experts 2, 5, 6 and 7 of block 1 are never reached."""
    rng = np.random.default_rng(seed)
    entries = {}
    with GgufFile(model) as file:
        for name, tensor in file.tensors.items():
            if name.startswith("blk.") and tensor.rows > 1:
                experts = tensor.rows // tensor.rows_per_matrix
                counts = rng.integers(1, 500, experts)
                if experts > 1 and name.startswith("blk.1."):
                    counts[[2, 5, 6, 7]] = 0
                entries[name] = ImatrixEntry(
                    (rng.random((experts, tensor.width)) * counts[:, None]).astype(np.float32), counts
                )
    return Imatrix(entries | changed, ["text.txt"], 4, 128)


@pytest.fixture
def pair(moe, tmp_path, monkeypatch):
    """Two imatrices a.gguf and b.gguf in the working directory."""
    monkeypatch.chdir(tmp_path)
    a, b = random_matrix(moe, 1), random_matrix(moe, 2)
    b.entries["blk.0.attn_v.weight"].sums *= 10
    del a.entries["blk.0.attn_k.weight"]
    b.entries[EXPERTS[3]].counts[2] = 4
    write_imatrix(a, "a.gguf")
    write_imatrix(b, "b.gguf")
    return a, b


def shown(capsys, *arguments: object, code: int = 0) -> str:
    """What the command prints on stdout; on stderr if it fails."""
    assert invoke(["stats", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if code else said.out


def test_gaps(moe, pair):
    a, _ = pair
    a.entries["blk.0.attn_q.weight"].counts[:] = 0
    a.entries["blk.1.attn_q.weight"].sums[0, 3] = np.nan
    gaps = find_gaps(a, moe)
    assert gaps.unreached == {name: ([2, 5, 6, 7], 8) for name in EXPERTS[3:]}
    assert gaps.no_data == ["blk.0.attn_q.weight"] and gaps.not_finite == {"blk.1.attn_q.weight": 1}
    assert gaps.without_entry == ["blk.0.attn_k.weight", "output.weight", "token_embd.weight"]
    assert gaps.not_in_model == []
    assert gaps.lines() == [
        "block 1: 4 of 8 experts never reached in ffn_down_exps, ffn_gate_exps, ffn_up_exps: 2, 5-7",
        "blk.1.attn_q.weight: 1 value not finite; compute it again",
        "entries without a single token: attn_q of block 0",
        "3 weights of the model without an entry: attn_k of block 0; output.weight (collected only with imatrix "
        "--process-output); token_embd.weight (looked up, not multiplied: it never has one)",
    ]
    assert find_gaps(a).without_entry is None
    assert find_gaps(a, moe).of_kinds(["attn_k"]).lines() == [
        "1 weight of the model without an entry: attn_k of block 0"
    ]


def test_gaps_of_the_old_format_are_guessed_with_a_model(moe, pair):
    write_imatrix(pair[0], "a.dat", form="dat")
    assert find_gaps(read_imatrix("a.dat")).lines() == []
    assert find_gaps(read_imatrix("a.dat"), moe).perhaps_unreached == {name: ([2, 5, 6, 7], 8) for name in EXPERTS[3:]}


def test_gaps_against_another_model(moe, pair):
    a, _ = pair
    wider = Imatrix(a.entries | {"blk.0.attn_v.weight": ImatrixEntry(np.ones((1, 512)), np.ones(1, int))}, [], 1, 128)
    with pytest.raises(BitladderError, match=r"attn_v.weight has 512 columns in the imatrix but 256 in"):
        find_gaps(wider, moe)
    with pytest.raises(BitladderError, match="no model but an importance matrix"):
        find_gaps(a, "b.gguf")
    renamed = Imatrix({"other." + name: entry for name, entry in a.entries.items()}, [], 1, 128)
    with pytest.raises(BitladderError, match="has none of the weights"):
        find_gaps(renamed, moe)
    renamed.entries["blk.0.attn_q.weight"] = a.entries["blk.0.attn_q.weight"]
    assert len(find_gaps(renamed, moe).not_in_model) == len(a.entries)


def test_compare_is_brute_force(pair):
    a, b = pair
    found = compare_imatrices(a, b)
    assert found.differences[0].tensor == "blk.0.attn_v.weight" and found.differences[0].change > 5
    changes = [abs(difference.change) for difference in found.differences]
    assert changes == sorted(changes, reverse=True)
    assert found.only_b == ["blk.0.attn_k.weight"] and found.only_a == [] and found.experts_only_a == {}
    assert found.experts_only_b == {EXPERTS[3]: [2]}
    for difference in found.differences:
        one, two = a.entries[difference.tensor], b.entries[difference.tensor]
        pairs = [
            (float(one.sums[i, j]) / int(one.counts[i]), float(two.sums[i, j]) / int(two.counts[i]))
            for i in range(len(one.counts))
            if one.counts[i] and two.counts[i]
            for j in range(one.sums.shape[1])
        ]
        sum_a, sum_b = (math.fsum(x) for x in zip(*pairs, strict=True))
        product = math.fsum(x * y for x, y in pairs)
        norms = math.sqrt(math.fsum(x * x for x, _ in pairs) * math.fsum(y * y for _, y in pairs))
        assert difference.n == len(pairs)
        assert difference.change == pytest.approx(sum_b / sum_a - 1)
        assert difference.cosine == pytest.approx(product / norms)
    layers = {difference.layer: difference for difference in grouped_differences(found.differences, "layer")}
    members = [d for d in found.differences if d.layer == 1]
    weighted = [sum(d.n * getattr(d, side) for d in members) for side in ("sum_a", "sum_b")]
    assert layers[1].change == pytest.approx(weighted[1] / weighted[0] - 1)
    assert layers[1].tensors == 8 and layers[1].n == sum(d.n for d in members)


def test_compare_edges():
    def matrix(sums, counts=(1,), **more):
        return Imatrix(
            {"w": ImatrixEntry(np.atleast_2d(np.array(sums, np.float32)), np.array(counts))} | more, [], 1, 8
        )

    def only(a, b):
        (difference,) = compare_imatrices(a, b).differences
        return difference.change, difference.cosine

    assert only(matrix([0, 0]), matrix([1, 2])) == (math.inf, None)
    assert only(matrix([0, 0]), matrix([0, 0])) == (0, None)
    assert only(matrix([1, 2]), matrix([0, 0])) == (-1, None)
    assert only(matrix([1, np.nan]), matrix([1, 1])) == (None, None)
    assert only(matrix([2, 4], [2]), matrix([1, 2])) == (0, pytest.approx(1))
    # A .dat file has one count for all experts.
    assert only(matrix([[2, 4], [3, 3]], [2, 1]), matrix([1, 2, 3, 3])) == (0, pytest.approx(1))
    assert compare_imatrices(matrix([1, 2], [0]), matrix([1, 2])).only_b == ["w"]
    assert compare_imatrices(matrix([1, 2], [0]), matrix([1, 2])).differences == []
    of_two_models = [
        (matrix([1, 2]), matrix([1, 2, 3])),
        (matrix([[1, 2], [3, 4]], [1, 1]), matrix([[1], [2], [3], [4]], [1] * 4)),
    ]
    for a, b in of_two_models:
        with pytest.raises(BitladderError, match=r"w is 2 × \d in one and .* in the other: these are of two models"):
            compare_imatrices(a, b)
    with pytest.raises(BitladderError, match="no weight in common"):
        compare_imatrices(matrix([1]), Imatrix({"v": ImatrixEntry(np.ones((1, 1)), np.ones(1, int))}, [], 1, 8))


def test_json_and_csv_hold_the_same(capsys, pair, moe):
    data = json.loads(shown(capsys, "a.gguf", "--json", "-m", moe))
    assert data["by"] == "tensor" and data["chunk_count"] == 4 and data["datasets"] == ["text.txt"]
    assert data["gaps"]["unreached"][EXPERTS[3]] == {"count": 4, "of": 8, "experts": [2, 5, 6, 7]}
    assert data["rows"][0]["layer"] == 0 and data["rows"][0]["cossim"] is None
    assert all(0 <= row["active"] <= 1 and 0 <= row["zd"] <= 1 for row in data["rows"])
    table = list(csv.DictReader(io.StringIO(shown(capsys, "a.gguf", "--format", "csv"))))
    assert len(table) == len(data["rows"])
    for line, row in zip(table, data["rows"], strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
    for by in ("layer", "kind"):
        rows = json.loads(shown(capsys, "a.gguf", "--by", by, "--format", "json"))["rows"]
        assert len(rows) == len({row[by] for row in data["rows"]})
    compared = json.loads(shown(capsys, "a.gguf", "b.gguf", "--json"))
    assert compared["only_b"] == ["blk.0.attn_k.weight"] and compared["a"]["imatrix"] == "a.gguf"


def test_nulls_not_nan(capsys, moe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damaged = random_matrix(moe, 1)
    damaged.entries["blk.0.attn_q.weight"].sums[0, 3] = np.nan
    damaged.entries["blk.0.attn_k.weight"].sums[:] = 0
    write_imatrix(damaged, "nan.gguf")
    write_imatrix(random_matrix(moe, 2), "b.gguf")
    for arguments in (["nan.gguf"], ["nan.gguf", "b.gguf"]):
        data = shown(capsys, *arguments, "--json")
        assert not re.search("NaN|Infinity", data) and json.loads(data)
        assert "nan" not in shown(capsys, *arguments, "--format", "csv").replace("nan.gguf", "")
    data = json.loads(shown(capsys, "nan.gguf", "--json"))
    assert data["gaps"]["not_finite"] == {"blk.0.attn_q.weight": 1}
    row = next(row for row in data["rows"] if row["tensor"] == "blk.0.attn_q.weight")
    assert row["sum"] is None and row["n"] == 256
    assert "blk.0.attn_q.weight: 1 value not finite" in shown(capsys, "nan.gguf")
    assert "∞" in shown(capsys, "nan.gguf", "b.gguf").splitlines()[5]
    assert "attn_q" in shown(capsys, "nan.gguf", "--heatmap", "mean")


def test_sort_and_kind(capsys, pair):
    def column(name, *arguments):
        return [row[name] for row in json.loads(shown(capsys, "a.gguf", "--json", *arguments))["rows"]]

    assert column("sum", "--sort", "sum") == sorted(column("sum"), reverse=True)
    assert column("sum", "--sort", "-Σ(Act²)") == sorted(column("sum"))
    assert column("std", "--sort", "σ") == sorted(column("std"), reverse=True)
    cossim = column("cossim", "--sort", "CosSim")
    known = [value for value in cossim if value is not None]
    assert known == sorted(known, reverse=True) and cossim[len(known) :] == [None] * (len(cossim) - len(known))
    assert column("layer", "--sort", "-layer") == sorted(column("layer"), reverse=True)
    assert column("tensor", "--kind", "attn_v", "--kind", "attn_q") == [
        f"blk.{block}.{kind}.weight" for block in (0, 1) for kind in ("attn_q", "attn_v")
    ]
    assert column("cossim", "--kind", "attn_v")[1] is not None


def test_tables(capsys, pair):
    text = shown(capsys, "a.gguf")
    head = text.splitlines()[2].split()
    assert head[:3] == ["Layer", "Tensor", "Σ(Act²)"] and head[-1] == "CosSim"
    assert "gap: block 1: 4 of 8 experts never reached" in text
    lines = shown(capsys, "a.gguf", "--format", "md").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(pair[0].entries) and len({line.count("|") for line in table}) == 1
    assert re.search(r"only in B: attn_k of block 0\n.*experts reached only in B: 2", shown(capsys, "a.gguf", "b.gguf"))


def test_heat_map_is_never_cut(capsys, pair, monkeypatch):
    for width in (40, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        text = shown(capsys, "a.gguf", "--heatmap", "E (norm)")
        assert max(map(len, text.split("\n\n")[0].splitlines())) <= width
        assert all(kind in text for kind in ("attn_k", "ffn_gate_inp", "ffn_up_exps")) and "–" in text
    assert "Change" in shown(capsys, "a.gguf", "b.gguf", "--heatmap", "change")


def test_html_stands_alone(capsys, pair):
    shown(capsys, "a.gguf", "--plot", "map.html", "--statistic", "zd", "-q")
    with open("map.html", encoding="utf-8") as stream:
        text = stream.read()
    assert "<script" not in text and "never reached" in text
    assert [link for link in re.findall(r"https?://[^\"]*", text) if link != "http://www.w3.org/2000/svg"] == []
    svg = ElementTree.fromstring(re.search("<svg.*</svg>", text)[0])
    assert len(svg.findall(".//{*}rect")) == len(pair[0].entries)
    shown(capsys, "a.gguf", "b.gguf", "--plot", "map.html")


def test_png(capsys, pair):
    pytest.importorskip("matplotlib")
    for name, arguments in ("one.png", ["a.gguf"]), ("two.png", ["a.gguf", "b.gguf"]):
        shown(capsys, *arguments, "--plot", name)
        with open(name, "rb") as stream:
            assert stream.read(4) == b"\x89PNG"


def test_png_without_matplotlib(capsys, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = shown(capsys, "a.gguf", "--plot", "x.png", code=1)
    assert said.count("\n") == 1 and "pip install 'bitladder[plot]'" in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent.gguf"], 2, "absent.gguf: no such file"),
        (["a.gguf", "--sort", "size"], 2, "no such column: 'size'; there are layer, kind, sum"),
        (["a.gguf", "--kind", "attn"], 2, "no tensor of kind 'attn'; did you mean attn_k or attn_q or attn_v?"),
        (["a.gguf", "--heatmap", "kind"], 2, "no such column: 'kind'; there are sum"),
        (["a.gguf", "--heatmap", "sum", "--json"], 2, "--heatmap is for the terminal"),
        (["a.gguf", "--plot", "x.svg"], 2, "ends in .png or .html"),
        (["a.gguf", "--statistic", "sum"], 2, "add --plot FILE"),
        (["a.gguf", "-m", "absent.gguf"], 2, "-m absent.gguf: no such file"),
        (["a.gguf", "--heatmap", "cossim", "--kind", "attn_k"], 1, "no tensor has a CosSim"),
    ],
)
def test_errors_are_one_line(capsys, pair, arguments, code, words):
    said = shown(capsys, *arguments, code=code)
    assert words in said and said.count("\n") == 1
