"""The whole way from a checkpoint to a measured ladder of quants, kept in one directory and continued where it was."""

from bitladder.ladder.plan import RunOptions, choose_rungs
from bitladder.ladder.recipe import Recipe, read_recipe, write_recipe
from bitladder.ladder.run import RunResult, run

__all__ = ["Recipe", "RunOptions", "RunResult", "choose_rungs", "read_recipe", "run", "write_recipe"]
