"""A GGUF model's forward pass in torch, float32, from the file's own tensors, and a backward pass through it.

It knows the architectures that bitladder converts, and similar ones. Its logits are compared with the library's before
it is used (`usable.check_logits`).
"""

import os
from collections.abc import Collection

import numpy as np
import torch

from bitladder.calibrate.gradients.families import FAMILIES
from bitladder.calibrate.gradients.hyperparameters import read_hyperparameters
from bitladder.calibrate.gradients.layers import Layers, Tap, nothing, rope_tables
from bitladder.calibrate.gradients.torch_weights import TorchWeights
from bitladder.closing import Closing
from bitladder.engine import Floats, Tokens
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, block_of

EMBEDDING, HEAD, DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


class TorchModel(Closing):
    """A model file as a function that can be differentiated with respect to what its matrices put out.

    `head` names the tensor that makes the logits (the embeddings where they are tied). `matrices` are the weights that
    inputs are multiplied by, in the order of the computation, the head last.

    Parameters:
        path: the model.
        memory: bytes of expanded weights that are kept; the rest is read at each use.
        threads: threads that expand weights.

    Raises:
        BitladderError: the architecture, a key or a tensor is not known here.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory: int = 8 << 30, threads: int | None = None) -> None:
        self._file = GgufFile(path)
        self.path = self._file.path
        family = FAMILIES.get(self._file.architecture)
        if family is None:
            raise BitladderError(
                f"{self.path.name}: gradients are not known for architecture {self._file.architecture!r}, only for "
                + ", ".join(sorted(FAMILIES))
            )
        self._family = family()
        self.hyperparameters = read_hyperparameters(self._file, interleaved=family.interleaved)
        self.weights = TorchWeights(self._file, memory, threads)
        self._layers = Layers(self.weights, self.hyperparameters)
        self.head = HEAD if self.weights.has(HEAD) else EMBEDDING
        self.n_vocab = self.weights.shape(self.head)[0]
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._probe()
        self.matrices = [*self._layers.multiplied, self.head]

    def close(self) -> None:
        """Forget the weights and close the file."""
        self.weights.close()
        self._file.close()

    def shape(self, name: str) -> tuple[int, int]:
        """(n_out, n_in) of a weight."""
        return self.weights.shape(name)

    def _probe(self) -> None:
        """Runs one token: every tensor must be there, and this forward pass must use all that are there."""
        self.logits(np.zeros(1, np.int32))
        unused = self.weights.unused()
        if unused:
            raise BitladderError(f"{self.path.name}: the torch forward pass has no use for tensor {unused[0]}")

    def logits(self, tokens: Tokens) -> Floats:
        """Logits of every position of one sequence: int32 [length] to float32 [length, n_vocab]."""
        with torch.no_grad():
            result: Floats = self.head_logits(self.states(tokens)).numpy()
        return result

    def backward(
        self, tokens: Tokens, names: Collection[str], tap: Tap, *, generator: torch.Generator, draws: int = 1
    ) -> None:
        """Computes one sequence forward, and backward for each draw of labels.

        A label is drawn for every position from the model's own distribution of the next token. The objective is the
        sum of their log-probabilities. Blocks below the lowest block of these weights are not differentiated.

        Parameters:
            tokens: int32 [length].
            names: weights that `tap` sees, of `matrices`.
            tap: is shown each weight, its input, and the objective's gradient with respect to its output.
            generator: draws the labels.
            draws: how many labels are drawn for each position.
        """
        ids = torch.from_numpy(tokens.astype(np.int64))
        blocks = self.hyperparameters.blocks
        lowest = min((block for name in names if (block := block_of(name)) is not None), default=blocks)
        self._layers.tapped, self._layers.tap = frozenset(names), tap
        with torch.no_grad():
            stream = self._blocks(self._embed(ids), 0, lowest)
        with torch.enable_grad():
            hidden = self._blocks(stream.requires_grad_(), lowest, blocks, final=True)
        for draw in range(draws):
            down = self._head_gradient(hidden.detach()[0], tap if self.head in names else None, generator)
            if lowest < blocks:
                hidden.backward(down[None], retain_graph=draw + 1 < draws)  # type: ignore[no-untyped-call]

    def states(self, tokens: Tokens, names: Collection[str] = (), tap: Tap = nothing) -> torch.Tensor:
        """The inputs of the head, [length, width], for one sequence, int32 [length].

        With `names` they can be differentiated: a backward pass from them shows `tap` those weights, as `backward`.
        """
        self._layers.tapped, self._layers.tap = frozenset(names), tap
        with torch.set_grad_enabled(bool(names)):
            stream = self._embed(torch.from_numpy(tokens.astype(np.int64)))
            if names:
                stream.requires_grad_()
            return self._blocks(stream, 0, self.hyperparameters.blocks, final=True)[0]

    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [length, n_vocab] of final states [length, width]."""
        logits = states @ self.weights.get(self.head).T
        bias = self.head.replace(".weight", ".bias")
        return logits + self.weights.get(bias) if self.weights.has(bias) else logits

    def head_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """An objective's derivative by the final states, from that by the logits."""
        return gradient @ self.weights.get(self.head)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weights.rows(EMBEDDING, ids)[None]

    def _blocks(self, stream: torch.Tensor, first: int, stop: int, *, final: bool = False) -> torch.Tensor:
        """Blocks first…stop−1, and the final norm, over a residual stream [1, length, width]."""
        tables = self._rope(stream.shape[1])
        for block in range(first, stop):
            stream = self._family.block(self._layers, block, stream, tables)
        return self._layers.norm(stream, "output_norm") if final else stream

    def _rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None or len(self._tables[0]) < length:
            divisors = None
            # The library's other graphs ignore divisors. A file that has them all the same is refused (`_probe`).
            if self.weights.has(DIVISORS) and self._family.takes_divisors:
                divisors = self.weights.get(DIVISORS)
            self._tables = rope_tables(self.hyperparameters.rope, length, divisors)
        return self._tables[0][:length], self._tables[1][:length]

    @torch.no_grad()
    def _head_gradient(self, hidden: torch.Tensor, tap: Tap | None, generator: torch.Generator) -> torch.Tensor:
        """Draws labels, and returns the gradient of their log-probabilities with respect to `hidden`."""
        gradient = torch.softmax(self.head_logits(hidden), -1)
        # By the inverse of the distribution function: one random number per position is enough.
        sums = gradient.cumsum(-1)
        random = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
        labels = torch.searchsorted(sums, random, right=True).clamp_(max=self.n_vocab - 1)
        # d log p(label) / d logits = onehot(label) − p
        gradient.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float32))
        if tap is not None:
            tap(self.head, hidden, gradient)
        return self.head_gradient(gradient)
