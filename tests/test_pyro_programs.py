"""Three programs as Pyro's own documentation writes them: eight schools, a Gaussian mixture, an autoencoder."""

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

    The means and Monte-Carlo standard errors below are those of NUTS in pyro-ppl 1.9.2, printed by
    ``python -m benchmarks eight_schools --samples 5000 --warmup 1000`` (4 chains, 787 s on a busy core). Quadrature,
    which the tests compare with, agrees with them.
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
        num_steps = 600
        train = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
        descend(SVI(program, guide, decaying(0.1, num_steps), train), num_steps, *eight_schools.data())
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
        finer = eight_schools.quadrature(num_mu=600, num_tau=2200)
        torch.testing.assert_close(mean, finer[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(sd, finer[1], rtol=0, atol=1e-3)
        assert log_evidence == pytest.approx(finer[2], abs=1e-6)

    @pytest.mark.parametrize(
        "documented", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["documented", "plated"]
    )
    def test_means_and_loss(self, documented: bool) -> None:
        program = eight_schools.program if documented else self.plated
        theirs, their_error = self.fit(program, AutoNormal(program))
        assert their_error < 0.02
        mean, sd, log_evidence = eight_schools.quadrature()
        for kind in (MeanField, Structured):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = kind(program)
            loss, error = self.fit(program, guide)
            assert error < 0.02
            assert loss <= theirs + 0.1
            assert loss > -log_evidence - 3 * error

            away = (self.means(guide) - mean) / sd
            rest = torch.arange(len(away)) != self.TAU
            assert (away[rest].abs() < 0.2).all()

            # tau itself has a heavy right tail that no Gaussian of log tau follows: the best one of all lies 0.30 sd
            # low when factorised and 0.24 sd low when not. What can be asked is to come as near as the family allows.
            best_loss, best = eight_schools.gaussian_optimum(factorised=kind is MeanField or not documented)
            assert abs(away[self.TAU] - ((best - mean) / sd)[self.TAU]) < 0.1
            assert loss < best_loss + 0.05


class TestMixture:
    """The mixture of Pyro's tutorial: continuous weights, scale and locations, and a discrete assignment a datum."""

    K = 2
    DATA = (0.0, 1.0, 10.0, 11.0, 12.0)

    @staticmethod
    @config_enumerate
    def program(data: Tensor) -> None:
        K = TestMixture.K
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(K)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", K):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    @classmethod
    def their_guide(cls) -> AutoGuideList:
        guide = AutoGuideList(cls.program)
        guide.append(AutoNormal(poutine.block(cls.program, hide=["assignment"])))
        guide.append(AutoDiscreteParallel(poutine.block(cls.program, expose=["assignment"])))
        return guide

    def best_loss(self, make_guide: Callable[[], Callable]) -> tuple[float, float]:
        """The lowest loss of two starts, for both guides know local optima, and its standard error."""
        data, found = torch.tensor(self.DATA), []
        for seed in (0, 1):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide, elbo = make_guide(), TraceEnum_ELBO(max_plate_nesting=1)
            descend(SVI(self.program, guide, decaying(0.1, 500), elbo), 500, data)
            found.append(loss_and_error(elbo, self.program, guide, data, repeats=300))
        return min(found)

    @pytest.mark.slow
    def test_mixed_program_under_enumeration(self) -> None:
        ours, error = self.best_loss(lambda: MeanField(self.program))
        theirs, their_error = self.best_loss(self.their_guide)
        # k = 4 standard errors of the difference.
        assert ours <= theirs + 4 * math.hypot(error, their_error)

    def test_mean_field_of_the_mixed_program(self) -> None:
        data = torch.tensor(self.DATA)
        guide = MeanField(self.program)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        before = loss_and_error(elbo, self.program, guide, data, repeats=50)
        descend(SVI(self.program, guide, decaying(0.1, 200), elbo), 200, data)
        after = loss_and_error(elbo, self.program, guide, data, repeats=50)
        assert after[0] < before[0] - 4 * math.hypot(after[1], before[1])
        posterior = guide.posterior(data)
        assert posterior["assignment"].mean.shape == (5, 2)
        torch.testing.assert_close(posterior["assignment"].mean.sum(-1), torch.ones(5))
        torch.testing.assert_close(posterior["weights"].mean.sum(), torch.tensor(1.0), rtol=0, atol=1e-3)
        assert posterior["scale"].mean > 0

    def test_exact_bound_given_the_continuous_sites(self, float64: None) -> None:
        data = torch.tensor(self.DATA)
        fixed = {"weights": torch.tensor([0.4, 0.6]), "scale": torch.tensor(1.5), "locs": torch.tensor([2.0, 9.0])}
        model = poutine.condition(self.program, data=fixed)

        log_joints = []
        for assignment in itertools.product(range(self.K), repeat=len(data)):
            at = poutine.condition(self.program, data={**fixed, "assignment": torch.tensor(assignment)})
            log_joints.append(poutine.trace(at).get_trace(data).log_prob_sum())
        log_joint = torch.stack(log_joints)
        exact = float(log_joint.logsumexp(0))

        guide = MeanField(model)
        history = EM(model, guide, e_step=FixedPoint(), m_step=None).run(data, progress=False)
        assert history.status is Status.CONVERGED
        # Held weights, locs and scale are shared by the rows: what counts is the sum.
        assert -history.loss[-1] * len(data) == pytest.approx(exact, abs=1e-8)
        evidence = log_evidence(model, guide, data)
        assert evidence.exact
        assert float(evidence.log_evidence.sum()) == pytest.approx(exact, abs=1e-8)
        assert evidence.gap.abs().max().item() < 1e-8
        log_odds = fixed["weights"].log() + dist.Normal(fixed["locs"], fixed["scale"]).log_prob(data[:, None])
        torch.testing.assert_close(guide.posterior(data)["assignment"].mean, log_odds.softmax(-1), rtol=0, atol=1e-8)


class VAE(nn.Module):
    """The tutorial's variational autoencoder, for 8 x 8 images and with smaller networks."""

    def __init__(self, z_dim: int = 8, hidden_dim: int = 64) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden_dim), nn.Softplus(), nn.Linear(hidden_dim, 64), nn.Sigmoid()
        )
        self.trunk = nn.Sequential(nn.Linear(64, hidden_dim), nn.Softplus())
        self.encoder_loc, self.encoder_scale = nn.Linear(hidden_dim, z_dim), nn.Linear(hidden_dim, z_dim)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros((x.shape[0], self.z_dim)), x.new_ones((x.shape[0], self.z_dim))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, 64))

    def guide(self, x: Tensor) -> None:
        pyro.module("trunk", self.trunk)
        pyro.module("encoder_loc", self.encoder_loc)
        pyro.module("encoder_scale", self.encoder_scale)
        with pyro.plate("data", x.shape[0]):
            hidden = self.trunk(x.reshape(-1, 64))
            pyro.sample("latent", dist.Normal(self.encoder_loc(hidden), self.encoder_scale(hidden).exp()).to_event(1))


