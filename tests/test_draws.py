from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

from pyro_ext import EM, FixedPoint, draws
from pyro_ext.draws import chunks, continuous_points, draw, posterior_of, row_width, unchanged_if_refused
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.program import Program
from tests.oracles.enumeration import bernoulli_log_prob

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def plates(v):
    """A latent a row and one an element of the row."""
    with pyro.plate("data", len(v), dim=-2):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(h.sum(-1), 1.0))
            pyro.sample("v", dist.Normal(z, 0.7), obs=v)


def by_hand(v):
    with pyro.plate("data", len(v), dim=-2):
        pyro.sample("h", dist.Bernoulli(torch.tensor([0.5, 0.2])).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("z", dist.Normal(v, 0.4))


def randomised(guide, *args):
    guide.setup(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=0.5)
    return guide


def test_draws_of_a_guide_written_by_hand():
    v = torch.randn(4, 3)
    program = Program(plates, (v,), {})
    assert posterior_of(by_hand, program) is None
    S = 5000
    values, log_q = draw(by_hand, None, program, S)
    assert {name: tuple(x.shape) for name, x in values.items()} == {"h": (S, 4, 1, 2), "z": (S, 4, 3)}
    h, z = values["h"].squeeze(-2), values["z"]
    expected = bernoulli_log_prob(h, torch.tensor([0.5, 0.2]).logit())
    torch.testing.assert_close(log_q["h"], expected)
    torch.testing.assert_close(log_q["z"], dist.Normal(v, 0.4).log_prob(z).sum(-1))
    assert ((z.mean(0) - v).abs() <= K * 0.4 / math.sqrt(S)).all()
    # They go straight into the program.
    log_p = program.log_joint(values, num_particles=S)
    prior = bernoulli_log_prob(h, torch.tensor([0.3, 0.6]).logit())
    likelihood = dist.Normal(h.sum(-1, keepdim=True), 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(v)
    torch.testing.assert_close(log_p, prior + likelihood.sum(-1))


@pytest.mark.parametrize("guide_class", [MeanField, Structured, Amortized])
def test_draws_of_a_guide_of_this_project(guide_class):
    v = torch.randn(4, 3)
    guide = randomised(guide_class(plates), v)
    program = Program(plates, (v,), {})
    posterior = posterior_of(guide, program)
    values, log_q = draw(guide, posterior, program, 7)
    assert {name: tuple(x.shape) for name, x in values.items()} == {"h": (7, 4, 1, 2), "z": (7, 4, 3)}
    assert {name: tuple(x.shape) for name, x in log_q.items()} == {"h": (7, 4), "z": (7, 4)}
    torch.testing.assert_close(sum(log_q.values()), posterior.log_prob(values))
    assert program.log_joint(values, num_particles=7).shape == (7, 4)


def test_the_posterior_is_of_the_programs_rows_even_if_the_guide_is_set_up_after():
    """Setting up draws numbers, which must not make the guide see other rows than the program."""

    def program(v, size):
        with pyro.plate("data", len(v), subsample_size=size) as rows:
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h[..., None], 1.0).expand([size, 2]).to_event(1), obs=v[rows])

    v = torch.randn(20, 2)
    for guide_class in (MeanField, Amortized):
        for _ in range(3):
            guide = guide_class(program)
            traced = Program(program, (v, 4), {})
            torch.rand(3)
            posterior = posterior_of(guide, traced)
            randomised(guide, v, 4)
            posterior = posterior_of(guide, traced)
            rows = traced.indices["data"]
            if guide_class is MeanField:
                expected = guide.table(guide.blocks[0])[rows].sigmoid().squeeze(-1)
            else:
                expected = guide.encoders.h(v[rows]).sigmoid().squeeze(-1)
            torch.testing.assert_close(posterior["h"].mean, expected.detach())


