"""What a checkpoint says in two places: the converted model computes what transformers makes of the same directory."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
from heard import Heard
from reference_logits import native_logits

from bitladder.convert import convert
from bitladder.errors import BitladderError

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
safetensors: Any = pytest.importorskip("safetensors.torch")

TOKENS = np.random.default_rng(0).integers(2, 380, 40).tolist()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
TOP = "original_max_position_embeddings"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An untied Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("sources") / "Tiny"
    tiny_models.llama(folder, hidden_size=32, intermediate_size=48, num_key_value_heads=4)
    tiny_models.train_byte_level(folder)
    return folder


def change(folder: pathlib.Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Replaces the tensors of model.safetensors."""
    tensors = edit(safetensors.load_file(folder / "model.safetensors"))
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_as_transformers(folder: pathlib.Path) -> list[str]:
    """Asserts that the logits of both are the same. Returns the warnings."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    heard = Heard()
    result = convert(folder, folder.parent / "out.gguf", outtype="f32", progress=heard)
    logits = native_logits(result.path, TOKENS)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-3 * np.ptp(expected)
    return heard.warnings


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(BitladderError) as caught:
        convert(folder, folder.parent / "out.gguf", outtype="f32")
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "out.gguf").exists()
    return str(caught.value)


# The values, keys that are taken away, and a word of the warning ("" for none).
ROPES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "scaling before parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": LINEAR},
        (),
        "rope_theta is 500.0 in rope_parameters",
    ),
    "an empty scaling": ({"rope_parameters": {**LINEAR, "rope_theta": 500.0}, "rope_scaling": {}}, (), ""),
    "theta at both levels": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 9e5},
        (),
        "rope_theta is 900000.0 in its top level",
    ),
    "theta at the top": ({"rope_theta": 500.0}, ("rope_parameters",), ""),
    "theta at the top, scaling without": ({"rope_theta": 500.0, "rope_scaling": LINEAR}, ("rope_parameters",), ""),
    "type and rope_type": ({"rope_parameters": {**LINEAR, "type": "yarn", "rope_theta": 1e4}}, (), ""),
    "type alone": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ("rope_parameters",), ""),
    "llama3, context at the top": ({"rope_scaling": LLAMA3, TOP: 16}, ("rope_parameters",), ""),
    "llama3, context at both levels": (
        {"rope_scaling": {**LLAMA3, TOP: 64}, TOP: 16},
        ("rope_parameters",),
        f"{TOP} is 64 in rope_scaling",
    ),
    "llama3, no context": ({"rope_scaling": LLAMA3}, ("rope_parameters",), ""),
    "yarn, context at both levels": (
        {"rope_scaling": {**YARN, TOP: 64}, TOP: 16},
        ("rope_parameters",),
        f"{TOP} is 64",
    ),
    "yarn, no factor": ({"rope_scaling": {**YARN, "factor": None, TOP: 32}}, ("rope_parameters",), ""),
    "yarn, no context": ({"rope_scaling": YARN}, ("rope_parameters",), ""),
    "yarn, mscale": (
        {"rope_scaling": {**YARN, TOP: 64, "mscale": 0.7, "mscale_all_dim": 1.3}},
        ("rope_parameters",),
        "",
    ),
    "yarn, fast": ({"rope_scaling": {**YARN, TOP: 256, "beta_fast": 8}}, ("rope_parameters",), ""),
    "yarn, slow": ({"rope_scaling": {**YARN, TOP: 64, "beta_slow": 2.5}}, ("rope_parameters",), ""),
    "yarn, both and attention": (
        {"rope_scaling": {**YARN, TOP: 64, "beta_fast": 9, "beta_slow": 3, "attention_factor": 1.3}},
        ("rope_parameters",),
        "",
    ),
    "yarn, not truncated": ({"rope_scaling": {**YARN, TOP: 64, "truncate": False}}, ("rope_parameters",), ""),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ("rope_parameters",), "up to 256 tokens"),
    "no eps": ({}, ("rms_norm_eps", "max_position_embeddings"), ""),
}


@pytest.mark.parametrize("case", ROPES)
def test_ropes(case: str, folder: pathlib.Path) -> None:
    values, without, word = ROPES[case]
    tiny_models.configure(folder, without, **values)
    warnings = [warning for warning in same_as_transformers(folder) if word and word in warning]
    assert bool(warnings) == bool(word)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "only one rope for all blocks"),
        ({"rope_scaling": "linear"}, "rope_scaling should be an object"),
        ({"rope_scaling": {"type": "su"}}, "'su'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor should be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor should be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor should be a finite number"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate"),
        ({"rope_scaling": {**YARN, "beta_slow": -1}}, "beta_slow"),
        ({"rope_scaling": YARN, "rope_theta": 1.0, "rope_parameters": None}, "rope_theta"),
        ({"rope_scaling": {**YARN, "mscale": "x", "mscale_all_dim": 1}}, "mscale should be"),
        ({"rope_theta": 1e300, "rope_parameters": None}, "rope_theta should be a finite number"),
        ({"rope_theta": 10**4000, "rope_parameters": None}, "rope_theta should be a finite number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "mistral"}, "model_type"),
        ({"architectures": ["Olmo2ForCausalLM"]}, "model_type"),
        ({"text_config": {"rms_norm_eps": 0.5}}, "text_config.rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings should be true or false"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps should be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "7 values"),
        ({"num_attention_heads": 0}, "num_attention_heads should be a positive"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings should be"),
    ],
)
def test_what_cannot_be_right_is_refused(values: dict[str, Any], words: str, folder: pathlib.Path) -> None:
    tiny_models.configure(folder, **values)
    message = refusal(folder)
    assert words in message
    assert "config.json" in message


@pytest.mark.parametrize("changed", [{"beta_slow": 2.5}, {"truncate": False}])
def test_yarn_that_llama_cpp_does_not_read(changed: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """olmo2's graph has no divisors of the frequencies."""
    folder = tmp_path / "Tiny"
    tiny_models.olmo2(folder, rope_parameters={**YARN, TOP: 64, "rope_theta": 1e4, **changed})
    tiny_models.train_byte_level(folder)
    assert "beta_fast, beta_slow and truncate" in refusal(folder)


