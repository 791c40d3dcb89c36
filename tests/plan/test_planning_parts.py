"""Parts of planning that need no model: menus, speeds, passages of texts, and targets that were missed."""

import pytest

from bitladder.errors import BitladderError, UsageError
from bitladder.plan import PlanOptions, Target
from bitladder.plan.feedback import FeedbackResult, TriedRecipe
from bitladder.plan.planner import refuse_unmet
from bitladder.plan.prices.menu import measured_speeds, menu_types, within_speed
from bitladder.text import excerpts, load_text
from bitladder.trial import MeasuredRecipe


def test_a_divergence_that_was_promised_but_not_measured_is_refused():
    full, types = {"a": "f16"}, {"a": "q4_0"}
    tried = [
        TriedRecipe("exact", of, 1, None, MeasuredRecipe(of, (kld,), (0.0,), 1))
        for of, kld in ((types, 0.02), (full, 0.0))
    ]
    result = FeedbackResult(tried[0], tuple(tried), None, None, None)
    refuse_unmet(Target("KLD 0.02", max_kld=0.02), result, full)
    with pytest.raises(BitladderError, match="KLD 0.01: 1 recipe had more .* 0.02 nats. Try --kld 0.022"):
        refuse_unmet(Target("KLD 0.01", max_kld=0.01), result, full)


def test_menus():
    kinds = [kind.name for kind in menu_types("k")]
    assert {"q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_0"} <= set(kinds) and "iq4_xs" not in kinds
    assert [kind.bpw for kind in menu_types("all")] == sorted(kind.bpw for kind in menu_types("all"))
    assert [kind.name for kind in menu_types("Q6_K, iq4_nl")] == ["iq4_nl", "q6_K"]
    for wrong in ("", "q9", "f16", "q8_K"):
        with pytest.raises(UsageError, match="--menu"):
            menu_types(wrong)
    # Speeds that are made up: iq4_xs as fast as a K-quant of its size, iq3_s at half of that.
    speeds = dict.fromkeys(("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_0", "iq4_xs"), 1e9) | {"iq3_s": 5e8}
    fast = {kind.name for kind in within_speed(speeds, 0.9)}
    assert "iq4_xs" in fast and "iq3_s" not in fast
    assert {kind.name for kind in menu_types("fast", speeds, 0.9)} == fast
    assert PlanOptions(menu=" Fast ") == PlanOptions(menu="fast") and PlanOptions(menu="Q6_K").menu == "Q6_K"


def test_speeds_are_measured():
    speeds = measured_speeds(1)
    assert {"q4_K", "iq3_s", "q8_0"} <= speeds.keys() and all(speed > 1e6 for speed in speeds.values())


def test_excerpts_are_spread_and_do_not_overlap():
    lines = [f"line {number} " + "x" * 40 for number in range(20_000)]
    text = load_text("pydoc:test")
    long = type(text)("long", "\n".join(lines), "")
    one, two = excerpts([long], 4, 64), excerpts([long], 4, 64, offset=0.5)
    seen = [{line for line in part.text.split("\n") if line in set(lines)} for part in (one, two)]
    assert not seen[0] & seen[1] and one.sha256 != two.sha256
    numbers = sorted(int(line.split()[1]) for line in seen[0])
    assert numbers[0] < 1000 and numbers[-1] > 15_000
    assert excerpts([text], 10_000, 512) is text
