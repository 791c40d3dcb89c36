"""Random mixtures of experts: one of Llama's architecture written by hand, and some that transformers makes."""

import pathlib
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitladder.engine import type_by_name
from bitladder.gguf import F32, GgufFile, GgufWriter, TensorPlan, scalar, string, u32

WIDTH, FFN, BLOCKS, HEADS = 256, 256, 2, 4


def write_moe(
    tokenizer_of: pathlib.Path,
    out: pathlib.Path,
    *,
    experts: int = 8,
    used: int = 2,
    seed: int = 0,
    width: int = WIDTH,
    tied: bool = False,
) -> None:
    """Write an F16 model with the tokenizer of another file. The router of block 1 never chooses the last expert.

    `tied` makes the embeddings the head too, with some channels far larger than the others.
    """
    rng = np.random.default_rng(seed)
    with GgufFile(tokenizer_of) as file:
        metadata = {
            "general.architecture": string("llama"),
            "general.name": string("random mixture"),
            "llama.block_count": u32(BLOCKS),
            "llama.context_length": u32(512),
            "llama.embedding_length": u32(width),
            "llama.feed_forward_length": u32(FFN),
            "llama.attention.head_count": u32(HEADS),
            "llama.attention.head_count_kv": u32(HEADS),
            "llama.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5),
            "llama.rope.dimension_count": u32(width // HEADS),
            "llama.expert_count": u32(experts),
            "llama.expert_used_count": u32(used),
            "general.file_type": u32(1),
        } | {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        vocabulary = file.tensors["token_embd.weight"].shape[1]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, vocabulary), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (width, vocabulary)
    for block in range(BLOCKS):
        prefix = f"blk.{block}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"{prefix}{name}.weight"] = (width, width)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"{prefix}{name}.weight"] = (width,)
        shapes[f"{prefix}ffn_gate_inp.weight"] = (width, experts)
        shapes[f"{prefix}ffn_gate_exps.weight"] = (width, FFN, experts)
        shapes[f"{prefix}ffn_up_exps.weight"] = (width, FFN, experts)
        shapes[f"{prefix}ffn_down_exps.weight"] = (FFN, width, experts)
    f16, f32 = type_by_name("f16"), type_by_name("f32")
    plans = [TensorPlan(n, s, f16 if len(s) > 1 and "gate_inp" not in n else f32) for n, s in shapes.items()]
    with out.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        for plan in plans:
            values = rng.standard_normal(plan.shape[::-1]).astype(np.float32) / np.sqrt(plan.shape[0])
            if "norm" in plan.name:
                values = np.ones(plan.shape[::-1], np.float32)
                values[:: width // 8] *= 20 if tied else 1
            if plan.name == "blk.1.ffn_gate_inp.weight":
                # Two pairs of opposite rows: two of the four scores are positive, and beat the last expert's zero.
                values[1], values[3], values[-1] = -values[0], -values[2], 0
            data = values.astype(np.float16 if plan.type is f16 else np.float32)
            writer.write(plan.name, data.view(np.uint8))
        writer.finish()


# Kinds of mixtures: the architecture of the GGUF, and names of numbers of the configuration by its keys.
MIXTURES = {
    "qwen3moe": ("qwen3moe", {"expert_feed_forward_length": "moe_intermediate_size"}),
    "olmoe": ("olmoe", {}),
    "mixtral": ("llama", {}),
    "granitemoe": ("granitemoe", {}),
}
PARTS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "router": "ffn_gate_inp",
}


def mixture(kind: str, *, seed: int = 0, **config: Any) -> Any:
    """A random mixture that transformers makes, float32; `config` overrides its configuration."""
    sizes = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "olmoe" else 2,
        "head_dim": 16,
        "num_experts": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "norm_topk_prob": kind == "qwen3moe",
        "pad_token_id": None,
    }
    types = {"qwen3moe": "qwen3_moe", "olmoe": "olmoe", "mixtral": "mixtral", "granitemoe": "granitemoe"}
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(types[kind], **sizes | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if weight.ndim == 1 else torch.randn_like(weight) * 0.15)
            if name.endswith(("mlp.gate.weight", "router.weight")):
                weight.mul_(4)  # so that no token is near the border of two experts
    model.config._experts_implementation = "eager"  # in float64 too
    return model.float().eval()


def write_mixture(
    kind: str, model: Any, tokenizer_of: pathlib.Path, out: pathlib.Path, dtype: type = np.float32
) -> None:
    """Writes a model of `mixture` as a GGUF, with the tokenizer of another file. Matrices are of `dtype`."""
    architecture, more = MIXTURES[kind]
    config, neighbours = model.config, kind in ("mixtral", "granitemoe")
    keys = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    } | more
    numbers = {key: u32(getattr(config, name)) for key, name in keys.items()}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers |= {key: u32(head) for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    numbers["attention.layer_norm_rms_epsilon"] = scalar(F32, config.rms_norm_eps)
    numbers["rope.freq_base"] = scalar(F32, config.rope_parameters["rope_theta"])
    if kind == "granitemoe":
        scales = {"logit_scale": "logits_scaling", "residual_scale": "residual_multiplier"}
        scales |= {"embedding_scale": "embedding_multiplier", "attention.scale": "attention_multiplier"}
        numbers |= {key: scalar(F32, getattr(config, name)) for key, name in scales.items()}
    metadata = {"general.architecture": string(architecture), "general.name": string(f"random {kind}")}
    metadata |= {f"{architecture}.{key}": value for key, value in numbers.items()}
    with GgufFile(tokenizer_of) as file:
        metadata |= {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        block = f"blk.{name.split('.layers.')[1].split('.')[0]}." if ".layers." in name else ""
        if name.endswith("gate_up_proj"):
            tensors[f"{block}ffn_gate_exps.weight"], tensors[f"{block}ffn_up_exps.weight"] = np.split(values, 2, axis=1)
        elif name.endswith("experts.down_proj"):
            tensors[f"{block}ffn_down_exps.weight"] = values
        else:
            part = next(ours for theirs, ours in PARTS.items() if name.endswith(f"{theirs}.weight"))
            if neighbours and part in ("attn_q", "attn_k"):  # the order of rows for a rope that rotates neighbours
                values = values.reshape(-1, 2, head // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            tensors[f"{block}{part}.weight"] = values
    kept = {
        name: np.ascontiguousarray(values, np.float32 if values.ndim == 1 or "gate_inp" in name else dtype)
        for name, values in tensors.items()
    }
    types = {np.dtype(np.float32): type_by_name("f32"), np.dtype(np.float16): type_by_name("f16")}
    plans = [TensorPlan(name, values.shape[::-1], types[values.dtype]) for name, values in kept.items()]
    with out.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        for name, values in kept.items():
            writer.write(name, values.view(np.uint8))
        writer.finish()
