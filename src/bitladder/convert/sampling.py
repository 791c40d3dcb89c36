"""Sampling defaults: from generation_config.json into the GGUF, each as the type that llama.cpp reads."""

import pathlib
from typing import Any

import gguf

from bitladder.convert.config import MAX_INTEGER, brief, decimal_number, read_optional, whole_number
from bitladder.progress import Progress

# The field of gguf.Metadata, by the key of generation_config.json. The first ones are whole numbers, the rest not.
WHOLE = {"top_k": "sampling_top_k", "penalty_last_n": "sampling_penalty_last_n", "mirostat": "sampling_mirostat"}
DECIMAL = {
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "xtc_probability": "sampling_xtc_probability",
    "xtc_threshold": "sampling_xtc_threshold",
    "temperature": "sampling_temp",
    "penalty_repeat": "sampling_penalty_repeat",
    "mirostat_tau": "sampling_mirostat_tau",
    "mirostat_eta": "sampling_mirostat_eta",
}


def read_sampling(folder: pathlib.Path, progress: Progress) -> gguf.Metadata:
    """The sampling defaults of a checkpoint. What is no number is left out with a warning.

    Parameters:
        folder: directory of the checkpoint.
        progress: gets warnings.
    """
    values = read_optional(folder / "generation_config.json", progress)
    metadata = gguf.Metadata()
    for key in (*WHOLE, *DECIMAL, "sequence"):
        value: Any = values.get(key)
        if value is None:
            continue
        number: Any
        if key == "sequence":
            field, number = "sampling_sequence", value if isinstance(value, str) and value.isprintable() else None
        elif key in WHOLE:
            field, number = WHOLE[key], whole_number(value)
            number = number if number is not None and abs(number) <= MAX_INTEGER else None
        else:
            field, number = DECIMAL[key], decimal_number(value)
        if number is None:
            progress.warn(f"generation_config.json: {key} {brief(value)} cannot be written to a GGUF; it is left out")
        setattr(metadata, field, number)
    return metadata
