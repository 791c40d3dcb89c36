"""What a person reads of a run: the model card, the HTML report and the tables. Reads only the run directory."""

from bitladder.report.card import render_card, write_card
from bitladder.report.page import render_report, write_report

__all__ = ["render_card", "render_report", "write_card", "write_report"]
