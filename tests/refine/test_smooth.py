"""Smoothing: the model computes the same, its imatrix is that of its inputs, and scales are where they should be."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from moe import write_moe
from smoothing import converted_with_imatrix, logits, smooth

from bitladder.calibrate import (
    GradientOptions,
    ImatrixOptions,
    MomentsFile,
    MomentsOptions,
    collect_imatrix,
    collect_moments,
    read_imatrix,
    write_imatrix,
)
from bitladder.cli import invoke
from bitladder.engine import Decoding
from bitladder.errors import BitladderError
from bitladder.files import sha256_file
from bitladder.gguf import GgufFile
from bitladder.progress import SILENT
from bitladder.quantize import quantize
from bitladder.refine import ModelFiles, SmoothingError, SmoothingTrial, smooth_model
from bitladder.refine.smooth import smoothed_model
from bitladder.refine.smooth.changes import smoothed_moments
from bitladder.refine.smooth.links import balance, links_of
from bitladder.refine.smooth.smoothed_model import KEY
from bitladder.text import Reading

LLAMA_KINDS = ["attn_norm", "ffn_norm", "attn_v", "ffn_up"]


def outliers(model):
    """Give some channels of every input a larger scale, as trained models have them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight[::7] *= 20
            elif "up_proj.weight" in name or "v_proj.weight" in name:
                weight[::5] *= 10
    return model


def made(folder, build, text, outtype="f32", **config):
    """A converted random model with outliers, its imatrix, and the transformers model."""
    source = folder / "checkpoint"
    tiny_models.train_byte_level(source)
    model = outliers(build(source, **config))
    return *converted_with_imatrix(folder, model, text, outtype, process_output=True), model


@pytest.mark.parametrize(
    ("build", "config", "kinds"),
    [
        (tiny_models.llama, {}, [*LLAMA_KINDS, "output_norm"]),
        (tiny_models.llama, {"tie_word_embeddings": True, "num_key_value_heads": 4}, LLAMA_KINDS),
        (tiny_models.llama, {"attention_bias": True, "mlp_bias": True}, [*LLAMA_KINDS, "output_norm"]),
        (tiny_models.olmo2, {}, ["attn_v", "ffn_up", "output_norm"]),
    ],
    ids=["llama", "tied", "biases", "olmo2"],
)
def test_a_smoothed_model_computes_what_transformers_does(tmp_path, text, build, config, kinds):
    path, imatrix, model = made(tmp_path, build, text, **config)
    out, out_imatrix = tmp_path / "s.gguf", tmp_path / "s.imatrix.gguf"
    result = smooth(path, imatrix, out, out_imatrix)
    assert sorted(result.links) == sorted(kinds) and result.moved < 1e-4
    tokens = np.random.default_rng(1).integers(2, 380, 48).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].float().numpy()
    # The library keeps keys and values in F16, which outliers show; `moved` above is free of that.
    assert np.abs(logits(out, tokens) - expected).max() < 0.02 * np.ptp(expected)
    with GgufFile(path) as before, GgufFile(out) as after:
        assert {n: t.shape for n, t in before.tensors.items()} == {n: t.shape for n, t in after.tensors.items()}
        for link in links_of(before):
            for name in (*link.makers, *link.readers):
                old, new = (file.read(file.tensors[name]).view(np.float32) for file in (before, after))
                factors = new[old != 0] / old[old != 0]
                assert set(np.unique(factors)) <= set(2.0 ** np.arange(-12, 13)) and len(np.unique(factors)) > 1


def test_the_imatrix_is_that_of_the_smoothed_inputs(tmp_path, text):
    path, imatrix, _ = made(tmp_path, tiny_models.llama, text)
    smooth(path, imatrix, tmp_path / "s.gguf", tmp_path / "s.imatrix.gguf")
    collect_imatrix(
        tmp_path / "s.gguf",
        [text],
        tmp_path / "again.gguf",
        decoding=Decoding(n_ctx=64),
        options=ImatrixOptions(process_output=True),
    )
    said, seen = read_imatrix(tmp_path / "s.imatrix.gguf").entries, read_imatrix(tmp_path / "again.gguf").entries
    assert said.keys() == seen.keys()
    for name, entry in said.items():
        np.testing.assert_allclose(entry.sums, seen[name].sums, rtol=1e-3)
        np.testing.assert_array_equal(entry.counts, seen[name].counts)


