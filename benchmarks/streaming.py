"""Learning from data that stream: resident memory at N rows and at ten times N.

Rows are drawn from a mixture of Gaussians (for `GaussianMixture`) or a factor model (for `FactorAnalysis`) when they
are read, batch by batch, through torch's DataLoader; the larger run reads at least 1 GB of them in every epoch. `fit`
learns by exact EM, an epoch a step (``ClosedForm()``), and by stepwise EM (``ClosedForm(step_size=...)``). Each run has
a process of its own, so that none finds the memory of another, with one thread, two at a time. It reports how far its
resident memory rose at most above the level before the fit. Left alone, glibc keeps freed blocks for later (20 MB more
or less from run to run, whatever N is); here it is told to map large blocks apart. The last line is the run with the
largest ratio; at most 1.1 is wanted.

That something was learned shows in log p of held-out rows: ``gap`` is how far it is below that at the true parameters.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_ext import EM, ClosedForm, FixedPoint, fit
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import FactorAnalysis, GaussianMixture, assign_parameters

NUM_VISIBLE, NUM_LATENTS, BATCH = 64, 8, 16384
SMALL = 420_000
"""Rows of the smaller run; ten times as many are 1.08 GB in float32."""


class Stream(IterableDataset[Tensor]):
    """Batches of rows from a generating model, drawn when they are read; the same rows in every epoch.

    Args:
        draw: a batch of so many rows.
        num_rows: rows of an epoch.
    """

    def __init__(self, draw: Callable[[int], Tensor], num_rows: int) -> None:
        self.draw = draw
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for start in range(0, self.num_rows, BATCH):
                yield self.draw(min(BATCH, self.num_rows - start))


def mixture() -> tuple[GaussianMixture, GaussianMixture, type]:
    """The truth, the learner and its guide."""
    truth, learner = (GaussianMixture(NUM_LATENTS, NUM_VISIBLE) for _ in range(2))
    assign_parameters(truth, {"weights": torch.arange(1.0, NUM_LATENTS + 1) / (NUM_LATENTS * (NUM_LATENTS + 1) / 2)})
    return truth, learner, MeanField


def draw_mixture(truth: GaussianMixture, n: int) -> Tensor:
    """Rows of the mixture: its means, of unit variance themselves, and unit noise."""
    picks = torch.multinomial(truth.weights.detach(), n, replacement=True)
    return truth.locs.detach()[picks] + torch.randn(n, NUM_VISIBLE)


def factors() -> tuple[FactorAnalysis, FactorAnalysis, type]:
    """The truth, the learner and its guide."""
    truth, learner = (FactorAnalysis(NUM_VISIBLE, NUM_LATENTS) for _ in range(2))
    return truth, learner, Structured


def draw_factors(truth: FactorAnalysis, n: int) -> Tensor:
    """Rows of the factor model."""
    return torch.randn(n, NUM_LATENTS) @ truth.W.detach().T + torch.randn(n, NUM_VISIBLE)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Tensor]]] = {
    "GaussianMixture": (mixture, draw_mixture),
    "FactorAnalysis": (factors, draw_factors),
}


@dataclass(frozen=True)
class Outcome:
    """What one process measured.

    Attributes:
        megabytes: highest resident memory during the fit above the level before it.
        gigabytes: size of the data of one epoch.
        seconds: of the fit.
        gap: log p of held-out rows at the true parameters minus that at the learned ones, nats a row.
    """

    megabytes: float
    gigabytes: float
    seconds: float
    gap: float


def resident() -> float:
    """Resident memory now, in bytes; the highest so far where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def highest() -> float:
    """The highest resident memory since `forget_highest`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resident()


def forget_highest() -> None:
    """Start the record of `highest` anew, where the system can (Linux)."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def measure(family: str, stepwise: bool, num_rows: int, num_epochs: int) -> Outcome:
    """One fit in this process."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    make, draw = FAMILIES[family]
    truth, learner, guide = make()
    held_out = draw(truth, BATCH)
    best = EM(truth, guide(truth), e_step=FixedPoint(), m_step=None).evaluate_loss(held_out) / BATCH
    stream = Stream(lambda n: draw(truth, n), num_rows)
    learner.initialize(next(iter(stream)))
    m_step = ClosedForm((lambda t: (t + 2) ** -0.7) if stepwise else None)
    em = EM(learner, guide(learner), e_step=FixedPoint(), m_step=m_step)
    loader = DataLoader(stream, batch_size=None)
    before = resident()
    forget_highest()
    begin = time.perf_counter()
    fit(em, loader, num_epochs, progress=False)
    seconds = time.perf_counter() - begin
    rise = highest() - before
    gap = em.evaluate_loss(held_out) / BATCH - best
    return Outcome(rise / 1e6, num_rows * NUM_VISIBLE * 4 / 1e9, seconds, gap)


def main(options: list[str]) -> None:
    """Measure all runs at N and at 10 N, and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks streaming", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=SMALL, help=f"rows N of the smaller run ({SMALL:,})")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (2)")
    given = parser.parse_args(options)

    # Read by the C library when a process starts: set for the children alone.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    print(f"{NUM_VISIBLE} visible variables, float32, batches of {BATCH:,} rows, {given.epochs} epochs; N and 10 N")
    print("model            M-step        data GB       rise MB         s   gap (nats a row)    10N/N")
    worst: tuple[float, Outcome, Outcome] | None = None
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [
            (family, stepwise, [pool.submit(measure, family, stepwise, n, given.epochs) for n in sizes])
            for family in FAMILIES
            for stepwise in (False, True)
            for sizes in [(given.rows, 10 * given.rows)]
        ]
        for family, stepwise, pair in runs:
            small, large = (future.result() for future in pair)
            ratio = large.megabytes / small.megabytes
            print(
                f"{family:16} {'stepwise' if stepwise else 'epoch':8} {small.gigabytes:7.2f} {large.gigabytes:5.2f}"
                f" {small.megabytes:6.1f} {large.megabytes:6.1f} {small.seconds:5.1f} {large.seconds:5.1f}"
                f"     {small.gap:7.4f} {large.gap:7.4f}   {ratio:6.3f}",
                flush=True,
            )
            if worst is None or ratio > worst[0]:
                worst = ratio, small, large
    if worst is not None:
        ratio, small, large = worst
        print(f"streaming ours={small.megabytes:.1f}MB peer={large.megabytes:.1f}MB ratio={ratio:.3f}")
