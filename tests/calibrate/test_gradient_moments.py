"""Moments by gradients as work: cut into segments, killed, out of disk, damaged, merged."""

import numpy as np
import pytest
import safetensors.numpy
import tiny_models
import torch
from heard import Heard

from bitladder.calibrate import (
    Correlations,
    LowRank,
    MomentsFile,
    MomentsOptions,
    UnfinishedWork,
    collect_moments,
    merge_moments,
    pack_triangle,
)
from bitladder.calibrate.gradients import gradient_pass
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Decoding, quantize_rows, type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, string, strings, u32
from bitladder.rounding import RoundingOptions, round_tensor
from bitladder.text import Reading, Text, load_text

GRADIENTS = MomentsOptions(weighting="gradients")
LITTLE = GRADIENTS.replace(memory=1e-6)  # GiB: each block is a segment of its own
WORK = {"reading": Reading(chunks=9), "decoding": Decoding(n_ctx=64, threads=1)}


@pytest.fixture(scope="module")
def text(calibration_text):
    return Text("part.txt", load_text(str(calibration_text)).text[:3000], "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient-moments")
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder)
    convert(folder, folder / "model.gguf", outtype="f32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    collect_moments(model, [text], path, options=GRADIENTS, **WORK)
    return path


def test_killed_again_and_again_it_ends_with_the_bytes_of_one_segment(model, text, whole, tmp_path, monkeypatch):
    computed, original, forward = [], gradient_pass.GradientPass._chunk, UnfinishedWork.append_row

    def dying(self, segment, turn, entries):
        if len(computed) in (2, 7, 11, 19):
            computed.append(None)
            raise KeyboardInterrupt
        computed.append((segment.first, turn.chunk))
        return original(self, segment, turn, entries)

    def half_a_row(self, name, index, row):
        forward(self, name, index, row)
        if name.startswith("stream") and index == 4 and not computed:
            with (self.folder / name).open("ab") as stream:
                stream.write(b"half")
            computed.append(None)
            raise KeyboardInterrupt

    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", dying)
    monkeypatch.setattr(UnfinishedWork, "append_row", half_a_row)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    out, kills = tmp_path / "m.gguf", 0
    while True:
        try:
            collect_moments(model, [text], out, options=LITTLE, **WORK)
            break
        except KeyboardInterrupt:
            kills += 1
            assert not out.exists() and (tmp_path / "m.gguf.parts").is_dir()
    done = [one for one in computed if one is not None]
    # Two segments, from the last block: every chunk once in each, though the work began five times.
    assert kills == 5 and done == [(first, place) for first in (1, 0) for place in range(9)]
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("options", [GRADIENTS, LITTLE])
def test_chunks_side_by_side_give_the_same_bytes(model, text, whole, tmp_path, options, threads):
    decoding = WORK["decoding"].replace(threads=threads)
    collect_moments(model, [text], tmp_path / "m.gguf", options=options, **(WORK | {"decoding": decoding}))
    assert (tmp_path / "m.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("broken", [5, 6])
def test_an_error_in_a_chunk_ends_the_one_beside_it(model, text, tmp_path, monkeypatch, broken):
    original = gradient_pass.GradientPass._chunk

    def failing(self, segment, turn, entries):
        if turn.chunk == broken:
            raise BitladderError("this chunk is broken")
        return original(self, segment, turn, entries)

    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", failing)
    work = WORK | {"decoding": WORK["decoding"].replace(threads=2)}
    with pytest.raises(BitladderError, match="this chunk is broken"):
        collect_moments(model, [text], tmp_path / "m.gguf", options=GRADIENTS, **work)


def test_sums_on_a_device_are_kept_and_taken_up_again(model, text, whole, tmp_path, monkeypatch):
    cpu, original, computed = torch.Tensor.cpu, gradient_pass.GradientPass._chunk, []
    # As on a device, whose memory is apart from that of `cpu()`.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: cpu(self).clone())
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)

    def dying(self, segment, turn, entries):
        computed.append(turn.chunk)
        if len(computed) == 6:
            raise KeyboardInterrupt
        return original(self, segment, turn, entries)

    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", dying)
    work = WORK | {"decoding": WORK["decoding"].replace(device="torch")}
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, [text], tmp_path / "m.gguf", options=GRADIENTS, **work)
    collect_moments(model, [text], tmp_path / "m.gguf", options=GRADIENTS, **work)
    assert computed == [*range(6), *range(5, 9)]
    assert (tmp_path / "m.gguf").read_bytes() == whole.read_bytes()
    # What does not fit there is added up by the CPU, which says so.
    heard = Heard()
    monkeypatch.setattr(gradient_pass, "device_memory", lambda device: 1000)
    collect_moments(model, [text], tmp_path / "n.gguf", options=GRADIENTS, progress=heard, **work)
    assert any("do not fit into the memory of the device" in line for line in heard.lines)
    assert (tmp_path / "n.gguf").read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_line(model, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text(text.text)
    written = []

    def full(self, name, index, row):
        written.append(name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UnfinishedWork, "_write_row", full)
    arguments = ["calibrate", "-q", "-m", model, "-f", tmp_path / "t.txt", "-c", 64, "-o", tmp_path / "m.gguf"]
    assert invoke([*map(str, arguments), "--memory", "0.00001"]) == 1
    error = capsys.readouterr().err
    assert written and error.count("\n") == 1 and "stream 1: No space left on device" in error
    assert not (tmp_path / "m.gguf").exists()


def test_the_file_is_small_and_shares_what_is_shared(model, whole):
    with MomentsFile(whole) as moments, GgufFile(model) as file:
        for block in range(2):
            gate, up = (f"blk.{block}.ffn_{part}.weight" for part in ("gate", "up"))
            assert moments.entry(up) == gate and moments.shape(up).n_out == file.tensors[up].rows
            assert not np.array_equal(moments.read(gate).outputs, moments.read(up).outputs)
            assert moments.shape(f"blk.{block}.attn_q.weight").blocks == 4
            assert moments.shape(f"blk.{block}.attn_v.weight").blocks == 1
        for name in moments.names():
            outputs = moments.read(name).outputs
            if outputs is not None:
                values = np.linalg.eigvalsh(outputs.astype(np.float64))
                assert values.min() > -1e-3 * values.max(), name


def test_merged_with_itself_it_stays(whole, tmp_path):
    merge_moments(tmp_path / "twice.gguf", [whole, whole])
    with MomentsFile(whole) as first, MomentsFile(tmp_path / "twice.gguf") as twice:
        for name in first.names():
            a, b = first.read(name), twice.read(name)
            np.testing.assert_allclose(a.inputs, b.inputs, atol=5e-4 * a.inputs.max())
            assert (b.counts == 2 * a.counts).all() and (a.outputs is None) == (b.outputs is None)
            if a.outputs is not None:
                np.testing.assert_allclose(a.outputs, b.outputs, atol=2e-3 * a.outputs.max())


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e30])
def test_halves_are_near_and_stay(scale):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 20)) * np.geomspace(1, 1e3, 20)
    rows[:, 3] = 0
    matrix = (rows.T @ rows * scale).astype(np.float32)
    kept = Correlations.of(pack_triangle(matrix)[None])
    roots = np.sqrt(np.diag(matrix).astype(np.float64))
    assert (np.abs(kept.matrix() - matrix) <= 2**-11 * np.outer(roots, roots)).all()
    assert np.array_equal(np.diag(kept.matrix()), np.diag(matrix))
    again = Correlations.of(kept.packed())
    assert np.array_equal(again.values, kept.values) and np.array_equal(again.diagonals, kept.diagonals)
    left, sizes, _ = np.linalg.svd(rows.T * scale**0.5, full_matrices=False)
    low = LowRank.of((left * sizes).astype(np.float32), np.diag(matrix))
    assert (np.abs(low.matrix() - matrix) <= 2e-3 * np.outer(roots, roots)).all()


