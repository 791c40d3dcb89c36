"""--prune-layers: what is left is the model without those blocks, also where metadata have a value per block."""

import numpy as np
import pytest
import tiny_models
import torch
from quantize_reference import make_imatrix, make_model, same_tensors
from reference_logits import native_logits
from transformers import AutoModelForCausalLM

from bitladder.calibrate import read_imatrix, write_imatrix
from bitladder.convert import convert
from bitladder.engine import type_by_name
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan
from bitladder.gguf.header import ARRAY, BOOL, F32, U32, Value, scalar, string, strings, u32
from bitladder.quantize import QuantizeOptions, prepare, quantize
from bitladder.quantize.prune import plan_pruning, pruned_entries, pruned_metadata

TOKENS = [5, 17, 33, 250, 99, 3]


def array(kind, values):
    raw = b"".join(scalar(kind, value).raw for value in values)
    return Value(ARRAY, kind.to_bytes(4, "little") + len(values).to_bytes(8, "little") + raw)


@pytest.mark.parametrize("family", [tiny_models.llama, tiny_models.olmo2])
def test_the_rest_is_the_checkpoint_without_those_blocks(family, tmp_path):
    model = make_model(tmp_path, family, num_hidden_layers=5)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float16)
    smaller.model.layers = torch.nn.ModuleList(smaller.model.layers[index] for index in (0, 2, 4))
    smaller.config.num_hidden_layers = 3
    smaller.config.layer_types = None
    smaller.save_pretrained(tmp_path / "smaller")
    tiny_models.train_byte_level(tmp_path / "smaller")
    convert(tmp_path / "smaller", tmp_path / "converted.gguf", outtype="f16")
    quantize(tmp_path / "converted.gguf", tmp_path / "smaller.gguf", "COPY")
    quantize(model, tmp_path / "pruned.gguf", QuantizeOptions("COPY", prune_layers=(1, 3)))
    same_tensors(tmp_path / "pruned.gguf", tmp_path / "smaller.gguf")
    assert np.array_equal(
        native_logits(tmp_path / "pruned.gguf", TOKENS), native_logits(tmp_path / "smaller.gguf", TOKENS)
    )


def test_importance_goes_with_its_block(tmp_path):
    model = make_model(tmp_path, num_hidden_layers=4)
    make_imatrix(model, tmp_path / "imatrix.gguf")
    quantize(model, tmp_path / "copy.gguf", QuantizeOptions("COPY", prune_layers=(0, 2)))
    matrix = read_imatrix(tmp_path / "imatrix.gguf")
    with GgufFile(model) as file:
        pruning = plan_pruning(file.metadata, file.tensors, (0, 2), "llama")
    renamed = pruned_entries(matrix.entries, pruning)
    assert renamed.keys() < matrix.entries.keys() and len(renamed) == 2 * 7 + 1
    assert np.array_equal(renamed["blk.1.attn_q.weight"].sums, matrix.entries["blk.3.attn_q.weight"].sums)
    matrix.entries = renamed
    write_imatrix(matrix, tmp_path / "renamed.gguf")
    # A pruned model quantized with the renamed matrix equals the model pruned while it is quantized.
    quantize(
        tmp_path / "copy.gguf",
        tmp_path / "twice.gguf",
        QuantizeOptions("IQ4_XS", pure=True),
        imatrix=tmp_path / "renamed.gguf",
    )
    options = QuantizeOptions("IQ4_XS", pure=True, prune_layers=(0, 2))
    quantize(model, tmp_path / "once.gguf", options, imatrix=tmp_path / "imatrix.gguf")
    same_tensors(tmp_path / "once.gguf", tmp_path / "twice.gguf")


# Key/value heads and width of the feed-forward network, block by block.
KV_HEADS, FFN = (1, 4, 2, 4, 1), (256, 288, 512, 64, 320)


