"""Bad input: one line that names it, and never half a file."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from moe import write_moe
from quantize_reference import make_imatrix, make_model

from bitladder.calibrate import read_imatrix, write_imatrix
from bitladder.cli import invoke
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile
from bitladder.quantize import QuantizeOptions, quantize


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def imatrix(model):
    return make_imatrix(model, model.parent / "imatrix.gguf")


def refused(model, tmp_path, match, options="Q4_K_M", kind=BitladderError, **more):
    """Assert that quantizing fails with one line, and leaves nothing."""
    out = tmp_path / "out" / "q.gguf"
    out.parent.mkdir()
    with pytest.raises(kind, match=match) as caught:
        quantize(model, out, options, **more)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.iterdir())


def spoiled(model, out, name, index, value):
    """A copy with one weight replaced."""
    data = bytearray(model.read_bytes())
    with GgufFile(model) as file:
        tensor = file.tensors[name]
        kind = {"f16": np.float16, "f32": np.float32}[tensor.type.name]
        place = file.data_start + tensor.offset + np.dtype(kind).itemsize * index
    data[place : place + np.dtype(kind).itemsize] = kind(value).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["blk.2.attn_q.weight", "blk.2.attn_norm.weight"])
@pytest.mark.parametrize("preset", ["Q4_K_M", "F32", "COPY"])
def test_weights_that_are_not_finite_are_named(name, value, preset, model, tmp_path):
    bad = spoiled(model, tmp_path / "bad.gguf", name, 133, value)
    refused(bad, tmp_path, rf"{name} has the weight {value} at index 133", preset)


def test_an_output_that_exists_is_replaced_in_one_step(model, tmp_path):
    out = tmp_path / "q.gguf"
    out.write_text("old")
    bad = spoiled(model, tmp_path / "bad.gguf", "output.weight", 5, np.nan)
    with pytest.raises(BitladderError):
        quantize(bad, out, "Q8_0")
    assert out.read_text() == "old"
    quantize(model, out, "Q8_0")
    with GgufFile(out) as file:
        assert file.tensors["output.weight"].type.name == "q8_0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "q.gguf"]


def test_an_output_that_cannot_be(model, tmp_path):
    with pytest.raises(BitladderError, match="is a directory"):
        quantize(model, tmp_path, "Q8_0")
    with pytest.raises(BitladderError, match="is an input"):
        quantize(model, model, "COPY")
    (tmp_path / "link.gguf").symlink_to(model)
    with pytest.raises(BitladderError, match="is an input"):
        quantize(model, tmp_path / "link.gguf", "Q8_0")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitladderError, match="cannot write"):
        quantize(model, tmp_path / "file" / "q.gguf", "Q8_0")


def run(arguments, limit=""):
    code = f"import sys; {limit}; from bitladder.cli import main; main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, "quantize", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_leaves_nothing(model, tmp_path):
    pytest.importorskip("resource")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    done = run(["-q", "-m", model, "-o", tmp_path / "q.gguf", "Q8_0"], limit)
    _, message = done.communicate(timeout=120)
    assert done.returncode == 1 and "Traceback" not in message
    assert f"cannot write {tmp_path / 'q.gguf'}" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path):
    # A slow type, one thread and some 10 million weights: many seconds, of which the first few are enough.
    big = make_model(tmp_path, hidden_size=1024, intermediate_size=1024, num_attention_heads=8, num_hidden_layers=2)
    out = tmp_path / "out" / "q.gguf"
    out.parent.mkdir()
    arguments = ["-q", "-m", big, "-o", out, "-t", "1", "--tensor-type", ".*=iq3_s", "IQ3_S"]
    process = run(arguments, "signal = __import__('signal'); signal.signal(signal.SIGINT, signal.default_int_handler)")
    end = time.monotonic() + 100
    while not any(path.stat().st_size > 10_000 for path in out.parent.iterdir()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=100)
    assert process.returncode == 130 and "Interrupted" in message and "Traceback" not in message
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (QuantizeOptions(), "name a preset"),
        (QuantizeOptions("Q9_K"), "unknown preset 'Q9_K'"),
        (QuantizeOptions("NVFP4"), "cannot quantize"),  # a number of the library's without a preset behind it
        (
            QuantizeOptions("Q8_0", tensor_types=("attn_v=q9_k",)),
            "attn_v=q9_k: weights cannot be stored as 'q9_k'",
        ),
        (
            QuantizeOptions("Q8_0", output_tensor_type="huge"),
            "--output-tensor-type: weights cannot be stored",
        ),
        (
            QuantizeOptions("Q8_0", token_embedding_type="q8_K"),
            "--token-embedding-type: weights cannot be stored",
        ),
        (QuantizeOptions("Q8_0", tensor_types=("attn_w=q4_0",)), "attn_w=q4_0: the pattern matches no tensor"),
        (QuantizeOptions("Q8_0", include_weights=("a",), exclude_weights=("b",)), "cannot be used together"),
        (QuantizeOptions("Q8_0", keep_split=True, split_max_bytes=1000), "cannot be used together"),
        (QuantizeOptions("COPY", types={"output.weight": "q8_0"}), "COPY changes no tensor"),
        (QuantizeOptions("Q8_0", prune_layers=(4,)), "blocks 0 to 3"),
        (QuantizeOptions("Q8_0", override_kv=("a=int:x",)), r"--override-kv a=int:x: TYPE:VALUE is"),
        (QuantizeOptions("Q8_0", override_kv=("a=int:4294967296",)), "32 bits"),
        (QuantizeOptions("Q8_0", override_kv=("a=float:1e60",)), "TYPE:VALUE"),
        (QuantizeOptions("Q8_0", override_kv=("a=bool:yes",)), "TYPE:VALUE"),
        (QuantizeOptions("Q8_0", override_kv=("a=str:" + "x" * 128,)), "at most 127"),
        (QuantizeOptions("Q8_0", override_kv=("a",)), "KEY=TYPE:VALUE"),
        (QuantizeOptions("Q8_0", override_kv=("k" * 128 + "=int:1",)), "KEY=TYPE:VALUE"),
        (QuantizeOptions("Q8_0", override_kv=("general.alignment=int:64",)), "general.alignment follows"),
        (QuantizeOptions("Q8_0", override_kv=("general.architecture=str:odd",)), "cannot quantize .*odd"),
        (QuantizeOptions("Q8_0", override_kv=("llama.block_count=int:-1",)), "fails with llama.block_count=-1"),
    ],
)
def test_options_that_cannot_be_used(options, match, model, tmp_path):
    refused(model, tmp_path, match, options)


def test_a_type_that_needs_importance(model, imatrix, tmp_path):
    cases = [
        (QuantizeOptions("IQ2_XS"), None, r"blk\.\d\.\w+\.weight would become iq2_xs, .*pass --imatrix"),
        (QuantizeOptions("Q2_K_S"), None, r"would become q2_K, .*pass --imatrix"),
        (
            QuantizeOptions("Q8_0", tensor_types=("1.attn_q=iq3_xxs",)),
            None,
            r"blk\.1\.attn_q\.weight would become",
        ),
        # The kernels themselves refuse, where llama-quantize aborts.
        (QuantizeOptions("Q8_0", token_embedding_type="iq2_xxs"), imatrix, r"no entry for token_embd\.weight, which"),
        (QuantizeOptions("IQ2_XS", exclude_weights=("1.attn_v",), pure=True), imatrix, "no entry for token_embd"),
        (
            QuantizeOptions("Q2_K_S", exclude_weights=("1.ffn_up",)),
            imatrix,
            r"no entry for blk\.1\.ffn_up\.weight, which",
        ),
    ]
    for index, (options, matrix, match) in enumerate(cases):
        (tmp_path / str(index)).mkdir()
        refused(model, tmp_path / str(index), match, options, imatrix=matrix)


def test_an_imatrix_of_another_model(model, imatrix, tiny_gguf, tmp_path):
    matrix = read_imatrix(imatrix)
    odd = {f"other.{name}": entry for name, entry in matrix.entries.items()}
    matrix.entries, entries = odd, matrix.entries
    write_imatrix(matrix, tmp_path / "names.gguf")
    matrix.entries = entries
    with pytest.raises(BitladderError, match="belongs to another model"):
        quantize(model, tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "names.gguf")
    with pytest.raises(BitladderError, match="belongs to another model: .* columns"):
        write_moe(tiny_gguf, tmp_path / "moe.gguf")
        other = make_model(tmp_path, hidden_size=512)
        quantize(other, tmp_path / "q.gguf", "Q4_K_M", imatrix=imatrix)
    with pytest.raises(UsageError, match="--exclude-weights attn_w: no entry"):
        quantize(model, tmp_path / "q.gguf", QuantizeOptions("Q4_K_M", exclude_weights=("attn_w",)), imatrix=imatrix)
    assert not (tmp_path / "q.gguf").exists()


def test_a_quantized_source_needs_leave(model, tmp_path):
    q8 = quantize(model, tmp_path / "q8.gguf", "Q8_0").path
    with pytest.raises(BitladderError, match="already q8_0; .*--allow-requantize"):
        quantize(q8, tmp_path / "q4.gguf", "Q4_K_M")
    quantize(q8, tmp_path / "copy.gguf", QuantizeOptions("Q8_0"))  # nothing changes, nothing is lost
    quantize(q8, tmp_path / "q4.gguf", QuantizeOptions("Q4_K_M", allow_requantize=True))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["Q8_0"], 2, "'-o'"),
        (["-o", "q.gguf"], 2, "name a preset"),
        (["-o", "q.gguf", "--tensor-type", "attn_v", "Q8_0"], 2, "write PATTERN=TYPE"),
        (["-o", "q.gguf", "--tensor-type-file", "absent.txt", "Q8_0"], 2, "absent.txt"),
        (["-o", "q.gguf", "--tensor-type-file"], 2, "requires an argument"),
        (["-o", "q.gguf", "--prune-layers", "1,x", "Q8_0"], 2, "--prune-layers 1,x"),
        (["-o", "q.gguf", "--split-max-size", "2X", "Q8_0"], 2, "--split-max-size"),
        (["-o", "q.gguf", "--recipe", "absent.toml"], 2, "absent.toml"),
        (["-o", ".", "Q8_0"], 2, "is a directory"),
    ],
)
def test_command_line(arguments, code, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["quantize", "-m", str(model), *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not list(pathlib.Path().iterdir())


def test_dry_run_tells_the_exact_size(model, tmp_path, capsys):
    arguments = ["quantize", "-q", "--json", "-m", str(model), "--tensor-type", "attn_v=q8_0", "Q4_K_M"]
    assert invoke([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert invoke([*arguments, "-o", str(tmp_path / "q.gguf")]) == 0
    planned, made = json.loads(planned), json.loads(capsys.readouterr().out)
    assert planned["bytes"] == made["bytes"] == (tmp_path / "q.gguf").stat().st_size
    assert all(planned[key] == made[key] for key in ("bpw", "bpw_blocks", "types"))
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]
