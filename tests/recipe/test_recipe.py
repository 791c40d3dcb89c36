"""Recipes as text, extracted from files of any maker, compared and shown."""

import hashlib
import json
import pathlib
import tomllib

import gguf
import numpy as np
import pytest

from bitladder.cli import invoke
from bitladder.errors import BitladderError
from bitladder.recipe import (
    FileUsed,
    ImatrixUsed,
    Recipe,
    TextUsed,
    diff,
    extract,
    read_recipe,
    recipe_sha256,
    recipe_toml,
    write_recipe,
)

RECIPE = Recipe(
    model='Modèle "x"',
    file="X-Q4_K_M.gguf",
    preset="Q4_K_M",
    budget="4.5 bpw",
    bytes=123,
    bpw=4.9375,
    made="bitladder quantize",
    source=FileUsed(name="X-F16.gguf", sha256="ab"),
    imatrix=ImatrixUsed(name="imatrix.gguf", sha256="cd", chunks=3, n_ctx=512, texts=[TextUsed(name="t", sha256="ef")]),
    versions={"bitladder": "0.1.0"},
    metadata={"bitladder.version": "0.1.0", "bitladder.number": 3},
    tensors={
        "blk.0.ffn_down.weight": "q6_K",
        "blk.0.attn_norm.weight": "f32",
        "output_norm.weight": "f32",
        "token_embd.weight": "q6_K",
        "blk.0.attn_k.weight": "q4_K",
        "blk.10.ffn_down.weight": "q4_K",
        "blk.10.attn_k.weight": "q4_K",
        "blk.2.ffn_down.weight": "q4_K",
        'odd "name" \n🙂': "f32",
    },
)


@pytest.mark.parametrize("changes", [{}, {"imatrix": None}, {"imatrix": ImatrixUsed(name="i.dat"), "versions": {}}])
def test_a_recipe_survives_writing_and_reading(changes, tmp_path):
    recipe = RECIPE.model_copy(update=changes)
    write_recipe(tmp_path / "r.toml", recipe)
    again = read_recipe(tmp_path / "r.toml")
    assert again == recipe
    assert recipe_toml(again) == (tmp_path / "r.toml").read_text()
    # Another reader finds the same tensors in it.
    assert tomllib.loads((tmp_path / "r.toml").read_text())["tensors"] == recipe.tensors


def test_a_recipe_is_grouped_for_reading():
    lines = recipe_toml(RECIPE).splitlines()
    group = lines.index("# ffn_down: 2 × q4_K, 1 × q6_K")
    assert lines[group + 1 : group + 4] == [
        '"blk.0.ffn_down.weight" = "q6_K"', '"blk.2.ffn_down.weight" = "q4_K"', '"blk.10.ffn_down.weight" = "q4_K"',
    ]  # fmt: skip
    order = [line.partition("=")[0].strip(' "') for line in lines[lines.index("[tensors]") + 1 :] if "=" in line]
    assert order[0] == "token_embd.weight" and order[-1] == "blk.0.attn_norm.weight"
    backwards = RECIPE.model_copy(update={"tensors": dict(reversed(RECIPE.tensors.items()))})
    assert recipe_toml(backwards) == recipe_toml(RECIPE)


def test_a_hand_written_recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b'\xef\xbb\xbf[tensors]\r\nblk.0.attn_q.weight = "Q4_K"\r\n"blk.0.attn_k.weight" = "q6_K"\r\n')
    recipe = read_recipe(path)
    assert recipe.tensors == {"blk.0.attn_q.weight": "Q4_K", "blk.0.attn_k.weight": "q6_K"}
    assert recipe.preset is None and recipe.bytes is None
    path.write_text('[tensors.blk.0]\nattn_q.weight = "q4_K"\nattn_k.weight = "q6_K"\n')
    assert recipe_sha256(read_recipe(path).tensors) == recipe_sha256(recipe.tensors)


def test_recipes_of_earlier_runs_are_read(tmp_path):
    (tmp_path / "r.toml").write_text(
        '# How X.gguf was made\nschema_version = 1\nmodel = "X"\nfile = "X.gguf"\npreset = "Q4_K_M"\nbytes = 1\n'
        'bpw = 4.5\n\n[source]\nname = "F.gguf"\nsha256 = "ab"\n\n[imatrix]\nname = "i.gguf"\nsha256 = "cd"\n'
        'chunks = 3\nn_ctx = 512\ntexts = [\n    { name = "t", sha256 = "ef" },\n]\n\n[versions]\nggml = "1"\n\n'
        '[tensors]\n"token_embd.weight" = "q6_K"\n'
    )
    recipe = read_recipe(tmp_path / "r.toml")
    assert recipe.imatrix.texts == [TextUsed(name="t", sha256="ef")] and recipe.source.sha256 == "ab"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "cannot read"),
        ("\nx = \n", r"not TOML.*line 2"),
        ('prest = "Q4_K_M"', r"r\.toml:1: unknown key prest; did you mean preset\?"),
        (
            '[tensors]\n"a" = "q4_K"\n\n[imatrix]\nname = "i"\nchnks = 3',
            r"r\.toml:6: unknown key imatrix\.chnks.*chunks",
        ),
        ('nonsense = 1\n[tensors]\n"a" = "f32"', r"unknown key nonsense; known are .*preset"),
        ('preset = "Q4_K_M"', r"no tensors"),
        ("[tensors]", r"no tensors"),
        ("tensors = 3", r"no tensors"),
        ('[tensors]\n"blk.0.attn_q.weight" = 4', r"r\.toml:2: blk\.0\.attn_q\.weight needs a type in quotes, not 4"),
        ('schema_version = 2\n[tensors]\n"a" = "f32"', r"r\.toml:1: schema_version is 2"),
        ('bytes = "many"\n[tensors]\n"a" = "f32"', r"r\.toml:1: bytes"),
        ('[tensors]\na.b = "f32"\n"a.b" = "f16"', r"a\.b is named twice"),
        ('[tensors]\n"a" = "f32"\n"a" = "f16"', r"not TOML"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, text, match):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BitladderError, match=match) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)


def test_the_hash_is_of_the_types_alone():
    expected = hashlib.sha256(b"a.weight=q4_k\nb.weight=f32\n").hexdigest()
    assert recipe_sha256({"b.weight": "F32", "a.weight": "q4_K"}) == expected
    assert recipe_sha256({"b.weight": "F32", "a.weight": "q5_K"}) != expected


