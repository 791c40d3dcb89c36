"""A random mixture-of-experts model written by hand: Llama architecture, a few blocks, a few experts."""

import pathlib

import numpy as np

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
