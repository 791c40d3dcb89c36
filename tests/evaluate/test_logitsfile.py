"""llama-perplexity's files of log-probabilities: read, written, refused, and the figures they give."""

import ctypes
import math
import os
import re
import shutil
import struct
import types

import numpy as np
import pytest

from bitladder.engine import Context, Lanes, Workers
from bitladder.engine.native import llama
from bitladder.errors import BitladderError
from bitladder.evaluate import MeasureOptions
from bitladder.evaluate.base import logits_file
from bitladder.evaluate.base.logits_base import LogitsBase, check_logits, compare_logits, open_logits
from bitladder.evaluate.base.logits_file import LogitsFile, is_logits_file, pack_rows, write_logits_file
from bitladder.evaluate.token_scores import divergence_figures
from bitladder.text import Text, load_text

CTX, CHUNKS, SCORED, VOCAB = 64, 4, 31, 4096
SETTINGS = MeasureOptions(n_ctx=CTX, chunks=CHUNKS, threads=1)
ROW = 2 * (4 + VOCAB)  # bytes
RECORDS = 20 + 4 * CTX * CHUNKS


@pytest.fixture(scope="module")
def folder(tiny_gguf, tmp_path_factory):
    """The full model, a quant, a text and the full model's log-probabilities over it."""
    made = tmp_path_factory.mktemp("logits")
    shutil.copy(tiny_gguf, made / "full.gguf")
    params = llama.llama_model_quantize_default_params()
    params.ftype = 2  # Q4_0
    quant = os.fsencode(made / "q4.gguf")
    assert llama.llama_model_quantize(os.fsencode(tiny_gguf), quant, ctypes.byref(params)) == 0
    (made / "test.txt").write_text(load_text("pydoc:test").text[:9_000], encoding="utf-8")
    write_logits_file(made / "full.gguf", load_text(str(made / "test.txt")), made / "full.kld", SETTINGS)
    return made


@pytest.fixture(scope="module")
def text(folder):
    return load_text(str(folder / "test.txt"))


def compared(folder, text, settings=SETTINGS, path=None):
    with (
        open_logits(path or folder / "full.kld", text, settings, folder / "q4.gguf") as base,
        settings.load(folder / "q4.gguf") as model,
        Lanes(model, settings) as lanes,
    ):
        return compare_logits(lanes, base, len(base.chunks))


def by_hand(n_ctx, n_vocab, tokens, rows):
    """A file from its definition: rows of (scale, floor, codes)."""
    data = struct.pack("<8sIii", b"_logits_", n_ctx, n_vocab, len(tokens) // n_ctx) + struct.pack(
        f"<{len(tokens)}i", *tokens
    )
    for scale, floor, codes in rows:
        padded = list(codes) + [0] * (n_vocab % 2)
        data += struct.pack("<ff", scale, floor) + struct.pack(f"<{len(padded)}H", *padded)
    return data


def test_a_file_made_by_hand(tmp_path):
    # Five tokens: the number is odd, so that rows are padded. Chunks of 6: positions 3 and 4 are scored.
    rows = []
    probabilities = [[0.1, 0.2, 0.3, 0.4, 0.0], [0.7, 0.1, 0.1, 0.1, 0.0], [0.2] * 5, [0.0, 0.0, 0.5, 0.25, 0.25]]
    for row in probabilities:
        floor = -17.0
        scale = (math.log(max(row)) - floor) / 65535
        rows.append((scale, floor, [round((math.log(p) - floor) / scale) if p else 0 for p in row]))
    path = tmp_path / "hand.kld"
    path.write_bytes(by_hand(6, 5, [0, 1, 2, 3, 4, 0, 1, 1, 2, 2, 3, 3], rows))
    with LogitsBase(LogitsFile(path), None) as base:
        assert (len(base.chunks), base.chunks.n_ctx, base.chunks.scored, base.layout.n_vocab) == (2, 6, 2, 5)
        first, second = base.rows(0), base.rows(1)
        np.testing.assert_allclose(np.exp(-first.nll), [0.0, 0.7], atol=2e-4)  # targets 4 and 0
        np.testing.assert_allclose(np.exp(-second.nll), [0.2, 0.25], rtol=2e-4)  # 3 and 3
        assert list(first.top) + list(second.top) == [3, 0, 0, 2]
        np.testing.assert_allclose(base.mass(1), [1, 1], rtol=2e-4)
        index, block = base.logits(0, 1, 2).block(0, 0)
        assert (index, block.shape) == (0, (1, 5))
        np.testing.assert_allclose(np.exp(block[0]), probabilities[1], rtol=2e-4)


