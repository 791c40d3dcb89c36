"""The law, the correction and the loop, against models of loss whose truth is known."""

import collections
import dataclasses
import math
import random

import numpy as np
import pytest

from bitladder.options import table
from bitladder.plan import FeedbackOptions, PlanOptions, Target, TargetOptions
from bitladder.plan.allocate.allocation import smallest_cost
from bitladder.plan.allocate.problem import Problem, TypeOption
from bitladder.plan.corrections import correct
from bitladder.plan.feedback import Feedback, PlanProblem, kind_moves, random_moves, step
from bitladder.plan.options import CorrectionOptions, LawOptions
from bitladder.plan.prices.law import Probe, first_groups, fit, runs, spaced, split
from bitladder.plan.prices.price import held_out, rank_correlation
from bitladder.plan.rungs import fitted
from bitladder.plan.subject import Preset
from bitladder.trial import Journal, MeasuredRecipe, Measurements

TYPES = {"iq3_s": 3.4375, "iq4_xs": 4.25, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.5625, "q8_0": 8.5}
KINDS = {"attn_q": 1 << 12, "attn_v": 1 << 10, "ffn_up": 3 << 12}
LAYERS = 4
PLACES = {f"blk.{layer}.{kind}.weight": (kind, layer) for layer in range(LAYERS) for kind in KINDS}


class Truth:
    """A model whose KLD is known: per tensor, with factors of kinds and types, and an interaction of everything."""

    def __init__(self, seed=0, interaction=0.0):
        draw = random.Random(seed)
        self.errors = {
            name: {one: 4.0**-bpw * draw.lognormvariate(0, 0.05) for one, bpw in TYPES.items()} for name in PLACES
        }
        self.scale = {name: draw.lognormvariate(0, 1.0) for name in PLACES}
        self.factor = collections.defaultdict(lambda: 1.0)
        self.interaction = interaction
        self.calls = 0

    def price(self, name, one):
        return self.scale[name] * self.errors[name][one] * self.factor[PLACES[name][0], one]

    def mean(self, types):
        total = sum(self.price(name, one) for name, one in types.items())
        return total + self.interaction * total**2

    def kld(self, types, chunks):
        self.calls += 1
        noise = np.random.default_rng(len(types)).lognormal(0, 0.2, (chunks, 8))
        return self.mean(types) * noise / noise.mean()


def problem(prices):
    options = {
        name: tuple(
            [
                TypeOption(one, int(KINDS[kind] * TYPES[one] / 8), cost, bpw=TYPES[one])
                for one, cost in prices[name].items()
            ]
            + [TypeOption("f16", 2 * KINDS[kind], 0.0, bpw=16.0)]
        )
        for name, (kind, _) in PLACES.items()
    }
    return Problem(options)


def size(name, one):
    return 2 * KINDS[PLACES[name][0]] if one == "f16" else int(KINDS[PLACES[name][0]] * TYPES[one] / 8)


def feedback(prices, target, truth, options, journal=None):
    planned = PlanProblem(prices, PLACES, target, problem, dict.fromkeys(PLACES, "f16"), size)
    return Feedback(planned, Measurements(journal or Journal(None, "", 1), truth), options)


def test_the_law_finds_scales_and_factors():
    truth = Truth()
    truth.factor["attn_v", "q4_K"] = 2.5
    truth.factor["ffn_up", "q5_K"] = 0.6
    probes = [Probe({name: "iq3_s"}, truth.mean({name: "iq3_s"})) for name in PLACES]
    kinds = {name: kind for name, (kind, _) in PLACES.items()}
    groups = {
        (kind, one): truth.mean({name: one for name in PLACES if PLACES[name][0] == kind})
        for kind in KINDS
        for one in TYPES
    }
    law = fit(truth.errors, kinds, probes, groups, LawOptions())
    for name in PLACES:
        for one in TYPES:
            assert law.kld[name][one] == pytest.approx(truth.price(name, one), rel=0.15)
    assert all(p == pytest.approx(1, abs=0.2) for p in law.exponent.values())
    # Without some groups, their types lie between those measured.
    fewer = {key: kld for key, kld in groups.items() if key[1] not in ("iq4_xs", "q6_K")}
    for name, menu in fit(truth.errors, kinds, probes, fewer, LawOptions()).kld.items():
        assert menu["q6_K"] == pytest.approx(truth.price(name, "q6_K"), rel=0.8)


