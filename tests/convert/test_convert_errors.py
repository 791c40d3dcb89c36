"""Bad input gets one clear line, and never half a file."""

import json
import pathlib
import re
import shutil
import tracemalloc
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from heard import Heard

from bitladder.cli.inputs import convert_command
from bitladder.convert import checkpoint, checkpoint_files, convert, default_name, tensors
from bitladder.engine import Workers
from bitladder.errors import BitladderError, UsageError
from bitladder.hub import fetch_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("convert") / "Tiny"
    tiny_models.llama(folder, shard="60KB")
    tiny_models.train_byte_level(folder)
    return folder


def refusal(folder: pathlib.Path, **options: Any) -> str:
    """The message with which `convert` refuses; checks that it is one line and that an older file stays."""
    out = folder.parent / "out.gguf"
    out.write_text("older")
    with pytest.raises(BitladderError) as caught:
        convert(folder, out, **options)
    assert out.read_text() == "older"
    assert [path.name for path in folder.parent.glob("*out.gguf*")] == ["out.gguf"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard_of(folder: pathlib.Path, name: str = NAME) -> pathlib.Path:
    return folder / json.loads((folder / checkpoint.INDEX).read_text())["weight_map"][name]


def spoil(folder: pathlib.Path, value: float, index: tuple[int, int] = (3, 5)) -> None:
    """Put `value` into the tensor NAME."""
    tensor = checkpoint_files.read_header(shard_of(folder))[NAME]
    data = np.memmap(tensor.file, np.float32, "r+", tensor.offset, tensor.shape)
    data[index] = value
    data.flush()


def test_missing_shard(folder: pathlib.Path) -> None:
    shard_of(folder).unlink()
    message = refusal(folder)
    assert shard_of(folder).name in message
    assert "missing" in message


def test_truncated_shard(folder: pathlib.Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(folder)
    assert path.name in message
    assert "truncated: tensor model." in message
    path.write_bytes(b"\x00" * 4)
    assert "truncated" in refusal(folder)
    path.write_bytes((10).to_bytes(8, "little") + b"not json, really")
    assert "not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("outtype", ["f16", "bf16", "f32"])
def test_not_finite(value: float, outtype: str, folder: pathlib.Path) -> None:
    spoil(folder, value)
    message = refusal(folder, outtype=outtype)
    assert NAME in message
    assert str(value) in message
    assert "[3, 5]" in message


def test_f16_overflow(folder: pathlib.Path) -> None:
    spoil(folder, -70000.0)
    message = refusal(folder, outtype="f16")
    assert NAME in message
    assert "-70000" in message
    assert "--outtype bf16" in message
    assert convert(folder, folder.parent / "out.gguf", outtype="bf16").outtype == "bf16"
    spoil(folder, 65504.0)
    assert convert(folder, folder.parent / "out.gguf", outtype="f16").outtype == "f16"


def test_f16_underflow_is_named(folder: pathlib.Path) -> None:
    for row in (0, 7):
        for column in range(checkpoint_files.read_header(shard_of(folder))[NAME].shape[1]):
            spoil(folder, 1e-9, (row, column))
    heard = Heard()
    convert(folder, folder.parent / "f16.gguf", outtype="f16", progress=heard)
    assert [line for line in heard.warnings if NAME in line] == [
        f"{NAME}: 2 of 96 rows are lost, because f16 has no numbers as small; convert with --outtype bf16"
    ]
    heard = Heard()
    convert(folder, folder.parent / "bf16.gguf", outtype="bf16", progress=heard)
    assert not [line for line in heard.warnings if NAME in line]


def test_bf16_rounds_to_nearest_even() -> None:
    torch: Any = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    values[:3] = [1.00390625, 1.01171875, 0.0]  # two ties
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    with Workers(1) as workers:
        np.testing.assert_array_equal(tensors.encode("x", values, tensors.Type.BF16, workers)[0], expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_a_tensor_and_name_its_first_large_weight(threads: int) -> None:
    torch: Any = pytest.importorskip("torch")
    rows = 3 * tensors.SLAB // 1000
    weights = np.random.default_rng(0).normal(size=(rows, 1000)).astype(np.float32)
    lost = [3, 300, rows - 1]
    weights[lost] *= 1e-9
    with Workers(threads) as workers:
        stored, count = tensors.encode("x", weights, tensors.Type.F16, workers)
        assert count == len(lost)
        np.testing.assert_array_equal(stored, torch.from_numpy(weights).half().numpy())
        weights[[rows - 2, 500], 7] = [-70000, 66000]
        with pytest.raises(BitladderError, match="x has the weight 66000, which F16 cannot hold"):
            tensors.encode("x", weights, tensors.Type.F16, workers)


def test_unknown_architecture(folder: pathlib.Path) -> None:
    tiny_models.configure(folder, architectures=["MambaForCausalLM"])
    message = refusal(folder, upstream=False)
    assert "MambaForCausalLM" in message
    assert "--upstream" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor should be a finite number"),
        ({"vocab_size": 500}, "should be [500, 64]"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "big"}, "hidden_size should be a positive whole number"),
    ],
)
def test_config_that_does_not_fit(values: dict[str, Any], words: str, folder: pathlib.Path) -> None:
    tiny_models.configure(folder, **values)
    assert words in refusal(folder)


