from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

from pyro_ext.rows import Rows, is_factor, is_visible, sample_sites

pytestmark = pytest.mark.usefixtures("float64")


def traced(model, *args, particles=None):
    """A trace with log-probabilities; ``particles`` is the (size, dim) of a plate around the program."""
    if particles is not None:
        model = pyro.plate("particles", particles[0], dim=particles[1])(model)
    trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


def normal(value, loc=0.0):
    return Normal(loc, 1.0).log_prob(value)


def nested(x, batch_size=None, mask=True):
    """Rows at dim -2 with a latent each; pixels at dim -1, some of them masked."""
    with pyro.plate("data", len(x), subsample_size=batch_size, dim=-2) as ind:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=torch.as_tensor(mask)):
            pyro.sample("v", dist.Normal(h, 1.0), obs=x[ind])


def test_inner_plates_are_summed_into_the_row():
    x = torch.randn(4, 3)
    trace = traced(nested, x)
    rows = Rows.from_trace(trace)
    assert (rows.names, rows.dims, rows.shape, rows.scale, rows.nesting, rows.count) == (
        ("data",),
        (-2,),
        (4,),
        1.0,
        2,
        4,
    )
    h = trace.nodes["h"]["value"]
    torch.testing.assert_close(rows.log_prob(trace), normal(h)[:, 0] + normal(x, h).sum(-1))
    torch.testing.assert_close(rows.log_prob(trace, observed=True), normal(x, h).sum(-1))
    torch.testing.assert_close(rows.log_prob(trace, observed=False), normal(h)[:, 0])


def test_inner_plates_may_stand_to_the_left():
    x = torch.randn(3, 4)

    def model():
        with pyro.plate("data", 4, dim=-1):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, dim=-2):
                pyro.sample("v", dist.Normal(h, 1.0), obs=x)

    trace = traced(model)
    h = trace.nodes["h"]["value"]
    torch.testing.assert_close(Rows.from_trace(trace).log_prob(trace), normal(h) + normal(x, h).sum(0))


@pytest.mark.parametrize("dims", [(-1, -2), (-2, -1), (-1, -3), (-3, -2)])
def test_rows_may_have_two_plates(dims):
    def model(x):
        a, b = pyro.plate("a", 4, dim=dims[0]), pyro.plate("b", 3, dim=dims[1])
        inner = pyro.plate("inner", 2, dim=({-1, -2, -3} - set(dims)).pop())
        with a, b:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with inner:
                pyro.sample("v", dist.Normal(h, 1.0).expand(x.shape), obs=x)

    sizes = {dims[0]: 4, dims[1]: 3}
    shape = [sizes.get(dim, 2) for dim in (-3, -2, -1)]
    trace = traced(model, torch.randn(shape))
    rows = Rows.from_trace(trace)
    assert rows.names == (("a", "b") if dims[0] < dims[1] else ("b", "a"))
    log_prob = rows.log_prob(trace)
    assert log_prob.shape == rows.shape == tuple(sizes[d] for d in sorted(dims))
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            index = [slice(None)] * 3
            index[sorted(dims)[0]], index[sorted(dims)[1]] = i, j
            h = trace.nodes["h"]["value"]
            h = h.reshape((1,) * (3 - h.dim()) + h.shape)
            v = trace.nodes["v"]["value"]
            torch.testing.assert_close(log_prob[i, j], normal(h[tuple(index)]).sum() + normal(v, h)[tuple(index)].sum())


def test_a_program_without_a_common_plate_is_one_row_with_scales_kept():
    x = torch.randn(6)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=2) as ind:
            pyro.sample("v", dist.Normal(mu, 1.0), obs=x[ind])

    for particles in (None, (5, -2), (5, -4)):
        trace = traced(model, particles=particles)
        rows = Rows.from_trace(trace, ignore={"particles"})
        assert (rows.names, rows.shape, rows.scale, rows.count) == ((), (), 1.0, 1)
        mu = trace.nodes["mu"]["value"]
        expected = normal(mu) + 3 * normal(trace.nodes["v"]["value"], mu.reshape(-1, 1)).sum(-1).reshape(mu.shape)
        torch.testing.assert_close(rows.log_prob(trace).reshape(-1), expected.reshape(-1))


