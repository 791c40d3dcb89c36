"""Recipes: the type of every tensor of a quant. Read, written, extracted, compared, checked and exported."""

from bitladder.recipe.check_recipe import changeable, check
from bitladder.recipe.diff import RecipeDiff, diff
from bitladder.recipe.export import Export, export, export_command, export_lines
from bitladder.recipe.extract import extract
from bitladder.recipe.findings import Checked, Finding
from bitladder.recipe.patterns import (
    exact_patterns,
    match_patterns,
    parse_tensor_type,
    read_tensor_types,
    target_type,
)
from bitladder.recipe.schema import FileUsed, ImatrixUsed, Recipe, TextUsed, recipe_sha256
from bitladder.recipe.toml import read_recipe, recipe_toml, write_recipe

__all__ = [
    "Checked",
    "Export",
    "FileUsed",
    "Finding",
    "ImatrixUsed",
    "Recipe",
    "RecipeDiff",
    "TextUsed",
    "changeable",
    "check",
    "diff",
    "exact_patterns",
    "export",
    "export_command",
    "export_lines",
    "extract",
    "match_patterns",
    "parse_tensor_type",
    "read_recipe",
    "read_tensor_types",
    "recipe_sha256",
    "recipe_toml",
    "target_type",
    "write_recipe",
]
