"""Variational EM for binary sparse coding, mean field, N = 20,000, D = 144, H = 32: seconds a step of ten sweeps.

Ours is `EM.run` with `MeanField` and sequential sweeps of (19.44), from the prior at every step; the peer is the same
written by hand in PyTorch, printed in ``docs/hand_written_updates.md``. The same start, float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, ClosedForm, FixedPoint, MeanChange
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding, assign_parameters

STEPS, SWEEPS = 10, 10


def by_hand(v: Tensor, b: Tensor, W: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One variational EM step: L a row before the M-step, and b, W, beta after it."""
    # E-step: (19.44), unit by unit, for all rows at once. Units are rows of memory.
    coupling = -(W.T * beta) @ W
    field = b[:, None] + (W.T * beta) @ v.T + 0.5 * coupling.diagonal()[:, None]
    coupling = coupling - coupling.diagonal().diag()
    mean = b.sigmoid()[:, None].expand_as(field).contiguous()
    for _ in range(SWEEPS):
        for i in range(len(b)):
            torch.sigmoid(torch.addmv(field[i], mean.T, coupling[i]), out=mean[i])
    # L at this q.
    logits = field + coupling @ mean
    safe = mean.clamp(1e-12, 1 - 1e-7)
    entropy = -(safe * safe.log() + (1 - safe) * (1 - safe).log()).sum()
    energy = (mean * (field + 0.5 * (logits - field))).sum() - len(v) * torch.nn.functional.softplus(b).sum()
    likelihood = -0.5 * (v.square() @ beta).sum() + 0.5 * len(v) * (beta / (2 * torch.pi)).log().sum()
    bound = (energy + entropy + likelihood) / len(v)
    # M-step.
    cross = mean @ v
    gram = mean @ mean.T
    gram.diagonal().copy_(mean.sum(-1))
    W = torch.linalg.solve(gram, cross).T
    residual = v.square().sum(0) - 2 * (W * cross.T).sum(-1) + ((W @ gram) * W).sum(-1)
    probability = (mean.sum(-1) / len(v)).clamp(1e-6, 1 - 1e-6)
    return bound, probability.logit(), W, len(v) / residual


def draw_data(num_rows: int, num_visible: int, num_latents: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of the model with columns that overlap, float32, and a start for both."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(num_visible, num_latents, generator=generator)
    h = (torch.rand(num_rows, num_latents, generator=generator) < 0.2).float()
    v = h @ W.T + torch.randn(num_rows, num_visible, generator=generator)
    start = {
        "b": torch.full((num_latents,), -1.5),
        "W": W + 0.5 * torch.randn(W.shape, generator=generator),
        "beta": torch.ones(num_visible),
    }
    return v, start


def ours(v: Tensor, start: dict[str, Tensor], *, compiled: bool) -> Run:
    """The library."""
    model = BinarySparseCoding(v.shape[1], len(start["b"])).to(v.dtype)
    sweeps = FixedPoint(criterion=MeanChange(0.0), max_sweeps=SWEEPS)
    em = EM(model, MeanField(model), e_step=sweeps, m_step=ClosedForm(), compile=compiled)

    def run() -> tuple[float, float]:
        assign_parameters(model, start)
        seconds, history = timed(lambda: em.run(v, max_steps=STEPS, tolerance=0.0, progress=False))
        return seconds / len(history.loss), -history.loss[-1]

    return run


def hand_written(v: Tensor, start: dict[str, Tensor]) -> Run:
    """The same by hand."""

    def fit() -> float:
        b, W, beta = start["b"], start["W"], start["beta"]
        bound = torch.zeros(())
        for _ in range(STEPS):
            bound, b, W, beta = by_hand(v, b, W, beta)
        return float(bound)

    def run() -> tuple[float, float]:
        seconds, bound = timed(fit)
        return seconds / STEPS, bound

    return run


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, rows=20_000, visible=144, latents=32)
    v, start = draw_data(arguments.rows, arguments.visible, arguments.latents)
    print(f"{len(v)} rows, D = {v.shape[1]}, {len(start['b'])} latents; {machine()}")
    runs = {
        "pyro-ext, compiled": ours(v, start, compiled=True),
        "pyro-ext": ours(v, start, compiled=False),
        "by hand": hand_written(v, start),
    }
    timings = take_turns(runs, arguments.repeats, shown_only=("pyro-ext",))
    check_agreement(timings, 1e-4)
    print(table("float32, an EM step", timings, "L a row"))
    print(closing_line("bsc_mean_field", timings))
