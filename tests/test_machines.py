"""Work divided between machines."""

from concurrent.futures import Future

from bitladder import machines
from bitladder.machines import Heard, Machines, shares


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


def test_a_run_without_machines_says_so_once_and_waits(monkeypatch):
    monkeypatch.setattr(machines, "PATIENCE", 0)
    heard = Heard()

    def wait(count):
        """Of a result that comes when it is asked whether there is a machine."""
        future = Future()
        found = Machines(None, 1, alive=lambda: future.set_result(1) or count)
        assert found.wait({future}, heard) == ({future}, set())

    wait(1)
    assert heard.remarks == []
    wait(0)
    assert [kind for kind, _ in heard.remarks] == ["warn"]
