"""Parity: the converted model computes what transformers computes."""

import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from reference_logits import native_logits

from bitladder.convert import convert
from bitladder.convert.checkpoint_files import read_json
from bitladder.files import write_json

torch: Any = pytest.importorskip("torch")

TOKENS = np.random.default_rng(0).integers(2, 380, 40).tolist()
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "olmo2": ("olmo2", {}),
    "olmo2-mha": ("olmo2", {"num_key_value_heads": 4}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmo2-yarn": ("olmo2", {"rope_parameters": YARN}),
}


def same(model: Any, path: pathlib.Path) -> None:
    """Assert that the logits of both differ by less than a thousandth of their range."""
    with torch.no_grad():
        expected = model.float()(torch.tensor([TOKENS])).logits[0].numpy()
    found = native_logits(path, TOKENS)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3 * np.ptp(expected)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: pathlib.Path) -> None:
    kind, config = CASES[case]
    model = getattr(tiny_models, kind)(tmp_path / "Tiny-1M", **config)
    tiny_models.train_byte_level(tmp_path / "Tiny-1M")
    result = convert(tmp_path / "Tiny-1M", tmp_path / "out.gguf", outtype="f32")
    assert (result.architecture, result.outtype, result.bytes) == (kind, "f32", result.path.stat().st_size)
    same(model, result.path)


@pytest.mark.parametrize(("dtype", "decided"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f16")])
def test_outtypes(dtype: str, decided: str, tmp_path: pathlib.Path) -> None:
    model = tiny_models.llama(tmp_path / "tiny", dtype=dtype)
    tiny_models.train_byte_level(tmp_path / "tiny")
    result = convert(tmp_path / "tiny", tmp_path / "out.gguf")
    assert result.outtype == decided
    reader = gguf.GGUFReader(result.path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == decided.upper()
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    value = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    expected = model.float().model.layers[1].mlp.down_proj.weight.detach().numpy()
    tolerance = 0 if dtype != "float32" else 1e-3
    np.testing.assert_allclose(gguf.dequantize(value.data, value.tensor_type), expected, rtol=tolerance, atol=1e-6)
    file_type = reader.get_field("general.file_type")
    assert file_type is not None
    assert file_type.contents() == {"f16": 1, "bf16": 32}[decided]


def test_old_rope_layout(tmp_path: pathlib.Path) -> None:
    """rope_theta and rope_scaling, as transformers 4 wrote them, give the same file as rope_parameters."""
    folder = tmp_path / "tiny"
    tiny_models.llama(folder, rope_parameters=LLAMA3_ROPE)
    tiny_models.train_byte_level(folder)
    new = convert(folder, tmp_path / "new.gguf", outtype="f32").path.read_bytes()
    config = read_json(folder / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    write_json(folder / "config.json", config | {"rope_scaling": rope})
    assert convert(folder, tmp_path / "old.gguf", outtype="f32").path.read_bytes() == new


def test_sharded_is_the_same_and_repeatable(tmp_path: pathlib.Path) -> None:
    for name, shard in (("one", "5GB"), ("many", "50KB")):
        tiny_models.olmo2(tmp_path / name / "Tiny", shard=shard)
        tiny_models.train_byte_level(tmp_path / name / "Tiny")
        convert(tmp_path / name / "Tiny", tmp_path / f"{name}.gguf", outtype="f16")
    assert len(list((tmp_path / "many" / "Tiny").glob("*.safetensors"))) > 2
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_metadata(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "Tiny-130K-Instruct"
    tiny_models.llama(folder)
    tiny_models.train_byte_level(folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\n"
        "base_model:\n- some-org/Tiny-130K\n- /home/me/secret\n---\n# Tiny\n"
    )
    reader = gguf.GGUFReader(convert(folder, tmp_path / "out.gguf").path)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    assert value("general.name") == "Tiny 130K Instruct"
    assert value("general.basename") == "Tiny"
    assert value("general.finetune") == "Instruct"
    assert value("general.license") == "apache-2.0"
    assert value("general.languages") == ["en", "de"]
    assert value("general.base_model.count") == 1
    assert value("general.base_model.0.repo_url") == "https://huggingface.co/some-org/Tiny-130K"
    assert value("general.quantization_version") == 2
    assert value("llama.context_length") == 256
    assert value("llama.attention.head_count_kv") == 2
    assert str(value("tokenizer.chat_template")).startswith("{% for m in messages")
    assert str(tmp_path).encode() not in (tmp_path / "out.gguf").read_bytes()
