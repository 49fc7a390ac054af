"""The demo's fits: one model under four guides, two more by wake-sleep, all in the same loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam, ClippedAdam
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import (
    EM,
    Better,
    BoundChange,
    ClosedForm,
    Cold,
    EpochEnd,
    Evidence,
    FixedPoint,
    Gradient,
    Parallel,
    StopFit,
    WakeSleep,
    elbo_terms,
    fit,
    log_evidence,
)
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.models import BinarySparseCoding, HelmholtzMachine, SigmoidBeliefNetwork, assign_parameters
from tutorials.demo_data import Data

SEED = 0
MAX_LATENTS = 16
"""2^16 states can be summed, so log p(v) of binary sparse coding is exact."""


@dataclass(frozen=True)
class Sizes:
    """How much work the demo does.

    Attributes:
        fast, steady: EM steps of mean field, with little and with more damping.
        swapped: EM steps under each of the other guides after that.
        epochs: passes over the data by wake-sleep.
        num_samples: samples a row of the log-evidence.
        em_seconds, svi_seconds: time after which one fit is stopped.
    """

    fast: int = 60
    steady: int = 20
    swapped: int = 12
    epochs: int = 80
    num_samples: int = 500
    em_seconds: float = 8.0
    svi_seconds: float = 20.0


QUICK = Sizes(fast=3, steady=2, swapped=2, epochs=2, num_samples=20)


class Watch:
    """A callback of `fit` that notes L on held-out rows against the time of learning, its own time left out.

    Args:
        model, guide, held_out: what L is measured on.
        seconds: time after which the fit is stopped.
        offset: seconds that an earlier fit took, which this one goes on from.
        every: epochs between two measurements.
    """

    def __init__(
        self, model: Any, guide: Any, held_out: Tensor, seconds: float, offset: float = 0.0, every: int = 1
    ) -> None:
        self.model, self.guide, self.held_out, self.every = model, guide, held_out, every
        self.times: list[float] = []
        self.bounds: list[float] = []
        self.offset, self.limit = offset, offset + seconds
        self.started, self.idle = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Time spent on learning so far, earlier fits included."""
        return self.offset + time.perf_counter() - self.started - self.idle

    def measure(self) -> None:
        """Note L, nats per row, and the time; the random numbers of learning are not touched."""
        seconds, begin = self.seconds, time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            terms = elbo_terms(self.model, self.guide, self.held_out, num_samples=20)
        self.times.append(seconds)
        self.bounds.append(float(terms.bound.mean()))
        self.idle += time.perf_counter() - begin

    def __call__(self, event: EpochEnd) -> None:
        if event.epoch % self.every == 0:
            self.measure()
        if self.seconds > self.limit:
            raise StopFit("the demo's time for one fit is up")


@dataclass(frozen=True)
class Result:
    """One row of the table, and what the figure draws.

    Attributes:
        title, data, guide_name, algorithm: the words in the table.
        model, guide: what was learned.
        watch: L on held-out rows against time.
        evidence: log p(v) and L of the held-out rows.
    """

    title: str
    data: str
    guide_name: str
    algorithm: str
    model: Any
    guide: Any
    watch: Watch
    evidence: Evidence


