"""The arguments of a call: what they hold, what they are called, and copies with parts replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from pyro.poutine.messenger import Messenger, _bound_partial
from torch import Tensor, nn

from pyro_ext.provenance import Path

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def argument_names(fn: Callable[..., Any], args: Args = (), kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    """Names of the parameters of a program, handlers around it looked through.

    Positional arguments without a name (``*args``) are named by their position.

    Example:
        >>> import pyro
        >>> def model(x, *rest, mask=None): ...
        >>> argument_names(pyro.poutine.block(model), (1, 2), {"mask": 3})
        ['x', 1, 'mask']
    """
    inner = unwrapped(fn)
    try:
        signature = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner)
    except (TypeError, ValueError):
        return [*range(len(args)), *(kwargs or {})]
    simple = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: list[Any] = [p.name for p in signature.parameters.values() if p.kind not in simple]
    names += range(len(names), len(args))
    names += [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return names + [name for name in kwargs or {} if name not in names]


def leaves_of(args: Args, kwargs: Kwargs) -> dict[Path, Any]:
    """What lists, tuples and mappings among the arguments hold in the end, by the way there."""
    found: dict[Path, Any] = {}

    def visit(path: Path, value: Any) -> None:
        if isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, Mapping):
            items = value.items()
        else:
            found[path] = value
            return
        for key, item in items:
            visit((*path, key), item)

    for position, value in enumerate(args):
        visit(("args", position), value)
    for name, value in kwargs.items():
        visit(("kwargs", name), value)
    return found


def with_leaves(args: Args, kwargs: Kwargs, leaves: Mapping[Path, Tensor]) -> tuple[Args, Kwargs]:
    """The arguments with other leaves; containers on the way to one are copied."""

    def visit(path: Path, value: Any) -> Any:
        if not any(p[: len(path)] == path for p in leaves):
            return value
        if path in leaves:
            return leaves[path]
        if isinstance(value, Mapping):
            return {key: visit((*path, key), item) for key, item in value.items()}
        items = [visit((*path, key), item) for key, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    return (
        tuple(visit(("args", position), value) for position, value in enumerate(args)),
        {name: visit(("kwargs", name), value) for name, value in kwargs.items()},
    )


def signature_of(args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
    """What the course of a program may depend on, as far as it can be told without looking at the data.

    Shapes, strides, dtypes and devices of tensors, which of them share memory, and the values of all
    other arguments but floats (an annealing factor changes at each call).
    """
    storages: dict[int, int] = {}
    parts: list[Any] = []
    for path, leaf in leaves_of(args, kwargs).items():
        if not isinstance(leaf, Tensor):
            part: Any = None if isinstance(leaf, float) else _hashable(leaf)
            parts.append((path, type(leaf), part))
        elif leaf.layout is torch.strided:
            alias = storages.setdefault(leaf.untyped_storage().data_ptr(), len(storages))
            parts.append((path, leaf.shape, leaf.stride(), leaf.dtype, leaf.device, alias))
        else:
            parts.append((path, leaf.shape, leaf.layout, leaf.dtype, leaf.device))
    return tuple(parts)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def is_same_program(one: Any, other: Any) -> bool:
    """Whether two callables are one program: each look at ``vae.model`` makes another object of the same method."""
    return one is other or (isinstance(one, MethodType) and isinstance(other, MethodType) and one == other)


def unwrapped(fn: Any) -> Any:
    """The program inside Pyro's handlers."""
    while True:
        if isinstance(fn, _bound_partial):
            fn = fn.func
        elif isinstance(fn, partial) and len(fn.args) > 1 and isinstance(fn.args[0], Messenger):
            fn = fn.args[1]
        else:
            return fn


def label_of(path: Path, names: list[Any]) -> str:
    """The way to a leaf as one writes it, ``x['a'][0]``."""
    _, first, *rest = path
    name = first if isinstance(first, str) else names[first]
    return (name if isinstance(name, str) else f"args[{name}]") + "".join(f"[{key!r}]" for key in rest)


def root_of(argument: str | int, args: Args, kwargs: Kwargs, names: list[Any]) -> Path:
    """The way to an argument given by name or position.

    Raises:
        ValueError: the call has no such argument.
    """
    if isinstance(argument, str) and argument in kwargs:
        return ("kwargs", argument)
    position = names.index(argument) if argument in names else argument
    if isinstance(position, int) and 0 <= position < len(args):
        return ("args", position)
    raise ValueError(
        f"Expected `visible` to name an argument of the call, one of "
        f"{[*names[: len(args)], *kwargs]} or a position below {len(args)}, but got {argument!r}. Correct it."
    )
