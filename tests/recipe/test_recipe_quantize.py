"""Recipes against quantizers: what is exported makes llama-quantize write our tensors, what is checked comes true."""

import itertools
import re
import shlex

import moe
import numpy as np
import pytest

from bitladder.calibrate import collect_imatrix, read_imatrix
from bitladder.cli import invoke
from bitladder.engine import Decoding, all_types, quantize_rows, storable, type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.recipe import (
    ImatrixUsed,
    Recipe,
    check,
    export,
    export_lines,
    extract,
    read_recipe,
    recipe_sha256,
    recipe_toml,
    write_recipe,
)
from bitladder.text import Reading, load_text


@pytest.fixture(scope="module")
def mixed_gguf(tiny_gguf, tmp_path_factory):
    """A small model with more matrices than there are types, in rows that hold them all."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "BLOCKS", 5)
        moe.write_moe(tiny_gguf, path, experts=4)
    return path


@pytest.fixture(scope="module")
def imatrix(mixed_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect_imatrix(
        mixed_gguf,
        [load_text("pydoc:test")],
        path,
        reading=Reading(chunks=2, spread=False),
        decoding=Decoding(n_ctx=64),
    )
    return path


@pytest.fixture(scope="module")
def odd_gguf(tiny_gguf, tmp_path_factory):
    """A mixture of experts whose rows of 288 weights are no multiple of a super-block; ffn_down's of 256 are."""
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    moe.write_moe(tiny_gguf, path, experts=4, width=288)
    return path


def same_tensors(ours, theirs):
    with GgufFile(ours) as a, GgufFile(theirs) as b:
        assert list(a.tensors) == list(b.tensors)
        for name, tensor in a.tensors.items():
            assert tensor == b.tensors[name], name
            assert np.array_equal(a.read(tensor), b.read(tensor)), name
        assert a.get("general.file_type") == b.get("general.file_type")


def run_export(tools, recipe, model, out, *, imatrix=None, with_model=True):
    """Write the exported lines, and run the exported command with its file names replaced by real paths."""
    types = out.with_suffix(".txt")
    made = export(recipe, str(types), model if with_model else None)
    types.write_text("\n".join(made.lines) + "\n")
    words = shlex.split(made.command)
    assert words[0] == "llama-quantize" and words[-2] == "OUT.gguf"
    if "--imatrix" in words:
        words[words.index("--imatrix") + 1] = str(imatrix)
    return tools.run("llama-quantize", *words[1:-3], model, out, words[-1])


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_L", "Q2_K", "F16", "BF16"])
def test_an_extracted_preset_is_made_again(preset, with_model, tools, odd_gguf, tmp_path):
    quantize(odd_gguf, tmp_path / "ours.gguf", preset)
    recipe = extract(tmp_path / "ours.gguf")
    assert recipe.preset == preset
    run_export(tools, recipe, odd_gguf, tmp_path / "theirs.gguf", with_model=with_model)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("preset", ["Q2_K_S", "Q4_K_M"])
def test_an_extracted_preset_with_an_imatrix_is_made_again(preset, tools, mixed_gguf, imatrix, tmp_path):
    quantize(mixed_gguf, tmp_path / "ours.gguf", preset, imatrix=imatrix)
    recipe = extract(tmp_path / "ours.gguf")
    assert recipe.imatrix.name == "imatrix.gguf" and recipe.imatrix.chunks == 2
    run_export(tools, recipe, mixed_gguf, tmp_path / "theirs.gguf", imatrix=imatrix)
    same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


# Their tables take the library some 10 s, in each process.
LATE = ("iq1_s", "iq1_m", "iq2_s", "iq2_xs", "iq2_xxs")


