"""A plot of what `Health` noted; it takes and returns Matplotlib axes and reads in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pyro_ext.history import HealthEntry


def plot_health(entries: Sequence[HealthEntry], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw effective sample size, log q on data and on dreams, entropy of q, and the share of dead units, by step.

    Args:
        entries: ``history.health``.
        axes: four axes; None for a new figure.

    Raises:
        ValueError: there are no entries, or another number of axes than four.

    Example:
        >>> entry = HealthEntry(10, 100, 30.0, 0.1, -2.0, -1.5, 1.0, {"h": 4}, {"h": 1})
        >>> axes = plot_health([entry])
        >>> [ax.get_ylabel() for ax in axes]
        ['effective samples (of 100)', 'log q, nats per row', 'entropy of q, nats per row', 'dead units']
        >>> plt.close(axes[0].figure)
    """
    if not entries:
        raise ValueError("Expected at least one entry, but got none. Pass callbacks=[Health(v)] to the fit.")
    if axes is None:
        axes = list(plt.subplots(2, 2, figsize=(8, 5), sharex=True, layout="constrained")[1].flat)
    if len(axes) != 4:
        raise ValueError(f"Expected four axes, but got {len(axes)}. Make them by plt.subplots(2, 2)[1].flat.")
    steps = [entry.step for entry in entries]
    black: dict[str, Any] = {"color": "black", "marker": "o", "markersize": 3, "linewidth": 1.2}
    grey: dict[str, Any] = {"color": "0.5", "marker": "s", "markersize": 3, "linewidth": 1.2, "linestyle": "--"}
    size, log_q, entropy, dead = axes
    size.plot(steps, [e.effective_sample_size for e in entries], label="median row", **black)
    size.set_yscale("log")
    size.set_ylabel(f"effective samples (of {entries[-1].num_samples})")
    log_q.plot(steps, [e.log_q_on_data for e in entries], label="on data", **black)
    dreams = [(e.step, e.log_q_on_dreams) for e in entries if e.log_q_on_dreams is not None]
    if dreams:
        log_q.plot(*zip(*dreams, strict=True), label="on dreams", **grey)
    log_q.set_ylabel("log q, nats per row")
    log_q.legend()
    entropy.plot(steps, [e.entropy for e in entries], **black)
    entropy.set_ylabel("entropy of q, nats per row")
    for i, name in enumerate(entries[-1].units):
        style: dict[str, Any] = {
            **black,
            "linestyle": ("-", "--", ":", "-.")[i % 4],
            "color": ("black", "0.5")[i // 4 % 2],
        }
        dead.plot(steps, [e.dead_units[name] / e.units[name] for e in entries], label=name, **style)
    dead.set_ylim(-0.05, 1.05)
    dead.set_ylabel("dead units")
    dead.legend()
    for ax in (entropy, dead):
        ax.set_xlabel("step")
    return axes
