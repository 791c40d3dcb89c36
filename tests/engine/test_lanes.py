"""Work side by side: the same figures for any number of threads, in order, and errors at once."""

import threading
import time

import numpy as np
import pytest

from bitladder.engine import Aside, Lanes, Model
from bitladder.errors import BitladderError
from bitladder.evaluate import MeasureOptions, make_base, measure
from bitladder.evaluate.base.logits_file import write_logits_file
from bitladder.files import sha256_file
from bitladder.text import load_text

N_CTX = 128


def settings(threads, chunks=5):
    return MeasureOptions(n_ctx=N_CTX, threads=threads, chunks=chunks)


@pytest.fixture(scope="module")
def text():
    return load_text("pydoc:test")


@pytest.mark.parametrize("chunks", [1, 5])
def test_threads_change_no_figure(tiny_gguf, text, tmp_path, chunks):
    """One thread has one lane, two have one each, three have one and two."""
    scores, files = [], set()
    for threads in (1, 2, 3):
        base, logits = tmp_path / f"{threads}.base", tmp_path / f"{threads}.logits"
        make_base(tiny_gguf, text, base, settings(threads, chunks))
        write_logits_file(tiny_gguf, text, logits, settings(threads, chunks))
        files.add((sha256_file(base), sha256_file(logits)))
        for ways in ({}, {"base": tiny_gguf, "base_file": base}, {"base": logits}):
            scores.append(measure(tiny_gguf, text, settings(threads, chunks), **ways))
    assert len(files) == 1
    for kind in range(3):
        for other in scores[kind + 3 :: 3]:
            assert all(np.array_equal(values, other.arrays[name]) for name, values in scores[kind].arrays.items())


@pytest.mark.parametrize("threads", [1, 2])
def test_work_aside_is_done_in_its_order(threads):
    began, done = threading.Event(), []
    with Aside(threads) as aside:
        first = aside.submit(lambda: began.wait(30 if threads > 1 else 0) and done.append(1))
        second = aside.submit(done.append, 2)
        began.set()
        first.result()
        second.result()
        assert done == ([1, 2] if threads > 1 else [2])
        with pytest.raises(ZeroDivisionError):
            aside.submit(lambda: 1 / 0).result()


@pytest.fixture
def lanes(tiny_gguf):
    with Model(tiny_gguf) as model, Lanes(model, settings(3)) as opened:
        yield opened


def test_results_come_in_order_and_what_is_left_over_gets_all_threads(lanes):
    seen = []

    def work(lane, chunk):
        seen.append((lane.number, chunk, lane.workers.threads, threading.current_thread().name))
        time.sleep(0.02 * (chunk == 0))
        return chunk

    assert list(lanes.each(7, work)) == list(range(7))
    assert {number for number, *_ in seen} == {0, 1}
    shares = {number: threads for number, chunk, threads, _ in seen if chunk < 6}
    assert sum(shares.values()) == 3
    assert [(threads, name) for _, chunk, threads, name in seen if chunk == 6] == [(3, "lane 0")]
    assert list(lanes.each(0, work)) == []


def test_slots_of_lanes_differ(lanes):
    slots = []

    def work(lane, chunk):
        lane.workers.run(50, lambda index, slot: slots.append((lane.number, slot)) or time.sleep(0.001))

    list(lanes.each(4, work))
    assert {slot for number, slot in slots if number == 0}.isdisjoint(slot for number, slot in slots if number == 1)


def test_an_error_ends_all_lanes(lanes):
    done = []

    def work(lane, chunk):
        if chunk == 2:
            raise BitladderError("broken")
        done.append(chunk)
        time.sleep(0.01)
        return chunk

    results = lanes.each(100, work)
    with pytest.raises(BitladderError, match="broken"):
        list(results)
    assert len(done) < 10
    assert list(lanes.each(2, lambda lane, chunk: chunk)) == [0, 1]


def test_results_that_nobody_takes_do_not_pile_up(lanes):
    done = []
    results = lanes.each(100, lambda lane, chunk: done.append(chunk))
    next(results)
    time.sleep(0.2)
    assert len(done) <= 5
    assert len(list(results)) == 99


def test_whoever_takes_no_more_results_waits_for_no_more_chunks(lanes):
    done = []
    results = lanes.each(100, lambda lane, chunk: done.append(chunk) or time.sleep(0.01))
    next(results)
    results.close()  # as Ctrl-C does
    assert len(done) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane ")]


def decode(context):
    """A chunk of some tokens."""
    tokens = np.arange(N_CTX, dtype=np.int32)
    context.clear()
    context.decode(tokens, tokens, np.zeros(N_CTX, int), np.ones(N_CTX, bool))


@pytest.mark.parametrize("how", ["results", "lanes"])
def test_what_is_computed_ends_when_nobody_waits_for_it(lanes, how):
    begun, ended = threading.Event(), []

    def work(lane, chunk):
        while chunk:
            begun.set()
            try:
                decode(lane.context)
            except BitladderError as error:
                ended.append(str(error))
                raise

    results = lanes.each(2, work)
    next(results)
    assert begun.wait(10)
    (results if how == "results" else lanes).close()
    assert len(ended) == 1 and "failed (2)" in ended[0]
    if how == "results":
        assert list(lanes.each(3, lambda lane, chunk: decode(lane.context))) == [None] * 3
