"""What a graph of a step belongs to: everything beside the values of tensors that Python may look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_leaves

_PLAIN = (bool, int, float, str, bytes, type(None))


def signature(args: tuple[Any, ...], kwargs: dict[str, Any], modules: Sequence[nn.Module]) -> Any:
    """A key for the arguments of a step and the modes of the modules that it runs.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        modules: every module that runs.

    Returns:
        Shapes, strides, dtypes and devices of tensors, the values of all else, and how they are nested.
    """
    modes = [module.training for module in modules]
    if is_flat(args, kwargs):
        return (*map(_kind, args), *modes, torch.get_default_dtype())
    leaves, spec = tree_flatten((args, kwargs))
    return (repr(spec), *map(_kind, leaves), *modes, torch.get_default_dtype())


def is_flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all arguments are tensors by position."""
    return not kwargs and all(type(a) is Tensor for a in args)


def is_plain_surroundings() -> bool:
    """Whether gradients are on and no handler around a step changes anything: a graph would see neither."""
    if any(not getattr(handler, "only_watches", False) for handler in _PYRO_STACK):
        return False
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def check_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that a graph cannot take.

    Raises:
        TypeError: an argument is neither a tensor nor plain.
        ValueError: a tensor asks for a gradient.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                raise ValueError(
                    "Expected data without gradients, but got a tensor with requires_grad. Register it by pyro.param."
                )
        elif not isinstance(leaf, _PLAIN):
            raise TypeError(
                f"Expected tensors and plain values as arguments, but got {type(leaf).__name__}. "
                "Convert it, for instance by torch.as_tensor."
            )


def settings_of(objective: Any) -> Callable[[], tuple[Any, ...]]:
    """A function that reads the plain settings of an objective, such as its number of particles."""
    held: dict[str, Any] = getattr(objective, "__dict__", {})
    # What it keeps for itself, and what it notes of the last step, are no settings.
    own = ("_", "last_")
    names = [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith(own)]
    return lambda: tuple(held.get(name) for name in names)


@contextmanager
def noting_modules() -> Generator[list[nn.Module], None, None]:
    """Every module whose forward pass runs in the block, also those that only a plain function holds.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> with noting_modules() as modules:
        ...     _ = net(torch.zeros(1, 2))
        >>> [type(module).__name__ for module in modules]
        ['Sequential', 'Linear', 'Tanh']
    """
    found: dict[int, nn.Module] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        found.setdefault(id(module), module)

    modules: list[nn.Module] = []
    handle = register_module_forward_pre_hook(note)
    try:
        yield modules
    finally:
        handle.remove()
        modules.extend(found.values())


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    if isinstance(leaf, float):
        return float, leaf, math.copysign(1.0, leaf)
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else (type(leaf), id(leaf))
