"""What the tests share: the embedded model, its GGUF, and llama.cpp's own tools where they are."""

import os
import pathlib

import pytest
from llama_cpp_tools import Tools

ROOT = pathlib.Path(__file__).parents[1]
# Tables follow the width of a terminal. pytest-xdist sets one for its workers.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)
# Two processes test side by side. Threads that spin while they wait would take the other's processors: three times the
# time for tuning. It is read when torch or the library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Folders of the tests that take longest. Processes share files in this order, so that none has a long one at the end.
LONGEST = ("ladder", "refine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `LONGEST` come first."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> pathlib.Path:
    """The embedded OLMo-2 model as a Hugging Face directory (BF16, 4,096 tokens)."""
    return ROOT / "examples" / "tiny-olmo2"


@pytest.fixture(scope="session")
def tiny_gguf(tiny_checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The embedded model as an F16 GGUF."""
    from bitladder.convert import convert

    out = tmp_path_factory.mktemp("tiny") / "tiny-f16.gguf"
    convert(tiny_checkpoint, out, outtype="f16")
    return out


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Skips where LLAMA_CPP_TOOLS does not name a folder with llama-quantize and its like."""
    folder = os.environ.get("LLAMA_CPP_TOOLS")
    if not folder:
        pytest.skip("LLAMA_CPP_TOOLS is not set: llama.cpp's own tools are not compared with")
    return Tools(pathlib.Path(folder))


@pytest.fixture(scope="session")
def report_run(
    tiny_gguf: pathlib.Path, calibration_text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A run directory with everything that a report can show. Not to be changed."""
    from report_runs import full_run

    return full_run(tiny_gguf, calibration_text, tmp_path_factory.mktemp("run") / "ladder")


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The built-in calibration text as a file, cut to some 12,000 tokens."""
    from bitladder.text import builtin_text

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(builtin_text("calibration")[:40_000])
    return path


@pytest.fixture(scope="session")
def small_run(tiny_checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run of the embedded model: Q4_K_M and Q8_0, measured on eight chunks. Not to be changed."""
    from plain_options import plain_options

    from bitladder.ladder import run
    from bitladder.report import write_card

    folder = tmp_path_factory.mktemp("run") / "tiny-ladder"
    options = {
        "rungs": ("Q4_K_M", "Q8_0"),
        "chunks": 8,
        "imatrix_chunks": 4,
        "n_ctx": 128,
        "bench": False,
        "threads": 1,
        "repo": "someone/Tiny-GGUF",
    }
    run(plain_options(model=str(tiny_checkpoint), out=folder, **options))
    write_card(folder)
    return folder


@pytest.fixture(autouse=True)
def no_download_of_the_converter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not download llama.cpp's own converter, to which unknown architectures go."""
    from bitladder.convert import upstream
    from bitladder.errors import BitladderError

    def refuse(*_: object, **__: object) -> None:
        raise BitladderError("llama.cpp's converter is not downloaded by tests")

    if request.path.name != "test_upstream.py":
        monkeypatch.setattr(upstream, "converter_source", refuse)
