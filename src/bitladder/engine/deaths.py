"""The death of the process inside the library, told in one line that names the file.

A file from outside can break an assertion of llama.cpp, or make it divide by zero. The library then ends the process.
The handlers here run in a dying process. They remove unfinished files, print a line and exit with 1.
"""

import ctypes
import os
import pathlib
import re
import signal
import sys
from typing import Any

from bitladder.files import discard_unfinished

SIGNALS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")
_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)

_state: dict[str, str] = {"file": "", "message": ""}
_kept: list[Any] = []  # callbacks, which must not be collected


def working_on(path: pathlib.Path) -> None:
    """Notes the file that the library is given."""
    _state["file"] = path.name


def tell_of_deaths() -> None:
    """From now on a death in native code is one line. For the command line: it changes what signals do."""
    if _kept or sys.platform == "win32":
        return
    # An uncaught exception prints a backtrace otherwise, by a debugger if there is one.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    handler = _HANDLER(_die)
    _kept.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    for name in SIGNALS:
        libc.signal(ctypes.c_int(int(getattr(signal, name))), handler)


def note_assertions(set_abort_callback: Any) -> None:
    """Keeps the message of a failed assertion for the line, if `tell_of_deaths` was called before."""
    if _kept:
        callback = _ABORT(_note)
        _kept.append(callback)
        set_abort_callback(ctypes.cast(callback, ctypes.c_void_p))


def _note(message: bytes) -> None:
    text = " ".join(message.decode("utf-8", "replace").split())
    _state["message"] = re.sub(r"^\S*/", "", text)  # without the folder of the library's source


def _die(number: int) -> None:
    discard_unfinished()
    what = _state["message"] or signal.Signals(number).name
    about = f" with {_state['file']}" if _state["file"] else ""
    line = f"bitladder: llama.cpp stopped{about} ({what[:300]}); the file is damaged, or not of a kind that it runs\n"
    os.write(2, line.encode("utf-8", "replace"))
    os._exit(1)
