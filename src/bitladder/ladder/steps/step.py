"""What a step of a run is. Each kind of step is a class in a file of its own beside this one.

A step says what it reads, which options and algorithms decide its result, how much work it is, and makes its files.
Nothing else knows what a step does: the list of a run's steps is `ladder.plan`, and `ladder.run` goes through it.
"""

import abc
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bitladder.engine import library
from bitladder.keys import Algorithm, settled, versions_of
from bitladder.ladder import cost
from bitladder.ladder.model_shape import ModelShape
from bitladder.ladder.options import RunOptions
from bitladder.text import Text

if TYPE_CHECKING:
    from bitladder.ladder.context import Run


@dataclasses.dataclass(frozen=True)
class Product:
    """What a step gives.

    Parameters:
        files: that it wrote.
        facts: for later steps and readers of the manifest.
        seconds: how long it took, if it was made elsewhere.
    """

    files: Sequence[pathlib.Path]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None


# The name of a method of a step, and what it gets after the run.
Job = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the work of a step.

    Parameters:
        kind: parts of one kind take times in proportion to their amounts.
        amount: CPU seconds of the reference core (`ladder.cost`).
        label: what the label of the progress bar has in it, in small letters; the kind, if empty.
        rate: what the time depends on: how fast the library multiplies, NumPy and torch do, or rounding goes.
        library: how much of the amount the library quantizes, at a rate of its own.
    """

    kind: str
    amount: float
    label: str = ""
    rate: Literal["products", "blas", "kernels"] = "products"
    library: float = 0.0

    @property
    def bar(self) -> str:
        """What the label of the progress bar has in it."""
        return self.label or self.kind


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes of the disk that a step takes.

    Parameters:
        kept: of the files that stay.
        beside: of what is there only while the step is at work.
        work: of the files in the work folder: they stay too, unless --release deletes them after their last reader.
    """

    kept: float = 0
    beside: float = 0
    work: float = 0


@dataclasses.dataclass(frozen=True)
class CutText:
    """A text that a step cuts into chunks.

    Parameters:
        flag: the option that names the text.
        text: the text, or the passages of it that the step uses.
        n_ctx: tokens of a chunk.
    """

    flag: str
    text: Text
    n_ctx: int


@dataclasses.dataclass(frozen=True)
class TextsOfRun:
    """The texts of a run.

    Parameters:
        texts: what is measured with.
        calibration: what is calibrated on.
        full: the full-precision GGUF.
    """

    texts: Sequence[Text]
    calibration: Sequence[Text]
    full: pathlib.Path

    def calibration_cuts(self, n_ctx: int) -> list[CutText]:
        """Each calibration text, whole."""
        return [CutText("--calibration", text, n_ctx) for text in self.calibration]


class Step(abc.ABC):
    """One thing to do in a run, for all rungs or for one.

    Parameters:
        options: the options of the run.
        label: the rung, or the file of somebody else; "base" is the full-precision model, and "" means all.
    """

    verb: ClassVar[str]
    anywhere: bool = False  # whether other machines can do the work (`jobs`)
    cache: ClassVar[str] = ""  # the folder of rendered blocks (`Layout.blocks`) that steps of this kind fill and read
    algorithms: tuple[Algorithm, ...] = ()

    def __init__(self, options: RunOptions, label: str = "") -> None:
        self.options = options
        self.label = label

    @property
    def name(self) -> str:
        """The name of the step in the manifest and in messages."""
        return f"{self.verb} {self.label}".strip()

    @property
    def rung(self) -> str | None:
        """The rung that the step is for, or None."""
        return self.label if self.label in self.options.rungs else None

    @property
    @abc.abstractmethod
    def needs(self) -> tuple[str, ...]:
        """What the step reads: names of earlier steps, or "model", "converter", "text", "calibration", "tasks",
        "file NAME"."""

    def reads(self, run: "Run | None" = None) -> tuple[str, ...]:
        """The earlier steps whose files are read: mostly `needs`. Without a run, all whose files may be read."""
        del run
        return self.needs

    @property
    def after(self) -> tuple[str, ...]:
        """Earlier steps that it waits for where steps are made side by side, beside those that it needs and reads."""
        return ()

    def jobs(self, run: "Run") -> list[Job]:
        """The work in parts that machines do side by side, of a step that can be made anywhere."""
        del run
        return [("make",)]

    def joined(self, run: "Run", results: Sequence[Any]) -> "Product":
        """What the results of the jobs make together."""
        del run
        (product,) = results
        assert isinstance(product, Product)
        return product

    def decides(self) -> Mapping[str, Any]:
        """The options that decide the result, as whole dataclasses where there are some."""
        return {}

    def surroundings(self, run: "Run") -> Mapping[str, Any]:
        """What decides the result beside options and files, such as which packages are installed."""
        del run
        return {}

    @property
    def library(self) -> str:
        """The library whose code decides the result."""
        return library()

    def parts(self, extent: "Extent") -> list[Part]:
        """The work of the step, part by part. Work of less than a second has no part."""
        del extent
        return []

    def memory(self, extent: "Extent") -> float:
        """Bytes of memory that the step takes at most: by default those of a model that is decoded."""
        return cost.decoding_bytes(extent)

    def room(self, extent: "Extent") -> Room:
        """Bytes of the disk that the step takes. Less than a MB is nothing."""
        del extent
        return Room()

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """The texts that the step cuts into chunks. Before any work it is checked that they are long enough."""
        del texts
        return []

    def completed(self, run: "Run") -> None:
        """Is called when the step is complete, whether it was made now or before."""
        del run

    @abc.abstractmethod
    def make(self, run: "Run") -> Product:
        """Does the work."""

    def inputs(self, run: "Run", digests: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the result depends on, for the key. `digests` has the contents of what steps read."""
        return {
            "step": self.name,
            "versions": versions_of(*self.algorithms),
            "options": settled(self.decides()),
            **self.surroundings(run),
            "library": self.library,
            **{need: digests[need] for need in self.needs},
        }


def gguf_library() -> str:
    """The library that writes converted files."""
    return f"gguf {importlib.metadata.version('gguf')}"


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much there is to do, as far as it is known before a run.

    Parameters:
        shape: the matrices of the model.
        text: tokens that are scored for each model.
        imatrix: tokens for the importance matrix.
        moments: tokens for second moments.
        plain_moments: tokens for second moments that count alike.
        tuned: tokens on which a rung is tuned.
        chunk: tokens of a chunk.
        questions: asked of each model, by benchmark.
        models: files that are measured, with the full-precision model.
        converted: bytes of the full-precision file that the run makes; 0 if MODEL is such a file.
        gradients: whether second moments are weighted by gradients.
        threads: threads of the CPU.
        rounding_threads: of them, those that round at once (`cost.rounding_threads`).
        limit: bytes of memory for second moments.
    """

    shape: ModelShape
    text: int
    imatrix: int
    moments: int
    plain_moments: int
    tuned: int
    chunk: int
    questions: Mapping[str, int]
    models: int
    converted: int = 0
    gradients: bool = True
    threads: int = 1
    rounding_threads: int = 1
    limit: int = 8 << 30
