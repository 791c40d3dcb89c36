"""Decoding: batches of one or several sequences, logits, and whoever watches the multiplications."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.devices import ThreadPool
from bitladder.engine.interrupts import keeping_interrupts
from bitladder.engine.model import Model, Tokens
from bitladder.engine.native import ggml, llama, log
from bitladder.engine.observe import Observer, Trampoline
from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type


class Context(Closing):
    """Room to decode with a model.

    Parameters: `n_ctx` tokens per sequence (-c); `n_seq` sequences decoded side by side; `n_batch` tokens per decode
    call (-b) and `n_ubatch` per computation (-ub); `threads` (-t); `observer` is shown the inputs of weight
    multiplications, and with `skip_head` no logits are computed then (`callback` is for watchers of whole graphs, see
    observe.Weights); `flash_attn` (-fa) is "auto", "on" or "off"; `swa_full` keeps all of a sliding window's cache.
    Raises BitladderError if the library refuses (memory, mostly).
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 512,
        n_seq: int = 1,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        threads: int | None = None,
        kv_unified: bool = False,
        flash_attn: str = "auto",
        swa_full: bool = True,
        observer: Observer | None = None,
        skip_head: bool = False,
        callback: Trampoline | None = None,
    ) -> None:
        self.model = model
        self.n_ctx = n_ctx
        self.n_seq = n_seq
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_seq_max = n_seq
        self.n_batch = params.n_batch = min(n_batch, n_ctx * n_seq)
        params.n_ubatch = min(n_ubatch, params.n_batch)
        params.n_outputs_max = params.n_outputs_max_per_seq = params.n_batch
        params.n_threads = params.n_threads_batch = threads or threads_available()
        params.kv_unified = kv_unified
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        params.swa_full = swa_full
        self._trampoline = Trampoline(observer, skip_head) if observer else callback
        if self._trampoline:
            params.cb_eval = self._trampoline.callback
        log.lines.clear()
        self._context = llama.llama_init_from_model(model.handle, params)
        if not self._context:
            raise BitladderError(f"no context of {n_seq} × {n_ctx} tokens for {model.path}: {log.last_error()}")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(self.n_batch, 0, n_seq)
        self._outputs = 0

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            self._context = None

    def clear(self, *, data: bool = True) -> None:
        """Forget every sequence; without `data` the old numbers stay where they are, unused."""
        if self._memory:
            llama.llama_memory_clear(self._memory, data)

    def decode(
        self,
        tokens: Sequence[int] | Tokens,
        positions: Sequence[int] | Tokens,
        sequences: Sequence[int] | Sequence[tuple[int, ...]] | Tokens,
        outputs: Sequence[bool] | npt.NDArray[np.bool_],
    ) -> None:
        """Decode one batch of at most `n_batch` tokens.

        Each of the four has one entry per token: id, position in its sequence, sequence number (or the numbers of
        all sequences that share the token), and whether its logits are wanted. Raises BitladderError if the batch is
        too large or the library fails; an exception raised by the observer is raised again here.
        """
        count = len(tokens)
        if count > self.n_batch:
            raise BitladderError(f"batch of {count} tokens, but the context takes {self.n_batch} (-b)")
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
        if self._trampoline:
            with keeping_interrupts(self._trampoline.keep_error):
                status = llama.llama_decode(self._context, batch)
            self._trampoline.raise_pending()
        else:
            status = llama.llama_decode(self._context, batch)
        self._check(status)

    def advance(self, tokens: Tokens) -> None:
        """Go on with sequence 0 by at most `n_batch` tokens, int32, with logits for the last one only.

        The least that a decode costs; it need not be done when this returns (see `synchronize`). Raises BitladderError
        if the library fails.
        """
        batch = llama.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(tokens))
        self._outputs = 1
        log.lines.clear()
        status = llama.llama_decode(self._context, batch)
        self._check(status)

    def _check(self, status: int) -> None:
        if status != 0:
            raise BitladderError(f"decoding with {self.model.path} failed ({status}): {log.last_error()}")

    def synchronize(self) -> None:
        """Wait until everything is computed."""
        llama.llama_synchronize(self._context)

    def attach(self, pool: ThreadPool) -> None:
        """Let the CPU compute with a pool's threads, which must outlive the context."""
        ggml.llama_attach_threadpool(self._context, pool.handle, None)

    def logits(self) -> Floats:
        """Logits of the last batch's outputs, float32 [outputs, n_vocab], in the order of the batch.

        A view of native memory: valid until the next decode.
        """
        llama.llama_synchronize(self._context)
        pointer = llama.llama_get_logits(self._context)
        if not pointer or not self._outputs:
            return np.empty((0, self.model.n_vocab), np.float32)
        return np.ctypeslib.as_array(pointer, (self._outputs, self.model.n_vocab))


def _view(pointer: Any, kind: Any, count: int) -> npt.NDArray[Any]:
    """The first `count` elements behind a ctypes pointer, as an array to write into."""
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (count,))
