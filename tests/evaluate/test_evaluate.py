"""Perplexity and divergence of real files: bases, their errors, and llama-perplexity's figures."""

import ctypes
import dataclasses
import json
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner

from bitladder import evaluate as ev
from bitladder.cli.evaluate import eval_command
from bitladder.engine.native import llama
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate.base import cache
from bitladder.evaluate.base import hidden as base_module
from bitladder.evaluate.base.basefile import BaseFile
from bitladder.files import sha256_bytes
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, strings
from bitladder.text import Chunks, Text, load_text, text_chunks

# One thread: on a busy machine two wait for each other longer than the small model takes.
SETTINGS = ev.MeasureOptions(n_ctx=128, chunks=6, threads=1)
Q4_0, Q8_0 = 2, 7  # file types of llama_model_quantize


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    """A folder with the full model, two quants and a text."""
    made = tmp_path_factory.mktemp("evaluate")
    shutil.copy(tiny_gguf, made / "full.gguf")
    for number, name in ((Q4_0, "q4.gguf"), (Q8_0, "q8.gguf")):
        params = llama.llama_model_quantize_default_params()
        params.ftype = number
        assert llama.llama_model_quantize(os.fsencode(tiny_gguf), os.fsencode(made / name), ctypes.byref(params)) == 0
    (made / "test.txt").write_text(load_text("pydoc:test").text[:12_000], encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def text(folder):
    return load_text(str(folder / "test.txt"))


@pytest.fixture(scope="module")
def base_path(folder, text):
    path = folder / "given.base"
    ev.make_base(folder / "full.gguf", text, path, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6))
    return path


