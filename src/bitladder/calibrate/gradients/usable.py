"""Whether gradients of a model can be had: torch is installed, knows the model, and computes the library's logits.

The configuration of transformers' model is made from the file's metadata. Nothing here knows an architecture by its
computation: transformers' own modules have that. What a configuration gets wrong shows in the logits, which are
compared with the library's (`check_logits`).
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bitladder.engine import Tokens, logit_differences, sequence_logits, threads_available
from bitladder.errors import BitladderError, GradientsError
from bitladder.gguf import EMBEDDING, GgufFile, open_model

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.forward import TorchModel


DIVISORS = "rope_freqs.weight"
POSITIONS = "position_embd.weight"
# Model types of transformers whose names are not those of llama.cpp's architectures.
_MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "deepseek2": "deepseek_v2",
    "falcon-h1": "falcon_h1",
    "gpt-oss": "gpt_oss",
    "granitehybrid": "granitemoehybrid",
    "hunyuan-dense": "hunyuan_v1_dense",
    "lfm2moe": "lfm2_moe",
    "mistral3": "ministral3",
    "nemotron_h_moe": "nemotron_h",
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
    "command-r": "cohere",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "glm4moe": "glm4_moe",
}
# Names in a configuration, by the key of the metadata. A model reads those that it knows.
_NAMES: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attention.scale": ("attention_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
}
# The same of a mixture of experts.
_OF_EXPERTS: dict[str, tuple[str, ...]] = {
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
}
# Mixtures whose shares of experts the library divides by their sum, where a configuration says so.
_SHARES_SUM_TO_1 = ("qwen3moe",)
# Gemmas whose scores are not scaled by the size of a head, by their blocks (llama.cpp: LLM_TYPE_27B).
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# Of the logits' range. The library rounds the inputs of F16 matrices, and its cache, to F16: on real models that leaves
# 0.002, and a rope of the wrong kind 0.4.
TOLERANCE = 0.03
# The share of positions that must be within it. Single positions can be so ill-conditioned that rounding alone moves
# them: the second token of a text that begins without BOS by 0.07, by 0.013 with weights in F32.
SHARE = 0.9


def model_type(file: GgufFile) -> str:
    """The name that transformers has for the architecture of a file."""
    architecture = file.architecture
    if architecture == "olmo2" and file.get("olmo2.attention.sliding_window"):
        return "olmo3"
    if architecture == "llama" and file.get("llama.expert_count"):
        return "mixtral"
    return _MODEL_TYPES.get(architecture, architecture)


def why_no_modules(file: GgufFile) -> str | None:
    """Why transformers has no model for a file, in a few words; None if it should have one. Nothing is imported."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return "transformers is not installed (pip install 'bitladder[torch]')"
    folder = pathlib.Path(spec.origin).parent / "models" / model_type(file).removesuffix("_text")
    if not folder.is_dir():
        return f"transformers has no architecture {file.architecture!r}"
    recurrent = any(file.get(f"{file.architecture}.{key}") for key in ("ssm.state_size", "shortconv.l_cache"))
    lacking = {
        "it has recurrent blocks, which have": recurrent,
        "its keys and values are compressed (MLA), which has": file.get(f"{file.architecture}.attention.kv_lora_rank"),
        "it has embeddings of positions, which have": POSITIONS in file.tensors,
        "its experts have biases, which have": any(name.endswith("_exps.bias") for name in file.tensors),
    }
    return next((f"{what} no gradients here" for what, there in lacking.items() if there), None)


