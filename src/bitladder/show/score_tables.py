"""The output of `bitladder eval` and `bitladder compare`: figures of models side by side, and what is odd about files.

Of `eval` each model has a column, the smallest file first, and the best of each row is bold. Of `compare` each model
has a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitladder.units import number_of

if TYPE_CHECKING:
    from bitladder.compare import ComparedModel, QuantComparison
    from bitladder.evaluate import Figure, Noise, Scores


MARKS = {"other": "another model", "sign": "doubtful", "note": "see below", None: ""}
Cell = tuple[str, float | None]  # the text, and the value by which a row is judged: the lowest is the best


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


def eval_tables(models: "list[Scores]") -> list[tuple[str, Any]]:
    """Titles and tables: the scores of each model and, of several models, how each differs from the first.

    Parameters:
        models: scores in the order of the command line.
    """
    ordered = sorted(models, key=lambda scores: scores.bytes)
    shown = [(_eval_title(models[0]), _table(ordered, _rows(models)))]
    for index, text in enumerate(models[0].texts):
        on_text = [scores.on(index) for scores in ordered]
        title = (
            f"{text.text.name if text.text else ''}, {number_of(text.chunks or 0, 'chunk')}, "
            f"{number_of(text.tokens_scored or 0, 'token')} scored"
        )
        shown.append((title, _table(on_text, _figure_rows())))
    paired = [scores for scores in ordered if scores.paired]
    if paired:
        shown.append((_pair_title(models), _table(paired, _pair_rows(models))))
    return shown


def _table(models: "list[Scores]", rows: list[tuple[str, Callable[[Any], Cell]]]) -> Any:
    from rich.text import Text

    from bitladder.show.table import Column, Table

    table = Table([Column("", fold=True), *(Column(scores.model, right=True) for scores in models)])
    for label, cell in rows:
        cells = [cell(scores) for scores in models]
        if not any(text for text, _ in cells):
            continue
        ranked = [rank for _, rank in cells if rank is not None]
        best = min(ranked) if len(cells) > 1 and ranked else None
        bold = [rank is not None and rank == best for _, rank in cells]
        shown = [Text(text, "bold" if strong else "") for (text, _), strong in zip(cells, bold, strict=True)]
        table.add(label, *shown)
    return table


def _eval_title(first: "Scores") -> str:
    if not first.chunks:
        return "Tasks"
    source = first.text.name if first.text else first.base.model if first.base else ""
    title = (
        f"{source}, {number_of(first.chunks or 0, 'chunk')} of {first.n_ctx}, "
        f"{number_of(first.tokens_scored or 0, 'token')} scored"
    )
    if first.texts:
        title += "; means of the texts, which count alike"
    if first.noise:
        title += _noise(first.noise)
    return title


def _noise(noise: "Noise") -> str:
    other = f"-ub {noise.n_ubatch}"
    lines = [
        "",
        f"Noise floor of KLD, base against itself over {number_of(noise.chunks, 'chunk')}: {noise.batch.value:.2g} "
        f"with {other}",
    ]
    for rounded, batch, kind in (
        (noise.activations, noise.activations_batch, "Q8_0"),
        (noise.activations_k, noise.activations_k_batch, "Q8_K (K-quants)"),
    ):
        if rounded and batch:
            inputs = f"{rounded.value:.2g} with inputs rounded to {kind}"
            lines.append(f"{inputs}, {batch.value:.2g} between that and the same with {other}")
    if noise.left_out:
        lines.append(f"no figure with rounded inputs: {noise.left_out}")
    return "\n".join(lines)


def _pair_title(models: "list[Scores]") -> str:
    per = next((scores.paired.per for scores in models if scores.paired), None)
    pairs = [*([per] if per else []), *(["question"] if models[0].tasks else [])]
    return f"Difference from {models[0].model}, paired by {' and '.join(pairs)}"


def _pm(figure: "Figure | None", digits: int, scale: float = 1, unit: str = "", sign: str = "") -> str:
    return f"{figure.value * scale:{sign}z.{digits}f} ± {figure.error * scale:.{digits}f}{unit}" if figure else ""


def _low(figure: "Figure | None", digits: int, scale: float = 1, unit: str = "") -> Cell:
    return _pm(figure, digits, scale, unit), figure.value if figure else None


def _high(figure: "Figure | None", digits: int) -> Cell:
    return _pm(figure, digits, 100, " %"), -figure.value if figure else None


def _rows(models: "list[Scores]") -> list[tuple[str, Callable[[Any], Cell]]]:
    rows: list[tuple[str, Callable[[Any], Cell]]] = [
        ("size", lambda s: (f"{s.bytes / 1e6:,.1f} MB", None)),
        ("bits per weight", lambda s: (f"{s.bpw:.3f}", None)),
        *_figure_rows(),
    ]
    for name, task in models[0].tasks.items():
        label = f"{name}, {number_of(task.count, 'question')}, chance {100 * task.chance:.1f} %"
        if task.skipped:
            label += f", {task.skipped} left out"
        rows.append((label, functools.partial(_task, name)))
    rows.append(("average of the five", _average))
    return rows


def _figure_rows() -> list[tuple[str, Callable[[Any], Cell]]]:
    """The rows of what is measured on a text."""
    rows: list[tuple[str, Callable[[Any], Cell]]] = [
        ("PPL", lambda s: _low(s.ppl, 4)),
        ("PPL base", lambda s: (_pm(s.ppl_base, 4), None)),
        ("ln PPL ratio", lambda s: (_pm(s.ln_ppl_ratio, 5), None)),
        ("ρ PPL", lambda s: (f"{100 * s.rho_ppl:.2f} %", -s.rho_ppl) if s.rho_ppl is not None else ("", None)),
        ("KLD mean", lambda s: _low(s.kld, 6)),
    ]
    for label, field in (("max", "max"), ("99.9 %", "p999"), ("99 %", "p99"), ("median", "median")):
        rows.append((f"KLD {label}", functools.partial(_percentile, field)))
    rows += [
        ("Δp RMS", lambda s: _low(s.delta_p.rms if s.delta_p else None, 3, 100, " %")),
        ("same top p", lambda s: _high(s.same_top_p, 3)),
    ]
    return rows


def _percentile(field: str, scores: "Scores") -> Cell:
    if not scores.kld:
        return "", None
    value = float(getattr(scores.kld, field))
    return f"{value:z.6f}", value


def _task(name: str, scores: "Scores") -> Cell:
    return _high(scores.tasks[name].accuracy, 2)


def _average(scores: "Scores") -> Cell:
    return _high(scores.average(), 2)


def _pair_rows(models: "list[Scores]") -> list[tuple[str, Callable[[Any], Cell]]]:
    rows: list[tuple[str, Callable[[Any], Cell]]] = [
        ("PPL", lambda s: (_pm(s.paired.ppl, 4, sign="+"), None)),
        ("ln PPL", lambda s: (_pm(s.paired.ln_ppl, 5, sign="+"), None)),
        ("KLD mean", lambda s: (_pm(s.paired.kld, 6, sign="+"), None)),
    ]
    for index, text in enumerate(models[0].texts):
        rows.append((f"KLD, {text.text.name if text.text else index}", functools.partial(_pair_text, index)))
    for name in models[0].tasks:
        rows.append((f"{name} (right only here : only in the first)", functools.partial(_pair_task, name)))
    rows.append(("average of the five", lambda s: (_pm(s.paired.tasks_average, 2, 100, " %", "+"), None)))
    return rows


def _pair_text(index: int, scores: "Scores") -> Cell:
    pair = scores.texts[index].paired
    return _pm(pair.kld if pair else None, 6, sign="+"), None


def _pair_task(name: str, scores: "Scores") -> Cell:
    pair = (scores.paired.tasks or {}).get(name) if scores.paired else None
    if pair is None:
        return "", None
    shown = _pm(pair.difference, 2, 100, " %", "+")
    return f"{shown} ({pair.only_this} : {pair.only_other}, p = {pair.p_value:.2g})", None
