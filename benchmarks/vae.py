"""A variational autoencoder on few digits, with and without the KL: reconstruction, KL, L and log p(v), train and test.

scikit-learn's 8 x 8 digits, binarised as in `wake_sleep_digits`; the first 200 rows train, 397 test. p(h) = N(0, I) in
16 dimensions, decoder and encoder with one hidden layer of 64 tanh units (64-64-16). Adam, batches of 100, one sample a
row.

Three losses for the same classes: `Trace_ELBO`, which samples all of log p(v, h) - log q(h | v); `TraceMeanField_ELBO`,
reconstruction less KL with the KL in closed form; and the reconstruction alone, a function of three lines given to
`pyro.infer.SVI`. log p(v) of the test rows is estimated by importance sampling, from the trained encoder and from a q
that is fitted to the test rows afterwards with the decoder held fast, since an encoder trained without a KL is no
proposal.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn

from benchmarks.compare import machine
from benchmarks.wake_sleep_digits import split
from pyro_ext import elbo_terms, log_evidence
from pyro_ext.evidence import Evidence
from pyro_ext.guides import Amortized, MeanField

Program = Callable[[Tensor], object]
Loss = ELBO | Callable[[Program, Program, Tensor], Tensor]


class VAE(nn.Module):
    """p(h) = N(0, I), p(v | h) Bernoulli with logits of one hidden tanh layer, as in Pyro's tutorial."""

    def __init__(self, num_visible: int = 64, num_hidden: int = 64, num_latents: int = 16) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.decoder = nn.Sequential(nn.Linear(num_latents, num_hidden), nn.Tanh(), nn.Linear(num_hidden, num_visible))

    def forward(self, v: Tensor) -> None:
        """The program, at rows ``(N, num_visible)``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(self.num_latents), 1.0).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=v)


def encoder(num_visible: int = 64, num_hidden: int = 64, num_latents: int = 16) -> nn.Module:
    """Location and log-scale of each latent, from torch's own start: all of its layers have a gradient at once."""
    return nn.Sequential(nn.Linear(num_visible, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 2 * num_latents))


def reconstruction_alone(model: Program, guide: Program, v: Tensor) -> Tensor:
    """-log p(v | h) with h ~ q(h | v): the loss without its KL."""
    drawn = poutine.trace(guide).get_trace(v)
    played = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(v)
    return -played.log_prob_sum(lambda _, site: site["is_observed"])


LOSSES: dict[str, Callable[[], Loss]] = {
    "L by samples": Trace_ELBO,
    "reconstruction - KL": TraceMeanField_ELBO,
    "reconstruction alone": lambda: reconstruction_alone,
}


@dataclass(frozen=True)
class Record:
    """Means over rows at one step, nats a row: each pair is (training rows, test rows)."""

    step: int
    reconstruction: tuple[float, float]
    kl: tuple[float, float]
    bound: tuple[float, float]


@dataclass(frozen=True)
class Trained:
    """What one run came to.

    Attributes:
        records: in the order of the steps.
        own: log p(v) of the test rows by importance sampling from the trained encoder.
        refitted: the same from a q fitted to the test rows afterwards.
        dreams: means of v at draws of the prior, shape (10, 64).
        spread: mean standard deviation of the encoder's factors, and of its locations over the test rows.
    """

    records: tuple[Record, ...]
    own: Evidence
    refitted: Evidence
    dreams: Tensor
    spread: tuple[float, float]


def record(step: int, model: VAE, guide: Amortized, sets: tuple[Tensor, Tensor]) -> Record:
    """Terms of L on training and test rows."""
    found = [elbo_terms(model, guide, v, num_samples=100) for v in sets]
    reconstruction, kl, bound = (
        tuple(float(term.mean()) for term in terms)
        for terms in (
            [f.expected_log_likelihood for f in found],
            [f.kl["h"] for f in found],
            [f.bound for f in found],
        )
    )
    return Record(step, reconstruction, kl, bound)


def refit(model: VAE, v: Tensor, num_steps: int) -> MeanField:
    """A factor a row, fitted to given rows by gradient steps on L; the decoder stays."""
    guide = MeanField(model)
    guide.setup(v)
    optim = ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(poutine.block(model, hide_types=["param"]), guide, optim, TraceMeanField_ELBO())
    for _ in range(num_steps):
        svi.step(v)
    return guide


