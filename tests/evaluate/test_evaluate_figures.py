"""Figures from arrays, against plain float64 arithmetic."""

import dataclasses
import math

import numpy as np
import pytest

from bitladder.engine import PIECE, Workers
from bitladder.errors import BitladderError
from bitladder.evaluate import token_scores
from bitladder.evaluate.base.basefile import pack, unpack
from bitladder.evaluate.divergence import divergence, score_rows
from bitladder.evaluate.token_scores import TokenScores

ROWS, VOCAB = 37, PIECE + 5_001  # more than one piece, and no multiple of a block


@dataclasses.dataclass
class Blocks:
    """Base logits handed out by blocks of the vocabulary."""

    logits: np.ndarray
    step: int = 3_000

    @property
    def count(self):
        return -(-self.logits.shape[1] // self.step)

    def block(self, index, slot):
        start = index * self.step
        return start, self.logits[:, start : start + self.step].copy()


@pytest.fixture(scope="module")
def logits():
    random = np.random.default_rng(1)
    base = (4 * random.standard_normal((ROWS, VOCAB))).astype(np.float32)
    quant = (base + 0.3 * random.standard_normal((ROWS, VOCAB)) + 5).astype(np.float32)
    return base, quant, random.integers(0, VOCAB, ROWS).astype(np.int32)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_and_divergence(logits, threads):
    base, quant, targets = logits
    every = np.arange(ROWS)
    p, q = log_softmax(base), log_softmax(quant)
    with Workers(threads) as workers:
        scores = score_rows(quant, targets, workers, what="model")
        shift = quant[every, base.argmax(axis=1)]
        kld, lse = divergence(Blocks(base), quant, base.max(axis=1), shift, workers)
    assert np.abs(scores.nll + q[every, targets]).max() < 2e-6
    assert np.array_equal(scores.top, quant.argmax(axis=1))
    assert np.abs(kld - (np.exp(p) * (p - q)).sum(axis=1)).max() < 2e-6
    assert np.abs(lse - quant[every, targets] - scores.nll).max() < 2e-6


def test_divergence_of_the_same_logits_is_nothing(logits):
    base = logits[0]
    with Workers(2) as workers:
        kld, _ = divergence(Blocks(base), base, base.max(axis=1), base.max(axis=1), workers)
    assert np.abs(kld).max() < 1e-9


def test_logits_that_are_no_numbers(logits):
    broken = logits[0].copy()
    broken[3, 77] = np.nan
    with Workers(1) as workers, pytest.raises(BitladderError, match=r"logits of broken\.gguf are not finite"):
        score_rows(broken, logits[2], workers, what="broken.gguf")


def test_a_worker_error_reaches_the_caller():
    def work(index, slot):
        if index == 5:
            raise ValueError("five")

    with Workers(2) as workers, pytest.raises(ValueError, match="five"):
        workers.run(50, work)


def test_figures():
    random = np.random.default_rng(2)
    n = 501
    nll_base = random.gamma(2, 1.5, n)
    nll = nll_base + 0.1 * random.standard_normal(n)
    kld = random.gamma(1, 0.1, n)
    delta_p = np.exp(-nll) - np.exp(-nll_base)
    same = random.random(n) < 0.9
    found = token_scores.divergence_figures(TokenScores(nll, nll_base, kld, delta_p, same))

    def error(values):
        return math.sqrt(((values**2).mean() - values.mean() ** 2) / (n - 1))

    assert found["tokens_scored"] == n
    assert found["ppl"].value == pytest.approx(math.exp(nll.mean()))
    assert found["ppl"].error == pytest.approx(math.exp(nll.mean()) * error(nll))
    covariance = ((nll * nll_base).mean() - nll.mean() * nll_base.mean()) / (n - 1)
    assert found["ln_ppl_ratio"].value == pytest.approx(nll.mean() - nll_base.mean())
    assert found["ln_ppl_ratio"].error == pytest.approx(
        math.sqrt(error(nll) ** 2 + error(nll_base) ** 2 - 2 * covariance)
    )
    assert found["ppl_ratio"].value == pytest.approx(found["ppl"].value / found["ppl_base"].value)
    assert found["rho_ppl"] == pytest.approx(np.corrcoef(nll, nll_base)[0, 1])
    assert (found["kld"].value, found["kld"].error) == pytest.approx((kld.mean(), error(kld)))
    assert found["kld"].p99 == pytest.approx(np.quantile(kld, 0.99))
    assert found["kld"].median == pytest.approx(sorted(kld)[n // 2])
    assert (found["kld"].min, found["kld"].max) == (kld.min(), kld.max())
    rms = math.sqrt((delta_p**2).mean())
    assert found["delta_p"].rms.value == pytest.approx(rms)
    assert found["delta_p"].rms.error == pytest.approx(0.5 / rms * error(delta_p**2))
    assert found["delta_p"].mean.value == pytest.approx(delta_p.mean())
    share = same.mean()
    assert found["same_top_p"].value == pytest.approx(share)
    assert found["same_top_p"].error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))


def test_figures_of_equal_models():
    nll = np.linspace(1, 2, 9)
    zeros = np.zeros(9)
    found = token_scores.divergence_figures(TokenScores(nll, nll, zeros, zeros, np.ones(9, bool)))
    assert (found["kld"].value, found["kld"].max, found["delta_p"].rms.value) == (0, 0, 0)
    assert found["rho_ppl"] == pytest.approx(1)
    assert (found["same_top_p"].value, found["same_top_p"].error) == (1, 0)


def test_texts_count_alike():
    """Against one text in which the tokens of the shorter one are repeated until both are as long."""
    random = np.random.default_rng(3)
    lengths, repeats = (200, 600), (3, 1)
    texts = []
    for length in lengths:
        nll_base = random.gamma(2, 1.5, length) + length / 300
        nll, kld = nll_base + 0.1 * random.standard_normal(length), random.gamma(1, 0.1 * length / 200, length)
        texts.append(TokenScores(nll, nll_base, kld, np.exp(-nll) - np.exp(-nll_base), random.random(length) < 0.9))
    found = token_scores.divergence_figures(*texts)
    names = [field.name for field in dataclasses.fields(TokenScores)]
    pooled = {
        name: np.concatenate([np.repeat(getattr(text, name), n) for text, n in zip(texts, repeats, strict=True)])
        for name in names
    }
    expected = token_scores.divergence_figures(TokenScores(**pooled))
    for name in ("ppl", "ppl_base", "ppl_ratio", "ln_ppl_ratio", "kld", "same_top_p"):
        assert found[name].value == pytest.approx(expected[name].value)
    for name in ("mean", "rms"):
        assert getattr(found["delta_p"], name).value == pytest.approx(getattr(expected["delta_p"], name).value)
    assert found["tokens_scored"] == sum(lengths)
    for share in (50, 90, 99, 99.9):
        name = {50: "median", 90: "p90", 99: "p99", 99.9: "p999"}[share]
        below = np.mean(pooled["kld"] <= getattr(found["kld"], name))
        assert below == pytest.approx(share / 100, abs=4 / len(pooled["kld"]))  # a token has three of its places
    alone = [token_scores.divergence_figures(text) for text in texts]
    for name in ("kld", "ln_ppl_ratio", "same_top_p"):
        assert found[name].error == pytest.approx(np.hypot(*(text[name].error for text in alone)) / 2)
    assert found["ppl"].error / found["ppl"].value == pytest.approx(
        np.hypot(*(text["ppl"].error / text["ppl"].value for text in alone)) / 2
    )
    assert found["rho_ppl"] == pytest.approx(np.mean([text["rho_ppl"] for text in alone]))


def test_a_broken_model_has_no_perplexity():
    with pytest.raises(BitladderError, match="broken"):
        token_scores.perplexity(np.full(20, 1e4))


def test_states_are_packed_as_the_library_rounds_them():
    values = np.array([[1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, 0.0, 1e-5]], np.float32)
    assert np.array_equal(unpack(pack(values, "f32"), "f32"), values)
    assert np.array_equal(unpack(pack(values[:, :4], "f16"), "f16"), values[:, :4])
    with pytest.raises(OverflowError):
        pack(values, "f16")
    # Half-way cases of bfloat16 (7 bits after the point) go to the even neighbour.
    assert unpack(pack(values, "bf16"), "bf16")[0, :4].tolist() == [1.0, -2.5, 1.0, 1 + 2**-6]
    assert np.abs(unpack(pack(values, "bf16"), "bf16") / np.where(values == 0, 1, values) - (values != 0)).max() < 2**-8
