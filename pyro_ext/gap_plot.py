"""A plot of L and log p(v) over awake and asleep phases; it takes and returns Matplotlib axes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pyro_ext.gap import GapEntry


def plot_gap(
    entries: Sequence[GapEntry],
    ax: Axes | None = None,
    *,
    x: Sequence[float] | None = None,
    xlabel: str = "half-step",
    halves: tuple[str, str] = ("E-step", "M-step"),
) -> Axes:
    """Draw log p(v) (dashed) above L (solid), the gap in grey, and a band behind each stretch of E-steps.

    Args:
        entries: what `Gap` noted, in its order.
        ax: axes to draw on; None for a new figure.
        x: position of each entry; None for 1, 2, ...
        xlabel: what x is.
        halves: what the legend calls E and M, such as ``("asleep", "awake")``.

    Raises:
        ValueError: there are no entries, or another number of positions.

    Example:
        >>> entries = [GapEntry(1, "M", -3.0, -2.0, True), GapEntry(2, "E", -2.5, -2.0, True)]
        >>> ax = plot_gap(entries, halves=("asleep", "awake"))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['asleep', 'gap', 'log p(v)', 'L']
        >>> plt.close(ax.figure)
    """
    if not entries:
        raise ValueError("Expected at least one entry, but got none. Run EM with the callback first.")
    at = list(range(1, len(entries) + 1)) if x is None else list(x)
    if len(at) != len(entries):
        raise ValueError(
            f"Expected {len(entries)} positions, one an entry, but got {len(at)}. Leave x out for 1, 2, ..."
        )
    ax = plt.subplots()[1] if ax is None else ax
    # A stretch begins where the one before it ended.
    label: str | None = halves[0]
    for i, entry in enumerate(entries):
        if entry.half == "E":
            ax.axvspan(at[i - 1] if i else at[0] - 1, at[i], color="0.93", linewidth=0, label=label)
            label = None
    bounds, evidence = [e.bound for e in entries], [e.log_evidence for e in entries]
    ax.fill_between(at, bounds, evidence, color="0.75", linewidth=0, label="gap")
    some = "" if all(e.exact for e in entries) else ", estimate"
    ax.plot(at, evidence, color="black", linestyle="--", linewidth=1.2, label=f"log p(v){some}")
    ax.plot(at, bounds, color="black", linewidth=1.2, label=f"L{some}")
    ax.set_xlabel(xlabel)
    ax.set_ylabel("nats per row")
    ax.legend()
    return ax