def foreign_gguf(path: pathlib.Path, kinds: dict[str, gguf.GGMLQuantizationType], **options) -> None:
    """A file as another maker writes it, by gguf-py: 4 rows of 256 zeros in each tensor."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_name("A Model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_string("quantize.imatrix.file", "/models_out/A-Model-GGUF/A-Model.imatrix")
    writer.add_string("quantize.imatrix.dataset", "C:\\data\\calibration_datav3.txt")
    writer.add_int32("quantize.imatrix.entries_count", 224)
    writer.add_int32("quantize.imatrix.chunks_count", 125)
    writer.add_string("bitladder.recipe.sha256", "ab")
    for name, kind in kinds.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((4, 256 // block * size), np.uint8)
        writer.add_tensor(name, data.view(np.float32) if kind.name == "F32" else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TYPES = gguf.GGMLQuantizationType
KINDS = {
    "token_embd.weight": TYPES.Q6_K,
    "output_norm.weight": TYPES.F32,
    "blk.0.attn_q.weight": TYPES.IQ4_XS,
    "blk.1.attn_q.weight": TYPES.Q5_1,
}


def test_extracting_from_a_file_of_another_maker(tmp_path):
    foreign_gguf(tmp_path / "A.gguf", KINDS)
    recipe = extract(tmp_path / "A.gguf")
    assert {name: kind.lower() for name, kind in recipe.tensors.items()} == {
        n: k.name.lower() for n, k in KINDS.items()
    }
    assert (recipe.model, recipe.file, recipe.preset) == ("A Model", "A.gguf", "Q4_K_M")
    data = (tmp_path / "A.gguf").read_bytes()
    assert recipe.sha256 == hashlib.sha256(data).hexdigest() and recipe.bytes == len(data)
    assert recipe.bpw == pytest.approx((6.5625 + 32 + 4.25 + 6) / 4)
    assert recipe.imatrix == ImatrixUsed(
        name="A-Model.imatrix", dataset="calibration_datav3.txt", entries=224, chunks=125
    )
    assert recipe.metadata == {"bitladder.recipe.sha256": "ab"}
    write_recipe(tmp_path / "r.toml", recipe)
    assert read_recipe(tmp_path / "r.toml") == recipe


def test_extracting_from_shards(tmp_path):
    foreign_gguf(tmp_path / "A.gguf", KINDS)
    foreign_gguf(tmp_path / "S.gguf", KINDS, split_max_tensors=2)
    shards = sorted(tmp_path.glob("S-*.gguf"))
    assert len(shards) == 2
    whole, split = extract(tmp_path / "A.gguf"), extract(shards[0])
    assert split.tensors == whole.tensors and split.bytes == sum(path.stat().st_size for path in shards)
    assert split.sha256 not in (None, whole.sha256)


def test_what_is_no_model_is_refused(tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BitladderError, match="an importance matrix"):
        extract(tmp_path / "imatrix.gguf")
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    assert invoke(["recipe", "show", str(tmp_path / "x.bin")]) == 1
    assert "neither a recipe (TOML) nor a GGUF" in capsys.readouterr().err


BEFORE = {"token_embd.weight": "q6_K", "output_norm.weight": "f32"} | {
    f"blk.{layer}.attn_q.weight": "q4_K" for layer in range(6)
}
AFTER = BEFORE | {f"blk.{layer}.attn_q.weight": "Q5_K" for layer in (0, 1, 2, 5)} | {"blk.3.attn_q.weight": "iq4_nl"}
AFTER |= {"token_embd.weight": "q4_K", "output.weight": "q6_K"}
SHAPES = dict.fromkeys(AFTER, (512, 10))


def test_a_difference_is_counted_tensor_by_tensor():
    found = diff(Recipe(tensors=BEFORE), Recipe(tensors=AFTER), SHAPES)
    assert {move.name: move.direction for move in found.moves} == {
        "token_embd.weight": "down", "blk.0.attn_q.weight": "up", "blk.1.attn_q.weight": "up",
        "blk.2.attn_q.weight": "up", "blk.3.attn_q.weight": "level", "blk.5.attn_q.weight": "up",
    }  # fmt: skip
    assert found.only_a == {} and found.only_b == {"output.weight": "q6_K"} and found.same == 2
    # Bytes of a super-block of 256 weights, from ggml-common.h.
    blocks = 512 * 10 // 256
    q4, q5, q6 = 144 * blocks, 176 * blocks, 210 * blocks
    assert found.bytes_by_kind() == {"token_embd": q4 - q6, "attn_q": 4 * (q5 - q4)}
    groups = {(group.kind, group.after): group for group in found.groups()}
    assert groups["attn_q", "q5_K"].layers == (0, 1, 2, 5) and groups["attn_q", "q5_K"].bytes == 4 * (q5 - q4)
    assert found.size_b.bytes - found.size_a.bytes == sum(found.bytes_by_kind().values()) + q6
    assert found.size_a.weights == 8 * 5120


def test_a_difference_without_shapes_has_no_bytes():
    found = diff(Recipe(tensors=BEFORE), Recipe(tensors=AFTER), {})
    assert all(move.bytes is None for move in found.moves) and found.size_a is None
    same = diff(Recipe(tensors=BEFORE), Recipe(tensors={k: v.upper() for k, v in BEFORE.items()}), SHAPES)
    assert not same.moves and same.same == len(BEFORE)
    with pytest.raises(BitladderError, match=r"blk\.0\.attn_q\.weight: a row of 100 weights"):
        diff(Recipe(tensors=BEFORE), Recipe(tensors=AFTER), SHAPES | {"blk.0.attn_q.weight": (100, 10)})


def test_the_diff_command(tmp_path, capsys):
    foreign_gguf(tmp_path / "A.gguf", KINDS)
    foreign_gguf(tmp_path / "B.gguf", KINDS | {"blk.1.attn_q.weight": TYPES.Q8_0})
    write_recipe(tmp_path / "B.toml", extract(tmp_path / "B.gguf"))
    seen = []
    for other in ("B.gguf", "B.toml"):
        assert invoke(["recipe", "diff", str(tmp_path / "A.gguf"), str(tmp_path / other), "--json"]) == 0
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0] == seen[1]
    gained = 1024 // 32 * (34 - 24)  # q8_0 and q5_1 per block of 32
    assert seen[0]["kinds"] == {"attn_q": gained} and seen[0]["b"]["bytes"] - seen[0]["a"]["bytes"] == gained
    assert invoke(["recipe", "diff", str(tmp_path / "A.gguf"), str(tmp_path / "B.toml")]) == 0
    out = capsys.readouterr().out
    assert "q5_1 → q8_0" in out and f"+{gained}" in out and "1 tensor differs, 3 are the same" in out


def test_the_show_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm"]
    tensors = {
        f"blk.{layer}.{name}.weight": "f32" if "norm" in name else "iq3_xxs" if (layer * 7 + i) % 3 else "q4_K"
        for layer in range(80)
        for i, name in enumerate(names)
    }
    write_recipe(tmp_path / "r.toml", Recipe(tensors=tensors))
    assert invoke(["recipe", "show", str(tmp_path / "r.toml")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:1].isdigit()}
    assert len(rows) == 80
    for layer in (0, 41, 79):
        assert rows[str(layer)] == [tensors[f"blk.{layer}.{name}.weight"] for name in names[:-1]]
    assert recipe_sha256(tensors) in out


def test_the_show_command_of_a_file(tmp_path, capsys):
    foreign_gguf(tmp_path / "A.gguf", KINDS)
    assert invoke(["recipe", "show", str(tmp_path / "A.gguf"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sizes"]["blocks"] == {"bytes": 4 * (136 + 8 * 24), "bpw": pytest.approx((4.25 + 6) / 2)}
    assert invoke(["recipe", "show", str(tmp_path / "A.gguf")]) == 0
    out = capsys.readouterr().out
    assert "A-Model.imatrix, 125 chunks" in out and "Q4_K_M" in out
    assert "was written with recipe ab; its types were changed later" in out  # "ab" is not the hash of these types
    write_recipe(tmp_path / "r.toml", extract(tmp_path / "A.gguf"))
    assert invoke(["recipe", "show", str(tmp_path / "r.toml"), "-m", str(tmp_path / "A.gguf")]) == 0
    assert f"blocks     {4 * (136 + 8 * 24):,} bytes" in capsys.readouterr().out


def test_names_from_a_file_are_no_markup(tmp_path, capsys):
    names = ["blk.0.[/bold]\x1b[2J.weight", "[red].weight"]
    write_recipe(tmp_path / "a.toml", Recipe(model="a\nb\x1b[31m", tensors=dict.fromkeys(names, "q4_K")))
    write_recipe(tmp_path / "b.toml", Recipe(tensors=dict.fromkeys([*names, "[/x]"], "q6_K")))
    assert invoke(["recipe", "show", str(tmp_path / "a.toml")]) == 0
    assert invoke(["recipe", "diff", str(tmp_path / "a.toml"), str(tmp_path / "b.toml")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]" in out and "[/bold]" in out and "a b" in out


@pytest.mark.parametrize("verb", ["show", "check", "extract", "diff", "export"])
def test_help_of_every_recipe_verb(verb, capsys):
    assert invoke(["recipe", verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out
