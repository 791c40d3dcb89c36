"""Activations that overflow F16 are named as such, with the way out, by every command that decodes."""

import json

import numpy as np
import pytest
from rewritten import rewritten

from bitladder.cli import invoke
from bitladder.engine import sequence_logits

TEXT = "A sentence that is a text to calibrate on and to measure with, and another one.\n" * 40
SMALL = ["-c", "64"]


def large_in(block, factor):
    """Weights of a block's FFN whose inner activations are larger by a factor: F32 holds them, F16 does not."""

    def edit(name, values):
        if name in (f"blk.{block}.ffn_gate.weight", f"blk.{block}.ffn_up.weight"):
            return values * np.float32(factor)
        return values * np.float32(1 / factor) if name == f"blk.{block}.ffn_down.weight" else values

    return edit


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    from bitladder.gguf import GgufFile

    made = tmp_path_factory.mktemp("overflow")
    with GgufFile(tiny_gguf) as file:
        last = file.get("olmo2.block_count") - 1
    for word, block in (("first", 0), ("last", last)):
        for label, kind in (("f16", np.float16), ("f32", np.float32)):
            rewritten(tiny_gguf, made / f"{word}-{label}.gguf", large_in(block, 1e3), kind)
    (made / "t.txt").write_text(TEXT)
    assert (
        invoke(["imatrix", "-m", str(tiny_gguf), "-f", str(made / "t.txt"), *SMALL, "-o", str(made / "i.gguf"), "-q"])
        == 0
    )
    return made


def test_the_reference_holds(folder):
    """In F32 the models are sound, so that the advice is right."""
    tokens = np.arange(32, dtype=np.int32)
    for word in ("first", "last"):
        assert np.isfinite(sequence_logits(folder / f"{word}-f32.gguf", tokens, threads=1)).all()


COMMANDS = {
    "eval": ["eval", "-m", "{model}", "-f", "{text}", *SMALL, "--chunks", "2", "--no-cache"],
    "base": ["eval", "-m", "{model}", "--base", "{model}", "-f", "{text}", *SMALL, "--chunks", "2", "--no-cache"],
    "logits": ["eval", "-m", "{model}", "--kl-divergence-base", "{out}", "-f", "{text}", *SMALL, "--no-cache"],
    "tasks": ["eval", "-m", "{model}", "--tasks", "continuation:{text}", "--task-count", "2", "--no-cache"],
    "imatrix": ["imatrix", "-m", "{model}", "-f", "{text}", *SMALL, "-o", "{out}"],
    "positions": ["calibrate", "-m", "{model}", "-f", "{text}", *SMALL, "--weighting", "positions", "-o", "{out}"],
    "tokens": ["calibrate", "-m", "{model}", "-f", "{text}", *SMALL, "--weighting", "tokens", "-o", "{out}"],
    "gradients": ["calibrate", "-m", "{model}", "-f", "{text}", *SMALL, "--weighting", "gradients", "-o", "{out}"],
    "smooth": ["smooth", "-m", "{model}", "--imatrix", "{imatrix}", "-o", "{out}"],
    "plan": ["plan", "-m", "{model}", "--like", "Q4_K_M", "-f", "{text}", *SMALL, "--work", "{out}.d", "-o", "{out}"],
    "prune": ["plan", "-m", "{model}", "--suggest-prune", "-f", "{text}", *SMALL, "--chunks", "2"],
    "compare": ["compare", "{model}", "--base", "{model}", "-f", "{text}", *SMALL, "--no-cache"],
    "bench": ["bench", "-m", "{model}", "-p", "8", "-n", "1", "-r", "1"],
}


@pytest.mark.parametrize("word", ["first", "last"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_way_out(command, word, folder, tmp_path, capsys):
    if command == "gradients":
        pytest.importorskip("torch")
    places = {"model": folder / f"{word}-f16.gguf", "text": folder / "t.txt", "out": tmp_path / "out"}
    places["imatrix"] = folder / "i.gguf"
    before = set(folder.iterdir())
    arguments = [argument.format(**places) for argument in COMMANDS[command]]
    assert invoke([*arguments, "-q", *(["-t", "1"] if command != "smooth" else [])]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "--outtype bf16" in lines[0], lines
    assert not places["out"].exists() and set(folder.iterdir()) == before


def test_a_noise_floor_that_cannot_be_had_is_left_out(tiny_gguf, folder, tmp_path, capsys):
    """Inputs that no block of Q8_0 holds: the evaluation has its figures, and says what is missing."""
    models = []
    for label, kind in (("full", np.float32), ("model", np.float32)):
        models.append(rewritten(tiny_gguf, tmp_path / f"{label}.gguf", large_in(0, 3e4), kind))
    command = [
        "eval",
        "-m",
        str(models[1]),
        "--base",
        str(models[0]),
        "-f",
        str(folder / "t.txt"),
        *SMALL,
        "--chunks",
        "2",
    ]
    assert invoke([*command, "--no-cache", "--json", "-t", "1"]) == 0
    shown = capsys.readouterr()
    scores = json.loads(shown.out)
    assert scores["kld"]["value"] < 1e-3
    assert scores["noise"]["batch"]["value"] >= 0
    assert "activations" not in scores["noise"] or scores["noise"]["activations"] is None
    assert "blk.0.ffn_down.weight" in scores["noise"]["left_out"] and "warning: the noise floor" in shown.err


def test_no_divergence_from_a_base_that_predicts_nothing(tiny_gguf, folder, tmp_path, capsys):
    flat = rewritten(tiny_gguf, tmp_path / "flat.gguf", lambda name, x: x * 0 if name == "output_norm.weight" else x)
    common = ["-f", str(folder / "t.txt"), *SMALL, "--chunks", "2", "--no-cache", "-q", "-t", "1"]
    assert invoke(["eval", "-m", str(tiny_gguf), "--base", str(flat), *common]) == 1
    assert "flat.gguf predicts every token alike" in capsys.readouterr().err
    for base in ([], ["--base", str(tiny_gguf)]):  # nor are there figures of such a model
        assert invoke(["eval", "-m", str(flat), *base, *common]) == 1
        assert "flat.gguf predicts every token alike" in capsys.readouterr().err
    logits = str(tmp_path / "flat.logits")
    assert invoke(["eval", "-m", str(flat), "--kl-divergence-base", logits, *common]) == 0
    assert invoke(["eval", "-m", str(tiny_gguf), "--kl-divergence", "--kl-divergence-base", logits, *common]) == 1
    assert "predicts every token alike" in capsys.readouterr().err


def test_a_noise_floor_on_a_gpu_has_what_it_can_have(tiny_gguf, folder, tmp_path, capsys, monkeypatch):
    from bitladder.engine.native import ggml

    monkeypatch.setattr(ggml, "ggml_backend_buffer_is_host", lambda _buffer: False)
    command = ["eval", "-m", str(tiny_gguf), "--base", str(tiny_gguf), "--base-file", str(tmp_path / "b"), *SMALL]
    assert invoke([*command, "-f", str(folder / "t.txt"), "--chunks", "1", "--no-cache", "--json", "-t", "1"]) == 0
    noise = json.loads(capsys.readouterr().out)["noise"]
    assert noise["batch"]["value"] >= 0
    assert "on a GPU" in noise["left_out"]
