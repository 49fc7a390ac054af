"""Exact EM for binary sparse coding with one joint factor over 2^10 states, N = 2,000, D = 25: seconds a step.

Ours is `EM.run` with `Structured`; the peer is the same EM written by hand in PyTorch, printed in
``docs/hand_written_updates.md``. Bars data, the same start, float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bars import draw_data
from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, ClosedForm, FixedPoint
from pyro_ext.guides import Structured
from pyro_ext.models import BinarySparseCoding, assign_parameters

STEPS = 10


def by_hand(v: Tensor, states: Tensor, b: Tensor, W: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One EM step: log p(v) a row before it, and b, W, beta after it (one precision for all visible variables)."""
    # E-step: log p(v, h) at all states, softmax over them.
    means = states @ W.T
    log_prior = states @ b - torch.nn.functional.softplus(b).sum()
    square = v.square().sum(-1, keepdim=True)
    log_joint = torch.addmm(log_prior - 0.5 * beta * means.square().sum(-1), v, beta * means.T)
    log_joint -= 0.5 * beta * square - 0.5 * v.shape[1] * torch.log(beta / (2 * torch.pi))
    log_evidence = log_joint.logsumexp(-1)
    q = (log_joint - log_evidence[:, None]).exp_()
    # M-step: logit of the mean activity, least squares, noise with the new W.
    total, cross = q.sum(0), (q @ states).T @ v
    gram = states.T @ (total[:, None] * states)
    W = torch.linalg.solve(gram, cross).T
    residual = square.sum() - 2 * (W * cross.T).sum() + ((W @ gram) * W).sum()
    probability = (total @ states / len(v)).clamp(1e-6, 1 - 1e-6)
    return log_evidence.mean(), probability.logit(), W, v.numel() / residual


def start_of(v: Tensor, num_latents: int) -> dict[str, Tensor]:
    """One start for both."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(v.shape[1], num_latents, generator=generator, dtype=torch.float64).to(v)
    spread = v.std()
    return {
        "b": torch.full((num_latents,), -1.5).to(v),
        "W": v.mean(0)[:, None] + spread / 4 * noise,
        "beta": 1 / spread.square(),
    }


def ours(v: Tensor, start: dict[str, Tensor], *, compiled: bool) -> Run:
    """The library."""
    model = BinarySparseCoding(v.shape[1], len(start["b"]), shared_precision=True).to(v.dtype)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm(), compile=compiled)

    def run() -> tuple[float, float]:
        assign_parameters(model, start)
        seconds, history = timed(lambda: em.run(v, max_steps=STEPS, tolerance=0.0, progress=False))
        return seconds / len(history.loss), -history.loss[-1]

    return run


def hand_written(v: Tensor, start: dict[str, Tensor]) -> Run:
    """The same by hand."""
    num_latents = len(start["b"])
    bits = torch.arange(2**num_latents)[:, None] >> torch.arange(num_latents - 1, -1, -1)
    states = (bits & 1).to(v)

    def fit() -> float:
        b, W, beta = start["b"], start["W"], start["beta"]
        bound = torch.zeros(())
        for _ in range(STEPS):
            bound, b, W, beta = by_hand(v, states, b, W, beta)
        return float(bound)

    def run() -> tuple[float, float]:
        seconds, bound = timed(fit)
        return seconds / STEPS, bound

    return run


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, rows=2000, latents=10)
    v = draw_data(arguments.rows)
    start = start_of(v, arguments.latents)
    print(f"{len(v)} rows, D = {v.shape[1]}, 2^{arguments.latents} states; {machine()}")
    runs = {
        "pyro-ext, compiled": ours(v, start, compiled=True),
        "pyro-ext": ours(v, start, compiled=False),
        "by hand": hand_written(v, start),
    }
    timings = take_turns(runs, arguments.repeats, shown_only=("pyro-ext",))
    check_agreement(timings, 1e-8)
    print(table("float64, an EM step", timings, "log-likelihood a row"))
    print(closing_line("bsc_joint", timings))
