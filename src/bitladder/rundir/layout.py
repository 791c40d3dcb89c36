"""Every path of a run directory, once."""

import dataclasses
import pathlib

# A preset by itself is measured beside the rung of the same name.
NAIVE = ".naive"
_SMOOTHED = "-smoothed"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths below the folder of a run.

    A `label` names what is measured: "base" for the full-precision model, a rung ("Q4_K_M"), a preset by itself
    (`naive(rung)`), or a file of somebody else.

    Example:
        >>> Layout(pathlib.PurePosixPath("out")).scores("Q4_K_M")
        PurePosixPath('out/scores/Q4_K_M.json')
    """

    folder: pathlib.Path

    @property
    def manifest(self) -> pathlib.Path:
        """What was asked for, and what is complete."""
        return self.folder / "ladder.json"

    @property
    def lock(self) -> pathlib.Path:
        """Held while a run is at work."""
        return self.folder / ".lock"

    @property
    def log(self) -> pathlib.Path:
        """What runs said, with times."""
        return self.folder / "run.log"

    @property
    def card(self) -> pathlib.Path:
        """The model card."""
        return self.folder / "README.md"

    @property
    def report(self) -> pathlib.Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def imatrix(self) -> pathlib.Path:
        """The importance matrix of the full-precision model."""
        return self.folder / "imatrix.gguf"

    @property
    def bench(self) -> pathlib.Path:
        """Tokens per second by label."""
        return self.folder / "bench.json"

    @property
    def candidates(self) -> pathlib.Path:
        """Every recipe that was tried, of all rungs."""
        return self.folder / "candidates.json"

    @property
    def converting(self) -> pathlib.Path:
        """The converted model until its name is known, which follows from its metadata."""
        return self.folder / ".converted.tmp"

    @property
    def converting_projector(self) -> pathlib.Path:
        """The projector until the name of the model is known."""
        return self.folder / ".projector.tmp"

    @property
    def work(self) -> pathlib.Path:
        """What only later steps read: large. A file that is deleted there is made again when a step reads it."""
        return self.folder / ".planning"

    @property
    def moments(self) -> pathlib.Path:
        """Second moments whose tokens are weighted."""
        return self.work / "moments.gguf"

    @property
    def plain_moments(self) -> pathlib.Path:
        """Second moments of more tokens, which count alike."""
        return self.work / "moments-plain.gguf"

    @property
    def smoothed(self) -> "Smoothed":
        """The smoothed model and what belongs to it."""
        return Smoothed(self.work)

    def model(self, file: str) -> pathlib.Path:
        """A model file, by its name."""
        return self.folder / file

    def name(self, path: pathlib.Path) -> str:
        """A path relative to the run directory, with forward slashes."""
        return path.relative_to(self.folder).as_posix()

    def full(self, stem: str, encoding: str) -> pathlib.Path:
        """The full-precision model."""
        return self.folder / f"{stem}-{encoding}.gguf"

    def projector(self, full: pathlib.Path) -> pathlib.Path:
        """The projector of images or sounds that goes with a full-precision model and all its quants."""
        return full.with_name(f"mmproj-{full.name}")

    def quant(self, stem: str, rung: str) -> pathlib.Path:
        """The file of a rung."""
        return self.folder / f"{stem}-{rung}.gguf"

    def preset(self, rung: str) -> pathlib.Path:
        """The preset by itself."""
        return self.work / "presets" / f"{rung}-preset.gguf"

    def recipe(self, label: str) -> pathlib.Path:
        """The type of each tensor."""
        return self.folder / "recipes" / f"{label}.toml"

    def scores(self, label: str) -> pathlib.Path:
        """All figures of a model."""
        return self.folder / "scores" / f"{label}.json"

    def measured(self, label: str) -> pathlib.Path:
        """Figures of a model without speeds; the scores are put together from them."""
        return self.folder / "measured" / f"{label}.json"

    def tokens(self, label: str) -> pathlib.Path:
        """What each token scored."""
        return self.folder / "measured" / f"{label}.npz"

    def plan(self, rung: str) -> pathlib.Path:
        """The plan of a rung: its types, and the recipes that were tried."""
        return self.folder / "planned" / f"{rung}.json"

    def sensitivity(self, band: str, *, smoothed: bool) -> pathlib.Path:
        """What each type of each tensor of the original or the smoothed model costs, for a band of rungs."""
        return self.folder / f"sensitivity{_SMOOTHED if smoothed else ''}-{band}.json"

    def sensitivities(self, *, smoothed: bool) -> list[pathlib.Path]:
        """The same of all bands, as far as there are files."""
        paths = sorted(self.folder.glob("sensitivity-*.json"))
        return [path for path in paths if path.name.startswith(f"sensitivity{_SMOOTHED}") == smoothed]

    def material_work(self, *, smoothed: bool) -> pathlib.Path:
        """Rendered blocks, prices and measurements of one of the two materials."""
        return self.work / ("smoothed" if smoothed else "plain")

    def blocks(self, cache: str) -> tuple[pathlib.Path, ...]:
        """The folders of rendered blocks of a kind, of both materials."""
        return tuple(self.material_work(smoothed=smoothed) / cache for smoothed in (False, True))

    def trial(self, rung: str) -> pathlib.Path:
        """Whether a rung is better made of the smoothed model."""
        return self.work / "trials" / f"{rung}.json"

    def unfinished(self) -> list[pathlib.Path]:
        """The folders that interrupted steps left beside their outputs."""
        patterns = (f"{self.imatrix.name}.parts", ".*.tmp.parts", f"{self.work.name}/*.parts")
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def written_by_runs(self) -> tuple[str, ...]:
        """Patterns of what a run writes. Without a manifest such files belong to somebody else."""
        return (self.card.name, self.report.name, "recipes", "scores", "*.gguf")

    def with_temporary_files(self) -> tuple[pathlib.Path, ...]:
        """The folders in which a killed run may leave temporary files, beside the work folder and all in it."""
        return (self.folder, *(self.folder / name for name in ("recipes", "measured", "scores", "planned")))


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """The paths of the smoothed model."""

    work: pathlib.Path

    @property
    def model(self) -> pathlib.Path:
        """The model, with the same tensors and types as the full-precision one."""
        return self.work / "smooth.gguf"

    @property
    def imatrix(self) -> pathlib.Path:
        """Its importance matrix."""
        return self.work / "smooth.imatrix.gguf"

    @property
    def moments(self) -> pathlib.Path:
        """Its weighted second moments."""
        return self.work / "smooth-moments.gguf"

    @property
    def plain_moments(self) -> pathlib.Path:
        """Its second moments of tokens that count alike."""
        return self.work / "smooth-moments-plain.gguf"


def naive(rung: str) -> str:
    """The label of a preset by itself."""
    return rung + NAIVE
