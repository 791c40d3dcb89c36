"""Presets ("Q4_K_M") as the library knows them: their names, and the type each would give each tensor."""

import ctypes
import dataclasses
import functools
import os
import re

from bitladder.engine.native import llama, log
from bitladder.engine.types import TensorType, type_by_name
from bitladder.errors import BitladderError

# What llama-quantize also accepts.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "F32": "ALL_F32"}

_TENSOR = re.compile(r"\[\s*\d+/\s*\d+\] (\S+)\s+- \[[^]]*\], type =\s*(\S+), size =[^\n(]*(?:\((\S+)\))?\n")
_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")


@dataclasses.dataclass(frozen=True)
class PresetTypes:
    """What a preset does to a file: tensors in the order llama-quantize writes them, with their new types.

    `fallbacks` counts tensors whose width cannot hold the preset's own type; `needs_imatrix` says that it cannot be
    made without one.
    """

    types: dict[str, TensorType]
    fallbacks: int
    needs_imatrix: bool


@functools.cache
def presets() -> dict[str, int]:
    """Preset name → llama_ftype number, from the bindings' constants (LLAMA_FTYPE_MOSTLY_Q4_K_M → "Q4_K_M")."""
    found = {}
    for name in dir(llama):
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED":
            found[name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_")] = int(getattr(llama, name))
    return found


def preset_number(name: str) -> int:
    """The llama_ftype of a preset, in any case. Raises BitladderError that lists the presets."""
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in presets():
        raise BitladderError(f"unknown preset {name!r}; the library knows {', '.join(sorted(presets()))}")
    return presets()[upper]


def preset_types(path: str | os.PathLike[str], preset: str, *, imatrix: bool) -> PresetTypes:
    """Ask the library (llama_model_quantize, dry run) what a preset gives each tensor of a file.

    `imatrix` tells whether an importance matrix will be used, as some presets choose differently then. Raises
    BitladderError in the library's words if it refuses the file.
    """
    params = llama.llama_model_quantize_default_params()
    params.ftype = preset_number(preset)
    params.dry_run = True
    params.nthread = 1
    if imatrix:
        # Only its presence matters in a dry run.
        one = (ctypes.c_float * 1)(1.0)
        data = (llama.llama_model_imatrix_data * 2)()
        data[0].name, data[0].data, data[0].size = b"any", one, 1
        params.imatrix = data
    log.lines.clear()
    with log.tapped() as pieces:
        # The output name is not used in a dry run, but must differ from the input's.
        status = llama.llama_model_quantize(os.fsencode(path), os.fsencode(path) + b".dry", ctypes.byref(params))
    if status != 0:
        raise BitladderError(f"the library cannot quantize {path}: {log.last_error()}")
    text = "".join(pieces)
    types = {name: type_by_name(new or old) for name, old, new in _TENSOR.findall(text)}
    fallbacks = _FALLBACKS.search(text)
    return PresetTypes(types, int(fallbacks[1]) if fallbacks else 0, "will require an imatrix" in text)
