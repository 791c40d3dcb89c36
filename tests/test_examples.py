"""Every example in a docstring is what Python prints."""

import doctest
import importlib
import pathlib

import pytest

import bitladder

SOURCE = pathlib.Path(bitladder.__file__).parent
WITH_EXAMPLES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples(path):
    name = ".".join(("bitladder", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
