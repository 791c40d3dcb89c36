"""A Progress that keeps what it is told."""

from bitladder.progress import SILENT


class Heard:
    """Keeps the warnings and the lines of information."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.lines: list[str] = []

    task = SILENT.task

    def info(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
