"""Hours awake, hours asleep: L and log p(v) over long phases of wake and sleep on a model that can be enumerated.

"The longer they are awake, the greater the gap between L and log p(v), but L will remain a lower bound" (Deep Learning,
19.5.1). A sigmoid belief network 2-6-9 (256 latent states) learns 3 x 3 bars: one of the two directions, each bar of it
on with probability 0.3; 200 rows. Its guide is `Amortized`, q(h1 | v) q(h2 | h1). Waking hours are optimizer steps in
theta with q held (``m_step=Gradient(optim, num_steps)``), sleeping hours steps in phi on dreams
(``e_step=Dream(optim, num_steps, num_dreams)``), each with an Adam of its own. L and log p(v) are sums over all states.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro.optim import Adam
from torch import Tensor

from benchmarks.compare import machine
from pyro_ext import EM, Gradient
from pyro_ext.dream import Dream
from pyro_ext.gap import Gap, GapEntry
from pyro_ext.gap_plot import plot_gap
from pyro_ext.guides import Amortized
from pyro_ext.models import SigmoidBeliefNetwork

SIZES = [2, 6, 9]
RATE_AWAKE, RATE_ASLEEP = 0.02, 0.03
NUM_DREAMS = 200
SHORT = 20
"""Steps of the short phases that are run beside the long ones."""


def bars(num_rows: int, side: int = 3, seed: int = 0) -> Tensor:
    """Bars of one direction a row, each on with probability 0.3: 0 or 1, shape (num_rows, side^2), float64."""
    generator = torch.Generator().manual_seed(seed)
    on = (torch.rand(num_rows, side, generator=generator) < 0.3).double()
    across = torch.rand(num_rows, generator=generator) < 0.5
    rows = on[:, :, None].expand(-1, -1, side)
    return torch.where(across[:, None, None], rows, rows.mT).flatten(1)


@dataclass(frozen=True)
class Phases:
    """What alternating phases came to.

    Attributes:
        entries: L and log p(v) along the way, nats a row; one first, before any step.
        steps: number of optimizer steps, of either kind, at each entry.
        theta_kept: whether theta was bit-equal before and after every sleep.
    """

    entries: list[GapEntry]
    steps: list[int]
    theta_kept: bool

    @property
    def ends(self) -> list[GapEntry]:
        """The entries at the end of every phase."""
        last = {(e.step, e.half): e for e in self.entries[1:]}
        return list(last.values())

    @property
    def grew(self) -> list[float]:
        """By how much the gap grew in each wake, nats a row."""
        return self._changes("M")

    @property
    def closed(self) -> list[float]:
        """By how much the gap shrank in each sleep, nats a row."""
        return [-change for change in self._changes("E")]

    def _changes(self, half: str) -> list[float]:
        chain = [self.entries[0], *self.ends]
        return [after.gap - before.gap for before, after in pairwise(chain) if after.half == half]


def alternate(v: Tensor, num_phases: int, num_steps: int, num_looks: int, seed: int = 0) -> Phases:
    """Sleep and wake in turn, `num_phases` times each for `num_steps` steps, and look `num_looks` times a phase."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = SigmoidBeliefNetwork(SIZES).double()
    model.initialize(v)
    part = num_steps // num_looks
    em = EM(
        model,
        Amortized(model),
        e_step=Dream(Adam({"lr": RATE_ASLEEP}), part, NUM_DREAMS),
        m_step=Gradient(Adam({"lr": RATE_AWAKE}), part),
    )
    call, gap = em.call(v), Gap(v)
    gap.measure(em, step=0, half="M")
    steps, kept = [0], True
    for phase in range(1, num_phases + 1):
        theta = [p.detach().clone() for p in model.parameters()]
        for _ in range(num_looks):
            result = em.e_half(call)
            gap.measure(em, step=phase, half="E")
            steps.append(steps[-1] + part)
        kept = kept and all(map(torch.equal, theta, model.parameters()))
        for _ in range(num_looks):
            em.m_half(call, result)
            gap.measure(em, step=phase, half="M")
            steps.append(steps[-1] + part)
    return Phases(gap.entries, steps, kept)


def draw(phases: Phases) -> Figure:
    """The figure of one run."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = plot_gap(
        phases.entries, figure.subplots(), x=phases.steps, xlabel="optimizer steps", halves=("asleep", "awake")
    )
    ax.set_xlim(0, phases.steps[-1])
    return figure


def report(title: str, phases: Phases) -> str:
    """How log p(v), L and the gap stood at the end of each phase."""
    lines = [title, f"  {'':10}{'log p(v)':>10}{'L':>10}{'gap':>9}"]
    for entry in [phases.entries[0], *phases.ends]:
        name = "start" if entry.step == 0 else f"{'sleep' if entry.half == 'E' else 'wake'} {entry.step}"
        lines.append(f"  {name:10}{entry.log_evidence:10.4f}{entry.bound:10.4f}{entry.gap:9.4f}")
    return "\n".join(lines)


def main(options: Sequence[str]) -> None:
    """Run long phases, and short ones beside them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks phases", description=__doc__.splitlines()[0])
    parser.add_argument("--figure-folder", type=Path, help="where to save phases.png")
    parser.add_argument("--phases", type=int, default=10, help="wakes, and sleeps (10)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of one phase (200)")
    parser.add_argument("--looks", type=int, default=10, help="evaluations of L and log p(v) in a phase (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    v = bars(200)
    print(f"{machine()}; {len(v)} rows of 3 x 3 bars, network {'-'.join(map(str, SIZES))}, float64, nats a row")
    long = alternate(v, given.phases, given.steps, given.looks, given.seed)
    print(report(f"phases of {given.steps} steps", long), flush=True)
    if given.figure_folder is not None:
        given.figure_folder.mkdir(parents=True, exist_ok=True)
        draw(long).savefig(given.figure_folder / "phases.png", dpi=100)
        print(f"  {given.figure_folder / 'phases.png'}")
    total = given.phases * given.steps
    short = alternate(v, max(1, total // SHORT), SHORT, 1, given.seed)
    end = short.entries[-1]
    print(
        f"phases of {SHORT} steps, as many in all: log p(v) {end.log_evidence:.4f}, L {end.bound:.4f}, "
        f"gap {end.gap:.4f}"
    )
    grew, closed = sum(x > 0 for x in long.grew), sum(x > 0 for x in long.closed)
    print(
        f"phases grew={grew}/{len(long.grew)} closed={closed}/{len(long.closed)} theta_kept={long.theta_kept} "
        f"log_p={long.entries[-1].log_evidence:.4f}"
    )