def test_moments_are_those_of_the_smoothed_model(tmp_path, text):
    path, imatrix, _ = made(tmp_path, tiny_models.llama, text)
    result = smooth(path, imatrix, tmp_path / "s.gguf", tmp_path / "si.gguf")
    plain, weighted = {}, {}
    for label, model in (("old", path), ("new", tmp_path / "s.gguf")):
        plain[label], weighted[label] = tmp_path / f"p-{label}.gguf", tmp_path / f"g-{label}.gguf"
        collect_moments(
            model, [text], plain[label], decoding=Decoding(n_ctx=64), options=MomentsOptions(weighting="tokens")
        )
        collect_moments(
            model,
            [text],
            weighted[label],
            reading=Reading(chunks=2),
            decoding=Decoding(n_ctx=64),
            options=MomentsOptions(weighting="gradients", gradients=GradientOptions(half=False)),
        )
    for pair in (plain, weighted):
        smoothed_moments([pair["old"]], result.changes, [tmp_path / "m.gguf"], "of the smoothed")
        with MomentsFile(tmp_path / "m.gguf") as said, MomentsFile(pair["new"]) as seen:
            assert said.names() == seen.names() and said.provenance.model_sha256 == "of the smoothed"
            for name in said.names():
                ours, theirs = said.read(name), seen.read(name)
                largest = np.abs(theirs.inputs).max()
                # What a token counts for v, gate and up is said by the gradients of outputs of v and up, as they were.
                if pair is plain or not name.endswith(("attn_v.weight", "ffn_gate.weight", "ffn_up.weight")):
                    np.testing.assert_allclose(ours.inputs, theirs.inputs, rtol=1e-3, atol=3e-4 * largest)
                np.testing.assert_array_equal(ours.counts, theirs.counts)
                assert (ours.outputs is None) == (theirs.outputs is None)
                if ours.outputs is not None:
                    top = np.abs(theirs.outputs).max()
                    np.testing.assert_allclose(ours.outputs, theirs.outputs, rtol=1e-3, atol=3e-4 * top)


def test_experts_have_scales_of_their_own(tmp_path, tiny_gguf, text):
    path, imatrix, out = tmp_path / "moe.gguf", tmp_path / "i.gguf", tmp_path / "s.gguf"
    write_moe(tiny_gguf, path)
    collect_imatrix(path, [text], imatrix, decoding=Decoding(n_ctx=64))
    result = smooth(path, imatrix, out, tmp_path / "si.gguf")
    assert result.links["ffn_up"] == result.links["ffn_norm"] > 0
    tokens = np.random.default_rng(2).integers(2, 300, 40).astype(np.int32)
    expected = logits(path, tokens)
    assert np.abs(logits(out, tokens) - expected).max() < 5e-3 * np.ptp(expected)
    with GgufFile(path) as before, GgufFile(out) as after:
        tensor = before.tensors["blk.0.ffn_down_exps.weight"]
        old, new = (
            file.read(tensor).view(np.float16).reshape(-1, tensor.rows_per_matrix, tensor.width)
            for file in (before, after)
        )
        assert len({tuple(row) for row in new[:, 0] / old[:, 0]}) > 1  # no two experts' columns need be alike
    quantize(out, tmp_path / "q.gguf", "Q4_0", imatrix=tmp_path / "si.gguf")


