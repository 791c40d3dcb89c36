"""Size against divergence: everything that was measured, and the line of what is worth its size."""

import html
import math
from collections.abc import Sequence

from bitladder.report.charts.common import LOOKS, Chart, axis, describe, errors, figure
from bitladder.report.numbers import gigabytes, with_error
from bitladder.report.recommend import worth_their_size
from bitladder.report.rundir import Candidate, Measured, Run
from bitladder.report.tables import count_text


def pareto(run: Run) -> Chart | None:
    """The chart; None if no divergence was measured. A trace's `meta` names its group."""
    quants = [one for one in run.quants if one.scores.kld]
    tried = [one for one in run.candidates.candidates if one.kld] if run.candidates else []
    if not quants:
        return None
    data = [_candidates(tried)] if tried else []
    data.append(_front(quants))
    data += [_models(quants, role) for role in ("naive", "third-party", "rung") if any(q.role == role for q in quants)]
    sizes = [one.scores.bytes / 1e9 for one in quants] + [one.bytes / 1e9 for one in tried]
    losses = [one.scores.kld.value for one in quants if one.scores.kld] + [one.kld.value for one in tried if one.kld]
    # Labels stand to the left of their dots: room for the leftmost. A range is in powers of ten here.
    least, most = math.log10(min(sizes)), math.log10(max(sizes))
    span = most - least or 0.1
    return figure(
        data,
        x=axis("size in GB", sizes, range=[least - 0.18 * span, most + 0.06 * span]),
        y=axis("mean KLD in nats per token", losses),
        height=480,
    )


def _models(quants: Sequence[Measured], role: str) -> Chart:
    name, colour, symbol = LOOKS[role]
    models = [one for one in quants if one.role == role]
    losses = [one.scores.kld for one in models if one.scores.kld]
    return {
        "type": "scatter",
        "mode": "markers+text" if role == "rung" else "markers",
        "name": name,
        "meta": role,
        "x": [one.scores.bytes / 1e9 for one in models],
        "y": [loss.value for loss in losses],
        "error_y": errors(losses, colour),
        "text": [one.label for one in models],
        "textposition": "bottom left",
        "textfont": {"size": 11, "color": "@text"},
        "hovertext": [describe(one) for one in models],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"color": "@paper", "width": 1}},
        "cliponaxis": False,
    }


def _front(quants: Sequence[Measured]) -> Chart:
    """Steps through the models that no smaller one equals."""
    best = worth_their_size([(one.label, one.scores) for one in quants])
    models = [one for one in sorted(quants, key=lambda one: one.size) if one.label in best]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "worth their size",
        "meta": "front",
        "x": [one.scores.bytes / 1e9 for one in models],
        "y": [one.scores.kld.value for one in models if one.scores.kld],
        "line": {"color": "@muted", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _candidates(tried: Sequence[Candidate]) -> Chart:
    name, colour, symbol = LOOKS["candidate"]
    losses = [one.kld for one in tried if one.kld]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "meta": "candidate",
        "x": [one.bytes / 1e9 for one in tried],
        "y": [loss.value for loss in losses],
        "error_y": errors(losses, colour),
        "hovertext": [told(one) for one in tried],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 7},
    }


def told(candidate: Candidate) -> str:
    """What hovering over a candidate tells."""
    lines = [
        f"<b>{html.escape(candidate.name)}</b> for {html.escape(candidate.rung)}" + (", chosen" * candidate.chosen),
        f"{gigabytes(candidate.bytes)} GB" + (f", {candidate.bpw:.2f} bits per weight" if candidate.bpw else ""),
    ]
    if candidate.kld:
        lines.append(f"KLD {with_error(candidate.kld)}")
    if candidate.predicted_kld is not None:
        lines.append(f"predicted {candidate.predicted_kld:.4g}")
    if candidate.types:
        lines.append(html.escape(count_text(candidate.types)))
    return "<br>".join(lines)