def binary_sparse_coding(data: Data, sizes: Sizes, say: Callable[[str], None]) -> Iterator[Result]:
    """Variational EM with MeanField; then the model that it learned goes on under each of the other guides."""
    v, test = data.train, data.test
    num_latents = max(2, min(MAX_LATENTS, len(v) // 20))
    # Cold starts: warm ones keep the poor optima that q fell into while theta was young. Little damping learns fast,
    # more of it settles the rows that still swing.
    fast = FixedPoint(Parallel(0.5), BoundChange(1e-2), start=Cold())
    steady = FixedPoint(Parallel(0.7), BoundChange(1e-2), start=Cold())

    def result(name: str, algorithm: str, model: Any, guide: Any, watch: Watch) -> Result:
        evidence = log_evidence(model, guide, test, num_samples=sizes.num_samples)
        return Result("binary sparse coding", "real", name, algorithm, model, guide, watch, evidence)

    pyro.set_rng_seed(SEED)
    model = BinarySparseCoding(v.shape[1], num_latents, shared_precision=True)
    start(model, v)
    guide = MeanField(model)
    first = Watch(model, guide, test, sizes.em_seconds)
    say(f"Binary sparse coding, {num_latents} latents: variational EM with MeanField")
    run(EM(model, guide, e_step=fast, m_step=ClosedForm()), [v], sizes.fast, first, say)
    run(EM(model, guide, e_step=steady, m_step=ClosedForm()), [v], sizes.steady, first, say)
    yield result("MeanField", "variational EM", model, guide, first)

    learned = {name: getattr(model, name).detach().clone() for name in ("b", "W", "beta")}
    blocks = [[("h", group)] for group in similar_groups(learned["W"], 8)]
    # What it takes to swap the guide: one line each.
    swaps: list[tuple[str, Callable[[Any], Any], Any, str]] = [
        ("Structured", lambda m: Structured(m, blocks=blocks), steady, "variational EM, blocks of 8"),
        ("Dirac", Dirac, FixedPoint(start=Better()), "MAP learning"),
        ("Amortized", Amortized, Gradient(Adam({"lr": 1e-2}), num_steps=20), "EM, network by gradient"),
    ]
    for name, make_guide, e_step, algorithm in swaps:
        say(f"The model that it learned goes on under {name}")
        pyro.set_rng_seed(SEED)
        model = BinarySparseCoding(v.shape[1], num_latents, shared_precision=True)
        assign_parameters(model, learned)
        guide = make_guide(model)
        watch = Watch(model, guide, test, sizes.em_seconds, offset=first.times[-1])
        run(EM(model, guide, e_step=e_step, m_step=ClosedForm()), [v], sizes.swapped, watch, say)
        yield result(name, algorithm, model, guide, watch)


def wake_sleep(data: Data, sizes: Sizes, say: Callable[[str], None]) -> Iterator[Result]:
    """The sigmoid belief network and the Helmholtz machine by `WakeSleep` in Pyro's own SVI."""
    v, test = data.train_bits, data.test_bits
    batch_size = min(100, len(v))
    loader = DataLoader(TensorDataset(v), batch_size=batch_size, shuffle=True)
    width = v.shape[1]
    fits: list[tuple[str, Callable[[], Any], WakeSleep, str, float]] = [
        (
            "sigmoid belief network",
            lambda: SigmoidBeliefNetwork([16, 32, width]),
            WakeSleep(),
            "wake-sleep",
            1e-2,
        ),
        (
            "sigmoid belief network",
            lambda: SigmoidBeliefNetwork([16, 32, width]),
            WakeSleep(num_particles=5, insomnia=0.5),
            "reweighted wake-sleep",
            1e-2,
        ),
        (
            "Helmholtz machine",
            lambda: HelmholtzMachine(width, 8),
            WakeSleep(num_particles=5, insomnia=0.5),
            "reweighted wake-sleep",
            5e-3,
        ),
    ]
    for title, make_model, objective, algorithm, rate in fits:
        say(f"{title[0].upper()}{title[1:]}: {algorithm} in Pyro's SVI")
        pyro.set_rng_seed(SEED)
        model = make_model()
        model.initialize(v)
        guide = Amortized(model)
        # The rate falls tenfold over the run.
        decay = 0.1 ** (1 / (sizes.epochs * len(loader)))
        svi = SVI(model, guide, ClippedAdam({"lr": rate, "lrd": decay}), loss=objective)
        watch = Watch(model, guide, test, sizes.svi_seconds, every=max(1, sizes.epochs // 20))
        run(svi, loader, sizes.epochs, watch, say)
        evidence = log_evidence(model, guide, test, num_samples=sizes.num_samples)
        yield Result(title, "bits", "Amortized", algorithm, model, guide, watch, evidence)


def run(driver: Any, loader: Iterable[Any], num_epochs: int, watch: Watch, say: Callable[[str], None]) -> None:
    """The one loop for SVI and EM."""
    history = fit(driver, loader, num_epochs, callbacks=[watch])
    say(f"  {history.summary().splitlines()[0]}")


def start(model: BinarySparseCoding, v: Tensor) -> None:
    """Start the features at rows of the data, half-way to the mean: units must differ for a point mass to choose."""
    model.initialize(v)
    rows = v[torch.randperm(len(v))[: model.num_latents]]
    mean = v.mean(0)
    W = mean[:, None] / 4 + (rows - mean).T / 2
    assign_parameters(model, {"W": W.contiguous(), "b": torch.full((model.num_latents,), -1.0)})


def similar_groups(W: Tensor, size: int) -> list[list[int]]:
    """Groups of latents whose features, the columns of W, point the same way: those explain each other away."""
    unit = W / W.norm(dim=0).clamp_min(1e-12)
    similarity = (unit.T @ unit).abs().fill_diagonal_(0)
    left = list(range(W.shape[1]))
    groups = []
    while left:
        group = [max(left, key=lambda i: float(similarity[i, left].max()))]
        left.remove(group[0])
        while left and len(group) < size:
            group.append(max(left, key=lambda i: float(similarity[i, group].sum())))
            left.remove(group[-1])
        groups.append(sorted(group))
    return groups