def test_balance_is_the_least_of_the_bound():
    rng = np.random.default_rng(3)
    inputs, weights = np.exp(rng.normal(0, 2, 64)), np.exp(rng.normal(0, 1, 64))

    def bound(s):
        return (inputs / s**2).sum() * (weights * s**2).sum()

    found = balance(inputs, weights)
    assert set(np.log2(found) % 1) == {0.0} and np.abs(np.log2(found)).max() <= 6
    least = np.sqrt(inputs * weights).sum() ** 2  # what Cauchy and Schwarz allow
    assert least <= bound(found) < 1.3 * least < bound(np.ones(64))
    assert (balance(np.zeros(4), np.ones(4)) == 1).all()
    assert np.isfinite(balance(np.array([0.0, 1, 2]), np.array([1.0, 0, 2]))).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_link_that_is_none_is_left_out(tmp_path, text, monkeypatch, threads):
    path, imatrix, _ = made(tmp_path, tiny_models.llama, text)
    moments = tmp_path / "moments.gguf"
    options = MomentsOptions(weighting="tokens")
    collect_moments(path, [text], moments, decoding=Decoding(n_ctx=64), options=options)
    real = smoothed_model.links_of

    def wrong(file):
        return [
            dataclasses.replace(link, readers=link.readers[:1]) if link.kind == "attn_norm" else link
            for link in real(file)
        ]

    monkeypatch.setattr(smoothed_model, "links_of", wrong)
    warned = []
    progress = type(
        "Heard", (), {"task": SILENT.task, "info": SILENT.info, "warn": lambda _, text: warned.append(text)}
    )

    def smoothed(name):
        folder = tmp_path / name
        folder.mkdir()
        out = ModelFiles(folder / "s.gguf", folder / "imatrix.gguf", (folder / "moments.gguf",))
        return out, smooth_model(ModelFiles(path, imatrix, (moments,)), out, threads=threads, progress=progress())

    out, result = smoothed("some")
    assert "attn_norm" not in result.links and "ffn_norm" in result.links and result.moved < 1e-4
    assert len(warned) == 1 and "only ffn_norm" in warned[0]
    smoothed_moments([moments], result.changes, [tmp_path / "again.gguf"], sha256_file(out.model))
    assert out.moments[0].read_bytes() == (tmp_path / "again.gguf").read_bytes()
    monkeypatch.setattr(
        smoothed_model, "links_of", lambda file: [link for link in wrong(file) if link.kind == "attn_norm"]
    )
    with pytest.raises(SmoothingError, match="without changing the logits"):
        smoothed("none")
    assert not list((tmp_path / "none").iterdir())  # neither the model nor its moments, nor a part of them


def test_odd_input_is_one_line(tmp_path, text, capsys):
    path, imatrix, _ = made(tmp_path, tiny_models.llama, text, outtype="f16")

    def fails(*arguments, code=1):
        assert invoke(["smooth", "-q", *map(str, arguments)]) == code
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and "Traceback" not in said
        return said

    capsys.readouterr()
    assert invoke(["smooth", "-q", "-m", str(path), "--imatrix", str(imatrix)]) == 0
    smoothed = tmp_path / "f-smooth.gguf"
    with GgufFile(smoothed) as file:
        assert file.get(KEY)
    assert "smoothed already" in fails("-m", smoothed, "--imatrix", imatrix)
    quantize(path, tmp_path / "q.gguf", "Q4_0")
    assert "is q4_0" in fails("-m", tmp_path / "q.gguf", "--imatrix", imatrix)
    other = read_imatrix(imatrix)
    other.entries = {name: dataclasses.replace(e, sums=e.sums[:, :-32]) for name, e in other.entries.items()}
    write_imatrix(other, tmp_path / "other.gguf")
    assert "another model" in fails("-m", path, "--imatrix", tmp_path / "other.gguf")
    other.entries = {"blk.99.nothing.weight": next(iter(other.entries.values()))}
    write_imatrix(other, tmp_path / "none.gguf")
    assert "another model" in fails("-m", path, "--imatrix", tmp_path / "none.gguf")
    assert "no such file" in fails("-m", path, "--imatrix", tmp_path / "absent.gguf", code=2)
    assert invoke(["smooth", "-q", "-m", str(path), "--imatrix", str(imatrix), "-o", str(imatrix)]) == 2
    with pytest.raises(BitladderError, match="overflow"):
        huge = tmp_path / "huge.gguf"
        data = bytearray(path.read_bytes())
        with GgufFile(path) as file:
            tensor = file.tensors["blk.0.ffn_down.weight"]
            at = file.data_start + tensor.offset
        data[at : at + tensor.nbytes] = np.full(tensor.elements, 60000, np.float16).tobytes()
        huge.write_bytes(data)
        smooth(huge, imatrix, tmp_path / "h.gguf", tmp_path / "hi.gguf")
    assert not (tmp_path / "h.gguf").exists()


@pytest.mark.parametrize(("after", "helps"), [(0.05, True), (0.0899, True), (0.095, False), (0.2, False)])
def test_a_gain_within_the_error_of_the_difference_is_none(after, helps):
    assert SmoothingTrial("Q4_K_M", before=0.1, after=after, error=0.01, tokens=100).helps is helps
