"""Compares several files with one base: what each file is, what it loses, and which is best at equal size.

Files are compared by the paired difference of KLD. Two files differ if the difference is more than noise.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence

from bitladder.compare.same_model import OriginFinding, check_structure, check_weights, gravest
from bitladder.errors import UsageError
from bitladder.evaluate import (
    SURE,
    EvalRequest,
    Figure,
    Measurement,
    MeasureOptions,
    MixedPair,
    Results,
    average,
    compare_pair,
    measure_several,
    mixed_pairs,
    opened_bases,
    paired_mean,
    with_pair,
)
from bitladder.gguf import kind_of, open_model, reading_order
from bitladder.hub import Fetched
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Text, answers_option

# A perplexity below the base's by more than this many standard errors is no accident of the text.
SURE_PPL = 3.0


@dataclasses.dataclass(frozen=True)
class CompareOptions(Options):
    """How files are compared, and where the base's predictions are kept."""

    base_file: pathlib.Path | None = option(
        None,
        "--base-file",
        decides=False,
        writes="base",
        metavar="FILE",
        help="Where the base's predictions are kept.",
        unset="beside the base",
    )
    tolerance: float = option(
        1.0,
        "--tolerance",
        least=0,
        most=50,
        metavar="PERCENT",
        help="Files whose sizes differ by no more count as equally large.",
    )
    assistant_only: bool = answers_option()

    @property
    def largest(self) -> float:
        """The largest ratio of two sizes that count as equal."""
        return 1 + self.tolerance / 100


@dataclasses.dataclass(frozen=True)
class Defeat:
    """Another file of equal or smaller size has less KLD.

    Parameters:
        by: index of the other file.
        kld: how much more KLD this file has, nats per token.
        bytes: how many more bytes this file has.
    """

    by: int
    kld: Figure
    bytes: int


@dataclasses.dataclass(frozen=True)
class SizeGroup:
    """Files of equal size.

    Parameters:
        members: indices of the files, from the least KLD up.
        sure: whether the first file differs from the second by more than noise.
        gaps: KLD of each other file less that of the first, nats per token.
    """

    members: tuple[int, ...]
    sure: bool
    gaps: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """One of the compared files.

    Parameters:
        name: the file's name, without folder.
        source: the hub id; None for a local file.
        bytes: the file's size.
        bpw: bits per weight over all tensors.
        types: number of tensors by kind and type.
        findings: how it differs from the base.
        measured: its scores; None if it cannot be compared.
        ln_ppl: ln PPL less that of the base.
        defeat: the file that beats it; None if there is none.
    """

    name: str
    source: str | None
    bytes: int
    bpw: float
    types: dict[str, dict[str, int]]
    findings: tuple[OriginFinding, ...]
    measured: Measurement | None = None
    ln_ppl: Figure | None = None
    defeat: Defeat | None = None


@dataclasses.dataclass(frozen=True)
class QuantComparison:
    """All files in the order of the command line. Indices in `groups`, `mixed` and in each `defeat` are of `models`."""

    base: str
    models: tuple[ComparedModel, ...]
    groups: tuple[SizeGroup, ...]
    mixed: tuple[MixedPair, ...] = ()


def compare_quants(
    models: Sequence[Fetched],
    base: pathlib.Path,
    texts: Sequence[Text],
    settings: MeasureOptions,
    options: CompareOptions | None = None,
    *,
    results: Results | None = None,
    progress: Progress = SILENT,
) -> QuantComparison:
    """Compares files with the full-precision model and with each other.

    A file with another vocabulary or architecture than the base is described and not measured.

    Parameters:
        models: the files to compare.
        base: the full-precision GGUF.
        texts: the texts to measure on, which count alike.
        settings: how to decode, and how many chunks.
        options: which sizes count as equal; None takes the defaults.
        results: where results are kept; None keeps nothing, and no predictions of the base either.
        progress: receives the progress.

    Raises:
        BitladderError: a file is not a model, or as `evaluate.measure_several`.
    """
    options = options or CompareOptions()
    if len(texts) > 1 and options.base_file:
        raise UsageError("--base-file names a file of one text; name one text (-f), or leave --base-file out")
    compared = [_describe(file, base, settings, progress) for file in models]
    fitting = [index for index, model in enumerate(compared) if gravest(model.findings) != "other"]
    groups: list[SizeGroup] = []
    contradictions: list[MixedPair] = []
    if fitting:
        paths = [models[index].path for index in fitting]
        opened = opened_bases(base, options.base_file, texts, settings, paths[0], results=results, progress=progress)
        with opened as bases:
            request = EvalRequest(texts=tuple(texts), settings=settings, bases=bases)
            measured = measure_several(paths, request, results=results, progress=progress)
        for index, measurement, defeat in zip(fitting, measured, defeats(measured, options.largest), strict=True):
            by = dataclasses.replace(defeat, by=fitting[defeat.by]) if defeat else None
            compared[index] = _with_scores(compared[index], measurement, by)
        for group in size_groups(measured, options.largest):
            groups.append(dataclasses.replace(group, members=tuple(fitting[place] for place in group.members)))
        sizes = [model.scores.bytes for model in measured]
        for pair in mixed_pairs(
            sizes, lambda this, other: gaps_on_texts(measured[this], measured[other]), options.largest
        ):
            contradictions.append(dataclasses.replace(pair, this=fitting[pair.this], other=fitting[pair.other]))
    return QuantComparison(base.name, tuple(compared), tuple(groups), tuple(contradictions))