def test_other_weights(folder: pathlib.Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    assert "dequantized" in refusal(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert "neither model.safetensors nor" in refusal(folder)


def test_no_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BitladderError, match="absent: no such file or folder here, and no hub id"):
        fetch_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BitladderError, match="is a file"):
        fetch_checkpoint(tmp_path / "file")
    with pytest.raises(BitladderError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="q4"):
        convert(tmp_path, tmp_path / "out.gguf", outtype="q4")


def test_hub(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is fetched with huggingface_hub, and names the model although its directory is a hash."""
    snapshot = tmp_path / "models--some-org--Small-130K-Chat" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    asked = {}

    def fetch(repository: str, **options: Any) -> str:
        asked[repository] = options
        if repository != "some-org/Small-130K-Chat":
            raise OSError("offline\nsecond line")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert default_name("some-org/Small-130K-Chat", "f16") == "Small-130K-Chat-F16.gguf"
    convert("some-org/Small-130K-Chat", tmp_path / "hub.gguf")
    organization = gguf.GGUFReader(tmp_path / "hub.gguf").get_field("general.organization")
    assert organization is not None
    assert organization.contents() == "Some Org"
    assert "*.safetensors" in asked["some-org/Small-130K-Chat"]["allow_patterns"]
    with pytest.raises(BitladderError, match=r"hub does not give it: offline second line$"):
        fetch_checkpoint("some-org/absent")


def test_converter(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = convert(folder, tmp_path / "made.gguf", outtype="f16")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import shutil, sys\n"
        "model, _, target, _, outtype = sys.argv[1:]\n"
        f"assert (model, outtype) == ({str(folder)!r}, 'f16')\n"
        f"shutil.copy({str(made.path)!r}, target)\n"
    )
    result = convert(folder, tmp_path / "out.gguf", outtype="f16", converter=script)
    assert result.path.read_bytes() == made.path.read_bytes()
    assert (result.architecture, result.tensors) == ("llama", made.tensors)
    script.write_text("import sys\nsys.exit('first line\\nthe model is not known')")
    assert "the model is not known" in refusal(folder, converter=script)
    script.write_text("")
    assert "wrote no GGUF" in refusal(folder, converter=script)
    assert "no such file" in refusal(folder, converter=tmp_path / "absent.py")


def test_memory_is_bounded_by_a_tensor(tmp_path: pathlib.Path) -> None:
    tiny_models.olmo2(tmp_path / "Tiny", hidden_size=256, intermediate_size=512, num_hidden_layers=16)
    tiny_models.train_byte_level(tmp_path / "Tiny")
    tracemalloc.start()
    try:
        size = convert(tmp_path / "Tiny", tmp_path / "out.gguf", outtype="f32").bytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 30e6
    assert peak < size / 4


def test_command(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(convert_command, [str(folder), "--json", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert answer["path"] == default_name(folder)
    assert re.fullmatch(r"Tiny-\d+K-F16\.gguf", answer["path"])
    assert (answer["architecture"], answer["outtype"], answer["bytes"]) == (
        "llama",
        "f16",
        (tmp_path / answer["path"]).stat().st_size,
    )
    done = CliRunner().invoke(
        convert_command, [str(folder), "-o", "named.gguf", "--outtype", "f32"], catch_exceptions=False
    )
    assert "named.gguf: llama, f32" in done.stdout
