"""Figures of an importance matrix against llama-imatrix --show-statistics and against brute force."""

import math
import re

import gguf
import numpy as np
import pytest
from moe import write_moe

from bitladder.calibrate import (
    Imatrix,
    ImatrixEntry,
    ImatrixOptions,
    by_kind,
    by_layer,
    collect_imatrix,
    read_imatrix,
    tensor_statistics,
    write_imatrix,
)
from bitladder.engine import Decoding
from bitladder.gguf import imatrix_place
from bitladder.text import Reading, load_text

# Columns as llama-imatrix prints them: digits after the point, and the factor to its unit.
PRINTED = {
    "sum": (2, 1),
    "min": (4, 1),
    "max": (4, 1),
    "mean": (2, 1),
    "std": (2, 1),
    "active": (2, 100),
    "n": (0, 1),
    "entropy": (4, 1),
    "entropy_norm": (2, 100),
    "zd": (2, 100),
    "cossim": (4, 1),
}
NUMBER = r"(-?(?:[\d.]+|nan|inf))%?"
ROW = re.compile(r"^ *(-|\d+)\t(\S+) *" + rf"\t *{NUMBER}" * len(PRINTED) + "$", re.M)
LAYER = re.compile(rf"^ *(\d+)\t *{NUMBER}\t *{NUMBER}\t *{NUMBER}$", re.M)


@pytest.fixture(scope="module")
def moe(tiny_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(tiny_gguf, path)
    return path


@pytest.fixture(scope="module")
def matrices(tiny_gguf, moe, calibration_text, tmp_path_factory):
    """Files by model and format; that of the mixture has experts without a token."""
    folder, text = tmp_path_factory.mktemp("matrices"), load_text(str(calibration_text))
    found = {}
    for name, model in ("tiny", tiny_gguf), ("moe", moe):
        for form in ("gguf", "dat"):
            found[name, form] = folder / f"{name}.{form}"
            collect_imatrix(
                model,
                [text],
                found[name, form],
                reading=Reading(chunks=3, spread=False),
                decoding=Decoding(n_ctx=128),
                options=ImatrixOptions(process_output=True, form=form),
            )
    return found


def shown_by_llama(tools, path):
    """The rows llama-imatrix prints: per tensor by (layer, kind), and per layer.

    It may exit before its log thread has written all lines, so it is run until one run shows every line.
    """
    names = read_imatrix(path).entries
    for _ in range(300):
        text = tools.run("llama-imatrix", "-m", "none", "--in-file", path, "--show-statistics", "--no-log-prefix")
        rows, layers = ROW.findall(text), LAYER.findall(text)
        expected = {layer for layer, _ in map(imatrix_place, names) if layer is not None}
        if len(rows) == len(names) and len(layers) == len(expected):
            return {(row[0], row[1]): row[2:] for row in rows}, {row[0]: row[1:] for row in layers}
    pytest.fail(f"llama-imatrix never printed all its lines:\n{text}")


def read_as_they_do(path):
    """The matrix of a file. llama-imatrix knows no stand-ins: it counts them as experts that one token reached."""
    read = read_imatrix(path)
    if path.suffix == ".gguf":
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for name, entry in read.entries.items():
            counts = np.ceil(tensors[f"{name}.counts"].reshape(-1)).astype(np.int64)
            read.entries[name] = ImatrixEntry(tensors[f"{name}.in_sum2"].reshape(entry.sums.shape), counts)
    return read


def near(ours: float, printed: str, digits: int, what: object) -> None:
    """Equal to the printed digits, but for what sums in float32 can change."""
    assert abs(ours - float(printed)) <= 0.5 * 10**-digits + 1e-9 + 2e-6 * abs(ours), (what, ours, printed)


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize("model", ["tiny", "moe"])
def test_equals_show_statistics(model, form, matrices, tools):
    rows, layers = shown_by_llama(tools, matrices[model, form])
    found = tensor_statistics(read_as_they_do(matrices[model, form]))
    assert len(found) == len(rows)
    for ours in found:
        theirs = rows["-" if ours.layer is None else str(ours.layer), ours.kind]
        for (name, (digits, factor)), printed in zip(PRINTED.items(), theirs, strict=True):
            value = getattr(ours, name)
            if name == "cossim" and (ours.layer is None or ours.layer == 0):
                assert value is None and float(printed) == 0
            else:
                near(value * factor, printed, digits, (ours.tensor, name))
    groups = [group for group in by_layer(found) if group.layer is not None]
    assert [str(group.layer) for group in groups] == list(layers)
    for group in groups:
        theirs = layers[str(group.layer)]
        near(group.sum, theirs[0], 2, group)
        near(group.zd * 100, theirs[1], 4, group)
        near(group.cossim or 0, theirs[2], 4, group)
    ours = tensor_statistics(read_imatrix(matrices[model, form]))
    assert any(tensor.unreached for tensor in ours) == ((model, form) == ("moe", "gguf"))
    assert all(tensor in found for tensor in ours if not tensor.unreached)


def test_where_llama_differs_it_is_by_float32(tools, tmp_path):
    """Many entries: llama's Σ is what adding one float32 after another gives; ours is the exact sum, rounded once."""
    rng = np.random.default_rng(0)
    counts = rng.integers(100, 5000, 64)
    sums = (rng.lognormal(0, 1, (64, 2048)) * counts[:, None]).astype(np.float32)
    write_imatrix(Imatrix({"blk.0.ffn_up_exps.weight": ImatrixEntry(sums, counts)}, ["t"], 1, 512), tmp_path / "a.gguf")
    rows, _ = shown_by_llama(tools, tmp_path / "a.gguf")
    (ours,) = tensor_statistics(read_imatrix(tmp_path / "a.gguf"))
    means = (sums / counts[:, None].astype(np.float32)).reshape(-1)
    printed = float(rows["0", "ffn_up_exps"][0])
    assert abs(printed - float(np.cumsum(means)[-1])) < 0.01
    exact = math.fsum((sums.astype(np.float64) / counts[:, None]).reshape(-1))
    assert ours.sum == pytest.approx(exact, rel=1e-14)
    assert 0.01 < abs(printed - exact) < 1e-4 * exact


def brute(entry: ImatrixEntry) -> dict[str, float | None]:
    """The figures by their definitions in DESIGN, one entry at a time."""
    a = [float(x) / int(c) for row, c in zip(entry.sums, entry.counts, strict=True) if c for x in row]
    n, total = len(a), math.fsum(a)
    mean = total / n
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in a) / n)
    entropy = -math.fsum(x / total * math.log2(x / total) for x in a if x > 0) if total > 0 else 0.0
    return {
        "sum": total,
        "min": min(a),
        "max": max(a),
        "mean": mean,
        "std": std,
        "active": sum(abs(x) > 1e-5 for x in a) / n,
        "n": n,
        "entropy": entropy,
        "entropy_norm": entropy / math.log2(n) if n > 1 else None,
        "zd": sum((x - mean) / std > 1 for x in a) / n if std > 0 else 0.0,
    }