def test_chunks(folder, text):
    with SETTINGS.load(folder / "full.gguf") as model:
        cut = text_chunks(model, text, 128, chunks=6)
        whole = model.tokenize(text.text)
        assert (len(cut), cut.scored, cut.available) == (6, 63, len(whole) // 128)
        assert np.array_equal(cut.tokens.ravel(), whole[: 6 * 128])
        assert np.array_equal(cut.targets(1), whole[128 + 65 : 256])
        marked = Chunks(cut.tokens, 7, cut.available)
        assert marked.inputs(2)[0] == 7
        assert np.array_equal(marked.inputs(2)[1:], whole[257:384])
        assert np.array_equal(marked.inputs(), [marked.inputs(chunk) for chunk in range(6)])
        short = Text("short.txt", text.text[:300], "")
        with pytest.raises(
            BitladderError, match=r"short\.txt has [\d,]+ tokens, but chunks of 128 tokens need at least 256"
        ):
            text_chunks(model, short, 128)


def test_stray_bytes_reach_the_tokenizer(folder, tmp_path):
    (tmp_path / "raw.bin").write_bytes(b"abc \xff\xfe def " + b"abc def " * 5000)
    scores = ev.evaluate(
        folder / "full.gguf", load_text(str(tmp_path / "raw.bin")), ev.MeasureOptions(n_ctx=64, chunks=1)
    )
    assert scores.tokens_scored == 31


@pytest.mark.parametrize("wrong", [{"n_ctx": 2}, {"chunks": 0}, {"n_batch": 0}])
def test_impossible_numbers(wrong):
    with pytest.raises(UsageError):
        ev.MeasureOptions(**wrong)


def test_against_itself(folder, text, base_path):
    measured = ev.measure(folder / "full.gguf", text, SETTINGS, base=base_path)
    scores, tokens = measured.scores, measured.arrays
    assert 0 <= scores.kld.value < 1e-5
    assert np.abs(tokens["kld"]).max() < 1e-5
    assert scores.same_top_p.value == 1
    assert np.abs(tokens["nll"] - tokens["nll_base"]).max() < 1e-4
    assert scores.tokens_scored == len(tokens["kld"]) == 6 * 63


def test_batches_of_a_chunk_make_no_difference(folder, text, base_path):
    whole = ev.evaluate(folder / "q4.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6), base=base_path)
    parts = ev.evaluate(
        folder / "q4.gguf",
        text,
        ev.MeasureOptions(n_ctx=128, threads=1, chunks=6, n_batch=48, n_ubatch=32),
        base=base_path,
    )
    assert whole.kld.value > 1e-3
    assert parts.kld.value == pytest.approx(whole.kld.value, rel=1e-2)
    alone = ev.evaluate(folder / "q4.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6))
    assert alone.ppl.value == pytest.approx(whole.ppl.value, rel=1e-6)
    assert "kld" not in alone.to_json()


def test_a_base_made_in_batches_is_the_same(folder, text, base_path, tmp_path):
    ev.make_base(
        folder / "full.gguf",
        text,
        tmp_path / "parts.base",
        ev.MeasureOptions(n_ctx=128, threads=1, chunks=6, n_batch=48, n_ubatch=32),
    )
    one, other = BaseFile(base_path), BaseFile(tmp_path / "parts.base")
    assert one.header.dtype == "f16"
    assert one.header.exact
    assert np.array_equal(one.tokens, other.tokens)
    for chunk in range(6):
        np.testing.assert_allclose(one.hidden(chunk), other.hidden(chunk), atol=0.05)
        np.testing.assert_allclose(one.rows(chunk).nll, other.rows(chunk).nll, atol=1e-2)
    one.close()
    other.close()


def test_a_base_is_kept_beside_the_model_and_used_again(folder, text):
    model = folder / "full.gguf"
    path = ev.cache_path(model, text, 128)
    assert path.name == "full.test.txt.128.base"
    ev.load_or_compute_base(model, text, SETTINGS).close()
    made = path.stat().st_mtime_ns
    fewer = ev.MeasureOptions(n_ctx=128, chunks=3, threads=1)
    with ev.load_or_compute_base(model, text, fewer):
        assert path.stat().st_mtime_ns == made
    scores = ev.evaluate(folder / "q8.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=3), base=model)
    assert scores.chunks == 3
    # More chunks than the base has, and a damaged one: both are made again, as the user named neither file.
    with ev.load_or_compute_base(model, text, ev.MeasureOptions(n_ctx=128, chunks=7, threads=1)) as base:
        assert base.header.chunks == 7
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"BLBASE01" + whole[8:]):
        path.write_bytes(damaged)
        with ev.load_or_compute_base(model, text, SETTINGS) as base:
            assert base.header.chunks == 6


def test_a_base_that_does_not_fit(folder, text, base_path, monkeypatch):
    other = Text("other.txt", text.text, sha256_bytes(b"other"))
    with pytest.raises(BitladderError, match=r"given\.base .*text test\.txt, not other\.txt$"):
        ev.open_base(base_path, other, SETTINGS)
    with pytest.raises(BitladderError, match="context of 128 tokens, not 64$"):
        ev.open_base(base_path, text, ev.MeasureOptions(n_ctx=64, chunks=6, threads=1))
    with pytest.raises(BitladderError, match="6 chunks, not 8$"):
        ev.open_base(base_path, text, ev.MeasureOptions(n_ctx=128, chunks=8, threads=1))
    with pytest.raises(BitladderError, match=r"model full\.gguf, not q8\.gguf$"):
        ev.open_base(base_path, text, SETTINGS, ev.identify(folder / "q8.gguf"))
    with (
        ev.open_base(base_path, text, SETTINGS) as base,
        pytest.raises(BitladderError, match=r"text test\.txt, not other\.txt$"),
    ):
        ev.evaluate(folder / "q8.gguf", other, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6), base=base)
    monkeypatch.setattr(cache, "versions", lambda: {"llama_cpp_commit": "abc"})
    with pytest.raises(BitladderError, match=r"llama\.cpp commit \w+(-\w+)?, not abc$"):
        ev.open_base(base_path, text, SETTINGS)


def test_a_base_without_its_model(text, base_path, tmp_path):
    shutil.copy(base_path, tmp_path / "lone.base")
    with pytest.raises(BitladderError, match=r"needs the head of full\.gguf"):
        ev.open_base(tmp_path / "lone.base", text, SETTINGS)


@pytest.mark.parametrize("size", [3, 12, 200, 5_000, -1])
def test_a_truncated_base(base_path, tmp_path, size):
    (tmp_path / "cut.base").write_bytes(base_path.read_bytes()[:size])
    with pytest.raises(BitladderError, match=r"cut\.base .*(make it again|not a base)") as caught:
        BaseFile(tmp_path / "cut.base")
    assert "\n" not in str(caught.value)


def test_a_damaged_header(base_path, tmp_path):
    (tmp_path / "bad.base").write_bytes(base_path.read_bytes().replace(b'"n_ctx":128', b'"n_ctx":"x"', 1))
    with pytest.raises(BitladderError, match=r"damaged header \(n_ctx\)"):
        BaseFile(tmp_path / "bad.base")


def test_a_damaged_byte(base_path, text, tmp_path, folder):
    """A file that the user names is refused; one that bitladder keeps is made again."""
    whole = base_path.read_bytes()
    for place in (-3000, len(whole) - 1):
        (tmp_path / "bad.base").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place:][1:])
        with pytest.raises(BitladderError, match=r"bad\.base is damaged: delete it and make it again"):
            ev.open_base(tmp_path / "bad.base", text, SETTINGS, ev.identify(folder / "full.gguf"))


