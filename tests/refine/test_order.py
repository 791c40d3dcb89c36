"""The order of channels: the model computes the same, and the head's rounded inputs are nearer to what they were."""

import dataclasses
import itertools
from concurrent.futures import Future

import numpy as np
import pytest
import tiny_models
import torch
from moe import write_moe
from smoothing import converted_with_imatrix, logits, smooth

from bitladder.calibrate import (
    GradientOptions,
    MomentsFile,
    MomentsOptions,
    collect_imatrix,
    collect_moments,
    read_imatrix,
    write_imatrix,
)
from bitladder.cli import invoke
from bitladder.engine import Decoding
from bitladder.evaluate import MeasureOptions, load_or_compute_base, noise_floor
from bitladder.gguf import GgufFile
from bitladder.quantize import quantize
from bitladder.refine import ModelFiles, SmoothingError, SmoothingOptions, smooth_model
from bitladder.refine.smooth.changes import smoothed_moments
from bitladder.refine.smooth.order import find_order, order_for_blocks
from bitladder.text import Reading

WIDE = {"hidden_size": 512, "tie_word_embeddings": True, "initializer_range": 0.05}


def wide(folder, text, **config):
    """A converted random model, 512 wide, two channels of which reach the head far too large."""
    source = folder / "checkpoint"
    tiny_models.train_byte_level(source)
    model = tiny_models.llama(source, **WIDE, **config)
    with torch.no_grad():
        model.model.norm.weight[[3, 400]] *= 60
        model.model.embed_tokens.weight[:, [5, 7, 410]] *= 4
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.normal_(0, 0.1)
    return *converted_with_imatrix(folder, model, text, "f16"), model


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory, text):
    """Such a model, its imatrix, and the transformers model."""
    return wide(tmp_path_factory.mktemp("wide"), text)


