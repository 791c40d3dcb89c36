"""Nothing is unpickled or evaluated, and texts of others are no templates: by the source, call by call."""

import ast
import pathlib

import pytest
import yaml

import bitladder
from bitladder.convert import model_metadata

SOURCE = pathlib.Path(bitladder.__file__).parent
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "code", "codeop", "runpy", "xmlrpc"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "read_pickle", "from_pickle"}
SAFE_LOADERS = {"_Texts": model_metadata._Texts, "yaml.SafeLoader": yaml.SafeLoader}


def faults(tree):
    """What a source does that it must not, as (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in MODULES:
                    yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CALLS or called.rpartition(".")[2] in {"read_pickle", "from_pickle"}:
            yield node.lineno, f"calls {called}"
        if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
            yield node.lineno, "np.load may unpickle"
        if "allow_pickle" in options and options["allow_pickle"] != "False":
            yield node.lineno, f"{called} may unpickle"
        if called == "yaml.load" and not issubclass(SAFE_LOADERS.get(options.get("Loader"), object), yaml.SafeLoader):
            yield node.lineno, "yaml.load with another loader"
        if options.get("shell", "False") != "False":
            yield node.lineno, f"{called} runs a shell"
        # Templates of the package are trusted. Those of others need the sandbox.
        if (
            called.endswith("Environment")
            and "Sandboxed" not in called
            and "PackageLoader" not in options.get("loader", "")
        ):
            yield node.lineno, f"{called} without the package's own templates"
        if called.endswith(("jinja2.Template", "NativeEnvironment")):
            yield node.lineno, f"{called} is no sandbox"


@pytest.mark.parametrize("package", sorted({path.relative_to(SOURCE).parts[0] for path in SOURCE.rglob("*.py")}))
def test_nothing_is_unpickled_or_evaluated(package):
    paths = [SOURCE / package] if package.endswith(".py") else sorted((SOURCE / package).rglob("*.py"))
    assert paths
    wrong = [(path.name, *fault) for path in paths for fault in faults(ast.parse(path.read_text()))]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "eval('1')", "exec(x)", "np.load(path)", "torch.load(p)"),
        *("np.load(path, allow_pickle=True)", "yaml.load(text, Loader=yaml.Loader)", "yaml.load(text, yaml.Loader)"),
        *("subprocess.run(x, shell=True)", "jinja2.Environment(loader=jinja2.FileSystemLoader('.'))", "os.system(x)"),
    ],
)
def test_each_of_these_is_noticed(source):
    assert list(faults(ast.parse(source)))
