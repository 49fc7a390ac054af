"""Binary sparse coding on bars (Lücke and Eggert, 2010; the protocol of ProSper and tvo).

Ten bars of a 5 x 5 grid, amplitude 10, each present with probability 0.2, noise of standard deviation 2. The model is
the library's `BinarySparseCoding` with one precision, q one joint factor over the 2^10 states, E- and M-step exact, the
start the model's own `initialize` and the restarts those of `EM.run`: nothing is specific to the data. All bars are
found when every bar has a nearest column of its own, their mean absolute difference below a tenth of the amplitude.

Data: 2,000 rows of NumPy's ``default_rng(0)``. Exact EM from the true parameters ends at L = -57.75335 nats a row on
them, the figure noted for tvo's FullEM; tvo itself is not on the package index and is not run here.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, History, log_evidence
from pyro_ext.guides import Structured
from pyro_ext.models import BinarySparseCoding, assign_parameters

AMPLITUDE, NOISE, PROBABILITY = 10.0, 2.0, 0.2
REFERENCE = -57.753
"""The maximum of L on the 2,000 rows of seed 0, nats a row, as noted for tvo's FullEM."""


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
    """How many columns of W are nearest to a bar and closer to it than a tenth of the amplitude."""
    truth = bars() if truth is None else truth
    distance = (truth.T[:, None] - W.detach().to(truth).T).abs().mean(-1)
    nearest = distance.min(1)
    return len(nearest.indices[nearest.values < AMPLITUDE / 10].unique())


def relative_fall(history: History) -> float:
    """The largest fall of L from one entry of the ledger to the next, relative to L; 0 if it never falls."""
    bounds = [entry.bound for entry in history.ledger]
    return max((max(0.0, before - after) / abs(before) for before, after in pairwise(bounds)), default=0.0)


@dataclass(frozen=True)
class Fit:
    """What one call of `EM.run` came to.

    Attributes:
        found: bars found.
        bound: L at the end, nats a row.
        starts: L at the end of each start, nats a row.
        steps: EM steps of all starts together.
        seconds: of all starts together.
        fall: the largest relative fall of L in any start.
        status: how the best start ended.
    """

    found: int
    bound: float
    starts: list[float]
    steps: int
    seconds: float
    fall: float
    status: str


def fit(v: Tensor, seed: int, *, num_restarts: int, max_steps: int = 200, tolerance: float = 1e-5) -> Fit:
    """Exact EM from the model's own start, the best of `num_restarts`; v sets the dtype of the work."""
    torch.set_default_dtype(v.dtype)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    num_latents = 2 * round(v.shape[1] ** 0.5)
    model = BinarySparseCoding(v.shape[1], num_latents, shared_precision=True)
    model.initialize(v)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())
    histories: dict[int, History] = {}
    begin = time.perf_counter()
    best = em.run(
        v,
        num_restarts=num_restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        progress=False,
        callbacks=[lambda event: histories.update({id(event.history): event.history})],
    )
    seconds = time.perf_counter() - begin
    return Fit(
        found=num_found(model.W, bars(num_latents // 2)),
        bound=-best.loss[-1],
        starts=best.restarts or [-best.loss[-1]],
        steps=sum(history.steps for history in histories.values()),
        seconds=seconds,
        fall=max(relative_fall(history) for history in histories.values()),
        status=best.status.value,
    )


def bound_at_truth(v: Tensor) -> float:
    """log p(v) at the generating parameters, nats a row: the optimum lies above it."""
    torch.set_default_dtype(v.dtype)
    pyro.clear_param_store()
    W = bars(round(v.shape[1] ** 0.5)).to(v)
    model = BinarySparseCoding(*W.shape, shared_precision=True)
    logit = torch.tensor(PROBABILITY, dtype=v.dtype).logit()
    assign_parameters(model, {"W": W, "b": logit.expand(W.shape[1]), "beta": v.new_tensor(NOISE**-2)})
    return log_evidence(model, None, v).mean


def main(options: list[str]) -> None:
    """Fit from every seed, and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks bars", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="starts from seeds 0 to N - 1 (10)")
    parser.add_argument("--restarts", type=int, default=6, help="starts of each run, the best is kept (6)")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-data", action="store_true", help="draw other data for every seed")
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)

    print(f"{given.rows} rows, {given.restarts} starts a run, {given.dtype}, {given.threads} threads; L in nats a row")
    print(" seed found          L  L at truth  good starts  steps      s  ms/step  fall")
    fits, good_starts = [], 0
    for seed in range(given.seeds):
        v = draw_data(given.rows, seed if given.new_data else 0).to(dtype)
        truth = bound_at_truth(v)
        result = fit(v, seed, num_restarts=given.restarts)
        good = sum(bound > truth for bound in result.starts)
        fits.append(result)
        good_starts += good
        print(
            f"{seed:4} {result.found:3}/10 {result.bound:10.5f} {truth:11.5f} {good:9}/{len(result.starts):<2}"
            f" {result.steps:6} {result.seconds:6.1f} {1e3 * result.seconds / result.steps:8.1f}  {result.fall:.0e}"
            f"{'' if result.status == 'converged' else ' ' + result.status}",
            flush=True,
        )
    complete = sum(f.found == 10 for f in fits)
    starts, steps = sum(len(f.starts) for f in fits), sum(f.steps for f in fits)
    print(
        f"All bars in {complete} of {len(fits)} runs ({good_starts} of {starts} starts); "
        f"worst L {min(f.bound for f in fits):.5f}; {1e3 * sum(f.seconds for f in fits) / steps:.1f} ms a step; "
        f"largest fall {max(f.fall for f in fits):.0e}."
    )
    if not given.new_data and given.rows == 2000:
        print(f"Noted for tvo's FullEM on these data: {REFERENCE}.")
