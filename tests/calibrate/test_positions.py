"""What an error at a position costs, tried by noise in the loaded model, against gradients through it."""

import numpy as np
import pytest
import tiny_models
import torch
from reference_logits import native_logits
from rewritten import rewritten
from transformers import GPT2Config, GPT2LMHeadModel

from bitladder.calibrate import (
    GradientOptions,
    PositionOptions,
    position_weights,
    weighted_moments,
    why_no_gradients,
)
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Context, Decoding, Model, NoisyOutputs

TOKENS = np.random.default_rng(0).integers(2, 380, (24, 32)).astype(np.int32)
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions") / "llama"
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder, initializer_range=0.08)
    convert(folder, folder / "model.gguf", outtype="f32")
    return folder / "model.gguf"


def test_noise_is_where_it_was_asked_for(model_file):
    noise = NoisyOutputs()
    tokens = TOKENS[:2]
    with (
        Model(model_file) as model,
        Context(model, Decoding(n_ctx=32, n_batch=64, n_ubatch=64, threads=1), n_seq=2, callback=noise) as context,
    ):

        def decode():
            context.clear()
            context.decode(
                tokens.reshape(-1), np.tile(np.arange(32), 2), np.repeat(np.arange(2), 32), np.ones(64, bool)
            )
            return context.logits().reshape(2, 32, -1).copy()

        noise.measure(tokens.size)
        before = decode()
        assert set(noise.squares) == {f"blk.{b}.{kind}.weight" for b in range(2) for kind in KINDS} | {"output.weight"}
        assert all(rows.shape == (64,) and (rows > 0).all() for rows in noise.squares.values())
        noise.disturb({"blk.0.attn_v.weight": 0.1}, np.array([32 + 20]), np.random.default_rng(0))
        after = decode()
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1, :20], before[1, :20])
        assert (np.abs(after[1, 20:] - before[1, 20:]).max(axis=1) > 1e-4).all()
        noise.quiet()
        np.testing.assert_array_equal(decode(), before)


def test_weights_of_positions_are_those_of_gradients(model_file):
    found = position_weights(
        model_file,
        TOKENS,
        decoding=Decoding(threads=1),
        options=PositionOptions(tried_chunks=24, length=32, blocks_together=1),
    )
    exact = {
        one.name: one
        for one in weighted_moments(model_file, TOKENS, options=GradientOptions(outputs=False, draws=4), threads=1)
    }
    assert set(found) == {f"blk.{b}.{kind}.weight" for b in range(2) for kind in KINDS}
    parts = (slice(0, 1), slice(1, 8), slice(8, 32))
    for name, profile in found.items():
        assert profile.shape == (32,) and profile.mean() == pytest.approx(1, rel=1e-5)
        for part in parts:
            wanted = exact[name].by_position[part].mean()
            assert profile[part].mean() == pytest.approx(wanted, rel=0.35, abs=0.02), (name, part)


def test_a_shorter_look_groups_and_longer_chunks(model_file):
    short = position_weights(
        model_file, TOKENS[:4], decoding=Decoding(threads=1), options=PositionOptions(length=16, blocks_together=2)
    )
    assert (
        position_weights(
            model_file, TOKENS[:4], decoding=Decoding(threads=1), options=PositionOptions(length=16, blocks_together=2)
        ).keys()
        == short.keys()
    )
    for kind in KINDS:
        first, second = (short[f"blk.{block}.{kind}.weight"] for block in range(2))
        np.testing.assert_array_equal(first, second)
        assert first.shape == (32,) and first.mean() == pytest.approx(1, rel=1e-5)
        assert len(set(first.tolist())) <= 3
    # The first query sees one key alone, whatever it is: its error costs nothing.
    assert short["blk.0.attn_q.weight"][0] < 0.01


def test_a_model_with_embeddings_of_positions(tmp_path, capsys):
    tiny_models.train_byte_level(tmp_path / "llama")
    tiny_models.llama(tmp_path / "llama", num_key_value_heads=4)
    convert(tmp_path / "llama", tmp_path / "llama.gguf", outtype="f32")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=96)
    model = GPT2LMHeadModel(config).eval()
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for block in (0, 1):
        parts = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
        parts |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        names |= {f"h.{block}.{theirs}": f"blk.{block}.{ours}" for theirs, ours in parts.items()}
    tensors = []
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
            module, _, part = name.rpartition(".")
            linear = weight.dim() == 2 and module.startswith("h.")  # kept the other way round there
            tensors.append((f"{names[module]}.{part}", (weight.T if linear else weight).contiguous().numpy()))
    path = rewritten(
        tmp_path / "llama.gguf",
        tmp_path / "gpt2.gguf",
        architecture="gpt2",
        numbers={"attention.layer_norm_epsilon": config.layer_norm_epsilon},
        extra=tensors,
        without=(".weight", ".bias"),
    )
    tokens = np.random.default_rng(0).integers(2, 380, (2, 64)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens[:1].astype(np.int64))).logits[0].numpy()
    assert np.abs(native_logits(path, tokens[0].tolist()) - expected).max() < 1e-3 * np.ptp(expected)
    assert "embeddings of positions" in why_no_gradients(path)
    weights = position_weights(path, tokens, decoding=Decoding(threads=1))
    assert {f"blk.{block}.{kind}.weight" for block in (0, 1) for kind in ("attn_qkv", "ffn_down")} <= weights.keys()
    assert all(profile.mean() == pytest.approx(1, rel=1e-5) and (profile > 0).all() for profile in weights.values())
    command = ["imatrix", "-q", "-m", str(path), "-f", "pydoc:calibration", "--chunks", "2", "-o", str(tmp_path / "i")]
    capsys.readouterr()
    assert invoke([*command, "-c", "512"]) == 1
    assert capsys.readouterr().err == "bitladder: gpt2.gguf has embeddings of 256 positions; 512 (-c) are too many\n"
    assert invoke([*command, "-c", "256"]) == 0
