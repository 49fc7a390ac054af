"""Plots that take and return Matplotlib axes and read in grey: lines differ in style and marker, not colour alone.

Without ``ax`` a figure is made by ``matplotlib.pyplot.subplots``, so that a notebook shows it; nothing is
ever shown, saved or set globally here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

if TYPE_CHECKING:
    from pyro_ext.history import History, LedgerEntry


def plot_history(history: History, ax: Axes | None = None) -> Axes:
    """Draw the loss of every step and the held-out loss after every epoch.

    Args:
        history: the record of a run.
        ax: axes to draw on; None for a new figure.

    Raises:
        ValueError: the history holds no steps.
    """
    if not history.loss:
        raise ValueError("Expected a history with at least one step, but got an empty one. Run the fit first.")
    ax = _axes(ax)
    ax.plot(range(1, history.steps + 1), history.loss, color="0.55", linewidth=0.9, label="training, each step")
    if history.held_out:
        ends = history.epoch_ends[: len(history.held_out)]
        ax.plot(ends, history.held_out, color="black", linestyle="--", marker="o", markersize=4, label="held out")
        if history.best_epoch is not None:
            best = ends[history.best_epoch - 1]
            ax.axvline(best, color="black", linestyle=":", linewidth=1, label=f"best epoch ({history.best_epoch})")
        ax.legend()
    ax.set_xlabel("step")
    ax.set_ylabel(history.loss_label)
    return ax


def plot_ledger(ledger: Sequence[LedgerEntry], ax: Axes | None = None, *, label: str = "L, nats per row") -> Axes:
    """Draw L per row after each half-step: circles for E, squares for M, hollow where L is an estimate.

    Args:
        ledger: the half-steps of an EM run, in their order.
        ax: axes to draw on; None for a new figure.
        label: what the bounds are, with their unit.

    Raises:
        ValueError: the ledger is empty.
    """
    if not ledger:
        raise ValueError("Expected a ledger with at least one half-step, but got an empty one. Run EM first.")
    ax = _axes(ax)
    bounds = [entry.bound_per_row for entry in ledger]
    ax.plot(range(1, len(ledger) + 1), bounds, color="0.6", linewidth=0.9)
    for half, marker in (("E", "o"), ("M", "s")):
        for exact, face in ((True, "0.2"), (False, "none")):
            at = [i for i, entry in enumerate(ledger) if entry.half == half and entry.exact == exact]
            if at:
                ax.plot(
                    [i + 1 for i in at],
                    [bounds[i] for i in at],
                    color="0.2",
                    linestyle="none",
                    marker=marker,
                    markersize=4,
                    markerfacecolor=face,
                    label=f"after {half}-step" + ("" if exact else ", estimate"),
                )
    ax.set_xlabel("half-step")
    ax.set_ylabel(label)
    ax.legend()
    return ax


def image_grid(
    images: Tensor,
    shape: tuple[int, int],
    ax: Axes | None = None,
    ncols: int | None = None,
    symmetric: bool = False,
) -> Axes:
    """Draw vectors as small images in one grid, row by row, on one common grey scale.

    Args:
        images: real values, shape (N, D) with D = height * width: dictionary elements or dreams.
        shape: height and width of one image.
        ax: axes to draw on; None for a new figure.
        ncols: images in a row; None for a grid about as wide as it is high.
        symmetric: centre the scale on 0 (mid-grey), for weights that take both signs; otherwise it runs
            from the least value to the greatest.

    Raises:
        TypeError: the images are no tensor.
        ValueError: they are not of shape (N, D) with N >= 1 and D = height * width, not real, or not
            finite; or ncols is below 1.

    Example:
        >>> ax = image_grid(torch.eye(4), (2, 2))
        >>> ax.get_images()[0].get_array().shape
        (7, 7)
        >>> plt.close(ax.figure)
    """
    values, columns = _checked_images(images, shape, ncols)
    height, width = shape
    rows = math.ceil(len(values) / columns)
    # One masked pixel separates the images and frames the grid; cells without an image stay masked.
    mosaic = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for i, image in enumerate(values.reshape(-1, height, width)):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        mosaic[top : top + height, left : left + width] = image
    low, high = float(values.min()), float(values.max())
    if symmetric:
        high = max(abs(low), abs(high))
        low = -high
    ax = _axes(ax)
    colours = plt.get_cmap("gray").with_extremes(bad="white")
    ax.imshow(np.ma.masked_invalid(mosaic), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _checked_images(images: Any, shape: tuple[int, int], ncols: int | None) -> tuple[np.ndarray, int]:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"Expected images as a tensor of shape (N, D), but got {type(images).__name__}. Use torch.stack."
        )
    height, width = shape
    if images.dim() != 2 or images.shape[0] == 0 or images.shape[1] != height * width:
        raise ValueError(
            f"Expected images of shape (N, {height * width}), N >= 1, for shape {height} x {width}, "
            f"but got {tuple(images.shape)}. Reshape them with `.reshape(-1, {height * width})`."
        )
    if images.is_complex() or not bool(images.isfinite().all()):
        raise ValueError(
            f"Expected real and finite images, but got {images.dtype} with "
            f"{int((~images.isfinite()).sum())} values that are NaN or infinite. Choose what to show for those."
        )
    if ncols is not None and ncols < 1:
        raise ValueError(f"Expected ncols >= 1, but got {ncols}. Pass None to choose it from N.")
    columns = math.ceil(math.sqrt(len(images))) if ncols is None else ncols
    return images.detach().to("cpu", torch.float64).numpy(), columns


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax
