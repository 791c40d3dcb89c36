"""Allocation against brute force, a dynamic program over exact bytes, and a bound of its own."""

import dataclasses
import itertools
import math
import random

import pytest

from bitladder.errors import BitladderError
from bitladder.plan.allocate.allocation import greedy, neighbours, smallest_bytes, smallest_cost
from bitladder.plan.allocate.problem import Problem, TypeOption
from bitladder.units import bpw_bytes

BPW = {"iq2_s": 2.5625, "iq3_s": 3.4375, "iq4_xs": 4.25, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.5625, "q8_0": 8.5}
SHAPES = {"attn_q": 1 << 20, "attn_k": 1 << 18, "attn_v": 1 << 18, "ffn_up": 3 << 20, "ffn_down": 3 << 20}


def model(blocks, types=tuple(BPW), seed=0):
    """A problem like a real one: every kind of tensor in every block, cost falling by about 4 with every bit."""
    draw = random.Random(seed)
    options = {}
    for block in range(blocks):
        for kind, weights in SHAPES.items():
            scale = draw.lognormvariate(0, 1) / blocks
            options[f"blk.{block}.{kind}.weight"] = tuple(
                TypeOption(
                    kind := name,
                    nbytes := int(weights * BPW[name] / 8),
                    scale * 4.0 ** -BPW[name] * draw.lognormvariate(0, 0.3),
                    nbytes / 2e10 * draw.uniform(1, 1.4),
                    BPW[name],
                )
                for name in types
            )
    return Problem(options, fixed_bytes=4096)


def bytes_at(problem, bpw):
    """File size at so many bits per weight; the problems here hold their weights at the types' exact widths."""
    weights = sum(menu[0].nbytes * 8 / menu[0].bpw for menu in problem.options.values())
    return bpw_bytes(bpw, round(weights), problem.fixed_bytes)


def small(seed):
    """A random problem of a few tensors with a random set of constraints, of every kind in turn."""
    draw = random.Random(seed)
    kinds = list(BPW)[: draw.randint(2, 5)]
    names = [f"t{i}" for i in range(draw.randint(2, 6))]
    align = draw.choice([1, 32, 4096])
    options = {
        name: tuple(
            TypeOption(kind, draw.randint(1, 300) * align, draw.gauss(0.3, 0.4), draw.random() / 100, BPW[kind])
            for kind in draw.sample(kinds, draw.randint(max(1, len(kinds) - 1), len(kinds)))
        )
        for name in names
    }
    problem = Problem(options, fixed_bytes=draw.choice([0, 1000]))
    changes = {}
    if draw.random() < 0.3:
        name = draw.choice(names)
        changes["pins"] = {name: draw.choice(options[name]).type}
    if draw.random() < 0.3:
        changes["floors"] = dict.fromkeys(draw.sample(names, 2), draw.uniform(2, 5))
    if draw.random() < 0.3:
        changes["ties"] = tuple(frozenset(draw.sample(names, 2)) for _ in range(draw.randint(1, 2)))
    if draw.random() < 0.3:
        changes["max_types"] = draw.randint(1, 3)
    if draw.random() < 0.3:
        changes["max_seconds"] = draw.uniform(0.2, 0.7) * len(names) / 100
    return dataclasses.replace(problem, **changes), 150 * len(names) * align + problem.fixed_bytes


def cost_of(options):
    return math.fsum(option.cost for option in options)


def bytes_of(problem, options):
    return problem.fixed_bytes + sum(option.nbytes for option in options)


def allowed(problem, chosen):
    """Whether a choice, tensor → option, keeps everything but size and cost: the definitions, word for word."""
    kinds = {option.type for option in chosen.values()}
    return (
        all(chosen[name].type == kind for name, kind in problem.pins.items())
        and all(chosen[name].bpw >= floor for name, floor in problem.floors.items())
        and all(len({chosen[name].type for name in tie}) == 1 for tie in problem.ties)
        and (problem.max_types is None or len(kinds) <= problem.max_types)
        and (problem.max_seconds is None or math.fsum(o.seconds for o in chosen.values()) <= problem.max_seconds)
    )


def every_choice(problem):
    for options in itertools.product(*problem.options.values()):
        chosen = dict(zip(problem.options, options, strict=True))
        if allowed(problem, chosen):
            yield chosen


def chosen_in(problem, allocation):
    return {name: {o.type: o for o in menu}[allocation.types[name]] for name, menu in problem.options.items()}


