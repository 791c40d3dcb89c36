"""What the check of a recipe finds."""

import collections
import dataclasses
from typing import Any

from bitladder.gguf.names import block_of, kind_of, one_line, ranges, reading_order
from bitladder.recipe.sizes import Size


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something about tensors of one kind. A problem is what keeps the recipe from being carried out as it stands."""

    problem: bool
    tensors: tuple[str, ...]
    text: str

    def line(self) -> str:
        """The finding in one line, with its weight."""
        return f"{'problem' if self.problem else 'note'}: {self.text_line()}"

    def text_line(self) -> str:
        """The finding in one line; many layers are given as ranges."""
        first, layers = self.tensors[0], [block_of(name) for name in self.tensors]
        if len(self.tensors) > 1 and None not in layers:
            where = f"{kind_of(first)} of layers {ranges(layer for layer in layers if layer is not None)}"
        else:
            where = ", ".join(self.tensors)
        return one_line(f"{where}: {self.text}")


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found, the type that each tensor of the model would get, and the size of them all.

    `ours` are the tensors that `bitladder quantize` would change and llama-quantize would not.
    """

    findings: tuple[Finding, ...]
    types: dict[str, str]
    size: Size
    needs_imatrix: bool
    ours: tuple[str, ...]

    @property
    def problems(self) -> int:
        """The number of findings that are problems."""
        return sum(finding.problem for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "problems": self.problems,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "needs_imatrix": self.needs_imatrix,
            "bytes": self.size.bytes,
            "bpw": self.size.bpw,
            "types": self.types,
        }


class Findings:
    """Findings as they are made, tensor by tensor."""

    def __init__(self) -> None:
        self._made: list[tuple[bool, str, str]] = []

    def problem(self, name: str, text: str) -> None:
        """Note what keeps the recipe from being carried out."""
        self._made.append((True, name, text))

    def note(self, name: str, text: str) -> None:
        """Note what is good to know."""
        self._made.append((False, name, text))

    def grouped(self) -> tuple[Finding, ...]:
        """Problems first; tensors of a kind for which the same is to be said are taken together, in reading order."""
        groups: dict[tuple[bool, str, bool, str], list[str]] = collections.defaultdict(list)
        for problem, name, text in sorted(self._made, key=lambda one: (not one[0], reading_order(one[1]))):
            groups[problem, kind_of(name), block_of(name) is None, text].append(name)
        return tuple(Finding(problem, tuple(names), text) for (problem, _, _, text), names in groups.items())
