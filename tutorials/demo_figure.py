"""The demo's figure: features, dreams, reconstructions, and the bound against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyro_ext.plots import image_grid
from tutorials.demo_data import Data
from tutorials.demo_fits import Result

NUM_DREAMS = 36
NUM_RECONSTRUCTIONS = 12
NUM_FEATURES = 16
# From dark to light, so that the lines differ in grey too.
STYLES = [("#14213d", "-", "o"), ("#a4243b", "--", "s"), ("#3a86c8", "-.", "^"), ("#e09f3e", "-", "D")]


def draw(data: Data, results: Sequence[Result], path: Path) -> None:
    """Write the figure."""
    real = [r for r in results if r.data == "real"]
    bits = [r for r in results if r.data == "bits"]
    figure = Figure(figsize=(13, 6.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{data.name}: {len(data.train)} rows to learn from, {len(data.test)} held out", fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.6])

    panels = top.subplots(1, 6)
    num_dreams = 12 if data.is_strip else NUM_DREAMS
    grid(data.test[:num_dreams], data, panels[0], "data, held out")
    sparse, network, machine = real[0], bits[1], bits[2]
    features(sparse.model.W, data, panels[1], "features: sparse coding")
    features(network.model.W1, data, panels[2], "features: belief net")
    grid(dream(sparse, num_dreams), data, panels[3], "dreams: sparse coding")
    grid(dream(network, num_dreams), data, panels[4], "dreams: belief network")
    grid(dream(machine, num_dreams), data, panels[5], "dreams: Helmholtz machine")

    left, right = bottom.subfigures(1, 2, width_ratios=[1.15, 1])
    reconstructions(data, [*real, network, machine], left.subplots())
    upper, lower = right.subplots(2, 1)
    curves(real, upper, "binary sparse coding (densities): held-out L against time; bar: log p(v)", (0.3, 0.02))
    curves(bits, lower, "wake-sleep (bits): held-out L against time; bar: log p(v)", (0.3, 0.0))
    lower.set_xlabel("seconds of learning")
    figure.savefig(path, dpi=100)


def grid(images: Tensor, data: Data, ax: Axes, title: str) -> None:
    """Rows as images, dark where the value is high."""
    show(1 - images.clamp(0, 1), data, ax)
    ax.set_title(title, fontsize=10)


def features(weights: Tensor, data: Data, ax: Axes, title: str) -> None:
    """The largest columns of weights (D, H), each on its own scale about 0: dark adds ink, light takes it away."""
    size = weights.detach().abs().amax(0)
    order = size.argsort(descending=True)[:NUM_FEATURES]
    columns = -(weights.detach() / size.clamp_min(1e-12))[:, order].T
    if len(order) < len(size):
        title += f", {len(order)} of {len(size)}"
    show(columns, data, ax, symmetric=True)
    ax.set_title(title, fontsize=10)


def show(images: Tensor, data: Data, ax: Axes, ncols: int | None = None, symmetric: bool = False) -> None:
    """Images in a grid; rows that are no images as strips that fill the panel."""
    image_grid(images, data.shape, ax=ax, ncols=1 if data.is_strip else ncols, symmetric=symmetric)
    if data.is_strip:
        ax.set_aspect("auto")


@torch.no_grad()
def dream(result: Result, count: int) -> Tensor:
    """Means of v given dreamt latents, shape (count, D)."""
    torch.manual_seed(1)
    return poutine.trace(result.model).get_trace(size=count).nodes["v"]["fn"].mean


@torch.no_grad()
def reconstruct(result: Result, v: Tensor, num_samples: int = 30) -> Tensor:
    """The mean of p(v' | h) over h ~ q(h | v), shape (N, D)."""
    draws = result.guide.posterior(v).sample(num_samples)
    means = []
    for sample in range(num_samples):
        fixed = poutine.condition(result.model, {name: value[sample] for name, value in draws.items()})
        means.append(poutine.trace(fixed).get_trace(v).nodes["v"]["fn"].mean)
    return torch.stack(means).mean(0)


def reconstructions(data: Data, results: Sequence[Result], ax: Axes) -> None:
    """Held-out rows above what each fit makes of them."""
    count = min(4 if data.is_strip else NUM_RECONSTRUCTIONS, len(data.test))
    real, bits = data.test[:count], data.test_bits[:count]
    blocks = [("held out", real)]
    blocks += [(r.guide_name, reconstruct(r, real)) for r in results if r.data == "real"]
    blocks += [("as bits", bits)]
    blocks += [(r.title, reconstruct(r, bits)) for r in results if r.data == "bits"]
    images = torch.cat([block for _, block in blocks])
    show(1 - images.clamp(0, 1), data, ax, ncols=count)
    step = (data.shape[0] + 1) * (count if data.is_strip else 1)
    for i, (label, _) in enumerate(blocks):
        ax.annotate(label, (0, step * (i + 0.5)), (-8, 0), textcoords="offset points", ha="right", va="center")
    ax.set_title("reconstructions of held-out rows", fontsize=10)


def curves(results: Sequence[Result], ax: Axes, title: str, legend: tuple[float, float]) -> None:
    """L on held-out rows against time; a whisker goes up to log p(v)."""
    for (colour, line, marker), result in zip(STYLES, results, strict=False):
        watch, log_p = result.watch, result.evidence.mean
        label = result.guide_name if result.data == "real" else f"{result.title}, {result.algorithm}"
        every = max(1, len(watch.times) // 10)
        ax.plot(
            watch.times, watch.bounds, color=colour, linestyle=line, marker=marker, markevery=every, ms=4, label=label
        )
        ax.plot([watch.times[-1]] * 2, [watch.bounds[-1], log_p], color=colour, linewidth=0.8)
        ax.plot(watch.times[-1:], [log_p], color=colour, marker="_", markersize=10, markeredgewidth=2)
    ends = [result.watch.bounds[-1] for result in results]
    highest = max(result.evidence.mean for result in results)
    spread = highest - min(ends)
    ax.set_ylim(min(ends) - 2.2 * spread, highest + 0.4 * spread)
    ax.set_title(title, fontsize=10)
    ax.set_ylabel("nats per held-out row", fontsize=9)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=9, loc=legend, frameon=False)
