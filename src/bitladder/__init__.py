"""Turn a Hugging Face language model into a measured ladder of GGUF quants.

The names below are the public API; each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

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
    from bitladder.engine import Decoding
    from bitladder.errors import BitladderError
    from bitladder.evaluate import Scores, make_base
    from bitladder.evaluate import evaluate as evaluate_model
    from bitladder.gguf import GgufFile
    from bitladder.ladder import RunOptions
    from bitladder.ladder import run as run_ladder
    from bitladder.quantize import quantize as quantize_model
    from bitladder.recipe import Recipe, read_recipe
    from bitladder.recipe import extract as extract_recipe
    from bitladder.report import write_card
    from bitladder.text import Reading, load_text

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
open_door(__name__)