def train(
    loss: Loss, seed: int, *, num_train: int, num_steps: int, every: int, num_samples: int, refit_steps: int
) -> Trained:
    """Train by `pyro.infer.SVI`, and measure."""
    rows, test_rows = split()
    rows = rows[:num_train]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = VAE()
    guide = Amortized(model, encoder=encoder())
    guide.setup(rows)
    svi = SVI(model, guide, Adam({"lr": 3e-3}), loss=loss)
    records, step = [record(0, model, guide, (rows, test_rows))], 0
    while step < num_steps:
        for index in torch.randperm(num_train).split(100)[: num_steps - step]:
            svi.step(rows[index])
            step += 1
            if step % every == 0 or step == num_steps:
                records.append(record(step, model, guide, (rows, test_rows)))
    factors = guide.posterior(test_rows)["h"].distribution
    own = log_evidence(model, guide, test_rows, num_samples=num_samples)
    codes = torch.randn(10, model.num_latents, generator=torch.Generator().manual_seed(seed))
    dreams = model.decoder(codes).sigmoid().detach()
    refitted = log_evidence(model, refit(model, test_rows, refit_steps), test_rows, num_samples=num_samples)
    spread = float(factors.stddev.mean()), float(factors.mean.std(0).mean())
    return Trained(tuple(records), own, refitted, dreams, spread)


def draw(found: dict[str, Trained]) -> Figure:
    """Reconstruction and L over the steps, and dreams."""
    figure = Figure(figsize=(9.0, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    left, right = top.subplots(1, 2)
    for number, (label, run) in enumerate(found.items()):
        steps = [r.step for r in run.records]
        for which, style in ((0, ":"), (1, "-")):
            shown = {"linestyle": style, "color": f"C{number}", "label": label if which else None}
            left.plot(steps, [r.reconstruction[which] for r in run.records], **shown)
            right.plot(steps, [-r.bound[which] for r in run.records], **shown)
    left.set(xlabel="step", title="reconstruction E_q[log p(v|h)], nats a row\ntest —, training ···")
    right.set(xlabel="step", yscale="log", title="-L = KL - reconstruction, nats a row\n(lower is better)")
    right.set_yticks([15, 20, 50, 100, 200, 500], ["15", "20", "50", "100", "200", "500"])
    right.minorticks_off()
    right.legend(loc="center right")
    for ax, (label, run) in zip(bottom.subplots(len(found), 1), found.items(), strict=True):
        strip = run.dreams.reshape(10, 8, 8).permute(1, 0, 2).reshape(8, 80).numpy()
        ax.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    bottom.suptitle("decoded draws of the prior")
    return figure


def main(options: list[str]) -> None:
    """Train with each loss from each seed, print a table, and save the figure of the first seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks vae", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="training digits (200)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (3)")
    parser.add_argument("--samples", type=int, default=1000, help="of q a row, for log p(v)")
    parser.add_argument("--refit-steps", type=int, default=1000)
    parser.add_argument("--figure-folder", type=Path, help="where to save vae_overfitting.png")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(options)
    torch.set_num_threads(given.threads)
    print(f"{machine()}; {given.rows} training rows, {given.steps} steps, {given.samples} samples for log p(v)")
    print("nats a row, training / test; log p(v) >= of test rows from a refitted q (from the encoder); median ESS")
    print(f"{'':22}{'seed':>4}{'reconstruction':>17}{'KL':>16}{'L':>20}{'log p(v) >=':>30}{'ESS':>12}")
    first: dict[str, Trained] = {}
    means: dict[str, float] = {}
    for label, make in LOSSES.items():
        reached: list[float] = []
        for seed in range(given.seeds):
            run = train(
                make(),
                seed,
                num_train=given.rows,
                num_steps=given.steps,
                every=max(1, given.steps // 20),
                num_samples=given.samples,
                refit_steps=given.refit_steps,
            )
            first.setdefault(label, run)
            reached.append(run.refitted.mean)
            pairs = [
                f"{a:.2f} / {b:.2f}"
                for a, b in (getattr(run.records[-1], n) for n in ("reconstruction", "kl", "bound"))
            ]
            log_p = f"{run.refitted.mean:.2f} +- {run.refitted.mean_standard_error:.3f} ({run.own.mean:.2f})"
            sizes = [float(e.effective_sample_size.median()) for e in (run.refitted, run.own)]
            print(
                f"{label:22}{seed:4}{pairs[0]:>17}{pairs[1]:>16}{pairs[2]:>20}{log_p:>30}"
                f"{f'{sizes[0]:.0f} ({sizes[1]:.0f})':>12}   sd of q {run.spread[0]:.3g}, of means {run.spread[1]:.3g}",
                flush=True,
            )
        means[label] = statistics.fmean(reached)
    if given.figure_folder is not None:
        given.figure_folder.mkdir(parents=True, exist_ok=True)
        draw(first).savefig(given.figure_folder / "vae_overfitting.png", dpi=100)
    print("vae test log p(v): " + ", ".join(f"{label} {value:.2f}" for label, value in means.items()))
