"""What cannot succeed is refused before any work: texts that are too short for some step, and checkpoints."""

import json
import shutil
import sys

import pytest
from plain_options import plain_options

from bitladder.engine import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.ladder import run
from bitladder.ladder.checks import check_texts
from bitladder.ladder.plan import steps_of
from bitladder.ladder.steps.step import TextsOfRun
from bitladder.rundir import load_manifest
from bitladder.text import Text

N_CTX = 64
WORD = " language"  # of nine bytes and few tokens: a text of such words has enough bytes and not enough tokens


def words(count):
    return Text.of(f"{count}-words.txt", WORD * count)


@pytest.fixture(scope="module")
def tokens(tiny_gguf):
    with Model(tiny_gguf, vocab_only=True) as model:
        yield lambda text: len(model.tokenize(text.text))


def test_a_short_text_is_refused_before_the_directory_of_the_run_is_made(tiny_gguf, tokens, tmp_path):
    short, long = words(2 * N_CTX // 5), words(1000)
    assert tokens(short) < 2 * N_CTX <= len(short.text)
    for text in (short, long):
        (tmp_path / text.name).write_text(text.text)
    for flag, field in (("--text", "texts"), ("--calibration", "calibration")):
        names = {"texts": (long.name,), "calibration": (long.name,)} | {field: (long.name, short.name)}
        paths = {key: tuple(str(tmp_path / name) for name in used) for key, used in names.items()}
        options = plain_options(model=str(tiny_gguf), out=tmp_path / "out", rungs=("Q8_0",), n_ctx=N_CTX, **paths)
        with pytest.raises(
            UsageError, match=f"{flag} {short.name} has {tokens(short):,} tokens; .* needs {2 * N_CTX:,}"
        ):
            run(options)
        assert not options.out.exists()


def test_of_a_checkpoint_the_text_is_refused_when_it_is_converted(tiny_checkpoint, tokens, tmp_path):
    if not any(tiny_checkpoint.glob("*.safetensors")):
        pytest.skip("the embedded model is not there")
    short = words(2 * N_CTX // 5)
    (tmp_path / short.name).write_text(short.text)
    options = plain_options(
        model=str(tiny_checkpoint),
        out=tmp_path / "out",
        rungs=("Q8_0",),
        n_ctx=N_CTX,
        texts=(str(tmp_path / short.name),),
    )
    with pytest.raises(UsageError, match=f"--text {short.name} has"):
        run(options)
    assert list(load_manifest(options.out).steps) == ["convert"]


@pytest.mark.parametrize(
    ("changes", "needed", "step"),
    [
        ({}, 2 * N_CTX, "imatrix"),
        # Recipes are measured in chunks of their own length.
        ({"mode": "quality"}, 2 * 128, "price original IQ4_XS-Q8_0"),
        (
            {"method": "best", "tune_chunks": 64, "held_out_share": 0.1},
            10 * N_CTX,
            "quantize Q8_0",
        ),  # the end of the text, in chunks of half the length
    ],
)
def test_each_step_says_which_texts_it_cuts(changes, needed, step, tiny_gguf, tokens):
    pytest.importorskip("torch")
    steps = steps_of(plain_options(rungs=("Q8_0",), n_ctx=N_CTX, **changes))
    enough, long = needed, words(10_000)
    while tokens(words(enough)) > needed:
        enough -= 1
    check_texts(steps, TextsOfRun([long], [words(enough + needed // 8)], tiny_gguf))
    with pytest.raises(UsageError, match=f"the step {step} needs"):
        check_texts(steps, TextsOfRun([long], [words(enough - needed // 8)], tiny_gguf))


def copied(checkpoint, folder, **changes):
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        # Python code of its own, which llama.cpp's converter may run
        ({"architectures": ["OwnForCausalLM"], "model_type": "own"}, "modeling_own.py", "--trust-remote-code"),
        ({"quantization_config": {"quant_method": "quip"}}, None, "quantization_config"),
        ({"hidden_size": 128}, None, "should be"),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_refused_before_anything_is_measured(
    changes, code, message, tiny_checkpoint, tmp_path, monkeypatch
):
    if not any(tiny_checkpoint.glob("*.safetensors")):
        pytest.skip("the weights of examples/tiny-olmo2 are not there")
    monkeypatch.setattr(sys.modules["bitladder.ladder.run"], "expect", lambda *_: pytest.fail("the run is estimated"))
    folder = copied(tiny_checkpoint, tmp_path / "model", **changes)
    if code is not None:
        (folder / code).write_text("raise SystemExit")
    options = plain_options(model=str(folder), out=tmp_path / "out", rungs=("Q8_0",), n_ctx=N_CTX)
    with pytest.raises(BitladderError, match=message):
        run(options)
    assert not options.out.exists()
