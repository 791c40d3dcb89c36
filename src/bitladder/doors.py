"""The door of a package: `__init__` names what other packages use, and a name is imported when it is first used.

So `from bitladder.plan import PlanOptions` reads the module of the options only, and `--help` waits neither for the
native library nor for compilers and solvers. The imports stand in the `__init__` for type checkers:

    if TYPE_CHECKING:
        from bitladder.plan import PlanOptions

    __all__ = ["PlanOptions"]
    open_door(__name__)
"""

import ast
import importlib
import pathlib
import sys
import types
from typing import Any


class _Door(types.ModuleType):
    """A package whose names are imported on first use."""

    _homes: dict[str, tuple[str, str]]

    def __getattr__(self, name: str) -> Any:
        if name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, attribute = self._homes[name]
        value = getattr(importlib.import_module(module), attribute)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python puts each imported submodule into its package. A function of the same name is what the door exports.
        if not (isinstance(value, types.ModuleType) and name in self._homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def open_door(package: str) -> None:
    """Makes a package import the names of its `if TYPE_CHECKING:` block on first use.

    Parameters:
        package: the `__name__` of the package, whose `__init__` calls this.
    """
    module = sys.modules[package]
    tree = ast.parse(pathlib.Path(str(module.__file__)).read_text(encoding="utf-8"))
    module.__dict__["_homes"] = {
        alias.asname or alias.name: (str(statement.module), alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    module.__class__ = _Door
