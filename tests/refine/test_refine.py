"""Rounding a whole model: blocks that lower KLD on held-out text, the guard that keeps others out, and verifying."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from calibrated import calibrate
from heard import Heard

from bitladder.calibrate import (
    Moment,
    MomentsFile,
    MomentShape,
    Provenance,
    model_sha256,
    writing_moments,
)
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Decoding, type_by_name
from bitladder.errors import BitladderError
from bitladder.evaluate import MeasureOptions, evaluate
from bitladder.files import sha256_file
from bitladder.gguf import GgufFile
from bitladder.progress import SILENT
from bitladder.quantize import QuantizeOptions, quantize
from bitladder.refine import GuardOptions, ModelFiles, RefineOptions, RoundAhead, quantize_rounded, verify
from bitladder.refine.round import output_rounding
from bitladder.refine.round.output_rounding import OutputRounding
from bitladder.rounding import RoundingOptions, SecondMoments, method
from bitladder.text import Text, load_text
from bitladder.trial import Renderer, SwappedModel, render, render_all

PRESET = "Q3_K_S"


@pytest.fixture(scope="module")
def prepared(tiny_gguf, tmp_path_factory):
    """An imatrix and plain second moments of the embedded model."""
    return calibrate(tiny_gguf, tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def held_out():
    return load_text("pydoc:test")


def quantize_best(model, prepared, out, moments, held_out=None, guard=None, **rounding):
    """A quant of the preset with the imatrix, rounded by one pass unless another rounding is given."""
    files = ModelFiles(model, prepared / "imatrix.gguf", (moments,))
    options = RoundingOptions(**rounding) if rounding else RoundingOptions(passes=1)
    refine = RefineOptions(rounding=options, guard=guard or GuardOptions(guard_chunks=4))
    return quantize_rounded(files, out, QuantizeOptions(PRESET), refine, held_out, Decoding(n_ctx=256))


@pytest.fixture(scope="module")
def rounded(tiny_gguf, prepared, held_out):
    """A quant of the embedded model, rounded and guarded."""
    return quantize_best(tiny_gguf, prepared, prepared / "rounded.gguf", prepared / "moments.gguf", held_out)


def test_same_types_and_bytes_less_divergence_elsewhere(tiny_gguf, prepared, rounded):
    stock = quantize(tiny_gguf, prepared / "stock.gguf", PRESET, imatrix=prepared / "imatrix.gguf")
    assert rounded.result.types == stock.types
    with GgufFile(stock.path) as a, GgufFile(rounded.result.path) as b:
        assert a.tensor_bytes == b.tensor_bytes
    # Neither the calibration's text nor the guard's.
    words = load_text("pydoc:test").text
    text = Text("the rest", words[len(words) // 2 :], "0" * 64)
    settings = MeasureOptions(n_ctx=256, chunks=6)
    klds = [
        evaluate(one.path, text, settings, base=tiny_gguf, base_file=prepared / "rest.base").kld.value
        for one in (stock, rounded.result)
    ]
    assert klds[1] < 0.8 * klds[0]


def test_tensors_of_several_quants_are_rounded_once(tiny_gguf, prepared, tmp_path, monkeypatch):
    """Second moments of a tensor are factored once for all its types; the files are what they are without."""
    files = ModelFiles(tiny_gguf, prepared / "imatrix.gguf", (prepared / "moments.gguf",))
    refine = RefineOptions(rounding=RoundingOptions(method="feedback"))
    quants = [QuantizeOptions(preset) for preset in ("Q3_K_S", "Q4_K_S")]
    factored: list[int] = []
    ready = SecondMoments.__init__

    def counting(self, *arguments):
        factored.append(1)
        ready(self, *arguments)

    def make(work):
        for quant in quants:
            quantize_rounded(files, tmp_path / quant.preset, quant, refine, None, Decoding(n_ctx=256), work=work)
        return [(tmp_path / quant.preset).read_bytes() for quant in quants]

    alone = make(None)
    monkeypatch.setattr(SecondMoments, "__init__", counting)
    with RoundAhead(files, quants, refine.rounding, tmp_path / "blocks", decoding=Decoding(threads=1)) as ahead:
        ahead.render()
    with MomentsFile(prepared / "moments.gguf") as moments:
        assert len(factored) == len({*moments.names(), "token_embd.weight"})  # rounded without an entry
    factored.clear()
    assert make(tmp_path / "blocks") == alone
    assert not factored
    monkeypatch.setattr(render, "KEPT_SHARE", 0)
    with RoundAhead(files, quants, refine.rounding, tmp_path / "full", decoding=Decoding(threads=1)) as ahead:
        ahead.render()
    assert not factored
    assert make(tmp_path / "full") == alone
    assert not list((tmp_path / "full").glob("*.blocks"))


def test_a_device_makes_files_of_its_own_that_are_as_good(tmp_path, monkeypatch):
    """On a random model of one layer: torch on a CPU is slow."""
    tiny_models.train_byte_level(tmp_path / "checkpoint")
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.1}
    tiny_models.llama(tmp_path / "checkpoint", vocab_size=387, **wide)
    model = tmp_path / "model.gguf"
    convert(tmp_path / "checkpoint", model, outtype="f16")
    calibrate(model, tmp_path)
    files = ModelFiles(model, tmp_path / "imatrix.gguf", (tmp_path / "moments.gguf",))
    refine = RefineOptions(rounding=RoundingOptions(passes=1))

    def made(device, progress=SILENT):
        out, decoding = tmp_path / f"{device}.gguf", Decoding(n_ctx=256, device=device)
        return quantize_rounded(files, out, QuantizeOptions(PRESET), refine, None, decoding, progress=progress)

    cpu, ours = made("cpu"), made("torch")
    assert ours.result.types == cpu.result.types
    before, there, here = (
        sum(loss[k] for loss in quant.losses.values()) for quant, k in ((cpu, 0), (cpu, 1), (ours, 1))
    )
    assert here < 1.01 * there < before
    digests = {name: sha256_file(tmp_path / f"{name}.gguf") for name in ("cpu", "torch")}
    assert len(set(digests.values())) == 2

    def origins_in(path):
        return verify(path, model, imatrix=files.imatrix, moments=files.moments, rounding=refine.rounding).origins

    origins = origins_in(tmp_path / "torch.gguf")
    assert "differs" not in origins.values() and "rounded" in origins.values()
    # Tensors beside one may change an index of it, not its output error.
    with GgufFile(tmp_path / "torch.gguf") as file:
        tensor = file.tensors[next(name for name, way in origins.items() if way == "rounded")]
        blocks, start = file.read(tensor), file.data_start + tensor.offset
    turned = blocks.copy()
    turned[0, 40] ^= 1
    for data, expected in ((turned, "rounded on a device"), (np.zeros_like(blocks), "differs")):
        content = bytearray((tmp_path / "torch.gguf").read_bytes())
        content[start : start + tensor.nbytes] = data.tobytes()
        (tmp_path / "mixed.gguf").write_bytes(content)
        assert origins_in(tmp_path / "mixed.gguf") == origins | {tensor.name: expected}
    # What does not fit on it is rounded by the CPU, which says so.
    monkeypatch.setattr(method, "device_memory", lambda device: 1000)
    heard = Heard()
    full = made("torch", heard)
    assert full.losses == cpu.losses
    assert any("does not fit into the memory of the device" in line for line in heard.lines)


def test_a_device_rounds_tensors_of_one_shape_side_by_side(tiny_gguf, prepared, monkeypatch):
    options, threads = RoundingOptions(passes=1), 2
    with GgufFile(tiny_gguf) as file, MomentsFile(prepared / "moments.gguf") as moments:
        ways = [OutputRounding([moments], options, "torch") for _ in range(3)]
        tensors = [tensor for name, tensor in file.tensors.items() if name in moments]
        groups = ways[0].groups(tensors)
        assert sorted(tensor.name for group in groups for tensor in group) == sorted(tensor.name for tensor in tensors)
        assert all(len({tensor.shape for tensor in group}) == 1 for group in groups)
        assert len(groups) == len({tensor.shape for tensor in tensors})
        group = [tensor.name for tensor in min(groups, key=lambda group: (len(group) < 2, group[0].elements))]
        pairs = [(name, kind) for name in group for kind in ("q4_K", "iq4_nl")]
        calls: list[int] = []
        real = output_rounding.round_matrices

        def counting(weights, *others):
            calls.append(len(weights))
            return real(weights, *others)

        monkeypatch.setattr(output_rounding, "round_matrices", counting)
        with Renderer(file, {}, rounding=ways[0], threads=threads) as renderer:
            render_all(renderer, pairs)
        assert calls == [len(group)] * 2
        # Moments of a group are factored once, though not all of its types are those of all tensors.
        factored: list[int] = []

        class Counting(SecondMoments):
            def __init__(self, *arguments):
                factored.append(1)
                super().__init__(*arguments)

        with monkeypatch.context() as patch, Renderer(file, {}, rounding=ways[2], threads=threads) as renderer:
            patch.setattr(output_rounding, "SecondMoments", Counting)
            halves = {"q5_0": group[: len(group) // 2], "q5_1": group[len(group) // 2 :], "q4_0": group[:2]}
            render_all(renderer, [(name, kind) for kind, names in halves.items() for name in names])
        assert len(group) >= 4 and len(factored) == len(group)
        with Renderer(file, {}, rounding=ways[1], threads=threads) as renderer:
            for name, kind in pairs:
                renderer.blocks(name, type_by_name(kind))
                alone, together = (way.losses[name, kind] for way in (ways[1], ways[0]))
                assert together[0] == alone[0] and together[1] == pytest.approx(alone[1], rel=5e-3)
        # What a device is not busy with is left to the CPU, unless the device is named.
        monkeypatch.setattr(output_rounding, "torch_device", lambda name: "torch")
        monkeypatch.setattr(OutputRounding, "_coupled", lambda self, name: self._options.two_sided)
        coupled, apart = (
            OutputRounding([moments], options.replace(two_sided=sides), "auto") for sides in (True, False)
        )
        few, many = output_rounding.WORTHWHILE - 1, output_rounding.WORTHWHILE
        for count, expected in ((few, [1] * few), (many, [many])):
            monkeypatch.setattr(output_rounding, "fit_device", lambda *_, count=count: count)
            same = [dataclasses.replace(tensors[0]) for _ in range(count)]
            assert [len(each) for each in coupled.groups(same)] == expected
            assert [len(each) for each in apart.groups(same)] == [count]


def test_the_guard_reports_what_it_measured(rounded):
    guard = rounded.guard
    assert guard.after.value < guard.before.value
    assert guard.difference.value == pytest.approx(guard.after.value - guard.before.value, abs=1e-12)
    # Where blocks harm it is looked at more closely: from groups of layers to layers, from these to tensors.
    groups = [trial for trial in guard.removals if "-" in trial.kind]
    layers = [trial for trial in guard.removals if trial.kind.startswith("blk.") and trial not in groups]
    single = [trial for trial in guard.removals if not trial.kind.startswith("blk.")]
    assert groups and all(trial.kept for trial in guard.trials)  # so single tensors are tried only where a layer harms
    opened = [trial for trial in groups if trial.change.value > -trial.change.error]
    assert {name for trial in layers for name in trial.tensors} == {name for group in opened for name in group.tensors}
    harmful = [trial for trial in layers if trial.change.value > trial.change.error]
    assert {name for trial in single for name in trial.tensors} == {name for layer in harmful for name in layer.tensors}
    assert all(after < before for before, after in rounded.losses.values())


@pytest.mark.slow
def test_a_guard_that_stops_early_decides_as_one_that_reads_all(tiny_gguf, prepared, held_out, monkeypatch):
    measured: list[int] = []
    kld_with = SwappedModel.kld_with

    def counting(self, replacements, chunks=None, *, first=0):
        klds = kld_with(self, replacements, chunks, first=first)
        measured.append(klds.size)
        return klds

    monkeypatch.setattr(SwappedModel, "kld_with", counting)

    def guard(name, options):
        measured.clear()
        quant = quantize_best(
            tiny_gguf, prepared, prepared / name, prepared / "moments.gguf", held_out, options
        )  # fmt: skip
        return quant.guard, sum(measured)

    whole, all_tokens = guard("whole.gguf", GuardOptions(guard_chunks=4, sure=1e9, negligible=0))
    early, tokens = guard("early.gguf", GuardOptions(guard_chunks=4))
    assert tokens < 0.7 * all_tokens
    put_in = sum(trial.change.value for trial in whole.trials if trial.kept)
    taken_out = sum(trial.change.value for trial in whole.removals if not trial.kept)
    assert whole.before.value + put_in - taken_out == pytest.approx(whole.after.value, rel=1e-9)
    assert [(trial.kind, trial.kept) for trial in early.trials] == [(trial.kind, trial.kept) for trial in whole.trials]
    # Tensors that matter little may be decided in another way: the loss is the same.
    assert early.after.value < 1.01 * whole.after.value


def lying(moments, out, liar, others=()):
    """Second moments of some tensors as they are, and of one the opposite of the truth."""
    with MomentsFile(moments) as known:
        read = {name: known.read(name) for name in (liar, *others)}
        width = read[liar].inputs.shape[1]
        inverse = np.linalg.inv(read[liar].inputs[0] + 1e-3 * np.eye(width, dtype=np.float32))
        read[liar] = Moment(inverse[None].astype(np.float32), np.array([256]))
    shapes = {name: MomentShape(1, moment.inputs.shape[1]) for name, moment in read.items()}
    with writing_moments(out, Provenance(["none"], 1, 256), shapes, {}) as writer:
        for name, moment in read.items():
            writer.write(name, Moment(moment.inputs, moment.counts))
    return out


def test_a_tensor_that_harms_within_a_kind_that_gains(tiny_gguf, prepared, held_out, tmp_path):
    kind = [f"blk.{layer}.ffn_down.weight" for layer in range(8)]
    lie = lying(prepared / "moments.gguf", tmp_path / "lie.gguf", kind[1], [kind[0], *kind[2:]])
    made = quantize_best(tiny_gguf, prepared, tmp_path / "q.gguf", lie, held_out, GuardOptions(guard_chunks=8))
    assert [(trial.kind, trial.kept) for trial in made.guard.trials] == [("ffn_down", True)]
    assert made.guard.stock == (kind[1],)


def test_blocks_that_harm_are_kept_out(tiny_gguf, prepared, held_out, tmp_path):
    """Moments that say the opposite of the truth: fitted to them, a kind gets worse, and keeps the library's blocks."""
    name = "blk.1.ffn_down.weight"
    lie = lying(prepared / "moments.gguf", tmp_path / "lie.gguf", name)
    made = quantize_best(tiny_gguf, prepared, tmp_path / "q.gguf", lie, held_out)
    assert made.guard.stock == (name,)
    assert made.guard.after.value == made.guard.before.value
    found = verify(tmp_path / "q.gguf", tiny_gguf, imatrix=prepared / "imatrix.gguf")
    assert found.origins[name] == "stock" and not found.differing


