"""Where the elements of a tensor come from: recipes that read and write one tensor through another.

A program rarely observes an argument as it is: it reshapes it, takes a time slice, or picks the rows of
a subsample. While the program runs, `Provenance` notes each operation that only moves elements; what it
finds is a recipe, a tuple of steps that `get` follows forward and `put` follows backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Path = tuple[Any, ...]

_aten = torch.ops.aten


@dataclass(frozen=True)
class View:
    """A strided view, relative to the first element of the tensor that it is a view of.

    Attributes:
        size: shape of the view.
        stride: its strides, in elements.
        offset: its first element, counted from the first of the source.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, source: Tensor) -> Tensor:
        """The view of a tensor of the layout that the recipe was made for."""
        return source.as_strided(self.size, self.stride, source.storage_offset() + self.offset)


@dataclass(frozen=True)
class PlateIndex:
    """Stands for the indices that a plate draws, in the arguments of a `Copy`."""

    plate: str
    view: View

    def of(self, indices: Mapping[str, Tensor]) -> Tensor:
        """The indices, shaped as the program shapes them."""
        return self.view.of(indices[self.plate].contiguous())


@dataclass(frozen=True, eq=False)
class Copy:
    """An operation that copies elements of its first argument into a new tensor, and can be undone.

    Attributes:
        op: the ATen operation.
        args: its arguments after the first.
        kwargs: its keyword arguments.
    """

    op: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @property
    def plates(self) -> frozenset[str]:
        """Names of the plates whose indices it needs."""
        return frozenset(a.plate for a in _flat(self.args) if isinstance(a, PlateIndex))

    def without_dtype(self) -> Copy:
        """The same movement of elements, in the dtype of its source."""
        if self.op is not _aten._to_copy.default:
            return self
        return Copy(self.op, self.args, {k: v for k, v in (self.kwargs or {}).items() if k != "dtype"})

    @property
    def is_static(self) -> bool:
        """Whether it depends on nothing but shapes and plates: other index tensors may change."""
        return not any(isinstance(a, Tensor) for a in _flat(self.args))

    def get(self, source: Tensor, indices: Mapping[str, Tensor]) -> Tensor:
        """Do it."""
        return self.op(source, *_resolved(self.args, indices), **(self.kwargs or {}))

    def put(self, target: Tensor, value: Tensor, indices: Mapping[str, Tensor]) -> None:
        """Write the elements of its result back, in place.

        The rows that a plate left out repeat those it took: they were data, and none may remain.

        Raises:
            ValueError: the rows that the plates left out are more than those of one dimension.
        """
        _PUT[self.op](target, value, *_resolved(self.args, indices))
        if not self.plates:
            return
        found = [(d, a) for d, a in enumerate(self._index_list()) if a is not None]
        if len(found) != 1 or not isinstance(found[0][1], PlateIndex) or len(found[0][1].view.size) != 1:
            raise ValueError(
                "Expected a program that indexes its data by one plate, but got several indices at once. "
                "Give the guide an `observations=None` keyword, which takes the dreams."
            )
        dim, plate_index = found[0]
        taken = plate_index.of(indices)
        if len(taken) == target.shape[dim]:
            return
        source = taken[torch.arange(target.shape[dim], device=taken.device) % len(taken)]
        source[taken] = taken
        target.copy_(target.index_select(dim, source))

    def _index_list(self) -> list[Any]:
        if self.op is _aten.index.Tensor:
            return list(self.args[0])
        if self.op is _aten.index_select.default:
            return [None] * self.args[0] + [self.args[1]]
        return list(self.args)


Step = View | Copy

_PUT: dict[Any, Callable[..., Any]] = {
    _aten.clone.default: lambda target, value: target.copy_(value),
    _aten._to_copy.default: lambda target, value: target.copy_(value),
    _aten.index.Tensor: lambda target, value, indices: _aten.index_put_(target, indices, value),
    _aten.index_select.default: lambda target, value, dim, index: target.index_copy_(dim, index, value),
    _aten.gather.default: lambda target, value, dim, index: target.scatter_(dim, index, value),
    _aten.flip.default: lambda target, value, dims: target.copy_(value.flip(dims)),
}


def get(steps: tuple[Step, ...], source: Tensor, indices: Mapping[str, Tensor]) -> Tensor:
    """Read a tensor through a recipe.

    Args:
        steps: the recipe.
        source: a tensor of the layout that the recipe was made for.
        indices: the indices of the plates that the recipe names.

    Example:
        >>> time_slice = (View(size=(2,), stride=(3,), offset=1),)
        >>> get(time_slice, torch.arange(6).reshape(2, 3), {})
        tensor([1, 4])
    """
    for step in steps:
        source = step.of(source) if isinstance(step, View) else step.get(source, indices)
    return source


