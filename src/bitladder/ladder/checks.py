"""What cannot succeed is refused before hours of work: every option against every stage that will use it."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.calibrate import MIN_CALIBRATION_CTX
from bitladder.errors import UsageError
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source
from bitladder.ladder.store import Store
from bitladder.progress import Progress
from bitladder.text import Text

SCORED_CHUNKS = 2  # contexts of text that a measurement needs at least, as llama-perplexity has it


def check_options(
    options: RunOptions, source: Source, text: Text, calibration: Sequence[Text], progress: Progress
) -> None:
    """Refuses what some stage would refuse later, and warns of what has no effect.

    Raises UsageError that names the option, the value and the stage.
    """
    if options.converter is not None and not options.converter.is_file():
        raise UsageError(f"--converter {options.converter}: no such file")
    if not source.is_gguf and options.out.resolve() == source.path.resolve():
        raise UsageError(f"--out {options.out} is the directory of the checkpoint; name another one")
    n_ctx = options.decoding.n_ctx
    if n_ctx < MIN_CALIBRATION_CTX:
        raise UsageError(f"--ctx-size is {n_ctx}; calibration needs at least {MIN_CALIBRATION_CTX} tokens")
    # A token has at least one byte, so a text of fewer bytes is too short in any vocabulary.
    for what, one, contexts in [("--text", text, SCORED_CHUNKS), *(("--calibration", one, 1) for one in calibration)]:
        have = len(one.text.encode("utf-8", "surrogateescape"))
        if have < contexts * n_ctx:
            raise UsageError(
                f"{what} {one.name} has {have} bytes; {contexts * n_ctx} tokens are needed with --ctx-size {n_ctx}. "
                "Use a longer text or a smaller --ctx-size"
            )
    if source.is_gguf and (options.outtype != "auto" or options.converter):
        progress.warn("MODEL is a GGUF already: --outtype and --converter have no effect")
    if text.sha256 in {one.sha256 for one in calibration}:
        progress.warn(f"{text.name} is measured with and calibrated on: the figures will be better than on other text")


def refuse_other_model(options: RunOptions, source: Source, store: Store) -> None:
    """Refuses a run directory with the ladder of another model, unless --replace is given.

    A model is the same if its weights are the same files, or if it is the full-precision GGUF of the ladder.

    Raises UsageError that names both models.
    """
    convert = store.manifest.steps.get("convert")
    if convert is None or options.replace_model:
        return
    known = set(_weights(convert.inputs["model"])) | {output.sha256 for output in convert.outputs}
    if not known & set(_weights(source.digest(store))):
        raise UsageError(
            f"--out {options.out} has the ladder of {convert.inputs['model']['name']}, whose weights are not those of "
            f"{source.name}; name another directory, or give --replace to replace that ladder"
        )


def _weights(digest: Mapping[str, Any]) -> list[str]:
    """The content hashes of the files of a model that hold weights."""
    return [sha for name, sha in digest["files"].items() if name.endswith((".safetensors", ".bin", ".gguf"))]
