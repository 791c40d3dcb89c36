"""The preflight tells the truth: sizes to the byte, what patterns match, what a width forces, room."""

import json
import re
import shutil

import numpy as np
import pytest

from bitladder.cli import invoke
from bitladder.engine import type_by_name
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan
from bitladder.quantize import QuantizeOptions, preflight, prepare, write


@pytest.fixture(scope="module")
def narrow(tiny_gguf, tmp_path_factory):
    """The embedded model with one more tensor, whose rows of 96 weights hold no block of 256."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.gguf"
    with GgufFile(tiny_gguf) as file, path.open("wb") as stream:
        plans = [TensorPlan(t.name, t.shape, t.type) for t in file.tensors.values()]
        extra = TensorPlan("blk.0.ffn_extra.weight", (96, 40), type_by_name("f16"))
        writer = GgufWriter(stream, file.metadata, [*plans, extra])
        for tensor in file.tensors.values():
            writer.write(tensor.name, file.read(tensor))
        weights = np.random.default_rng(1).normal(size=96 * 40).astype(np.float16)
        writer.write(extra.name, weights.view(np.uint8))
        writer.finish()
    return path


@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions("Q4_K_M"),
        QuantizeOptions("Q2_K", tensor_types=("attn_v=q6_k",), override_kv=("olmo2.context_length=int:9",)),
        QuantizeOptions("Q5_0", prune_layers=(1,)),
        QuantizeOptions("Q8_0", split_max_bytes=2_000_000),
    ],
)
def test_sizes_are_exact(options, tiny_gguf, tmp_path):
    with prepare(tiny_gguf, options) as prepared:
        told = preflight(prepared)
        result = write(prepared, tmp_path / "out.gguf", threads=1)
    with GgufFile(result.path) as file:
        assert [part.stat().st_size for part in file.parts] == list(told.files)
        assert told.bytes == sum(part.stat().st_size for part in file.parts)
        assert told.bpw == pytest.approx(file.bpw)
        blocks = [t for t in file.tensors.values() if t.name.startswith("blk.")]
        in_blocks = 8 * sum(t.nbytes for t in blocks) / sum(t.elements for t in blocks)
        assert told.bpw_blocks == pytest.approx(in_blocks)
        for row in told.kinds:
            kinds = [(t, re.sub(r"^blk\.\d+\.", "", t.name), t.type.name) for t in file.tensors.values()]
            members = [t for t, kind, name in kinds if (kind, name) == (row.kind, row.type)]
            assert (row.count, row.bytes) == (len(members), sum(t.nbytes for t in members))


def test_patterns_and_fallbacks(narrow):
    options = QuantizeOptions("Q4_K_M", tensor_types=(r"\.[01]\.attn_v=q6_k", "ffn_extra=q5_k"))
    with prepare(narrow, options) as prepared:
        told = preflight(prepared)
        types = prepared.choice.types
    values, extra = told.patterns
    assert values.matched == values.decided == ("blk.0.attn_v.weight", "blk.1.attn_v.weight")
    assert extra.matched == ("blk.0.ffn_extra.weight",)
    (forced,) = told.fallbacks
    assert (forced.tensor, forced.width, forced.requested) == ("blk.0.ffn_extra.weight", 96, "q5_K")
    assert forced.used == types[forced.tensor]
    used = type_by_name(forced.used)
    assert forced.extra_bytes == 96 * 40 // used.block * used.block_bytes - 96 * 40 * 176 // 256 // 8 * 8


def test_room(tiny_gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 12345))
    out = tmp_path / "out.gguf"
    assert invoke(["quantize", "-m", str(tiny_gguf), "-o", str(out), "Q4_K_M", "-q"]) == 1
    assert "the disk has 12,345 bytes free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_tells_before_it_works(narrow, tmp_path, capsys):
    common = ["quantize", "-m", str(narrow), "Q4_K_M", "--tensor-type", "attn_v=q6_k"]
    assert invoke([*common, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    for words in ("attn_v.weight", "type does not fit", "found in", "disk needed"):
        assert words in dry
    assert invoke([*common, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert invoke([*common, "-o", str(tmp_path / "q.gguf")]) == 0
    captured = capsys.readouterr()
    assert "type does not fit" in captured.err
    assert f"{told['bytes']:,} bytes" in captured.out
    assert (tmp_path / "q.gguf").stat().st_size == told["bytes"] == sum(told["files"])
