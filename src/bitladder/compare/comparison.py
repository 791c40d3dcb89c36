"""Several files against one base: looked at, measured where that makes sense, and compared in pairs."""

import collections
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence

from bitladder.compare.findings import Finding, worst
from bitladder.compare.same_weights import check_weights
from bitladder.compare.structure import check_structure
from bitladder.compare.winner import TOLERANCE, Beaten, Level, beaten, levels
from bitladder.evaluate import Figure, Measured, Settings, Wanted, measure_several, open_or_compute, paired_mean
from bitladder.evaluate.results_cache import Results
from bitladder.gguf.names import kind_of, reading_order
from bitladder.gguf.reader import GgufFile
from bitladder.hub import Fetched
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text

# Perplexity below the base's by so many standard errors is no accident of the text.
SURE_PPL = 3.0


@dataclasses.dataclass(frozen=True)
class Compared:
    """One file: what it is, where it is from (a hub id, or None), the types of its tensors by kind with their numbers,
    what tells it from the base, its scores (None: it cannot be compared), and ln PPL less the base's.
    """

    name: str
    source: str | None
    bytes: int
    bpw: float
    types: dict[str, dict[str, int]]
    findings: tuple[Finding, ...]
    measured: Measured | None = None
    ln_ppl: Figure | None = None
    beaten: Beaten | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All files in the order they were given; indices in `levels` and in each `beaten` are those of `models`."""

    base: str
    models: tuple[Compared, ...]
    levels: tuple[Level, ...]


def compare(
    models: Sequence[Fetched],
    base: pathlib.Path,
    text: Text,
    settings: Settings,
    *,
    base_file: pathlib.Path | None = None,
    tolerance: float = TOLERANCE,
    results: Results | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Compare files with the full-precision model and with each other.

    A file with another vocabulary or architecture than the base's is described and not measured. `tolerance` is the
    share by which sizes may differ and still count as equal; the other parameters are those of `evaluate.measure`.
    Raises BitladderError if a file is no model, or as `evaluate.measure_several`.
    """
    found = [_look(one, base, settings, progress) for one in models]
    fit = [index for index, one in enumerate(found) if worst(list(one.findings)) != "other"]
    if fit:
        paths = [models[index].path for index in fit]
        with open_or_compute(base, base_file, text, settings, paths[0], progress) as opened:
            wanted = Wanted(text=text, settings=settings, base=opened)
            measured = measure_several(paths, wanted, results=results, progress=progress)
        defeats = beaten(measured, tolerance)
        for place, index in enumerate(fit):
            found[index] = _with_scores(found[index], measured[place], _renumbered(defeats[place], fit))
        groups = [
            dataclasses.replace(one, members=tuple(fit[i] for i in one.members)) for one in levels(measured, tolerance)
        ]
    else:
        groups = []
    return Comparison(base.name, tuple(found), tuple(groups))


def _look(one: Fetched, base: pathlib.Path, settings: Settings, progress: Progress) -> Compared:
    """Everything that can be said without running the model."""
    with contextlib.ExitStack() as stack:
        reference, file = (stack.enter_context(GgufFile(path)) for path in (base, one.path))
        findings = check_structure(reference, file)
        if worst(findings) != "other":
            with progress.task(f"Weights of {one.path.name}", 1) as task:
                findings += check_weights(reference, file, settings.threads)
                task.advance()
        kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for name in sorted(file.tensors, key=reading_order):
            kinds[kind_of(name)][file.tensors[name].type.name] += 1
        types = {kind: dict(counts.most_common()) for kind, counts in kinds.items()}
        return Compared(one.path.name, one.source, file.size, file.bpw, types, tuple(findings))


def _with_scores(one: Compared, measured: Measured, defeat: Beaten | None) -> Compared:
    chunks = measured.scores.chunks or 1
    gap = paired_mean(measured.arrays["nll"], measured.arrays["nll_base"], chunks)
    kld = float(measured.arrays["kld"].mean())
    findings = [*one.findings, *perplexity_sign(gap, kld, any(found.about == "weights" for found in one.findings))]
    return dataclasses.replace(one, measured=measured, ln_ppl=gap, findings=tuple(findings), beaten=defeat)


def perplexity_sign(gap: Figure, kld: float, doubted: bool) -> list[Finding]:
    """What a perplexity below the base's says.

    Parameters: `gap` is ln PPL less the base's; `kld` the mean KLD, nats per token; `doubted`: the weights differ too.
    Rounding errors know nothing of the text, so they cost about their KLD in ln PPL, and less where the base is too
    sure of itself; they do not gain more than that on any text. What was trained on does.
    """
    if gap.value >= -SURE_PPL * gap.error or not gap.error:
        return []
    ratio = math.exp(gap.value)
    said = f"its perplexity is below the base's, by {100 * (1 - ratio):.2f} ± {100 * ratio * gap.error:.2f} %"
    if doubted:
        return [Finding("sign", "perplexity", f"{said}: rounding does not do that; another checkpoint does")]
    if -gap.value > kld:
        text = (
            f"{said}, which is more than its KLD of {kld:.4f}: rounding does not do that; another checkpoint does, and "
            "one so near that rounding to these types hides the difference of the weights"
        )
        return [Finding("sign", "perplexity", text)]
    text = f"{said}: rounding may flatten a model that is too sure of itself on this text; judge it by its KLD"
    return [Finding("note", "perplexity", text)]


def _renumbered(defeat: Beaten | None, fit: list[int]) -> Beaten | None:
    return dataclasses.replace(defeat, by=fit[defeat.by]) if defeat else None
