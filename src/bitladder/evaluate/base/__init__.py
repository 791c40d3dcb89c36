"""The full-precision model's predictions, computed once and kept: hidden states, or llama-perplexity's file."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.evaluate.base.cache import cache_path, load_or_compute_base, open_base
    from bitladder.evaluate.base.hidden import BASE, HiddenBase, make_base
    from bitladder.evaluate.base.logits_base import LogitsBase, open_logits
    from bitladder.evaluate.base.logits_file import LogitsFile, is_logits_file, write_logits_file

__all__ = [
    "BASE",
    "HiddenBase",
    "LogitsBase",
    "LogitsFile",
    "cache_path",
    "is_logits_file",
    "load_or_compute_base",
    "make_base",
    "open_base",
    "open_logits",
    "write_logits_file",
]
open_door(__name__)
