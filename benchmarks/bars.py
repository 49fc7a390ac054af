"""Binary sparse coding on bars (Lücke and Eggert, 2010; the protocol of ProSper and tvo).

Ten bars of a 5 x 5 grid, amplitude 10, each present with probability 0.2, noise of standard deviation 2. The model is
the library's `BinarySparseCoding` with one precision, q one joint factor over the 2^10 states, E- and M-step exact, the
start the model's own `initialize` and the restarts those of `EM.run`: nothing is specific to the data. A bar counts as
found when some column is nearest to it, no other bar has the same nearest column, and their mean absolute difference
is below a tenth of the amplitude.

Data: 2,000 rows of NumPy's ``default_rng(0)``, on which tvo's FullEM ends at L = -57.75335 nats a row.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, History
from pyro_ext.guides import Structured
from pyro_ext.models import BinarySparseCoding

AMPLITUDE, NOISE, PROBABILITY = 10.0, 2.0, 0.2
REFERENCE = -57.753
"""L of tvo's FullEM on the data of seed 0, nats a row."""


def bars(side: int = 5) -> Tensor:
    """The bars, rows then columns, as columns of shape (side^2, 2 side), float64."""
    images = torch.zeros(2 * side, side, side, dtype=torch.float64)
    for i in range(side):
        images[i, i] = images[side + i, :, i] = AMPLITUDE
    return images.flatten(1).T.contiguous()


def draw_data(num_rows: int = 2000, seed: int = 0, side: int = 5) -> Tensor:
    """Rows of the generating model, shape (num_rows, side^2), float64."""
    rng = np.random.default_rng(seed)
    W = bars(side)
    present = torch.from_numpy(rng.random((num_rows, W.shape[1])) < PROBABILITY)
    noise = torch.from_numpy(rng.standard_normal((num_rows, W.shape[0])))
    return present.to(W) @ W.T + NOISE * noise


def num_found(W: Tensor, truth: Tensor | None = None) -> int:
    """How many bars have a nearest column of W of their own, closer than a tenth of the amplitude."""
    truth = bars() if truth is None else truth
    distance = (truth.T[:, None] - W.detach().to(truth).T).abs().mean(-1)
    nearest = distance.min(1)
    owners = torch.bincount(nearest.indices, minlength=W.shape[1])
    return int(((nearest.values < AMPLITUDE / 10) & (owners[nearest.indices] == 1)).sum())


def relative_fall(history: History) -> float:
    """The largest fall of L from one entry of the ledger to the next, relative to L; 0 if it never falls."""
    bounds = [entry.bound for entry in history.ledger]
    return max((max(0.0, before - after) / abs(before) for before, after in zip(bounds, bounds[1:])), default=0.0)


@dataclass(frozen=True)
class Fit:
    """What one call of `EM.run` came to.

    Attributes:
        found: bars found.
        bound: L at the end, nats a row.
        starts: L of each start, nats a row.
        steps: EM steps of all starts together.
        seconds: of all starts together.
        fall: the largest relative fall of L in any start.
    """

    found: int
    bound: float
    starts: list[float]
    steps: int
    seconds: float
    fall: float


class Watch:
    """A callback that counts the steps of every start and the largest fall of L in any of them."""

    def __init__(self) -> None:
        self.steps = 0
        self.fall = 0.0

    def __call__(self, event: object) -> None:
        self.steps += 1
        self.fall = max(self.fall, relative_fall(event.history))


def fit(v: Tensor, seed: int, *, num_restarts: int, max_steps: int = 200, tolerance: float = 1e-5) -> Fit:
    """Fit by exact EM from the model's own start, the best of `num_restarts` of them."""
    torch.set_default_dtype(v.dtype)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    num_latents = 2 * round(v.shape[1] ** 0.5)
    model = BinarySparseCoding(v.shape[1], num_latents, shared_precision=True)
    model.initialize(v)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    watch = Watch()
    begin = time.perf_counter()
    history = em.run(
        v, num_restarts=num_restarts, max_steps=max_steps, tolerance=tolerance, progress=False, callbacks=[watch]
    )
    seconds = time.perf_counter() - begin
    found = num_found(model.W, bars(num_latents // 2))
    fall = max(watch.fall, relative_fall(history))
    return Fit(found, -history.loss[-1], list(history.restarts), watch.steps, seconds, fall)
