"""No output is an input, and none overwrites a file of another kind: for every command that there is."""

import os
import pathlib
import shutil

import click
import pytest

from bitladder.cli import application, invoke
from bitladder.cli.outputs import Command, OutputFolder, OutputPath

TEXT = "A sentence that is a text to calibrate on and to measure with.\n" * 80
# What the parameters of a command need beside the two that name the same file. A new command that writes needs a line.
NEEDS = {
    "convert": ["{checkpoint}"],
    "imatrix": ["-m", "{model}", "-f", "{text}"],
    "calibrate": ["-m", "{model}", "-f", "{text}"],
    "smooth": ["-m", "{model}", "--imatrix", "{imatrix}"],
    "quantize": ["-m", "{model}", "Q4_K_M"],
    "tune": ["{quant}", "-m", "{model}", "-f", "{text}"],
    "plan": ["-m", "{model}", "--like", "Q4_K_M"],
    "recipe export": ["{recipe}"],
    "recipe extract": ["{quant}"],
    "stats": ["{imatrix}"],
    "eval": ["-m", "{quant}"],
    "compare": ["{quant}", "--base", "{model}"],
    "bench": ["-m", "{quant}"],
    "tasks": ["hellaswag:{questions}"],
}
NO_OUTPUT = {"verify", "show", "push", "card", "run", "recipe show", "recipe check", "recipe diff"}
NO_OUTPUT |= {"doctor", "estimate", "texts list", "texts fetch"}


def leaves(command=application, name=""):
    context = click.Context(application)
    if not isinstance(command, click.Group):
        yield name.strip(), command
        return
    for child in command.list_commands(context):
        yield from leaves(command.get_command(context, child), f"{name} {child}")


COMMANDS = dict(leaves())
OUTPUTS = [
    (name, param) for name, command in COMMANDS.items() for param in command.params if type(param.type) is OutputPath
]


@pytest.fixture
def files(tiny_gguf, tiny_checkpoint, small_imatrix, small_quant, tmp_path):
    """A file of each kind, by the word for it."""
    places = {"model": "model.gguf", "imatrix": "imatrix.gguf", "quant": "quant.gguf"}
    for word, source in (("model", tiny_gguf), ("imatrix", small_imatrix), ("quant", small_quant)):
        shutil.copy(source, tmp_path / places[word])
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text('[tensors]\n"output.weight" = "q4_K"\n')
    (tmp_path / "questions.txt").write_text("It rains, so\n0\nhe is wet\nhe is dry\nhe is hot\nhe is old\n")
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    names = places | {
        "text": "text.txt",
        "recipe": "recipe.toml",
        "questions": "questions.txt",
        "checkpoint": "checkpoint",
    }
    return {word: tmp_path / name for word, name in names.items()}


@pytest.fixture(scope="session")
def small_quant(tiny_gguf, tmp_path_factory):
    from bitladder.quantize import quantize

    out = tmp_path_factory.mktemp("outputs") / "q.gguf"
    quantize(tiny_gguf, out, "Q8_0")
    return out


@pytest.fixture(scope="session")
def small_imatrix(tiny_gguf, tmp_path_factory):
    from bitladder.calibrate import collect_imatrix
    from bitladder.text import Reading, Text

    out = tmp_path_factory.mktemp("outputs") / "i.gguf"
    collect_imatrix(tiny_gguf, [Text.of("t", TEXT)], out, reading=Reading(chunks=1))
    return out


def test_every_command_obeys_the_rule():
    """A new command is a `Command`, and whatever it writes is an `OutputPath`."""
    for name, command in COMMANDS.items():
        assert isinstance(command, Command), f"{name} is no cli.outputs.Command"
        writes = {param.name for param in command.params if isinstance(param.type, OutputPath | OutputFolder)}
        for param in command.params:
            is_path = isinstance(param.type, click.Path)
            says = (getattr(param, "help", None) or "").lower()
            named = bool({"-o", "--output", "--out"} & set(param.opts)) or "write" in says.split(",")[0]
            assert not (is_path and named) or param.name in writes, f"{name} {param.opts} is no OutputPath"
        assert (name in NEEDS) == any(where == name for where, _ in OUTPUTS), f"{name} is missing in NEEDS"
        assert (name in NEEDS) != (name in NO_OUTPUT), name


def arguments(name, files):
    return [*name.split(), *(word.format(**files) for word in NEEDS[name])]


def inputs_of(name, files):
    """Each file that the command reads, but for what it may add to."""
    words = [word.strip("{}").split("{")[-1] for word in NEEDS[name] if "{" in word]
    return {word: files[word] for word in words if files[word].is_file()}


