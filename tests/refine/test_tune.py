"""Tuning a quant's scales: derivatives against differences, bytes against the library, KLD on text it has not seen."""

import json

import gguf
import numpy as np
import pytest
import torch

from bitladder.calibrate import TorchModel, UnfinishedWork, collect_imatrix
from bitladder.cli import invoke
from bitladder.engine import Decoding, Model, dequantize_into, quantize_rows, type_by_name
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import MeasureOptions, evaluate
from bitladder.gguf import GgufFile
from bitladder.quantize import quantize
from bitladder.refine import TuneOptions, tune, verify
from bitladder.refine.student import FreeScales, Student
from bitladder.rounding import TYPES as ROUNDED_TYPES
from bitladder.text import Reading, Text, load_text

TYPES = list(ROUNDED_TYPES)


def blocks_of(kind, rows=3, width=512):
    """Random weights as a type stores them."""
    weights = np.random.default_rng(7).normal(size=(rows, width)).astype(np.float32)
    return quantize_rows(weights, type_by_name(kind), np.ones(width, np.float32))


def expanded(kind, data):
    out = np.empty((len(data), 512), np.float32)
    dequantize_into(data, type_by_name(kind), out)
    return out


@pytest.mark.parametrize("kind", TYPES)
def test_without_moves_nothing_changes(kind):
    data = blocks_of(kind)
    scales = FreeScales(kind, data, 512)
    assert np.array_equal(scales.blocks(), data)
    np.testing.assert_allclose(scales.weights().numpy(), expanded(kind, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_moved_blocks_are_what_the_student_computes_with(kind):
    scales = FreeScales(kind, blocks_of(kind), 512)
    generator = torch.Generator().manual_seed(1)
    for move in scales.moves:
        move.copy_(0.02 * torch.randn(move.shape, generator=generator))
    found = expanded(kind, scales.blocks())
    # F16 keeps eleven bits of a scale, and an offset takes part of what it is subtracted from.
    np.testing.assert_allclose(found, scales.weights().numpy(), rtol=1e-3, atol=4e-3)
    changed = FreeScales(kind, blocks_of(kind), 512).weights().numpy()
    assert np.abs(found - changed).max() > 0.01


@pytest.mark.parametrize("kind", ["q4_K", "q5_1", "iq4_nl", "iq3_s"])
def test_slopes_are_derivatives(kind):
    scales = FreeScales(kind, blocks_of(kind), 512)
    gradient = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    before = float((gradient * scales.weights()).double().sum())
    for part, slopes in enumerate(scales.slopes(gradient)):
        scales.moves[part][1, 0] += 0.5
        # The weights are linear in the moves.
        assert float((gradient * scales.weights()).double().sum()) - before == pytest.approx(
            0.5 * float(slopes[1, 0]), rel=1e-3, abs=1e-4
        )
        scales.moves[part][1, 0] -= 0.5


@pytest.fixture(scope="module")
def prepared(tiny_gguf, tmp_path_factory):
    """A quant of the embedded model with an imatrix, and its folder."""
    folder = tmp_path_factory.mktemp("tune")
    collect_imatrix(
        tiny_gguf,
        [load_text("pydoc:calibration")],
        folder / "imatrix.gguf",
        reading=Reading(chunks=12, spread=False),
        decoding=Decoding(n_ctx=256),
    )
    quantize(tiny_gguf, folder / "quant.gguf", "Q3_K_S", imatrix=folder / "imatrix.gguf")
    return folder


@pytest.mark.parametrize("device", [None, "torch"])
def test_the_whole_model_s_derivatives_are_those_of_differences(tiny_gguf, prepared, device):
    with Model(tiny_gguf, vocab_only=True) as vocabulary:
        tokens = Reading(chunks=1).rows(vocabulary, [load_text("pydoc:calibration")], 64)[0]
    with (
        TorchModel(tiny_gguf, device=device) as teacher,
        Student(prepared / "quant.gguf", device=device) as student,
    ):
        divergence, slopes = student.backward(tokens, teacher)
        assert divergence > 0
        assert set(slopes) == set(student.parameters)
        # Along the steepest way of the parameters of two matrices.
        for key in [("blk.0.attn_v.weight", 0), ("blk.2.ffn_down.weight", 0)]:
            slope, move = slopes[key].clone(), student.parameters[key]
            found = []
            for step in (1e-3, -1e-3):
                before = move.clone()
                move.add_(slope / slope.norm(), alpha=step)
                student.put()
                found.append(student.backward(tokens, teacher)[0])
                move.copy_(before)
            student.put()
            assert (found[0] - found[1]) / 2e-3 == pytest.approx(float(slope.norm()), rel=0.05)


@pytest.fixture(scope="module")
def tuned(tiny_gguf, prepared):
    texts, held_out = [load_text("pydoc:calibration")], load_text("pydoc:test")
    options, out = TuneOptions(tune_chunks=60, tune_rate=1e-3, tune_guard_chunks=4), prepared / "tuned.gguf"
    return out, tune(tiny_gguf, prepared / "quant.gguf", out, texts, held_out, options, Decoding(n_ctx=256))


def test_same_types_and_bytes_less_divergence_elsewhere(tiny_gguf, prepared, tuned):
    out, result = tuned
    assert result.kept
    assert result.after.value < result.before.value
    with GgufFile(prepared / "quant.gguf") as a, GgufFile(out) as b:
        assert {n: (t.type, t.shape) for n, t in a.tensors.items()} == {
            n: (t.type, t.shape) for n, t in b.tensors.items()
        }
    # Neither the calibration's text nor the guard's.
    words = load_text("pydoc:test").text
    text = Text("the rest", words[len(words) // 2 :], "0" * 64)
    klds = [
        evaluate(
            path, text, MeasureOptions(n_ctx=256, chunks=6), base=tiny_gguf, base_file=prepared / "rest.base"
        ).kld.value
        for path in (prepared / "quant.gguf", out)
    ]
    assert klds[1] < 0.95 * klds[0]


def test_verify_tells_tuned_from_foreign(tiny_gguf, prepared, tuned, tmp_path):
    path, _ = tuned
    found = verify(path, tiny_gguf, imatrix=prepared / "imatrix.gguf")
    assert not found.differing
    assert {way for name, way in found.origins.items() if name.startswith("blk.") and "ffn_up" in name} == {"tuned"}
    other = tmp_path / "other.gguf"
    data = bytearray(path.read_bytes())
    with GgufFile(path) as file:
        block = bytes(file.read(file.tensors["blk.0.ffn_up.weight"]))[:110]  # Q3_K: d is the last two bytes
    data[data.index(block)] ^= 255
    norm = next(one for one in gguf.GGUFReader(path).tensors if one.name == "output_norm.weight")
    data[norm.data_offset + 1] ^= 1  # tuning leaves norms as they are
    other.write_bytes(data)
    differing = ["blk.0.ffn_up.weight", "output_norm.weight"]
    assert sorted(verify(other, tiny_gguf, imatrix=prepared / "imatrix.gguf").differing) == differing


def test_what_does_not_help_is_not_kept(tiny_gguf, prepared, tmp_path):
    options = TuneOptions(tune_chunks=12, tune_rate=0.1, tune_guard_chunks=2)  # far too fast
    texts, held_out, out = [load_text("pydoc:calibration")], load_text("pydoc:test"), tmp_path / "out.gguf"
    made = tune(tiny_gguf, prepared / "quant.gguf", out, texts, held_out, options, Decoding(n_ctx=256))
    assert not made.kept
    assert made.difference.value > 0
    assert (tmp_path / "out.gguf").read_bytes() == (prepared / "quant.gguf").read_bytes()


def test_an_interrupted_descent_goes_on(tiny_gguf, prepared, tmp_path, monkeypatch):
    how = [load_text("pydoc:calibration")], None, TuneOptions(tune_chunks=6, tune_rate=1e-3), Decoding(n_ctx=64)
    whole = tune(tiny_gguf, prepared / "quant.gguf", tmp_path / "whole.gguf", *how)
    calls, backward = [], Student.backward

    def interrupted(self, tokens, teacher):
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return backward(self, tokens, teacher)

    monkeypatch.setattr(Student, "backward", interrupted)
    monkeypatch.setattr(UnfinishedWork, "due", lambda self: True)
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_gguf, prepared / "quant.gguf", out, *how)
    assert {one.name for one in tmp_path.iterdir()} == {"whole.gguf", "out.gguf.parts"}
    made = tune(tiny_gguf, prepared / "quant.gguf", out, *how)
    assert len(calls) == 4 + 3
    assert made.klds == whole.klds
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {one.name for one in tmp_path.iterdir()} == {"whole.gguf", "out.gguf"}


def test_the_command(tiny_gguf, prepared, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    arguments = ["tune", str(prepared / "quant.gguf"), "-m", str(tiny_gguf), "-o", str(out), "-c", "128"]
    assert (
        invoke([*arguments, "-f", "pydoc:calibration", "--tune-chunks", "3", "--tune-guard-chunks", "1", "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 3
    assert said["difference"]["value"] == pytest.approx(said["after"]["value"] - said["before"]["value"], abs=1e-9)
    assert out.is_file()
    assert invoke([*arguments, "-f", "pydoc:test"]) == 2
    assert "is also a calibration text" in capsys.readouterr().err


def test_wrong_inputs(tiny_gguf, prepared, tuned, tmp_path):
    quant, texts = prepared / "quant.gguf", [load_text("pydoc:calibration")]
    how = None, TuneOptions(tune_chunks=1), Decoding(n_ctx=128)
    with pytest.raises(UsageError, match="is an input"):
        tune(tiny_gguf, quant, quant, texts, *how)
    with pytest.raises(UsageError, match="needs a text"):
        tune(tiny_gguf, quant, tmp_path / "x.gguf", [], *how)
    with pytest.raises(BitladderError, match="no quantized blocks"):
        tune(tiny_gguf, tiny_gguf, tmp_path / "x.gguf", texts, *how)
    assert not list(tmp_path.iterdir())
    norm = next(one for one in gguf.GGUFReader(tiny_gguf).tensors if one.name == "output_norm.weight")
    other = bytearray(tiny_gguf.read_bytes())
    other[norm.data_offset + 1] ^= 1  # one bit of one weight
    (tmp_path / "other.gguf").write_bytes(other)
    for made in (quant, tuned[0]):
        with pytest.raises(BitladderError, match=r"model of the same shapes: output_norm\.weight has other values"):
            tune(tmp_path / "other.gguf", made, tmp_path / "x.gguf", texts, *how)
    assert not (tmp_path / "x.gguf").exists()
