"""Texts: loaded, excerpted, joined and set apart, and cut into chunks of tokens."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.text.chunks import MIN_CHUNKS, Chunks, Reading, spread_evenly, text_chunks
    from bitladder.text.plain import plain_text
    from bitladder.text.texts import BUILTIN, HELD_OUT, Text, builtin_text, excerpts, joined, load_text, set_apart

__all__ = [
    "BUILTIN",
    "HELD_OUT",
    "MIN_CHUNKS",
    "Chunks",
    "Reading",
    "Text",
    "builtin_text",
    "excerpts",
    "joined",
    "load_text",
    "plain_text",
    "set_apart",
    "spread_evenly",
    "text_chunks",
]
open_door(__name__)
