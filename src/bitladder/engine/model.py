"""A loaded model and its vocabulary."""

import ctypes
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine.cpu_kernels import extras_work
from bitladder.engine.deaths import working_on
from bitladder.engine.native import backend, llama, log
from bitladder.errors import BitladderError
from bitladder.files import Closing, shown_name

Tokens = npt.NDArray[np.int32]
LEARNED_POSITIONS = (b"gpt2", b"starcoder")  # architectures


class Model(Closing):
    """A GGUF model in memory.

    Parameters:
        path: the file, or the first of its shards.
        mmap: whether the file is mapped instead of read. A mapped weight cannot be replaced.
        repack: whether the CPU back end keeps some types in a layout that multiplies faster, where that works (see
            `extras`). A repacked weight cannot be replaced.
        gpu_layers: layers that the GPU computes (-ngl).
        vocab_only: whether only the vocabulary is loaded.
        simulated: whether neither weights nor contexts take memory; the library only reports what they would take.

    Raises:
        BitladderError: the file does not load; the message has the library's words.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mmap: bool = True,
        repack: bool = True,
        gpu_layers: int = 0,
        vocab_only: bool = False,
        simulated: bool = False,
    ) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise BitladderError(f"no such model file: {path}")
        backend()
        working_on(self.path)
        params = llama.llama_model_default_params()
        mapped = mmap and not simulated
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mapped else llama.LLAMA_LOAD_MODE_NONE
        params.no_alloc = simulated
        params.use_extra_bufts = repack and not vocab_only and extras_work()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        log.lines.clear()
        self._model = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise BitladderError(f"{path} does not load: {log.last_error() or 'no reason given by the library'}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.gpu_layers = gpu_layers
        self.replaceable = not mmap and not repack
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd: int = llama.llama_model_n_embd(self._model)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(self._model)
        self.bos: int = llama.llama_vocab_bos(self._vocab)
        self.eos: int = llama.llama_vocab_eos(self._vocab)
        self.add_bos: bool = llama.llama_vocab_get_add_bos(self._vocab)

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return shown_name(self.path)

    @property
    def handle(self) -> int:
        """The native pointer. Raises BitladderError after `close`."""
        if not self._model:
            raise BitladderError(f"model {self.path} is closed")
        return self._model  # type: ignore[no-any-return]

    def close(self) -> None:
        """Frees the weights. All contexts of the model must be closed before."""
        if self._model:
            llama.llama_model_free(self._model)
            self._model = None

    @property
    def description(self) -> str:
        """The library's description, such as "llama 1B Q4_K - Medium"."""
        buffer = ctypes.create_string_buffer(256)
        llama.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def rotates_neighbours(self) -> bool:
        """Whether its rope rotates pairs of neighbours (llama.cpp's NORM), and not the halves of a head."""
        return bool(llama.llama_model_rope_type(self.handle) == llama.LLAMA_ROPE_TYPE_NORM)

    @property
    def most_positions(self) -> int | None:
        """Positions that it has embeddings for; None if it learned none. A later one ends the process."""
        value = ctypes.create_string_buffer(64)
        llama.llama_model_meta_val_str(self.handle, b"general.architecture", value, len(value))
        return self.n_ctx_train if value.value in LEARNED_POSITIONS else None

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return int(llama.llama_model_n_params(self.handle))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return int(llama.llama_model_size(self.handle))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> Tokens:
        """The token ids of a text, int32, shape [tokens].

        Parameters:
            text: the text.
            add_special: whether BOS and EOS are added where the vocabulary asks for them.
            parse_special: whether "<|im_end|>" and the like are read as the tokens that they name.
        """
        data = text.encode("utf-8", "surrogateescape")
        room = len(data) + 2
        out = (llama.llama_token * room)()
        count = llama.llama_tokenize(self._vocab, data, len(data), out, room, add_special, parse_special)
        if count < 0:
            out = (llama.llama_token * -count)()
            count = llama.llama_tokenize(self._vocab, data, len(data), out, -count, add_special, parse_special)
        if count < 0:
            raise BitladderError(f"{self.path} cannot tokenize the text: {log.last_error()}")
        return np.frombuffer(out, np.int32, count).copy()

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for. A control token is written out."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def detokenize(self, tokens: Sequence[int] | Tokens, *, special: bool = False) -> str:
        """The text of some tokens. With `special` control tokens are written out."""
        ids = (llama.llama_token * len(tokens))(*[int(t) for t in tokens])
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count
