"""Finding a base that was made before, and saying what differs when it does not fit."""

import pathlib
import re

from bitladder.engine.native import versions
from bitladder.errors import BitladderError
from bitladder.evaluate.base.basefile import BaseFile, Header
from bitladder.evaluate.base.hidden import HiddenBase, make_base
from bitladder.evaluate.identity import Identity, identify
from bitladder.evaluate.settings import Settings
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text


def cache_path(model: pathlib.Path, text: Text, n_ctx: int) -> pathlib.Path:
    """Where a model's base over a text is kept: beside the model, with a name that says what it is."""
    words = re.sub(r"[^\w.+-]+", "-", text.name)
    return model.with_name(f"{model.stem}.{words}.{n_ctx}.base")


def differences(header: Header, model: Identity, text: Text, settings: Settings) -> list[str]:
    """What keeps a base from serving a request, in words; empty if it serves."""
    commit = versions()["llama_cpp_commit"]
    found = []
    if header.model_sha256 != model.sha256:
        same = " (same name, other content)" if header.model == model.name else ""
        found.append(f"model {header.model}, not {model.name}{same}")
    if header.text_sha256 != text.sha256:
        same = " (same name, other content)" if header.text == text.name else ""
        found.append(f"text {header.text}, not {text.name}{same}")
    if header.n_ctx != settings.n_ctx:
        found.append(f"context of {header.n_ctx} tokens, not {settings.n_ctx}")
    if header.llama_cpp_commit != commit:
        found.append(f"llama.cpp commit {header.llama_cpp_commit}, not {commit}")
    wanted = settings.limit(header.chunks_in_text)
    if not found and header.chunks < wanted:
        found.append(f"{header.chunks} chunks, not {wanted}")
    return found


def open_base(path: pathlib.Path, text: Text, settings: Settings, model: Identity | None = None) -> HiddenBase:
    """Open a base file that must fit.

    Parameters: `model` the full-precision model (None: the file of the name that the base records, in the base's
    folder). A base of more chunks than wanted fits. Raises BitladderError that names every difference, or what is
    wrong with the file.
    """
    file = BaseFile(path)
    try:
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


def check_fits(base: HiddenBase, text: Text, settings: Settings) -> None:
    """Raise BitladderError that names every difference between what a base was made of and what is wanted."""
    found = differences(base.header, base.model, text, settings)
    if found:
        raise BitladderError(f"the base {base.file.path} was made with another input: {'; '.join(found)}")


def load_or_compute_base(
    model: pathlib.Path | Identity,
    text: Text,
    settings: Settings,
    *,
    path: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> HiddenBase:
    """The base of a full-precision model over a text: reused if its content's hashes fit, otherwise made.

    Parameters: `path` where it is kept. A file the caller names there must fit if it exists; the default is
    `cache_path`, where a base that does not fit is replaced. Raises BitladderError as `make_base`.
    """
    if not isinstance(model, Identity):
        model = identify(model)
    target = path or cache_path(model.path, text, settings.n_ctx)
    if target.exists():
        try:
            return open_base(target, text, settings, model)
        except BitladderError as error:
            if path is not None:
                raise
            progress.info(f"making the base again: {error}")
    make_base(model, text, target, settings, progress)
    return open_base(target, text, settings, model)
