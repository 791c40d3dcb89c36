"""A run for the terminal: its ladder as a table, and size against KLD in characters. Reads only the run directory."""

from bitladder.show.ladder_table import front, ladder_json, ladder_table, pareto_plot
from bitladder.show.scatter import Point, scatter

__all__ = ["Point", "front", "ladder_json", "ladder_table", "pareto_plot", "scatter"]
