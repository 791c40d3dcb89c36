"""Checks of every option and every text against each step that uses it, before hours of work."""

from collections.abc import Sequence

from bitladder.calibrate import MIN_CALIBRATION_CTX
from bitladder.engine import Model
from bitladder.errors import UsageError
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source
from bitladder.ladder.steps.step import Step, TextsOfRun
from bitladder.progress import Progress
from bitladder.text import MIN_CHUNKS, Text

CHARACTERS = 32  # of a token: the beginning of a text with so many for each token that is needed is looked at first


def check_options(
    options: RunOptions, source: Source, text: Text, calibration: Sequence[Text], progress: Progress
) -> None:
    """Refuses what a step would refuse later, and warns of options that have no effect.

    Parameters:
        options: the options of the run.
        source: the model.
        text: the text to measure with.
        calibration: the texts to calibrate on.
        progress: who is warned.

    Raises:
        UsageError: names the option, the value and what it must be.
    """
    if options.converter is not None and not options.converter.is_file():
        raise UsageError(f"--converter {options.converter}: no such file")
    if not source.is_gguf and options.out.resolve() == source.path.resolve():
        raise UsageError(f"--out {options.out} is the directory of the checkpoint; name another one")
    n_ctx = options.decoding.n_ctx
    if n_ctx < MIN_CALIBRATION_CTX:
        raise UsageError(f"--ctx-size is {n_ctx}; calibration needs at least {MIN_CALIBRATION_CTX} tokens")
    # A token has at least one byte, so a text of fewer bytes is too short in any vocabulary.
    needed = MIN_CHUNKS * n_ctx
    for flag, checked in [("--text", text), *(("--calibration", calibrated) for calibrated in calibration)]:
        size = len(checked.text.encode("utf-8", "surrogateescape"))
        if size < needed:
            raise UsageError(
                f"{flag} {checked.name} has {size} bytes; {needed} tokens are needed with --ctx-size {n_ctx}. "
                "Use a longer text or a smaller --ctx-size"
            )
    if source.is_gguf and (options.outtype != "auto" or options.converter):
        progress.warn("MODEL is a GGUF already: --outtype and --converter have no effect")
    if text.sha256 in {calibrated.sha256 for calibrated in calibration}:
        progress.warn(f"{text.name} is measured with and calibrated on: the figures will be better than on other text")


def check_texts(steps: Sequence[Step], texts: TextsOfRun) -> None:
    """Refuses a text that is too short for a step. Only the vocabulary of the model is loaded.

    Parameters:
        steps: the steps of the run.
        texts: the texts, and the model whose vocabulary counts.

    Raises:
        UsageError: names the option, the text, its tokens, the step, and the tokens that it needs.
    """
    checked = set[tuple[str, int]]()
    with Model(texts.full, vocab_only=True) as vocabulary:
        for step in steps:
            for part in step.cuts(texts):
                if (part.text.sha256, part.n_ctx) in checked:
                    continue
                checked.add((part.text.sha256, part.n_ctx))
                needed = MIN_CHUNKS * part.n_ctx
                if len(vocabulary.tokenize(part.text.text[: CHARACTERS * needed])) > needed:
                    continue
                tokens = len(vocabulary.tokenize(part.text.text))
                if tokens < needed:
                    raise UsageError(
                        f"{part.flag} {part.text.name} has {tokens} tokens; the step {step.name} needs {needed}. "
                        "Use a longer text or a smaller --ctx-size"
                    )
