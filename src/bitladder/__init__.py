"""Turn a Hugging Face language model into a measured ladder of GGUF quants.

The names below are the public API; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitladder.calibrate import (
        Imatrix,
        ImatrixOptions,
        MomentsOptions,
        collect_imatrix,
        collect_moments,
        read_imatrix,
    )
    from bitladder.convert import convert as convert_checkpoint
    from bitladder.engine.decoding import Decoding
    from bitladder.errors import BitladderError
    from bitladder.evaluate import Scores, make_base
    from bitladder.evaluate import evaluate as evaluate_model
    from bitladder.gguf.reader import GgufFile
    from bitladder.ladder import RunOptions
    from bitladder.ladder.run import run as run_ladder
    from bitladder.quantize import quantize as quantize_model
    from bitladder.recipe import Recipe, read_recipe
    from bitladder.recipe import extract as extract_recipe
    from bitladder.report import write_card
    from bitladder.text.chunks import Reading
    from bitladder.text.texts import load_text

_HOMES = {
    "BitladderError": ("errors", "BitladderError"),
    "Decoding": ("engine.decoding", "Decoding"),
    "GgufFile": ("gguf.reader", "GgufFile"),
    "Imatrix": ("calibrate", "Imatrix"),
    "ImatrixOptions": ("calibrate", "ImatrixOptions"),
    "MomentsOptions": ("calibrate", "MomentsOptions"),
    "Reading": ("text.chunks", "Reading"),
    "Recipe": ("recipe", "Recipe"),
    "RunOptions": ("ladder", "RunOptions"),
    "Scores": ("evaluate", "Scores"),
    "collect_imatrix": ("calibrate", "collect_imatrix"),
    "collect_moments": ("calibrate", "collect_moments"),
    "convert_checkpoint": ("convert", "convert"),
    "evaluate_model": ("evaluate", "evaluate"),
    "extract_recipe": ("recipe", "extract"),
    "load_text": ("text.texts", "load_text"),
    "make_base": ("evaluate", "make_base"),
    "quantize_model": ("quantize", "quantize"),
    "read_imatrix": ("calibrate", "read_imatrix"),
    "read_recipe": ("recipe", "read_recipe"),
    "run_ladder": ("ladder", "run"),
    "write_card": ("report", "write_card"),
}

__all__ = [
    "BitladderError",
    "Decoding",
    "GgufFile",
    "Imatrix",
    "ImatrixOptions",
    "MomentsOptions",
    "Reading",
    "Recipe",
    "RunOptions",
    "Scores",
    "collect_imatrix",
    "collect_moments",
    "convert_checkpoint",
    "evaluate_model",
    "extract_recipe",
    "load_text",
    "make_base",
    "quantize_model",
    "read_imatrix",
    "read_recipe",
    "run_ladder",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(f"bitladder.{module}"), attribute)
    raise AttributeError(f"module 'bitladder' has no attribute {name!r}")
