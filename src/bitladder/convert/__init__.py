"""A Hugging Face checkpoint becomes a GGUF file."""

from bitladder.convert.build import CONVERT, ConvertResult, convert, default_name
from bitladder.convert.checkpoint import Checkpoint

__all__ = ["CONVERT", "Checkpoint", "ConvertResult", "convert", "default_name"]
