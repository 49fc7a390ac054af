from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.guides import Amortized, DefaultEncoder
from pyro_ext.guides.encoders import default_hidden

pytestmark = pytest.mark.usefixtures("float64")


def test_it_starts_at_the_given_parameters_for_every_input():
    start = torch.randn(3)
    encoder = DefaultEncoder(5, 3, start, data=torch.randn(20, 5))
    assert torch.equal(encoder(10 * torch.randn(7, 5)), start.expand(7, 3))


def test_it_computes_a_linear_and_a_bent_path_of_the_standardised_input():
    data = 3 * torch.randn(50, 4) + 2
    encoder = DefaultEncoder(4, 2, torch.zeros(2), data=data)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    x = torch.randn(6, 4)
    z = (x - data.mean(0)) / ((data - data.mean(0)) ** 2).mean().sqrt()
    A, e = encoder.linear.weight, encoder.linear.bias
    B, C, d = encoder.output.weight, encoder.hidden.weight, encoder.hidden.bias
    torch.testing.assert_close(encoder(x), z @ A.T + e + torch.tanh(z @ C.T + d) @ B.T)


def test_every_parameter_learns():
    encoder = DefaultEncoder(4, 2, torch.zeros(2), data=torch.randn(50, 4))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    x = torch.randn(200, 4)
    target = torch.stack([x.sum(-1), (x[:, 0] * x[:, 1]).sin()], -1)
    first = (encoder(x) - target).square().mean()
    for _ in range(300):
        optimizer.zero_grad()
        loss = (encoder(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * first
    after = encoder.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == set(after) - {"mean", "scale"}


def test_an_input_that_never_varies_does_not_blow_up():
    for data in (torch.full((10, 3), 0.1), torch.randn(1, 3), torch.zeros(4, 3)):
        assert torch.equal(DefaultEncoder(3, 1, torch.zeros(1), data=data).scale, torch.ones(3))
    # One hardly varying input among others shares their scale.
    data = torch.randn(1000, 2) * torch.tensor([1.0, 1e-9])
    encoder = DefaultEncoder(2, 1, torch.zeros(1), data=data)
    assert encoder.scale[0] == encoder.scale[1]
    assert 0.5 < encoder.scale[0] < 1


def test_without_data_it_reads_the_input_as_it_is():
    encoder = DefaultEncoder(3, 2, torch.zeros(2))
    assert torch.equal(encoder.mean, torch.zeros(3))
    assert torch.equal(encoder.scale, torch.ones(3))


def test_leading_dimensions_and_a_single_row():
    encoder = DefaultEncoder(3, 2, torch.zeros(2), data=torch.randn(1, 3))
    assert encoder(torch.randn(5, 7, 3)).shape == (5, 7, 2)
    assert encoder(torch.randn(3)).shape == (2,)


@pytest.mark.parametrize(("inputs", "outputs", "width"), [(4, 2, 32), (64, 20, 84), (500, 12, 512), (5000, 100, 512)])
def test_the_hidden_width(inputs, outputs, width):
    assert default_hidden(inputs, outputs) == width
    assert DefaultEncoder(inputs, outputs, torch.zeros(outputs)).hidden.out_features == width


def test_a_guide_starts_at_the_prior_whatever_the_data():
    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.1, 0.7])).to_event(1))
            k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))
            loc = h @ torch.ones(2, 4) + k @ torch.ones(3, 4) + z[..., None]
            pyro.sample("v", dist.Normal(loc, 1.0).to_event(1), obs=v)

    posterior = Amortized(model).posterior(3 * torch.randn(6, 4))
    for name, probs in {"h": [0.1, 0.7], "k": [0.2, 0.3, 0.5], "z": [0.6, 0.4]}.items():
        torch.testing.assert_close(posterior[name].mean, torch.tensor(probs).expand(6, -1))


def test_it_takes_the_precision_of_the_program():
    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    for dtype in (torch.float32, torch.float64):
        guide = Amortized(model)
        assert guide.posterior(torch.randn(5, 1, dtype=dtype))["h"].mean.dtype == dtype
        assert {parameter.dtype for parameter in guide.parameters()} == {dtype}


def test_a_continuous_latent_starts_at_the_spread_of_its_prior() -> None:
    def model(v: torch.Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(1.0, 2.5).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    q = Amortized(model).posterior(torch.randn(6, 1))["h"].distribution
    torch.testing.assert_close(q.stddev, torch.full_like(q.stddev, 2.5))
