"""Which inputs a model's weights have, and which weights share one."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model
from bitladder.engine.observe import Multiplication
from bitladder.errors import BitladderError
from bitladder.gguf.names import in_main_block

Floats = npt.NDArray[np.float32]
HEADS = ("output.weight", "token_embd.weight")  # the second one where the head is tied to the embeddings


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of one or more weights, in the order of the computation; it is watched at the first of them.

    `matrices` are the weight's: 1, or one for each expert (`experts`: every token goes to some of them), or slices of
    a weight with three dimensions, which all see every token.
    """

    names: tuple[str, ...]
    width: int
    matrices: int
    experts: bool

    @property
    def leader(self) -> str:
        """The weight at which the input is watched."""
        return self.names[0]


class _Survey:
    """Notes every multiplication and looks at none."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int, bool], list[Multiplication]] = {}

    def wants(self, seen: Multiplication) -> bool:
        if in_main_block(seen.weight) or seen.weight in HEADS:
            key = (seen.input_id, seen.shape[2] * seen.shape[3], seen.experts)
            self.found.setdefault(key, []).append(seen)
        return False

    def see(self, seen: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        raise AssertionError("nothing was asked for")


def model_inputs(model: Model, threads: int | None = None) -> list[Input]:
    """The inputs of all weights of blocks and of the head, in the order of the computation.

    One token is decoded to see the graph. A weight that is multiplied twice has the input that it meets first.
    """
    survey = _Survey()
    with Context(model, Decoding(n_ctx=32, threads=threads), observer=survey) as context:
        context.decode([max(model.bos, 0)], [0], [0], [True])
    inputs, seen = [], set[str]()
    for (_, matrices, experts), found in survey.found.items():
        names = tuple(dict.fromkeys(one.weight for one in found if one.weight not in seen))
        seen.update(names)
        if names:
            inputs.append(Input(names, found[0].shape[0], matrices, experts))
    if not inputs:
        raise BitladderError(f"{model.path.name} multiplies by no weight of a block: nothing can be collected")
    return inputs


def choose_inputs(inputs: Sequence[Input], names: Sequence[str] | None, where: str) -> list[Input]:
    """The inputs of these weights only (None: of all). Raises BitladderError for a name that is none of them."""
    if names is None:
        return list(inputs)
    known = {name for one in inputs for name in one.names}
    odd = [name for name in names if name not in known]
    if odd:
        raise BitladderError(f"{where} does not multiply by a weight called {odd[0]!r}; see bitladder recipe show")
    wanted = set(names)
    kept = ((one, tuple(name for name in one.names if name in wanted)) for one in inputs)
    return [dataclasses.replace(one, names=some) for one, some in kept if some]
