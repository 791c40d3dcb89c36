"""One file per architecture family: how a block of it computes, in torch."""

from bitladder.calibrate.gradients.families.family import TorchFamily
from bitladder.calibrate.gradients.families.llama import Llama, Qwen2, Qwen3
from bitladder.calibrate.gradients.families.olmo2 import Olmo2

FAMILIES: dict[str, type[TorchFamily]] = {kind.name: kind for kind in (Llama, Olmo2, Qwen2, Qwen3)}

__all__ = ["FAMILIES", "TorchFamily"]
