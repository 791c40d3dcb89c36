"""What cannot succeed is refused before hours of work: every option against every stage that will use it."""

from collections.abc import Sequence

from bitladder.calibrate import MIN_CALIBRATION_CTX
from bitladder.errors import UsageError
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source
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
        progress.warn("MODEL is already a GGUF: --outtype and --converter have no effect")
    if text.sha256 in {one.sha256 for one in calibration}:
        progress.warn(f"{text.name} is used to calibrate and to measure: the figures will be better than on other text")
