"""Context: arguments of a model that encoders read beside the data, such as covariates, labels, masks and lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ext.call_arguments import argument_names, root_of
from pyro_ext.rows import Rows


class Context:
    """Arguments of a call as features of its rows.

    The leading dimensions of each argument are the rows: one for each of their plates, in the order of the plates'
    dimensions, as long as the plate in this call or as the whole plate. In the second case the plate's indices pick
    the rows. A program without a common plate has one row, which reads the whole argument.

    Args:
        model: the model whose arguments are meant.
        arguments: their names or positions.

    Raises:
        TypeError: no sequence of names and positions.

    Example:
        >>> def model(v, x): ...
        >>> rows = Rows(("data",), (-1,), torch.Size([2]), 1.0, 1)
        >>> context = Context(model, ["x"])
        >>> context.read((None, torch.tensor([3, 4, 5])), {}, rows, {"data": 3}, {"data": torch.tensor([2, 0])})
        tensor([[5.],
                [3.]])
    """

    def __init__(self, model: Callable[..., Any], arguments: Sequence[str | int]) -> None:
        if (
            isinstance(arguments, str)
            or not isinstance(arguments, Sequence)
            or not all(isinstance(a, str | int) and not isinstance(a, bool) for a in arguments)
        ):
            raise TypeError(
                f"Expected `context` to list names or positions of arguments, but got {arguments!r}. "
                'Write `context=["x"]`.'
            )
        self.arguments = tuple(arguments)
        self._model = model
        self._paths: dict[Any, tuple[tuple[str, Any], ...]] = {}

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Rows,
        sizes: Mapping[str, int],
        indices: Mapping[str, Tensor],
    ) -> Tensor:
        """The arguments side by side, ``(R, C)``; booleans and integers become numbers of the default dtype.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            rows: the rows of the call.
            sizes: full size of each of their plates.
            indices: of the plates that are subsampled, shape (B,).

        Raises:
            TypeError: an argument is no tensor.
            ValueError: the call has no such argument, or it has no row for each row of the data.
        """
        pieces = []
        for label, (kind, place) in zip(self.arguments, self._find(args, kwargs), strict=True):
            value = args[place] if kind == "args" else kwargs[place]
            pieces.append(_rows_of(label, value, rows, sizes, indices))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        key = (len(args), *kwargs)
        if key not in self._paths:
            names = argument_names(self._model, args, kwargs)
            self._paths[key] = tuple(self._root(argument, args, kwargs, names) for argument in self.arguments)
        return self._paths[key]

    @staticmethod
    def _root(argument: str | int, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[Any]) -> tuple[str, Any]:
        try:
            kind, place = root_of(argument, args, kwargs, names)
        except ValueError as error:
            raise ValueError(
                f"Expected `context` to name arguments of the call, some of {[*names[: len(args)], *kwargs]} or "
                f"positions below {len(args)}, but got {argument!r}. Correct it, or pass the argument in every call."
            ) from error
        return kind, place


def check_context(context: Tensor, arguments: Sequence[str | int]) -> None:
    """Refuse context that is not finite.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    finite = context.isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0][0])
        raise ValueError(
            f"Expected finite values in the context {list(arguments)}, but got {int((~finite).sum())} NaN or infinite, "
            f"the first in row {row}. Fill them in, and pass a mask of them as context too."
        )


def _rows_of(
    label: str | int, value: Any, rows: Rows, sizes: Mapping[str, int], indices: Mapping[str, Tensor]
) -> Tensor:
    """One argument as features of the rows, ``(R, X)``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected a tensor in the argument {label!r}, named as context, but got {type(value).__name__}. "
            "Pass a tensor with a row for each row of the data."
        )
    for dim, (name, size) in enumerate(zip(rows.names, rows.shape, strict=True)):
        full = sizes[name]
        here = value.shape[dim] if dim < value.dim() else 0
        if here == full and name in indices:
            value = value.index_select(dim, indices[name])
        elif here != size:
            either = f"{size}" if full == size else f"{size} or {full}"
            raise ValueError(
                f"Expected {either} rows along dimension {dim} of the argument {label!r}, named as context, as the "
                f"plate {name!r} has, but got shape {tuple(value.shape)}. Give it a row for each row of the data."
            )
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return value.reshape(rows.count, -1).to(dtype)
