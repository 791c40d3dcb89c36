import pathlib

import pytest

from bitladder.errors import BitladderError, UsageError
from bitladder.ladder.plan import CODE, RunOptions, choose_rungs, command_line, plan
from bitladder.ladder.recipe import FileUsed, ImatrixUsed, Recipe, TextUsed, read_recipe, recipe_toml, write_recipe
from bitladder.ladder.source import file_stem
from bitladder.ladder.space import bytes_needed

RUNGS = ("Q4_K_M", "Q8_0")
SOURCES = {"model", "converter", "text", "calibration"}


def options(**changes) -> RunOptions:
    return RunOptions(**{"model": "org/name", "out": pathlib.Path("/somewhere/out"), "rungs": RUNGS} | changes)


def differing(**changes) -> list[str]:
    """Steps whose own options change, and those that read them."""
    before = {step.name: step for step in plan(options())}
    changed: list[str] = []
    for step in plan(options(**changes)):
        if before.get(step.name) != step or any(need in changed for need in step.needs):
            changed.append(step.name)
    return changed


def test_every_step_comes_after_those_it_needs():
    done = set(SOURCES)
    for step in plan(options(converter=pathlib.Path("x.py"))):
        assert set(step.needs) <= done
        assert step.kind in CODE
        done.add(step.name)
    assert [step.name for step in plan(options())] == [
        "convert", "base", "score base", "imatrix", "quantize Q4_K_M", "score Q4_K_M", "quantize Q8_0", "score Q8_0",
    ]  # fmt: skip


def test_an_option_changes_only_what_depends_on_it():
    assert differing(threads=3, quantized_by="me") == []
    assert differing(chunks=5) == ["base", "score base", "score Q4_K_M", "score Q8_0"]
    assert differing(imatrix_chunks=5) == [
        "imatrix", "quantize Q4_K_M", "score Q4_K_M", "quantize Q8_0", "score Q8_0",
    ]  # fmt: skip
    assert differing(rungs=("Q8_0",)) == []
    assert differing(rungs=(*RUNGS, "Q6_K")) == ["quantize Q6_K", "score Q6_K"]
    assert len(differing(outtype="f32")) == 8
    assert differing(gpu_layers=10) == [step.name for step in plan(options())][1:]
    assert plan(options(gpu_layers=10)) == plan(options(gpu_layers=99))


def test_choosing_rungs():
    known, default = ("F16", "Q4_K_M", "Q6_K", "Q8_0"), ("Q6_K", "Q8_0")
    assert choose_rungs("all", known=known, default=default) == default
    assert choose_rungs("q8_0, Q4_K_M,q8_0", known=known, default=default) == ("Q8_0", "Q4_K_M")
    with pytest.raises(UsageError, match="--ladder Q9_X: the presets are Q4_K_M, Q6_K, Q8_0"):
        choose_rungs("Q8_0,Q9_X", known=known, default=default)
    with pytest.raises(UsageError, match="empty"):
        choose_rungs(",", known=known, default=default)


def test_the_command_names_no_paths():
    assert command_line(options(), "org/name", RUNGS) == "bitladder run org/name --out out"
    full = options(
        text="/home/me/my text.txt",
        calibration=("/a/b.txt", "pydoc:test"),
        converter=pathlib.Path("/opt/c.py"),
        threads=2,
    )
    line = command_line(full, "name", ("Q8_0",))
    assert line == (
        "bitladder run name --out out --ladder Q4_K_M,Q8_0 --calibration b.txt --calibration pydoc:test"
        " --text 'my text.txt' -t 2 --converter c.py"
    )


def test_file_names_follow_the_convention():
    general = {"general.name": "A b", "general.basename": "Base", "general.size_label": "1B"}
    general["general.finetune"] = "it/x"
    assert file_stem(general, "file") == "Base-1B-it-x"
    assert file_stem({"general.name": "My Model"}, "file") == "My-Model"
    assert file_stem({}, "thing-F16") == "thing"


def test_the_room_a_ladder_needs():
    assert bytes_needed(8_000_000_000, [], "f16") == 16_000_000_000
    assert bytes_needed(8_000_000_000, ["Q8_0"], None) == pytest.approx(9.35e9)


RECIPE = Recipe(
    model='Modèle "x"',
    file="X-Q4_K_M.gguf",
    preset="Q4_K_M",
    bytes=123,
    bpw=4.9375,
    source=FileUsed(name="X-F16.gguf", sha256="ab"),
    imatrix=ImatrixUsed(name="imatrix.gguf", sha256="cd", chunks=3, n_ctx=512, texts=[TextUsed(name="t", sha256="ef")]),
    versions={"bitladder": "0.1.0"},
    tensors={
        "token_embd.weight": "q6_K",
        "blk.0.ffn_down.weight": "q6_K",
        "blk.0.attn_k.weight": "q4_K",
        "blk.1.ffn_down.weight": "q4_K",
        "blk.1.attn_k.weight": "q4_K",
        'odd "name" 🙂': "f32",
    },
)


def test_a_recipe_survives_writing_and_reading(tmp_path):
    write_recipe(tmp_path / "r.toml", RECIPE)
    assert read_recipe(tmp_path / "r.toml") == RECIPE
    without = RECIPE.model_copy(update={"imatrix": None})
    write_recipe(tmp_path / "r.toml", without)
    assert read_recipe(tmp_path / "r.toml") == without


def test_a_recipe_is_grouped_for_reading():
    lines = recipe_toml(RECIPE).splitlines()
    group = lines.index("# ffn_down.weight: 1 × q6_K, 1 × q4_K")
    assert lines[group + 1 : group + 3] == ['"blk.0.ffn_down.weight" = "q6_K"', '"blk.1.ffn_down.weight" = "q4_K"']


@pytest.mark.parametrize(("text", "match"), [("x = ", "not TOML"), ("preset = 3", "model"), (None, "cannot read")])
def test_a_bad_recipe_is_one_line(tmp_path, text, match):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BitladderError, match=match):
        read_recipe(path)
