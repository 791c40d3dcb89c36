"""The Fisher estimate of what a candidate costs, against the KLD that it really adds, measured in transformers."""

import numpy as np
import pytest
import tiny_models
import torch
from transformers import LlamaForCausalLM

from bitladder.calibrate import FisherOptions, fisher_costs
from bitladder.convert import convert
from bitladder.errors import BitladderError

TOKENS = np.random.default_rng(0).integers(2, 380, (4, 32)).astype(np.int32)
WEIGHTS = {
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
    "output.weight": "lm_head",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher") / "llama"
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder, initializer_range=0.08)
    convert(folder, folder / "model.gguf", outtype="f32")
    return folder


def candidates(model):
    """For each weight a random error, and one that answers to the mean input, so that it adds up over tokens."""
    rng = np.random.default_rng(1)
    inputs, handles = {}, []
    for name, path in WEIGHTS.items():

        def note(module, args, output, name=name):
            inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1]).mean(0).numpy()

        handles.append(model.get_submodule(path).register_forward_hook(note))
    model(torch.from_numpy(TOKENS.astype(np.int64)))
    for handle in handles:
        handle.remove()
    found = {}
    for name, path in WEIGHTS.items():
        weight = model.get_submodule(path).weight
        scattered = rng.standard_normal(weight.shape) * 0.03 * float(weight.detach().std())
        along = inputs[name] / np.linalg.norm(inputs[name])
        coherent = np.outer(rng.standard_normal(len(weight)), along) * 0.2 * float(weight.detach().std())
        found[name] = {"scattered": scattered.astype(np.float32), "coherent": coherent.astype(np.float32)}
    return found


def measured(model, name, error):
    """Mean KLD (nats per token) that an error adds, in float64."""
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    weight = model.get_submodule(WEIGHTS[name]).weight
    with torch.no_grad():
        before = torch.log_softmax(model(ids).logits, -1)
        weight += torch.from_numpy(error)
        after = torch.log_softmax(model(ids).logits, -1)
        weight -= torch.from_numpy(error)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_costs_are_the_klds_that_are_measured(checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    tried = candidates(model)
    costs = fisher_costs(
        checkpoint / "model.gguf", TOKENS, tried, options=FisherOptions(tokenwise=True, draws=100), threads=1
    )
    assert list(costs) == list(WEIGHTS)
    for name, errors in tried.items():
        for key, error in errors.items():
            cost, truth = costs[name][key], measured(model, name, error.astype(np.float64))
            # 400 squares of one normal number: a relative standard error of sqrt(2/400) = 7 %.
            assert cost.sequence_error == pytest.approx(0.07 * cost.sequence, rel=0.5)
            assert cost.sequence == pytest.approx(truth, rel=0.28), (name, key)
    # Errors at the values of the first block meet in every later token, and squaring token by token misses it.
    value = costs["blk.0.attn_v.weight"]["coherent"]
    assert value.token < 0.6 * value.sequence


def test_candidates_made_when_needed_in_passes_cost_the_same(checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    tried = candidates(model)
    path = checkpoint / "model.gguf"
    whole = fisher_costs(path, TOKENS, tried, options=FisherOptions(draws=2), threads=1)
    late = {name: {key: lambda error=error: error for key, error in errors.items()} for name, errors in tried.items()}
    assert fisher_costs(path, TOKENS, late, options=FisherOptions(draws=2), threads=1, memory=1 << 12) == whole
    assert whole["output.weight"]["scattered"].token is None
    with pytest.raises(BitladderError, match=r"error of output\.weight has the shape \(3, 4\)"):
        fisher_costs(path, TOKENS, {"output.weight": {"q4_0": np.zeros((3, 4), np.float32)}})