def mixed_recipe(model, seed, preset="Q4_K_M", leave_out=LATE):
    """All types that weights can be stored as, dealt out to the matrices; norms and routers as they are."""
    kinds = [kind.name for kind in all_types().values() if storable(kind) and kind.name not in leave_out]
    dealt = itertools.cycle(np.random.default_rng(seed).permutation(kinds))
    embeddings = itertools.cycle(["q3_K", "iq4_nl", "q8_0", "f16"][seed % 4 :])  # quick, and none needs an imatrix
    tensors = {}
    with GgufFile(model) as file:
        for name, tensor in file.tensors.items():
            if name in ("token_embd.weight", "output.weight"):
                tensors[name] = next(embeddings)
            elif "norm" in name or "gate_inp" in name:
                tensors[name] = tensor.type.name
            else:
                tensors[name] = str(next(dealt))
    assert set(kinds) <= set(tensors.values())
    return Recipe(preset=preset, tensors=tensors)


@pytest.mark.parametrize(
    ("seed", "preset", "leave_out"),
    [(1, "Q4_K_M", LATE), (3, "F16", LATE), (4, None, LATE), pytest.param(2, "Q2_K_S", (), marks=pytest.mark.slow)],
)
def test_a_mix_of_all_types_goes_round(seed, preset, leave_out, tools, mixed_gguf, imatrix, tmp_path):
    recipe = mixed_recipe(mixed_gguf, seed, preset, leave_out)
    options = QuantizeOptions(preset=preset, types=recipe.tensors)
    ours = tmp_path / "ours.gguf"
    quantize(mixed_gguf, ours, options, imatrix=imatrix)
    found = extract(ours)
    write_recipe(tmp_path / "found.toml", found)
    again = read_recipe(tmp_path / "found.toml")
    assert recipe_sha256(again.tensors) == recipe_sha256(recipe.tensors) == again.metadata["bitladder.recipe.sha256"]
    assert recipe_toml(again) == recipe_toml(found)
    run_export(tools, again, mixed_gguf, tmp_path / "theirs.gguf", imatrix=imatrix)
    same_tensors(ours, tmp_path / "theirs.gguf")
    with GgufFile(mixed_gguf) as file, GgufFile(ours) as made:
        checked = check(again, file)
        assert not checked.problems and checked.needs_imatrix
        assert (checked.size.bytes, checked.size.bpw) == (made.tensor_bytes, pytest.approx(made.bpw))


def test_the_kernels_themselves_give_the_same_bytes(tools, mixed_gguf, imatrix, tmp_path):
    recipe = mixed_recipe(mixed_gguf, 6)
    recipe = recipe.model_copy(update={"imatrix": ImatrixUsed(name="imatrix.gguf")})
    run_export(tools, recipe, mixed_gguf, tmp_path / "theirs.gguf", imatrix=imatrix)
    entries = read_imatrix(imatrix).entries
    with GgufFile(mixed_gguf) as source, GgufFile(tmp_path / "theirs.gguf") as made:
        for name, tensor in source.tensors.items():
            if len(tensor.shape) != 2 or name not in entries or "gate_inp" in name:
                continue
            weights = source.read(tensor).view(np.float16).astype(np.float32)
            ours = quantize_rows(weights, type_by_name(recipe.tensors[name]), entries[name].means().reshape(-1))
            assert np.array_equal(ours, made.read(made.tensors[name])), name


def test_tensors_that_are_not_named_follow_the_preset(tools, tiny_gguf, tmp_path):
    for preset in ("Q4_K_M", "BF16"):
        recipe = Recipe(preset=preset, tensors={"token_embd.weight": "q8_0", "blk.2.ffn_down.weight": "F16"})
        ours = quantize(tiny_gguf, tmp_path / "ours.gguf", QuantizeOptions(preset=preset, types=recipe.tensors))
        run_export(tools, recipe, tiny_gguf, tmp_path / "theirs.gguf")
        same_tensors(ours.path, tmp_path / "theirs.gguf")
        with GgufFile(tiny_gguf) as file:
            assert check(recipe, file).types == ours.types


