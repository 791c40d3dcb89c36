"""--converter: let a script of llama.cpp's do what bitladder does not know."""

import pathlib
import subprocess
import sys

import gguf

from bitladder.errors import BitladderError
from bitladder.progress import Progress

TAIL = 5


def run_converter(
    script: pathlib.Path, folder: pathlib.Path, target: pathlib.Path, outtype: str, progress: Progress
) -> tuple[str, int]:
    """Run `script MODELDIR --outfile target --outtype T` with this Python; return (architecture, tensors).

    Raises BitladderError with the script's last lines if it fails or writes no GGUF.
    """
    if not script.is_file():
        raise BitladderError(f"--converter {script}: no such file")
    progress.info(f"running {script.name} on {folder.name}")
    command = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise BitladderError(f"{script.name} failed ({done.returncode}): {' / '.join(lines[-TAIL:]) or 'no message'}")
    with target.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BitladderError(f"{script.name} ended well but wrote no GGUF")
    reader = gguf.GGUFReader(target)
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    return (str(field.contents()) if field else "unknown"), len(reader.tensors)
