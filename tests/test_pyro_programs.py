"""Three programs as Pyro's own documentation writes them: eight schools, a Gaussian mixture, a variational autoencoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.infer.elbo import ELBO
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn

from benchmarks import eight_schools, wake_sleep_digits
from pyro_ext import EM, FixedPoint, Status, log_evidence
from pyro_ext.guides import Amortized, MeanField, Structured


def descend(svi: SVI, num_steps: int, *args: Tensor) -> None:
    for _ in range(num_steps):
        svi.step(*args)


def decaying(lr: float, num_steps: int) -> ClippedAdam:
    """Adam whose learning rate ends at a twentieth of its start, so that the noise of the last steps dies out."""
    return ClippedAdam({"lr": lr, "lrd": 0.05 ** (1 / num_steps)})


def loss_and_error(elbo: ELBO, model: Callable, guide: Callable, *args: Tensor, repeats: int) -> tuple[float, float]:
    """Mean of repeated losses, and its Monte-Carlo standard error."""
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)], dtype=torch.float64)
    return float(losses.mean()), float(losses.std() / math.sqrt(repeats))


class TestEightSchools:
    """Posterior means, in posterior standard deviations from the truth, and the loss beside AutoNormal's.

    ``python -m benchmarks eight_schools`` (NUTS of pyro-ppl 1.9.2: 4 chains of 5,000 draws after 1,000, 787 s on a busy
    core) gave the means and Monte-Carlo standard errors below; quadrature, which the tests use, agrees with them.
    """

    NUTS = torch.tensor([6.3986, 5.7729, 1.3253, 0.4048, 0.0414, -0.1519, 0.0177, -0.2892, -0.1616, 0.3903, 0.0966])
    NUTS_ERROR = torch.tensor([0.0508, 0.0618, 0.0140, 0.0076, 0.0065, 0.0078, 0.0066, 0.0066, 0.0061, 0.0058, 0.0066])
    TAU = eight_schools.NAMES.index("tau")

    @staticmethod
    def plated(sigma: Tensor, y: Tensor) -> None:
        """The same program with a plate over the schools."""
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    @staticmethod
    def fit(program: Callable, guide: Callable) -> tuple[float, float]:
        num_steps = 800
        train = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        descend(SVI(program, guide, decaying(0.05, num_steps), train), num_steps, *eight_schools.data())
        judge = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        return loss_and_error(judge, program, guide, *eight_schools.data(), repeats=20)

    @staticmethod
    def means(guide: MeanField | Structured) -> Tensor:
        """In the order of `eight_schools.NAMES`; the mean of log tau is that of the Normal before the bijection."""
        posterior = guide.posterior(*eight_schools.data())
        log_tau = posterior["tau"].sample(20000).log().mean()
        found = (posterior["mu"].mean, posterior["tau"].mean, log_tau, posterior["eta"].mean)
        return torch.cat([x.detach().reshape(-1) for x in found]).double()

    def test_nuts_agrees_with_quadrature(self) -> None:
        mean, sd, log_evidence = eight_schools.quadrature()
        # k = 4 standard errors of each of eleven means.
        assert ((self.NUTS - mean).abs() < 4 * self.NUTS_ERROR).all()
        finer = eight_schools.quadrature(num_mu=800, num_tau=3000)
        torch.testing.assert_close(mean, finer[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(sd, finer[1], rtol=0, atol=1e-3)
        assert log_evidence == pytest.approx(finer[2], abs=1e-6)
