"""Paired differences against resampling and enumeration."""

import itertools

import numpy as np
import pytest

from bitladder.evaluate import Figure
from bitladder.evaluate.paired import mcnemar, paired_mean, paired_perplexity, paired_task, unit
from bitladder.evaluate.token_scores import average

CHUNKS, SCORED = 60, 25


@pytest.fixture(scope="module")
def likelihoods():
    """NLLs of two models over the same tokens: chunks differ in difficulty, and in how much worse the second is."""
    rng = np.random.default_rng(5)
    difficulty = rng.gamma(2, 1, (CHUNKS, SCORED)) + rng.normal(0, 0.3, (CHUNKS, 1))
    worse = rng.normal(0.05, 0.04, (CHUNKS, 1)) + rng.normal(0, 0.1, (CHUNKS, SCORED))
    return difficulty.ravel(), (difficulty + worse).ravel()


def bootstrap(statistic, count, repeats=4000):
    rng = np.random.default_rng(1)
    return np.std([statistic(rng.integers(0, count, count)) for _ in range(repeats)])


def test_a_mean_is_as_sure_as_resampled_chunks_say(likelihoods):
    first, second = likelihoods
    figure = paired_mean(second, first, CHUNKS)
    means = (second - first).reshape(CHUNKS, -1).mean(axis=1)
    assert figure.value == pytest.approx(means.mean())
    assert figure.error == pytest.approx(bootstrap(lambda drawn: means[drawn].mean(), CHUNKS), rel=0.06)
    # Far surer than two models measured on texts of their own; less sure than if tokens were independent.
    alone = np.hypot(first.std(), second.std()) / np.sqrt(len(first))
    assert figure.error < alone / 3
    assert figure.error > 1.2 * (second - first).std() / np.sqrt(len(first))


def test_chunks_of_different_lengths_count_by_their_tokens(likelihoods):
    """As where only answers are scored."""
    first, second = likelihoods
    rng = np.random.default_rng(4)
    kept = rng.random(len(first)) < np.repeat(rng.random(CHUNKS), SCORED)
    chunk = np.repeat(np.arange(CHUNKS, dtype=np.int32), SCORED)[kept]
    gaps = (second - first)[kept]
    figure = paired_mean(second[kept], first[kept], chunk)
    sums, counts = np.bincount(chunk, gaps, CHUNKS), np.bincount(chunk, minlength=CHUNKS)
    assert figure.value == pytest.approx(gaps.mean())
    expected = bootstrap(lambda drawn: sums[drawn].sum() / counts[drawn].sum(), CHUNKS)
    assert figure.error == pytest.approx(expected, rel=0.1)
    whole = np.repeat(np.arange(CHUNKS, dtype=np.int32), SCORED)
    assert paired_mean(second, first, whole).error == pytest.approx(paired_mean(second, first, CHUNKS).error)


def test_perplexities_differ_as_resampled_chunks_say(likelihoods):
    rows = [values.reshape(CHUNKS, -1) for values in likelihoods]
    figure = paired_perplexity([(likelihoods[1], likelihoods[0], CHUNKS)])

    def difference(drawn):
        return np.exp(rows[1][drawn].mean()) - np.exp(rows[0][drawn].mean())

    assert figure.value == pytest.approx(difference(np.arange(CHUNKS)))
    assert figure.error == pytest.approx(bootstrap(difference, CHUNKS), rel=0.06)


def test_few_chunks_are_taken_by_token():
    assert (unit(7), unit(8)) == ("token", "chunk")
    values = np.arange(30.0)
    assert paired_mean(values, np.zeros(30), 3).error == pytest.approx(np.std(values, ddof=1) / np.sqrt(30))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 3), (2, 9), (8, 1)])
def test_mcnemar_against_every_way_to_split(b, c):
    n = b + c
    ways = [abs(sum(way) - n / 2) >= abs(b - n / 2) for way in itertools.product((0, 1), repeat=n)]
    assert mcnemar(b, c) == pytest.approx(np.mean(ways))
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_of_thousands():
    assert 0 < mcnemar(2400, 2700) < 1e-4
    assert mcnemar(5000, 5000) == 1


def test_tasks_pair_by_record():
    rng = np.random.default_rng(2)
    records = rng.permutation(400)
    first = {int(record): bool(rng.random() < 0.5) for record in records}
    second = {record: right if rng.random() < 0.9 else not right for record, right in first.items()}
    del first[int(records[0])], second[int(records[1])]  # each left one question out
    pair = paired_task(first, second)
    common = sorted(first.keys() & second.keys())
    gaps = np.array([int(first[record]) - int(second[record]) for record in common])
    assert len(common) == 398
    assert pair.difference.value == pytest.approx(gaps.mean())
    assert pair.difference.error == pytest.approx(bootstrap(lambda drawn: gaps[drawn].mean(), 398), rel=0.05)
    assert pair.only_this == (gaps > 0).sum()
    assert pair.only_other == (gaps < 0).sum()
    assert paired_task(first, {}) is None
    same = paired_task(first, first)
    assert (same.difference.value, same.difference.error, same.p_value) == (0, 0, 1)


def test_average():
    figure = average([Figure(value=0.1, error=0.03), Figure(value=0.3, error=0.04)])
    assert (figure.value, figure.error) == (pytest.approx(0.2), pytest.approx(0.025))
