"""The tables of `bitladder eval`: a column for each model, smallest file first, the best of each row in bold."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitladder.units import number_of

if TYPE_CHECKING:
    from bitladder.evaluate import Figure, Noise, Scores

Cell = tuple[str, float | None]  # the text, and the value by which a row is judged: the lowest is the best


def eval_tables(models: "list[Scores]") -> list[tuple[str, Any]]:
    """Titles and tables: the scores of each model and, of several models, how each differs from the first.

    Parameters:
        models: scores in the order of the command line.
    """
    ordered = sorted(models, key=lambda scores: scores.bytes)
    shown = [(_title(models[0]), _table(ordered, _rows(models)))]
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


def _title(first: "Scores") -> str:
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