def test_the_scale_of_a_subsample_is_divided_out():
    x = torch.randn(8, 3)
    trace = traced(nested, x, 2)
    rows = Rows.from_trace(trace)
    assert (rows.shape, rows.scale) == ((2,), 4.0)
    h, v = trace.nodes["h"]["value"], trace.nodes["v"]["value"]
    torch.testing.assert_close(rows.log_prob(trace), normal(h)[:, 0] + normal(v, h).sum(-1))
    assert rows.at_full_size({"data": 8}) == Rows(("data",), (-2,), torch.Size([8]), 1.0, 2)


def test_the_scale_of_an_inner_subsample_is_kept():
    x = torch.randn(4, 6)

    def model():
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 6, subsample_size=2, dim=-1) as ind:
                pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[:, ind])

    trace = traced(model)
    rows = Rows.from_trace(trace)
    assert rows.scale == 1.0
    expected = 3 * normal(trace.nodes["v"]["value"]).sum(-1) + normal(trace.nodes["h"]["value"])[:, 0]
    torch.testing.assert_close(rows.log_prob(trace), expected)


def test_masked_values_do_not_count():
    x, mask = torch.randn(4, 3), torch.rand(4, 3) < 0.5
    trace = traced(nested, torch.where(mask, x, torch.tensor(1e6)), None, mask)
    h = trace.nodes["h"]["value"]
    expected = normal(h)[:, 0] + torch.where(mask, normal(x, h), 0.0).sum(-1)
    torch.testing.assert_close(Rows.from_trace(trace).log_prob(trace), expected)


@pytest.mark.parametrize("dim", [-3, -5])
def test_particles_lead(dim):
    x = torch.randn(4, 3)
    trace = traced(nested, x, particles=(5, dim))
    rows = Rows.from_trace(trace, ignore={"particles"})
    assert (rows.names, rows.shape, rows.nesting) == (("data",), (4,), 2)
    h = trace.nodes["h"]["value"].reshape(5, 4, 1)
    log_prob = rows.log_prob(trace)
    assert log_prob.shape == (5, *[1] * (-dim - 3), 4)
    torch.testing.assert_close(log_prob.reshape(5, 4), normal(h)[..., 0] + normal(x, h).sum(-1))


def test_sites_of_a_guide_count_too():
    def guide():
        pyro.sample("joint", dist.Normal(torch.zeros(4), 1.0).to_event(1), infer={"is_auxiliary": True})

    model_trace = traced(nested, torch.randn(4, 3))
    assert Rows.from_trace(model_trace, traced(guide)).shape == ()
    assert Rows.from_trace(model_trace, traced(nested, torch.randn(4, 3))).shape == (4,)


def test_deterministic_values_are_no_sites_and_factors_are():
    def model():
        loc = pyro.deterministic("loc", torch.tensor(1.0))
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Normal(loc, 1.0))
            pyro.factor("f", -(h**2))
            pyro.sample("v", dist.Normal(h, 1.0).mask(torch.tensor([True, False, True])), obs=torch.zeros(3))

    trace = traced(model)
    sites = dict(sample_sites(trace))
    assert list(sites) == ["h", "f", "v"]
    assert [name for name, site in sites.items() if is_factor(site)] == ["f"]
    assert [name for name, site in sites.items() if is_visible(site)] == ["v"]
    assert not is_visible(trace.nodes["loc"])
    h = trace.nodes["h"]["value"]
    expected = normal(h, 1.0) - h**2 + normal(torch.zeros(3), h) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(Rows.from_trace(trace).log_prob(trace), expected)


def test_a_value_without_a_row_dimension_is_spread_over_the_rows():
    rows = Rows(("data",), (-2,), torch.Size([4]), 1.0, 2)
    assert torch.equal(rows.sum_to_rows(torch.tensor(2.0)), torch.full((4,), 2.0))
    assert torch.equal(rows.sum_to_rows(torch.ones(3)), torch.full((4,), 3.0))
    assert torch.equal(rows.sum_to_rows(torch.ones(5, 1, 3)), torch.full((5, 4), 3.0))


def test_an_empty_trace_has_probability_one():
    rows = Rows(("data",), (-1,), torch.Size([4]), 1.0, 1)
    assert torch.equal(rows.log_prob(poutine.trace(lambda: None).get_trace()), torch.zeros(4))