def rewritten(path, out, change):
    """A copy of a file of moments, whose metadata and tensors (shape and bytes by name) a function has changed."""
    with GgufFile(path) as file:
        tensors = {name: (info.shape, info.type, file.read(info).reshape(-1)) for name, info in file.tensors.items()}
        metadata = dict(file.metadata)
    change(metadata, tensors)
    with out.open("wb") as stream:
        writer = GgufWriter(stream, metadata, [TensorPlan(name, *kept[:2]) for name, kept in tensors.items()])
        for name, (_, _, data) in tensors.items():
            writer.write(name, data)
    return out


Q, UP = "blk.0.attn_q.weight", "blk.0.ffn_up.weight"


def shaped(name, *shape):
    def change(_, tensors):
        _, kind, data = tensors[name]
        tensors[name] = (shape, kind, data[: kind.row_bytes(shape[0]) * int(np.prod(shape[1:]))])

    return change


def filled(name, value, dtype):
    return lambda _, tensors: tensors[name][2].view(dtype).__setitem__(1, value)


def without(name):
    return lambda metadata, tensors: (metadata.pop(name, None), tensors.pop(name, None))


DAMAGE = {
    "there are no entries": lambda _, tensors: tensors.clear(),
    "has no diagonal": without(f"{Q}.diagonal"),
    "has no inputs": without(f"{Q}.moments"),
    "do not belong together": without(f"{UP}.outputs.diagonal"),
    "1 triangle of 7": shaped(f"{Q}.moments", 7, 1),
    "2080, and diagonals of 63": shaped(f"{Q}.diagonal", 63, 1),
    "factors of 96 outputs": shaped(f"{UP}.outputs.diagonal", 95, 1),
    "of two dimensions": shaped(f"{Q}.diagonal", 32, 2, 1),
    "is no part of an entry": lambda _, tensors: tensors.update({"odd": tensors[f"{Q}.diagonal"]}),
    "no numbers of tokens": lambda _, tensors: tensors[f"{Q}.counts"][2].view(np.float32).__setitem__(0, np.nan),
    "datasets is missing, or of a wrong type": lambda metadata, _: metadata.update({"moments.datasets": u32(1)}),
    "chunk_count is missing": without("moments.chunk_count"),
    "weighting is 'luck'": lambda metadata, _: metadata.update({"moments.weighting": string("luck")}),
    "no pairs of a weight": lambda metadata, _: metadata.update({"moments.shared": strings([UP, "absent"])}),
    "a value is not finite": filled(f"{Q}.diagonal", np.nan, np.float32),
    "a square is negative": filled(f"{Q}.diagonal", -1, np.float32),
    "a correlation is above 1": filled(f"{Q}.moments", 1.5, np.float16),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_one_line(whole, message, tmp_path, capsys):
    path = rewritten(whole, tmp_path / "damaged.gguf", DAMAGE[message])
    assert invoke(["calibrate", "-q", "--in-file", str(path), "-o", str(tmp_path / "out.gguf")]) == 1
    error = capsys.readouterr().err
    assert message in error and "damaged.gguf" in error and error.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_where_no_gradient_reaches_there_are_moments_of_zeros(text, tmp_path):
    folder = tmp_path / "model"
    tiny_models.train_byte_level(folder)
    tiny_models.llama(folder)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:] = 0
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    convert(folder, folder / "model.gguf", outtype="f32")
    collect_moments(folder / "model.gguf", [text], tmp_path / "m.gguf", options=GRADIENTS, **WORK)
    with MomentsFile(tmp_path / "m.gguf") as moments:
        for name in moments.names():
            moment = moments.read(name)
            reached = name not in ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
            assert np.isfinite(moment.inputs).all() and moment.inputs.any() == reached
            if moment.outputs is not None:
                assert np.isfinite(moment.outputs).all() and moment.outputs.any() == reached
            options = RoundingOptions(passes=1)
            weight = np.random.default_rng(0).normal(size=(32, moment.inputs.shape[1])).astype(np.float32)
            stock = quantize_rows(weight, type_by_name("q4_0"), None)
            rounded = round_tensor(weight, stock, "q4_0", moment.inputs[0], options)
            assert rounded.after <= rounded.before


def test_state_without_its_gradients_is_refused_once(model, text, whole, tmp_path, monkeypatch):
    original, calls = gradient_pass.GradientPass._chunk, []

    def dying(self, segment, turn, entries):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(turn.chunk)
        return original(self, segment, turn, entries)

    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", dying)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        collect_moments(model, [text], tmp_path / "m.gguf", options=LITTLE, **WORK)
    (tmp_path / "m.gguf.parts" / "gradient 1").unlink()
    monkeypatch.setattr(gradient_pass.GradientPass, "_chunk", original)
    with pytest.raises(BitladderError, match="lacks gradients that its state counts, and was deleted"):
        collect_moments(model, [text], tmp_path / "m.gguf", options=LITTLE, **WORK)
    collect_moments(model, [text], tmp_path / "m.gguf", options=LITTLE, **WORK)
    assert (tmp_path / "m.gguf").read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
