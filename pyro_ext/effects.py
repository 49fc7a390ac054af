"""A loss as tensor code: what Pyro's objectives do beside it is left to the caller of the graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ext.tracing import is_tracing

# Where Pyro looks at values only to warn, or to save work: the answer False keeps it general.
_PYRO = ("pyro.util", "pyro.infer.util")

_LOOKED_AT = (
    torch.Tensor.item,
    torch.Tensor.masked_select,
    torch.Tensor.register_hook,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.equal,
    torch.equal,
)

_SILENT = _LOOKED_AT[-5:]
"""Torch gives the present values there, and a graph would hold them for good."""


class DataDependentError(RuntimeError):
    """A program looked at the value of a tensor that stands for all values."""


class EffectsOutside(TorchFunctionMode):
    """In the block, numbers stay tensors and backward passes are noted instead of made.

    Pyro's ELBOs call ``loss.item()`` and ``surrogate.backward()``, which a graph can hold neither of. Here ``item``
    gives the detached tensor where it is no constant, and what ``backward`` was called on is added up in `surrogate`;
    its gradient is what the objective would have written to ``grad``. Every objective of Pyro, and any
    ``loss_and_grads`` written like them, becomes tensor code this way, with the very operations of the eager run.

    Attributes:
        surrogate: the sum of the tensors whose backward passes were asked for; None if there was none.

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> with EffectsOutside() as effects:
        ...     loss = w * w
        ...     loss.backward()
        ...     number = loss.item()
        >>> number, torch.autograd.grad(effects.surrogate, w)
        (9.0, (tensor(6.),))
    """

    def __init__(self) -> None:
        super().__init__()
        self.surrogate: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args and _holds_tensors(args[0]):
            return _joined(args[0]).to(dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        if func is torch.Tensor.backward:
            self._backward(*args, **kwargs)
            return None
        if func not in _LOOKED_AT:
            return func(*args, **kwargs)
        caller = _outside_torch(sys._getframe(1))
        is_ours = str(caller.f_globals.get("__name__")).startswith(("pyro.", "pyro_ext."))
        if func is torch.Tensor.item:
            return _item(cast("Tensor", args[0]), is_ours)
        if caller.f_globals.get("__name__") in _PYRO:
            if func is torch.Tensor.__bool__:
                return False
            if func is torch.Tensor.register_hook:
                # It would warn of NaN in gradients.
                return None
            if func is torch.Tensor.masked_select:
                # TraceEnum_ELBO leaves out what has probability 0, to sum the rest.
                value, mask = args
                return torch.where(mask, value, torch.zeros_like(value))
        if func in (torch.Tensor.masked_select, torch.Tensor.register_hook):
            return func(*args, **kwargs)
        try:
            if func in _SILENT:
                for tensor in args[:2]:
                    _read(tensor)
            if not is_ours and is_tracing():
                # A parameter, say, is no input of the graph yet, and torch would give its present value.
                raise RuntimeError("A value of the present step")
            return func(*args, **kwargs)
        except RuntimeError as error:
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            raise DataDependentError(f"{place} looks at the value of a tensor by {_name(func)}") from error

    def _backward(
        self,
        surrogate: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if inputs is not None:
            raise DataDependentError("backward(inputs=...) has no place in a graph")
        part = surrogate if gradient is None else (surrogate * gradient).sum()
        self.surrogate = part if self.surrogate is None else self.surrogate + part


def _read(tensor: Any) -> None:
    """Look at a tensor in a way that fails where it stands for others."""
    if isinstance(tensor, Tensor) and tensor.numel():
        tensor.detach().reshape(-1)[:1].sum().item()


def _outside_torch(frame: FrameType) -> FrameType:
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("torch."):
        frame = frame.f_back
    return frame


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value)


def _joined(value: Any) -> Tensor:
    """A tensor of nested lists of numbers and tensors, in which the tensors stay what they are."""
    if isinstance(value, list | tuple):
        parts = [_joined(v) for v in value]
        dtype = functools.reduce(torch.promote_types, [p.dtype for p in parts])
        return torch.stack([p.to(dtype) for p in parts])
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)


def _item(tensor: Tensor, is_ours: bool) -> Any:
    """The number where it is a constant that Pyro looks at, else the tensor."""
    if is_tracing() and not is_ours:
        return tensor.detach()
    try:
        return tensor.detach().item()
    except RuntimeError:
        return tensor.detach()


def _name(func: Callable[..., Any]) -> str:
    return {"__bool__": "a Python branch", "__index__": "int()", "__int__": "int()", "__float__": "float()"}.get(
        func.__name__, f"{func.__name__}()"
    )
