"""What blocks are worth, measured in the loaded model, against files that lack them."""

import json

import pytest

from bitladder import evaluate as ev
from bitladder.cli import invoke
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.text import builtin_text, load_text
from bitladder.trial import blocks_left_out

SETTINGS = ev.MeasureOptions(n_ctx=64, chunks=3, threads=1)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(builtin_text("test")[:4000])
    return load_text(str(tmp_path / "text.txt"))


def test_a_block_left_out_is_a_block_pruned(tiny_gguf, text, tmp_path):
    with ev.load_or_compute_base(tiny_gguf, text, SETTINGS, path=tmp_path / "base") as base:
        found = blocks_left_out(base, SETTINGS)
        assert [one.block for one in found] == list(range(len(found)))
        for one in (found[0], found[-1]):
            pruned = tmp_path / f"without-{one.block}.gguf"
            quantize(tiny_gguf, pruned, QuantizeOptions("F16", prune_layers=(one.block,)), threads=1)
            real = ev.measure(pruned, text, SETTINGS, base=base).scores
            assert one.kld.value == pytest.approx(real.kld.value, rel=1e-3)
            assert one.kld.error == pytest.approx(real.kld.error, rel=1e-2)
            assert tiny_gguf.stat().st_size - pruned.stat().st_size == pytest.approx(one.bytes, rel=1e-2)
        again = blocks_left_out(base, SETTINGS)  # every block was put back
    assert [one.kld for one in again] == [one.kld for one in found]


def test_command(tiny_gguf, text, tmp_path, capsys):
    model = tmp_path / "model.gguf"
    model.symlink_to(tiny_gguf)
    arguments = ["plan", "-m", str(model), "-f", str(tmp_path / "text.txt"), "-c", "64", "--chunks", "2", "-t", "1"]
    assert invoke(arguments) == 2
    assert "--suggest-prune" in capsys.readouterr().err
    assert invoke([*arguments, "--suggest-prune", "-q"]) == 0
    assert "--prune-layers" in capsys.readouterr().out


def test_chunks_that_are_given_are_taken(tiny_gguf, text, tmp_path, capsys):
    model = tmp_path / "model.gguf"
    model.symlink_to(tiny_gguf)
    settings = ev.MeasureOptions(n_ctx=32, threads=1)
    arguments = ["plan", "-m", str(model), "-f", str(tmp_path / "text.txt"), "-c", "32", "-t", "1", "--suggest-prune"]
    with ev.load_or_compute_base(tiny_gguf, text, settings, path=tmp_path / "base") as base:
        # 12 is the default of a plan, 4 that of pruning.
        for words, chunks in ((["--chunks", "12"], 12), ([], 4)):
            direct = blocks_left_out(base, settings, chunks=chunks)
            assert invoke([*arguments, *words, "--json", "-q"]) == 0
            printed = {one["block"]: one["kld"]["value"] for one in json.loads(capsys.readouterr().out)}
            assert printed == {one.block: one.kld.value for one in direct}
