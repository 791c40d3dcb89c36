"""The one error a user sees, and the name that a mistyped one may stand for."""

import difflib
from collections.abc import Iterable


class BitladderError(Exception):
    """Something the user can mend: the message names the tensor, file or option and says what to do.

    The command line prints the message as one line and exits with `code`. Everything else that is raised is a bug
    in bitladder.
    """

    code = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: work stops as after Ctrl-C."""


class GradientsError(BitladderError):
    """Gradients of a model cannot be had, or cannot be trusted. Whoever does not need them goes on without."""


class UsageError(BitladderError):
    """An option's value is wrong."""

    code = 2


def did_you_mean(word: str, known: Iterable[str], listed: str) -> str:
    """The end of an error about an unknown name: the closest names, or all of them if none is or many are close.

    Parameters:
        word: what was typed.
        known: the names that there are.
        listed: what stands before the list of all names.

    Example:
        >>> did_you_mean("q4_km", ["Q4_K_S", "Q4_K_M"], "the presets are")
        '; did you mean Q4_K_M?'
        >>> did_you_mean("zebra", ["Q4_K_S", "Q4_K_M"], "the presets are")
        '; the presets are Q4_K_S, Q4_K_M'
    """
    names = list(known)
    close = nearest(word, names)
    return f"; did you mean {' or '.join(close)}?" if close else f"; {listed} {', '.join(names)}"


def nearest(word: str, known: Iterable[str], least: float = 0.6) -> list[str]:
    """The names that a mistyped one may stand for; nothing if none or many are close.

    Parameters:
        word: what was typed.
        known: the names that there are.
        least: how much of both must be alike (0 to 1).
    """
    names = list(known)
    near = {name: difflib.SequenceMatcher(None, word.casefold(), name.casefold()).ratio() for name in names}
    best = max(near.values(), default=0.0)
    close = [name for name in names if near[name] >= best - 0.05]  # "attn" is as near to attn_k as to attn_q
    return [] if best < least or len(close) > 4 else close


def overflow(what: str) -> BitladderError:
    """The error of a result that is not finite ("the logits of X are"), with the usual cause and the way out."""
    return BitladderError(
        f"{what} not finite: activations overflow F16, or weights are damaged; convert the model with --outtype bf16 "
        "or f32 and start from that file (if it is a quant of such a file already, take a K-quant: Q8_0, Q4_0 and the "
        "like hold no inputs above 8e6)"
    )


def in_one_line(error: BaseException) -> str:
    """What an error of another package says, in one line of 200 letters at most; its kind, if it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
