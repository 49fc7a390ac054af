"""The state of a driver by name, as tensors and plain containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parameter import is_lazy

from pyro_ext.closed_form import ClosedForm
from pyro_ext.optimizer_state import optimizer_state
from pyro_ext.ownership import modules_and_optimizers, parameter_names, registered_slots, slots
from pyro_ext.plain_data import constraint_to_plain


def capture(driver: Any) -> dict[str, Any]:
    """The state of a driver: parameters, modules, optimizers and steps, as tensors and plain containers.

    Tensors are copies, on their own devices.

    Raises:
        ValueError: its parameters are not known; see `parameter_names`.
        TypeError: an optimizer or a step keeps something that is no data.
    """
    store = pyro.get_param_store()
    modules, optims = modules_and_optimizers(driver)
    names = parameter_names(driver)
    return {
        "parameters": {name: _entry(store._params[name], store._constraints[name]) for name in names},
        "modules": [_module_state(module, {id(store._params[name]): name for name in names}) for module in modules],
        "optimizers": [optimizer_state(optim) for optim in optims],
        "states": {role: state_of(owner) for role, owner in owners(driver).items()},
        "untouched": is_untouched(driver),
    }


def _entry(tensor: Tensor, constraint: Any) -> dict[str, Any]:
    return {
        "value": _copy(tensor),
        "constraint": constraint_to_plain(constraint),
        "grad": _grad_state(tensor),
        "device": str(tensor.device),
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _grad_state(tensor: Tensor) -> Any:
    """Between Pyro's steps gradients are zero or None, and optimizers tell these apart."""
    grad = tensor.grad
    if grad is None:
        return None
    return _copy(grad) if bool(grad.count_nonzero()) else 0


def _module_state(module: nn.Module, stored: Mapping[int, str]) -> dict[str, Any]:
    aliases: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {}
    buffers: dict[str, Tensor] = {}
    registered = registered_slots(module)
    for slot, table, name in slots(module):
        tensor = table[name]
        if tensor is None or is_lazy(tensor):
            continue
        if id(tensor) in stored:
            aliases[slot] = stored[id(tensor)]
        else:
            # Not in the store yet; a guide that is set up only after loading finds it there, under this name.
            known, constraint = registered.get(slot, (None, constraints.real))
            values[slot] = _entry(tensor, constraint) | {"name": known}
    for slot, table, name in slots(module, buffers=True):
        tensor = table[name]
        if tensor is not None and not is_lazy(tensor) and not _is_constant(tensor):
            buffers[slot] = _copy(tensor)
    return {"class": type(module).__name__, "aliases": aliases, "values": values, "buffers": buffers}


def _is_constant(tensor: Tensor) -> bool:
    # Elements that share memory can be written by nobody.
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def owners(driver: Any) -> dict[str, Any]:
    """The objects beside modules and optimizers that may keep something, by their role."""
    found = {"driver": driver}
    found |= {role: getattr(driver, role, None) for role in ("model", "guide", "e_step", "m_step")}
    return {role: owner for role, owner in found.items() if owner is not None}


def is_untouched(driver: Any) -> bool:
    """Whether the model holds the values that it was made with, so that a run will draw its start."""
    return bool(getattr(getattr(driver, "model", None), "is_untouched", False))


def state_of(owner: Any) -> Any:
    """What a driver, step or guide asks to be kept beside tensors; None where it asks for nothing.

    Raises:
        ValueError: statistics of an epoch are being gathered.
    """
    if isinstance(owner, ClosedForm):
        if owner._gathered is not None:
            raise ValueError(
                "Expected no epoch under way, but got one whose statistics are being gathered. Save outside of "
                "`EM.epoch()`."
            )
        return {"calls": owner.num_calls, "average": dict(owner._average), "largest": owner._largest}
    state = getattr(owner, "checkpoint_state", None)
    return state() if callable(state) else None


def put_back(owner: Any, state: Any) -> None:
    """Give back what `state_of` kept."""
    if isinstance(owner, ClosedForm):
        owner.num_calls, owner._average, owner._largest = state["calls"], dict(state["average"]), state["largest"]
    elif callable(getattr(owner, "load_checkpoint_state", None)):
        owner.load_checkpoint_state(state)


def moved(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers, with every tensor changed."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, Mapping):
        return {key: moved(item, change) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(moved(item, change) for item in state)
    return state
