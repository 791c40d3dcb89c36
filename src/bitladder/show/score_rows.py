"""Rows of figures as text, for tables in the terminal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bitladder.report.numbers import gigabytes, percent, with_error
from bitladder.report.recommend import by_size
from bitladder.report.scores import Scores
from bitladder.report.tables import DASH


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a table, every field as it is shown."""

    label: str
    file: str
    size: str
    bpw: str
    ppl: str
    rho: str
    kld: str
    rms: str
    same_top: str


def row(label: str, scores: Scores) -> Row:
    """A model's figures as text; what was not measured is a dash."""
    return Row(
        label=label,
        file=scores.model,
        size=gigabytes(scores.bytes),
        bpw=f"{scores.bpw:.2f}",
        ppl=with_error(scores.ppl),
        rho=percent(scores.rho_ppl) if scores.rho_ppl is not None else DASH,
        kld=with_error(scores.kld) if scores.kld else DASH,
        rms=f"{with_error(scores.delta_p.rms, 100)} %" if scores.delta_p else DASH,
        same_top=f"{with_error(scores.same_top_p, 100)} %" if scores.same_top_p else DASH,
    )


def rows_of(measured: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[Row]:
    """Rows for Scores JSON values: the first (full precision), then the others from the smallest file to the largest.

    `labels` name them in the same order.
    """
    parsed = [(label, Scores.model_validate(one)) for label, one in zip(labels, measured, strict=True)]
    return [row(label, one) for label, one in [parsed[0], *by_size(parsed[1:])]]