def test_verify_derives_every_tensor(tiny_gguf, prepared, rounded, tmp_path):
    files = {"imatrix": prepared / "imatrix.gguf", "moments": [prepared / "moments.gguf"]}
    # The method that the file names is tried with its default options.
    out = tmp_path / "q.gguf"
    quantize_best(tiny_gguf, prepared, out, prepared / "moments.gguf", method="best")
    found = verify(out, tiny_gguf, **files)
    assert not found.differing and "rounded" in found.origins.values()
    data = bytearray(out.read_bytes())
    with GgufFile(out) as file:
        tensor = file.tensors["blk.0.attn_q.weight"]
        data[file.data_start + tensor.offset + 40] ^= 1
    (tmp_path / "changed.gguf").write_bytes(data)
    assert verify(tmp_path / "changed.gguf", tiny_gguf, **files).differing == ["blk.0.attn_q.weight"]
    with pytest.raises(BitladderError, match=r"was made with other second moments"):
        verify(out, tiny_gguf, imatrix=files["imatrix"], moments=files["moments"] * 2)


def test_command(tiny_gguf, prepared, tmp_path, capsys):
    out, log = tmp_path / "q.gguf", ["-q"]
    arguments = ["quantize", "-m", str(tiny_gguf), "-o", str(out), PRESET, "--imatrix", str(prepared / "imatrix.gguf")]
    assert invoke([*arguments, "--rounding", "feedback", *log]) == 2
    assert "needs second moments: pass --moments" in capsys.readouterr().err
    moments = ["--rounding", "feedback", "--moments", str(prepared / "moments.gguf"), "--guard", "none"]
    assert invoke([*arguments, *moments, *log]) == 0
    assert "output error relative to stock blocks" in capsys.readouterr().out
    known = ["--imatrix", str(prepared / "imatrix.gguf"), "--moments", str(prepared / "moments.gguf")]
    assert invoke(["verify", str(out), "-m", str(tiny_gguf), *known, *log]) == 0
    assert "rounded" in capsys.readouterr().out
    assert invoke(["verify", str(out), "-m", str(tiny_gguf), *log]) == 2
    assert "importance matrix imatrix.gguf: name it with --imatrix" in capsys.readouterr().err
    assert invoke(["verify", str(out), "-m", str(tiny_gguf), *known[:2], *log]) == 1
    assert "cannot be made from" in capsys.readouterr().err