def test_architecture_in_other_forms(folder: pathlib.Path) -> None:
    for values in (
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None},
        {"text_config": {"hidden_size": 32}},
    ):
        tiny_models.configure(folder, **values)
        assert convert(folder, folder.parent / "out.gguf").architecture == "llama"


def test_tied_with_an_own_head(folder: pathlib.Path) -> None:
    tiny_models.configure(folder, tie_word_embeddings=True)
    assert any("tie_word_embeddings is true" in warning for warning in same_as_transformers(folder))


def test_tied_with_the_same_head(folder: pathlib.Path) -> None:
    tiny_models.configure(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    assert same_as_transformers(folder) == []
    assert convert(folder, folder.parent / "out.gguf").tensors == 20


def test_tied_with_only_the_head(folder: pathlib.Path) -> None:
    tiny_models.configure(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != EMBEDDING})
    assert same_as_transformers(folder) == []


def test_tied_olmo2_with_an_own_head(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "Tiny"
    tiny_models.olmo2(folder)
    tiny_models.train_byte_level(folder)
    tiny_models.configure(folder, tie_word_embeddings=True)
    assert any("tie_word_embeddings is true" in warning for warning in same_as_transformers(folder))


def test_biases_follow_the_config(folder: pathlib.Path) -> None:
    bias = {f"model.layers.{i}.self_attn.q_proj.bias": torch.full((32,), 0.5) for i in range(2)}
    change(folder, lambda tensors: tensors | bias)
    assert "attention_bias is not true" in refusal(folder)
    tiny_models.configure(folder, attention_bias=True)
    assert same_as_transformers(folder) == []  # the biases that are missing are zero


def test_saved_without_its_head(folder: pathlib.Path) -> None:
    """Names without "model.", and a tied head."""
    tiny_models.configure(folder, tie_word_embeddings=True)
    change(
        folder,
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD},
    )
    assert same_as_transformers(folder) == []


def test_saved_within_another_model(folder: pathlib.Path) -> None:
    change(folder, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()})
    assert same_as_transformers(folder) == []


def shard(folder: pathlib.Path, edit: Callable[[dict[str, str]], dict[str, Any]] = dict) -> None:
    """Splits model.safetensors into a.safetensors and b.safetensors with an index."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: "a.safetensors" if ".layers." in name else "b.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": edit(weight_map)}))


def test_single_file_beside_an_old_index(folder: pathlib.Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "new")
    change(folder, lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    shard(folder)
    (folder / "new").rename(folder / "model.safetensors")
    assert any("index.json and its shards are ignored" in warning for warning in same_as_transformers(folder))


def test_files_that_no_index_names(folder: pathlib.Path) -> None:
    """Mistral's own format, shards of an older upload, variants and adapters lie beside the weights."""
    shard(folder)
    other = {name: tensor * 1.5 for name, tensor in safetensors.load_file(folder / "b.safetensors").items()}
    for file in ("consolidated", "model-00001-of-00009", "model-21", "model.fp16", "adapter_model"):
        safetensors.save_file(other, folder / f"{file}.safetensors", metadata={"format": "pt"})
    assert same_as_transformers(folder) == []


def test_weights_of_another_name(folder: pathlib.Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    change(folder, lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    tiny_models.configure(folder, transformers_weights="other.safetensors")
    assert same_as_transformers(folder) == []


@pytest.mark.parametrize("wrong", ["swapped", "head is missing"])
def test_index_that_misplaces_tensors(wrong: str, folder: pathlib.Path) -> None:
    """transformers reads all tensors of the files that an index names."""

    def edit(weight_map: dict[str, str]) -> dict[str, str]:
        if wrong == "swapped":
            return {name: "ab"[file[0] == "a"] + file[1:] for name, file in weight_map.items()}
        return {name: file for name, file in weight_map.items() if name != HEAD}

    shard(folder, edit)
    assert same_as_transformers(folder) == []


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", 7, None, ["a"], "a\x1b[2J"])
def test_index_that_names_no_file_of_the_checkpoint(file: Any, folder: pathlib.Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "a.safetensors")
    shard(folder, lambda weight_map: dict.fromkeys(weight_map, file))
    message = refusal(folder)
    assert "should be the name of a file in the checkpoint's directory" in message
    assert message.isprintable()


def test_tensor_in_two_shards(folder: pathlib.Path) -> None:
    shard(folder)
    head = safetensors.load_file(folder / "b.safetensors")[HEAD]
    layers = safetensors.load_file(folder / "a.safetensors")
    safetensors.save_file(layers | {HEAD: head * 2}, folder / "a.safetensors")
    message = refusal(folder)
    assert "a.safetensors" in message
    assert "b.safetensors" in message
