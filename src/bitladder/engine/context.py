"""Decoding: its options, with llama.cpp's spelling, contexts, batches and logits."""

import contextlib
import ctypes
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.devices import Device, ThreadPool, torch_device
from bitladder.engine.model import Model, Tokens
from bitladder.engine.native import ggml, llama, log
from bitladder.engine.observe import GraphCallback, Observer, Watching
from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError, overflow
from bitladder.files import Closing
from bitladder.options import Options, option
from bitladder.units import number_of

MIN_CTX = 4
Floats = npt.NDArray[np.float32]
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
_GO_ON, _STOP = b"0", b"1"


@dataclasses.dataclass(frozen=True)
class Decoding(Options):
    """How a model is decoded, and where torch computes. Raises UsageError for a number outside its limits, or a device
    that torch does not see."""

    GROUP = "Decoding"

    n_ctx: int = option(
        512, "-c", "--ctx-size", least=MIN_CTX, metavar="TOKENS", help="Tokens of a chunk, which is one context."
    )
    n_batch: int = option(
        2048, "-b", "--batch-size", least=1, decides=False, metavar="TOKENS", help="Tokens decoded by one call."
    )
    n_ubatch: int = option(
        512, "-ub", "--ubatch-size", least=1, decides=False, metavar="TOKENS", help="Tokens computed at once."
    )
    threads: int | None = option(
        None, "-t", "--threads", least=1, decides=False, metavar="N", help="Threads of the CPU.", unset="all"
    )
    gpu_layers: int = option(
        0, "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help="Layers that the GPU computes."
    )
    device: Device = option(
        "auto",
        "--device",
        decides=False,
        help="What rounds tensors, and makes the products of gradients and tuning. auto: a GPU that torch sees, else "
        "the CPU; torch: its kernels on the CPU, for tests.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "auto":
            torch_device(self.device)

    def deciding(self) -> dict[str, object]:
        """The tokens of a chunk, and whether a GPU computes. The number of its layers changes no figure."""
        return {"n_ctx": self.n_ctx, "gpu": self.gpu_layers != 0}


class Context(Closing):
    """A context of the library: memory to decode with a model.

    Parameters:
        model: the loaded model.
        decoding: tokens per sequence, batch sizes and threads. A batch is at most as large as all sequences together.
        n_seq: sequences that are decoded side by side.
        kv_unified: whether all sequences share one cache.
        flash_attn: "auto", "on" or "off" (-fa).
        swa_full: whether the cache of a sliding window keeps all positions.
        observer: is shown the inputs of weight multiplications.
        skip_head: whether the computation ends before the logits; only with an observer.
        callback: sees all nodes of the graph, instead of an observer.

    Raises:
        BitladderError: the model has fewer positions; or the library refuses, mostly for want of memory.
    """

    # Nine parameters: one for each setting of the library that a caller decides.
    def __init__(
        self,
        model: Model,
        decoding: Decoding,
        *,
        n_seq: int = 1,
        kv_unified: bool = False,
        flash_attn: str = "auto",
        swa_full: bool = True,
        observer: Observer | None = None,
        skip_head: bool = False,
        callback: GraphCallback | None = None,
    ) -> None:
        self.model = model
        self.n_ctx = decoding.n_ctx
        if (most := model.most_positions) is not None and self.n_ctx > most:
            raise BitladderError(f"{model.name} has embeddings of {most} positions; {self.n_ctx} (-c) are too many")
        self.n_seq = n_seq
        params = llama.llama_context_default_params()
        params.n_ctx = self.n_ctx * n_seq
        params.n_seq_max = n_seq
        self.n_batch = params.n_batch = min(decoding.n_batch, self.n_ctx * n_seq)
        params.n_ubatch = min(decoding.n_ubatch, params.n_batch)
        params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch
        self._threads = params.n_threads = params.n_threads_batch = decoding.threads or threads_available()
        params.kv_unified = kv_unified
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        params.swa_full = swa_full
        # By default a library with a GPU gives large products to it even if all layers are the CPU's.
        params.op_offload = model.gpu_layers != 0
        self._callback = Watching(observer, skip_head=skip_head) if observer else callback
        if self._callback:
            params.cb_eval = self._callback.callback
        # The CPU asks at each node whether to stop. C's atoi answers from this memory: Python's lock is not needed.
        self._going = ctypes.create_string_buffer(_GO_ON)
        library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        params.abort_callback = ctypes.cast(library.atoi, llama.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._going)
        log.lines.clear()
        self._context = llama.llama_init_from_model(model.handle, params)
        if not self._context:
            raise BitladderError(f"no context of {n_seq} × {self.n_ctx} tokens for {model.path}: {log.last_error()}")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(self.n_batch, 0, n_seq)
        self._outputs = 0
        self._decoder: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Frees the memory."""
        if self._decoder:
            self._decoder.shutdown()
        if self._context:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            self._context = None

    def clear(self, *, data: bool = True) -> None:
        """Forgets every sequence. Without `data` the cache keeps its numbers, unused."""
        if self._memory:
            llama.llama_memory_clear(self._memory, data)

    def decode(
        self,
        tokens: Sequence[int] | Tokens,
        positions: Sequence[int] | Tokens,
        sequences: Sequence[int] | Sequence[tuple[int, ...]] | Tokens,
        outputs: Sequence[bool] | npt.NDArray[np.bool_],
    ) -> None:
        """Decodes one batch.

        Parameters:
            tokens: token ids, at most `n_batch`.
            positions: position of each token in its sequence.
            sequences: number of each token's sequence, or the numbers of all sequences that share the token.
            outputs: whether the logits of each token are computed.

        Raises:
            BitladderError: the batch is too large, or the library fails.
            BaseException: what the observer or the callback raises.
        """
        count = len(tokens)
        if count > self.n_batch:
            raise BitladderError(f"batch of {number_of(count, 'token')}, but the context takes {self.n_batch} (-b)")
        batch = self._batch
        batch.n_tokens = count
        _view(batch.token, ctypes.c_int32, count)[:] = tokens
        _view(batch.pos, ctypes.c_int32, count)[:] = positions
        sharing = _view(batch.n_seq_id, ctypes.c_int32, count)
        for index, sequence in enumerate(sequences):
            numbers = sequence if isinstance(sequence, tuple) else (int(sequence),)
            sharing[index] = len(numbers)
            for place, number in enumerate(numbers):
                batch.seq_id[index][place] = number
        _view(batch.logits, ctypes.c_int8, count)[:] = outputs
        self._outputs = int(np.count_nonzero(outputs))
        log.lines.clear()
        if self._callback:
            with self._callback.raising():
                status = llama.llama_decode(self._context, batch)
        elif threading.current_thread() is threading.main_thread():
            status = self._interruptible(batch)
        else:
            status = llama.llama_decode(self._context, batch)
        self._check(status)

    def _interruptible(self, batch: Any) -> int:
        """Decodes in another thread. This one, which handles signals, waits in Python, where Ctrl-C can reach it."""
        if self._decoder is None:
            self._decoder = ThreadPoolExecutor(1)
        decoding = self._decoder.submit(llama.llama_decode, self._context, batch)
        try:
            return int(decoding.result())
        except BaseException:
            self.stop()
            wait([decoding])
            self.go_on()
            raise

    def advance(self, tokens: Tokens) -> None:
        """Continues sequence 0 by at most `n_batch` tokens, int32; only the last one has logits.

        This is the cheapest decode. The computation may still run when this returns (see `synchronize`).
        Raises BitladderError if the library fails.
        """
        batch = llama.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(tokens))
        self._outputs = 1
        log.lines.clear()
        self._check(llama.llama_decode(self._context, batch))

    def _check(self, status: int) -> None:
        if status != 0:
            raise BitladderError(f"decoding with {self.model.path} failed ({status}): {log.last_error()}")

    @contextlib.contextmanager
    def more_threads(self, threads: int) -> Iterator[None]:
        """Decodes with another number of threads meanwhile."""
        llama.llama_set_n_threads(self._context, threads, threads)
        try:
            yield
        finally:
            llama.llama_set_n_threads(self._context, self._threads, self._threads)

    def stop(self) -> None:
        """Ends the computation at hand, and the next ones, with an error: called from another thread. A GPU goes on."""
        self._going.value = _STOP

    def go_on(self) -> None:
        """Undoes `stop`."""
        self._going.value = _GO_ON

    def synchronize(self) -> None:
        """Waits until everything is computed."""
        llama.llama_synchronize(self._context)

    def attach(self, pool: ThreadPool) -> None:
        """Lets the CPU compute with the threads of a pool, which must outlive the context."""
        ggml.llama_attach_threadpool(self._context, pool.handle, None)

    def logits(self) -> Floats:
        """The logits of the last batch's outputs, float32, shape [outputs, n_vocab], in the order of the batch.

        This is a view of native memory: it is valid until the next decode.
        """
        llama.llama_synchronize(self._context)
        pointer = llama.llama_get_logits(self._context)
        if not pointer or not self._outputs:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(pointer, (self._outputs, self.model.n_vocab))


def sequence_logits(
    model: Model | str | os.PathLike[str],
    tokens: Tokens,
    *,
    threads: int | None = None,
    watch: Callable[[Context], None] | None = None,
) -> Floats:
    """The logits at every position of a sequence.

    Parameters:
        model: the loaded model, or its GGUF file.
        tokens: int32, shape [positions].
        threads: threads of the CPU; None uses all.
        watch: is called with the context before it decodes, so that another thread can stop it.

    Returns:
        float32, shape [positions, n_vocab].

    Raises:
        BitladderError: the file does not load, decoding fails, or a logit is not finite.
    """
    if not isinstance(model, Model):
        with Model(model, repack=False) as loaded:
            return sequence_logits(loaded, tokens, threads=threads, watch=watch)
    size, count = max(len(tokens), MIN_CTX), len(tokens)
    with Context(model, Decoding(n_ctx=size, n_batch=size, threads=threads)) as context:
        if watch:
            watch(context)
        context.decode(tokens, np.arange(count, dtype=np.int32), np.zeros(count, np.int32), np.ones(count, np.bool_))
        logits = context.logits().copy()
    if not np.isfinite(logits).all():
        raise overflow(f"the logits of {model.name} are")
    return logits


def logit_differences(logits: Floats, expected: Floats) -> Floats:
    """Absolute differences of logits as fractions of the range (largest − smallest) of the expected logits.

    Parameters:
        logits: float32, shape [positions, n_vocab].
        expected: float32, shape [positions, n_vocab].

    Returns:
        float32, shape [positions, n_vocab].
    """
    spread = np.maximum(np.ptp(expected, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.abs(logits - expected) / spread[:, None], np.float32)


def _view(pointer: Any, kind: Any, count: int) -> npt.NDArray[Any]:
    """The first `count` elements behind a ctypes pointer, as an array to write into."""
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (count,))
