"""Running a program without effects, and fixing the rows that its plates draw."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor


@contextmanager
def sandbox(*tensors: Tensor) -> Generator[None, None, None]:
    """Run a program in here and leave no trace: no messages, parameters, random state or plate dimensions.

    Args:
        tensors: the program's tensors, whose devices' random states are kept.

    Example:
        >>> pyro.clear_param_store()
        >>> with sandbox():
        ...     _ = pyro.param("w", torch.randn(2))
        >>> list(pyro.get_param_store())
        []
    """
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    plates, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block(), torch.random.fork_rng(devices=devices), _new_parameters_removed(always=True):
            yield
    finally:
        _DIM_ALLOCATOR._stack = plates


def random_states() -> list[Tensor]:
    """States of torch's random generators, the CPU's first, for `set_random_states`."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: list[Tensor]) -> None:
    """Go back to states of torch's random generators.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(2)
        >>> set_random_states(states)
        >>> torch.equal(torch.rand(2), first)
        True
    """
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def refusal() -> Generator[None, None, None]:
    """Remove the parameters that came into being in here when it ends with an error."""
    with _new_parameters_removed(always=False):
        yield


@contextmanager
def _new_parameters_removed(always: bool) -> Generator[None, None, None]:
    store = pyro.get_param_store()
    before = set(store.keys())
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            for name in store.keys() - before:
                del store[name]


class FixedIndices(Messenger):
    """Let plates take given indices rather than draw their own.

    Args:
        indices: for each plate, a tensor of shape (B,).
    """

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is None and msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]


def plate_indices(trace: Trace) -> dict[str, Tensor]:
    """The indices that each plate of a traced program drew.

    Returns:
        For each plate, a tensor of shape (B,).

    Example:
        >>> import pyro.distributions as dist
        >>> def guide():
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("h", dist.Normal(0.0, 1.0))
        >>> plate_indices(poutine.trace(guide).get_trace())
        {'data': tensor([0, 1, 2])}
    """
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site["value"] for name, site in nodes.items() if isinstance(site.get("fn"), _Subsample)}
