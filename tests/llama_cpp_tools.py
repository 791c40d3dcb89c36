"""llama.cpp's own tools, with which tests compare."""

import os
import pathlib
import re
import subprocess


class Tools:
    """llama.cpp's own command-line tools, built from the same commit."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def run(self, name: str, *arguments: object, until: str = "") -> str:
        """Runs a tool and returns everything it printed.

        llama-perplexity's log is written by a thread whose last lines are lost if the process ends first, mostly on a
        busy machine. It is run again until `until`, a regex for its last line, matches.
        """
        for _ in range(20):
            output = self._run(name, *arguments)
            if re.search(until, output, re.MULTILINE):
                return output
        raise AssertionError(f"{name} never printed {until!r}: {output[-2000:]}")

    def _run(self, name: str, *arguments: object) -> str:
        from bitladder.engine.cpu_kernels import extras_work

        environment = os.environ | {"LD_LIBRARY_PATH": str(self.folder)}
        if not extras_work():  # then the tools, built alike, would die of quantized weights (llama-bench does)
            environment |= {"LLAMA_ARG_REPACK": "0"}
        done = subprocess.run(
            [str(self.folder / name), *map(str, arguments)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout
