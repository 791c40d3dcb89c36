"""Recipes: exact names and types; what they leave open; and the file type that is written."""

import os
import pathlib

import pytest
from llama_cpp_tools import Tools
from quantize_reference import make_imatrix, make_model, reference, same_tensors

from bitladder.cli import invoke
from bitladder.engine import preset_number
from bitladder.errors import UsageError
from bitladder.gguf import GgufFile
from bitladder.quantize import QuantizeOptions, prepare, quantize
from bitladder.recipe import Recipe, extract, recipe_sha256, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def mixed(model):
    """A type for every tensor, as no preset gives them."""
    cycle = ["q4_k", "Q8_0", "q3_K", "iq4_nl", "f16", "bf16", "q6_k"]
    with GgufFile(model) as file:
        matrices = [name for name, tensor in file.tensors.items() if len(tensor.shape) > 1]
        rest = {name: tensor.type.name for name, tensor in file.tensors.items() if len(tensor.shape) == 1}
    types = {name: cycle[index % len(cycle)] for index, name in enumerate(matrices)}
    return rest | types | {name: "q5_0" for name in matrices if "ffn_down" in name}


def test_types_are_exact(model, mixed, tmp_path):
    result = quantize(model, tmp_path / "q.gguf", QuantizeOptions(types=mixed))
    assert {name: kind.lower() for name, kind in result.types.items()} == {n: k.lower() for n, k in mixed.items()}
    assert result.preset == "" and result.bytes == result.path.stat().st_size
    with GgufFile(result.path) as file:
        assert file.get("bitladder.recipe.sha256") == recipe_sha256(mixed)
        assert file.get("bitladder.version")
        blocks = [tensor for name, tensor in file.tensors.items() if name.startswith("blk.")]
        assert result.bpw == pytest.approx(file.bpw)
        assert result.bpw_blocks == pytest.approx(8 * sum(t.nbytes for t in blocks) / sum(t.elements for t in blocks))


def test_recipe_file_equals_llama_quantize_told_the_same(model, mixed, tmp_path):
    recipe, lines, ours = tmp_path / "r.toml", tmp_path / "lines.txt", tmp_path / "q.gguf"
    write_recipe(recipe, Recipe(preset="Q4_K_M", tensors=mixed))
    assert invoke(["quantize", "-q", "-m", str(model), "-o", str(ours), "--recipe", str(recipe)]) == 0
    lines.write_text("\n".join(f"^{name.replace('.', '[.]')}$={kind}" for name, kind in mixed.items()))
    folder = os.environ.get("LLAMA_CPP_TOOLS")
    tools = Tools(pathlib.Path(folder)) if folder else None
    options = ["--tensor-type-file", str(lines), "Q4_K_M"]
    same_tensors(ours, reference(tools, model, tmp_path / "theirs.gguf", options))
    with GgufFile(ours) as file:
        assert file.get("general.file_type") == preset_number("Q4_K_M")


@pytest.mark.parametrize("preset", ["Q2_K", "Q4_K_M", "Q5_0", "Q8_0", "F16", "IQ3_S"])
def test_the_recipe_of_a_quant_makes_it_again(preset, model, tmp_path):
    made = quantize(model, tmp_path / "first.gguf", preset)
    recipe = extract(made.path)
    again = quantize(model, tmp_path / "second.gguf", QuantizeOptions(types=recipe.tensors))
    same_tensors(again.path, made.path)
    with GgufFile(again.path) as file:
        # Nearest in bytes, and by types where several are equally near.
        assert file.get("general.file_type") == preset_number(preset)


def test_a_preset_decides_what_the_recipe_leaves_open(model):
    some = {"blk.1.attn_q.weight": "q8_0", "blk.2.ffn_up.weight": "f16"}
    with prepare(model, QuantizeOptions("Q3_K_S", types=some)) as prepared:
        types, why = prepared.choice.types, {tensor.name: tensor.why for tensor in prepared.choice.tensors}
        assert types["blk.1.attn_q.weight"] == "q8_0" and why["blk.1.attn_q.weight"] == "recipe"
        assert types["blk.0.attn_q.weight"] == "q3_K" and why["blk.0.attn_q.weight"] == "preset Q3_K_S"
        assert any("names no type for" in line and "Q3_K_S decides" in line for line in prepared.choice.warnings)
    with prepare(model, QuantizeOptions("BF16", types=some)) as prepared:
        kinds = prepared.choice.types
        assert kinds["blk.1.attn_q.weight"] == "q8_0" and kinds["blk.0.attn_q.weight"] == "bf16"
        assert kinds["blk.2.ffn_up.weight"] == "f16" and kinds["output_norm.weight"] == "f32"


