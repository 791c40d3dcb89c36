"""Second moments against transformers, the imatrix, and brute force; and what cannot be."""

import json
import sys

import numpy as np
import pytest
import torch
from heard import Heard

from bitladder.calibrate import (
    ImatrixOptions,
    MomentsFile,
    MomentsOptions,
    collect_imatrix,
    collect_moments,
    merge_moments,
    position_weights,
    read_imatrix,
    weighted_moments,
)
from bitladder.calibrate.gradients.modules import Modules
from bitladder.calibrate.moments.triangles import Correlations, pack_triangle, unpack_triangle
from bitladder.cli import invoke
from bitladder.engine import Context, Decoding, Model
from bitladder.errors import BitladderError, GradientsError, UsageError
from bitladder.text import Reading, spread_evenly, text_chunks

DECODING = Decoding(n_ctx=64, threads=1)
PLAIN, POSITIONS = MomentsOptions(weighting="tokens"), MomentsOptions(weighting="positions")
SMALL = {"reading": Reading(chunks=3), "decoding": DECODING}
# Where transformers has the input of a llama's weights.
PLACES = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj"}
PLACES |= {"attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}


@pytest.fixture
def weigh(monkeypatch):
    """Lets positions count what a test says: weights by weight's name, [n_ctx]."""
    module = sys.modules["bitladder.calibrate.moments_job"]
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


@pytest.mark.parametrize("width", [1, 2, 257])
def test_correlations_in_another_order_are_those_of_the_other_matrix(width):
    rng = np.random.default_rng(width)
    inputs = rng.standard_normal((3, 2 * width, width)).astype(np.float32) * np.logspace(-3, 3, width, dtype=np.float32)
    order = rng.permutation(width)
    matrices = [each.T @ each for each in inputs]
    ours = Correlations.of(np.stack([pack_triangle(each) for each in matrices])).ordered(order)
    theirs = Correlations.of(np.stack([pack_triangle(each[np.ix_(order, order)]) for each in matrices]))
    assert np.array_equal(ours.diagonals, theirs.diagonals)
    assert np.abs(ours.values.astype(float) - theirs.values).max() <= 2.0**-10  # M_ij and M_ji differ in a last digit


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
