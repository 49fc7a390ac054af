"""Learned mean field on digits: one pass of a network and one sweep, against sweeps from the default start (19.5.2).

The procedure of Salakhutdinov and Larochelle (2010) on `BinarySparseCoding`: ``Refine(FixedPoint(max_sweeps=1),
optim)`` runs the network, improves its q by one sequential sweep of (19.44), and trains it to put out the improved q.
After that a new row costs one pass, or one pass and one sweep (`SemiAmortized`).

scikit-learn's 8 x 8 digits, levels divided by 16 and noise variances of at least 0.01; 64 latents; 1,400 rows to train
on and 397 held out; float32. Two trainings: of the network alone, beside a model that ordinary variational EM has
learned (cold starts, ten sweeps a step), and of network and model together from nothing. The sweeps that it is compared
with start at the prior, the default of `FixedPoint`, at the same model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro.optim import Adam
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compare import machine
from pyro_ext import EM, ClosedForm, FixedPoint, MeanChange, Refine, fit
from pyro_ext.guides import Amortized, MeanField
from pyro_ext.models import BinarySparseCoding
from pyro_ext.semi_amortized import SemiAmortized
from pyro_ext.steps import EStep

NUM_TRAIN, NUM_LATENTS = 1400, 64
SWEEPS = (1, 2, 3, 4, 6, 10, 25)
SHOWN = (1, 4, 10, 25)


def digits() -> tuple[Tensor, Tensor]:
    """Training rows (1400, 64) and held-out rows (397, 64), levels in [0, 1]."""
    v = torch.as_tensor(load_digits().data / 16).to(torch.get_default_dtype())
    order = torch.randperm(len(v), generator=torch.Generator().manual_seed(0))
    return v[order[:NUM_TRAIN]], v[order[NUM_TRAIN:]]


def exactly(num_sweeps: int) -> FixedPoint:
    """So many sequential sweeps, from the prior unless told otherwise."""
    return FixedPoint(criterion=MeanChange(0.0), max_sweeps=num_sweeps)


def new_model(v: Tensor, num_latents: int) -> BinarySparseCoding:
    """The model at its own start."""
    model = BinarySparseCoding(v.shape[1], num_latents, variance_floor=0.01)
    model.initialize(v)
    return model


def learn_apart(v: Tensor, num_latents: int, num_epochs: int, rate: float, em_steps: int) -> Amortized:
    """The model by variational EM; then the network by `Refine`, at that model."""
    model = new_model(v, num_latents)
    EM(model, MeanField(model), e_step=exactly(10), m_step=ClosedForm()).run(
        v, max_steps=em_steps, tolerance=0.0, progress=False
    )
    guide = Amortized(model)
    em = EM(model, guide, e_step=Refine(exactly(1), Adam({"lr": rate})), m_step=None)
    fit(em, DataLoader(v, batch_size=100, shuffle=True), num_epochs, progress=False)
    return guide


def learn_together(v: Tensor, num_latents: int, num_epochs: int, rate: float) -> Amortized:
    """Model and network from their starts: the M-step sees the q that one sweep has improved."""
    model = new_model(v, num_latents)
    guide = Amortized(model)
    m_step = ClosedForm(step_size=lambda t: (t + 2) ** -0.6)
    em = EM(model, guide, e_step=Refine(exactly(1), Adam({"lr": rate})), m_step=m_step)
    fit(em, DataLoader(v, batch_size=100, shuffle=True), num_epochs, progress=False)
    return guide


@dataclass(frozen=True)
class Row:
    """One way of inference.

    Attributes:
        label: what it does.
        train: L of the training rows, nats a row.
        held_out: L of the held-out rows, nats a row.
        seconds: of inferring all training rows, median of some repeats taken in turn with the others.
    """

    label: str
    train: float
    held_out: float
    seconds: float


def bound_of(guide: Amortized, e_step: EStep, v: Tensor) -> float:
    """L of v where an E-step that trains nothing ends, nats a row."""
    own = guide if isinstance(e_step, Refine | SemiAmortized) else MeanField(guide.model)
    call = EM(guide.model, own, e_step=e_step, m_step=None).call(v)
    return float(e_step.improve(call, keep=False).bound.mean())


def compare(guide: Amortized, train: Tensor, held_out: Tensor, repeats: int = 5) -> dict[str, Row]:
    """The network alone, with one sweep, and sweeps from the prior."""
    model = guide.model
    alone: EStep = Refine(exactly(1), Adam({"lr": 1.0}))
    refined = SemiAmortized(exactly(1))
    steps: dict[str, EStep] = {"network": alone, "network + 1 sweep": refined}
    steps |= {f"{n} sweeps": exactly(n) for n in SWEEPS}
    runs: dict[str, Callable[[], object]] = {"network": lambda: guide.posterior(train)}
    semi = EM(model, guide, e_step=refined, m_step=None)
    runs["network + 1 sweep"] = lambda: semi.infer(train)
    for n in SHOWN:
        em = EM(model, MeanField(model), e_step=exactly(n), m_step=None)
        runs[f"{n} sweeps"] = lambda em=em: em.infer(train)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: Row(
            name,
            bound_of(guide, e_step, train),
            bound_of(guide, e_step, held_out),
            statistics.median(seconds[name]) if name in seconds else float("nan"),
        )
        for name, e_step in steps.items()
    }


def worth(rows: dict[str, Row], which: str) -> int:
    """The most sweeps from the prior, of those tried, that one pass and one sweep reach, on "train" or "held_out"."""
    reached = getattr(rows["network + 1 sweep"], which)
    return max((n for n in SWEEPS if getattr(rows[f"{n} sweeps"], which) <= reached), default=0)


def table(title: str, rows: dict[str, Row], num_rows: int) -> str:
    """L and microseconds a row."""
    lines = [title, f"  {'':20}{'L, training':>12}{'L, held out':>12}{'us a row':>10}"]
    for row in rows.values():
        time_text = "" if row.seconds != row.seconds else f"{1e6 * row.seconds / num_rows:10.1f}"
        lines.append(f"  {row.label:20}{row.train:12.2f}{row.held_out:12.2f}{time_text}")
    return "\n".join(lines)


def main(options: Sequence[str]) -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks refine_digits", description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=NUM_LATENTS, help="(64)")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the data that train the network (60)")
    parser.add_argument("--rate", type=float, default=2e-3, help="Adam's learning rate (0.002)")
    parser.add_argument("--em-steps", type=int, default=30, help="EM steps of the model learned apart (30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    train, held_out = digits()
    print(f"{machine()}; {len(train)} + {len(held_out)} digits, {given.latents} latents, nats a row")
    found: dict[str, dict[str, Row]] = {}
    for name in ("apart", "together"):
        pyro.clear_param_store()
        pyro.set_rng_seed(given.seed)
        started = time.perf_counter()
        if name == "apart":
            guide = learn_apart(train, given.latents, given.epochs, given.rate, given.em_steps)
        else:
            guide = learn_together(train, given.latents, given.epochs, given.rate)
        seconds = time.perf_counter() - started
        found[name] = compare(guide, train, held_out)
        print(table(f"model and network learned {name}, {seconds:.0f} s", found[name], len(train)), flush=True)
    print(
        "refine_digits one pass and one sweep reach, in sweeps (training, held out): "
        + ", ".join(f"{name}={worth(rows, 'train')},{worth(rows, 'held_out')}" for name, rows in found.items())
    )