class TestVariationalAutoencoder:
    @staticmethod
    def losses(*, amortized: bool, num_epochs: int) -> list[tuple[float, float]]:
        """Training and test loss, nats a row, with their standard errors, after equal training."""
        images = [rows.view(-1, 1, 8, 8) for rows in wake_sleep_digits.split()]
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = VAE()
        guide = Amortized(vae.model) if amortized else vae.guide
        if isinstance(guide, Amortized):
            guide.setup(images[0])
        svi = SVI(vae.model, guide, Adam({"lr": 3e-3}), Trace_ELBO())
        for _ in range(num_epochs):
            for rows in torch.randperm(len(images[0])).split(100):
                svi.step(images[0][rows])
        found = [loss_and_error(Trace_ELBO(), vae.model, guide, x, repeats=20) for x in images]
        return [(loss / len(x), error / len(x)) for (loss, error), x in zip(found, images, strict=True)]

    def check(self, num_epochs: int) -> None:
        ours = self.losses(amortized=True, num_epochs=num_epochs)
        theirs = self.losses(amortized=False, num_epochs=num_epochs)
        for (loss, error), (their_loss, their_error) in zip(ours, theirs, strict=True):
            assert max(error, their_error) < 0.05
            assert loss <= 1.005 * their_loss

    def test_loss_beside_the_hand_written_guide(self) -> None:
        self.check(num_epochs=20)

    @pytest.mark.slow
    def test_loss_after_long_training(self) -> None:
        self.check(num_epochs=100)
