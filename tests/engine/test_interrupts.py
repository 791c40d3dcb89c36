"""Ctrl-C while the library computes and calls back."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from bitladder.engine import Context, Decoding, Model
from bitladder.engine.native import llama


class Watcher:
    """Wants nothing, says when the computation has begun, and leaves the first time for something to happen."""

    def __init__(self):
        self.begun, self.sent = threading.Event(), threading.Event()

    def wants(self, seen):
        self.begun.set()
        self.sent.wait(60)
        return False

    def see(self, seen, inputs, experts):
        raise AssertionError("nothing was asked for")


@pytest.fixture
def handled():
    """Python's own handling of SIGINT, also where this process was started to ignore it (in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handled")
def test_it_stops_the_computation_and_is_not_lost(tiny_gguf):
    watcher = Watcher()

    def interrupt():
        watcher.begun.wait()
        os.kill(os.getpid(), signal.SIGINT)
        watcher.sent.set()

    before = signal.getsignal(signal.SIGINT)
    with (
        Model(tiny_gguf) as model,
        Context(model, Decoding(n_ctx=512, n_batch=512, threads=1), observer=watcher) as context,
    ):
        thread = threading.Thread(target=interrupt)
        thread.start()
        tokens = np.arange(512) % 300
        with pytest.raises(KeyboardInterrupt):
            context.decode(tokens, np.arange(512), np.zeros(512, int), np.ones(512, bool))
            time.sleep(5)
        thread.join()
        assert signal.getsignal(signal.SIGINT) is before
        context.clear()
        context.decode(tokens, np.arange(512), np.zeros(512, int), np.ones(512, bool))
        assert np.isfinite(context.logits()).all()


@pytest.mark.usefixtures("handled")
def test_it_ends_a_computation_that_calls_nobody_back(tiny_gguf, monkeypatch):
    begun, threads = threading.Event(), []

    def slow(handle, batch):
        threads.append(threading.current_thread())
        begun.set()
        for _ in range(6000):
            if context._going.value == b"1":
                return 2
            time.sleep(0.01)
        return 0

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    def decode():
        context.decode(np.arange(64), np.arange(64), np.zeros(64, int), np.ones(64, bool))

    with Model(tiny_gguf) as model, Context(model, Decoding(n_ctx=64, n_batch=64, threads=1)) as context:
        with monkeypatch.context() as patched:
            patched.setattr(llama, "llama_decode", slow)
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                decode()
                time.sleep(5)
            thread.join()
        assert threading.main_thread() not in threads
        decode()
        assert np.isfinite(context.logits()).all()
