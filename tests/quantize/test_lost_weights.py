"""What is too small for a type, and importance of 0 or below, is noticed: the tensor is named, and the way round it."""

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from rewritten import rewritten

from bitladder.calibrate import Imatrix, ImatrixEntry, find_gaps, read_imatrix, write_imatrix
from bitladder.cli import invoke
from bitladder.engine import quantize_rows, type_by_name
from bitladder.errors import BitladderError
from bitladder.quantize import quantize
from bitladder.quantize.importance import lost_units

TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs", "iq3_s"]
WIDTH = 512


def expanded(data, name):
    """The blocks as the gguf package reads them, which is not the library."""
    kinds = {kind.name.lower(): kind for kind in GGMLQuantizationType}
    return quants.dequantize(data, kinds[name.lower()])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_that_vanish_are_counted(name, weighted):
    kind = type_by_name(name)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, WIDTH)).astype(np.float32)
    weights *= np.array([1, 1e-2, 1e-4, 0, 1e-9, 1e-12, 1e-30, 1e-38], np.float32)[:, None]
    weights[1, : WIDTH // 2] *= 1e-12
    importance = rng.random(WIDTH, np.float32) + 0.1 if weighted else None
    data = quantize_rows(weights, kind, importance)
    blocks = weights.reshape(-1, kind.block).astype(np.float64)
    gap = expanded(data, name).reshape(blocks.shape) - blocks
    # Half of the type's own error at a usual scale is far above nothing, and far below everything.
    gone = np.square(gap).sum(1) > 0.9 * np.square(blocks).sum(1)
    gone &= np.square(blocks).sum(1) > 0
    assert gone.sum() >= 4 * WIDTH / kind.block
    assert lost_units(weights, data, kind, importance) == gone.sum()


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("shape", ["normal", "one", "spread"])
def test_lost_rows_are_those_of_the_formula(name, shape):
    """Rows of every size, also where most are left out because of their largest weight."""
    rng = np.random.default_rng(4)
    weights = {
        "normal": rng.standard_normal((2000, 64)),
        "one": np.where(np.arange(64) == 5, 1, 1e-3) * np.ones((2000, 1)),
        "spread": np.exp(2 * rng.standard_normal((2000, 64))),
    }[shape]
    weights = (weights * np.logspace(-12, 0, 2000)[:, None]).astype(np.float32)
    kind = type_by_name(name)
    data = quantize_rows(weights, kind, None)
    wide = weights.astype(np.float64)
    stored = data.view(np.float16).astype(np.float64) if name == "f16" else expanded(data, name).astype(np.float64)
    lost = np.square(stored - wide).sum(1) > 1e-4 * np.square(wide).sum(1)
    assert lost_units(weights, data, kind, None) == lost.sum()
    assert lost.any() == (name == "f16")


@pytest.mark.parametrize("name", TYPES)
def test_ordinary_weights_lose_nothing(name):
    kind = type_by_name(name)
    rng = np.random.default_rng(1)
    for scale in (1.0, 0.02, 1e-3):
        weights = (rng.standard_normal((4, WIDTH)) * scale).astype(np.float32)
        importance = np.exp(3 * rng.standard_normal(WIDTH)).astype(np.float32)
        for columns in (None, importance):
            assert lost_units(weights, quantize_rows(weights, kind, columns), kind, columns) == 0


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_K", "q6_K", "iq4_xs"])
def test_blocks_without_importance_are_counted(name):
    kind = type_by_name(name)
    weights = np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32)
    importance = np.ones(WIDTH, np.float32)
    importance[:256] = 0
    data = quantize_rows(weights, kind, importance)
    blocks = weights.reshape(-1, kind.block)
    gone = np.square(expanded(data, name).reshape(blocks.shape) - blocks).sum(1) > 0.5 * np.square(blocks).sum(1)
    assert lost_units(weights, data, kind, importance) == gone.sum()


def test_rows_of_halves():
    weights = np.full((4, 64), 1.0, np.float32) * np.array([[1.0], [1e-6], [2e-8], [1e-5]], np.float32)
    weights[3, ::2] = 0.3
    kind = type_by_name("f16")
    data = weights.astype(np.float16).view(np.uint8)
    assert lost_units(weights, data, kind, None) == 2  # 1e-6 is 16.8 units, a loss of 5 %


