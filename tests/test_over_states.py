"""L by summing over states, against a table of the whole joint."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.guides import Amortized, MeanField
from pyro_ext.models import HelmholtzMachine, SigmoidBeliefNetwork
from pyro_ext.over_states import bound_over_states
from pyro_ext.program import Program
from tests.oracles.enumeration import binary_states, elbo, factorial_posterior, program_log_joint

pytestmark = pytest.mark.usefixtures("float64")


def test_a_static_posterior_has_the_bound_of_its_table() -> None:
    model = SigmoidBeliefNetwork([3, 4])
    v = torch.rand(5, 4).round()
    posterior = Amortized(model, encoder=torch.nn.Linear(4, 3).double()).posterior(v)
    log_joint = program_log_joint(model, {"h1": binary_states(3).unsqueeze(1)}, v).detach()
    expected = elbo(log_joint, factorial_posterior(posterior["h1"].mean))
    torch.testing.assert_close(bound_over_states(Program(model, (v,), {}), posterior), expected, rtol=0, atol=1e-12)


def inner_plates(v: Tensor) -> None:
    """A row has one unit above three copies of another."""
    with pyro.plate("data", len(v), dim=-2):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        with pyro.plate("copy", 3, dim=-1):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h + z, 1.0), obs=v)


def test_inner_plates_are_summed() -> None:
    v = torch.randn(4, 3)
    guide = MeanField(inner_plates)
    guide.setup(v)
    states = binary_states(4)[:, None, :]
    z, h = states[..., :1], states[..., 1:]
    log_joint = dist.Bernoulli(0.4).log_prob(z).sum(-1) + dist.Bernoulli(0.3).log_prob(h).sum(-1)
    log_joint = log_joint + dist.Normal(h + z, 1.0).log_prob(v).sum(-1)
    expected = elbo(log_joint, factorial_posterior(torch.tensor([0.4, 0.3, 0.3, 0.3]).expand(4, 4)))
    q = guide.posterior(v)
    torch.testing.assert_close(q["h"].mean, torch.full((4, 3), 0.3))
    found = bound_over_states(Program(inner_plates, (v,), {}), q)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_states_that_q_rules_out_count_nothing() -> None:
    prior, loc = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.0, 2.0])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Categorical(prior))
            pyro.sample("v", dist.Normal(loc[z], 1.0), obs=v)

    v = torch.randn(3)
    guide = MeanField(model)
    guide.setup(v)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(torch.tensor([-torch.inf, 0.0, 0.0]).expand_as(p))
    q = guide.posterior(v)
    torch.testing.assert_close(q["z"].mean, torch.tensor([0.0, 0.5, 0.5]).expand(3, 3))
    log_p = prior.log() + dist.Normal(loc, 1.0).log_prob(v[:, None])
    expected = log_p[:, 1:].mean(-1) + torch.tensor(2.0).log()
    torch.testing.assert_close(bound_over_states(Program(model, (v,), {}), q), expected, rtol=0, atol=1e-12)


def test_what_cannot_be_summed_gives_none() -> None:
    machine = HelmholtzMachine(4, 2)
    v = torch.rand(3, 4).round()
    assert bound_over_states(Program(machine, (v,), {}), Amortized(machine).posterior(v)) is None
    model = SigmoidBeliefNetwork([3, 4])
    program, q = Program(model, (v,), {}), Amortized(model).posterior(v)
    assert bound_over_states(program, q, max_states=7) is None
    assert bound_over_states(program, q, max_states=8) is not None