def test_options_go_before_the_recipe(model, mixed):
    options = QuantizeOptions(types=mixed, tensor_types=("attn_v=q5_1",), output_tensor_type="q2_k")
    with prepare(model, options) as prepared:
        types = prepared.choice.types
        assert {types[f"blk.{block}.attn_v.weight"] for block in range(4)} == {"q5_1"}
        assert types["output.weight"] == "q2_K" and types["blk.0.ffn_down.weight"] == "q5_0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.9.attn_q.weight": "q8_0"}, r"names blk\.9\.attn_q\.weight, which"),
        ({"blk.0.attn_q.weight": "q9_0"}, r"recipe's blk\.0\.attn_q\.weight: weights cannot be stored as 'q9_0'"),
        ({"blk.0.attn_q.weight": None}, r"names no type for blk\.0\.attn_q\.weight \(1 tensor"),
        ({"output_norm.weight": "q8_0"}, r"gives output_norm\.weight q8_0, but it has to stay f32"),
        ({"output_norm.weight": "f16"}, r"has to stay f32"),
    ],
)
def test_recipes_that_do_not_fit(change, message, model, mixed, tmp_path):
    types = {name: kind for name, kind in (mixed | change).items() if kind is not None}
    with pytest.raises(UsageError, match=message):
        quantize(model, tmp_path / "q.gguf", QuantizeOptions(types=types))
    assert not list(tmp_path.iterdir())


def test_a_width_that_cannot_hold_the_type_is_said_or_refused(model, mixed, tmp_path):
    types = mixed | {"blk.0.ffn_down.weight": "q4_k", "blk.1.ffn_down.weight": "q4_k"}
    with prepare(model, QuantizeOptions(types=types)) as prepared:
        (line,) = prepared.choice.warnings
        assert "blk.0.ffn_down.weight: rows of 288 weights cannot be q4_K (blocks of 256), and 1 more: q5_0" in line
        (tensor,) = [tensor for tensor in prepared.choice.tensors if tensor.name == "blk.0.ffn_down.weight"]
        assert (tensor.requested.name, tensor.type.name) == ("q4_K", "q5_0")
    for options in (QuantizeOptions(types=types, no_fallback=True), QuantizeOptions("Q4_K_M", no_fallback=True)):
        with pytest.raises(UsageError, match=r"blk\.0\.ffn_down\.weight: rows of 288 .*--no-fallback"):
            quantize(model, tmp_path / "q.gguf", options)
    quantize(model, tmp_path / "q.gguf", QuantizeOptions(types=mixed, no_fallback=True))


@pytest.mark.parametrize("option", ["token_embedding_type", "output_tensor_type"])
def test_embedding_and_head_have_the_usual_fallback(option, tmp_path):
    # llama-quantize aborts here.
    model = make_model(tmp_path, hidden_size=288, intermediate_size=256, num_attention_heads=4)
    name = {"token_embedding_type": "token_embd.weight", "output_tensor_type": "output.weight"}[option]
    for preset in ("Q4_0", "F16"):
        with prepare(model, QuantizeOptions(preset, **{option: "q4_k"})) as prepared:
            (tensor,) = [tensor for tensor in prepared.choice.tensors if tensor.name == name]
            assert (tensor.type.name, tensor.requested.name) == ("q5_0", "q4_K")
            assert prepared.choice.types["blk.0.attn_q.weight"] == preset.lower()


def test_a_recipe_names_what_needs_an_imatrix(model, mixed, tmp_path):
    types = mixed | {"blk.1.attn_q.weight": "iq2_s"}
    with pytest.raises(Exception, match=r"blk\.1\.attn_q\.weight would become iq2_s.*--imatrix"):
        quantize(model, tmp_path / "q.gguf", QuantizeOptions(types=types))
    make_imatrix(model, tmp_path / "imatrix.gguf")
    with prepare(model, QuantizeOptions(types=types), imatrix=tmp_path / "imatrix.gguf") as prepared:
        assert prepared.importance["blk.1.attn_q.weight"].shape == (1, 256)