def _describe(fetched: Fetched, base: pathlib.Path, settings: MeasureOptions, progress: Progress) -> ComparedModel:
    """All that is known of a file without running the model."""
    path = fetched.path
    with open_model(base) as reference, open_model(path) as file:
        findings = check_structure(reference, file)
        if gravest(findings) != "other":
            with progress.task(f"Weights of {path.name}", 1) as task:
                findings += check_weights(reference, file, settings.threads)
                task.advance()
        kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for name in sorted(file.tensors, key=reading_order):
            kinds[kind_of(name)][file.tensors[name].type.name] += 1
        types = {kind: dict(counts.most_common()) for kind, counts in kinds.items()}
        return ComparedModel(path.name, fetched.source, file.size, file.bpw, types, tuple(findings))


def _with_scores(model: ComparedModel, measured: Measurement, defeat: Defeat | None) -> ComparedModel:
    gap = average(
        [
            paired_mean(arrays["nll"], arrays["nll_base"], arrays.get("chunk", text.chunks or 1))
            for text, arrays in measured.by_text
        ]
    )
    kld = measured.scores.kld.value if measured.scores.kld else 0.0
    doubted = any(finding.about == "weights" for finding in model.findings)
    findings = (*model.findings, *perplexity_sign(gap, kld, doubted))
    return dataclasses.replace(model, measured=measured, ln_ppl=gap, findings=findings, defeat=defeat)


def perplexity_sign(gap: Figure, kld: float, doubted: bool) -> list[OriginFinding]:
    """What a perplexity below the base's says.

    Rounding errors do not depend on the text. They raise ln PPL by about their KLD, and by less if the base is too sure
    of itself. On no text do they lower ln PPL by more than their KLD. A checkpoint that was trained on the text does.

    Parameters:
        gap: ln PPL less that of the base.
        kld: mean KLD, nats per token.
        doubted: whether the weights differ too.
    """
    if gap.value >= -SURE_PPL * gap.error or not gap.error:
        return []
    ratio = math.exp(gap.value)
    lower = f"its perplexity is below that of the base by {100 * (1 - ratio):.2f} ± {100 * ratio * gap.error:.2f} %"
    if doubted:
        return [OriginFinding("sign", "perplexity", f"{lower}: rounding cannot cause that; another checkpoint can")]
    if -gap.value > kld:
        text = (
            f"{lower}, which is more than its KLD of {kld:.4f}: rounding cannot cause that; another checkpoint can, "
            "if it is so similar that rounding to these types hides the difference of the weights"
        )
        return [OriginFinding("sign", "perplexity", text)]
    text = f"{lower}: rounding can do that to a model that is overconfident on this text; judge it by its KLD"
    return [OriginFinding("note", "perplexity", text)]


def defeats(models: Sequence[Measurement], largest: float) -> list[Defeat | None]:
    """For each model, the one that beats it by most of those of equal or smaller size; None if there is none.

    Parameters:
        models: the measured models.
        largest: largest ratio of two sizes that count as equal.
    """
    result: list[Defeat | None] = []
    for model in models:
        rivals = [
            Defeat(index, gap, model.scores.bytes - other.scores.bytes)
            for index, other in enumerate(models)
            if other is not model and other.scores.bytes <= model.scores.bytes * largest
            if (gap := kld_gap(model, other)) is not None and gap.value > SURE * gap.error
        ]
        result.append(max(rivals, key=lambda rival: rival.kld.value, default=None))
    return result


def size_groups(models: Sequence[Measurement], largest: float) -> list[SizeGroup]:
    """Groups of two and more files of equal size, from the smallest up; `largest` as for `defeats`."""
    order = sorted((i for i, model in enumerate(models) if model.scores.kld), key=lambda i: models[i].scores.bytes)
    groups: list[list[int]] = []
    for index in order:
        if groups and models[index].scores.bytes <= models[groups[-1][0]].scores.bytes * largest:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_ranked(models, group) for group in groups if len(group) > 1]


def gaps_on_texts(this: Measurement, other: Measurement) -> list[Figure]:
    """KLD of this less that of the other on each of several texts, paired token by token, nats per token."""
    texts = with_pair(this, other).texts
    return [text.paired.kld for text in texts if text.paired and text.paired.kld]


def kld_gap(this: Measurement, other: Measurement) -> Figure | None:
    """KLD of this less that of the other, paired token by token, nats per token; None if one has no KLD."""
    return compare_pair(this, other).kld


def _ranked(models: Sequence[Measurement], group: list[int]) -> SizeGroup:
    ranked = sorted(group, key=lambda i: models[i].scores.kld.value)  # type: ignore[union-attr]  # all have one
    gaps = [kld_gap(models[i], models[ranked[0]]) for i in ranked[1:]]
    known = tuple(gap for gap in gaps if gap is not None)
    return SizeGroup(tuple(ranked), known[0].value > SURE * known[0].error, known)