def test_moments_of_another_model(tiny_gguf, prepared, tmp_path):
    name = "blk.0.attn_q.weight"
    odd = tmp_path / "odd.gguf"
    with writing_moments(odd, Provenance(["none"], 1, 256), {name: MomentShape(1, 8)}, {}) as writer:
        writer.write(name, Moment(np.eye(8, dtype=np.float32)[None], np.array([256])))
    with pytest.raises(BitladderError, match=r"another model than .*: blk\.0\.attn_q\.weight has inputs of 8 there"):
        quantize_best(tiny_gguf, prepared, tmp_path / "q.gguf", odd)
    assert not (tmp_path / "q.gguf").exists()
    with pytest.raises(BitladderError, match="holds no second moments"):
        quantize_best(tiny_gguf, prepared, tmp_path / "q.gguf", prepared / "imatrix.gguf")


def test_moments_of_other_content_are_warned_of(tiny_gguf, prepared, tmp_path, capsys):
    """As of a model before it was smoothed: shapes fit, and what they say is not true."""
    name = "blk.0.attn_q.weight"
    with MomentsFile(prepared / "moments.gguf") as known:
        read = known.read(name)
    for digest, warned in (("0" * 64, True), (model_sha256(tiny_gguf), False)):
        path = tmp_path / "m.gguf"
        provenance = Provenance(["none"], 1, 256, model_sha256=digest)
        with writing_moments(path, provenance, {name: MomentShape(1, read.inputs.shape[1])}, {}) as writer:
            writer.write(name, read)
        arguments = ["-m", str(tiny_gguf), "-o", str(tmp_path / "q.gguf"), "--moments", str(path), "--guard", "none"]
        assert invoke(["quantize", *arguments, "--rounding", "feedback", PRESET]) == 0
        assert ("collected from another file" in capsys.readouterr().err) == warned
