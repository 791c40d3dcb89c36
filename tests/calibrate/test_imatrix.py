"""The importance matrix against llama-imatrix, brute force, and itself cut short."""

import struct

import numpy as np
import pytest
from heard import Heard
from moe import write_moe
from rewritten import rewritten

from bitladder.calibrate import (
    Imatrix,
    ImatrixEntry,
    ImatrixOptions,
    MomentsOptions,
    UnfinishedWork,
    collect_imatrix,
    collect_moments,
    merge_imatrices,
    read_imatrix,
    write_imatrix,
)
from bitladder.calibrate.collect_imatrix import BatchSquares, ImatrixSums
from bitladder.calibrate.coverage import tokens_needed
from bitladder.calibrate.inputs import model_inputs
from bitladder.engine import Context, Decoding, Model, Multiplication
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import GgufFile
from bitladder.text import Reading, Text, load_text, text_chunks

SHORT = Decoding(n_ctx=128)


def first(chunks, from_chunk=0):
    return Reading(chunks=chunks, from_chunk=from_chunk, spread=False)


@pytest.fixture(scope="module")
def moe(tiny_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(tiny_gguf, path)
    return path


@pytest.fixture(scope="module")
def text(calibration_text):
    return load_text(str(calibration_text))


def equal(ours: Imatrix, theirs: Imatrix, tolerance: float = 2e-5) -> None:
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in theirs.entries.items():
        assert ours.entries[name].counts.tolist() == entry.counts.tolist(), name
        # One token of another rounding can choose another expert: compare with the largest sum of the weight.
        assert np.abs(ours.entries[name].sums - entry.sums).max() <= tolerance * entry.sums.max(), name


@pytest.mark.parametrize("which", ["tiny_gguf", "moe"])
def test_equals_llama_imatrix(which, request, tools, calibration_text, text, tmp_path):
    model = request.getfixturevalue(which)
    arguments = ["-m", model, "-f", calibration_text, "-c", 256, "--chunks", 6, "--no-ppl", "--process-output"]
    tools.run("llama-imatrix", *arguments, "-o", tmp_path / "theirs.gguf")
    result = collect_imatrix(
        model,
        [text],
        tmp_path / "ours.gguf",
        reading=first(6),
        decoding=Decoding(n_ctx=256),
        options=ImatrixOptions(process_output=True),
    )
    ours, theirs = read_imatrix(tmp_path / "ours.gguf"), read_imatrix(tmp_path / "theirs.gguf")
    equal(ours, theirs)
    assert result.chunks == 6
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    assert result.gaps == theirs.gaps() and bool(result.gaps) == (which == "moe")


@pytest.mark.parametrize("chunks", [1, 9])
def test_threads_change_no_byte(tiny_gguf, text, tmp_path, chunks):
    """Batches of two chunks: one thread decodes one after the other, two and three two batches side by side."""
    files = set()
    for threads in (1, 2, 3):
        decoding = SHORT.replace(n_batch=256, threads=threads)
        collect_imatrix(tiny_gguf, [text], tmp_path / "i", reading=first(chunks), decoding=decoding)
        files.add((tmp_path / "i").read_bytes())
    assert len(files) == 1


def test_their_tool_reads_ours_and_we_read_theirs_in_both_formats(tools, tiny_gguf, text, tmp_path):
    collect_imatrix(tiny_gguf, [text], tmp_path / "a.gguf", reading=first(3), decoding=SHORT)
    collect_imatrix(
        tiny_gguf, [text], tmp_path / "a.dat", reading=first(3), decoding=SHORT, options=ImatrixOptions(form="dat")
    )
    for form in ("gguf", "dat"):
        out = tmp_path / f"theirs.{form}"
        tools.run(
            "llama-imatrix",
            "-m",
            tiny_gguf,
            "--in-file",
            tmp_path / f"a.{form}",
            "-c",
            128,
            "-o",
            out,
            "--output-format",
            form,
        )
        back = read_imatrix(out)
        for name, entry in read_imatrix(tmp_path / f"a.{form}").entries.items():
            assert np.allclose(back.entries[name].means(), entry.means(), rtol=1e-6)


def test_expert_sums_are_brute_force(moe, text):
    """Every expert's sums, recomputed token by token in float64 from what the engine shows."""
    shown = []

    class Both(BatchSquares):
        def see(self, seen: Multiplication, inputs, experts):
            if experts is not None:
                shown.append((seen, inputs.astype(np.float64), experts))
            super().see(seen, inputs, experts)

    with Model(moe) as model:
        collector, tokens = ImatrixSums(model_inputs(model)), model.tokenize(text.text)[:128]
        observer = Both(collector.entries)
        with Context(model, SHORT, observer=observer) as context:
            context.decode(tokens, np.arange(128), np.zeros(128, int), np.ones(128, bool))
        collector.add(observer.take())
    assert len(shown) == 6
    for seen, inputs, experts in shown:
        sums, counts = np.zeros((8, inputs.shape[2])), np.zeros(8, int)
        for token, chosen in enumerate(experts):
            for slot, expert in enumerate(chosen):
                sums[expert] += inputs[token, slot % inputs.shape[1]] ** 2
                counts[expert] += 1
        assert collector.entries[seen.weight].counts.tolist() == counts.tolist()
        assert np.allclose(collector.entries[seen.weight].sums, sums, rtol=1e-5)
        assert counts.sum() == 2 * 128
    assert collector.entries["blk.1.ffn_up_exps.weight"].counts[-1] == 0


def test_the_others_stand_in_for_an_expert_without_tokens(moe, text, tmp_path):
    heard = Heard()
    first_file, second, merged = (tmp_path / f"{name}.gguf" for name in ("a", "b", "merged"))
    collect_imatrix(moe, [text], first_file, reading=first(2), decoding=SHORT, progress=heard)
    name = "blk.1.ffn_down_exps.weight"
    entry = read_imatrix(first_file).entries[name]
    assert entry.unreached() == [7] and not entry.sums[7].any()
    expected = entry.sums[:7].sum(0, dtype=np.float64) / entry.counts[:7].sum()
    np.testing.assert_allclose(entry.means()[7], expected, rtol=1e-6)
    # The file says so to llama-quantize, which rounds this count up.
    with GgufFile(first_file) as file:
        counts, sums = (file.read(file.tensors[name + part]).view(np.float32) for part in (".counts", ".in_sum2"))
    assert counts[7, 0] == 0.5 and np.array_equal(sums[7], entry.means()[7])
    (warning,) = heard.warnings
    assert "block 1: 1 of 8 experts never reached in ffn_gate_exps, ffn_up_exps, ffn_down_exps: 7" in warning
    assert "an estimated 512 tokens of such text would reach them (256 were read)" in warning
    # What stands in is no token: it is not added up.
    collect_imatrix(moe, [text], second, reading=first(1, from_chunk=2), decoding=SHORT)
    merge_imatrices(merged, [first_file, second], n_ctx=128)
    collect_imatrix(moe, [text], tmp_path / "whole.gguf", reading=first(3), decoding=SHORT)
    equal(read_imatrix(merged), read_imatrix(tmp_path / "whole.gguf"))
    again = read_imatrix(merged).entries[name]
    np.testing.assert_allclose(again.means()[7], again.sums[:7].sum(0) / again.counts[:7].sum(), rtol=1e-5)


def test_calibration_goes_on_until_experts_have_their_tokens(moe, text, tmp_path):
    def choose_all(name, values):
        return np.vstack([values[:7], values[:1] * 1.1]) if name == "blk.1.ffn_gate_inp.weight" else values

    without_dead = rewritten(moe, tmp_path / "alive.gguf", choose_all, np.float16)
    counts = []
    for chunk in range(4):
        out = tmp_path / "n.gguf"
        collect_imatrix(without_dead, [text], out, reading=first(1, from_chunk=chunk), decoding=SHORT)
        entries = read_imatrix(out).entries.values()
        counts.append(np.concatenate([entry.counts for entry in entries if len(entry.counts) > 1]))
    fewest = np.cumsum(counts, axis=0).min(axis=1)  # tokens of the expert with the fewest, after so many chunks
    wanted = int(fewest[3])
    needed = 1 + int(np.flatnonzero(fewest >= wanted)[0])
    assert needed > 2
    for layout in ({}, {"n_batch": 128}):
        reading = first(1).replace(expert_coverage=wanted)
        result = collect_imatrix(
            without_dead, [text], tmp_path / "c.gguf", reading=reading, decoding=SHORT.replace(**layout)
        )
        assert result.chunks == needed
    moments = collect_moments(
        without_dead,
        [text],
        tmp_path / "m.gguf",
        reading=reading,
        decoding=SHORT,
        options=MomentsOptions(weighting="tokens"),
    )
    assert moments.chunks == needed
    # An expert that the router never chooses: the text ends.
    heard, short = Heard(), Text.of("short", text.text[:3000])
    result = collect_imatrix(moe, [short], tmp_path / "d.gguf", reading=reading, decoding=SHORT, progress=heard)
    with Model(moe, vocab_only=True) as model:
        assert result.chunks == len(model.tokenize(short.text)) // 128
    assert f"block 1: 1 of 8 experts with fewer than {wanted} tokens" in heard.warnings[0]


def test_further_chunks_are_those_that_were_not_read(moe, text):
    other = load_text("pydoc:test")
    short = [Text.of("a", text.text[:6000]), Text.of("b", other.text[:9000])]
    with Model(moe, vocab_only=True) as model:
        for spread in (False, True):
            reading = Reading(chunks=3, spread=spread)
            rows, further = reading.rows(model, short, 64), reading.further(model, short, 64)
            whole = Reading().rows(model, short, 64)
            assert sorted(map(tuple, np.concatenate([rows, further]))) == sorted(map(tuple, whole))
            assert not reading.replace(chunks=None).further(model, short, 64).size
            counts = [len(text_chunks(model, each, 64)) - 3 for each in short]
            places = [whole.tolist().index(row) for row in further.tolist()]
            assert [place >= counts[0] + 3 for place in places[:6]] == [False, True] * 3


def test_the_text_that_would_reach_an_expert_is_estimated():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        shares = rng.lognormal(0, 1.5, 64)
        shares /= shares.sum()
        counts = rng.multinomial(1500, shares)
        if (counts == 0).any():
            estimate = tokens_needed(counts, 1500, 10)
            ratios.append(estimate / (10 / shares.min()))  # tokens after which the rarest has ten in the mean
    assert len(ratios) > 20
    assert 0.5 < np.median(ratios) < 2 and np.quantile(np.abs(np.log(ratios)), 0.9) < np.log(4)
    assert tokens_needed(np.array([0, 0, 5, 7]), 100, 1) is None
    assert tokens_needed(np.array([20, 10, 40]), 100, 5) == 100


def test_batches_and_sides_do_not_matter(tiny_gguf, text, tmp_path):
    for index, layout in enumerate([{}, {"n_batch": 128}, {"n_batch": 64, "n_ubatch": 64}]):
        collect_imatrix(
            tiny_gguf, [text], tmp_path / f"{index}.gguf", reading=first(4), decoding=SHORT.replace(**layout)
        )
        equal(read_imatrix(tmp_path / f"{index}.gguf"), read_imatrix(tmp_path / "0.gguf"), 1e-3)


def test_two_texts_are_the_merge_of_each(tiny_gguf, text, tmp_path):
    other = load_text("pydoc:test")
    collect_imatrix(tiny_gguf, [text], tmp_path / "a.gguf", reading=first(2), decoding=SHORT)
    collect_imatrix(
        tiny_gguf, [other], tmp_path / "b.gguf", reading=first(3), decoding=SHORT, in_files=[tmp_path / "a.gguf"]
    )
    collect_imatrix(tiny_gguf, [text, other], tmp_path / "both.gguf", reading=first(3), decoding=SHORT)
    collect_imatrix(tiny_gguf, [text], tmp_path / "c.gguf", reading=first(1, from_chunk=2), decoding=SHORT)
    inputs = [tmp_path / "b.gguf", tmp_path / "c.gguf"]
    merged = merge_imatrices(tmp_path / "merged.gguf", inputs, n_ctx=128)
    assert merged.chunks == 6
    # Other chunks side by side round the attention differently.
    equal(read_imatrix(tmp_path / "merged.gguf"), read_imatrix(tmp_path / "both.gguf"), 1e-3)


def test_an_interrupted_run_ends_with_the_same_bytes(tiny_gguf, text, tmp_path, monkeypatch):
    options = {"reading": first(6), "decoding": SHORT.replace(n_batch=128)}
    collect_imatrix(tiny_gguf, [text], tmp_path / "whole.gguf", **options)
    saved = []
    original = UnfinishedWork.save_state

    def interrupted(self, label, done, arrays):
        saved.append(done)
        original(self, label, done, arrays)
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    monkeypatch.setattr(UnfinishedWork, "save_state", interrupted)
    out = tmp_path / "cut.gguf"
    with pytest.raises(KeyboardInterrupt):
        collect_imatrix(tiny_gguf, [text], out, **options)
    assert not out.exists() and (tmp_path / "cut.gguf.parts").is_dir()
    saved.clear()
    monkeypatch.setattr(UnfinishedWork, "save_state", lambda _, label, done, arrays: saved.append(done))
    collect_imatrix(tiny_gguf, [text], out, **options)
    assert saved == [4, 5, 6]
    assert out.read_bytes().replace(b"cut", b"whole") == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "cut.gguf.parts").exists()


