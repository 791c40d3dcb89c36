"""Checkpoints that are quantized already: FP8 is dequantized as torch and transformers do it, others are named."""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from heard import Heard
from reference_logits import native_logits

from bitladder.convert import convert, default_name, quantized
from bitladder.errors import BitladderError

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
safetensors: Any = pytest.importorskip("safetensors.torch")

TOKENS = np.random.default_rng(0).integers(2, 380, 40).tolist()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("quantized") / "Tiny"
    tiny_models.llama(folder, dtype="bfloat16")
    tiny_models.train_byte_level(folder)
    return folder


def spread(scale: Any, block: tuple[int, int], shape: tuple[int, int]) -> Any:
    """The scale of each weight of a matrix."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


# How a matrix of [rows, columns] is cut: height and width of a block.
BLOCKS = {"block": lambda r, c: (24, 40), "tensor": lambda r, c: (r, c), "row": lambda r, c: (1, c)}
FORMS: dict[str, tuple[str, Any, str, Any, dict[str, Any]]] = {
    "DeepSeek": (
        "block",
        E4M3,
        "weight_scale_inv",
        lambda s: s.float(),
        {"quant_method": "fp8", "weight_block_size": [24, 40], "activation_scheme": "dynamic"},
    ),
    "Qwen, scales in BF16": (
        "block",
        E4M3,
        "weight_scale_inv",
        lambda s: s.bfloat16(),
        {"quant_method": "fp8", "weight_block_size": [24, 40]},
    ),
    "exponents as bytes": (
        "block",
        E4M3,
        "weight_scale_inv",
        lambda s: (s.log2().round() + 127).to(torch.uint8),
        {"quant_method": "fp8", "weight_block_size": [24, 40], "scale_fmt": "ue8m0"},
    ),
    "transformers, one scale": (
        "tensor",
        E4M3,
        "weight_scale_inv",
        lambda s: s.float().reshape(()),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "compressed-tensors, one scale": (
        "tensor",
        E4M3,
        "weight_scale",
        lambda s: s.bfloat16().reshape(1),
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}},
        },
    ),
    "compressed-tensors, rows": (
        "row",
        E4M3,
        "weight_scale",
        lambda s: s.bfloat16(),
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        },
    ),
    "FBGEMM": ("row", E4M3, "weight_scale", lambda s: s.float().reshape(-1), {"quant_method": "fbgemm_fp8"}),
    "ModelOpt": ("tensor", E4M3, "weight_scale", lambda s: s.float().reshape(()), {"quant_algo": "FP8"}),
    "E5M2": ("tensor", E5M2, "weight_scale", lambda s: s.float().reshape(()), {"quant_method": "fp8"}),
}


def quantize(folder: pathlib.Path, form: str) -> dict[str, Any]:
    """Replaces the matrices of all blocks by FP8. Returns the values that they have then."""
    kind, dtype, name_of_scale, store, statement = FORMS[form]
    tensors = safetensors.load_file(folder / "model.safetensors")
    expected, stored = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".layers." not in name or weight.ndim != 2:
            continue
        block = BLOCKS[kind](*weight.shape)
        grid = tuple(-(-size // length) for size, length in zip(weight.shape, block, strict=True))
        scale = torch.exp2(torch.randint(-9, -5, grid).float()) * (1.0 if "byte" in form else 1.25)
        scale = scale.reshape(store(scale).shape) if store(scale).dtype == torch.uint8 else store(scale).float()
        full = spread(scale.reshape(grid), block, tuple(weight.shape))
        stored[name] = (weight.float() / full).clamp(-400, 400).to(dtype)
        stored[name.replace("weight", name_of_scale)] = store(scale)
        stored[name.replace("weight", "input_scale")] = torch.tensor(0.5)
        expected[name] = stored[name].float() * full
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    safetensors.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_models.configure(folder, quantization_config=statement)
    return expected


@pytest.mark.parametrize("form", FORMS)
def test_fp8(form: str, folder: pathlib.Path) -> None:
    expected = quantize(folder, form)
    heard = Heard()
    result = convert(folder, folder.parent / "out.gguf", outtype="f32", progress=heard)
    assert any("are dequantized" in line for line in heard.lines)
    assert heard.warnings == []
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in expected.items()})
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(native_logits(result.path, TOKENS) - logits).max() < 1e-3 * np.ptp(logits)
    up = next(t for t in gguf.GGUFReader(result.path).tensors if t.name == "blk.1.ffn_up.weight")
    np.testing.assert_array_equal(up.data, expected["model.layers.1.mlp.up_proj.weight"].float().numpy())


def test_transformers_dequantizes_alike(folder: pathlib.Path) -> None:
    """Where all blocks are whole, so that transformers takes them."""
    operations: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator).to(E4M3)
    scale = torch.rand(2, 2, generator=generator)
    expected = operations.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32).numpy()
    values = quantized.fp8_values(weight.view(torch.uint8).numpy(), "F8_E4M3")
    np.testing.assert_array_equal(quantized.multiply_by_scales(values, scale.numpy(), (24, 40), "x"), expected)


@pytest.mark.parametrize(("dtype", "name"), [(E4M3, "F8_E4M3"), (E5M2, "F8_E5M2")])
def test_every_8_bit_float(dtype: Any, name: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        quantized.fp8_values(every, name), torch.from_numpy(every).view(dtype).float().numpy()
    )


def test_outtype_and_name(folder: pathlib.Path) -> None:
    """transformers makes BF16 of FP8. Scales are no weights."""
    name = default_name(folder)
    quantize(folder, "DeepSeek")
    assert default_name(folder) == name
    assert name.endswith("-BF16.gguf")
    assert convert(folder, folder.parent / "out.gguf").outtype == "bf16"


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(BitladderError) as caught:
        convert(folder, folder.parent / "out.gguf", outtype="f32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def replace(folder: pathlib.Path, ending: str, tensor: Any) -> None:
    """Replaces the tensors whose names have that ending, or takes them away."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(ending):
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor.clone()
    safetensors.save_file(tensors, folder / "model.safetensors")


