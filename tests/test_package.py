"""The public API, the command line's manners, and the walls between packages."""

import ast
import pathlib
import subprocess
import sys

import pytest

import bitladder
from bitladder.cli import VERBS, invoke

SOURCE = pathlib.Path(bitladder.__file__).parent

# Who may import whom: a package may use itself, the packages named here, and the modules beside them.
WALLS = {
    "engine": set(),
    "gguf": {"engine"},
    "hub": set(),
    "text": {"engine"},
    "convert": {"hub"},
    "recipe": {"engine", "gguf"},
    "rounding": {"engine"},
    "calibrate": {"engine", "gguf", "text"},
    "evaluate": {"engine", "gguf", "text"},
    "compare": {"engine", "evaluate", "gguf", "hub", "text"},
    "quantize": {"calibrate", "engine", "gguf", "recipe"},
    "trial": {"engine", "evaluate", "gguf", "text"},
    "refine": {"calibrate", "engine", "evaluate", "gguf", "quantize", "rounding", "text", "trial"},
    "plan": {
        "calibrate",
        "engine",
        "evaluate",
        "gguf",
        "quantize",
        "recipe",
        "refine",
        "rounding",
        "text",
        "trial",
    },
    "ladder": {
        "calibrate",
        "compare",
        "convert",
        "engine",
        "evaluate",
        "gguf",
        "hub",
        "plan",
        "quantize",
        "recipe",
        "refine",
        "rounding",
        "text",
        "trial",
    },
    "report": {"calibrate", "engine", "evaluate", "gguf", "hub", "ladder", "recipe"},
    "show": {
        "calibrate",
        "compare",
        "engine",
        "evaluate",
        "gguf",
        "ladder",
        "plan",
        "quantize",
        "recipe",
        "refine",
        "report",
        "trial",
    },
}
SHARED = {"closing", "errors", "files", "keys", "options", "progress", "underflow", "units"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", WALLS)
def test_walls(package):
    files = list((SOURCE / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "llama_cpp" or package == "engine", f"{path} opens its own door to native code"
            if parts[0] == "bitladder" and len(parts) > 1:
                assert parts[1] in WALLS[package] | SHARED | {package}, f"{path} imports {name}"


@pytest.mark.parametrize("package", WALLS)
def test_nothing_below_the_command_line_prints_or_exits(package):
    for path in (SOURCE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "exit", "quit"}, f"{path}:{node.lineno}"


def test_every_public_name_is_there_and_stays_itself():
    for _ in range(2):  # a second look must not find a submodule of the same name
        for name in bitladder.__all__:
            value = getattr(bitladder, name)
            assert callable(value), name
    with pytest.raises(AttributeError, match="nothing"):
        bitladder.nothing  # noqa: B018


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert invoke([verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_help_does_not_load_the_native_library():
    code = "import sys; from bitladder.cli import invoke; invoke(['--help']); sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "-m", "absent.gguf", "-o", "x.gguf", "Q4_K_M"], 1, "absent.gguf"),
        (["imatrix", "-m", "absent.gguf", "-f", "absent.txt"], 1, "absent.txt"),
        (["imatrix", "-f", "pydoc:test"], 2, "-m"),
        (["imatrix", "-o", "x.gguf"], 1, "--in-file"),
        (["run", "absent", "--out", "x"], 1, "absent"),
        (["run", ".", "--out", "x"], 1, "config.json"),
        (["quantize"], 2, "Missing"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors_are_one_line_and_a_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not list(tmp_path.iterdir())
