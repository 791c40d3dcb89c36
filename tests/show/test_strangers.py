"""Nothing that a stranger wrote moves the cursor; a closed or full output and odd file names are no traceback."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from bitladder.cli import invoke
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, string
from bitladder.show import Output
from bitladder.show.output import printable

EVIL = "Evil\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202eeman <script>alert(1)</script> [click](http://x) ![i](http://y)"


def obeyed(text):
    """Characters that a terminal would obey."""
    return [letter for letter in text if (ord(letter) < 32 and letter not in "\n\t") or 127 <= ord(letter) < 160]


@pytest.fixture
def evil_gguf(tiny_gguf, tmp_path):
    """The embedded model under a name that a stranger chose."""
    path = tmp_path / "evil.gguf"
    with GgufFile(tiny_gguf) as file, path.open("wb") as stream:
        metadata = file.metadata | {"general.name": string(EVIL), "general.basename": string(EVIL)}
        plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
        writer = GgufWriter(stream, metadata, plans)
        for name, tensor in file.tensors.items():
            writer.write(name, file.read(tensor))
        writer.finish()
    return path


def test_printing_obeys_nobody(capsys, monkeypatch):
    from rich.table import Table

    output = Output()
    table = Table("name")
    table.add_row(EVIL)
    output.print(table)
    output.line(EVIL)
    output.print_json({"name": EVIL})
    output.remark(EVIL)
    output.progress.info(EVIL)
    output.progress.warn(EVIL)
    with output.progress.task(EVIL, 1) as bar:
        bar.note(EVIL)
        bar.advance()
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err)
    assert "\u202e" not in shown.out + shown.err
    assert json.loads(shown.out[shown.out.index("{") :]) == {"name": EVIL}
    assert printable("é 中 ✓\tx\n") == "é 中 ✓\tx\n"


def test_bars_on_a_terminal_obey_nobody(monkeypatch):
    from rich.console import Console

    output = Output()
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=200)
    bars = type(output.progress)(console, False)
    with bars.held(lambda: EVIL), bars.task(EVIL, 2) as bar:
        bar.note(EVIL)
        bar.advance()
    text = stream.getvalue()
    assert "Evil" in text and "\x1b[2J" not in text and "\x07" not in text and "\x9b" not in text


@pytest.mark.parametrize(
    "arguments",
    [["recipe", "show", "{}"], ["recipe", "show", "{}", "--json"], ["recipe", "extract", "{}"], ["stats", "{}"]],
)
def test_names_in_files(arguments, evil_gguf, capsys):
    invoke([word.format(evil_gguf) for word in arguments])
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err) and "owned" not in shown.err


@pytest.mark.parametrize(
    "arguments", [["eval", "-m", EVIL], ["convert", EVIL], ["recipe", "show", EVIL], [EVIL], ["stats", EVIL]]
)
def test_errors_are_one_printable_line(arguments, capsys):
    assert invoke(arguments) != 0
    error = capsys.readouterr().err
    assert not obeyed(error) and "Traceback" not in error


def run(arguments, **more):
    source = pathlib.Path(__file__).parents[2] / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "bitladder", *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False, **more)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--help"], ["recipe", "show", "{}"], ["recipe", "show", "{}", "--json"]])
def test_a_full_output(arguments, tiny_gguf):
    with open("/dev/full", "w") as full:
        done = run([word.format(tiny_gguf) for word in arguments], stdout=full)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "No space left" in lines[0], lines


@pytest.mark.parametrize("arguments", [["--help"], ["recipe", "show", "{}", "--json"]])
def test_a_reader_that_went_away(arguments, tiny_gguf):
    reading, writing = os.pipe()
    os.close(reading)
    done = run([word.format(tiny_gguf) for word in arguments], stdout=writing)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_no_output_at_all(tiny_gguf):
    shell = f"exec {sys.executable} -m bitladder recipe show {tiny_gguf} --json >&-"
    source = str(pathlib.Path(__file__).parents[2] / "src")
    done = subprocess.run(
        ["sh", "-c", shell], env=os.environ | {"PYTHONPATH": source}, stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8(tiny_gguf, tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\x1b[31m.gguf")
    shutil.copy(tiny_gguf, name)
    for arguments in (
        ["recipe", "show", name],
        ["recipe", "show", name, "--json"],
        ["recipe", "extract", name, "-o", str(tmp_path / "r.toml")],
        ["quantize", "-m", name, "-o", f"{name}.q8", "Q8_0", "-t", "1"],
        ["quantize", "-m", name, "-o", f"{name}.q8", "Q8_0", "-t", "1", "--json"],
        ["bench", "-m", name, "-p", "4", "-n", "0", "-r", "1", "-o", str(tmp_path / "b.csv")],
    ):
        assert invoke(arguments) == 0, capsys.readouterr().err
        shown = capsys.readouterr()
        assert not obeyed(shown.out + shown.err)
    assert invoke(["recipe", "show", str(tmp_path / "r.toml")]) == 0
