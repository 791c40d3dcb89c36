"""Finds a base that was made before, and says what differs if it does not fit."""

import pathlib
from typing import Any

from bitladder.engine import versions
from bitladder.errors import BitladderError
from bitladder.evaluate.base.basefile import BaseFile, BaseHeader, is_base_file
from bitladder.evaluate.base.hidden import BASE, HiddenBase, make_base
from bitladder.evaluate.identity import Identity, MeasureOptions, identify
from bitladder.files import file_name
from bitladder.keys import key_of
from bitladder.progress import SILENT, Progress
from bitladder.text import Text
from bitladder.units import number_of


def cache_path(model: pathlib.Path, text: Text, n_ctx: int) -> pathlib.Path:
    """Where a model's base over a text is kept: beside the model, with a name that says what it is."""
    return model.with_name(f"{model.stem}.{file_name(text.name)}.{n_ctx}.base")


def differences(header: BaseHeader, model: Identity, text: Text, settings: MeasureOptions) -> list[str]:
    """What keeps a base from serving a request, in words; empty if it serves."""
    requested: dict[str, Any] = {
        "model": model.sha256,
        "text": text.sha256,
        "n_ctx": settings.n_ctx,
        "unscored": settings.unscored,
        "algorithms": BASE.versions(),
        "library": versions()["llama_cpp_commit"],
    }
    if key_of(header.inputs) == key_of(requested):
        chunks = settings.limit(header.chunks_in_text)
        return [f"{number_of(header.chunks, 'chunk')}, not {chunks}"] if header.chunks < chunks else []
    in_words = {
        "model": f"model {header.model}, not {model.name}{_same_name(header.model, model.name)}",
        "text": f"text {header.text}, not {text.name}{_same_name(header.text, text.name)}",
        "n_ctx": f"context of {header.n_ctx} tokens, not {settings.n_ctx}",
        "unscored": "other tokens of a chunk scored",
        "algorithms": "another version of bitladder's algorithm",
        "library": f"llama.cpp commit {header.llama_cpp_commit}, not {requested['library']}",
    }
    return [words for name, words in in_words.items() if header.inputs[name] != requested[name]]


def _same_name(kept: str, requested: str) -> str:
    return " (same name, other content)" if kept == requested else ""


def open_base(path: pathlib.Path, text: Text, settings: MeasureOptions, model: Identity | None = None) -> HiddenBase:
    """Opens a base file that must fit, after a check of all its bytes. A base of more chunks than requested fits.

    Parameters:
        path: the base file.
        text: the text to measure on.
        settings: how to decode, and how many chunks.
        model: the full-precision model; None is the file that the base names, in the folder of the base.

    Raises:
        BitladderError: the file is damaged, its model is missing, or it was made with another input. The error names
            every difference.
    """
    file = BaseFile(path)
    try:
        file.check()
        if model is None:
            beside = path.with_name(file.header.model)
            if not beside.is_file():
                raise BitladderError(
                    f"the base {path} needs the head of {file.header.model}, which is not in its folder: "
                    "name the model with --base and the base with --base-file"
                )
            model = identify(beside)
        base = HiddenBase(file, model)
    except BaseException:
        file.close()
        raise
    try:
        check_fits(base, text, settings)
    except BaseException:
        base.close()
        raise
    return base


def check_fits(base: HiddenBase, text: Text, settings: MeasureOptions) -> None:
    """Raises BitladderError that names every difference between what a base was made of and what is requested."""
    differing = differences(base.header, base.model, text, settings)
    if differing:
        raise BitladderError(f"the base {base.file.path} was made with another input: {'; '.join(differing)}")


def load_or_compute_base(
    model: pathlib.Path | Identity,
    text: Text,
    settings: MeasureOptions,
    *,
    path: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> HiddenBase:
    """Opens the base of a full-precision model over a text, or computes it.

    Parameters:
        model: the full-precision model.
        text: the text to predict.
        settings: how to decode, and how many chunks.
        path: where the base is kept. A file that exists there must fit. None is `cache_path`, where a base that does
            not fit is replaced.
        progress: receives the progress.

    Raises:
        BitladderError: as `make_base`, or the file at `path` does not fit.
    """
    if not isinstance(model, Identity):
        model = identify(model)
    target = path or cache_path(model.path, text, settings.n_ctx)
    if target.exists():
        try:
            return open_base(target, text, settings, model)
        except BitladderError as error:
            if path is not None or not is_base_file(target):
                raise  # a file of another kind is somebody else's
            progress.info(f"making the base again: {error}")
    make_base(model, text, target, settings, progress)
    return open_base(target, text, settings, model)
