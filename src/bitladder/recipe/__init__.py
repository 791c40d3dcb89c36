"""Recipes: the type of every tensor of a quant. Read, written, extracted, compared, checked and exported."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.recipe.check_recipe import RecipeCheck, RecipeDiff, RecipeFinding, changeable, check, diff
    from bitladder.recipe.exchange import (
        RECIPE_KEY,
        Export,
        export,
        export_command,
        export_lines,
        extract,
        joined_shapes,
        open_recipe,
    )
    from bitladder.recipe.patterns import (
        PatternMatch,
        exact_patterns,
        match_patterns,
        parse_tensor_type,
        read_tensor_types,
        target_type,
    )
    from bitladder.recipe.recipe import (
        FileUsed,
        ImatrixUsed,
        Recipe,
        Shapes,
        Size,
        TextUsed,
        block_size,
        read_recipe,
        recipe_sha256,
        recipe_toml,
        size_of,
        write_recipe,
    )

__all__ = [
    "RECIPE_KEY",
    "Export",
    "FileUsed",
    "ImatrixUsed",
    "PatternMatch",
    "Recipe",
    "RecipeCheck",
    "RecipeDiff",
    "RecipeFinding",
    "Shapes",
    "Size",
    "TextUsed",
    "block_size",
    "changeable",
    "check",
    "diff",
    "exact_patterns",
    "export",
    "export_command",
    "export_lines",
    "extract",
    "joined_shapes",
    "match_patterns",
    "open_recipe",
    "parse_tensor_type",
    "read_recipe",
    "read_tensor_types",
    "recipe_sha256",
    "recipe_toml",
    "size_of",
    "target_type",
    "write_recipe",
]
open_door(__name__)
