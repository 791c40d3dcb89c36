"""Work divided between machines."""

from bitladder.machines import Heard, shares


def test_shares_have_about_the_same_cost():
    found = shares([7, 1, 1, 1, 5, 5], 3)
    assert sorted(piece for share in found for piece in share) == list(range(6))
    assert found[0] == [0] and sorted(map(len, found)) == [1, 2, 3]
    assert shares([1.0], 4) == [[0]] and shares([], 4) == []


def test_remarks_are_kept_in_order():
    heard = Heard()
    with heard.task("work", 2) as bar:
        bar.advance()
        heard.info("a")
        heard.warn("b")
    assert heard.remarks == [("info", "a"), ("warn", "b")]
