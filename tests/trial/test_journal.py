"""The journal of measurements: what is known is not measured again, and only under the same context."""

import math

import numpy as np
import pytest

from bitladder.trial import Journal, recipe_key

TYPES = {"blk.0.attn_q.weight": "q4_K", "blk.0.attn_k.weight": "q4_K"}


class Model:
    """KLDs of eight tokens in each of five chunks; it counts how often it is asked."""

    def __init__(self):
        self.calls = 0
        self.tokens = np.random.default_rng(0).lognormal(0, 1, (5, 8))

    def kld(self, types, chunks):
        self.calls += 1
        return self.tokens[:chunks]


def test_an_interrupted_journal_continues(tmp_path):
    model, path = Model(), tmp_path / "measured.jsonl"
    first = Journal(path, "context", 64).measure(model, TYPES, 2, "probe")
    with path.open("a") as stream:
        stream.write('{"context": "context", "key"')  # a process was killed here
    again = Journal(path, "context", 64)
    assert again.measure(model, TYPES, 2) == first and model.calls == 1 and again.new == 0
    assert again.tokens == 128
    again.measure(model, TYPES, 3)  # more than is known
    assert again.measure(model, TYPES, 1).chunks == again.measurements[recipe_key(TYPES)].chunks[:1]
    assert model.calls == 2 and len(Journal(path, "context", 64).measure(model, TYPES, 3).chunks) == 3


def test_another_context_knows_nothing(tmp_path):
    model, path = Model(), tmp_path / "measured.jsonl"
    Journal(path, "context", 64).measure(model, TYPES, 2)
    assert not Journal(path, "another", 64).measurements
    Journal(path, "another", 64).measure(model, TYPES, 2)
    assert len(Journal(path, "context", 64).measurements) == 1 and model.calls == 2


def test_errors_are_those_of_the_tokens():
    model = Model()
    measured = Journal(None, "", 1).measure(model, TYPES, 5)
    for measurement, part in ((measured, model.tokens), (measured.part(1, 4), model.tokens[1:4])):
        assert measurement.kld == pytest.approx(part.mean())
        assert measurement.error == pytest.approx(part.std() / math.sqrt(part.size - 1))
