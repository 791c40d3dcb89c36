"""Turn a Hugging Face checkpoint into a GGUF file."""

from bitladder.convert.build import ConvertResult, convert, default_name
from bitladder.hub.checkpoints import resolve

__all__ = ["ConvertResult", "convert", "default_name", "resolve"]
