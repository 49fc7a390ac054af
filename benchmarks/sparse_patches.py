"""Sparse coding of image patches by minibatch MAP learning: oriented features (Olshausen and Field, 1996).

Data and yardsticks are those of `benchmarks.patches`: scikit-learn's two photographs, pseudo-whitened, patches with
mean 0 and variance 1; ``--path FILE.npy`` takes other grey images. ``SparseCoding`` learns atoms of unit norm for
|v - W h|^2 / 2 + rate |h|_1 (beta = 1), from random patches as atoms: `Maximize` finds h, a stepwise `ClosedForm`
M-step with one sweep over the atoms moves W (Mairal et al., 2009). Atoms that hardly any patch uses are never counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.compare import machine
from benchmarks.patches import draw_features, draw_patches, gabor_fields, load_images, whiten, yardsticks
from pyro_ext import EM, ClosedForm, EpochEnd, Maximize, SpaRSA, fit
from pyro_ext.guides import Dirac
from pyro_ext.models import BlockCoordinateDescent, ColumnNorm, SparseCoding, assign_parameters

Schedule = Callable[[int], float]
"""Step size rho_t of the t-th batch, from t = 1."""

TOLERANCE = 1e-2
"""Of the codes while W is learned: gap as a share of |v|^2 / 2. Finer ones led to no better dictionary."""

LEAST_USE = 1e-4
"""Share of patches that must use an atom for it to count as alive."""


def unit_columns(W: Tensor) -> Tensor:
    """Columns (D, H) scaled to norm 1, in double precision."""
    return W.double() / W.double().norm(dim=0)


def with_dictionary(W: Tensor, rate: float, dtype: torch.dtype = torch.float32) -> SparseCoding:
    """The program |v - W h|^2 / 2 + rate |h|_1 with the given atoms (D, H), of norm at most 1."""
    rule = ColumnNorm(solver=BlockCoordinateDescent(num_sweeps=1))
    model = SparseCoding(W.shape[0], W.shape[1], rate=rate, beta=1.0, bias=False, dictionary=rule).to(dtype)
    # Norms that a coarser dtype has rounded up would be refused.
    longest = W.double().norm(dim=0).clamp(min=1)
    assign_parameters(model, {"W": (W.double() / longest).to(dtype)})
    return model


def learner(model: SparseCoding, schedule: Schedule | None = None, tolerance: float = TOLERANCE) -> EM:
    """Minibatch MAP learning; rho_t = (t + 2)^-0.6 where no schedule is given."""
    return EM(
        model,
        Dirac(model),
        e_step=Maximize(SpaRSA(tolerance)),
        m_step=ClosedForm(step_size=schedule or (lambda t: (t + 2) ** -0.6)),
    )


def codes(W: Tensor, v: Tensor, rate: float, tolerance: float = 1e-6) -> tuple[Tensor, Maximize]:
    """h* of every row (N, H), in v's dtype, and the E-step with its certificate."""
    model = with_dictionary(W, rate, v.dtype)
    e_step = Maximize(SpaRSA(tolerance))
    return EM(model, Dirac(model), e_step=e_step, m_step=None).infer(v)["h"].mean, e_step


def objective(v: Tensor, W: Tensor, h: Tensor, rate: float) -> float:
    """|v - W h|^2 / 2 + rate |h|_1, mean over rows, in double precision."""
    v, W, h = v.double(), W.double(), h.double()
    return float((0.5 * (v - h @ W.T).square().sum(-1) + rate * h.abs().sum(-1)).mean())


@dataclass(frozen=True)
class Learned:
    """What a fit came to.

    Attributes:
        W: atoms in the columns, (D, H), float32.
        use: share of patches that use each atom, (H,).
        losses: objective a patch, mean over each epoch, up to a constant.
        seconds: of the fit.
        cpu_seconds: of the fit, all threads.
    """

    W: Tensor
    use: Tensor
    losses: list[float]
    seconds: float
    cpu_seconds: float

    @property
    def dead(self) -> Tensor:
        """Atoms that hardly any patch uses, boolean (H,)."""
        return self.use < LEAST_USE


def learn(
    v: Tensor,
    num_latents: int,
    num_epochs: int,
    *,
    rate: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> Learned:
    """Learn from v (N, D), starting at random patches."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = with_dictionary(unit_columns(v[torch.randperm(len(v))[:num_latents]].T), rate)
    losses: list[float] = []

    def report(event: EpochEnd) -> None:
        losses.append(event.loss)
        if not quiet:
            print(f"  epoch {event.epoch}: -log p(h, v) = {event.loss:.3f} nats a patch", flush=True)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    loader = DataLoader(v, batch_size=batch_size, shuffle=True)
    fit(learner(model), loader, num_epochs, progress=False, callbacks=[report])
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    W = model.W.detach()
    h, _ = codes(W, v[:10_000], rate)
    return Learned(W, (h != 0).float().mean(0), losses, seconds, cpu_seconds)


def patches_of(path: Path | None, side: int, *nums: int, seed: int = 0) -> list[Tensor]:
    """So many patches (num, side^2) for each of `nums`, from other places each time; the images are the same."""
    images = [whiten(image) for image in load_images(path)]
    return [draw_patches(images, side, num, seed=seed + 1000 * i) for i, num in enumerate(nums)]


def main(options: list[str]) -> None:
    """Learn, fit Gabor functions and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sparse_patches", description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="grey images, a .npy file; default: scikit-learn's two photographs")
    parser.add_argument("--figure", type=Path, help="where to save the picture of the features")
    parser.add_argument("--side", type=int, default=12, help="pixels of a patch's edge (12)")
    parser.add_argument("--patches", type=int, default=40_000, help="number of patches (40,000)")
    parser.add_argument("--latents", type=int, default=196, help="number of atoms (196)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the patches (6)")
    parser.add_argument("--rate", type=float, default=1.0, help="nats that a unit of |h| costs (1)")
    parser.add_argument("--seed", type=int, default=0, help="of places, start and order (0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    given = parser.parse_args(options)

    torch.set_num_threads(given.threads)
    (v,) = patches_of(given.path, given.side, given.patches, seed=given.seed)
    print(f"{machine()}; {len(v):,} patches of {given.side} x {given.side}, {given.latents} atoms, float32")
    learned = learn(v, given.latents, given.epochs, rate=given.rate, seed=given.seed)
    dead = int(learned.dead.sum())
    h, _ = codes(learned.W, v[:10_000], given.rate)
    rest = float((v[:10_000] - h @ learned.W.T).square().mean())
    print(f"  {learned.seconds:.1f} s, {learned.cpu_seconds:.1f} s of processor time")
    print(f"  {float(learned.use.sum()):.1f} atoms a patch, {dead} hardly ever; {rest:.3f} of the variance is left")
    features = learned.W.T.numpy().astype(np.float64)
    fields = gabor_fields(features, given.side, ~learned.dead.numpy())
    print(f"  {'Gabor fit':34}{'share':>9}{'selective':>11}{'median R2':>11}{'area':>7}")
    print(fields.line("features"), flush=True)
    for label, others in yardsticks(v, given.side, given.latents, given.seed).items():
        print(gabor_fields(others, given.side).line(label), flush=True)
    if given.figure is not None:
        given.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_features(features, fields, given.side).savefig(given.figure, dpi=100)
        print(f"  {given.figure}")
    print(f"sparse_patches seconds={learned.seconds:.1f} share={fields.share:.3f} latents={given.latents} dead={dead}")
