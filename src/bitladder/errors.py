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
