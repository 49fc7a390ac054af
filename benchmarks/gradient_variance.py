"""Variance of gradient estimates of a variational autoencoder: reparametrised, score function, wake-sleep.

The autoencoder of `benchmarks.vae` (64-64-16) on binarised digits, one batch of 100 training rows, at torch's own start
and after training. One estimate is the gradient of the loss, divided by the rows; what is shown for each layer is the
sum of the variances of its coordinates over many estimates, and for the encoder the norm of the mean gradient over the
root of the summed variance (signal to noise: how far one estimate is from its mean).

All estimators but wake-sleep's of phi have the gradient of -L as their mean. Wake-sleep's phi follows other aims,
KL(p || q) under the data or under dreams: variances beside different means compare through the signal to noise alone.
The baseline is the decaying average of past costs that `TraceGraph_ELBO` keeps for each position of the batch. With the
rows always in one order it belongs to the row, which is the best case; shuffled, as in training, it is common to all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from benchmarks.compare import machine
from benchmarks.vae import VAE, encoder
from benchmarks.wake_sleep_digits import split
from pyro_ext import Uniform, WakeSleep
from pyro_ext.guides import Amortized

Guide = Callable[[Tensor], Any]


class ScoreFunction(Messenger):
    """Makes every Gaussian of a guide one that is drawn without a gradient, so that ELBOs take the score function.

    Args:
        baseline: whether sites ask for the decaying average of `TraceGraph_ELBO` as a baseline (decay 0.9).
    """

    def __init__(self, *, baseline: bool = False) -> None:
        super().__init__()
        self.baseline = baseline

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], torch.distributions.Independent):
            msg["fn"].base_dist.has_rsample_(False)
            if self.baseline:
                msg["infer"]["baseline"] = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}


@dataclass(frozen=True)
class Estimator:
    """A loss and what happens to the guide.

    Attributes:
        loss: a new ELBO.
        handler: around the guide; None for none.
        follows_bound: whether its mean is the gradient of -L for phi too.
        shuffles: whether the rows come in another order each time.
    """

    loss: Callable[[], ELBO]
    handler: Callable[[], Messenger] | None = None
    follows_bound: bool = True
    shuffles: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "reparametrised": Estimator(Trace_ELBO),
    "reparametrised, KL closed": Estimator(TraceMeanField_ELBO),
    "score function": Estimator(Trace_ELBO, ScoreFunction),
    "score, baseline shared": Estimator(TraceGraph_ELBO, lambda: ScoreFunction(baseline=True), shuffles=True),
    "score, baseline of the row": Estimator(TraceGraph_ELBO, lambda: ScoreFunction(baseline=True)),
    "wake (K = 1), sleep-phi": Estimator(lambda: WakeSleep(weights=Uniform()), follows_bound=False),
    "wake (K = 10), sleep-phi": Estimator(lambda: WakeSleep(num_particles=10), follows_bound=False),
    "wake (K = 10), wake-phi": Estimator(lambda: WakeSleep(num_particles=10, insomnia=1.0), follows_bound=False),
}


def estimates(
    estimator: Estimator,
    model: Callable[[Tensor], Any],
    guide: Amortized,
    parameters: Mapping[str, nn.Parameter],
    v: Tensor,
    repeats: int,
    *,
    settle: int = 100,
) -> dict[str, Tensor]:
    """Gradients of the loss a row, ``(repeats, size)`` for each parameter.

    Args:
        estimator: the estimator.
        model, guide: set up already.
        parameters: by the names to use.
        v: rows ``(N, D)``, the same for every estimate.
        repeats: number of estimates.
        settle: estimates before the first that counts: baselines start at 0.
    """
    loss = estimator.loss()
    program = guide if estimator.handler is None else estimator.handler()(guide)
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    first = 0 if estimator.handler is None else settle
    for name in list(pyro.get_param_store().keys()):
        if name.startswith("__baseline"):
            del pyro.get_param_store()[name]
    for number in range(first + repeats):
        for parameter in parameters.values():
            parameter.grad = None
        loss.loss_and_grads(model, program, v[torch.randperm(len(v))] if estimator.shuffles else v)
        if number >= first:
            for name, parameter in parameters.items():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[name].append(grad.reshape(-1) / len(v))
    for parameter in parameters.values():
        parameter.grad = None
    return {name: torch.stack(grads) for name, grads in found.items()}


@dataclass(frozen=True)
class Spread:
    """Of one group of parameters.

    Attributes:
        variance: sum of the coordinates' variances.
        signal: squared norm of the mean gradient, less what noise adds to it; it may come out below 0.
    """

    variance: float
    signal: float

    @property
    def signal_to_noise(self) -> float:
        """Norm of the mean gradient over the root of the summed variance; 0 where no signal was seen."""
        return math.sqrt(max(self.signal, 0.0) / self.variance)


def spread(grads: list[Tensor]) -> Spread:
    """The spread of estimates ``(repeats, size)`` of the parameters of one group."""
    joined = torch.cat(grads, -1).double()
    variance = float(joined.var(0).sum())
    return Spread(variance, float(joined.mean(0).square().sum()) - variance / len(joined))


def groups(model: VAE, network: nn.Sequential) -> dict[str, tuple[str, ...]]:
    """Names of the parameters by layer: the two of the encoder, then the two of the decoder."""
    return {
        f"{part} {layer}": tuple(f"{part}.{index}.{kind}" for kind in ("weight", "bias"))
        for part, made in (("encoder", network), ("decoder", model.decoder))
        for layer, index in enumerate((n for n, m in enumerate(made) if isinstance(m, nn.Linear)), 1)
    }


def named(model: VAE, network: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by "encoder." and "decoder." and their own names."""
    parts = (("encoder", network), ("decoder", model.decoder))
    return {f"{part}.{name}": value for part, module in parts for name, value in module.named_parameters()}


