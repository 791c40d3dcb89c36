"""Second moments against transformers, the imatrix, brute force, and themselves cut short, cut up and merged."""

import json
import sys
import threading

import numpy as np
import pytest
import tiny_models
import torch
from heard import Heard
from moe import write_moe

from bitladder.calibrate import (
    ImatrixOptions,
    MomentsFile,
    MomentsOptions,
    UnfinishedWork,
    collect_imatrix,
    collect_moments,
    merge_moments,
    position_weights,
    read_imatrix,
    weighted_moments,
)
from bitladder.calibrate.gradients.modules import Modules
from bitladder.calibrate.moments import passes
from bitladder.calibrate.moments.triangles import pack_triangle, sums_bytes, unpack_triangle
from bitladder.cli import invoke
from bitladder.convert import convert
from bitladder.engine import Context, Decoding, Model
from bitladder.errors import BitladderError, GradientsError, UsageError
from bitladder.text import Reading, Text, load_text, spread_evenly, text_chunks

DECODING = Decoding(n_ctx=64, threads=1)
PLAIN, POSITIONS = MomentsOptions(weighting="tokens"), MomentsOptions(weighting="positions")
SMALL = {"reading": Reading(chunks=3), "decoding": DECODING}
GIB = 2**30
# Where transformers has the input of a llama's weights.
PLACES = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj"}
PLACES |= {"attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def text(calibration_text):
    return Text("part.txt", load_text(str(calibration_text)).text[:3000], "0")


@pytest.fixture(scope="module")
def moe(tiny_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(tiny_gguf, path, experts=6)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A random Llama whose head is tied to the embeddings: the transformers model and its GGUF."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_models.train_byte_level(folder)
    model = tiny_models.llama(folder, tie_word_embeddings=True)
    convert(folder, folder / "tied.gguf", outtype="f32")
    return model, folder / "tied.gguf"


@pytest.fixture
def weigh(monkeypatch):
    """Lets positions count what a test says: weights by weight's name, [n_ctx]."""
    module = sys.modules["bitladder.calibrate.collect_moments"]
    return lambda weights: monkeypatch.setattr(module, "position_weights", lambda *_, **__: weights)


def rows_of(path, text, **what):
    with Model(path, vocab_only=True) as model:
        return text_chunks(model, text, **what).inputs()


def test_is_what_transformers_inputs_give(tied, text, weigh, tmp_path):
    model, path = tied
    rows = rows_of(path, text, n_ctx=64, chunks=3, spread=True)
    rng = np.random.default_rng(0)
    weights = {"blk.1.attn_v.weight": rng.random(64), "blk.0.ffn_up.weight": rng.random(64)}
    weights["blk.1.ffn_down.weight"] = np.repeat([20.0, 1.0, 0.0], [1, 40, 23])
    weigh(weights)
    collect_moments(path, [text], tmp_path / "m.gguf", options=POSITIONS, **SMALL)

    inputs, handles = {}, []
    names = {f"blk.{b}.{ours}.weight": f"model.layers.{b}.{hf}" for b in range(2) for ours, hf in PLACES.items()}
    for name, place in (names | {"token_embd.weight": "lm_head"}).items():
        hook = lambda _, given, __, name=name: inputs.__setitem__(name, given[0].numpy().astype(np.float64))  # noqa: E731
        handles.append(model.get_submodule(place).register_forward_hook(hook))
    with torch.no_grad():
        model(torch.from_numpy(rows.astype(np.int64)))
    with MomentsFile(tmp_path / "m.gguf") as moments:
        for name, x in inputs.items():
            w = np.broadcast_to(weights.get(name, np.ones(64)), (3, 64))
            expected = np.einsum("ct,ctj,ctk->jk", w / w.mean(), x, x) / x.shape[0] / x.shape[1]
            found = moments.read(name)
            # The library keeps keys and values in F16.
            assert np.abs(found.inputs[0] - expected).max() < 2e-3 * expected.max(), name
            assert found.counts.tolist() == [192] and found.outputs is None
        # Weights of one input share an entry where their tokens count alike.
        assert moments.entry("blk.0.attn_v.weight") == moments.entry("blk.0.attn_k.weight") == "blk.0.attn_q.weight"
        assert moments.entry("blk.1.attn_v.weight") == "blk.1.attn_v.weight"
        assert moments.provenance.weighting == "positions" and moments.provenance.chunk_count == 3


@pytest.mark.parametrize("which", ["tiny_gguf", "moe"])
def test_the_diagonal_is_the_imatrix_and_the_imatrix_beside_is_the_one_alone(which, request, text, tmp_path):
    path = request.getfixturevalue(which)
    reading, beside = Reading(chunks=3, spread=False), ImatrixOptions(process_output=True)
    result = collect_moments(
        path,
        [text],
        tmp_path / "m.gguf",
        reading=reading,
        decoding=DECODING,
        options=PLAIN.replace(imatrix=beside),
        imatrix=tmp_path / "b.gguf",
    )
    one_chunk = DECODING.replace(n_batch=64)
    collect_imatrix(path, [text], tmp_path / "i.gguf", reading=reading, decoding=one_chunk, options=beside)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "i.gguf").read_bytes()
    imatrix = read_imatrix(tmp_path / "i.gguf")
    with MomentsFile(tmp_path / "m.gguf") as moments:
        assert set(moments.names()) == imatrix.entries.keys()
        for name, entry in imatrix.entries.items():
            counts = moments.counts(name)
            diagonals = moments.read(name).inputs.diagonal(axis1=1, axis2=2)
            assert np.array_equal(counts, entry.counts)
            assert np.abs(diagonals * counts[:, None] - entry.sums).max() < 1e-5 * entry.sums.max(), name
    assert result.gaps == imatrix.gaps() and bool(result.gaps) == (which == "moe")


class Spy:
    """Keeps the inputs of experts, and which tokens went where."""

    def __init__(self):
        self.shown = []

    def wants(self, seen):
        return seen.experts

    def see(self, seen, inputs, experts):
        self.shown.append((seen.weight, inputs.astype(np.float64), experts))


def test_experts_are_brute_force_and_positions_continue_in_the_next_computation(moe, text, weigh, tmp_path):
    spy, profile = Spy(), np.repeat([8.0, 1.0, 2.0], [1, 39, 24])
    rows = rows_of(moe, text, n_ctx=64, chunks=3, spread=True)
    with Model(moe) as model, Context(model, Decoding(n_ctx=64, n_batch=32, threads=1), observer=spy) as context:
        for row in rows:
            context.clear()
            for first in (0, 32):
                positions = np.arange(first, first + 32)
                context.decode(row[positions], positions, np.zeros(32, int), np.ones(32, bool))
    names = {name for name, *_ in spy.shown}
    assert len(names) == 6
    weigh(dict.fromkeys(names, profile))
    decoding = DECODING.replace(n_ubatch=32)
    collect_moments(moe, [text], tmp_path / "m", reading=Reading(chunks=3), decoding=decoding, options=POSITIONS)
    sums = {name: [np.zeros((x.shape[2], x.shape[2])) for _ in range(6)] for name, x, _ in spy.shown}
    counts = {name: [0] * 6 for name in names}
    for index, (name, inputs, experts) in enumerate(spy.shown):
        first = 32 * (index // 6 % 2)
        for token, chosen in enumerate(experts):
            for slot, expert in enumerate(chosen):
                x = inputs[token, slot % inputs.shape[1]]
                sums[name][expert] += profile[first + token] / profile.mean() * np.outer(x, x)
                counts[name][expert] += 1
    with MomentsFile(tmp_path / "m") as moments:
        for name in names:
            found = moments.read(name)
            assert found.counts.tolist() == counts[name]
            expected = np.stack(sums[name]) / np.maximum(counts[name], 1)[:, None, None]
            assert np.abs(found.inputs - expected).max() < 5e-4 * expected.max()  # correlations are kept in F16
        assert counts["blk.1.ffn_up_exps.weight"][-1] == 0


@pytest.mark.parametrize("which", ["tied", "moe"])
def test_little_memory_takes_passes_and_gives_the_same_bytes(which, request, text, tmp_path, monkeypatch):
    path = request.getfixturevalue(which)
    path, memory = (path, 2 * sums_bytes(256)) if which == "moe" else (path[1], sums_bytes(96))
    collect_moments(path, [text], tmp_path / "a.gguf", imatrix=tmp_path / "ai.gguf", options=PLAIN, **SMALL)
    held = []
    original = passes.MomentCollector.__init__

    def counting(self, parts, pool):
        held.append(sum((part.stop - part.start) * sums_bytes(part.entry.input.width) for part in parts))
        original(self, parts, pool)

    monkeypatch.setattr(passes.MomentCollector, "__init__", counting)
    little = PLAIN.replace(memory=memory / GIB)
    few = collect_moments(path, [text], tmp_path / "b.gguf", imatrix=tmp_path / "bi.gguf", options=little, **SMALL)
    assert few.passes == len(held) > 3 and max(held) <= memory
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "ai.gguf").read_bytes() == (tmp_path / "bi.gguf").read_bytes()


def test_killed_in_two_passes_it_ends_with_the_same_bytes(tied, text, tmp_path, monkeypatch):
    path, decoded = tied[1], []
    memory = 7 * sums_bytes(64)
    options = SMALL | {"options": PLAIN.replace(memory=memory / GIB)}
    whole = collect_moments(path, [text], tmp_path / "a.gguf", imatrix=tmp_path / "ai.gguf", **options)
    assert whole.passes == 2
    original, kill_at = passes.watch_chunks, [2, 5]

    def dying(*arguments, **options):
        for done, kept in original(*arguments, **options):
            yield done, kept  # the state is saved before this goes on
            decoded.append(done)
            if len(decoded) in kill_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(passes, "watch_chunks", dying)
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    options["imatrix"] = tmp_path / "bi.gguf"
    for _ in kill_at:
        with pytest.raises(KeyboardInterrupt):
            collect_moments(path, [text], tmp_path / "b.gguf", **options)
        assert not (tmp_path / "b.gguf").exists() and (tmp_path / "b.gguf.parts").is_dir()
    collect_moments(path, [text], tmp_path / "b.gguf", **options)
    assert decoded == [1, 2, 3, 1, 2, 3]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "ai.gguf").read_bytes() == (tmp_path / "bi.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "ai.gguf", "b.gguf", "bi.gguf"]


@pytest.mark.parametrize("n_ubatch", [512, 32])
@pytest.mark.parametrize("which", ["tied", "moe"])
def test_threads_change_no_byte(which, n_ubatch, request, text, tmp_path):
    """One thread decodes chunk by chunk, two and three two chunks side by side."""
    path = request.getfixturevalue(which)
    path, files = path if which == "moe" else path[1], set()
    for threads in (1, 2, 3):
        out, beside = tmp_path / f"{threads}.gguf", tmp_path / f"{threads}.imatrix"
        decoding = Decoding(n_ctx=64, n_ubatch=n_ubatch, threads=threads)
        reading = Reading(chunks=7)
        collect_moments(path, [text], out, imatrix=beside, options=PLAIN, reading=reading, decoding=decoding)
        files.add(out.read_bytes() + beside.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("broken", [2, 3])
def test_an_error_in_a_chunk_ends_the_one_beside_it(tied, text, tmp_path, monkeypatch, broken):
    inputs = sys.modules["bitladder.calibrate.inputs"]
    original, row = inputs.decode_columns, rows_of(tied[1], text, n_ctx=64, chunks=6)[broken]

    def decode_columns(context, rows, first, stop):
        if np.array_equal(rows[0], row):
            raise BitladderError("this chunk is broken")
        original(context, rows, first, stop)

    monkeypatch.setattr(inputs, "decode_columns", decode_columns)
    options = {"options": PLAIN, "reading": Reading(chunks=6, spread=False)}
    with pytest.raises(BitladderError, match="this chunk is broken"):
        collect_moments(tied[1], [text], tmp_path / "m", decoding=DECODING.replace(threads=2), **options)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane ")]


def test_what_another_job_or_a_crash_left_is_not_used(tied, text, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    monkeypatch.setattr(UnfinishedWork, "due", lambda _: True)
    monkeypatch.setattr(passes, "write_imatrix", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        collect_moments(tied[1], [text], out, imatrix=tmp_path / "i", options=PLAIN, **SMALL)
    (tmp_path / "m.gguf.parts" / "state").write_bytes(b"PK\x03\x04 and then nothing")
    monkeypatch.undo()
    collect_moments(tied[1], [text], out, imatrix=tmp_path / "i", options=PLAIN, **SMALL)
    (tmp_path / "m.gguf.parts").mkdir()
    with pytest.raises(BitladderError, match=r"m\.gguf\.parts is in the way"):
        collect_moments(tied[1], [text], out, options=PLAIN, **SMALL)


def test_halves_merge_to_the_whole(moe, text, tmp_path):
    options = {"decoding": DECODING, "options": PLAIN}
    first, second = Reading(chunks=1, spread=False), Reading(chunks=3, from_chunk=1, spread=False)
    collect_moments(moe, [text], tmp_path / "whole", reading=Reading(chunks=4, spread=False), **options)
    collect_moments(moe, [text], tmp_path / "a", reading=first, **options)
    collect_moments(moe, [text], tmp_path / "b", reading=second, in_files=[tmp_path / "a"], **options)
    assert invoke(["calibrate", "-q", "--in-file", str(tmp_path / "b"), "-o", str(tmp_path / "c")]) == 0
    with MomentsFile(tmp_path / "b") as merged, MomentsFile(tmp_path / "c") as alone:
        assert alone.provenance == merged.provenance and alone.names() == merged.names()
        assert all(np.array_equal(alone.packed(name), merged.packed(name)) for name in merged.names())
        assert all(alone.entry(name) == merged.entry(name) for name in merged.names())
    with MomentsFile(tmp_path / "whole") as whole, MomentsFile(tmp_path / "b") as merged:
        assert merged.names() == whole.names() and merged.provenance.chunk_count == 4
        for name in whole.names():
            a, b = whole.read(name), merged.read(name)
            assert a.counts.tolist() == b.counts.tolist() and merged.entry(name) == whole.entry(name)
            assert np.abs(a.inputs - b.inputs).max() <= 1e-3 * a.inputs.max()


def test_few_tokens_leave_a_low_rank_and_nothing_negative(tied, text, tmp_path):
    collect_moments(
        tied[1], [text], tmp_path / "m", reading=Reading(chunks=2), decoding=DECODING.replace(n_ctx=16), options=PLAIN
    )
    with MomentsFile(tmp_path / "m") as moments:
        values = np.linalg.eigvalsh(moments.read("blk.1.ffn_down.weight").inputs[0].astype(np.float64))
    assert len(values) == 96 and values.min() > -2e-4 * values.max()  # correlations are kept in F16
    assert np.count_nonzero(values > 2e-4 * values.max()) <= 32


def test_chunks_are_spread(tied, text):
    for available, count in ((10, 10), (10, 3), (7, 1), (278, 40), (5, 4)):
        found = spread_evenly(available, count)
        gaps = np.diff(found)
        assert len(found) == count and found[0] <= available / count and found[-1] >= available - 1 - available / count
        assert not count > 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    every = rows_of(tied[1], text, n_ctx=64)
    some = rows_of(tied[1], text, n_ctx=64, chunks=3, from_chunk=2, spread=True)
    assert np.array_equal(some, every[2:][spread_evenly(len(every) - 2, 3)])
    assert (every[:, 0] == 0).all()  # BOS


def test_gradients_from_the_command_line(tied, text, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(text.text)
    arguments = ["calibrate", "-m", tied[1], "-f", tmp_path / "t.txt", "-c", 64, "--chunks", 2, "-t", 1, "--json"]
    files = ["-o", tmp_path / "m.gguf", "--imatrix", tmp_path / "i.gguf"]
    assert invoke([*map(str, arguments), *map(str, files)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["weighting"] == "gradients" and "weighted by gradients" in printed.err
    rows = rows_of(tied[1], text, n_ctx=64, chunks=2, spread=True)
    with MomentsFile(tmp_path / "m.gguf") as moments:
        expected = list(weighted_moments(tied[1], rows, threads=1))
        assert {one.name for one in expected} == set(moments.names())
        for one in expected:
            found = moments.read(one.name)
            assert np.allclose(found.inputs[0], one.inputs, rtol=1e-5, atol=3e-4 * one.inputs.max())
            assert (found.outputs is None) == (one.outputs is None) == (one.name == "token_embd.weight")
            assert found.outputs is None or np.allclose(found.outputs, one.outputs, atol=3e-4 * one.outputs.max())
            assert found.counts.tolist() == [128]
    collect_moments(
        tied[1],
        [text],
        tmp_path / "p.gguf",
        reading=Reading(chunks=2),
        decoding=DECODING,
        options=PLAIN,
        imatrix=tmp_path / "pi.gguf",
    )
    ours, theirs = read_imatrix(tmp_path / "i.gguf"), read_imatrix(tmp_path / "pi.gguf")
    assert all(np.array_equal(ours.entries[name].sums, entry.sums) for name, entry in theirs.entries.items())
    assert invoke(["calibrate", *(f"--in-file={tmp_path / n}.gguf" for n in "mp"), "-o", str(tmp_path / "x")]) == 1
    assert "weight tokens by gradients and by tokens" in capsys.readouterr().err


def test_positions_where_gradients_cannot_be_trusted(tied, text, weigh, tmp_path, monkeypatch):
    """Modules that compute other logits than the library: here these are taken to be capped."""
    monkeypatch.setattr(Modules, "after_head", lambda self, raw: torch.tanh(raw))
    weigh({"blk.0.attn_v.weight": np.linspace(2, 1, 64, dtype=np.float32)})
    heard = Heard()
    chosen = {"reading": Reading(chunks=2), "decoding": DECODING}
    result = collect_moments(tied[1], [text], tmp_path / "m.gguf", **chosen, progress=heard)
    assert result.weighting == "positions"
    assert "weighted by positions: tied.gguf: torch's logits differ from llama.cpp's by" in "".join(heard.lines)
    options = MomentsOptions(weighting="gradients")
    with pytest.raises(GradientsError, match="cannot be trusted"):
        collect_moments(tied[1], [text], tmp_path / "g.gguf", **chosen, options=options)
    assert not (tmp_path / "g.gguf").exists()


def test_positions_are_what_trying_them_says(moe, text, weigh, tmp_path):
    (tmp_path / "t.txt").write_text(text.text)
    arguments = ["calibrate", "-m", moe, "-f", tmp_path / "t.txt", "-c", 64, "--chunks", 2, "-t", 1]
    assert invoke([*map(str, arguments), "-o", str(tmp_path / "a"), "--weighting", "positions"]) == 0
    rows = rows_of(moe, text, n_ctx=64, chunks=2, spread=True)
    weights = position_weights(moe, rows, decoding=Decoding(threads=1))
    assert any(np.ptp(profile) > 0.1 for profile in weights.values())
    weigh(weights)
    collect_moments(moe, [text], tmp_path / "b", reading=Reading(chunks=2), decoding=DECODING, options=POSITIONS)
    with MomentsFile(tmp_path / "a") as a, MomentsFile(tmp_path / "b") as b:
        assert a.names() == b.names()
        for name in a.names():
            x, y = a.read(name).inputs, b.read(name).inputs
            assert np.abs(x - y).max() <= 1e-3 * y.max(), name


@pytest.mark.parametrize("width", [1, 2, 3, 257])
def test_triangles(width):
    half = np.random.default_rng(width).standard_normal((width, width)).astype(np.float32)
    matrix = half + half.T
    packed = pack_triangle(matrix)
    assert np.array_equal(packed, matrix[np.triu_indices(width)])
    assert np.array_equal(unpack_triangle(packed), matrix)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-f", "pydoc:test"], 2, "pass -m"),
        ([], 2, "--in-file"),
        (["-m", "absent.gguf", "-f", "pydoc:test"], 2, "absent.gguf"),
        (["-m", "MODEL", "-f", "absent.txt"], 2, "absent.txt"),
        (["-m", "MODEL", "-f", "pydoc:test", "-c", "8"], 2, "-c 8 is too small"),
        (["-m", "MODEL", "-f", "short.txt", "--weighting", "tokens"], 1, "short.txt has"),
        (["-m", "MODEL", "-f", "pydoc:test", "-o", "x", "--imatrix", "x"], 2, "the same file"),
        (["--in-file", "MODEL"], 1, "holds no second moments"),
        (["--in-file", "absent.gguf"], 2, "absent.gguf"),
        (["--imatrix", "x", "--in-file", "MODEL"], 2, "needs a text"),
    ],
)
def test_errors_are_one_line(arguments, code, message, tied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    assert invoke(["calibrate", *(str(tied[1]) if one == "MODEL" else one for one in arguments)]) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not (tmp_path / "moments.gguf").exists() and not (tmp_path / "x").exists()


def test_what_cannot_be(tied, moe, text, weigh, tmp_path):
    for odd in (np.ones(63), -np.ones(64), np.zeros(64), np.full(64, np.nan)):
        weigh({"blk.0.attn_q.weight": odd})
        with pytest.raises(BitladderError, match=r"weights of tokens for blk\.0\.attn_q\.weight"):
            collect_moments(tied[1], [text], tmp_path / "m", options=POSITIONS, **SMALL)
    with pytest.raises(UsageError, match="-ub 8 is too small"):
        collect_moments(tied[1], [text], tmp_path / "m", imatrix=tmp_path / "i", decoding=Decoding(n_ubatch=8))
    with pytest.raises(UsageError, match="need a text"):
        collect_moments(tied[1], [], tmp_path / "m")
    collect_moments(tied[1], [text], tmp_path / "a", options=PLAIN, **SMALL)
    collect_moments(moe, [text], tmp_path / "b", options=PLAIN, **SMALL)
    with pytest.raises(BitladderError, match="different models"):
        merge_moments(tmp_path / "c", [tmp_path / "a", tmp_path / "b"])