def test_what_the_check_foretells_comes_true(tools, odd_gguf, tmp_path):
    recipe = Recipe(
        preset="Q5_K_M",
        tensors={
            "token_embd.weight": "q6_K",
            "blk.0.attn_q.weight": "q2_K",
            "blk.1.attn_q.weight": "q2_K",
            "blk.0.attn_k.weight": "iq4_xs",
            "blk.0.ffn_down_exps.weight": "q3_K",
            "blk.0.ffn_norm.weight": "f32",
        },
    )
    with GgufFile(odd_gguf) as file:
        checked = check(recipe, file)
    lines = [finding.line() for finding in checked.findings if finding.problem]
    cannot, instead = "problem: {}: a row of 288 weights cannot be {} (blocks of 256); ", "{} would be used instead"
    assert lines == [
        (cannot + instead).format(*words)
        for words in (
            ("token_embd.weight", "q6_K", "q8_0"),
            ("attn_q of layers 0, 1", "q2_K", "q4_0"),
            ("blk.0.attn_k.weight", "iq4_xs", "iq4_nl"),
        )
    ]
    decided = [finding for finding in checked.findings if "not in the recipe; Q5_K_M makes it" in finding.text]
    named = {name for finding in decided for name in finding.tensors}
    assert "blk.1.ffn_down_exps.weight" in named and not named & recipe.tensors.keys()
    (tmp_path / "types.txt").write_text("\n".join(export_lines(recipe)))
    tools.run("llama-quantize", "--tensor-type-file", tmp_path / "types.txt", odd_gguf, tmp_path / "t.gguf", "Q5_K_M")
    made = extract(tmp_path / "t.gguf")
    assert made.tensors == checked.types
    assert 8 * checked.size.bytes / checked.size.weights == pytest.approx(made.bpw)


@pytest.mark.parametrize(
    ("kind", "preset", "needed"),
    [
        ("iq3_xxs", "Q8_0", True), ("iq2_s", "Q8_0", True), ("iq1_m", "Q8_0", True), ("iq2_xxs", "Q8_0", True),
        ("q2_K", "Q2_K_S", True), ("q2_K", "Q8_0", False), ("iq3_s", "Q8_0", False),
    ],
)  # fmt: skip
def test_the_need_of_an_imatrix_is_foretold(kind, preset, needed, tools, mixed_gguf, tmp_path):
    with GgufFile(mixed_gguf) as file:
        q8 = {name: "q8_0" if len(tensor.shape) > 1 else "f32" for name, tensor in file.tensors.items()}
        q8 |= {name: "f32" for name in q8 if "gate_inp" in name}
        recipe = Recipe(preset=preset, tensors=q8 | {"blk.1.attn_q.weight": kind})
        checked = check(recipe, file)
    assert checked.needs_imatrix == needed and not checked.problems
    assert [finding.tensors for finding in checked.findings] == [("blk.1.attn_q.weight",)] * needed
    (tmp_path / "types.txt").write_text("\n".join(export_lines(recipe)))
    arguments = ("--dry-run", "--tensor-type-file", tmp_path / "types.txt", mixed_gguf, preset)
    assert ("will require an imatrix" in tools.run("llama-quantize", *arguments)) == needed


def test_the_embedding_needs_an_entry_of_its_own(tiny_gguf):
    with GgufFile(tiny_gguf) as file:
        for kind, needed in (("iq2_xs", True), ("iq3_xxs", False)):
            checked = check(Recipe(preset="Q4_K_M", tensors={"token_embd.weight": kind}), file)
            assert checked.needs_imatrix == needed


PROBLEMS = {
    "blk.0.atn_q.weight": ("q4_K", "no such tensor; did you mean blk.0.attn_q.weight?"),
    "blk.0.attn_q.weight": ("q4_KM", "did you mean q4_k?"),
    "blk.1.attn_q.weight": ("q8_1", "cannot be stored as 'q8_1'"),
    "output_norm.weight": ("q8_0", "it is never quantized, and stays f32"),
}