def test_the_law_finds_an_exponent():
    errors = {f"t{i}": {one: 4.0**-bpw * (1 + i) for one, bpw in TYPES.items()} for i in range(4)}
    groups = {("t", one): sum(100 * errors[n][one] ** 1.4 for n in errors) for one in TYPES}
    probes = [Probe({name: "q4_K"}, 100 * errors[name]["q4_K"] ** 1.4) for name in errors]
    law = fit(errors, dict.fromkeys(errors, "t"), probes, groups, LawOptions())
    assert law.exponent["t"] == pytest.approx(1.4, abs=0.05)
    for name in errors:
        assert law.kld[name]["q8_0"] == pytest.approx(100 * errors[name]["q8_0"] ** 1.4, rel=0.05)


def test_types_with_minimums_do_not_bend_the_law():
    errors = {f"t{i}": {one: 4.0**-bpw * (1 + i) for one, bpw in TYPES.items()} for i in range(4)}
    family = {one: 5.0 if one in ("q4_K", "q5_K") else 1.0 for one in TYPES}
    measured = [one for one in TYPES if one != "q8_0"]
    groups = {("t", one): sum(errors[n][one] * family[one] for n in errors) for one in measured}
    probes = [Probe({n: "iq3_s"}, errors[n]["iq3_s"]) for n in errors]
    law = fit(errors, dict.fromkeys(errors, "t"), probes, groups, LawOptions())
    assert law.exponent["t"] == pytest.approx(1, abs=0.02)
    for name, menu in law.kld.items():
        # What was not measured follows those that are like it.
        assert menu["q8_0"] == pytest.approx(errors[name]["q8_0"], rel=0.05)
        assert menu["q4_K"] == pytest.approx(5 * errors[name]["q4_K"], rel=0.05)


def test_a_group_is_shared_out_by_error():
    errors = {"a": {"q4_K": 1.0, "q8_0": 0.01}, "b": {"q4_K": 3.0, "q8_0": 0.03}}
    law = fit(errors, {"a": "k", "b": "k"}, [Probe({"a": "q4_K", "b": "q4_K"}, 0.8)], {}, LawOptions())
    assert law.kld["a"]["q4_K"] == pytest.approx(0.2) and law.kld["b"]["q8_0"] == pytest.approx(0.006)


def test_corrections_are_learnt_from_whole_recipes():
    truth = Truth(seed=3)
    prices = {name: {one: truth.scale[name] * truth.errors[name][one] for one in TYPES} for name in PLACES}
    truth.factor["attn_v", "q4_K"] = 3.0
    for one in TYPES:
        truth.factor["ffn_up", one] *= 1.8
    start = dict.fromkeys(PLACES, "q4_K")

    def measured(types):
        value = truth.mean(types) + 0.001  # what no price explains
        return MeasuredRecipe(types, (value, value), (value**2, value**2), 8)

    near = [*kind_moves(problem(prices), start, PLACES), *random_moves(problem(prices), start, PLACES, 12, seed=1)]
    reference = measured(start)
    found = correct(prices, PLACES, [measured(types) for types in near], reference, CorrectionOptions())
    after = found.apply(prices)
    # What matters to a solver is what a change costs.
    for moved in random_moves(problem(prices), start, PLACES, 5, seed=7):
        real = truth.mean(moved) - truth.mean(start)
        before = sum(prices[n][one] - prices[n]["q4_K"] for n, one in moved.items())
        corrected = sum(after[n][one] - after[n]["q4_K"] for n, one in moved.items())
        assert abs(corrected - real) < 0.35 * abs(before - real)
    level = sum(after[name]["q4_K"] for name in PLACES)
    assert level + found.offset == pytest.approx(reference.kld)