def check(problem, allocation):
    """The allocation respects the problem, and its sums are those of its types."""
    chosen = chosen_in(problem, allocation)
    assert list(allocation.types) == list(problem.options)
    assert allowed(problem, chosen)
    assert allocation.bytes == bytes_of(problem, chosen.values())
    assert allocation.cost == cost_of(chosen.values())
    assert allocation.bound <= (allocation.cost if allocation.objective == "cost" else allocation.bytes)


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_both_directions_against_brute_force(start):
    solved = refused = 0
    for seed in range(start, start + 50):
        problem, max_bytes = small(seed)
        try:
            choices = [(bytes_of(problem, c.values()), cost_of(c.values())) for c in every_choice(problem)]
            fitting = [cost for nbytes, cost in choices if nbytes <= max_bytes]
            if not fitting:
                with pytest.raises(BitladderError):
                    smallest_cost(problem, max_bytes)
                refused += 1
                continue
            best = smallest_cost(problem, max_bytes, gap=0)
            check(problem, best)
            assert best.bytes <= max_bytes and best.cost == pytest.approx(min(fitting), abs=1e-12), seed
            assert best.gap <= 1e-9, seed
            target = best.cost + random.Random(seed).choice([0, 0.05])
            reach = [nbytes for nbytes, cost in choices if cost <= target + 1e-9 * abs(target)]
            least = smallest_bytes(problem, target, gap=0)
            check(problem, least)
            assert least.bytes == min(reach) and least.gap <= 1e-9, seed
            simple = greedy(problem, max_bytes)
            check(problem, simple)
            assert simple.bytes <= max_bytes and simple.bound <= min(fitting) <= simple.cost + 1e-12
            solved += 1
        except BitladderError:
            assert not choices or problem.pins or problem.ties, seed
            refused += 1
    assert solved > 25 and refused


@pytest.mark.parametrize("seed", range(60))
def test_neighbours_are_all_exchanges_in_order(seed):
    problem, max_bytes = small(1000 + seed)
    try:
        best = smallest_cost(problem, max_bytes)
    except BitladderError:
        return
    start = chosen_in(problem, best)
    found = list(neighbours(problem, best, 1000, max_bytes))
    for one in found:
        after = start | {n: {o.type: o for o in problem.options[n]}[kind] for n, kind in one.types.items()}
        assert allowed(problem, after) and bytes_of(problem, after.values()) <= max_bytes
        assert one.cost == pytest.approx(cost_of(after.values()) - best.cost, abs=1e-12)
        assert one.bytes == bytes_of(problem, after.values()) - best.bytes
        assert one.cost >= -1e-12, "the optimum has a better neighbour"
    costs = [one.cost for one in found]
    assert costs == sorted(costs)
    if problem.ties or problem.max_types is not None:
        return
    # By brute force: every single change that fits, and no other.
    singles = {
        (name, option.type)
        for name, menu in problem.options.items()
        for option in menu
        if option.type != start[name].type
        and allowed(problem, start | {name: option})
        and bytes_of(problem, (start | {name: option}).values()) <= max_bytes
    }
    assert {next(iter(one.types.items())) for one in found if len(one.types) == 1} == singles


def test_a_model_of_real_size_is_solved_to_proof():
    problem = model(32)
    cheapest = dataclasses.replace(problem, max_types=3)
    for bpw in (3.5, 4.5, 6.0):
        budget = bytes_at(problem, bpw)
        best = smallest_cost(problem, budget)
        check(problem, best)
        assert best.bytes <= budget and best.gap <= 1e-6
        simple = greedy(problem, budget)
        assert best.cost <= simple.cost and simple.bound <= best.cost + 1e-12
        assert smallest_cost(cheapest, budget).cost >= best.cost * (1 - 1e-6)
        # The price of a byte is the slope between two budgets close by.
        more = smallest_cost(problem, budget + budget // 100)
        slope = (best.cost - more.cost) / (budget // 100)
        assert more.price * 0.7 <= slope <= best.price * 1.3
    row = [smallest_cost(problem, bytes_at(problem, bpw)) for bpw in (3, 4, 5, 6, 7, 8)]
    costs = [one.cost for one in row]
    assert costs == sorted(costs, reverse=True)
    assert smallest_bytes(problem, costs[2]).bytes <= row[2].bytes


def test_what_is_wrong_is_said():
    problem, budget = model(2), bytes_at(model(2), 4)
    name = next(iter(problem.options))
    for changes, message in (
        ({"pins": {name: "q2_K"}}, "pinned to q2_K"),
        ({"pins": {"absent": "q4_K"}}, "absent"),
        ({"floors": {name: 9.0}}, "floor of 9 bpw"),
        ({"max_types": 0}, "at least one"),
        ({"max_seconds": -1.0}, "above 0"),
    ):
        with pytest.raises(BitladderError, match=message):
            smallest_cost(dataclasses.replace(problem, **changes), budget)
    with pytest.raises(BitladderError, match="byte"):
        smallest_cost(problem, 10_000)
