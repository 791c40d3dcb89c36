"""What `bitladder compare` prints: the table of files, what is odd about them, who wins, and the types."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitladder.compare import Compared, Comparison
    from bitladder.evaluate import Figure
    from bitladder.evaluate.scores import Divergence

MARKS = {"other": "another model", "sign": "doubtful", "note": "see below", None: ""}


def sections(found: "Comparison") -> list[tuple[str, Any]]:
    """Titles, each with a table or lines."""
    made: list[tuple[str, Any]] = [(_title(found), _models(found))]
    if odd := [f"{label}: {one.text}" for label, model in _labelled(found) for one in model.findings]:
        made.append(("\nWhat they are", odd))
    if verdicts := _verdicts(found):
        made.append(("\nAt equal size", verdicts))
    made.append(("\nTypes by kind", _types(found)))
    return made


def to_json(found: "Comparison") -> dict[str, Any]:
    """The comparison as JSON: figures are `{"value": …, "error": …}`, KLD in nats per token, sizes in bytes."""
    labels = [label for label, _ in _labelled(found)]
    models = []
    for label, one in _labelled(found):
        beaten = one.beaten
        models.append(
            {
                "label": label,
                "model": one.name,
                "source": one.source,
                "bytes": one.bytes,
                "bpw": one.bpw,
                "findings": [dataclasses.asdict(finding) for finding in one.findings],
                "scores": one.measured.scores.to_json() if one.measured else None,
                "ln_ppl_less_base": _figure(one.ln_ppl),
                "beaten": beaten and {"by": labels[beaten.by], "kld": _figure(beaten.kld), "bytes": beaten.bytes},
                "types": one.types,
            }
        )
    levels = [
        {"models": [labels[i] for i in one.members], "sure": one.sure, "kld": [_figure(gap) for gap in one.gaps]}
        for one in found.levels
    ]
    return {"base": found.base, "models": models, "equal_size": levels}


def _figure(figure: "Figure | None") -> dict[str, float] | None:
    return figure.model_dump() if figure else None


def _labelled(found: "Comparison") -> list[tuple[str, "Compared"]]:
    """Each model with a name of its own: the file's, with its owner where two have the same."""
    names = [one.name for one in found.models]
    labels: list[str] = []
    for number, one in enumerate(found.models, 1):
        label = one.name
        if names.count(label) > 1:
            label += f" ({one.source.split('/')[0] if one.source else number})"
        labels.append(label if label not in labels else f"{one.name} ({number})")
    return list(zip(labels, found.models, strict=True))


def _title(found: "Comparison") -> str:
    scores = next((one.measured.scores for one in found.models if one.measured), None)
    if scores is None or scores.text is None:
        return f"Against {found.base}: nothing can be measured"
    return (
        f"Against {found.base} on {scores.text.name}, {scores.chunks} chunks of {scores.n_ctx}, "
        f"{scores.tokens_scored} tokens scored"
    )


def _models(found: "Comparison") -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for head in ("GB", "bpw", "PPL", "PPL vs base", "KLD", "RMS Δp", "same top"):
        table.add_column(head, justify="right")
    table.add_column("is")
    table.add_column("beaten by", overflow="fold")
    labelled = _labelled(found)
    for label, one in sorted(labelled, key=lambda pair: pair[1].bytes):
        scores = one.measured.scores if one.measured else None
        cells = ["–"] * 5
        if scores and scores.ppl and scores.kld and scores.delta_p and scores.same_top_p and one.ln_ppl:
            cells = [
                f"{scores.ppl.value:.4f}",
                _ratio(one.ln_ppl),
                _figures(scores.kld),
                f"{100 * scores.delta_p.rms.value:.2f} %",
                f"{100 * scores.same_top_p.value:.2f} %",
            ]
        table.add_row(
            label, f"{one.bytes / 1e9:.4f}", f"{one.bpw:.3f}", *cells, MARKS[_worst(one)], _defeat(one, labelled)
        )
    return table


def _figures(figure: "Figure | Divergence") -> str:
    from bitladder.report import numbers

    return numbers.with_error(numbers.Figure(value=figure.value, error=figure.error))


def _gap(figure: "Figure") -> str:
    """A difference with its sign."""
    return ("+" if figure.value >= 0 else "") + _figures(figure)


def _ratio(gap: "Figure") -> str:
    """A difference of ln PPL as a change of PPL in percent."""
    ratio = math.exp(gap.value)
    return f"{100 * (ratio - 1):+.2f} ± {100 * ratio * gap.error:.2f} %"


def _worst(one: "Compared") -> Any:
    from bitladder.compare import worst

    return worst(list(one.findings))


def _defeat(one: "Compared", labelled: "list[tuple[str, Compared]]") -> str:
    if one.measured is None:
        return "–"
    if one.beaten is None:
        return ""
    saved = one.beaten.bytes / one.bytes
    size = "same size" if abs(saved) < 0.0005 else f"{abs(saved):.1%} {'smaller' if saved > 0 else 'larger'}"
    return f"{labelled[one.beaten.by][0]} ({size})"


def _verdicts(found: "Comparison") -> list[str]:
    """Who wins among files of equal size, in sentences."""
    labels = [label for label, _ in _labelled(found)]
    lines = []
    for level in found.levels:
        first, second = labels[level.members[0]], labels[level.members[1]]
        sizes = " and ".join(f"{found.models[i].bytes:,}" for i in level.members[:2])
        gap = f"KLD of {second} is {_gap(level.gaps[0])} from it"
        said = f"{first} wins" if level.sure else f"{first} and {second} are level within noise"
        lines.append(f"{said}: {gap} ({sizes} bytes)")
        for index, figure in zip(level.members[2:], level.gaps[1:], strict=True):
            lines.append(f"  then {labels[index]}: {_gap(figure)}")
    return lines


def _types(found: "Comparison") -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    labelled = _labelled(found)
    for label, _ in labelled:
        table.add_column(label, overflow="fold")
    kinds = dict.fromkeys(kind for _, one in labelled for kind in one.types)
    for kind in kinds:
        counts = [one.types.get(kind, {}) for _, one in labelled]
        if all(set(types) <= {"f32"} for types in counts):
            continue  # norms and biases, which nobody rounds
        table.add_row(kind, *(", ".join(f"{count} × {name}" for name, count in types.items()) for types in counts))
    return table