def test_problems_are_findings_on_stdout_and_a_code(tiny_gguf, tmp_path, capsys):
    write_recipe(tmp_path / "r.toml", Recipe(tensors={name: kind for name, (kind, _) in PROBLEMS.items()}))
    assert invoke(["recipe", "check", str(tmp_path / "r.toml"), "-m", str(tiny_gguf)]) == 1
    captured = capsys.readouterr()
    problems = [line for line in captured.out.splitlines() if line.startswith("problem: ")]
    for name, (_, text) in PROBLEMS.items():
        assert sum(f"{name}: " in line and text in line for line in problems) == 1, name
    assert any(line.startswith("problem: ffn_down of layers 0-7: not in the recipe") for line in problems)
    assert f"{len(problems)} problems with {tiny_gguf.name}" in captured.err
    assert captured.err.count("\n") == 1
    with pytest.raises(BitladderError, match="llama-quantize cannot make this"):
        export(read_recipe(tmp_path / "r.toml"), "t.txt", tiny_gguf)


def test_a_source_that_is_quantized_already(tiny_gguf, tmp_path):
    quantize(tiny_gguf, tmp_path / "q8.gguf", "Q8_0")
    recipe = extract(tmp_path / "q8.gguf")
    with GgufFile(tmp_path / "q8.gguf") as file:
        assert not check(recipe, file).findings
        other = recipe.model_copy(update={"tensors": recipe.tensors | {"output.weight": "q6_K"}})
        (finding,) = check(other, file).findings
    assert finding.problem and "take an F16, BF16 or F32 model" in finding.text


def test_what_only_bitladder_changes_is_not_exported(odd_gguf, tmp_path):
    recipe = Recipe(preset="Q8_0", tensors={"blk.0.ffn_gate_inp.weight": "f16"})
    ours = quantize(odd_gguf, tmp_path / "ours.gguf", QuantizeOptions(preset="Q8_0", types=recipe.tensors))
    with GgufFile(odd_gguf) as file:
        checked = check(recipe, file)
    assert checked.types == ours.types and not checked.problems
    with pytest.raises(BitladderError, match=r"ffn_gate_inp\.weight: llama-quantize leaves it f32"):
        export(recipe, "t.txt", odd_gguf)


def test_lines_name_exactly_their_tensors(mixed_gguf):
    recipe = mixed_recipe(mixed_gguf, 5)
    lines = [line.rpartition("=")[::2] for line in export_lines(recipe)]
    assert len(lines) < len(recipe.tensors)
    # Python's dialect agrees with std::regex on all that these patterns use.
    for name, kind in recipe.tensors.items():
        assert [found for pattern, found in lines if re.search(pattern, name)] == [kind], name
    assert export_lines(Recipe(tensors={"A =b.x": "f16"})) == [r"^\x41\x20\x3db\.x$=f16"]


def test_the_export_command(tiny_gguf, tmp_path, capsys):
    quantize(tiny_gguf, tmp_path / "q.gguf", "Q4_K_M")
    types = tmp_path / "types.txt"
    assert invoke(["recipe", "export", str(tmp_path / "q.gguf"), "-m", str(tiny_gguf), "-o", str(types)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"llama-quantize --tensor-type-file {types} {tiny_gguf} OUT.gguf Q4_K_M")
    assert not captured.err and "norm" not in types.read_text()
    assert invoke(["recipe", "export", str(tmp_path / "q.gguf"), "-m", str(tiny_gguf)]) == 0
    captured = capsys.readouterr()
    assert captured.out == types.read_text() and "llama-quantize" in captured.err
    assert invoke(["recipe", "extract", str(tmp_path / "q.gguf"), "-o", str(tmp_path / "r.toml")]) == 0
    assert invoke(["recipe", "extract", str(tmp_path / "q.gguf")]) == 0
    assert capsys.readouterr().out == (tmp_path / "r.toml").read_text()
    assert invoke(["recipe", "check", str(tmp_path / "r.toml"), "-m", str(tiny_gguf)]) == 0
