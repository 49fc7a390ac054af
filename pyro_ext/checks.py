"""Checks of data at the door: every refusal names the rule, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyro_ext.tracing import holds


def check_count(value: Any, name: str) -> None:
    """Refuse anything but a whole number of at least one.

    Raises:
        TypeError: not an integer.
        ValueError: below one.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"Expected {name} to be an int, but got {value!r} of type {type(value).__name__}. Pass a whole number."
        )
    if value < 1:
        raise ValueError(f"Expected {name} >= 1, but got {value}. Pass a positive whole number.")


def check_rows(
    v: Any, num_columns: int, *, name: str = "v", like: Tensor | None = None, axes: tuple[str, ...] = ("N",)
) -> None:
    """Refuse what is not a non-empty tensor of rows with the model's width, dtype and device.

    Values are not read: see `check_finite` and `check_binary`.

    Args:
        v: the data, shape ``axes + (num_columns,)``.
        num_columns: the width D of a row.
        name: what the messages call the data.
        like: a parameter whose dtype and device the data must have; None accepts any floating dtype.
        axes: names of the dimensions left of the columns, such as ``("N", "T")`` for sequences.

    Raises:
        TypeError: no tensor, or of another dtype than the parameters.
        ValueError: of another shape, without rows, or on another device.

    Example:
        >>> check_rows(torch.zeros(10, 3), 4)
        Traceback (most recent call last):
        ValueError: Expected v of shape (N, 4), but got (10, 3). Select 4 columns, or build the model with width 3.
    """
    if not isinstance(v, Tensor):
        raise TypeError(
            f"Expected {name} to be a torch.Tensor, but got {type(v).__name__}. Convert it, `torch.as_tensor({name})`."
        )
    _check_shape(v, num_columns, name, axes)
    if v.numel() == 0:
        raise ValueError(
            f"Expected at least one row in {name}, but got shape {tuple(v.shape)}. Pass data that are not empty."
        )
    if like is None:
        if not v.is_floating_point():
            raise TypeError(
                f"Expected {name} of a floating dtype, but got {v.dtype}. "
                f"Convert it, `{name}.to({torch.get_default_dtype()})`."
            )
        return
    if v.dtype != like.dtype:
        other = f", or the model, `model.to({v.dtype})`" if v.is_floating_point() else ""
        raise TypeError(
            f"Expected {name} of dtype {like.dtype}, that of the parameters, but got {v.dtype}. "
            f"Convert the data, `{name}.to({like.dtype})`{other}."
        )
    if v.device != like.device:
        raise ValueError(
            f"Expected {name} on device {like.device}, that of the parameters, but got {v.device}. "
            f"Move the data, `{name}.to({str(like.device)!r})`, or the model, `model.to({str(v.device)!r})`."
        )


def _check_shape(v: Tensor, num_columns: int, name: str, axes: tuple[str, ...]) -> None:
    if v.dim() == len(axes) + 1 and v.shape[-1] == num_columns:
        return
    if v.dim() <= len(axes):
        remedy = f"Add the missing dimensions; a single datum is `{name}.unsqueeze(0)`."
    elif v.dim() > len(axes) + 1:
        remedy = f"Flatten each datum, for instance `{name}.flatten({len(axes)})`."
    else:
        remedy = f"Select {num_columns} columns, or build the model with width {v.shape[-1]}."
    wanted = ", ".join((*axes, str(num_columns)))
    raise ValueError(f"Expected {name} of shape ({wanted}), but got {tuple(v.shape)}. {remedy}")


def check_finite(v: Tensor, *, name: str = "v") -> None:
    """Refuse NaN and infinite values, telling how many there are and where the first one is.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    finite = v.isfinite()
    if not holds(finite.all()):
        count, place = _count_and_first(~finite)
        raise ValueError(
            f"Expected finite values in {name}, but got {count} NaN or infinite, the first at {place}. "
            "Leave the rows they come from out, fill the values in, or hide them by a `mask` where the model takes one."
        )


def check_binary(v: Tensor, *, name: str = "v") -> None:
    """Refuse values other than 0 and 1 (NaN included), telling how many there are and the first one.

    Raises:
        ValueError: a value is neither 0 nor 1.
    """
    binary = (v == 0) | (v == 1)
    if not holds(binary.all()):
        count, place = _count_and_first(~binary)
        raise ValueError(
            f"Expected only 0 and 1 in {name}, but got {count} other values, the first {v[place].item():g} at {place}. "
            f"Binarize the data, for instance `({name} > 0.5).to({name}.dtype)` or `torch.bernoulli({name})`."
        )


def check_statistics(statistics: Mapping[str, Tensor], *names: str) -> None:
    """Refuse expected statistics that lack a name, hold NaN or infinite values, or sum over no row.

    Args:
        statistics: tensors by name, with the number of rows under ``count``.
        names: the names that must be there besides ``count``.

    Raises:
        ValueError: as above.
    """
    for name in ("count", *names):
        if name not in statistics:
            raise ValueError(
                f"Expected statistics with {', '.join(('count', *names))}, but got {', '.join(statistics) or 'none'}. "
                "Pass what this model's statistics() returns."
            )
        check_finite(statistics[name], name=f"the statistic {name!r}")
    if not statistics["count"] > 0:
        raise ValueError(
            f"Expected statistics of at least one row, but got a count of {statistics['count'].item():g}. "
            "Sum statistics() over the data first."
        )


def _count_and_first(bad: Tensor) -> tuple[int, tuple[int, ...]]:
    places = bad.nonzero()
    return len(places), tuple(places[0].tolist())


def check_data_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Let a model refuse bad data, where it says how (``check_data``)."""
    check = getattr(model, "check_data", None)
    if check is not None:
        check(*args, **kwargs)


def check_varies(variance: Tensor, *, floor: str = "variance_floor") -> None:
    """Refuse data with a constant column, which leave no noise to start from.

    Args:
        variance: one of each column, shape (D,), or one of all.
        floor: the model's argument that would have kept it up.

    Raises:
        ValueError: a variance that is not positive.
    """
    if not (variance > 0).all():
        where = f", column {int((variance <= 0).nonzero()[0])}" if variance.dim() else ""
        raise ValueError(
            f"Expected every column to vary, but got a constant one{where}. Leave it out, or pass {floor} > 0."
        )


def check_noise(variance: Tensor) -> None:
    """Refuse an M-step whose noise vanishes.

    Raises:
        RuntimeError: a variance that is not positive.
    """
    if not (variance > 0).all():
        raise RuntimeError(
            f"Expected a positive noise variance, but got {variance.min().item():g}: the components explain a "
            "visible variable without error, and the likelihood has no maximum. Pass variance_floor > 0. "
            "Nothing was changed."
        )