@pytest.mark.parametrize("damage", ["no zip", "one array of another shape"])
def test_a_damaged_state_is_not_used(damage, tiny_gguf, text, tmp_path, monkeypatch):
    out, options = tmp_path / "a.gguf", {"reading": first(3), "decoding": SHORT.replace(n_batch=128)}
    collect_imatrix(tiny_gguf, [text], tmp_path / "whole.gguf", **options)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    original = UnfinishedWork.save_state

    def damaging(self, label, done, arrays):
        names = list(arrays)
        wrong = dict(arrays) | ({names[-1]: np.zeros(999)} if damage != "no zip" else {})
        original(self, label, done, wrong)
        if damage == "no zip":
            (self.folder / "state").write_bytes(b"PK\x03\x04 and then nothing")
        raise KeyboardInterrupt

    monkeypatch.setattr(UnfinishedWork, "save_state", damaging)
    with pytest.raises(KeyboardInterrupt):
        collect_imatrix(tiny_gguf, [text], out, **options)
    monkeypatch.undo()
    collect_imatrix(tiny_gguf, [text], out, **options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_errors(tiny_gguf, moe, text, tmp_path):
    with pytest.raises(BitladderError, match="chunks of 512 tokens need at least 1,024"):
        collect_imatrix(tiny_gguf, [type(text)("short", "a few words", "0")], tmp_path / "x")
    with pytest.raises(BitladderError, match="--from-chunk 999"):
        collect_imatrix(tiny_gguf, [text], tmp_path / "x", reading=Reading(from_chunk=999, spread=False))
    for decoding, message in (
        (Decoding(n_ctx=8), "-c 8"),
        (Decoding(n_ubatch=8), "-ub 8"),
        (Decoding(n_batch=8), "-b 8"),
    ):
        with pytest.raises(UsageError, match=f"{message} is too small: calibration needs at least 16"):
            collect_imatrix(tiny_gguf, [text], tmp_path / "x", decoding=decoding)
    with pytest.raises(UsageError, match="needs a text"):
        collect_imatrix(tiny_gguf, [], tmp_path / "x")
    with pytest.raises(BitladderError, match="no such imatrix"):
        read_imatrix(tmp_path / "absent")
    with pytest.raises(BitladderError, match=r"general\.type is None|not an imatrix"):
        read_imatrix(tiny_gguf)
    (tmp_path / "junk").write_bytes(b"\x05\x00\x00\x00junk and more junk")
    with pytest.raises(BitladderError, match="neither|truncated"):
        read_imatrix(tmp_path / "junk")
    damaged = Imatrix({"w": ImatrixEntry(np.array([[1.0, np.nan]]), np.array([3]))}, [], 1, 512)
    write_imatrix(damaged, tmp_path / "nan.gguf")
    with pytest.raises(BitladderError, match="w has a value that is not finite at index 1"):
        read_imatrix(tmp_path / "nan.gguf")
    collect_imatrix(tiny_gguf, [text], tmp_path / "a.gguf", reading=first(2), decoding=SHORT)
    collect_imatrix(moe, [text], tmp_path / "b.gguf", reading=first(2), decoding=SHORT)
    one, two = read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "b.gguf")
    two.entries["blk.0.attn_q.weight"].sums = np.ones((1, 64))
    with pytest.raises(BitladderError, match="two models"):
        one.add(two)


