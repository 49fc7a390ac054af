"""Dreams of a Helmholtz machine that wake-sleep has trained on binarised digits, drawn beside the data.

scikit-learn's 8 x 8 digits as in `benchmarks.wake_sleep_digits`: 1,400 rows for training, 397 for testing.
`HelmholtzMachine` with 16 Gaussian latents and 64 hidden units, the default encoder; `fit` over batches of 100 with
``EM(model, guide, e_step=Dream(optim), m_step=Gradient(optim))``, one step of sleep and one of wake a batch, Adam with
learning rate 3e-3 each. Test NLL: -log(1/S sum_s w_s), S = 500, an upper bound in expectation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compare import machine
from benchmarks.wake_sleep_digits import split
from pyro_ext import EM, Gradient, fit, log_evidence
from pyro_ext.dream import Dream
from pyro_ext.guides import Amortized
from pyro_ext.models import HelmholtzMachine
from pyro_ext.plots import image_grid

NUM_LATENTS, RATE, BATCH = 16, 3e-3, 100


@dataclass(frozen=True)
class Dreams:
    """What a run came to.

    Attributes:
        before: dreams before training, (100, 64), 0 or 1.
        after: dreams after it.
        nll: test NLL before and after, nats a row.
        error: Monte-Carlo standard error of the last.
        sleep_loss: -log q of the dreams of the first and of the last step, nats a dream.
        seconds: of the training.
    """

    before: Tensor
    after: Tensor
    nll: tuple[float, float]
    error: float
    sleep_loss: tuple[float, float]
    seconds: float


def train(num_epochs: int, *, seed: int = 0, num_samples: int = 500) -> Dreams:
    """Train by wake-sleep, and dream."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    rows, held_out = split()
    model = HelmholtzMachine(64, NUM_LATENTS)
    model.initialize(rows)
    guide = Amortized(model)
    asleep, awake = Dream(Adam({"lr": RATE})), Gradient(Adam({"lr": RATE}), loss=Trace_ELBO())
    em = EM(model, guide, e_step=asleep, m_step=awake)
    guide.setup(rows)
    before, start = model.dream(100), log_evidence(model, guide, held_out, num_samples=num_samples)
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True)
    losses: list[float] = []
    started = time.perf_counter()
    fit(em, loader, num_epochs, callbacks=[lambda _: losses.append(asleep.last_loss)], progress=False)
    seconds = time.perf_counter() - started
    end = log_evidence(model, guide, held_out, num_samples=num_samples)
    return Dreams(
        before,
        model.dream(100),
        (-start.mean, -end.mean),
        end.mean_standard_error,
        (losses[0], losses[-1]),
        seconds,
    )


def independent_nll() -> float:
    """Test NLL of independent pixels, nats a row."""
    rows, held_out = split()
    rate = (rows.sum(0) + 0.5) / (len(rows) + 1)
    return -float((held_out * rate.log() + (1 - held_out) * (1 - rate).log()).sum(-1).mean())


def draw(dreams: Dreams, rows: Tensor) -> Figure:
    """Data, dreams before training and dreams after it, a hundred each."""
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "data": rows[:100],
        "dreams before training": dreams.before,
        "dreams after wake-sleep": dreams.after,
    }
    for (title, images), ax in zip(panels.items(), figure.subplots(1, 3), strict=True):
        # On pixels are ink.
        image_grid(1 - images, (8, 8), ax, ncols=10)
        ax.set_title(title)
    return figure


def main(options: Sequence[str]) -> None:
    """Train, and draw the dreams."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dreams", description=__doc__.splitlines()[0])
    parser.add_argument("--figure-folder", type=Path, help="where to save dreams.png")
    parser.add_argument("--epochs", type=int, default=150, help="passes over the data, of 14 batches each (150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    found = train(given.epochs, seed=given.seed)
    print(f"{machine()}; {given.epochs} epochs, {found.seconds:.0f} s")
    print(f"  -log q of dreams: {found.sleep_loss[0]:.2f} after the first epoch, {found.sleep_loss[1]:.2f} at the end")
    if given.figure_folder is not None:
        given.figure_folder.mkdir(parents=True, exist_ok=True)
        draw(found, split()[0]).savefig(given.figure_folder / "dreams.png", dpi=80)
        print(f"  {given.figure_folder / 'dreams.png'}")
    print(
        f"dreams test_nll={found.nll[1]:.2f} error={found.error:.3f} before={found.nll[0]:.2f} "
        f"independent={independent_nll():.2f}"
    )
