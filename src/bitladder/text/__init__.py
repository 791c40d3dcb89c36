"""Texts: loaded, excerpted and set apart, and cut into chunks of tokens."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.text.chat import ChatTemplate, Conversation
    from bitladder.text.chunks import MIN_CHUNKS, Chunks, Reading, spread_evenly, text_chunks
    from bitladder.text.file_content import json_lines, json_list, need_pyarrow, parquet_rows, plain_text
    from bitladder.text.texts import (
        BUILTIN,
        EXCERPTS,
        HELD_OUT,
        Text,
        answers_option,
        builtin_text,
        excerpts,
        load_text,
        load_texts,
        set_apart,
    )

__all__ = [
    "BUILTIN",
    "EXCERPTS",
    "HELD_OUT",
    "MIN_CHUNKS",
    "ChatTemplate",
    "Chunks",
    "Conversation",
    "Reading",
    "Text",
    "answers_option",
    "builtin_text",
    "excerpts",
    "json_lines",
    "json_list",
    "load_text",
    "load_texts",
    "need_pyarrow",
    "parquet_rows",
    "plain_text",
    "set_apart",
    "spread_evenly",
    "text_chunks",
]
open_door(__name__)
