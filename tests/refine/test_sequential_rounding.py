"""Rounding from block to block: later blocks make up for earlier ones, and the file can be derived again."""

import numpy as np
import pytest
from calibrated import calibrate

from bitladder.calibrate.gradients.forward import TorchModel
from bitladder.cli import invoke
from bitladder.engine.model import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import Settings, evaluate
from bitladder.gguf.reader import GgufFile
from bitladder.quantize import QuantizeOptions
from bitladder.refine.round import RefineOptions, Sequential, quantize_refined
from bitladder.refine.verify import verify
from bitladder.rounding import RoundingOptions
from bitladder.text.chunks import text_chunks
from bitladder.text.texts import Text, load_text

pytest.importorskip("torch")
PRESET = "Q3_K_S"


@pytest.fixture(scope="module")
def made(tiny_gguf, tmp_path_factory):
    """The embedded model rounded tensor by tensor ("plain"), and from block to block ("sequential")."""
    folder = calibrate(tiny_gguf, tmp_path_factory.mktemp("sequential"))
    order = Sequential((load_text("pydoc:calibration"),), chunks=12, blocks=1, n_ctx=256)
    for name, sequential in (("plain", None), ("sequential", order)):
        refine = RefineOptions(
            RoundingOptions(method="feedback"), settings=Settings(n_ctx=256, chunks=4), sequential=sequential
        )
        quantize_refined(
            tiny_gguf,
            folder / f"{name}.gguf",
            QuantizeOptions(PRESET),
            [folder / "moments.gguf"],
            refine,
            imatrix=folder / "imatrix.gguf",
        )
    return folder


def test_less_divergence_on_other_text(tiny_gguf, made):
    words = load_text("pydoc:test").text
    text = Text("the rest", words[len(words) // 2 :], "0" * 64)
    klds = [
        evaluate(
            made / f"{name}.gguf", text, Settings(n_ctx=256, chunks=8), base=tiny_gguf, base_file=made / "rest.base"
        ).kld.value
        for name in ("plain", "sequential")
    ]
    assert klds[1] < klds[0]


def test_what_the_last_block_puts_out_is_nearer(tiny_gguf, made):
    """Against torch's forward pass: hidden states behind the last block, on text that was not calibrated on."""
    with Model(tiny_gguf, vocab_only=True) as model:
        chunks = text_chunks(model, load_text("pydoc:test"), 256, chunks=8, spread=True).inputs()
    states = {}
    for name, path in (("full", tiny_gguf), *((one, made / f"{one}.gguf") for one in ("plain", "sequential"))):
        with TorchModel(path) as model:
            states[name] = np.stack([model.states(chunk).numpy() for chunk in chunks])
    errors = [np.square(states[one] - states["full"]).sum() for one in ("plain", "sequential")]
    assert errors[1] < errors[0]


def test_types_and_bytes_stay(made):
    with GgufFile(made / "plain.gguf") as plain, GgufFile(made / "sequential.gguf") as sequential:
        assert plain.tensor_bytes == sequential.tensor_bytes
        assert {n: t.type for n, t in plain.tensors.items()} == {n: t.type for n, t in sequential.tensors.items()}
        # Every block sees the embeddings, so nothing moves before they are rounded.
        name = "token_embd.weight"
        assert np.array_equal(plain.read(plain.tensors[name]), sequential.read(sequential.tensors[name]))


def test_verify_goes_from_block_to_block_too(tiny_gguf, made):
    known = {"imatrix": made / "imatrix.gguf", "moments": [made / "moments.gguf"]}
    found = verify(made / "sequential.gguf", tiny_gguf, sequential=[load_text("pydoc:calibration")], **known)
    assert not found.differing and "rounded" in found.ways.values()
    with pytest.raises(BitladderError, match="on other texts than those given by --sequential"):
        verify(made / "sequential.gguf", tiny_gguf, sequential=[load_text("pydoc:test")], **known)
    with pytest.raises(BitladderError, match="on other texts than those given by --sequential"):
        verify(made / "sequential.gguf", tiny_gguf, **known)
    with pytest.raises(BitladderError, match="leave out --sequential"):
        verify(made / "plain.gguf", tiny_gguf, sequential=[load_text("pydoc:calibration")], **known)


def test_command(tiny_gguf, made, tmp_path, capsys):
    out = tmp_path / "q.gguf"
    known = ["--imatrix", str(made / "imatrix.gguf"), "--moments", str(made / "moments.gguf")]
    arguments = ["quantize", "-m", str(tiny_gguf), "-o", str(out), PRESET, *known, "--sequential", "pydoc:calibration"]
    assert invoke([*arguments, "-q"]) == 2
    assert "--sequential belongs to --rounding feedback, descent or best" in capsys.readouterr().err
    rounding = ["--rounding", "feedback", "--guard", "none", "--sequential-chunks", "2", "--sequential-blocks", "2"]
    assert invoke([*arguments, *rounding, "-q"]) == 0
    verifying = ["verify", str(out), "-m", str(tiny_gguf), *known, "-q"]
    assert invoke([*verifying, "--sequential", "pydoc:calibration"]) == 0
    out.unlink()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert invoke([*arguments, *rounding, "--sequential", str(short), "-q"]) == 1
    assert "short.txt has" in capsys.readouterr().err and not out.exists()
    refine = RefineOptions(sequential=Sequential((load_text("pydoc:calibration"),)))
    options = QuantizeOptions(PRESET, prune_layers=(1,))
    with pytest.raises(UsageError, match="prune layers first"):
        quantize_refined(tiny_gguf, out, options, [made / "moments.gguf"], refine)
