"""The state of optimizers and learning-rate schedules, by the names of the parameters that they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_ext.plain_data import from_plain, name_of, to_plain


def optimizer_state(optim: PyroOptim | Optimizer) -> dict[str, Any]:
    """The state of an optimizer of Pyro or torch as tensors and plain containers.

    Raises:
        TypeError: the optimizer or its schedule keeps something that is no data.
    """
    if isinstance(optim, Optimizer):
        return {"kind": _kind(optim), "whole": _torch_state(optim, "the optimizer")}
    store = pyro.get_param_store()
    named = {store.param_name(tensor): made for tensor, made in optim.optim_objs.items()}
    return {
        "kind": _kind(optim),
        "named": {name: _one_state(made, name) for name, made in named.items() if name is not None},
        "waiting": to_plain(dict(optim._state_waiting_to_be_consumed), "the optimizer's waiting state"),
    }


def check_optimizer(optim: PyroOptim | Optimizer, state: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What does not fit, as rule, value and remedy; None where all does."""
    if _kind(optim) != state["kind"]:
        return f"the optimizer {state['kind']}", _kind(optim), "Take the same optimizer."
    if isinstance(optim, Optimizer):
        saved = [len(group["parameters"]) for group in state["whole"]["groups"]]
        ours = [len(group["params"]) for group in optim.param_groups]
        if saved != ours:
            return f"an optimizer of groups of {saved} parameters", f"{ours}", "Build it alike."
    return None


def restore_optimizer(optim: PyroOptim | Optimizer, state: Mapping[str, Any]) -> None:
    """Put the state back; optimizers of parameters that are met for the first time are made."""
    if isinstance(optim, Optimizer):
        _restore_torch(optim, state["whole"])
        return
    store = pyro.get_param_store()
    before = dict(optim.optim_objs), dict(optim.grad_clip)
    optim.optim_objs.clear()
    optim.grad_clip.clear()
    for name, entry in state["named"].items():
        tensor = store._params[name]
        if tensor in before[0]:
            made, clip = before[0][tensor], before[1][tensor]
        else:
            any_optim: Any = optim
            made, clip = any_optim._get_optim(tensor), any_optim._get_grad_clip(tensor)
        optim.optim_objs[tensor], optim.grad_clip[tensor] = made, clip
        if entry["schedule"] is not None:
            made.load_state_dict(from_plain(entry["schedule"]))
        _restore_torch(_inner(made), entry["optimizer"])
    optim._state_waiting_to_be_consumed = from_plain(state["waiting"])


def _kind(optim: Any) -> str:
    if isinstance(optim, Optimizer):
        return type(optim).__name__
    schedule = getattr(optim, "pt_scheduler_constructor", None)
    kind = name_of(optim.pt_optim_constructor)
    return kind if schedule is None else f"{name_of(schedule)} of {kind}"


def _inner(made: Any) -> Any:
    return made.optimizer if hasattr(made, "optimizer") else made


def _one_state(made: Any, name: str) -> dict[str, Any]:
    where = f"the optimizer of {name!r}"
    schedule = to_plain(made.state_dict(), f"the schedule of {name!r}") if hasattr(made, "optimizer") else None
    return {"schedule": schedule, "optimizer": _torch_state(_inner(made), where)}


def _torch_state(optimizer: Any, where: str) -> dict[str, Any]:
    groups = [
        {
            "settings": {k: _copied(v, where) for k, v in group.items() if k != "params"},
            "parameters": [
                None
                if tensor not in optimizer.state
                else {k: _entry(v, tensor, where) for k, v in optimizer.state[tensor].items()}
                for tensor in group["params"]
            ],
        }
        for group in optimizer.param_groups
    ]
    return {"groups": groups}


def _entry(value: Any, tensor: Tensor, where: str) -> Any:
    """One entry of a parameter's state: tensors go with the parameter from device to device, or stay on the CPU."""
    if isinstance(value, Tensor):
        return {"tensor": value.detach().clone(), "with_parameter": value.device == tensor.device}
    return {"plain": _copied(value, where)}


def _copied(value: Any, where: str) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else to_plain(value, where)


def _restore_torch(optimizer: Any, state: Mapping[str, Any]) -> None:
    before = dict(optimizer.state)
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for name, value in from_plain(saved["settings"]).items():
            mine = group.get(name)
            if isinstance(value, Tensor) and isinstance(mine, Tensor):
                with torch.no_grad():
                    mine.copy_(value)
            else:
                group[name] = value.clone() if isinstance(value, Tensor) else value
        for tensor, entries in zip(group["params"], saved["parameters"], strict=True):
            if entries is not None:
                on_device = bool(group.get("capturable") or group.get("fused"))
                found = {k: _value(k, entry, tensor, on_device) for k, entry in entries.items()}
                optimizer.state[tensor] = _in_place(before.get(tensor, {}), found)


def _in_place(before: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The values found, in the tensors that were there, where these are alike: graphs may hold them."""
    for name, value in found.items():
        mine = before.get(name)
        if isinstance(value, Tensor) and isinstance(mine, Tensor) and _alike(mine, value):
            with torch.no_grad():
                found[name] = mine.copy_(value)
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _value(name: str, entry: Mapping[str, Any], tensor: Tensor, counts_on_device: bool) -> Any:
    if "tensor" not in entry:
        return _onto(from_plain(entry["plain"]), tensor)
    value = entry["tensor"]
    # Optimizers of torch count their steps on the CPU, unless they are told to count on the device.
    stays = (name == "step" and value.dim() == 0 and not counts_on_device) or not entry["with_parameter"]
    return value.to("cpu" if stays else tensor.device, copy=True)


def _onto(value: Any, tensor: Tensor) -> Any:
    """Nested tensors, such as the history of L-BFGS, on the parameter's device."""
    if isinstance(value, Tensor):
        return value.to(tensor.device, copy=True)
    return [_onto(item, tensor) for item in value] if isinstance(value, list) else value
