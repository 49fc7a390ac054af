"""Results that belong to the numbers in a tensor, kept as long as its memory lives."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


class Memo(Generic[T]):
    """Remembers one result for the memory of each tensor, until its numbers change or it is freed.

    E-step, M-step and ledger ask for the same sums of the same q; views of one tensor share them. Nothing is given out
    where a gradient is wanted. Writes through ``.data`` pass unseen: nothing that optimizers own may be remembered. A
    remembered value must not share memory with its tensor, or neither would be freed.

    Example:
        >>> memo: Memo[str] = Memo()
        >>> params = torch.zeros(3, 2)
        >>> memo.set(params, "found", of=())
        >>> memo.get(params[:, None], of=())
        'found'
        >>> _ = params.add_(1)
        >>> memo.get(params, of=()) is None
        True
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, params: Tensor, of: tuple[object, ...]) -> T | None:
        """What was remembered of these numbers, by an owner that is described in the same words."""
        mark = self._mark(params, of)
        if mark is None:
            return None
        entry: Any = self._known.get(params.untyped_storage())
        return entry[1] if entry is not None and entry[0] == mark else None

    def set(self, params: Tensor, value: T, of: tuple[object, ...]) -> None:
        """Remember a result in place of the last one of this memory."""
        mark = self._mark(params, of)
        if mark is not None:
            self._known[params.untyped_storage()] = (mark, value)

    @staticmethod
    def _mark(params: Tensor, of: tuple[object, ...]) -> tuple[object, ...] | None:
        if params.is_inference() or not params.is_contiguous() or (torch.is_grad_enabled() and params.requires_grad):
            return None
        return (params._version, params.storage_offset(), params.numel(), params.dtype, *of)