@pytest.fixture(scope="module")
def small_ends(tiny_gguf, tmp_path_factory):
    def edit(name, values):
        if name == "blk.0.attn_k.weight":
            return values * np.float32(1e-9)
        if name == "blk.1.ffn_up.weight":
            values[::5] *= np.float32(1e-12)
        return values

    return rewritten(tiny_gguf, tmp_path_factory.mktemp("small") / "model.gguf", edit)


@pytest.mark.parametrize("preset", ["Q8_0", "Q4_K_M", "F16"])
def test_quantize_names_the_tensors(preset, small_ends, tmp_path, capsys):
    out = tmp_path / "q.gguf"
    assert invoke(["quantize", "-m", str(small_ends), "-o", str(out), preset, "-q"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["blk.0.attn_k.weight:", "blk.1.ffn_up.weight:"]
    keep = [f"--tensor-type={line.rpartition(' ')[2]}" for line in lines]
    if preset == "F16":  # a preset of one type takes no patterns
        preset, keep = lines[0].rpartition(" ")[2], []
        assert preset == "BF16"
    assert invoke(["quantize", "-m", str(small_ends), "-o", str(out), preset, "-q", *keep]) == 0
    assert not capsys.readouterr().err  # the way round it works


def matrix(names, change):
    rng = np.random.default_rng(3)
    entries = {name: ImatrixEntry(rng.random((1, width)) * 100, np.array([100])) for name, width in names.items()}
    for name, entry in entries.items():
        change(name, entry)
    return Imatrix(entries, ["t"], 1, 512)


@pytest.fixture
def names(tiny_gguf):
    from bitladder.gguf import GgufFile

    with GgufFile(tiny_gguf) as file:
        return {
            name: tensor.width for name, tensor in file.tensors.items() if name.startswith("blk.") and tensor.rows > 1
        }


def test_zero_importance_counts_columns_alike(names, tiny_gguf, tmp_path, capsys):
    def change(name, entry):
        if "attn_q" in name:
            entry.sums[:] = 0

    write_imatrix(matrix(names, change), tmp_path / "zeros.gguf")
    write_imatrix(
        matrix(names, lambda name, entry: entry.sums.fill(100) if "attn_q" in name else None), tmp_path / "alike.gguf"
    )
    for word in ("zeros", "alike"):
        arguments = [
            "--imatrix",
            str(tmp_path / f"{word}.gguf"),
            "-o",
            str(tmp_path / f"{word}.q.gguf"),
            "Q4_K_M",
            "-q",
        ]
        assert invoke(["quantize", "-m", str(tiny_gguf), *arguments]) == 0
        assert ("blk.0.attn_q.weight" in capsys.readouterr().err) == (word == "zeros")
    zeros, alike = (gguf.GGUFReader(tmp_path / f"{word}.q.gguf") for word in ("zeros", "alike"))
    for one, other in zip(zeros.tensors, alike.tensors, strict=True):
        assert one.name == other.name and np.array_equal(one.data, other.data)
        assert quants.dequantize(one.data, one.tensor_type).any()
    gaps = find_gaps(read_imatrix(tmp_path / "zeros.gguf"))
    assert set(gaps.zero) == {name for name in names if "attn_q" in name}
    assert any("attn_q" in line and "all 0" in line for line in gaps.lines())


@pytest.mark.parametrize("preset", ["IQ3_S", "Q4_K_M", "Q8_0"])
def test_negative_importance_is_refused(preset, names, tiny_gguf, tmp_path, capsys):
    def change(name, entry):
        if name == "blk.1.ffn_up.weight":
            entry.sums[0, 3] = -1

    path = tmp_path / "negative.gguf"
    write_imatrix(matrix(names, change), path)
    with pytest.raises(BitladderError, match=r"blk\.1\.ffn_up\.weight has the negative value -1 at index 3"):
        quantize(tiny_gguf, tmp_path / "q.gguf", preset, imatrix=path)
    assert not (tmp_path / "q.gguf").exists()
    assert (
        invoke(
            ["plan", "-m", str(tiny_gguf), "--imatrix", str(path), "--like", "Q4_K_M", "-o", str(tmp_path / "r.toml")]
        )
        == 1
    )
    assert "negative" in capsys.readouterr().err
    assert invoke(["stats", str(path)]) == 0
    assert "1 value negative" in capsys.readouterr().out
