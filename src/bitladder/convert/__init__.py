"""A Hugging Face checkpoint becomes a GGUF file."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.convert.build import CONVERT, ConvertResult, convert, default_name
    from bitladder.convert.checkpoint import Checkpoint

__all__ = ["CONVERT", "Checkpoint", "ConvertResult", "convert", "default_name"]
open_door(__name__)