def test_leaving_the_head_out_changes_nothing_else(tiny_gguf, text):
    found, logits = [], []
    for skip_head in (False, True):
        with Model(tiny_gguf) as model:
            collector, tokens = ImatrixSums(model_inputs(model)), model.tokenize(text.text)[:256]
            observer = collector.observer()
            with Context(model, Decoding(n_ctx=256), observer=observer, skip_head=skip_head) as context:
                context.decode(tokens, np.arange(256), np.zeros(256, int), np.ones(256, bool))
                logits.append(context.logits().copy())
            collector.add(observer.take())
        found.append(collector.entries)
    assert not np.allclose(*logits, atol=1)  # without the head they are whatever lay in that memory
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name].sums, entry.sums) for name, entry in found[1].items())


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_negative_count_is_refused(tmp_path, form):
    """Nothing can be merged with it, and no file can be written."""
    path = tmp_path / f"i.{form}"
    write_imatrix(Imatrix({"w": ImatrixEntry(np.ones((1, 4)), np.array([3]))}, ["t"], 1, 512), path, form=form)
    data = path.read_bytes()
    three = struct.pack("<f", 3) if form == "gguf" else b"w" + struct.pack("<i", 1)
    less = struct.pack("<f", -3) if form == "gguf" else b"w" + struct.pack("<i", -1)
    assert data.count(three) == 1
    path.write_bytes(data.replace(three, less))
    with pytest.raises(BitladderError, match=rf"i\.{form}: w has the negative count -\d; compute it again"):
        read_imatrix(path)


def test_a_negative_number_of_chunks_is_refused(tmp_path):
    path = tmp_path / "i.dat"
    write_imatrix(Imatrix({"w": ImatrixEntry(np.ones((1, 4)), np.array([3]))}, ["t"], 7, 512), path, form="dat")
    data = path.read_bytes()
    end = struct.pack("<ii", 7, 1) + b"t"
    assert data.endswith(end)
    path.write_bytes(data.removesuffix(end) + struct.pack("<ii", -7, 1) + b"t")
    with pytest.raises(BitladderError, match="the file has the negative count -7"):
        read_imatrix(path)


def test_large_counts_fit_into_the_old_format(tmp_path):
    path = tmp_path / "i.dat"
    large = Imatrix({"w": ImatrixEntry(np.full((1, 4), 2.0**50), np.array([2**49]))}, ["t"], 2**32 - 1, 1)
    write_imatrix(large, path, form="dat")
    assert np.allclose(read_imatrix(path).entries["w"].means(), 2.0)