def entry(sums, counts) -> ImatrixEntry:
    return ImatrixEntry(np.atleast_2d(np.array(sums, np.float32)), np.array(counts, np.int64))


def imatrix(**entries) -> Imatrix:
    return Imatrix({name.replace("__", "."): found for name, found in entries.items()}, ["t"], 1, 512)


RANDOM = np.random.default_rng(1)


@pytest.mark.parametrize(
    "case",
    [
        entry(RANDOM.lognormal(0, 2, 300), [17]),
        entry([5.0], [3]),
        entry([0.0], [3]),
        entry(np.zeros(64), [9]),
        entry([0.0, 0.0, 7.0, 0.0], [2]),
        entry(RANDOM.lognormal(0, 2, (4, 32)), [1, 1000, 0, 7]),
        entry([[1.0, 2.0], [0.0, 0.0]], [4, 0]),
        entry([1e-5, 0.99e-5, 1.01e-5, 0.0], [1]),
        entry([3e38, 1e-38, 1.0], [1]),
    ],
    ids=["random", "one", "one zero", "zeros", "all in one", "experts", "half", "threshold", "extremes"],
)
def test_figures_are_their_definitions(case):
    (found,) = tensor_statistics(imatrix(blk__0__attn_q__weight=case))
    for name, value in brute(case).items():
        assert getattr(found, name) == (None if value is None else pytest.approx(value, rel=1e-12, abs=1e-14)), name
    assert found.cossim is None and found.unreached == sum(case.counts == 0) and found.experts == len(case.counts)
    assert str(found.entropy) != "-0.0"


