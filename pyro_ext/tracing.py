"""Whether a graph is being traced: tests of values are left out then, and made outside."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_TRACING: ContextVar[bool] = ContextVar("pyro_ext_tracing", default=False)


def is_tracing() -> bool:
    """Whether tensors stand for all values that a compiled graph will see, so that none may be looked at."""
    return _TRACING.get()


def holds(condition: Tensor) -> bool:
    """Whether a condition holds; taken as true while tracing, for the eager run beside it has tested it.

    Example:
        >>> import torch
        >>> holds(torch.tensor(False))
        False
        >>> with tracing():
        ...     holds(torch.tensor(False))
        True
    """
    return is_tracing() or bool(condition)


@contextmanager
def tracing() -> Generator[None, None, None]:
    """Trace in the block."""
    token = _TRACING.set(True)
    try:
        yield
    finally:
        _TRACING.reset(token)
