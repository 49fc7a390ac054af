"""New random starts of a model, for the best of several runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ext.snapshot import modules_of


def draw_new_start(model: Callable[..., Any], guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give theta new random values, in place, and put the guide's table back to its cold start.

    A model with a method ``initialize(*args, **kwargs)`` draws its own start. Of any other, plain
    `pyro.param` statements are initialised anew, and submodules with ``reset_parameters`` are reset.

    Args:
        model: the model.
        guide: its guide.
        args: the data, as the model takes them.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: every parameter came back as it was, so that all starts would be one.
    """
    initialize = getattr(model, "initialize", None)
    if callable(initialize):
        initialize(*args, **kwargs)
    else:
        _draw_parameters(model, args, kwargs)
    if guide.is_table:
        guide.forget()


def _draw_parameters(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(model, param_only=True).get_trace(*args, **kwargs)
    nodes = cast("dict[str, Any]", trace.nodes)
    tensors: dict[str, Tensor] = {n: s["value"].unconstrained() for n, s in nodes.items() if s["type"] == "param"}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for module in modules_of(model):
        _reset(module)
    fresh = _fresh_values(model, args, kwargs, set(tensors))
    with torch.no_grad():
        for name, value in fresh.items():
            tensors[name].copy_(value)
    if all(torch.equal(before[name], tensor) for name, tensor in tensors.items()):
        label = getattr(model, "__name__", type(model).__name__)
        raise ValueError(
            f"Expected a model whose start can be drawn anew, but every parameter of {label} came back the same. "
            "Give it a method `initialize(*args)`, or draw its initial values at random inside `pyro.param`."
        )


def _reset(module: nn.Module) -> None:
    for child in module.modules():
        reset: Any = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()


def _fresh_values(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: set[str]
) -> dict[str, Tensor]:
    """Run a plain program in an empty store, to see what its `pyro.param` statements begin with."""
    if modules_of(model):
        return {}
    store: Any = pyro.get_param_store()
    with store.scope(), poutine.block(), torch.no_grad():
        model(*args, **kwargs)
        return {name: store[name].unconstrained().detach().clone() for name in names if name in store}