def test_new_data_of_a_table_are_inferred():
    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    v, new = torch.randn(4), torch.randn(3)
    guide = MeanField(program)
    guide.setup(v)
    with pytest.raises(ValueError, match="Expected the data that the table"):
        posterior_of(guide, Program(program, (new,), {}))
    em = EM(program, guide, e_step=FixedPoint(), m_step=None)
    found = posterior_of(guide, Program(program, (new,), {}))["h"].mean
    torch.testing.assert_close(found, em.infer(new)["h"].mean)


def test_the_scale_of_a_subsample_is_divided_out():
    def guide(v, rows):
        with pyro.plate("data", len(v), subsample=rows) as chosen:
            pyro.sample("h", dist.Normal(v[chosen], 0.5))

    def program(v, rows):
        with pyro.plate("data", len(v), subsample=rows) as chosen:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[chosen])

    v, rows = torch.randn(9), torch.tensor([7, 2])
    values, log_q = draw(guide, None, Program(program, (v, rows), {}), 3)
    torch.testing.assert_close(log_q["h"], dist.Normal(v[rows], 0.5).log_prob(values["h"]))


def continuous(v):
    with pyro.plate("data", len(v)):
        b = pyro.sample("b", dist.Bernoulli(0.4))
        h = pyro.sample("h", dist.Normal(b, 1.0))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("v", dist.Normal(h, s), obs=v)


def test_continuous_points_of_any_guide():
    v = torch.randn(3)
    program = Program(continuous, (v,), {})

    def found(guide):
        return continuous_points(guide, posterior_of(guide, program), program)

    def points(v):
        with pyro.plate("data", len(v)):
            pyro.sample("b", dist.Delta(torch.ones(3)))
            h = pyro.sample("h", dist.Normal(v, 1.0))
            pyro.sample("s", dist.Delta(h.exp()))  # it varies, and has no density all the same

    assert found(points) == ["s"]
    assert found(MeanField(continuous)) == []
    assert found(Dirac(continuous)) == ["h", "s"]

    # Pyro's own: Deltas that hand on auxiliary draws are none, those beside them are.
    held = pyro.poutine.condition(continuous, data={"b": torch.ones(3)})
    program = Program(held, (v,), {})
    assert found(AutoNormal(held)) == []
    assert found(AutoDelta(held)) == ["h", "s"]
    both = AutoGuideList(held)
    both.append(AutoNormal(pyro.poutine.block(held, expose=["h"])))
    both.append(AutoDelta(pyro.poutine.block(held, expose=["s"])))
    assert found(both) == ["s"]


def test_looking_for_points_draws_no_number():
    v = torch.randn(3)
    program = Program(continuous, (v,), {})

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("h", dist.Normal(v, 1.0))
            pyro.sample("s", dist.Gamma(2.0, 2.0))

    state = torch.get_rng_state()
    assert continuous_points(guide, None, program) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_samples", "expected"), [(10, [4, 4, 2]), (4, [4]), (3, [3]), (1, [1])])
def test_chunks_are_bounded_by_the_widest_site(num_samples, expected, monkeypatch):
    program = Program(plates, (torch.randn(4, 3),), {})
    assert row_width(program) == 3  # three elements of z or v are wider than two units of h
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS", 4 * 4 * 3)
    assert list(chunks(program, num_samples)) == expected
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS", 1)
    assert list(chunks(program, num_samples)) == [1] * num_samples


def test_a_refused_call_leaves_a_guide_as_it_was():
    v = torch.randn(3)
    guide = MeanField(continuous)

    def refused():
        with unchanged_if_refused(guide):
            guide(v)
            pyro.param("more", torch.zeros(2))
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        refused()
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())
    guide(v)
    names = list(pyro.get_param_store())
    with pytest.raises(RuntimeError, match="no"):
        refused()
    assert guide.is_set_up
    assert list(pyro.get_param_store()) == names
    with unchanged_if_refused(None):
        pyro.param("more", torch.zeros(2))
    assert "more" in pyro.get_param_store()
