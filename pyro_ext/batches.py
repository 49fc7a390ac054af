"""What a loader yields, turned into the arguments of a program and its number of rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_ext.rows import Rows
from pyro_ext.snapshot import Part, unchanged


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The ``(args, kwargs)`` that a batch stands for.

    A tensor is one argument, a tuple or list holds the positional arguments (none, when empty), and a
    mapping holds keyword arguments.

    Raises:
        TypeError: anything else, or a mapping whose keys are no strings.

    Example:
        >>> arguments(torch.zeros(2)), arguments([1, 2]), arguments({"v": 3})
        (((tensor([0., 0.]),), {}), ((1, 2), {}), ((), {'v': 3}))
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        wrong = next((key for key in batch if not isinstance(key, str)), None)
        if wrong is not None:
            raise TypeError(
                f"Expected a batch's keys to be argument names, but got {wrong!r}. "
                "Use strings, the names of the model's arguments."
            )
        return (), dict(batch)
    raise TypeError(
        f"Expected each batch to be a tensor, a tuple or list of arguments, or a dict of keyword arguments, "
        f"but got {type(batch).__name__}. Yield `(x,)` to pass x as the only argument."
    )


def check_loader(loader: Any, passes: int, name: str) -> None:
    """Refuse, before anything runs, what cannot serve as a loader.

    Args:
        loader: a DataLoader, a list of batches, or any other iterable of batches.
        passes: how often it will be iterated.
        name: what to call it in the messages.

    Raises:
        TypeError: a single batch, a data set, or no iterable at all.
        ValueError: an iterator, which can be read only once, for more than one pass; an empty list.
    """
    rule = f"Expected {name} to be an iterable of batches, such as a DataLoader or a list"
    if isinstance(loader, Tensor | tuple | Mapping | str):
        kind = "Tensor" if isinstance(loader, Tensor) else type(loader).__name__
        raise TypeError(f"{rule}, but got one {kind}. Wrap a single batch in a list, `[batch]`, or use a DataLoader.")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"{rule}, but got the data set {type(loader).__name__}, which yields single rows. "
            "Wrap it: DataLoader(dataset, batch_size=...)."
        )
    if not isinstance(loader, Iterable):
        raise TypeError(f"{rule}, but got {type(loader).__name__}. Pass a list of batches or a DataLoader.")
    if passes > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"{rule} that can be read {passes} times, but got a {type(loader).__name__}, which can be read only once. "
            "Pass a list or a DataLoader, or num_epochs=1."
        )
    if isinstance(loader, list) and not loader:
        raise ValueError(f"{rule} with at least one batch, but got an empty list. Pass `[batch]` for a single batch.")


def batches(loader: Iterable[Any], name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Iterate once over a loader's batches as ``(args, kwargs)``.

    Raises:
        ValueError: nothing was yielded: an exhausted iterator, or fewer rows than ``drop_last`` needs.
        TypeError: a batch of an unknown kind.
    """
    empty = True
    for batch in loader:
        empty = False
        yield arguments(batch)
    if empty:
        raise ValueError(
            f"Expected {name} to yield at least one batch, but got none in this pass. "
            "Pass a loader that is not empty and can be read once per epoch (not a generator)."
        )


class RowCounter:
    """Counts the rows of a call, for losses per row.

    They are counted once per new shape (or plain value) of the arguments. A driver with a method
    ``num_rows(*args, **kwargs)`` answers for itself. Otherwise its model is run, replayed against its guide,
    blocked, and with parameters, buffers and random generators put back. Rows of a subsampled plate count at its
    full size N, for the scale N/B is in the loss. A program with no common plate, or a driver with no model, has
    one row.

    Args:
        driver: a driver such as `pyro.infer.SVI`.
        parts: the modules and optimizers that the run must leave unchanged.

    Attributes:
        in_total: whether the last call counted had no rows to divide by: its loss is in total.
    """

    def __init__(self, driver: Any, parts: tuple[Part, ...]) -> None:
        self._driver = driver
        self._parts = parts
        self._known: dict[Hashable, tuple[int, bool]] = {}
        self.in_total = False

    def is_cached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `count` will answer without running the model."""
        return self._answers_itself or not self._has_model or _signature((args, kwargs)) in self._known

    def count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Number of rows of the program with these arguments, at least 1."""
        if not self._answers_itself and not self._has_model:
            self.in_total = True
            return 1
        signature = _signature((args, kwargs))
        known = self._known.get(signature) if signature is not None else None
        if known is None:
            known = self._ask(args, kwargs)
            if signature is not None:
                self._known[signature] = known
        count, self.in_total = known
        return count

    @property
    def _answers_itself(self) -> bool:
        return hasattr(self._driver, "num_rows")

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, bool]:
        """Number of rows, and whether there are none to divide by."""
        if self._answers_itself:
            return int(self._driver.num_rows(*args, **kwargs)), False
        rows = self._trace(args, kwargs)
        return max(1, round(rows.count * rows.scale)), not rows.dims

    @property
    def _has_model(self) -> bool:
        return callable(getattr(self._driver, "model", None))

    def _trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        model: Callable[..., Any] = self._driver.model
        guide = getattr(self._driver, "guide", None)
        with unchanged(*self._parts), poutine.block(), torch.no_grad():
            if callable(guide):
                # The guide first, as in an ELBO: a model with improper priors cannot run alone.
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                model = poutine.replay(model, trace=guide_trace)
            return Rows.from_trace(poutine.trace(model).get_trace(*args, **kwargs))


def _signature(value: Any) -> Hashable | None:
    """The shapes and plain values in nested arguments; None when they cannot tell calls apart."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, tuple | list):
        return _joined(type(value).__name__, [_signature(item) for item in value])
    if isinstance(value, Mapping):
        return _joined("mapping", [_signature(item) for item in value.values()], tuple(value))
    return ("value", value) if value is None or isinstance(value, bool | int | float | str) else None


def _joined(kind: str, signatures: list[Hashable | None], keys: tuple[Any, ...] = ()) -> Hashable | None:
    return None if None in signatures else (kind, keys, tuple(signatures))
