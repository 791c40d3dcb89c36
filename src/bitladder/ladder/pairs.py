"""What each token scored, kept so that a rung and its preset can be compared token by token."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder import evaluate
from bitladder.files import replacing
from bitladder.ladder.records import score_path

Arrays = Mapping[str, npt.NDArray[Any]]


def tokens_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the token scores of a rung ("Q4_K_M") or a preset by itself ("Q4_K_M.naive") are."""
    return folder / "measured" / f"{name}.npz"


def keep_tokens(folder: pathlib.Path, name: str, arrays: Arrays) -> pathlib.Path:
    """Write token scores; returns the file."""
    path = tokens_path(folder, name)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **{key: arrays[key] for key in ("nll", "kld") if key in arrays})  # type: ignore[arg-type]
    return path


def paired_with_naive(folder: pathlib.Path, rung: str) -> evaluate.Paired:
    """The paired differences of a rung from the preset by itself (negative is better)."""
    this = evaluate.read_document(folder / "measured" / f"{rung}.json", evaluate.Scores)
    other = evaluate.read_scores(score_path(folder, f"{rung}.naive"))
    measured = []
    for name, scores in ((rung, this), (f"{rung}.naive", other)):
        with np.load(tokens_path(folder, name), allow_pickle=False) as file:
            measured.append(evaluate.Measurement(scores, {key: file[key] for key in file.files}))
    return evaluate.compare_pair(*measured)
