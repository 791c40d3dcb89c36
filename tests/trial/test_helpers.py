"""Rendering and measuring by other machines: shares, errors and measurements that come back, and room on the disk."""

import types

import numpy as np

from bitladder.trial import Helpers, Journal, Measurements, StockRounding, rendering_shares


class FakeRenderer:
    """Tensors of 64 columns, whose blocks take a byte a weight."""

    def __init__(self, rows, room, rounding=None):
        shape = {name: types.SimpleNamespace(elements=64 * count, width=64) for name, count in rows.items()}
        self.file = types.SimpleNamespace(tensors=shape)
        self.room, self.rounding, self.errors = room, rounding, {}

    def nbytes(self, name, kind):
        return self.file.tensors[name].elements

    def learn(self, errors):
        self.errors |= errors


ROWS = {"large": 4, "middle": 2, "small": 1, "tiny": 1}
PAIRS = [(name, kind) for kind in ("q4_K", "q6_K") for name in ROWS]


def test_all_types_of_a_tensor_are_in_one_share():
    parts = rendering_shares(FakeRenderer(ROWS, 0), PAIRS, 2, threads=1)
    assert sorted(pair for part in parts for pair in part) == sorted(PAIRS)
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    # With more threads a share has more tensors, so that none of them waits.
    assert len(rendering_shares(FakeRenderer(ROWS, 0), PAIRS, 2, threads=4)) == 2
    assert len(rendering_shares(FakeRenderer(ROWS, 0, StockRounding()), PAIRS, 2, threads=4)) == 4


def rendered(room):
    given = []

    def call(kind, shares, label, progress):
        assert kind == "render"
        given.extend(share[1] for share in shares)
        return [dict.fromkeys(pairs, 0.5) for pairs, _ in shares]

    renderer = FakeRenderer(ROWS, room)
    Helpers(call, 2).render(renderer, PAIRS, "render")
    assert renderer.errors == dict.fromkeys(PAIRS, 0.5)
    return given, renderer.room


def test_shares_keep_no_more_blocks_than_there_is_room_for():
    need = 2 * 64 * sum(ROWS.values())
    given, room = rendered(need + 10)
    assert sum(given) == need and room == 10
    given, room = rendered(need // 2)
    assert 0 <= need // 2 - sum(given) == room < 4
    assert rendered(-1) == ([0] * 4, 0)


class Model:
    """KLDs that follow from the recipe."""

    def __init__(self):
        self.measured = 0

    def kld(self, recipe, chunks):
        self.measured += 1
        return np.full((chunks, 4), float(len(recipe)))


def test_recipes_that_are_expected_are_measured_elsewhere_and_only_once():
    here, there, shares = Model(), Model(), []

    def call(kind, parts, label, progress):
        assert kind == "measure"
        shares.extend(parts)
        far = Measurements(Journal(None, "c", 4), there)
        return [[far.measure(*each) for each in part] for part in parts]

    journal = Journal(None, "c", 4)
    helpers = Helpers(call, 2)
    wanted = [({f"t{number}": "q4_K"}, 2, "probe") for number in range(5)]
    measurements = Measurements(journal, here, lambda expected: helpers.measure(journal, expected, "measure"))
    measurements.expect(wanted[:1])
    measurements.expect(wanted)
    assert [len(share) for share in shares] == [1, 1, 1, 1, 1] and there.measured == 5
    plain = Measurements(Journal(None, "c", 4), Model())
    assert [measurements.measure(*each) for each in wanted] == [plain.measure(*each) for each in wanted]
    assert here.measured == 0 and measurements.all() == plain.all()
    measurements.measure({"t0": "q4_K"}, 3, "longer")
    assert here.measured == 1
