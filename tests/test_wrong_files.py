"""A file of the wrong kind, wherever one is named: one line that says what it is, nothing written."""

import pytest

from bitladder.calibrate import Imatrix, ImatrixEntry, write_imatrix
from bitladder.cli import invoke

TEXT = "A sentence that is a text to calibrate on and to measure with, and another one.\n" * 40
MODELS = {
    "imatrix": ["imatrix", "-m", "{file}", "-f", "{text}", "-c", "64", "-o", "{out}"],
    "calibrate": ["calibrate", "-m", "{file}", "-f", "{text}", "-c", "64", "-o", "{out}"],
    "smooth": ["smooth", "-m", "{file}", "--imatrix", "{imatrix}", "-o", "{out}"],
    "quantize": ["quantize", "-m", "{file}", "Q4_0", "-o", "{out}"],
    "plan": ["plan", "-m", "{file}", "--like", "Q4_K_M", "-f", "{text}", "-o", "{out}"],
    "prune": ["plan", "-m", "{file}", "--suggest-prune", "-f", "{text}"],
    "tune": ["tune", "{model}", "-m", "{file}", "-f", "{text}", "-o", "{out}"],
    "eval": ["eval", "-m", "{file}", "-f", "{text}", "-c", "64", "--no-cache"],
    "base": ["eval", "-m", "{model}", "--base", "{file}", "-f", "{text}", "-c", "64", "--no-cache"],
    "compare": ["compare", "{file}", "--base", "{model}", "-f", "{text}", "-c", "64", "--no-cache"],
    "compare base": ["compare", "{model}", "--base", "{file}", "-f", "{text}", "-c", "64", "--no-cache"],
    "bench": ["bench", "-m", "{file}", "-p", "4", "-n", "1"],
    "verify": ["verify", "{file}", "-m", "{model}"],
    "stats": ["stats", "{imatrix}", "-m", "{file}"],
    "recipe extract": ["recipe", "extract", "{file}", "-o", "{out}"],
    "recipe export": ["recipe", "export", "{recipe}", "-m", "{file}", "-o", "{out}"],
    "recipe check": ["recipe", "check", "{recipe}", "-m", "{file}"],
    "run": ["run", "{file}", "--out", "{out}"],
}
MATRICES = {
    "imatrix": ["imatrix", "--in-file", "{file}", "-o", "{out}"],
    "smooth": ["smooth", "-m", "{model}", "--imatrix", "{file}", "-o", "{out}"],
    "quantize": ["quantize", "-m", "{model}", "--imatrix", "{file}", "Q4_0", "-o", "{out}"],
    "plan": ["plan", "-m", "{model}", "--imatrix", "{file}", "--like", "Q4_K_M", "-f", "{text}", "-o", "{out}"],
    "stats": ["stats", "{file}"],
    "verify": ["verify", "{model}", "-m", "{model}", "--imatrix", "{file}"],
}


@pytest.fixture
def files(tiny_gguf, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    (tmp_path / "r.toml").write_text('[tensors]\n"output.weight" = "q4_K"\n')
    entry = {"blk.0.attn_q.weight": ImatrixEntry([[1.0] * 256], [100])}
    write_imatrix(_matrix(entry), tmp_path / "i.gguf")
    (tmp_path / "folder").mkdir()
    names = {"text": "t.txt", "recipe": "r.toml", "imatrix": "i.gguf", "folder": "folder", "out": "out"}
    return {word: tmp_path / name for word, name in names.items()} | {"model": tiny_gguf}


def _matrix(entries):
    import numpy as np

    built = {name: ImatrixEntry(np.array(entry.sums), np.array(entry.counts)) for name, entry in entries.items()}
    return Imatrix(built, ["t"], 1, 512)


@pytest.mark.parametrize(
    ("kind", "says"), [("imatrix", "an importance matrix"), ("text", "not a GGUF"), ("folder", "directory")]
)
@pytest.mark.parametrize("command", MODELS)
def test_a_model_is_needed(command, kind, says, files, capsys):
    if command == "run" and kind == "folder":
        says = "config.json"  # a checkpoint is what a directory should be
    check(MODELS[command], kind, says, files, capsys)


@pytest.mark.parametrize(("kind", "says"), [("model", "a model (olmo2)"), ("text", "imatrix"), ("folder", "imatrix")])
@pytest.mark.parametrize("command", MATRICES)
def test_an_imatrix_is_needed(command, kind, says, files, capsys):
    check(MATRICES[command], kind, says, files, capsys)


def check(arguments, kind, says, files, capsys):
    places = files | {"file": files[kind]}
    assert invoke([argument.format(**places) for argument in arguments] + ["-q"]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    shown = [line for line in lines if not line.startswith(("Usage:", "Try "))]
    assert len([line for line in shown if line.strip()]) == 1 and says in shown[-1], lines
    assert not files["out"].exists()


def test_matrices_of_two_models_are_not_merged(files, tmp_path, capsys):
    other = tmp_path / "other.gguf"
    write_imatrix(_matrix({"blk.7.attn_q.weight": ImatrixEntry([[1.0] * 256], [100])}), other)
    assert (
        invoke(["imatrix", "--in-file", str(files["imatrix"]), "--in-file", str(other), "-o", str(files["out"])]) == 1
    )
    assert "two models" in capsys.readouterr().err
    assert not files["out"].exists()
