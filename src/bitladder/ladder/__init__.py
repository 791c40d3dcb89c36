"""The whole way from a checkpoint to a measured ladder of quants, kept in one directory and continued where it was."""

from bitladder.ladder.plan import RunOptions, choose_rungs
from bitladder.ladder.run import RunResult, run
from bitladder.recipe import Recipe, read_recipe, write_recipe

__all__ = ["Recipe", "RunOptions", "RunResult", "choose_rungs", "read_recipe", "run", "write_recipe"]