def test_equal_entries_have_no_spread_and_no_outliers():
    (found,) = tensor_statistics(imatrix(w=entry([0.1] * 1001, [3])))
    assert found.std == 0 and found.zd == 0 and found.entropy_norm == pytest.approx(1)
    # Where σ is far below μ the difference of squares that llama.cpp takes would be lost.
    (found,) = tensor_statistics(imatrix(w=entry([1000, 1000.001], [1])))
    assert found.std == pytest.approx((float(np.float32(1000.001)) - 1000) / 2)


def test_cossim_is_with_the_previous_block_only():
    one, two, four = ([1.0, 2.0], [2.0, 0.0]), ([0.0, 3.0], [1.0, 1.0]), ([1.0, 0.0], [0.0, 0.0])
    found = tensor_statistics(
        imatrix(
            blk__0__x__weight=entry(one, [1, 2]),
            blk__1__x__weight=entry(two, [5, 1]),
            blk__3__x__weight=entry(four, [1, 0]),
            blk__4__x__weight=entry(four, [3, 0]),
            blk__5__x__weight=entry(np.zeros((2, 2)), [3, 3]),
            blk__6__x__weight=entry(four, [3, 0]),
            blk__7__x__weight=entry([1.0, 2.0, 3.0], [3]),
            blk__8__x__weight=entry([1.0, 2.0, 3.0], [0]),
            blk__9__x__weight=entry([1.0, 2.0, 3.0], [2]),
            blk__10__x__weight=entry([1.0, 2.0, 3.0], [9]),
            output__weight=entry([1.0, 2.0, 3.0], [9]),
        )
    )
    by_layer_number = {row.layer: row.cossim for row in found}
    # Sums, not means: experts weigh by their tokens, as in llama-imatrix.
    assert by_layer_number[1] == pytest.approx((2 * 3 + 2 * 1) / math.sqrt((1 + 4 + 4) * (9 + 1 + 1)))
    assert by_layer_number[4] == pytest.approx(1) and by_layer_number[10] == pytest.approx(1)
    # First, after a gap, of or after zeros, of another width, after a block without data, outside of blocks.
    assert [by_layer_number[layer] for layer in (0, 3, 5, 6, 7, 9, None)] == [None] * 7
    assert 8 not in by_layer_number and [row.layer for row in found][-1] is None


def test_a_value_that_is_not_finite_spoils_its_tensor_only():
    found = tensor_statistics(
        imatrix(
            blk__0__x__weight=entry([1.0, 2.0], [1]),
            blk__1__x__weight=entry([1.0, np.nan], [1]),
            blk__2__x__weight=entry([np.inf, 2.0], [1]),
            blk__2__y__weight=entry([1.0, 3.0], [2]),
        )
    )
    for row in found[1:3]:
        assert row.n == 2 and row.sum is row.mean is row.std is row.zd is row.entropy_norm is row.cossim is None
    assert found[0].sum == 3 and found[3].sum == 2
    layers = by_layer(found)
    assert layers[1].sum is None and layers[1].n == 2 and layers[2].sum == 2


def test_averages_weigh_by_n_and_leave_out_what_is_not_there():
    found = tensor_statistics(
        imatrix(
            blk__0__x__weight=entry(RANDOM.random(8), [1]),
            blk__1__x__weight=entry(RANDOM.random(8), [2]),
            blk__1__y__weight=entry(RANDOM.random((3, 5)), [2, 0, 9]),
            output__weight=entry(RANDOM.random(4), [1]),
        )
    )
    first, second, outside = by_layer(found)
    x, y = found[1], found[2]
    assert (first.layer, second.layer, outside.layer) == (0, 1, None) and first.cossim is None
    assert second.n == 8 + 10 and second.tensors == 2
    for name in ("sum", "zd", "active", "entropy_norm"):
        mean = (8 * getattr(x, name) + 10 * getattr(y, name)) / 18
        assert getattr(second, name) == pytest.approx(mean)
    assert second.cossim == x.cossim  # y has none: llama-imatrix would count it as 0
    assert [group.kind for group in by_kind(found)] == ["output", "x", "y"]
    assert by_kind(found)[1].sum == pytest.approx((found[0].sum + x.sum) / 2)
