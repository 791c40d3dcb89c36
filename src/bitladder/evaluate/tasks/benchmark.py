"""How a benchmark's questions are had: what its files are called, and who reads them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from bitladder.evaluate.tasks.hub_data import HubData
from bitladder.evaluate.tasks.source import File
from bitladder.evaluate.tasks.task import Kind, Question

Reader = Callable[[File], Iterator[Question]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    `kind` is how its public formats are scored (a .bin file is always multiple choice); `readers` by suffix, and
    `default` the suffix that a file with any other is taken for; `layouts` the patterns of its files in a folder (see
    `source.find_files`); `hub` where the data set is.
    """

    name: str
    kind: Kind
    readers: Mapping[str, Reader]
    default: str
    layouts: tuple[tuple[str, ...], ...]
    hub: HubData


def asked(text: str) -> str:
    """A question as ARC, MMLU and TruthfulQA put it; the answer follows after a space."""
    return f"Question: {text}\nAnswer:"
