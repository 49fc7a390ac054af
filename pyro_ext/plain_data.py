"""Numbers, containers, records and constraints as plain data, and back: what a checkpoint may hold."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import constraints as torch_constraints

from pyro_ext import history

_LONG = 16
"""Lists of numbers or strings of this length are packed."""

_ATOMS = frozenset({bool, int, float, str, type(None)})
_RECORDS: dict[str, Any] = {
    name: kind for name, kind in vars(history).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}
_ENUMS: dict[str, Any] = {
    name: kind for name, kind in vars(history).items() if isinstance(kind, type) and issubclass(kind, Enum)
}


def to_plain(value: Any, where: str) -> Any:
    """Copy a value into dictionaries, lists, tuples, numbers, strings, None and tensors on the CPU.

    The records of `history.py` become dictionaries of their fields; a list of records becomes one list a field.

    Args:
        value: what to copy.
        where: what it is, for the message.

    Raises:
        TypeError: something in it is no data, such as a function.
    """
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, Enum) and type(value).__name__ in _ENUMS:
        return {"__enum__": type(value).__name__, "value": value.value}
    if isinstance(value, bool | int | float | str):
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if isinstance(value, np.generic):
        return value.item()
    if type(value).__name__ in _RECORDS and dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name), where) for f in dataclasses.fields(value)}
        return {"__record__": type(value).__name__, "fields": fields}
    if isinstance(value, Counter):
        return {"__counter__": [[to_plain(key, where), count] for key, count in value.items()]}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in _ATOMS:
                raise TypeError(_no_data(where, key))
        return {key: to_plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return _list_to_plain(cast("list[Any]", value), where)
    if isinstance(value, tuple):
        return tuple(to_plain(item, where) for item in cast("tuple[Any, ...]", value))
    raise TypeError(_no_data(where, value))


def _list_to_plain(values: list[Any], where: str) -> Any:
    # A history has a number a step, and is written again and again: pickling each by itself would take the longest.
    kinds = set(map(type, values))
    if len(values) >= _LONG and kinds <= {float}:
        return {"__numbers__": torch.tensor(values, dtype=torch.float64)}
    if len(values) >= _LONG and kinds <= {int} and max(map(abs, values)) < 2**63:
        return {"__numbers__": torch.tensor(values, dtype=torch.int64)}
    if len(values) >= _LONG and kinds <= {str} and not any("\n" in text for text in values):
        return {"__lines__": "\n".join(values)}
    if kinds <= _ATOMS:
        return list(values)
    if len(kinds) == 1 and (kind := kinds.pop()).__name__ in _RECORDS and dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        columns = {name: _list_to_plain([getattr(v, name) for v in values], where) for name in names}
        return {"__records__": kind.__name__, "count": len(values), "columns": columns}
    return [to_plain(item, where) for item in values]


def _no_data(where: str, value: Any) -> str:
    return (
        f"Expected plain data in {where}, but got {type(value).__name__}. A checkpoint holds numbers, strings, tensors "
        "and containers of these: keep anything else out of it."
    )


def from_plain(value: Any) -> Any:
    """What `to_plain` copied; tensors stay as they are.

    Raises:
        ValueError: a record or a field of it that this version does not know.
    """
    if isinstance(value, list):
        values = cast("list[Any]", value)
        return list(values) if set(map(type, values)) <= _ATOMS else [from_plain(item) for item in values]
    if isinstance(value, tuple):
        return tuple(from_plain(item) for item in cast("tuple[Any, ...]", value))
    if not isinstance(value, dict):
        return value
    entry = cast("dict[Any, Any]", value)
    if "__numbers__" in entry:
        return entry["__numbers__"].tolist()
    if "__lines__" in entry:
        return entry["__lines__"].split("\n")
    if "__enum__" in entry:
        return _known(_ENUMS, entry["__enum__"])(entry["value"])
    if "__record__" in entry:
        return _record(entry["__record__"], from_plain(entry["fields"]))
    if "__records__" in entry:
        columns = {name: from_plain(column) for name, column in entry["columns"].items()}
        rows = range(entry["count"])
        return [_record(entry["__records__"], {name: column[i] for name, column in columns.items()}) for i in rows]
    if "__counter__" in entry:
        return Counter({from_plain(key): count for key, count in entry["__counter__"]})
    return {key: from_plain(item) for key, item in entry.items()}


def _known(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"Expected a record of pyro_ext.history, but got {name!r}. Update pyro-ext.")
    return table[name]


def _record(name: str, fields: Mapping[str, Any]) -> Any:
    kind = _known(_RECORDS, name)
    unknown = fields.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"Expected known fields of {name}, but got {sorted(unknown)}. Update pyro-ext.")
    return kind(**fields)


# ---------------------------------------------------------------- constraints


def constraint_to_plain(constraint: Any) -> dict[str, Any]:
    """A constraint by name, with its bounds.

    Example:
        >>> from pyro.distributions import constraints
        >>> constraint_to_plain(constraints.interval(0.0, 2.0))["settings"]
        {'lower_bound': 0.0, 'upper_bound': 2.0}
    """
    kind = constraint if isinstance(constraint, type) else type(constraint)
    settings = {} if isinstance(constraint, type) else vars(constraint)
    name = kind.__name__ if _constraint_kind(kind.__name__) is kind else f"{kind.__module__}.{kind.__qualname__}"
    return {
        "name": name,
        "settings": {key: _setting(item) for key, item in settings.items() if item is not NotImplemented},
    }


def _setting(value: Any) -> Any:
    if isinstance(value, torch_constraints.Constraint):
        return constraint_to_plain(value)
    if isinstance(value, list | tuple):
        return [_setting(item) for item in cast("list[Any]", value)]
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value if type(value) in _ATOMS else str(value)


def constraint_from_plain(entry: Mapping[str, Any]) -> Any:
    """The constraint that `constraint_to_plain` named; None where it is none of torch's or Pyro's."""
    kind = _constraint_kind(entry["name"])
    if kind is None:
        return None
    if entry["name"] == "_Real":
        return torch_constraints.real
    constraint = object.__new__(kind)
    vars(constraint).update({name: _setting_from_plain(item) for name, item in entry["settings"].items()})
    return constraint


def _setting_from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_setting_from_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return constraint_from_plain(cast("dict[str, Any]", value)) if isinstance(value, dict) else value


def _constraint_kind(name: str) -> Any:
    """A class of torch's or Pyro's constraints: no other name is looked up."""
    for module in (torch_constraints, pyro_constraints):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, torch_constraints.Constraint):
            return kind
    return None


def shown(constraint: Mapping[str, Any]) -> str:
    """A constraint in words, for messages.

    Example:
        >>> from pyro.distributions import constraints
        >>> shown(constraint_to_plain(constraints.positive)), shown(constraint_to_plain(constraints.real))
        ('GreaterThan(lower_bound=0.0)', 'Real()')
    """
    inner = ", ".join(
        f"{k}={shown(v) if isinstance(v, dict) and 'settings' in v else v}" for k, v in constraint["settings"].items()
    )
    return f"{constraint['name'].lstrip('_')}({inner})"


# ---------------------------------------------------------------- settings


def settings_of(value: Any) -> Any:
    """What an object was built with, as plain data: the arguments of its constructor that it keeps by their names.

    Modules are named only, for their parameters are compared by themselves.

    Example:
        >>> from pyro_ext.early_stopping import EarlyStopping
        >>> settings_of(EarlyStopping(patience=3))
        {'class': 'EarlyStopping', 'patience': 3, 'min_delta': 0.0}
    """
    if type(value) in _ATOMS:
        return value
    if isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): settings_of(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [settings_of(item) for item in cast("list[Any]", value)]
    if isinstance(value, PyroOptim):
        return _optimizer_settings(value)
    if isinstance(value, (nn.Module, type)) or not hasattr(type(value), "__init__"):
        return name_of(value)
    if inspect.isroutine(value):
        return name_of(value)
    return {"class": type(value).__name__} | _constructor_settings(value)


# The ELBOs of Pyro replace it by what they find in the program.
_FOUND_LATER = frozenset({"max_plate_nesting"})


def _constructor_settings(value: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(value).__init__).parameters
    kept = [name for name in parameters if name in vars(value) and name not in _FOUND_LATER]
    return {name: settings_of(vars(value)[name]) for name in kept}


def _optimizer_settings(optim: PyroOptim) -> dict[str, Any]:
    kinds = [getattr(optim, "pt_scheduler_constructor", None), optim.pt_optim_constructor]
    arguments: dict[str, Any] = {"arguments": optim.pt_optim_args, "clip": optim.pt_clip_args}
    if kinds[0] is not None:
        arguments["schedule"] = getattr(optim, "kwargs", {})
    names = [name_of(kind) for kind in kinds if kind is not None]
    return {"class": " of ".join(names)} | {k: settings_of(v) for k, v in arguments.items()}


def name_of(value: Any) -> str:
    """A name that is the same in another process: a module's own, a function's or a class's."""
    named: Callable[..., Any] | type = value if hasattr(value, "__name__") else type(value)
    return str(getattr(value, "_pyro_name", "") or named.__name__)