def test_near_the_best_of_all_orders():
    """Against every way to share eight channels out to two blocks; three times, and never worse than as it was."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        squares = np.exp(rng.normal(0, 2, 8)) * rng.chisquare(1, (50, 8))
        weights = np.exp(rng.normal(0, 1.5, 8))

        def cost(inside, squares=squares, weights=weights):
            halves = np.array(inside), np.setdiff1d(np.arange(8), inside)
            return sum(squares[:, one].max(axis=1).mean() * weights[one].sum() for one in halves)

        least = min(cost(one) for one in itertools.combinations(range(8), 4))
        order, noise = order_for_blocks(squares, weights, block=4)
        assert sorted(order) == list(range(8))
        assert least <= cost(order[:4]) <= 1.2 * least
        assert noise == pytest.approx(cost(order[:4]) / cost(range(4))) and noise <= 1
    alike, noise = order_for_blocks(np.ones((5, 8)), np.ones(8), block=4)
    assert (alike == np.arange(8)).all() and noise == 1


@pytest.mark.parametrize("biases", [False, True], ids=["llama", "biases"])
def test_an_ordered_model_computes_what_transformers_does(tmp_path, text, ordinary, biases):
    path, imatrix, model = wide(tmp_path, text, attention_bias=True, mlp_bias=True) if biases else ordinary
    out = tmp_path / "o.gguf"
    result = smooth(path, imatrix, out, tmp_path / "oi.gguf", scales=False)
    assert result.head_noise < 0.9 and not result.links and result.moved < 3e-3
    tokens = np.random.default_rng(1).integers(2, 380, 48).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].float().numpy()
    assert np.abs(logits(out, tokens) - expected).max() < 5e-3 * np.ptp(expected)
    with GgufFile(path) as before, GgufFile(out) as after:
        moved = 0
        for name, tensor in before.tensors.items():
            old, new = before.read(tensor), after.read(after.tensors[name])
            itemsize = np.uint16 if tensor.type.name == "f16" else np.uint32
            assert np.array_equal(np.sort(old.view(itemsize), axis=None), np.sort(new.view(itemsize), axis=None))
            moved += not np.array_equal(old, new)
        assert moved > len(before.tensors) / 2


def test_what_rounding_inputs_costs_gets_less(tmp_path, text, ordinary):
    """Measured with the inputs of every multiplication rounded to Q8_K, as the kernels of K-quants do."""
    path, imatrix, _ = ordinary
    smooth(path, imatrix, tmp_path / "o.gguf", tmp_path / "oi.gguf", scales=False)
    floors = []
    for model in (path, tmp_path / "o.gguf"):
        settings = MeasureOptions(n_ctx=64, chunks=4)
        with load_or_compute_base(model, text, settings, path=tmp_path / f"{model.stem}.base") as base:
            floors.append(noise_floor(base, 4, settings).activations_k.value)
    assert floors[1] < 0.9 * floors[0]


def test_files_do_not_depend_on_threads(tmp_path, text, ordinary):
    path, imatrix, _ = ordinary
    moments = tmp_path / "m.gguf"
    collect_moments(path, [text], moments, reading=Reading(chunks=2), decoding=Decoding(n_ctx=64))
    written = []
    for threads in (1, 3):
        names = (f"{name}-{threads}.gguf" for name in ("o", "oi", "om"))
        model, matrix, moved = (tmp_path / name for name in names)
        smooth_model(ModelFiles(path, imatrix, (moments,)), ModelFiles(model, matrix, (moved,)), threads=threads)
        written.append([file.read_bytes() for file in (model, matrix, moved)])
    assert written[0] == written[1]


def test_imatrix_and_moments_are_those_of_the_ordered_model(tmp_path, text, ordinary):
    path, imatrix, _ = ordinary
    out = tmp_path / "s.gguf"
    result = smooth(path, imatrix, out, tmp_path / "si.gguf")
    assert result.links and result.head_noise
    collect_imatrix(out, [text], tmp_path / "again.gguf", decoding=Decoding(n_ctx=64))
    said, seen = read_imatrix(tmp_path / "si.gguf").entries, read_imatrix(tmp_path / "again.gguf").entries
    assert said.keys() == seen.keys()
    for name, entry in said.items():
        np.testing.assert_allclose(entry.sums, seen[name].sums, rtol=5e-3, atol=1e-4 * seen[name].sums.max())
    for weighting, chunks in (("tokens", None), ("gradients", 2)):
        for label, model in (("old", path), ("new", out)):
            collect_moments(
                model,
                [text],
                tmp_path / f"{label}.m",
                reading=Reading(chunks=chunks),
                decoding=Decoding(n_ctx=64),
                options=MomentsOptions(weighting, gradients=GradientOptions(half=False, rank=4096)),
            )
        smoothed_moments([tmp_path / "old.m"], result.changes, [tmp_path / "said.m"], "of the smoothed")
        with MomentsFile(tmp_path / "said.m") as ours, MomentsFile(tmp_path / "new.m") as theirs:
            for name in ours.names():
                if name.endswith(("attn_v.weight", "ffn_gate.weight", "ffn_up.weight")):
                    continue  # what a token counts there is said by gradients as they were
                a, b = ours.read(name), theirs.read(name)
                np.testing.assert_allclose(a.inputs, b.inputs, rtol=0.02, atol=2e-3 * np.abs(b.inputs).max())
                if a.outputs is not None:
                    np.testing.assert_allclose(a.outputs, b.outputs, rtol=0.02, atol=2e-3 * np.abs(b.outputs).max())


def test_experts_and_what_is_left_alone(tmp_path, tiny_gguf, text):
    path, imatrix, out = tmp_path / "moe.gguf", tmp_path / "i.gguf", tmp_path / "o.gguf"
    write_moe(tiny_gguf, path, width=512, tied=True)
    collect_imatrix(path, [text], imatrix, decoding=Decoding(n_ctx=64))
    result = smooth(path, imatrix, out, tmp_path / "oi.gguf", scales=False)
    tokens = np.random.default_rng(2).integers(2, 300, 40).astype(np.int32)
    expected = logits(path, tokens)
    assert result.head_noise < 1 and np.abs(logits(out, tokens) - expected).max() < 5e-3 * np.ptp(expected)
    quantize(out, tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "oi.gguf")
    with GgufFile(tmp_path / "q.gguf") as file:
        assert find_order(file, Future(), SmoothingOptions()) is None  # quantized
    with GgufFile(path) as file:
        file.tensors["blk.0.something_new.weight"] = file.tensors["blk.0.attn_norm.weight"]
        assert find_order(file, Future(), SmoothingOptions()) is None
    write_moe(tiny_gguf, tmp_path / "untied.gguf", width=512)
    collect_imatrix(tmp_path / "untied.gguf", [text], imatrix, decoding=Decoding(n_ctx=64))
    with pytest.raises(SmoothingError, match="no other order of channels is known to be better"):
        smooth(tmp_path / "untied.gguf", imatrix, tmp_path / "no.gguf", tmp_path / "noi.gguf", scales=False)
    assert not (tmp_path / "no.gguf").exists()


def test_command(tmp_path, ordinary, capsys):
    path, imatrix, _ = ordinary
    arguments = ["smooth", "-q", "-m", str(path), "--imatrix", str(imatrix), "-o", str(tmp_path / "s.gguf")]
    assert invoke([*arguments, "--no-scales"]) == 0
    said = capsys.readouterr().out
    assert "channels ordered (error of the head's rounded inputs ×" in said and "attn_norm" not in said
    assert invoke([*arguments, "--no-order"]) == 0
    said = capsys.readouterr().out
    assert "ordered" not in said and "attn_norm" in said
    other = read_imatrix(imatrix)
    other.entries = {name: dataclasses.replace(e, sums=e.sums[:, :-32]) for name, e in other.entries.items()}
    write_imatrix(other, tmp_path / "other.gguf")
    assert invoke([*arguments, "--no-scales", "--imatrix", str(tmp_path / "other.gguf")]) == 1
    said = capsys.readouterr().err.strip()
    assert "belongs to another model" in said and "\n" not in said
    assert invoke([*arguments, "--no-order", "--no-scales"]) == 1
    assert "no other order" in capsys.readouterr().err