def test_fp8_whose_scales_do_not_fit(folder: pathlib.Path) -> None:
    quantize(folder, "DeepSeek")
    replace(folder, "up_proj.weight_scale_inv", torch.ones(7, 2))
    assert "up_proj.weight [96, 64] in blocks of [24, 40] does not fit its scales [7, 2]" in refusal(folder)
    replace(folder, "up_proj.weight_scale_inv", None)
    assert "up_proj.weight has no scales" in refusal(folder)


@pytest.mark.parametrize("size", [[0, 40], [24], "24", [24, True], [-1, 2]])
def test_fp8_with_a_bad_block(size: Any, folder: pathlib.Path) -> None:
    quantize(folder, "DeepSeek")
    tiny_models.configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    assert "the size of a block should be" in refusal(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("statement", "suffix", "dtype", "words"),
    [
        (GPTQ, "qweight", torch.int32, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "qweight", torch.int32, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weight", torch.uint8, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "weight", torch.int8, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "weight_packed", torch.int32, "compressed-tensors"),
        ({"quant_method": "bitnet"}, "weight", torch.bfloat16, "bitnet"),
        ({"quant_method": 7}, "weight", torch.uint8, "unnamed method"),
        (None, "qweight", torch.int32, "GPTQ or AWQ"),
    ],
)
def test_others_are_named(statement: Any, suffix: str, dtype: Any, words: str, folder: pathlib.Path) -> None:
    tensors = safetensors.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name.replace("weight", suffix)] = tensors.pop(name).to(dtype)
    safetensors.save_file(tensors, folder / "model.safetensors")
    tiny_models.configure(folder, quantization_config=statement)
    message = refusal(folder)
    assert words in message
    assert "dequantize" in message


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_said_in_a_file_of_its_own(file: str, folder: pathlib.Path) -> None:
    replace(folder, "up_proj.weight", torch.ones(2, 2, dtype=torch.int32))
    (folder / file).write_text(json.dumps({"quant_method": "gptq", "bits": 3}))
    message = refusal(folder)
    assert file in message
    assert "gptq, 3 bits" in message


STALE = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "config_groups": {}}


@pytest.mark.parametrize("statement", [STALE, SPARSE])
def test_full_precision_all_the_same(statement: dict[str, Any], folder: pathlib.Path) -> None:
    """After a merge with an adapter that was trained on quantized weights; and a sparse model."""
    tiny_models.configure(folder, quantization_config=statement)
    heard = Heard()
    convert(folder, folder.parent / "out.gguf", progress=heard)
    assert "but no weight is quantized" in heard.warnings[0]
