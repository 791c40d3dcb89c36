"""What a family's file says."""

import abc
from typing import ClassVar

import torch

from bitladder.calibrate.gradients.layers import Layers


class TorchFamily(abc.ABC):
    """An architecture of llama.cpp's.

    `name` as in general.architecture; `interleaved` is its kind of rope; `takes_divisors` says whether its graph
    divides the rotary frequencies by a `rope_freqs` tensor.
    """

    name: ClassVar[str]
    interleaved: ClassVar[bool]
    takes_divisors: ClassVar[bool] = False

    @abc.abstractmethod
    def block(
        self, layers: Layers, block: int, stream: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The residual stream [batch, length, width] after block number `block`."""
