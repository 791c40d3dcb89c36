"""Works in threads whose results come in order."""

import threading
import time

import pytest

from bitladder.engine import in_order


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_works_do_not_run_far_ahead(threads):
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    results = in_order((lambda n=n: work(n) for n in range(50)), threads, ahead=2)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 2 * threads + 1
    assert list(results) == list(range(1, 50))


@pytest.mark.parametrize("how", ["an error", "nobody takes more"])
def test_no_thread_is_left(how):
    before, done = threading.active_count(), []

    def work(number):
        if number == 3 and how == "an error":
            raise ValueError("broken")
        time.sleep(0.002)
        done.append(number)

    results = in_order((lambda n=n: work(n) for n in range(100)), 2)
    next(results)
    if how == "an error":
        with pytest.raises(ValueError, match="broken"):
            list(results)
    results.close()
    assert threading.active_count() == before and len(done) < 20