def configuration(file: GgufFile) -> Any:
    """A PreTrainedConfig of the model in a file. Raises GradientsError for metadata that it cannot be made of."""
    from transformers import AutoConfig

    if reason := why_no_modules(file):
        raise GradientsError(f"{file.path.name}: there are no gradients of this model: {reason}")
    keys = _NAMES | (_OF_EXPERTS if _value(file, "expert_count") else {})
    values: dict[str, Any] = {
        name: value for key, names in keys.items() if (value := _value(file, key)) is not None for name in names
    }
    if file.architecture in _SHARES_SUM_TO_1 or file.get(f"{file.architecture}.expert_weights_norm"):
        values["norm_topk_prob"] = True
    values["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors
    if "num_hidden_layers" in values:  # those of prediction heads are no blocks of transformers' model
        values["num_hidden_layers"] -= _value(file, "nextn_predict_layers") or 0
    missing = {"num_hidden_layers", "hidden_size", "num_attention_heads"} - values.keys()
    if missing or EMBEDDING not in file.tensors:
        lacks = EMBEDDING if not missing else next(key for key, names in _NAMES.items() if names[0] in missing)
        raise GradientsError(f"{file.path.name} has no {lacks}, which gradients need")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    values.setdefault("num_key_value_heads", heads)
    values["sliding_window"] = values.get("sliding_window") or None  # the converter writes 0 for none
    head = _value(file, "attention.key_length") or width // heads
    if (_value(file, "attention.value_length") or head) != head:
        raise GradientsError(f"{file.path.name}: keys and values of different sizes have no gradients here")
    by_width = values["num_hidden_layers"] == _SCALED_BY_WIDTH.get(file.architecture)
    pattern = file.get(f"{file.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list) and values["sliding_window"]:
        values["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif file.architecture == "exaone4":  # transformers divides by the pattern that a model without windows has not
        values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    values |= {
        "vocab_size": file.tensors[EMBEDDING].rows,
        "head_dim": head,
        "query_pre_attn_scalar": width // heads if by_width else head,
        "tie_word_embeddings": False,
        "partial_rotary_factor": (_value(file, "rope.dimension_count") or head) / head,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),  # of which nothing is computed
    }
    kind = model_type(file)
    try:
        ropes = getattr(AutoConfig.for_model(kind), "rope_parameters", None) or {}
    except ValueError:
        raise GradientsError(f"{file.path.name}: transformers has no model type {kind!r}") from None
    rope = _rope(file) | {"partial_rotary_factor": values["partial_rotary_factor"]}
    if "sliding_attention" in ropes:  # windows have a rope of their own
        base = 10000.0 if file.architecture == "gemma3" else rope["rope_theta"]
        local = {"rope_type": "default", "rope_theta": _value(file, "rope.freq_base_swa") or base}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        values["rope_parameters"] = rope
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise GradientsError(f"{file.path.name}: transformers refuses its configuration: {error}") from error


def _value(file: GgufFile, key: str) -> Any:
    """A number of the metadata, which some converters write once for each block; None if it is not there."""
    value = file.get(f"{file.architecture}.{key}")
    if isinstance(value, list):
        if not value or any(number != value[0] for number in value):
            raise GradientsError(f"{file.path.name}: {key} differs between blocks, which has no gradients here")
        value = value[0]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
        raise GradientsError(f"{file.path.name}: {file.architecture}.{key} is {value!r}; gradients need one number")
    return value


def _rope(file: GgufFile) -> dict[str, Any]:
    """The parameters of the rotary position embedding."""
    scaling = str(file.get(f"{file.architecture}.rope.scaling.type", "none"))
    # The library reads the factor even where the type says that there is none.
    factor = float(_value(file, "rope.scaling.factor") or _value(file, "rope.scale_linear") or 1.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _value(file, "rope.freq_base") or 10000.0}
    if scaling == "yarn":
        original = _value(file, "rope.scaling.original_context_length") or _value(file, "context_length")
        fast, slow = _value(file, "rope.scaling.yarn_beta_fast"), _value(file, "rope.scaling.yarn_beta_slow")
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope |= {"beta_fast": 32.0 if fast is None else fast, "beta_slow": 1.0 if slow is None else slow}
        if multiplier := _value(file, "rope.scaling.yarn_log_multiplier"):  # the library takes 1 for the other one
            rope |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    elif factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if file.architecture == "mistral3":  # queries grow with their position
        rope.setdefault("original_max_position_embeddings", _value(file, "context_length"))
        rope["llama_4_scaling_beta"] = _value(file, "attention.temperature_scale") or 0.0
    return rope


def require_torch() -> Any:
    """The torch module. Raises BitladderError that says how to install it."""
    try:
        import torch
    except ImportError:
        raise BitladderError("gradients need torch, which is not installed: pip install 'bitladder[torch]'") from None
    return torch


def has_half_products(device: str | None = None) -> bool:
    """Whether the CPU, or a device, has instructions for products in bfloat16. Without them they are slower than in
    float32."""
    if device == "cuda":
        return bool(require_torch().cuda.is_bf16_supported(including_emulation=False))
    if device == "mps":
        return False
    return bool(getattr(require_torch().cpu, "_is_avx512_bf16_supported", lambda: False)())


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Inside the context torch computes with `threads` threads (None: every CPU that this process may use)."""
    torch = require_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_available())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def why_no_gradients(model: str | os.PathLike[str]) -> str | None:
    """Why there are no gradients of a model, in a few words; None if there should be. Only its header is read."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'bitladder[torch]')"
    with open_model(model) as file:
        return why_no_modules(file)


@dataclasses.dataclass(frozen=True)
class LogitAgreement:
    """How torch's logits compare with the library's.

    Differences are fractions of the range (largest minus smallest) of the library's logits at the same position.

    Parameters:
        positions: positions that were compared.
        rms: root mean square of the differences.
        typical: the largest difference at a position, which nine of ten positions do not exceed.
        largest: the largest difference of all.
        same_top: share of positions with the same most likely token.
    """

    positions: int
    rms: float
    typical: float
    largest: float
    same_top: float


def check_logits(
    path: str | os.PathLike[str],
    tokens: Tokens,
    *,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
    ours: "TorchModel | None" = None,
) -> LogitAgreement:
    """Compares torch's logits with the library's at every position of a sequence.

    Parameters:
        path: the model.
        tokens: int32 [length].
        tolerance: the largest difference that is allowed at nine of ten positions, as a fraction of the logits' range.
        threads: threads of the CPU.
        ours: the torch model of the file, if it is open already.

    Raises:
        GradientsError: the logits differ by more.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    expected = sequence_logits(path, tokens, threads=threads)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        logits = (ours or stack.enter_context(TorchModel(path, threads=threads))).logits(tokens)
    difference = logit_differences(logits, expected)
    agreement = LogitAgreement(
        len(tokens),
        float(np.sqrt(np.mean(np.square(difference)))),
        float(np.quantile(difference.max(axis=1), SHARE)),
        float(difference.max()),
        float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1))),
    )
    if not agreement.typical <= tolerance:
        raise GradientsError(
            f"{pathlib.Path(path).name}: torch's logits differ from llama.cpp's by {agreement.typical:.3g} of their "
            f"range (tolerance {tolerance:g}); gradients of this model cannot be trusted"
        )
    return agreement
