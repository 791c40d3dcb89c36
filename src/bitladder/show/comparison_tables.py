"""The output of `bitladder compare`: the table of files, what is odd about them, which is best, and the types."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from bitladder.units import number_of

if TYPE_CHECKING:
    from bitladder.compare import ComparedModel, QuantComparison
    from bitladder.evaluate import Figure

MARKS = {"other": "another model", "sign": "doubtful", "note": "see below", None: ""}


def comparison_sections(comparison: "QuantComparison") -> list[tuple[str, Any]]:
    """Titles, each with a table or a list of lines."""
    labels = comparison_labels(comparison)
    sections: list[tuple[str, Any]] = [(_title(comparison), _model_table(comparison, labels))]
    odd = [
        f"{label}: {finding.text}"
        for label, model in zip(labels, comparison.models, strict=True)
        for finding in model.findings
    ]
    if odd:
        sections.append(("\nFindings", odd))
    if verdicts := _verdicts(comparison, labels):
        sections.append(("\nAt equal size", verdicts))
    if any(model.measured and model.measured.scores.texts for model in comparison.models):
        sections.append(("\nKLD on each text", _text_table(comparison, labels)))
    if comparison.mixed:
        sections.append(("\nBetter on one text, worse on another", _mixed(comparison, labels)))
    sections.append(("\nTypes by kind", _type_table(comparison, labels)))
    return sections


def comparison_json(comparison: "QuantComparison") -> dict[str, Any]:
    """The comparison as JSON: figures are `{"value": …, "error": …}`, KLD in nats per token, sizes in bytes."""
    labels = comparison_labels(comparison)
    models = []
    for label, model in zip(labels, comparison.models, strict=True):
        defeat = model.defeat
        models.append(
            {
                "label": label,
                "model": model.name,
                "source": model.source,
                "bytes": model.bytes,
                "bpw": model.bpw,
                "findings": [dataclasses.asdict(finding) for finding in model.findings],
                "scores": model.measured.scores.to_json() if model.measured else None,
                "ln_ppl_less_base": model.ln_ppl.model_dump() if model.ln_ppl else None,
                "beaten": defeat and {"by": labels[defeat.by], "kld": defeat.kld.model_dump(), "bytes": defeat.bytes},
                "types": model.types,
            }
        )
    groups = [
        {
            "models": [labels[index] for index in group.members],
            "sure": group.sure,
            "kld": [gap.model_dump() for gap in group.gaps],
        }
        for group in comparison.groups
    ]
    pairs = [
        {"model": labels[pair.this], "other": labels[pair.other], "kld": [gap.model_dump() for gap in pair.gaps]}
        for pair in comparison.mixed
    ]
    return {"base": comparison.base, "models": models, "equal_size": groups, "mixed": pairs}


def comparison_labels(comparison: "QuantComparison") -> list[str]:
    """A name for each model that no other one has: the file's, with its owner if two files have the same name."""
    names = [model.name for model in comparison.models]
    labels: list[str] = []
    for number, model in enumerate(comparison.models, 1):
        label = model.name
        if names.count(label) > 1:
            label += f" ({model.source.split('/')[0] if model.source else number})"
        labels.append(label if label not in labels else f"{model.name} ({number})")
    return labels


def _title(comparison: "QuantComparison") -> str:
    scores = next((model.measured.scores for model in comparison.models if model.measured), None)
    if scores is None or scores.text is None:
        return f"Against {comparison.base}: nothing can be measured"
    alike = "; texts count alike" if scores.texts else ""
    return (
        f"Against {comparison.base} on {scores.text.name}, {number_of(scores.chunks or 0, 'chunk')} of {scores.n_ctx}, "
        f"{number_of(scores.tokens_scored or 0, 'token')} scored{alike}"
    )


