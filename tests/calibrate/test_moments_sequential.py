"""Moments behind weights that were replaced, against transformers with the same weights replaced."""

import copy

import numpy as np
import pytest
import tiny_models
import torch
from moe import write_moe

from bitladder.calibrate import MomentsFile, MomentsOptions, collect_moments
from bitladder.calibrate.sequential import SequentialModel, asymmetric_target, sequential_moments
from bitladder.convert import convert
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model
from bitladder.errors import BitladderError
from bitladder.text.chunks import Reading, text_chunks
from bitladder.text.texts import Text, load_text

PLACES = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random Llama of transformers, and its GGUF in F32."""
    folder = tmp_path_factory.mktemp("sequential")
    tiny_models.train_byte_level(folder)
    model = tiny_models.llama(folder)
    convert(folder, folder / "f32.gguf", outtype="f32")
    return model, folder / "f32.gguf"


@pytest.fixture(scope="module")
def chunks(models):
    with Model(models[1], vocab_only=True) as model:
        return text_chunks(model, load_text("pydoc:calibration"), 48, chunks=3, spread=True).inputs()


def inputs_of(model, chunks):
    """Inputs [chunks, n_ctx, n_in] by the GGUF's name of the weight."""
    found, handles = {}, []
    places = {f"blk.{b}.{ours}.weight": f"model.layers.{b}.{hf}" for b in range(2) for ours, hf in PLACES.items()}
    for name, place in (places | {"output.weight": "lm_head"}).items():
        hook = lambda _, given, __, name=name: found.__setitem__(name, given[0].numpy().astype(np.float64))  # noqa: E731
        handles.append(model.get_submodule(place).register_forward_hook(hook))
    with torch.no_grad():
        model(torch.from_numpy(chunks.astype(np.int64)))
    for handle in handles:
        handle.remove()
    return found


def close(found, expected):
    # The library keeps keys and values in F16.
    return np.abs(found - expected).max() < 3e-3 * np.abs(expected).max()


@pytest.mark.parametrize("by_input", [False, True])
def test_each_group_sees_what_was_replaced_before_it(models, chunks, by_input):
    model, path = models
    changed, exact = copy.deepcopy(model), inputs_of(model, chunks)
    rng, profile = np.random.default_rng(1), np.repeat([9.0, 1.0], [1, 47])
    w = profile / profile.mean()
    checked = []
    weights = {"blk.1.ffn_down.weight": profile, "blk.1.attn_v.weight": profile}
    groups = sequential_moments(path, chunks, by_input=by_input, weights=weights, cross=True, threads=1, n_ubatch=32)
    for group in groups:
        shifted = inputs_of(changed, chunks)
        for name in group.moments.keys() & shifted.keys():
            x, y = exact[name], shifted[name]
            by = (w if name in weights else np.ones(48)) / (3 * 48)
            found = group.moments[name]
            assert close(found.inputs[0], np.einsum("t,ctj,ctk->jk", by, y, y)), name
            assert close(found.cross, np.einsum("t,ctj,ctk->jk", by, x, y)), name
            assert found.counts.tolist() == [144]
            if name.startswith("blk.1"):  # what was replaced shows
                assert not close(found.inputs[0], np.einsum("t,ctj,ctk->jk", by, x, x)), name
            checked.append(name)
        for name in [name for name in group.moments if name.startswith("blk.0") and name in shifted]:
            layer = changed.get_submodule(f"model.layers.0.{PLACES[name.split('.')[2]]}")
            values = layer.weight.detach().numpy()
            values = values + 0.3 * values.std() * rng.standard_normal(values.shape).astype(np.float32)
            layer.weight.data = torch.from_numpy(values)
            group.replace(name, values)
    assert sorted(checked) == sorted(exact)


def test_nothing_replaced_is_the_plain_collection(models, chunks, tmp_path):
    text = load_text("pydoc:calibration")
    collect_moments(
        models[1],
        [text],
        tmp_path / "m.gguf",
        reading=Reading(chunks=3),
        decoding=Decoding(n_ctx=48, threads=1),
        options=MomentsOptions(weighting="tokens"),
    )
    with (
        SequentialModel(models[1], chunks, cross=True, threads=1) as model,
        MomentsFile(tmp_path / "m.gguf") as plain,
    ):
        groups = model.groups()
        assert [len(names) for names in groups] == [7, 7, 1] and groups[-1] == ["output.weight"]
        assert model.groups(2) == [groups[0] + groups[1], groups[2]]
        assert [len(names) for names in model.groups(by_input=True)] == [3, 1, 2, 1] * 2 + [1]
        assert model.cost(groups) == pytest.approx((4 + 8 + 9) / 9)
        with pytest.raises(BitladderError, match="at least one block"):
            model.groups(0)
        with pytest.raises(BitladderError, match=r"called 'blk\.7\.x'"):
            model.collect(["blk.7.x"])
        for names in groups[1:]:
            for name, found in model.collect(names).items():
                assert np.allclose(found.inputs, plain.read(name).inputs, rtol=1e-3, atol=1e-4 * found.inputs.max())
                assert np.allclose(found.cross, found.inputs[0], rtol=1e-5, atol=1e-5 * found.inputs.max())


def test_experts_have_no_cross_moments(tiny_gguf, tmp_path):
    write_moe(tiny_gguf, tmp_path / "moe.gguf", experts=6)
    text = Text("t", load_text("pydoc:calibration").text[:3000], "0")
    with Model(tmp_path / "moe.gguf", vocab_only=True) as model:
        rows = text_chunks(model, text, 32, chunks=2).inputs()
    with SequentialModel(tmp_path / "moe.gguf", rows, cross=True, threads=1) as model:
        found = model.collect(model.groups()[1])
    assert found["blk.1.ffn_up_exps.weight"].cross is None and found["blk.1.ffn_up_exps.weight"].inputs.shape[0] == 6
    assert found["blk.1.ffn_gate_inp.weight"].cross is not None


def test_the_asymmetric_target_is_least_squares():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((500, 24)) @ rng.standard_normal((24, 24))
    shifted = exact + 0.3 * rng.standard_normal((500, 24)) + 0.2 * exact[:, ::-1]
    weights = rng.standard_normal((10, 24)).astype(np.float32)
    inputs, cross = shifted.T @ shifted / 500, exact.T @ shifted / 500
    best = np.linalg.lstsq(shifted, exact @ weights.T, rcond=None)[0].T
    found = asymmetric_target(weights, inputs.astype(np.float32), cross.astype(np.float32), damping=0)
    assert np.allclose(found, best, atol=1e-2)
    # And rounding the target for H is what counts: the two losses differ by a constant.
    losses = []
    for _ in range(3):
        other = weights + 0.1 * rng.standard_normal(weights.shape)
        whole = np.square(exact @ weights.T - shifted @ other.T).sum() / 500
        losses.append(whole - np.trace((best - other) @ inputs @ (best - other).T))
    assert np.ptp(losses) < 1e-6 * np.mean(losses)
    dead = asymmetric_target(weights, np.zeros((24, 24), np.float32), np.zeros((24, 24), np.float32))
    assert np.array_equal(dead, weights)
    with pytest.raises(BitladderError, match="do not fit rows of 24"):
        asymmetric_target(weights, np.zeros((23, 23), np.float32), np.zeros((23, 23), np.float32))
