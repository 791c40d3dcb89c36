"""A GGUF model's forward pass in torch, float32, from the file's own tensors, and a backward pass through it.

Its modules are those of transformers. Its logits are compared with the library's before it is used
(`usable.check_logits`).
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from concurrent.futures import Executor

import numpy as np
import torch

from bitladder.calibrate.gradients.modules import Modules
from bitladder.calibrate.gradients.torch_weights import Layers, Tap, TorchWeights, nothing
from bitladder.engine import Floats, Tokens
from bitladder.errors import BitladderError, GradientsError
from bitladder.files import Closing
from bitladder.gguf import EMBEDDING, HEAD, GgufFile, block_of, prediction_tensors

CHECKED_TOKENS = 128  # of the first chunk, whose logits are compared before work starts
HEAD_ROWS = 128  # positions whose logits are made at once


class TorchModel(Closing):
    """A model file as a function that can be differentiated with respect to what its matrices put out.

    `head` names the tensor that makes the logits (the embeddings where they are tied), `embedding` embeddings that
    only are looked up, or is None. `matrices` are the weights that inputs are multiplied by, in the order of the
    computation, the head last; `uses` says how often each one is. Several threads may compute at once, but for the
    values of `half`.

    Parameters:
        path: the model.
        memory: bytes of expanded weights that are kept; the rest is read at each use.
        threads: threads that expand weights.
        half: whether products with weights are made in bfloat16.
        device: what makes products with weights (`engine.torch_device`); None is the CPU.

    Raises:
        GradientsError: transformers has no such model, or uses other tensors than the file has.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        memory: int = 8 << 30,
        threads: int | None = None,
        half: bool = False,
        device: str | None = None,
    ) -> None:
        self._file = GgufFile(path)
        self.path = self._file.path
        self.device = device
        self.weights = TorchWeights(self._file, memory, threads, device)
        self._layers = Layers(self.weights, half)
        self.head = HEAD if self.weights.has(HEAD) else EMBEDDING
        self.embedding = EMBEDDING if self.head != EMBEDDING else None
        self.n_vocab = self.weights.shape(self.head)[0]
        try:
            self.modules = Modules(self._file, self._layers)
            self._probe()
        except BaseException as error:
            self.close()
            if isinstance(error, BitladderError | MemoryError) or not isinstance(error, Exception):
                raise
            # Whatever transformers' modules of a model that nobody tried do.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise GradientsError(f"{self.path.name}: transformers' modules fail: {problem}") from error
        self.uses = {**self._layers.uses, self.head: 1}
        self.matrices = list(self.uses)

    def close(self) -> None:
        """Forget the weights and close the file."""
        self.weights.close()
        self._file.close()

    @property
    def half(self) -> bool:
        """Whether products with weights are made in bfloat16."""
        return self._layers.half

    @half.setter
    def half(self, half: bool) -> None:
        self.weights.forget()
        self._layers.half = half

    def set_repeatable(self, pool: Executor | None) -> None:
        """See `Layers.set_repeatable`."""
        self._layers.set_repeatable(pool)

    def set_check(self, check: Callable[[], None]) -> None:
        """See `Layers.set_check`."""
        self._layers.set_check(check)

    def shape(self, name: str) -> tuple[int, int]:
        """(n_out, n_in) of a weight, or of each of its experts."""
        return self.weights.shape(name)

    def experts(self, name: str) -> int:
        """Matrices of a weight: its experts, or 1."""
        return self.weights.matrices(name)

    def _probe(self) -> None:
        """Runs two tokens: every tensor must be there, and this forward pass must use all that are there."""
        self.logits(np.zeros(2, np.int32))
        heads = set(prediction_tensors(self._file))
        unused = [name for name in self.weights.unused() if name not in heads]
        if unused:
            raise GradientsError(f"{self.path.name}: the torch forward pass has no use for tensor {unused[0]}")

    def checked(self, chunk: Tokens) -> Tokens:
        """The first tokens of a chunk, whose logits are compared before work starts: more than a block sees at once."""
        window = self.modules.window or 0
        return chunk[: CHECKED_TOKENS + (window if window < len(chunk) else 0)]

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
        blocks = self.modules.blocks
        lowest = min((block for name in names if (block := block_of(name)) is not None), default=blocks)
        with torch.no_grad():
            stream = self.run(self.embed(tokens), 0, lowest)
        part = self.differentiable(stream, lowest, blocks, names, tap)
        for draw in range(draws):
            tapped = tap if self.head in names else None
            down, _ = self.head_backward(part.result.detach()[0], generator, tapped)
            if lowest < blocks:
                part.backward(down[None], last=draw + 1 == draws)

    def differentiable(
        self, stream: torch.Tensor, first: int, stop: int, names: Collection[str], tap: Tap
    ) -> "Differentiable":
        """Blocks first…stop−1 over a residual stream [1, length, width], and the final norm behind the last one.

        A backward pass from the result shows `tap` those of the weights `names` that are in these blocks.
        """
        self._layers.set_tap(names, tap)
        with torch.enable_grad():
            leaf = stream.detach().requires_grad_()
            return Differentiable(leaf, self.run(leaf, first, stop, final=stop == self.modules.blocks))

    def embed(self, tokens: Tokens) -> torch.Tensor:
        """The residual stream [1, length, width] before the first block."""
        return self.modules.embed(torch.from_numpy(tokens.astype(np.int64)))

    def run(self, stream: torch.Tensor, first: int, stop: int, *, final: bool = False) -> torch.Tensor:
        """Blocks first…stop−1, and the final norm, over a residual stream [1, length, width]."""
        return self.modules.run(stream, first, stop, final=final)

    def states(self, tokens: Tokens, names: Collection[str] = (), tap: Tap = nothing) -> torch.Tensor:
        """The inputs of the head, [length, width], for one sequence, int32 [length].

        With `names` they can be differentiated: a backward pass from them shows `tap` those weights, as `backward`.
        """
        self._layers.set_tap(names, tap)
        with torch.set_grad_enabled(bool(names)):
            stream = self.embed(tokens)
            if names:
                stream.requires_grad_()
            return self.run(stream, 0, self.modules.blocks, final=True)[0]

    def head_products(self, states: torch.Tensor) -> torch.Tensor:
        """Products [length, n_vocab] of final states [length, width] with the head."""
        products = self._layers.multiply(states, self.head)
        bias = self.head.replace(".weight", ".bias")
        return products + self.weights.get(bias) if self.weights.has(bias) else products

    def head_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [length, n_vocab] of final states [length, width]."""
        return self.modules.after_head(self.head_products(states))

    def head_gradient(self, gradient: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        """An objective's derivative by the final states, from that by the logits.

        Parameters:
            gradient: the derivative by the logits, [length, n_vocab].
            products: as of `head_products`.
        """
        return self._layers.back(self.modules.before_head(gradient, products), self.head)

    @torch.no_grad()
    def head_backward(
        self, hidden: torch.Tensor, generator: torch.Generator, tap: Tap | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws labels, and differentiates the sum of their log-probabilities.

        Parameters:
            hidden: final states, [length, width].
            generator: draws the labels.
            tap: is shown the head, if it is wanted: then all logits are in memory at once.

        Returns:
            The derivative by `hidden`, [length, width], and the squared length of that by the logits, [length].
        """
        # By the inverse of the distribution function: one random number per position is enough.
        random = torch.rand(len(hidden), 1, generator=generator)
        step = len(hidden) if tap is not None else HEAD_ROWS
        parts = [
            self._label_gradients(rows, draws, tap)
            for rows, draws in zip(torch.split(hidden, step), torch.split(random, step), strict=True)
        ]
        return torch.cat([down for down, _ in parts]), torch.cat([squares for _, squares in parts])

    def _label_gradients(
        self, hidden: torch.Tensor, random: torch.Tensor, tap: Tap | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        products = self.head_products(hidden)
        gradient = torch.softmax(self.modules.after_head(products), -1)
        sums = gradient.cumsum(-1)
        labels = torch.searchsorted(sums, random * sums[:, -1:], right=True).clamp_(max=self.n_vocab - 1)
        del sums
        # d log p(label) / d logits = onehot(label) − p
        gradient.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float32))
        gradient = self.modules.before_head(gradient, products)
        if tap is not None:
            tap(self.head, hidden, gradient, None)
        return self._layers.back(gradient, self.head), torch.linalg.vecdot(gradient, gradient)


@dataclasses.dataclass(frozen=True)
class Differentiable:
    """Blocks of a model over one sequence, which can be differentiated.

    Parameters:
        stream: the residual stream before them, [1, length, width].
        result: what they make of it, [1, length, width].
    """

    stream: torch.Tensor
    result: torch.Tensor

    def backward(self, gradient: torch.Tensor, *, last: bool = True) -> torch.Tensor:
        """The derivative by the stream, from that by the result. After the `last` call the memory is free."""
        (down,) = torch.autograd.grad(self.result, self.stream, gradient, retain_graph=not last)
        return down
