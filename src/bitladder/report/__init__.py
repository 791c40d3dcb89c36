"""What a person reads of a run: the model card and the tables. Reads only the run directory."""

from bitladder.report.card import render_card, write_card
from bitladder.report.results import Row, rows_of

__all__ = ["Row", "render_card", "rows_of", "write_card"]