def test_logits_that_are_not_the_head_times_the_state(folder, text, tmp_path, monkeypatch):
    def see(self, multiplication, inputs, experts):
        self._parts.append(1.1 * inputs.reshape(-1, inputs.shape[-1]))

    monkeypatch.setattr(base_module.HiddenStates, "see", see)
    with pytest.raises(BitladderError, match=r"logits are not output\.weight × hidden state .*olmo2 change them"):
        ev.make_base(folder / "full.gguf", text, tmp_path / "x.base", ev.MeasureOptions(n_ctx=128, threads=1, chunks=2))
    assert not list(tmp_path.iterdir())


def test_another_vocabulary(folder, text, base_path, tmp_path):
    with GgufFile(folder / "q8.gguf") as file, (tmp_path / "foreign.gguf").open("wb") as stream:
        tokens = file.get("tokenizer.ggml.tokens")
        metadata = file.metadata | {"tokenizer.ggml.tokens": strings([*tokens[:-1], "foreign"])}
        plans = [TensorPlan(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]
        writer = GgufWriter(stream, metadata, plans)
        for tensor in file.tensors.values():
            writer.write(tensor.name, file.read(tensor))
        writer.finish()
    with pytest.raises(BitladderError, match=r"foreign\.gguf and the base full\.gguf have different vocabularies"):
        ev.evaluate(tmp_path / "foreign.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6), base=base_path)
    # A base that would have to be computed first is not begun.
    made = {"base": folder / "full.gguf", "base_file": tmp_path / "new.base"}
    with (
        mock.patch("bitladder.evaluate.base.hidden.make_base", side_effect=AssertionError),
        pytest.raises(BitladderError, match="different vocabularies"),
    ):
        ev.evaluate(tmp_path / "foreign.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6), **made)
    request = ev.EvalRequest((text,), ev.MeasureOptions(n_ctx=128, threads=1, chunks=6))
    with ev.load_or_compute_base(folder / "full.gguf", text, request.settings, path=tmp_path / "new.base") as base:
        request = dataclasses.replace(request, bases=(base,))
        with (
            mock.patch("bitladder.evaluate.several.measure", side_effect=AssertionError),
            pytest.raises(BitladderError, match="different vocabularies"),
        ):
            ev.evaluate_several([folder / "q8.gguf", tmp_path / "foreign.gguf"], request)


def test_command(folder, tmp_path):
    common = [
        "--base",
        str(folder / "full.gguf"),
        "-f",
        str(folder / "test.txt"),
        "-c",
        "128",
        "--chunks",
        "2",
        "-q",
        "-t",
        "1",
        "--noise-chunks",
        "0",
        "--cache",
        str(tmp_path / "cache"),
    ]
    models = ["-m", str(folder / "q4.gguf"), "-m", str(folder / "q8.gguf")]
    out = tmp_path / "scores.json"
    done = CliRunner().invoke(eval_command, [*models, *common, "--json", "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert [one["model"] for one in found] == ["q4.gguf", "q8.gguf"]
    assert found[0]["kld"]["value"] > found[1]["kld"]["value"] > 0
    assert set(found[0]["versions"]) == {"bitladder", "llama_cpp_python", "llama_cpp_commit"}
    assert str(folder) not in done.stdout
    plain = CliRunner().invoke(eval_command, [*models[:2], *common], catch_exceptions=False)
    assert plain.exit_code == 0
    assert "KLD mean" in plain.stdout
    assert "±" in plain.stdout


def numbers(label, output):
    found = re.search(rf"^{label}\s*:\s*(-?[\d.]+)%?(?:\s*±\s*([\d.]+))?", output, re.M)
    assert found, label
    return float(found[1]), float(found[2] or 0)


def test_figures_of_llama_perplexity(folder, text, base_path, tools, tmp_path):
    options = ["-f", folder / "test.txt", "-c", 128, "-b", 128, "-t", 1, "--chunks", 6]
    logits = tmp_path / "full.kld"
    full = ["-m", folder / "full.gguf", "--kl-divergence-base", logits]
    out = tools.run("llama-perplexity", *full, *options, until="Final estimate")
    alone = re.search(r"Final estimate: PPL = ([\d.]+)", out)
    assert logits.stat().st_size > 10 * base_path.stat().st_size
    quant = ["-m", folder / "q4.gguf", "--kl-divergence", "--kl-divergence-base", logits]
    out = tools.run("llama-perplexity", *quant, *options, until="^Same top p:")
    scores = ev.evaluate(folder / "q4.gguf", text, ev.MeasureOptions(n_ctx=128, threads=1, chunks=6), base=base_path)
    assert scores.ppl_base.value == pytest.approx(float(alone[1]), rel=1e-4)
    assert (scores.ppl.value, scores.ppl.error) == pytest.approx(numbers(r"Mean PPL\(Q\)", out), rel=1e-4)
    # The rest is against log-probabilities that the tool rounded to 16 bits, which shifts a KLD by some 1e-4.
    assert (scores.kld.value, scores.kld.error) == pytest.approx(numbers("Mean    KLD", out), rel=1e-2)
    shares = {"Maximum": "max", "99.9%": "p999", "99.0%": "p99", "95.0%": "p95", "90.0%": "p90", "Median ": "median"}
    shares |= {"10.0%": "p10", " 5.0%": "p05", " 1.0%": "p01", "Minimum": "min"}
    for label, field in shares.items():
        space = "   " if "%" in label else " "
        assert getattr(scores.kld, field) == pytest.approx(numbers(f"{label}{space}KLD", out)[0], rel=1e-2, abs=3e-4), (
            field
        )
        theirs = numbers(f"{label}{space}Δp", out)[0] / 100
        assert getattr(scores.delta_p, field) == pytest.approx(theirs, rel=1e-2, abs=2e-4), field
    assert scores.rho_ppl == pytest.approx(numbers(r"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\)", out)[0] / 100, abs=2e-4)
    ratio = (scores.ln_ppl_ratio.value, scores.ln_ppl_ratio.error)
    assert ratio == pytest.approx(numbers(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)", out), abs=1e-3)
    rms = (100 * scores.delta_p.rms.value, 100 * scores.delta_p.rms.error)
    assert rms == pytest.approx(numbers("RMS Δp", out), rel=1e-2)
    same = (100 * scores.same_top_p.value, 100 * scores.same_top_p.error)
    assert same == pytest.approx(numbers("Same top p", out), abs=0.6)


def test_base_scores_are_what_evaluating_the_base_gives(folder, tmp_path):
    text, full = load_text(str(folder / "test.txt")), folder / "full.gguf"
    ev.make_base(full, text, tmp_path / "base", ev.MeasureOptions(n_ctx=128, chunks=3, threads=1))
    settings = ev.MeasureOptions(n_ctx=128, chunks=3, threads=1)
    with ev.open_base(tmp_path / "base", text, settings, ev.identify(full)) as base:
        kept = ev.measure_base(base, text, settings).scores
    measured = ev.evaluate(full, text, ev.MeasureOptions(n_ctx=128, chunks=3, threads=1))
    assert kept.ppl.value == pytest.approx(measured.ppl.value, rel=1e-6)
    assert kept.ppl.error == pytest.approx(measured.ppl.error, rel=1e-5)
    assert (kept.sha256, kept.tokens_scored, kept.chunks) == (measured.sha256, measured.tokens_scored, 3)