def test_nothing_measured_changes_nothing():
    prices = {name: dict.fromkeys(TYPES, 1.0) for name in PLACES}
    start = dict.fromkeys(PLACES, "q4_K")
    found = correct(prices, PLACES, [], MeasuredRecipe(start, (1.0,), (1.0,), 8), CorrectionOptions())
    assert found.apply(prices) == prices and found.offset == pytest.approx(1.0 - len(PLACES))


@pytest.mark.parametrize("seed", range(2))
def test_the_loop_is_never_worse_than_a_rival_and_comes_near_the_best(seed):
    truth = Truth(seed=seed, interaction=2.0)
    guess = Truth(seed=seed)
    prices = {name: {one: guess.scale[name] * guess.errors[name][one] for one in TYPES} for name in PLACES}
    for kind, one, factor in (("attn_v", "q4_K", 3.0), ("ffn_up", "q5_K", 2.0), ("attn_q", "iq4_xs", 0.5)):
        truth.factor[kind, one] = factor
    rival = dict.fromkeys(PLACES, "q4_K")
    budget = sum(size(name, one) for name, one in rival.items())
    options = FeedbackOptions(chunks=4, move_chunks=2, judge_chunks=0, rounds=3, exchanges=2)
    found = feedback(prices, Target("test", max_bytes=budget), truth, options).run({"preset": rival})
    assert found.best.bytes <= budget
    assert sum(size(name, one) for name, one in found.best.types.items()) == found.best.bytes
    got = truth.mean(found.best.types)
    assert got <= truth.mean(rival)
    best = smallest_cost(problem({n: {one: truth.price(n, one) for one in TYPES} for n in PLACES}), budget)
    first = smallest_cost(problem(prices), budget)
    ideal, naive = truth.mean(best.types), truth.mean(first.types)
    assert got <= max(ideal + 0.5 * (naive - ideal), 1.03 * ideal)


def test_a_rival_that_nothing_beats_is_returned():
    truth = Truth(seed=1)
    wrong = {name: {one: 1 / truth.price(name, one) for one in TYPES} for name in PLACES}
    best = smallest_cost(problem({n: {one: truth.price(n, one) for one in TYPES} for n in PLACES}), 45_000)
    options = FeedbackOptions(chunks=2, move_chunks=1, judge_chunks=0, rounds=1, random_recipes=1, exchanges=0)
    found = feedback(wrong, Target("t", max_bytes=45_000), truth, options).run({"preset": best.types})
    assert found.best.types == best.types and found.best.name == "preset"


def test_what_lies_in_the_journal_does_not_steer_a_plan():
    class SameOnMoreText(Truth):
        def kld(self, types, chunks):
            return super().kld(types, 32)[:chunks]

    truth, options = SameOnMoreText(seed=3, interaction=2.0), FeedbackOptions(chunks=4, move_chunks=2, exchanges=2)
    prices = {name: {one: 4.0**-bpw for one, bpw in TYPES.items()} for name in PLACES}
    target = Target("test", max_bytes=sum(size(name, "q4_K") for name in PLACES))
    clean = feedback(prices, target, truth, options).run({})

    # What a killed plan for another target left: recipes of all tensors, and some of this plan's on more text.
    journal, draw = Journal(None, "", 1), random.Random(0)
    for _ in range(40):
        journal.measure(truth, {name: draw.choice(list(TYPES)) for name in PLACES}, 4, "left over")
    for one in clean.tried[::2]:
        journal.measure(truth, one.types, 32, "on more text")
    repeated = feedback(prices, target, truth, options, journal).run({})
    assert repeated.best.types == clean.best.types and repeated.correction == clean.correction
    assert [one.types for one in repeated.tried] == [one.types for one in clean.tried]


def test_a_divergence_as_target():
    truth = Truth(seed=2)
    prices = {name: {one: truth.price(name, one) for one in TYPES} for name in PLACES}
    goal = truth.mean(dict.fromkeys(PLACES, "q5_K"))
    options = FeedbackOptions(chunks=2, move_chunks=1, judge_chunks=0, rounds=2, random_recipes=2, exchanges=2)
    found = feedback(prices, Target("t", max_kld=goal), truth, options).run({})
    assert found.best.measured.kld <= goal
    assert found.best.bytes < sum(size(name, "q5_K") for name in PLACES)


