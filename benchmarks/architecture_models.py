"""Tiny checkpoints with random weights of many architectures, as transformers makes them and their makers publish them.

`architectures.py` takes them through every command.
"""

import json
import pathlib
import sys
from typing import Any

import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import tiny_models

PIECES = 400  # tokens of a vocabulary
WITH_PIECES = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "phi3",
    "ernie4.5",
    "nemotron",
)  # their converters want tokenizer.model
SMALL = {
    "vocab_size": PIECES,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LATENT = {
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 128, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
GLM = {"head_dim": 64, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
       "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_group": 1, "topk_group": 1}  # fmt: skip
LINEAR = {
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}
# Name → class prefix in transformers, and what its configuration has besides the sizes above.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 64}),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, **EXPERTS}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen3moe": ("Qwen3Moe", {"head_dim": 64, "norm_topk_prob": True, **EXPERTS}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3-vision": ("Gemma3", GEMMA),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "granitehybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            **SSM,
        },
    ),
    "smollm3": ("SmolLM3", {"pretraining_tp": 1}),
    "gpt-oss": ("GptOss", {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 256}),
    "falcon-h1": ("FalconH1", {"mamba_d_ssm": 512, "head_dim": 64, **SSM}),
    "mamba2": ("Mamba2", {"intermediate_size": 512, "num_heads": 4, "head_dim": 128, "state_size": 16, "n_groups": 1,
                          "expand": 2}),
    "deepseek2": ("DeepseekV2", LATENT | {"topk_method": "greedy"}),
    "deepseek3": ("DeepseekV3", LATENT),
    "glm4moe": ("Glm4Moe", GLM),
    "glm4moe-mtp": ("Glm4Moe", GLM),
    "cohere2": ("Cohere2", {"head_dim": 64, "sliding_window": 64, "logit_scale": 0.25}),
    "starcoder2": ("Starcoder2", {}),
    "ernie4.5": ("Ernie4_5", {"head_dim": 64}),
    # As the one of 1.2B has it. Windows are for 64 blocks: llama.cpp ignores them elsewhere.
    "exaone4": ("Exaone4", {"head_dim": 64, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed-oss": ("SeedOss", {"head_dim": 64}),
    "ministral3": ("Ministral3", {"head_dim": 64}),
    "gemma": ("Gemma", {"head_dim": 64}),
    "olmo": ("Olmo", {}),
    "glm4": ("Glm4", {"head_dim": 64}),
    "nemotron": ("Nemotron", {}),
    "apertus": ("Apertus", {"head_dim": 64}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 64}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "stablelm": ("StableLm", {}),
    "arcee": ("Arcee", {}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "lfm2moe": ("Lfm2Moe", {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "qwen3next": ("Qwen3Next", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 256, "norm_topk_prob": True}),
    "qwen3.5": ("Qwen3_5Text", LINEAR),
}  # fmt: skip
# Keys of config.json as the makers publish them, which the configuration classes of transformers leave out or rename.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek3": {"scoring_func": "sigmoid"},
    "cohere2": {"rotary_pct": 1.0},
    "granitehybrid": {"layer_types": ["mamba", "attention"]},
    "glm4moe-mtp": {"num_nextn_predict_layers": 1},
}
# The models of the tests, the most different ones, and smaller; their logits lie beside them.
SMALLER = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
IN_TESTS = ("qwen3moe", "gemma3-vision", "falcon-h1", "deepseek3", "glm4moe-mtp", "gpt-oss")


def make(name: str, folder: pathlib.Path, changed: dict[str, Any] | None = None) -> Any:
    """A checkpoint with random weights, wide enough that every part shows in the logits. Returns the model."""
    prefix, more = MODELS[name]
    sizes = SMALL | more | (changed or {})
    config = getattr(transformers, f"{prefix}Config")
    if name == "gemma3-vision":
        vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 56, "patch_size": 14}
        config = config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4, image_token_index=399,
                        boi_token_index=397, eoi_token_index=398)  # fmt: skip
    else:
        config = config(**sizes)
    torch.manual_seed(0)
    kind = prefix.removesuffix("Text")
    head = "ForConditionalGeneration" if name == "gemma3-vision" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
            elif "norm" in key and "bias" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for key, values in model.named_buffers():
            if "e_score_correction_bias" in key:
                values.normal_(0, 0.1)
    model.save_pretrained(folder)
    if PUBLISHED.get(name):
        tiny_models.configure(folder, **PUBLISHED[name])
    if name == "glm4moe-mtp":
        add_prediction_head(folder, config.num_hidden_layers)
    if name == "gemma3-vision":
        rename(folder, {"vision_tower.": "vision_tower.vision_model."})
        image = {
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "size": {"height": 56, "width": 56},
            "image_seq_length": 4,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(image))
    if name in WITH_PIECES:
        tiny_models.train_sentencepiece(folder, PIECES)
        return model
    tokenizer = tiny_models.train_byte_level(folder)
    if name.startswith("glm4"):
        tokenizer.add_tokens(["[gMASK]", "<sop>", "<|endoftext|>", "<|user|>", "<|observation|>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    return model


def rename(folder: pathlib.Path, parts: dict[str, str]) -> None:
    """Gives tensors the names under which their makers publish them, where transformers saves others."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for old, new in parts.items():
        tensors = {key if new in key else key.replace(old, new): value for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def add_prediction_head(folder: pathlib.Path, blocks: int) -> None:
    """Adds a block that predicts a further token, which transformers does not compute, with the names of GLM 4.5."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    before, start = f"model.layers.{blocks - 1}.", f"model.layers.{blocks}."
    added = {start + key.removeprefix(before): value.flip(0) for key, value in tensors.items() if before in key}
    embedding = tensors["model.embed_tokens.weight"]
    width = embedding.shape[1]
    added |= {f"{start}{key}.weight": torch.ones(width) for key in ("enorm", "hnorm", "shared_head.norm")}
    added |= {f"{start}{key}.weight": embedding.clone() for key in ("embed_tokens", "shared_head.head")}
    added[f"{start}eh_proj.weight"] = torch.randn(width, 2 * width) * 0.5 * (2 * width) ** -0.5
    safetensors.torch.save_file(
        {**tensors, **{key: value.contiguous() for key, value in added.items()}}, path, {"format": "pt"}
    )
