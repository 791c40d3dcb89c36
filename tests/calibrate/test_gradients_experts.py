"""Gradients of mixtures of experts: logits against the library's, and what each expert sees against autograd."""

import pathlib
import types

import numpy as np
import pytest
import tiny_models
import torch
from heard import Heard
from moe import mixture, write_mixture

from bitladder.calibrate import (
    FisherOptions,
    GradientOptions,
    MomentsFile,
    MomentsOptions,
    TorchModel,
    check_logits,
    collect_moments,
    fisher_costs,
    weight_gradient,
    weighted_moments,
    why_no_gradients,
)
from bitladder.calibrate.gradients.gradient_pass import chunk_generator
from bitladder.convert import convert
from bitladder.engine import Decoding
from bitladder.text import Reading, Text, load_text

MODELS = pathlib.Path(__file__).parents[1] / "models"
KINDS = ("qwen3moe", "olmoe", "mixtral", "granitemoe")
CHUNKS = np.random.default_rng(0).integers(2, 380, (3, 48)).astype(np.int32)
OPTIONS = GradientOptions(seed=5, half=False)
STACKED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of transformers by kind, and the folder of their GGUFs."""
    root = tmp_path_factory.mktemp("experts")
    tiny_models.train_byte_level(root / "tokenizer")
    tiny_models.llama(root / "tokenizer")
    convert(root / "tokenizer", root / "tokenizer.gguf", outtype="f32")
    made = {}
    for kind in KINDS:
        made[kind] = mixture(kind)
        write_mixture(kind, made[kind], root / "tokenizer.gguf", root / f"{kind}.gguf")
    return made, root


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_librarys(models, kind):
    made, root = models
    agreement = check_logits(root / f"{kind}.gguf", CHUNKS.reshape(-1))
    assert agreement.largest < 0.01 and agreement.same_top > 0.97
    assert why_no_gradients(root / f"{kind}.gguf") is None
    with torch.no_grad(), TorchModel(root / f"{kind}.gguf") as ours:  # and those of the whole model of transformers
        expected = made[kind](torch.from_numpy(CHUNKS[:1].astype(np.int64))).logits[0].numpy()
        assert np.abs(ours.logits(CHUNKS[0]) - expected).max() < 1e-4 * np.ptp(expected)


def test_a_router_with_a_bias_of_choice_and_a_prediction_head():
    """GLM 4 MoE: shared experts, a dense first block, groups of experts, and a block that no forward pass uses."""
    agreement = check_logits(MODELS / "glm4moe-mtp.gguf", CHUNKS.reshape(-1))
    assert agreement.largest < 0.01 and agreement.same_top > 0.97
    assert "experts have biases" in why_no_gradients(MODELS / "gpt-oss.gguf")


def every_expert(self, inputs, chosen, shares):
    """What the experts of a block make, with all experts for all tokens: those that were not chosen count 0."""
    counted = torch.zeros(len(inputs), len(self.gate_up_proj)).scatter_add(1, chosen, shares)
    self.seen, total = [], 0
    for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
        gate, up = (inputs @ part.T for part in gate_up.chunk(2))
        inner = self.act_fn(gate) * up
        output = inner @ down.T
        for each in (gate, up, output):
            each.retain_grad()
        reached = (chosen == expert).any(1)
        self.seen.append((reached, inputs.detach(), inner.detach(), gate, up, output))
        total = total + counted[:, expert, None] * output
    return total


def labels_of(path):
    """The labels that are drawn for each chunk."""
    drawn = []
    with TorchModel(path) as model:
        for index, chunk in enumerate(CHUNKS):
            model.backward(
                chunk,
                [model.head],
                lambda _, __, gradients, ___: drawn.append(gradients.argmax(1, keepdim=True).clone()),
                generator=chunk_generator(5, index),
            )
    return drawn


@pytest.mark.parametrize("kind", ["qwen3moe", "olmoe"])
def test_moments_of_each_expert_are_those_of_autograd(models, kind):
    made, root = models
    path = root / f"{kind}.gguf"
    seen, gradients = {}, {}
    layers = [layer.mlp.experts for layer in made[kind].model.layers]
    for chunk, labels in zip(CHUNKS, labels_of(path), strict=True):
        made[kind].zero_grad()
        for module in layers:
            module.forward = types.MethodType(every_expert, module)
        logits = made[kind](torch.from_numpy(chunk.astype(np.int64))[None]).logits[0]
        torch.log_softmax(logits, -1).gather(1, labels).sum().backward()
        for block, module in enumerate(layers):
            del module.forward
            for expert, (reached, inputs, inner, gate, up, output) in enumerate(module.seen):
                squares = {
                    name: part.grad.square().sum(1) for name, part in (("in", gate), ("up", up), ("out", output))
                }
                seen.setdefault((block, expert), []).append((reached, inputs, inner, squares))
            gate_up, down = module.gate_up_proj.grad, module.down_proj.grad
            for name, part in zip(STACKED, (*gate_up.chunk(2, dim=1), down), strict=True):
                gradients.setdefault(f"blk.{block}.{name}.weight", []).append(part.reshape(-1, part.shape[2]).clone())
    computed = {moments.name: moments for moments in weighted_moments(path, CHUNKS, options=OPTIONS)}
    for block in (0, 1):
        for expert in range(5):
            parts = seen[block, expert]
            reached = torch.cat([part[0] for part in parts])
            assert 0 < reached.sum() < CHUNKS.size
            for name, place, keys in (
                ("ffn_gate_exps", 1, ("in", "up")),
                ("ffn_up_exps", 1, ("in", "up")),
                ("ffn_down_exps", 2, ("out",)),
            ):
                rows = torch.cat([part[place] for part in parts]).double()[reached]
                weights = sum(torch.cat([part[3][key] for part in parts]) for key in keys).double()[reached]
                expected = torch.einsum("t,ti,tj->ij", weights / weights.sum(), rows, rows).numpy()
                moments = computed[f"blk.{block}.{name}.weight"]
                assert moments.inputs.shape == (5, *expected.shape) and moments.outputs is None
                largest = np.abs(expected).max()
                np.testing.assert_allclose(moments.inputs[expert], expected, rtol=0, atol=2e-4 * largest)
    with TorchModel(path) as model:  # the derivative by the weights, whose square prices and whose sign tunes them
        for index, chunk in enumerate(CHUNKS):
            shown = {}
            model.backward(
                chunk,
                list(gradients),
                lambda name, *rows, shown=shown: shown.update({name: weight_gradient(*rows)}),
                generator=chunk_generator(5, index),
            )
            for name, parts in gradients.items():
                np.testing.assert_allclose(
                    shown[name], parts[index], rtol=0, atol=2e-4 * float(parts[index].abs().max())
                )


def test_the_file_has_each_experts_moments_and_tokens(models, tmp_path):
    _, root = models
    path, text = root / "qwen3moe.gguf", Text("part.txt", load_text("pydoc:calibration").text[:1500], "0")
    work = {"reading": Reading(chunks=4), "decoding": Decoding(n_ctx=64, threads=1)}
    heard = Heard()
    collect_moments(path, [text], tmp_path / "m.gguf", progress=heard, **work)
    assert any("tokens are weighted by gradients" in line for line in heard.lines)
    side_by_side = work | {"decoding": Decoding(n_ctx=64, threads=2)}
    collect_moments(path, [text], tmp_path / "two.gguf", **side_by_side)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    plain = MomentsOptions(weighting="tokens")
    collect_moments(path, [text], tmp_path / "plain.gguf", options=plain, **work)
    with MomentsFile(tmp_path / "m.gguf") as weighted, MomentsFile(tmp_path / "plain.gguf") as counted:
        assert weighted.provenance.weighting == "gradients"
        assert weighted.entry("blk.0.ffn_up_exps.weight") == "blk.0.ffn_gate_exps.weight"
        for name in STACKED:
            ours, theirs = (file.read(f"blk.1.{name}.weight") for file in (weighted, counted))
            # The library rounds what it multiplies, so that a token may go to another expert.
            assert np.abs(ours.counts - theirs.counts).sum() <= 4 and ours.counts.sum() == 4 * 64 * 2
            assert ours.inputs.shape == theirs.inputs.shape == (5, *ours.inputs.shape[1:])
    # One block's sums do not fit: positions, and why.
    heard = Heard()
    result = collect_moments(
        path, [text], tmp_path / "little.gguf", options=MomentsOptions(memory=0.001), progress=heard, **work
    )
    assert result.weighting == "positions"
    assert any("positions" in line and "sums of the experts of block" in line for line in heard.lines)


def test_costs_of_experts_are_the_klds_that_are_measured(models):
    _, root = models
    model, rng = mixture("olmoe", seed=3), np.random.default_rng(1)
    chunks = CHUNKS[:2, :32]
    write_mixture("olmoe", model, root / "tokenizer.gguf", root / "costs.gguf")
    experts = model.model.layers[0].mlp.experts
    errors = {}
    for name, weight in (("down", experts.down_proj), ("up", experts.gate_up_proj[:, 96:])):
        size = weight.shape[0] * weight.shape[1], weight.shape[2]
        errors[name] = (rng.standard_normal(size) * 0.02 * float(weight.detach().std())).astype(np.float32)
    candidates = {f"blk.0.ffn_{name}_exps.weight": {"noise": error} for name, error in errors.items()}
    options = FisherOptions(draws=80, tokenwise=True)
    costs = fisher_costs(root / "costs.gguf", chunks, candidates, options=options, threads=1)
    model = model.double()
    tokens = torch.from_numpy(chunks.astype(np.int64))
    before = torch.log_softmax(model(tokens).logits, -1)
    for name, error in errors.items():
        part = experts.down_proj if name == "down" else experts.gate_up_proj[:, 96:]
        with torch.no_grad():
            change = torch.from_numpy(error).double().view(part.shape)
            part += change
            after = torch.log_softmax(model(tokens).logits, -1)
            part -= change
        measured = float((before.exp() * (before - after)).sum(-1).mean().detach())
        cost = costs[f"blk.0.ffn_{name}_exps.weight"]["noise"]
        # 160 squares of one normal number: a relative standard error of sqrt(2/160) = 11 %.
        assert cost.sequence == pytest.approx(measured, rel=0.44), name
        assert cost.token is not None and 0.3 < cost.token / measured < 3