def test_steps_follow_the_hull():
    menu = (TypeOption("a", 10, 5.0), TypeOption("b", 12, 4.9), TypeOption("c", 14, 1.0), TypeOption("d", 30, 0.9))
    one = Problem({"t": menu})
    assert step(one, "t", "a", 1) == "c" and step(one, "t", "d", -1) == "c"
    assert step(one, "t", "d", 1) == "d" and step(one, "t", "a", -1) == "a"


def test_designs():
    kinds = {"a": [f"a{i}" for i in range(10)], "b": [f"b{i}" for i in range(10)]}
    assert len(first_groups(kinds, 20)) == 20
    few = first_groups(kinds, 8)
    assert len(few) == 4 and sorted(n for group in few for n in group) == sorted(kinds["a"] + kinds["b"])
    assert split({("a", "b"): 1.0, ("c",): 9.0, ("d", "e", "f"): 2.0}) == ("d", "e", "f")
    assert split({("a",): 1.0}) is None
    assert runs("abcde", 2) == [("a", "b"), ("c", "d", "e")] and runs("ab", 9) == [("a",), ("b",)]
    assert spaced(["a", "b", "c", "d", "e"], 3) == ["a", "c", "e"] and spaced(["a", "b"], 5) == ["a", "b"]
    pairs = held_out({"x": ["p", "q"], "y": ["p"]}, {"x": "p", "y": "p"}, 5, seed=1)
    assert pairs == {"x": "q"}


def test_rank_correlation_against_its_definition():
    draw = random.Random(5)
    for _ in range(20):
        a, b = [draw.randint(0, 6) for _ in range(9)], [draw.random() for _ in range(9)]
        ranks = [[sum(o < v for o in one) + (sum(o == v for o in one) + 1) / 2 for v in one] for one in (a, b)]
        means = [sum(one) / 9 for one in ranks]
        cross = sum((x - means[0]) * (y - means[1]) for x, y in zip(*ranks, strict=True))
        norm = math.sqrt(math.prod(sum((x - m) ** 2 for x in one) for one, m in zip(ranks, means, strict=True)))
        assert rank_correlation(a, b) == pytest.approx(cross / norm)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_names_of_options_are_unique():
    # The command line fills nested options by name: a name that occurs twice would be set in both places.
    def names(options):
        for field in table(options):
            yield from names(field.nested) if field.nested else [field.name]

    every = [*names(PlanOptions), *names(TargetOptions)]
    assert len(every) == len(set(every)) > 40


def test_a_preset_that_must_be_smaller_takes_its_cheapest_step_down():
    """Against all recipes that differ from the preset in one tensor."""
    draw = random.Random(5)
    for _ in range(20):
        menus = {
            name: tuple(TypeOption(kind, 10 * (rank + 1), draw.random()) for rank, kind in enumerate("abcd"))
            for name in ("x", "y", "z")
        }
        preset = Preset("p", {"x": "b", "y": "d", "z": "c"}, 90)
        problem = Problem(menus, fixed_bytes=5)
        assert fitted(problem, dataclasses.replace(preset, bytes=95)) is None  # it fits
        costs = {name: {option.type: option.cost for option in menu} for name, menu in menus.items()}
        steps = [
            (sum(costs[tensor][kind] for tensor, kind in types.items()), types)
            for name, was in preset.types.items()
            for kind in "abcd"
            if kind < was and (types := preset.types | {name: kind})
        ]
        assert fitted(problem, dataclasses.replace(preset, bytes=85)) == min(steps, key=lambda step: step[0])[1]
        smallest = fitted(problem, dataclasses.replace(preset, bytes=35))
        assert smallest == {"x": "a", "y": "a", "z": "a"}
        assert fitted(problem, dataclasses.replace(preset, bytes=34)) is None