def spellings(path):
    """Other paths of a file."""
    hard, soft = path.with_name(f"hard-{path.name}"), path.with_name(f"soft-{path.name}")
    os.link(path, hard)
    soft.symlink_to(path)
    return [path, hard, soft, path.parent / "." / "checkpoint" / ".." / path.name]


@pytest.mark.parametrize(("name", "param"), OUTPUTS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_no_output_is_an_input(name, param, files, capsys):
    if name == "convert":
        weights = files["checkpoint"] / "model.safetensors"
        targets = [weights, files["checkpoint"] / "config.json"]
    else:
        assert inputs_of(name, files)
        targets = [spelling for path in inputs_of(name, files).values() for spelling in spellings(path)]
    before = {path: path.read_bytes() for path in targets}
    for path in targets:
        for force in ([], ["--force"]):
            code = invoke([*arguments(name, files), param.opts[-1], str(path), *force])
            assert code == 2 and "is an input" in capsys.readouterr().err, (name, path)
    assert {path: path.read_bytes() for path in targets} == before


@pytest.mark.parametrize(("name", "param"), OUTPUTS, ids=lambda value: value if isinstance(value, str) else value.name)
def test_no_output_overwrites_another_kind(name, param, files, capsys):
    other = files["text"].with_name("mine.html")
    other.write_bytes(b"what somebody wrote\x00")
    assert invoke([*arguments(name, files), param.opts[-1], str(other)]) == 2
    assert "--force" in capsys.readouterr().err
    assert other.read_bytes() == b"what somebody wrote\x00"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("quantize", "model"), ("tune", "imatrix"), ("imatrix", "model"), ("convert", "quant"), ("imatrix", "recipe")],
)
def test_kinds_of_gguf_are_told_apart(name, kind, files, tmp_path, capsys):
    copy = str(shutil.copy(files[kind], tmp_path / "other.gguf"))
    before = pathlib.Path(copy).read_bytes()
    assert invoke([*arguments(name, files), "-o", copy]) == 2
    assert "--force" in capsys.readouterr().err
    assert pathlib.Path(copy).read_bytes() == before


def test_the_same_kind_is_replaced_and_force_replaces_another(files, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    command = ["quantize", "-m", str(files["model"]), "-o", str(out), "Q8_0", "-q"]
    assert invoke(command) == 0
    first = out.read_bytes()
    assert invoke(command) == 0, capsys.readouterr().err
    out.write_text("another kind")
    assert invoke(command) == 2
    assert invoke([*command, "--force"]) == 0
    assert out.read_bytes() == first


def test_two_outputs_are_two_files(files, tmp_path, capsys):
    same = str(tmp_path / "same.gguf")
    assert invoke([*arguments("calibrate", files), "-o", same, "--imatrix", same]) == 2
    assert "the same file" in capsys.readouterr().err


def test_a_matrix_may_be_added_to_itself(files):
    from bitladder.calibrate import read_imatrix

    path = files["imatrix"]
    once = read_imatrix(path)
    assert invoke(["imatrix", "--in-file", str(path), "--in-file", str(path), "-o", str(path), "-q"]) == 0
    twice = read_imatrix(path)
    for name, entry in once.entries.items():
        assert (twice.entries[name].counts == 2 * entry.counts).all()


def test_a_shard_name_stands_for_its_model(files, tmp_path, capsys):
    """`-o X-00001-of-00003.gguf` writes X.gguf if there is one file."""
    out = files["model"].with_name("model-00001-of-00003.gguf")
    assert invoke(["quantize", "-m", str(files["model"]), "-o", str(out), "Q8_0"]) == 2
    assert "is an input" in capsys.readouterr().err


def test_outputs_that_a_command_names_itself(files, monkeypatch, tmp_path, capsys):
    """The defaults of smooth and convert are checked too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-smooth.gguf").write_text("somebody's")
    assert invoke(["smooth", "-m", str(files["model"]), "--imatrix", str(files["imatrix"])]) == 2
    assert "model-smooth.gguf" in capsys.readouterr().err
    (tmp_path / "x-smooth.gguf").unlink(missing_ok=True)
    (tmp_path / "model-smooth.gguf").unlink()
    command = ["smooth", "-m", str(files["model"]), "--imatrix", str(tmp_path / "model-smooth.imatrix.gguf")]
    shutil.copy(files["imatrix"], tmp_path / "model-smooth.imatrix.gguf")
    assert invoke(command) == 2
    assert "is an input" in capsys.readouterr().err


def test_a_run_does_not_read_what_it_writes(files, tmp_path, capsys):
    out = tmp_path / "ladder"
    out.mkdir()
    shutil.copy(files["text"], out / "README.md")
    assert invoke(["run", str(files["model"]), "--out", str(out), "--calibration", str(out / "README.md")]) == 2
    assert "is an input" in capsys.readouterr().err