def write_deci(tokenizer_of, out, blocks):
    """A random model of the architecture "deci", whose blocks differ in size: those of `blocks`."""
    width, heads, vocabulary = 64, 4, 384
    metadata = {
        "general.architecture": string("deci"),
        "deci.block_count": u32(len(blocks)),
        "deci.context_length": u32(128),
        "deci.embedding_length": u32(width),
        "deci.feed_forward_length": array(U32, [FFN[block] for block in blocks]),
        "deci.attention.head_count": array(U32, [heads for _ in blocks]),
        "deci.attention.head_count_kv": array(U32, [KV_HEADS[block] for block in blocks]),
        "deci.attention.layer_norm_rms_epsilon": scalar(F32, 1e-5),
        "deci.attention.key_length": u32(width // heads),
        "deci.attention.value_length": u32(width // heads),
        "deci.rope.dimension_count": u32(width // heads),
        "general.file_type": u32(1),
    }
    with GgufFile(tokenizer_of) as file:
        metadata |= {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        vocabulary = file.tensors["token_embd.weight"].shape[1]
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((vocabulary, width)) for name in ("output.weight", "token_embd.weight")}
    tensors["output_norm.weight"] = np.ones(width)
    for block, (kv_heads, ffn) in enumerate(zip(KV_HEADS, FFN, strict=True)):
        rng = np.random.default_rng(block + 1)
        shapes = {"attn_q": (width, width), "attn_output": (width, width), "ffn_down": (width, ffn)}
        shapes |= dict.fromkeys(("attn_k", "attn_v"), (width // heads * kv_heads, width))
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (ffn, width))
        shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
        if block in blocks:
            for name in sorted(shapes):
                tensors[f"blk.{blocks.index(block)}.{name}.weight"] = rng.standard_normal(shapes[name]) / 8
    f16, f32 = type_by_name("f16"), type_by_name("f32")
    plans = [TensorPlan(name, data.shape[::-1], f16 if data.ndim > 1 else f32) for name, data in tensors.items()]
    with out.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        for plan in plans:
            data = tensors[plan.name].astype(np.float16 if plan.type is f16 else np.float32)
            writer.write(plan.name, data.reshape(-1, data.shape[-1]).view(np.uint8))
        writer.finish()
    return out


@pytest.mark.parametrize("gone", [(0,), (2,), (4,), (1, 3), (0, 1, 2, 3)])
def test_blocks_of_different_sizes(gone, tmp_path, tiny_small):
    whole = write_deci(tiny_small, tmp_path / "whole.gguf", list(range(5)))
    wanted = write_deci(tiny_small, tmp_path / "wanted.gguf", [block for block in range(5) if block not in gone])
    result = quantize(whole, tmp_path / "pruned.gguf", QuantizeOptions("Q8_0", prune_layers=gone))
    quantize(wanted, tmp_path / "reference.gguf", "Q8_0")
    same_tensors(result.path, tmp_path / "reference.gguf")
    with GgufFile(result.path) as ours, GgufFile(tmp_path / "reference.gguf") as theirs:
        assert dict(ours.metadata) == dict(theirs.metadata)
    assert np.array_equal(native_logits(result.path, TOKENS), native_logits(tmp_path / "reference.gguf", TOKENS))


@pytest.fixture(scope="module")
def tiny_small(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("small"), hidden_size=64, intermediate_size=96, num_hidden_layers=1)


def pruned(metadata, layers, blocks=6):
    values = {"x.block_count": u32(blocks)} | metadata
    pruning = plan_pruning(values, ["blk.0.a"], layers, "x")
    return {key: value.python() for key, value in pruned_metadata(values, pruning, "x").items()}


def test_arrays_and_counts():
    found = pruned(
        {
            "x.attention.sliding_window_pattern": array(BOOL, [True, False, True, True, False, False]),
            "x.xielu.eps": array(F32, [0, 1, 2, 3, 4]),  # no value for the block that predicts further tokens
            "x.nextn_predict_layers": u32(1),
            "x.leading_dense_block_count": u32(3),
            "x.rope.dimension_sections": array(U32, [1, 2, 3, 4, 5, 6]),
            "x.classifier.output_labels": strings(list("abcdef")),
            "x.other": array(U32, [7, 8]),
            "tokenizer.ggml.six": array(U32, [1, 2, 3, 4, 5, 6]),
        },
        (1, 2),
    )
    assert found["x.block_count"] == 4
    assert found["x.attention.sliding_window_pattern"] == [True, True, False, False]
    assert found["x.xielu.eps"] == [0, 3, 4]
    assert found["x.nextn_predict_layers"] == 1 and found["x.leading_dense_block_count"] == 1
    assert found["x.rope.dimension_sections"] == found["tokenizer.ggml.six"] == [1, 2, 3, 4, 5, 6]
    assert found["x.classifier.output_labels"] == list("abcdef") and found["x.other"] == [7, 8]


def test_a_block_that_predicts_further_tokens_can_go():
    assert pruned({"x.nextn_predict_layers": u32(1)}, (5,))["x.nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("metadata", "layers", "message"),
    [
        ({}, (6,), "blocks 0 to 5"),
        ({}, (0, 1, 2, 3, 4, 5), "nothing would be left"),
        ({"x.attention.shared_kv_layers": u32(2)}, (0,), "shared_kv_layers"),
        ({"x.full_attention_interval": u32(2)}, (1,), "full_attention_interval makes every 2th block"),
        ({"x.attention.sliding_window": u32(128)}, (1,), "sliding window of 128"),
        ({"x.attention.sliding_window_pattern": u32(3), "x.attention.sliding_window": u32(9)}, (0,), "pattern makes"),
    ],
)
def test_refused_where_a_block_would_become_another_kind(metadata, layers, message):
    with pytest.raises(UsageError, match=message):
        pruned(metadata, layers)


def test_allowed_where_blocks_keep_their_kind():
    assert pruned({"x.full_attention_interval": u32(2)}, (0, 1))["x.block_count"] == 4
    assert pruned({"x.attention.sliding_window": u32(128)}, (4, 5))["x.block_count"] == 4
    assert pruned({"x.attention.shared_kv_layers": u32(0)}, (0,))["x.block_count"] == 5


def test_refused_where_a_tensor_has_a_part_for_each_block():
    with pytest.raises(UsageError, match=r"per_layer_token_embd\.weight"):
        plan_pruning({"x.block_count": u32(2)}, ["per_layer_token_embd.weight"], (0,), "x")


def test_patterns_and_recipes_see_the_new_numbers(tiny_small, tmp_path):
    whole = write_deci(tiny_small, tmp_path / "whole.gguf", list(range(5)))
    options = QuantizeOptions("Q8_0", tensor_types=(r"blk\.3\.ffn_up=q4_0",), prune_layers=(0,))
    with prepare(whole, options) as prepared:
        (chosen,) = [tensor for tensor in prepared.choice.tensors if tensor.type.name == "q4_0"]
        assert (chosen.name, chosen.source.name) == ("blk.3.ffn_up.weight", "blk.4.ffn_up.weight")