def test_rows_are_packed_as_defined():
    random = np.random.default_rng(3)
    logits = (6 * random.standard_normal((5, 1001))).astype(np.float32)
    logits[3, 7] = 40  # the others lie on the floor
    logits[4] = 2.5  # no range at all
    with Workers(2) as workers:
        packed = pack_rows(logits, workers)
    assert packed.shape == (5, 4 + 1002)
    assert not packed[:, -1].any()
    for row, values in zip(packed, logits.astype(np.float64), strict=True):
        scale, floor = struct.unpack("<ff", row[:4].tobytes())
        logs = values - values.max() - np.log(np.exp(values - values.max()).sum())
        kept = np.maximum(logs, logs.max() - 16)
        assert floor == pytest.approx(kept.min(), abs=1e-5)
        assert scale == pytest.approx((kept.max() - kept.min()) / 65535, rel=1e-5)
        np.testing.assert_allclose(floor + scale * row[4:-1], kept, atol=0.51 * scale + 1e-5)


def test_what_is_written_is_what_the_model_says(folder, text):
    with SETTINGS.load(folder / "full.gguf") as model:
        tokens = model.tokenize(text.text)[: CTX * CHUNKS]
        with Context(model, SETTINGS) as context, LogitsFile(folder / "full.kld") as file:
            assert (file.layout.n_ctx, file.layout.n_vocab, file.layout.chunks) == (CTX, VOCAB, CHUNKS)
            assert np.array_equal(file.tokens.ravel(), tokens)
            context.decode(tokens[CTX : 2 * CTX], range(CTX), [0] * CTX, [True] * CTX)
            logits = context.logits()[CTX // 2 : -1].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            codes, scale, floor = file.read(1)
            stored = scale[:, None] * codes + floor[:, None]
            np.testing.assert_allclose(stored, np.maximum(logs, logs.max(axis=1, keepdims=True) - 16), atol=2e-3)
    assert (folder / "full.kld").stat().st_size == RECORDS + CHUNKS * SCORED * ROW


# Fewer than 64 tokens at once take another kernel of attention, and the inputs of a quant's weights round otherwise
# then. So the reference decodes the same batches.
@pytest.mark.parametrize(("n_batch", "lowered"), [(CTX, 0), (CTX, 0.05), (48, 0)])
def test_divergence_is_the_sum_over_what_is_stored(folder, text, tmp_path, n_batch, lowered):
    # Stored probabilities need not sum to 1; here in the second case to e^−0.05.
    path, data = tmp_path / "lowered.kld", bytearray((folder / "full.kld").read_bytes())
    rows = np.frombuffer(data, "<f4", offset=RECORDS).reshape(CHUNKS * SCORED, ROW // 4)
    rows[:, 1] -= np.float32(lowered)
    path.write_bytes(data)
    settings = MeasureOptions(n_ctx=CTX, threads=1, n_batch=n_batch)  # without --chunks, all that the file has
    found = compared(folder, text, settings, path)
    assert len(found.kld) == CHUNKS * SCORED
    with settings.load(folder / "q4.gguf") as model, Context(model, settings) as context:
        with LogitsFile(path) as file:
            tokens, (codes, scale, floor) = file.tokens[2], file.read(2)
            base = (scale[:, None] * codes + floor[:, None]).astype(np.float64)
        logits = np.empty((0, VOCAB))
        for start in range(0, CTX, n_batch):
            part = range(start, min(start + n_batch, CTX))
            scored = [CTX // 2 <= position < CTX - 1 for position in part]
            context.decode(tokens[part], part, [0] * len(part), scored)
            logits = np.concatenate([logits, context.logits()])
    quant = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    terms = np.where(base > -16, np.exp(base) * (base - quant), 0)
    part = slice(2 * SCORED, 3 * SCORED)
    np.testing.assert_allclose(found.kld[part], terms.sum(axis=1), atol=2e-5)
    targets = tokens[CTX // 2 + 1 :]
    np.testing.assert_allclose(found.nll_base[part], -base[range(SCORED), targets], rtol=1e-6)
    np.testing.assert_allclose(found.nll[part], -quant[range(SCORED), targets], atol=1e-4)
    assert np.array_equal(found.same_top[part], quant.argmax(axis=1) == base.argmax(axis=1))


def test_what_does_not_fit(folder, text):
    path, model = folder / "full.kld", folder / "q4.gguf"
    with pytest.raises(BitladderError, match=r"full\.kld was made with -c 64, not 32$"):
        open_logits(path, text, MeasureOptions(n_ctx=32), model)
    with pytest.raises(BitladderError, match="has 4 chunks, not 6; use --chunks 4"):
        open_logits(path, text, MeasureOptions(n_ctx=CTX, chunks=6), model)
    other = Text("other.txt", text.text[:250] + "zebra" + text.text[250:], "")
    with pytest.raises(BitladderError, match=r"another text than other\.txt.* token \d+ of chunk [12] .*' ?z.*'$"):
        open_logits(path, other, SETTINGS, model)
    short = Text("short.txt", text.text[:450], "")
    with pytest.raises(BitladderError, match=r"another text than short\.txt.*"):
        open_logits(path, short, SETTINGS, model)
    with pytest.raises(BitladderError, match=r"cannot read .*absent\.kld: No such file"):
        LogitsFile(folder / "absent.kld")


def test_another_vocabulary_or_bos(folder, text, tmp_path):
    (tmp_path / "small.kld").write_bytes(by_hand(6, 5, [0] * 6, [(1e-4, -6.5, [65535, 0, 0, 0, 0])] * 2))
    with pytest.raises(BitladderError, match=r"vocabulary of 5 tokens, but q4\.gguf has 4096"):
        open_logits(tmp_path / "small.kld", text, MeasureOptions(n_ctx=6), folder / "q4.gguf")
    with (
        SETTINGS.load(folder / "q4.gguf") as model,
        LogitsBase(LogitsFile(folder / "full.kld"), 5) as base,
        pytest.raises(BitladderError, match=r"q4\.gguf begins a text with another token"),
    ):
        check_logits(base, model, text, SETTINGS)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (4, "is not a file of log-probabilities"),
        (15, "inside its header"),
        (200, "inside its tokens"),
        (RECORDS + 5, "inside chunk 1 of 4"),
        (RECORDS + 2 * SCORED * ROW, "inside chunk 3 of 4"),
        (-1, "inside chunk 4 of 4"),
    ],
)
def test_truncated(folder, tmp_path, size, said):
    (tmp_path / "cut.kld").write_bytes((folder / "full.kld").read_bytes()[:size])
    with pytest.raises(BitladderError, match=rf"cut\.kld .*{said}") as caught:
        LogitsFile(tmp_path / "cut.kld")
    assert "\n" not in str(caught.value)


def test_damaged(folder, text, tmp_path):
    data, path = (folder / "full.kld").read_bytes(), tmp_path / "bad.kld"
    path.write_bytes(data + b"\0")
    with pytest.raises(BitladderError, match="after its last chunk"):
        LogitsFile(path)
    path.write_bytes(data[:12] + struct.pack("<i", -3) + data[16:])
    with pytest.raises(BitladderError, match="damaged header .*vocabulary of -3"):
        LogitsFile(path)
    place = 20 + 4 * (CTX + 3)
    path.write_bytes(data[:place] + struct.pack("<i", VOCAB) + data[place + 4 :])
    with pytest.raises(BitladderError, match="token 3 of chunk 2 is 4096, but the vocabulary has 4096"):
        LogitsFile(path)
    # A hole, as a disk that was full or a copy that was cut off leaves it.
    place = RECORDS + SCORED * ROW + 6 * ROW
    path.write_bytes(data[:place] + bytes(ROW) + data[place + ROW :])
    with pytest.raises(BitladderError, match="row 7 of chunk 2 sum to 4.1e\\+03"):
        compared(folder, text, path=path)


def test_is_logits_file(folder):
    assert is_logits_file(folder / "full.kld")
    assert not is_logits_file(folder / "q4.gguf")
    assert not is_logits_file(folder)


def test_no_room_and_no_half_file(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(logits_file.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=300_000))
    with pytest.raises(BitladderError, match=r"x\.kld needs 1 MB and the disk has 0 MB free; use fewer --chunks"):
        write_logits_file(folder / "full.gguf", text, tmp_path / "new" / "x.kld", SETTINGS)
    monkeypatch.undo()

    def fail(logits, workers):
        raise KeyboardInterrupt

    monkeypatch.setattr(logits_file, "pack_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        write_logits_file(folder / "full.gguf", text, tmp_path / "x.kld", SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_ctx", [64, 97])
def test_bytes_of_llama_perplexity(folder, text, tools, tmp_path, n_ctx):
    options = ["-f", folder / "test.txt", "-c", n_ctx, "-b", n_ctx, "-t", 1, "--chunks", 3]
    tools.run("llama-perplexity", "-m", folder / "full.gguf", "--kl-divergence-base", tmp_path / "theirs", *options)
    write_logits_file(folder / "full.gguf", text, tmp_path / "ours", MeasureOptions(n_ctx=n_ctx, chunks=3, threads=1))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_figures_of_llama_perplexity(folder, text, tools):
    options = ["-f", folder / "test.txt", "-c", CTX, "-b", CTX, "-t", 1, "--kl-divergence"]
    arguments = ["-m", folder / "q4.gguf", *options, "--kl-divergence-base", folder / "full.kld"]
    out = tools.run("llama-perplexity", *arguments, until="^Same top p:")
    figures = divergence_figures(compared(folder, text))

    def theirs(label):
        found = re.search(rf"^{label}\s*:\s*(-?[\d.]+)%?(?:\s*±\s*([\d.]+))?", out, re.M)
        assert found, label
        return [float(number) for number in found.groups() if number]

    def ours(figure, scale=1):
        return [scale * figure.value, scale * figure.error]

    last = 1.1e-6  # all printed digits, but for the rounding of the last
    assert ours(figures["ppl"]) == pytest.approx(theirs(r"Mean PPL\(Q\)"), abs=1e-4)
    assert ours(figures["ppl_base"]) == pytest.approx(theirs(r"Mean PPL\(base\)"), abs=1e-4)
    assert ours(figures["ln_ppl_ratio"]) == pytest.approx(theirs(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"), abs=last)
    assert [100 * figures["rho_ppl"]] == pytest.approx(theirs(r"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\)"), abs=0.0051)
    assert ours(figures["kld"]) == pytest.approx(theirs("Mean    KLD"), abs=last)
    shares = {"Maximum": "max", "99.9%  ": "p999", "90.0%  ": "p90", "Median ": "median", " 1.0%  ": "p01"}
    for label, field in (shares | {"Minimum": "min"}).items():
        assert [getattr(figures["kld"], field)] == pytest.approx(theirs(f"{label} KLD"), abs=2 * last)
        assert [100 * getattr(figures["delta_p"], field)] == pytest.approx(theirs(f"{label} Δp"), abs=0.0011)
    assert ours(figures["delta_p"].mean, 100) == pytest.approx(theirs("Mean    Δp"), abs=0.0011)
    assert ours(figures["delta_p"].rms, 100) == pytest.approx(theirs("RMS Δp"), abs=0.0011)
    assert ours(figures["same_top_p"], 100) == pytest.approx(theirs("Same top p"), abs=0.0011)
