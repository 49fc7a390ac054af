"""Programs with held priors: an observed site that no latent reaches takes no row away."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient, log_evidence
from pyro_ext.guides import MeanField
from pyro_ext.program import Program

pytestmark = pytest.mark.usefixtures("float64")


def mixture(v: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("v", dist.Normal(locs[z], 1.0), obs=v)


HELD = {
    "weights": torch.tensor([0.3, 0.7], dtype=torch.float64),
    "locs": torch.tensor([-2.0, 3.0], dtype=torch.float64),
}


def test_data_keep_their_rows_and_the_total_is_the_joint() -> None:
    v = torch.randn(30) * 3
    held = poutine.condition(mixture, HELD)
    program = Program(held, (v,), {})
    assert program.rows.names == ("data",)
    assert program.constant == {"weights", "locs"}
    guide = MeanField(held)
    em = EM(held, guide, e_step=FixedPoint(), m_step=None)
    loss = em.step(v)
    by_hand = torch.stack([w.log() + dist.Normal(m, 1.0).log_prob(v) for w, m in zip(*HELD.values(), strict=True)])
    prior = (
        dist.Dirichlet(torch.ones(2)).log_prob(HELD["weights"]) + dist.Normal(0.0, 10.0).log_prob(HELD["locs"]).sum()
    )
    wanted = by_hand.logsumexp(0).sum() + prior
    assert loss == pytest.approx(-wanted.item(), rel=1e-10)
    evidence = log_evidence(held, guide, v)
    assert evidence.exact
    assert evidence.log_evidence.shape == (30,)
    assert evidence.log_evidence.sum().item() == pytest.approx(wanted.item(), rel=1e-10)
    responsibilities = by_hand.softmax(0).mT
    torch.testing.assert_close(guide.posterior(v)["z"].probs, responsibilities, rtol=1e-8, atol=1e-8)


def test_a_prior_that_a_latent_reaches_still_joins_the_rows() -> None:
    program = Program(poutine.condition(mixture, {"locs": HELD["locs"]}), (torch.randn(4),), {})
    assert program.rows.names == ()
    assert program.constant == frozenset()


def penalised(v: Tensor) -> None:
    w = pyro.param("w", torch.tensor(0.5))
    pyro.factor("penalty", -3.0 * w**2)
    with pyro.plate("data", 40, subsample=torch.arange(len(v))):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)


def test_a_penalty_on_theta_counts_once_in_the_loss_and_in_the_gradient() -> None:
    v = torch.randn(10)
    guide = MeanField(penalised)
    em = EM(penalised, guide, e_step=FixedPoint(), m_step=Gradient(pyro.optim.SGD({"lr": 1e-3})))

    def objective(w: Tensor) -> Tensor:
        return 4 * dist.Normal(0.0, (1 + w**2).sqrt()).log_prob(v).sum() - 3 * w**2

    w = torch.tensor(0.5, requires_grad=True)
    value = objective(w)
    (slope,) = torch.autograd.grad(value, w)
    loss = em.step(v)
    assert loss == pytest.approx(-value.item(), rel=1e-9)
    assert pyro.param("w").item() == pytest.approx(0.5 + 1e-3 * slope.item(), rel=1e-9)
