"""A Hugging Face checkpoint becomes a GGUF file."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.convert.build import CONVERT, ConvertResult, convert, default_name, refuse_checkpoint, uses_upstream
    from bitladder.convert.checkpoint import Checkpoint
    from bitladder.convert.checkpoint_files import read_json
    from bitladder.convert.families import architectures
    from bitladder.convert.options import ConvertOptions
    from bitladder.convert.outline import Outline, write_outline
    from bitladder.convert.tokenizer import read_chat_templates
    from bitladder.convert.upstream import converter_file, library_version

__all__ = [
    "CONVERT",
    "Checkpoint",
    "ConvertOptions",
    "ConvertResult",
    "Outline",
    "architectures",
    "convert",
    "converter_file",
    "default_name",
    "library_version",
    "read_chat_templates",
    "read_json",
    "refuse_checkpoint",
    "uses_upstream",
    "write_outline",
]
open_door(__name__)
