"""The tables of docs/evidence.md: ratios with their errors, and which file is the best rival."""

import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import evidence
import evidence_fit
import evidence_methods
import evidence_page


@pytest.fixture
def rows_on_disk(tmp_path):
    """Two rows whose KLD of each token, on two texts, is known."""
    random = np.random.default_rng(0)
    theirs = {f"{domain}.kld": random.gamma(2.0, size=4000) for domain in ("a", "b")}
    ours = {name: 0.4 * values + 0.1 * random.gamma(1.0, size=values.size) for name, values in theirs.items()}
    for key, arrays in (("ours" * 6, ours), ("them" * 6, theirs)):
        np.savez_compressed(tmp_path / f"{key}.npz", **arrays)
    rows = ({"key": "ours" * 6, "method": "ours", "mean": {}}, {"key": "them" * 6, "method": "theirs", "mean": {}})
    bench = SimpleNamespace(work=tmp_path, settings=SimpleNamespace(chunks=4, n_ctx=2048))
    return bench, rows, ours, theirs


def test_ratios_and_their_errors_are_those_of_a_bootstrap(rows_on_disk):
    bench, rows, ours, theirs = rows_on_disk
    pair = evidence.Evidence.pair(bench, *rows)
    random, ratios, differences = np.random.default_rng(1), [], []
    for _ in range(400):
        drawn = {name: random.integers(0, 4000, 4000) for name in ours}
        mine, others = (sum(each[name][drawn[name]].mean() for name in ours) / 2 for each in (ours, theirs))
        ratios.append(mine / others)
        differences.append(mine - others)
    assert pair["ratio"]["value"] == pytest.approx(np.mean(ratios), rel=1e-2)
    assert pair["ratio"]["error"] == pytest.approx(np.std(ratios), rel=0.15)
    assert pair["difference"]["error"] == pytest.approx(np.std(differences), rel=0.15)
    assert pair["texts"]["a"]["value"] == pytest.approx(ours["a.kld"].mean() / theirs["a.kld"].mean())


def test_a_text_may_have_fewer_chunks_than_are_measured(tmp_path):
    """Errors are of chunks on one text, and of tokens on one with too few chunks."""
    random, scored = np.random.default_rng(0), 512 - 256 - 1
    of_chunks = np.repeat(random.gamma(2.0, size=8), scored)
    theirs = {"a.kld": of_chunks, "b.kld": random.gamma(2.0, size=7 * scored)}
    ours = {"a.kld": 0.5 * of_chunks + np.repeat(random.gamma(1.0, size=8), scored), "b.kld": 0.5 * theirs["b.kld"]}
    for key, arrays in (("ours" * 6, ours), ("them" * 6, theirs)):
        np.savez_compressed(tmp_path / f"{key}.npz", **arrays)
    bench = SimpleNamespace(work=tmp_path, settings=SimpleNamespace(chunks=8, n_ctx=512))
    pair = evidence.Evidence.pair(
        bench, {"key": "ours" * 6, "mean": {}}, {"key": "them" * 6, "method": "m", "mean": {}}
    )
    own = ours["a.kld"].mean() / theirs["a.kld"].mean()
    apart = (ours["a.kld"] - own * theirs["a.kld"])[::scored] / theirs["a.kld"].mean()
    assert pair["texts"]["a"]["error"] == pytest.approx(apart.std() / np.sqrt(7), rel=1e-4)
    assert pair["texts"]["b"] == {"value": pytest.approx(0.5), "error": pytest.approx(0, abs=1e-6)}


def row(rung, method, kld, nbytes, group="rivals"):
    figure = {"value": kld, "error": 0.01}
    mean = {"kld": figure | {"p999": 3 * kld, "median": kld / 2}, "same_top_p": figure, "ppl_ratio": figure}
    facts = {
        "rung": rung,
        "method": method,
        "group": group,
        "how": f"how {method}",
        "bytes": nbytes,
        "cpu": {"make": 2},
    }
    pair = {"ratio": figure, "texts": {"prose": figure}}
    return facts | {"facts": {}, "mean": mean, "texts": {"prose": mean}, "paired": pair, "tasks": {}}


def test_a_rival_is_no_larger_and_may_be_another_preset(tmp_path):
    reference = evidence_methods.REFERENCE
    rows = [
        row("Q4_K_S", reference, 0.5, 100),
        row("IQ4_XS", reference, 0.3, 90),
        row("Q4_K_S", "GPTQ", 0.2, 101),  # too large
        row("Q4_K_S", "fast", 0.1, 99, group="ours"),
    ]
    model = {"rows": rows, "model": "m.gguf", "bytes": 1000, "chunks": 2, "n_ctx": 512, "commands": ["the command"]}
    model |= {"texts": {"prose": {"name": "wiki"}}, "calibration": [{"name": "c"}], "imatrix_chunks": 4, "versions": {}}
    assert evidence_page.best_rival(model, "Q4_K_S")["rung"] == "IQ4_XS"
    assert evidence_page.best_rival(model, "IQ4_XS")["method"] == reference
    file, page = tmp_path / "evidence-m.json", tmp_path / "evidence.md"
    file.write_text(json.dumps(model))
    evidence_page.write([file], page)
    lines = page.read_text().splitlines()
    assert "| Q4_K_S, fast | 0.100 ± 0.010 | 0.10 | 0.33 |" in lines
    assert any(line.startswith("| Q4_K_S | best preset that fits: IQ4_XS |") for line in lines)
    assert "the command" in lines


def test_the_objective_is_the_trace_that_rounding_lowers():
    random = np.random.default_rng(2)
    delta, h, o = (random.normal(size=shape) for shape in ((3, 5), (5, 5), (3, 3)))
    h, o = h @ h.T, o @ o.T
    assert evidence_fit._loss(delta, h, o) == pytest.approx(np.trace(o @ delta @ h @ delta.T))
    assert evidence_fit._loss(delta, h, None) == pytest.approx(np.trace(delta @ h @ delta.T))


def test_no_two_methods_share_a_key():
    model = SimpleNamespace(calibration={}, imatrix_chunks=1, texts={}, chunks=1, n_ctx=512, tasks=None, task_rungs=())
    bench = SimpleNamespace(sha256="x", settings=model)
    methods = [*evidence_methods.all_methods(), *evidence_fit.fits()]
    assert len({evidence.Evidence.key(bench, method, "Q4_K_M") for method in methods}) == len(methods)