def put(steps: tuple[Step, ...], target: Tensor, value: Tensor, indices: Mapping[str, Tensor]) -> None:
    """Write a tensor in place so that reading it through the recipe gives a value.

    Args:
        steps: the recipe.
        target: a tensor of the layout that the recipe was made for.
        value: a tensor of the shape that the recipe reads.
        indices: the indices of the plates that the recipe names.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> put((View(size=(2,), stride=(3,), offset=1),), x, torch.ones(2), {})
        >>> x
        tensor([[0., 1., 0.],
                [0., 1., 0.]])
    """
    if not steps:
        target.copy_(value)
        return
    first, rest = steps[0], steps[1:]
    if isinstance(first, View):
        put(rest, first.of(target), value, indices)
    else:
        copied = first.get(target, indices)
        put(rest, copied, value, indices)
        first.put(target, copied, indices)


@dataclass(frozen=True)
class _Origin:
    base: Tensor
    path: Path
    steps: tuple[Step, ...]


class Provenance(TorchDispatchMode):
    """Notes, while a program runs, which tensors are made of elements of the tensors it was given.

    Views need no noting: they share their storage. Operations outside the small table of this file,
    arithmetic above all, end a recipe.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> with Provenance() as provenance:
        ...     provenance.add_source(("x",), x)
        ...     y = x.double()[:, 1]
        >>> [path for path, steps in provenance.trace(y)]
        [('x',)]
    """

    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[int, list[_Origin]] = {}
        self._plates: dict[int, tuple[str, Tensor]] = {}

    def add_source(self, path: Path, tensor: Tensor) -> None:
        """Follow the elements of a tensor, known under a path."""
        self._add(_Origin(tensor, path, ()))

    def add_plate(self, name: str, indices: Tensor) -> None:
        """Recognise the indices of a plate."""
        key = _storage_key(indices)
        if key is not None:
            self._plates[key] = (name, indices)

    def trace(self, tensor: Tensor) -> list[tuple[Path, tuple[Step, ...]]]:
        """The sources that a tensor was made from alone, each with the recipe."""
        found: list[tuple[Path, tuple[Step, ...]]] = []
        for origin in self._origins.get(_storage_key(tensor) or 0, []):
            if _is_inside(tensor, origin.base):
                found.append((origin.path, origin.steps + _view(tensor, origin.base)))
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PUT and isinstance(args[0], Tensor):
            step = Copy(func, self._symbolic(args[1:]), kwargs)
            for path, steps in self.trace(args[0]):
                self._add(_Origin(out, path, (*steps, step)))
        return out

    def _add(self, origin: _Origin) -> None:
        # The origin keeps its tensor alive: a freed storage's address would be given to another.
        key = _storage_key(origin.base)
        if key is not None:
            self._origins.setdefault(key, []).append(origin)

    def _symbolic(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._symbolic(v) for v in value)
        if isinstance(value, Tensor):
            plate, indices = self._plates.get(_storage_key(value) or 0, ("", value))
            if plate and value.dtype == indices.dtype and _is_inside(value, indices):
                return PlateIndex(plate, _geometry(value, indices))
        return value


def _storage_key(tensor: Tensor) -> int | None:
    # Sparse and other tensors without a storage are not followed.
    return tensor.untyped_storage().data_ptr() or None if tensor.layout is torch.strided else None


def _geometry(tensor: Tensor, base: Tensor) -> View:
    return View(tuple(tensor.shape), tensor.stride(), _offset(tensor, base))


def _view(tensor: Tensor, base: Tensor) -> tuple[View, ...]:
    view = _geometry(tensor, base)
    return () if view == View(tuple(base.shape), base.stride(), 0) else (view,)


def _offset(tensor: Tensor, base: Tensor) -> int:
    # By addresses: a storage that NumPy wrapped again may start elsewhere.
    return (tensor.data_ptr() - base.data_ptr()) // base.element_size()


def _span(tensor: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _is_inside(tensor: Tensor, base: Tensor) -> bool:
    """Whether every element of a tensor is one of another that shares its storage."""
    if tensor.dtype != base.dtype or 0 in (tensor.numel(), base.numel()):
        return False
    offset = _offset(tensor, base)
    if offset < 0 or offset + _span(tensor) > _span(base):
        return False
    if base.numel() == _span(base):
        return True
    held = torch.zeros(_span(base), dtype=torch.bool)
    sizes = [1 if stride == 0 else size for size, stride in zip(base.shape, base.stride(), strict=True)]
    held.as_strided(sizes, base.stride()).fill_(True)
    return bool(held.as_strided(tensor.shape, tensor.stride(), offset).all())


def _flat(value: Any) -> list[Any]:
    return [f for v in value for f in _flat(v)] if isinstance(value, list | tuple) else [value]


def _resolved(value: Any, indices: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_resolved(v, indices) for v in value)
    return value.of(indices) if isinstance(value, PlateIndex) else value
