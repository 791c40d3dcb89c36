"""The one error a user sees."""


class BitladderError(Exception):
    """Something the user can mend: the message names the tensor, file or option and says what to do.

    The command line prints the message as one line and exits with `code`. Everything else that is raised is a bug
    in bitladder.
    """

    code = 1


class UsageError(BitladderError):
    """An option's value is wrong."""

    code = 2


def overflow(what: str) -> BitladderError:
    """The error of a result that is not finite ("the logits of X are"), with the usual cause and the way out."""
    return BitladderError(
        f"{what} not finite: activations overflow F16, or weights are damaged; convert the model with --outtype bf16 "
        "or f32 and start from that file (if it is a quant of such a file already, take a K-quant: Q8_0, Q4_0 and the "
        "like hold no inputs above 8e6)"
    )
