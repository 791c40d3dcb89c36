"""torch, where it is installed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError


def require_torch() -> Any:
    """The torch module. Raises BitladderError that says how to get it."""
    try:
        import torch
    except ImportError:
        raise BitladderError("gradients need torch, which is not installed: pip install 'bitladder[torch]'") from None
    return torch


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Inside the context torch computes with so many threads (None: every CPU this process may use)."""
    torch = require_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_available())
    try:
        yield
    finally:
        torch.set_num_threads(before)