def main(options: list[str]) -> None:
    """Measure all estimators at the start and after training, and print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradient_variance", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300, help="estimates of each (300)")
    parser.add_argument("--settle", type=int, default=100, help="estimates before, for the baselines (100)")
    parser.add_argument("--steps", type=int, default=2000, help="of training, reconstruction - KL (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    rows, _ = split()
    v = rows[:100]
    pyro.clear_param_store()
    pyro.set_rng_seed(given.seed)
    model, network = VAE(), encoder()
    guide = Amortized(model, encoder=network)
    guide.setup(v)
    parameters = named(model, network)
    print(f"{machine()}; {len(v)} rows, {given.repeats} estimates of the gradient of the loss a row")
    ratios: list[str] = []
    for when, num_steps in (("start", 0), ("trained", given.steps)):
        svi = SVI(model, guide, Adam({"lr": 3e-3}), TraceMeanField_ELBO())
        for _ in range(num_steps):
            svi.step(rows[torch.randint(len(rows), (100,))])
        layers = groups(model, network)
        print(f"\n{when}, {num_steps} steps: summed variance of each layer; signal to noise of the encoder")
        print(f"  {'':27}" + "".join(f"{name:>12}" for name in layers) + f"{'signal/noise':>14}", flush=True)
        variances: dict[str, float] = {}
        for label, estimator in ESTIMATORS.items():
            found = estimates(estimator, model, guide, parameters, v, given.repeats, settle=given.settle)
            spreads = {name: spread([found[p] for p in members]) for name, members in layers.items()}
            phi = spread([found[p] for p in parameters if p.startswith("encoder")])
            variances[label] = phi.variance
            print(
                f"  {label:27}"
                + "".join(f"{spreads[name].variance:12.3g}" for name in layers)
                + f"{phi.signal_to_noise:14.3f}",
                flush=True,
            )
        plain = variances["score function"] / variances["reparametrised"]
        better = variances["score, baseline shared"] / variances["reparametrised"]
        closed = variances["reparametrised"] / variances["reparametrised, KL closed"]
        ratios.append(
            f"{when} score/reparametrised={plain:.0f} with_baseline={better:.1f} sampled/closed_KL={closed:.1f}"
        )
    print("\ngradient_variance of the encoder: " + "; ".join(ratios))
