"""The public API, the command line's manners, and the walls between packages."""

import ast
import importlib
import pathlib
import subprocess
import sys
import types

import pytest

import bitladder
from bitladder.cli import VERBS, invoke

SOURCE = pathlib.Path(bitladder.__file__).parent

# Who may import whom: a package may use itself, the packages named here, and the modules beside them.
WALLS = {
    "engine": set(),
    "gguf": {"engine"},
    "hub": set(),
    "text": {"engine", "gguf", "hub"},
    "convert": {"engine", "gguf", "hub"},
    "recipe": {"engine", "gguf"},
    "rounding": {"engine"},
    "calibrate": {"engine", "gguf", "text"},
    "evaluate": {"engine", "gguf", "hub", "text"},
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
    "rundir": set(),
    "ladder": {
        "calibrate",
        "cluster",
        "compare",
        "convert",
        "engine",
        "evaluate",
        "exchange",
        "gguf",
        "hub",
        "plan",
        "quantize",
        "recipe",
        "refine",
        "rounding",
        "rundir",
        "text",
        "trial",
    },
    "report": {"calibrate", "engine", "evaluate", "gguf", "hub", "recipe", "rundir", "text"},
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
        "rundir",
        "trial",
    },
}
SHARED = {"doors", "errors", "files", "keys", "machines", "options", "progress", "units"}


# Imports that reach behind the door of another package, as (file, module): the reason. There are none: a door imports
# a name when it is first used, so nobody has to avoid one for what it loads.
BEHIND_A_DOOR: dict[tuple[str, str], str] = {}


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
            assert parts[0] not in {"dask", "distributed"}, f"{path} knows Dask; bitladder.cluster does"
            assert parts[0] != "fsspec", f"{path} knows fsspec; bitladder.exchange does"
            if parts[0] == "bitladder" and len(parts) > 1:
                assert parts[1] in WALLS[package] | SHARED | {package}, f"{path} imports {name}"


def test_other_packages_are_used_through_their_doors():
    doors = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    behind = set()
    for path in SOURCE.rglob("*.py"):
        own = path.relative_to(SOURCE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                if parts[0] == "bitladder" and len(parts) > 2 and parts[1] in doors - {own}:
                    behind.add((path.relative_to(SOURCE).as_posix(), node.module))
    assert behind == BEHIND_A_DOOR.keys(), "name it in the __init__ of its package, and import it from there"


@pytest.mark.parametrize("package", ["", *(path.parent.name for path in SOURCE.glob("*/__init__.py"))])
def test_doors_give_what_they_name(package):
    door = importlib.import_module(f"bitladder.{package}".rstrip("."))
    for name in getattr(door, "__all__", ()):
        assert name in dir(door)
        assert not isinstance(getattr(door, name), types.ModuleType), f"{package}: a module covers {name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = door.nothing


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


def test_classes_of_two_modules_have_two_names():
    names = [
        statement.name
        for path in SOURCE.rglob("*.py")
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, ast.ClassDef) and not statement.name.startswith("_")
    ]
    assert sorted(names) == sorted(set(names))


def test_a_long_list_of_parameters_has_a_reason_beside_it():
    """More than eight. Commands have one for each option; of compiled loops `rounding.kernels` says why."""
    without = []
    for path in SOURCE.rglob("*.py"):
        lines = path.read_text().splitlines()
        for function in (node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)):
            names = [each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]
            first = min([function, *function.decorator_list], key=lambda node: node.lineno).lineno - 1
            compiled = any(ast.unparse(each) in ("jit", "entry") for each in function.decorator_list)
            exempt = compiled or path.parent.name == "cli"
            if len(names) > 8 and not exempt and not lines[first - 1].strip().startswith("#"):
                without.append((path.name, function.name, names))
    assert not without


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert invoke([verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


# Every command shows its help though nothing heavy can be imported.
ALL_HELP = """
import sys
sys.modules.update(dict.fromkeys(("llama_cpp", "torch", "numba", "highspy", "transformers")))
from bitladder.cli import VERBS, invoke
sys.exit(any([invoke([*verb, "--help"]) for verb in ([], *([verb] for verb in VERBS))]))
"""


def test_help_loads_no_heavy_library():
    done = subprocess.run([sys.executable, "-c", ALL_HELP], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == 1 + len(VERBS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "-m", "absent.gguf", "-o", "x.gguf", "Q4_K_M"], 2, "absent.gguf"),
        (["imatrix", "-m", "absent.gguf", "-f", "absent.txt"], 2, "absent.gguf"),
        (["imatrix", "-f", "pydoc:test"], 2, "-m"),
        (["imatrix", "-o", "x.gguf"], 2, "--in-file"),
        (["run", "absent", "--out", "x"], 2, "absent"),
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