def _model_table(comparison: "QuantComparison", labels: list[str]) -> Any:
    from bitladder.compare import gravest
    from bitladder.report import with_error
    from bitladder.show.table import Column, Table

    table = Table(
        [
            Column("model", fold=True),
            Column("GB", right=True),
            Column("bpw", right=True, rank=4),
            Column("PPL", right=True, rank=3),
            Column("PPL vs base", right=True, rank=5),
            Column("KLD", right=True),
            Column("RMS Δp", right=True, rank=6),
            Column("same top", right=True, rank=2),
            Column("finding", rank=1),
            Column("beaten by", fold=True, rank=7),
        ]
    )
    labelled = zip(labels, comparison.models, strict=True)
    for label, model in sorted(labelled, key=lambda pair: pair[1].bytes):
        scores = model.measured.scores if model.measured else None
        cells = ["–"] * 5
        if scores and scores.ppl and scores.kld and scores.delta_p and scores.same_top_p and model.ln_ppl:
            cells = [
                f"{scores.ppl.value:.4f}",
                _ratio(model.ln_ppl),
                with_error(scores.kld),
                f"{100 * scores.delta_p.rms.value:.2f} %",
                f"{100 * scores.same_top_p.value:.2f} %",
            ]
        size = f"{model.bytes / 1e9:.4f}", f"{model.bpw:.3f}"
        table.add(label, *size, *cells, MARKS[gravest(model.findings)], _defeat(model, labels))
    return table


def _gap(figure: "Figure") -> str:
    """A difference with its sign."""
    from bitladder.report import with_error

    text = with_error(figure)
    return text if text.startswith("-") else f"+{text}"


def _ratio(gap: "Figure") -> str:
    """A difference of ln PPL as a change of PPL in percent."""
    ratio = math.exp(gap.value)
    return f"{100 * (ratio - 1):+z.2f} ± {100 * ratio * gap.error:.2f} %"


def _defeat(model: "ComparedModel", labels: list[str]) -> str:
    if model.measured is None:
        return "–"
    if model.defeat is None:
        return ""
    saved = model.defeat.bytes / model.bytes
    size = "same size" if abs(saved) < 0.0005 else f"{abs(saved):.1%} {'smaller' if saved > 0 else 'larger'}"
    return f"{labels[model.defeat.by]} ({size})"


def _verdicts(comparison: "QuantComparison", labels: list[str]) -> list[str]:
    """Which file of each group of equal size is best, in sentences."""
    lines = []
    for group in comparison.groups:
        first, second = labels[group.members[0]], labels[group.members[1]]
        sizes = " and ".join(f"{comparison.models[index].bytes:,}" for index in group.members[:2])
        gap = f"KLD of {second} differs by {_gap(group.gaps[0])}"
        verdict = f"{first} wins" if group.sure else f"{first} and {second} tie within noise"
        lines.append(f"{verdict}: {gap} ({sizes} bytes)")
        for index, figure in zip(group.members[2:], group.gaps[1:], strict=True):
            lines.append(f"  then {labels[index]}: {_gap(figure)}")
    return lines


def _text_table(comparison: "QuantComparison", labels: list[str]) -> Any:
    from bitladder.report import with_error
    from bitladder.show.table import Column, Table, figures

    labelled = zip(labels, comparison.models, strict=True)
    measured = [(label, model.measured.scores) for label, model in labelled if model.measured]
    table = Table([Column("model", fold=True), *figures(*(text.name for text in measured[0][1].texts_used))])
    for label, scores in sorted(measured, key=lambda pair: pair[1].bytes):
        table.add(label, *(with_error(text.kld) if text.kld else "–" for text in scores.texts))
    return table


def _mixed(comparison: "QuantComparison", labels: list[str]) -> list[str]:
    """For each pair of files that texts order in two ways, the difference on each text."""
    lines = []
    for pair in comparison.mixed:
        model = comparison.models[pair.this].measured
        names = [text.name for text in model.scores.texts_used] if model else []
        gaps = ", ".join(f"{_gap(gap)} on {name}" for name, gap in zip(names, pair.gaps, strict=True))
        lines.append(f"{labels[pair.this]} less {labels[pair.other]}: KLD {gaps}")
    return lines


def _type_table(comparison: "QuantComparison", labels: list[str]) -> Any:
    from bitladder.show.table import Column, Table

    table = Table([Column("kind"), *(Column(label, fold=True) for label in labels)])
    for kind in dict.fromkeys(kind for model in comparison.models for kind in model.types):
        counts = [model.types.get(kind, {}) for model in comparison.models]
        if all(set(types) <= {"f32"} for types in counts):
            continue  # norms and biases, which quantizers keep
        table.add(kind, *(", ".join(f"{count} × {name}" for name, count in types.items()) for types in counts))
    return table
