"""Texts: loaded, excerpted, joined and set apart, and cut into chunks of tokens."""

from bitladder.text.chunks import Chunks, Reading, spread_evenly, text_chunks
from bitladder.text.excerpts import HELD_OUT, excerpts, joined, set_apart
from bitladder.text.texts import BUILTIN, Text, builtin_text, load_text

__all__ = [
    "BUILTIN",
    "HELD_OUT",
    "Chunks",
    "Reading",
    "Text",
    "builtin_text",
    "excerpts",
    "joined",
    "load_text",
    "set_apart",
    "spread_evenly",
    "text_chunks",
]
