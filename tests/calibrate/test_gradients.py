"""Gradients through the model: its forward pass against the library's, its moments against transformers' autograd."""

import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from rewritten import rewritten
from transformers import LlamaForCausalLM, Olmo2ForCausalLM

from bitladder.calibrate import GradientOptions, TorchModel, check_logits, weighted_moments, why_no_gradients
from bitladder.calibrate.gradients import usable
from bitladder.calibrate.gradients.entry_sums import Gram, Leverage
from bitladder.calibrate.gradients.gradient_pass import chunk_generator
from bitladder.calibrate.gradients.modules import Modules
from bitladder.convert import convert
from bitladder.errors import BitladderError, GradientsError, UsageError

TOKENS = np.random.default_rng(0).integers(2, 380, (3, 48)).astype(np.int32)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {
    "llama": (tiny_models.llama, {"rope_parameters": LLAMA3}),
    "tied": (tiny_models.llama, {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "biases": (tiny_models.llama, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "olmo2": (tiny_models.olmo2, {"rope_parameters": YARN}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """F32 GGUFs by name, each beside its checkpoint."""
    root = tmp_path_factory.mktemp("gradients")
    tiny_models.train_byte_level(root / "tokenizer")
    for name, (make, config) in KINDS.items():
        tiny_models.train_byte_level(root / name)
        make(root / name, **config)
        convert(root / name, root / f"{name}.gguf", outtype="f32")
    return root


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_the_librarys(models, name):
    found = check_logits(models / f"{name}.gguf", TOKENS.reshape(-1))
    assert found.positions == TOKENS.size and found.largest < 0.003 and found.same_top > 0.97


def vectors(size, *names):
    """Random norms of both blocks, by the ends of their names."""
    rng = np.random.default_rng(0)
    return [
        (f"blk.{block}.{name}", rng.uniform(0.5, 1.5, size).astype(np.float32)) for block in (0, 1) for name in names
    ]


def matrices(rows, width, *names):
    rng = np.random.default_rng(1)
    return [
        (f"blk.{block}.{name}", rng.normal(0, 0.15, (rows, width)).astype(np.float32))
        for block in (0, 1)
        for name in names
    ]


PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
AFTER = vectors(64, "post_attention_norm.weight", "post_ffw_norm.weight")
HEAD_NORMS = vectors(16, "attn_q_norm.weight", "attn_k_norm.weight")
CAPPED = {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16}
XIELU = {"alpha_p": [0.2, 0.4], "alpha_n": [-1.0, -0.5], "beta": [0.5, 0.5], "eps": [-1e-6, -1e-6]}
# By architecture: the model that it is made from, further numbers and tensors, and tensors that are left out.
FAMILIES = {
    "qwen2": ("biases", {}, [], [f"{name}.bias" for name in PROJECTIONS[3:]]),
    "qwen3": ("tied", {}, HEAD_NORMS, []),
    "gemma2": ("tied", CAPPED | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}, AFTER, []),
    "gemma3": ("tied", CAPPED, AFTER + HEAD_NORMS, []),
    "granite": (
        "tied",
        {"logit_scale": 4.0, "residual_scale": 0.5, "embedding_scale": 3.0, "attention.scale": 0.2},
        [],
        [],
    ),
    "phi3": (
        "biases",
        {"attention.sliding_window": 0},  # as Phi 4 has it
        matrices(96, 64, "attn_qkv.weight") + matrices(192, 64, "ffn_up.weight"),
        [".bias", *(f"{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"))],
    ),
    "starcoder2": (
        "biases",
        {"attention.layer_norm_epsilon": 1e-5},
        [
            *vectors(64, "attn_norm.bias", "ffn_norm.bias"),
            ("output_norm.bias", np.linspace(-1, 1, 64, dtype=np.float32)),
        ],
        ["ffn_gate.weight", "ffn_gate.bias"],
    ),
    "smollm3": ("tied", {}, [], []),
    "exaone4": ("tied", {}, AFTER + HEAD_NORMS, ["attn_norm.weight", "ffn_norm.weight"]),  # as the one of 1.2B
    "olmo2": ("olmo2", {"attention.sliding_window": 16}, [], []),  # OLMo 3
    "nemotron": (
        "llama",
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8},
        [
            *vectors(64, "attn_norm.bias", "ffn_norm.bias"),
            ("output_norm.bias", np.linspace(-1, 1, 64, dtype=np.float32)),
        ],
        ["ffn_gate.weight", "rope_freqs.weight"],
    ),
    "apertus": (
        "llama",
        {f"xielu.{part}": values for part, values in XIELU.items()},
        HEAD_NORMS,
        ["ffn_gate.weight"],
    ),
    # Norms without weights, of which gguf knows nothing.
    "olmo": ("tied", {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": 0.5}, [], ["norm.weight"]),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_of_other_families(models, architecture, tmp_path):
    source, numbers, extra, without = FAMILIES[architecture]
    path = rewritten(
        models / f"{source}.gguf",
        tmp_path / "model.gguf",
        architecture=architecture,
        numbers=numbers,
        extra=extra,
        without=without,
    )
    agreement = check_logits(path, TOKENS.reshape(-1))
    assert agreement.largest < 0.003 and agreement.same_top > 0.97
    assert why_no_gradients(path) is None


def test_a_forward_pass_that_is_not_the_librarys_is_refused(models, monkeypatch):
    monkeypatch.setattr(Modules, "_rotates_neighbours", lambda self: True)  # q and k stay as they are in the file
    with pytest.raises(BitladderError, match=r"llama\.gguf: torch's logits differ .* cannot be trusted"):
        next(weighted_moments(models / "llama.gguf", TOKENS))


def test_what_fails_in_transformers_own_code_is_one_line(models, monkeypatch):
    def fails(self, stream):
        raise IndexError("no such\nrow")

    monkeypatch.setattr(Modules, "_final", fails)
    with pytest.raises(BitladderError, match=r"^llama\.gguf: transformers' modules fail: IndexError: no such$"):
        next(weighted_moments(models / "llama.gguf", TOKENS))


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_few_positions_may_be_ill_conditioned(models, monkeypatch, share):
    """Rounding alone moves the second token of some texts by 7 % of the range: no reason to trust no gradient."""
    logits, tokens = usable.sequence_logits, TOKENS.reshape(-1)

    def moved(*arguments, **options):
        found = logits(*arguments, **options)
        found[: round(share * len(found)), 0] += 0.1 * np.ptp(found)
        return found

    monkeypatch.setattr(usable, "sequence_logits", moved)
    if share < 0.1:
        found = check_logits(models / "llama.gguf", tokens)
        assert found.typical < 0.003 and found.largest > 0.03
    else:
        with pytest.raises(BitladderError, match="cannot be trusted"):
            check_logits(models / "llama.gguf", tokens)


def without_heads(source, out):
    """The model with another name for its number of heads, of the same length."""
    key = b"llama.attention.head_count"
    data = source.read_bytes().replace(
        len(key).to_bytes(8, "little") + key, len(key).to_bytes(8, "little") + key[:-1] + b"x"
    )
    out.write_bytes(data)
    return out


def test_what_is_not_known_is_refused(models, tmp_path):
    scale = [("blk.0.attn_q.scale", np.ones(1, np.float32))]
    with pytest.raises(BitladderError, match=r"no use for tensor blk\.0\.attn_q\.scale"):
        TorchModel(rewritten(models / "tied.gguf", tmp_path / "scaled.gguf", extra=scale))
    with pytest.raises(GradientsError, match=r"transformers has no architecture 'plm'"):
        TorchModel(rewritten(models / "tied.gguf", tmp_path / "plm.gguf", architecture="plm"))
    with pytest.raises(GradientsError, match=r"gpt2\.gguf: "):
        TorchModel(rewritten(models / "tied.gguf", tmp_path / "gpt2.gguf", architecture="gpt2"))
    with pytest.raises(GradientsError, match=r"headless\.gguf has no attention\.head_count"):
        TorchModel(without_heads(models / "tied.gguf", tmp_path / "headless.gguf"))
    with pytest.raises(UsageError, match=r"does not multiply by a weight called 'output\.weight'"):
        next(weighted_moments(models / "tied.gguf", TOKENS, names=["output.weight"]))


EMBEDDING = "token_embd.weight"
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def by_autograd(kind, folder, tokens, labels):
    """Inputs [length, n_in] and gradients [length, n_out] of every matrix, by GGUF name, from transformers."""
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    modules = {
        f"blk.{b}.{ours}.weight": f"model.layers.{b}.{theirs}" for b in range(2) for ours, theirs in PARTS.items()
    }
    modules |= {"output.weight": "lm_head", EMBEDDING: "model.embed_tokens"}
    seen, handles = {}, []
    for name, path in modules.items():

        def hook(module, inputs, output, name=name):
            output.retain_grad()
            seen[name] = (inputs[0][0].detach(), output)

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    torch.log_softmax(logits, -1).gather(1, labels).sum().backward()
    return {name: (inputs.numpy(), output.grad[0].numpy()) for name, (inputs, output) in seen.items()}


def pairs_by_autograd(path, kind, folder, chunks, seed):
    """By GGUF name, for each chunk: inputs and gradients as transformers has them, for the labels that we draw."""
    expected = {}
    with TorchModel(path) as model:
        for index, chunk in enumerate(chunks):
            shown = {}
            model.backward(
                chunk,
                [model.head],
                lambda _, inputs, gradients, __, shown=shown: shown.update(
                    labels=gradients.argmax(1, keepdim=True).clone()
                ),
                generator=chunk_generator(seed, index),
            )
            for weight, pair in by_autograd(kind, folder, chunk, shown["labels"]).items():
                expected.setdefault(weight, []).append(pair)
    return expected


def weighted(rows, weights):
    return np.einsum("t,ti,tj->ij", weights / weights.mean(), rows, rows) / len(rows)


def leverages(rows, moments):
    mean = np.trace(moments) / len(moments)
    return np.einsum("ti,ij,tj->t", rows, np.linalg.inv(moments + 0.1 * mean * np.eye(len(moments))), rows)


def blocks_of(weight, size):
    """Which numbers of an output are multiplied with each other: all, those of a head, or each by itself."""
    part = weight.split(".")[-2]
    width = {"attn_q": 16, "attn_k": 16}.get(part, size)
    numbers = np.arange(size) // width
    return numbers[:, None] == numbers


SHARED = [("ffn_gate", "ffn_up"), ("attn_q",), ("attn_k",), ("attn_v",), ("attn_output",), ("ffn_down",)]


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize(("name", "kind"), [("llama", LlamaForCausalLM), ("olmo2", Olmo2ForCausalLM)])
def test_moments_are_those_of_autograd_per_token(models, name, kind, count):
    chunks = np.random.default_rng(0).integers(2, 380, (count, 48)).astype(np.int32)
    path = models / f"{name}.gguf"
    pairs = pairs_by_autograd(path, kind, models / name, chunks, 5)
    options = GradientOptions(seed=5, half=False)
    computed = {moments.name: moments for moments in weighted_moments(path, chunks, options=options)}
    assert computed.keys() == pairs.keys()
    # Every fourth chunk tells what leverages the tokens of the others have.
    pilots = np.repeat((np.arange(count) % 4 == 0) & (count >= 8), chunks.shape[1])
    entries = [
        ("output.weight",),
        (EMBEDDING,),
        *(tuple(f"blk.{b}.{part}.weight" for part in shared) for b in (0, 1) for shared in SHARED),
    ]
    for entry in entries:
        weights, outputs = 0, {}
        for weight in entry:
            x, g = (np.concatenate(parts).astype(np.float64) for parts in zip(*pairs[weight], strict=True))
            power = np.square(g).sum(1)
            profile = power.reshape(chunks.shape).mean(0) / power.mean()
            np.testing.assert_allclose(computed[weight].by_position, profile, rtol=2e-3, atol=1e-6, err_msg=weight)
            assert computed[weight].tokens == chunks.size
            if weight == EMBEDDING:  # each token counts alike
                x, weights, kept, v = g / np.sqrt(power)[:, None], power**0, power > 0, power**0
            elif weight == "output.weight" or count < 8:
                weights, kept, v = weights + power, np.ones(len(x), np.bool_), np.ones(len(x))
            else:
                # Of gate and up only the diagonal of O is used for leverages.
                in_blocks = blocks_of(weight, g.shape[1]) if len(entry) == 1 else np.eye(g.shape[1])
                first = weighted(x[pilots], pilot_powers(pairs, entry)[pilots]), g[pilots].T @ g[pilots] * in_blocks
                kept = ~pilots
                weights, v = weights + leverages(g, first[1]), leverages(x, first[0])
            outputs[weight] = weighted(g[kept], v[kept]) * blocks_of(weight, g.shape[1])
        wanted = weighted(x[kept], weights[kept])
        for weight in entry:
            moments = computed[weight]
            np.testing.assert_allclose(moments.inputs, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=weight)
            if weight in ("output.weight", EMBEDDING):
                assert moments.outputs is None
                continue
            expected = outputs[weight]
            if name == "llama" and weight.split(".")[2] in {"attn_q", "attn_k"}:  # llama.cpp's order of rows
                order = np.arange(len(expected)).reshape(-1, 2, 8).swapaxes(1, 2).reshape(-1)
                expected = expected[np.ix_(order, order)]
            largest = np.abs(expected).max()
            np.testing.assert_allclose(moments.outputs, expected, rtol=0, atol=5e-4 * largest, err_msg=weight)


def pilot_powers(pairs, entry):
    """The sum of ‖g‖² over the weights that share an input."""
    return sum(np.square(np.concatenate([g for _, g in pairs[weight]]).astype(np.float64)).sum(1) for weight in entry)


def test_a_wide_leverage_is_estimated(models):
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(4000, 256)) @ np.diag(np.linspace(0.1, 3, 256))).astype(np.float32)
    gram = Gram(256)
    gram.add(torch.from_numpy(rows), torch.ones(len(rows)))
    exact = leverages(rows[:500].astype(np.float64), (rows.T @ rows).astype(np.float64))
    for sketch, error in ((64, (2 / 64) ** 0.5), (256, 1e-4)):
        leverage = Leverage(256, 1, sketch)
        leverage.learn(gram, 0.1)
        ratio = leverage.of(torch.from_numpy(rows[:500])).numpy() / exact
        # The relative standard error is sqrt(2 / sketch); with as many products as columns there is none.
        assert abs(ratio.mean() - 1) < error and ratio.std() < 1.2 * error


def test_products_in_bfloat16(models, monkeypatch):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32))
    name = "blk.0.attn_output.weight"
    with TorchModel(models / "llama.gguf") as exact, TorchModel(models / "llama.gguf", half=True) as rough:
        for product in ("multiply", "back"):
            wanted, rounded = (getattr(model._layers, product)(rows, name) for model in (exact, rough))
            error = float((wanted - rounded).norm() / wanted.norm())
            assert 1e-4 < error < 2**-8 and rounded.dtype == torch.float32  # each factor is rounded to 2⁻⁹ of itself
    module = sys.modules["bitladder.calibrate.gradients.weighted_moments"]

    def strict(path, tokens, *, threads, ours):
        if ours.half:
            raise BitladderError("too far")

    monkeypatch.setattr(module, "check_logits", strict)
    monkeypatch.setattr(module, "has_half_products", lambda _: True)
    first = {"names": ["blk.1.attn_v.weight"], "threads": 1}
    fallen = next(weighted_moments(models / "llama.gguf", TOKENS, **first))
    exact = next(weighted_moments(models / "llama.gguf", TOKENS, options=GradientOptions(half=False), **first))
    np.testing.assert_array_equal(fallen.inputs, exact.inputs)
    with pytest.raises(BitladderError, match="too far"):
        next(weighted_moments(models / "llama.gguf", TOKENS, options=GradientOptions(half=True), **first))


def test_memory_and_choice_change_nothing_but_the_passes(models):
    path = models / "tied.gguf"
    whole = {one.name: one for one in weighted_moments(path, TOKENS, threads=1)}
    assert "token_embd.weight" in whole and len(whole) == 15
    again = {one.name: one for one in weighted_moments(path, TOKENS, threads=1, memory=1 << 16)}
    assert list(whole) == list(again)
    for name, one in whole.items():
        np.testing.assert_array_equal(one.inputs, again[name].inputs)
        np.testing.assert_array_equal(one.by_position, again[name].by_position)
        if one.outputs is not None:
            np.testing.assert_array_equal(one.outputs, again[name].outputs)
    (only,) = weighted_moments(
        path, TOKENS, options=GradientOptions(outputs=False), names=["blk.1.attn_v.weight"], threads=1
    )
    np.testing.assert_array_equal(only.inputs, whole["blk.1.attn_v.weight"].inputs)
    assert only.outputs is None
    other = next(
        weighted_moments(path, TOKENS, options=GradientOptions(seed=1), names=["blk.1.attn_v.weight"], threads=1)
    )
    assert not np.array_equal(other.inputs, only.inputs)


def test_torch_is_imported_late_and_missed_in_one_line(models, monkeypatch):
    code = "import sys, bitladder.calibrate.gradients; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BitladderError, match=r"^gradients need torch, .*pip install 'bitladder\[torch\]'$"):
        next(weighted_moments(models / "llama.gguf", TOKENS))
    with pytest.raises(BitladderError, match="pip install"):
        check_logits(models / "llama.gguf", TOKENS[0])
