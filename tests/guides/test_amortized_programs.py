"""`Amortized` on programs of other shapes: which sites are read, in which order, at which batch sizes."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.guides import Amortized
from pyro_ext.guides.encoders import MLP
from pyro_ext.models import SigmoidBeliefNetwork
from tests.guides.test_amortized import log_q, randomise, set_up
from tests.oracles.enumeration import bernoulli_log_prob, binary_states

pytestmark = pytest.mark.usefixtures("float64")


def sizes(guide):
    return {name: (e.linear.in_features, e.linear.out_features) for name, e in guide.encoders.named_children()}


def three_layers():
    model = SigmoidBeliefNetwork([2, 2, 3, 4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_three_layers_are_read_from_the_bottom_up():
    model = three_layers()
    v = model.dream(3)
    guide = set_up(model, v)
    assert [site.name for site in guide.order] == ["h1", "h2", "h3"]
    assert sizes(guide) == {"h1": (4, 3), "h2": (3, 2), "h3": (2, 2)}
    for N in (3, 1, 5):
        v = model.dream(N)
        posterior = guide.posterior(v)
        total = torch.zeros(N)
        for s1, s2, s3 in itertools.product(binary_states(3), binary_states(2), binary_states(2)):
            values = {"h1": s1.expand(N, 3), "h2": s2.expand(N, 2), "h3": s3.expand(N, 2)}
            wanted = [
                bernoulli_log_prob(values[name], getattr(guide.encoders, name)(read))
                for name, read in (("h1", v), ("h2", values["h1"]), ("h3", values["h2"]))
            ]
            joint = posterior.log_prob({k: x[None] for k, x in values.items()}).squeeze(0)
            torch.testing.assert_close(joint, sum(wanted).detach())
            total = total + joint.exp()
        found = log_q(guide, values, v)
        for value, name in zip(wanted, ("h1", "h2", "h3"), strict=True):
            torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(total, torch.ones(N))


def test_a_latent_with_a_visible_child_and_a_latent_one_reads_both():
    """Two visible sites at different heights: h2 is seen in y directly and in x through h1."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(0.4).expand([2]).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=h2 @ torch.ones(2, 3)).to_event(1))
            pyro.sample("x", dist.Normal(h1.sum(-1), 1.0), obs=x)
            pyro.sample("y", dist.Normal(h2, 1.0).to_event(1), obs=y)

    x, y = torch.randn(4), torch.randn(4, 2)
    guide = set_up(model, x, y)
    assert sizes(guide) == {"h1": (1, 3), "h2": (5, 2)}
    with pyro.plate("particles", 6, dim=-2):
        trace = poutine.trace(guide).get_trace(x, y)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name] for name in ("h1", "h2"))
    assert h2["value"].shape == (6, 4, 2)
    read = torch.cat([h1["value"], y.expand(6, 4, 2)], -1)
    torch.testing.assert_close(h2["log_prob"], bernoulli_log_prob(h2["value"], guide.encoders.h2(read)))
    torch.testing.assert_close(h1["log_prob"], bernoulli_log_prob(h1["value"], guide.encoders.h1(x[:, None])))


def test_latents_in_a_plate_that_the_data_do_not_share():
    """The program is one row, which holds all three units."""

    def model(v):
        with pyro.plate("units", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True).expand(h.shape[:-1] + (2,)), 1.0).to_event(1), obs=v)

    v, h = torch.randn(2), torch.randn(3)
    guide = set_up(model, v)
    assert sizes(guide) == {"h": (2, 6)}
    mean, log_scale = guide.encoders.h(v[None]).reshape(3, 2).T
    torch.testing.assert_close(log_q(guide, {"h": h}, v)["h"], dist.Normal(mean, log_scale.exp()).log_prob(h))
    torch.testing.assert_close(guide.posterior(v)["h"].mean, mean.detach())


def test_one_design_serves_every_layer_with_a_network_of_its_own():
    model = three_layers()
    v = model.dream(3)
    guide = Amortized(model, MLP((7,)))
    guide.setup(v)
    networks = [network for _, network in guide.encoders.named_children()]
    assert len({id(network) for network in networks}) == 3
    assert guide(v)["h3"].shape == (3, 2)


def test_any_module_that_keeps_rows():
    """A network over sequences: the features of a row are folded out and in again."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(1, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            _, last = self.gru(x[..., None])
            return self.out(last.squeeze(0))

    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True).expand(h.shape[:-1] + (6,)), 1.0).to_event(1), obs=v)

    encoder = Recurrent()
    guide = Amortized(model, encoder)
    for N in (4, 9):
        v = torch.randn(N, 6)
        torch.testing.assert_close(guide.posterior(v)["h"].mean, encoder(v)[:, :2].detach())
        with pyro.plate("particles", 3, dim=-2):
            assert guide(v)["h"].shape == (3, N, 2)


def test_pyros_graph_of_the_guide():
    """What `pyro.render_model` draws: q(h1 | v) q(h2 | h1) q(h3 | h2), each in the plate of the rows."""
    model = three_layers()
    v = model.dream(3)
    guide = Amortized(model)
    guide.setup(v)
    found = get_model_relations(guide, (v,))
    assert found["sample_sample"] == {"h1": [], "h2": ["h1"], "h3": ["h2"]}
    assert found["plate_sample"] == {"data": ["h1", "h2", "h3"]}


def test_a_call_does_not_run_the_model():
    runs = []

    def model(v):
        runs.append(len(v))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.4).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    v = torch.randn(4, 1)
    guide = Amortized(model)
    guide.setup(v)
    runs.clear()
    for _ in range(3):
        guide(v + 1)
    assert not runs
    guide(torch.randn(7, 1))
    assert set(runs) == {7}


def test_data_are_looked_at_in_calls_only_while_validation_is_on():
    model = three_layers()
    v = model.dream(3)
    guide = set_up(model, v)
    bad = v.clone()
    bad[1, 2] = 0.5
    for call in (guide, guide.posterior):
        with pytest.raises(ValueError, match=r"Expected only 0 and 1 in v, but got 1 other values, the first 0.5"):
            call(bad)
    pyro.enable_validation(False)
    assert guide(bad)["h1"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"Expected only 0 and 1 in v"):
        guide.posterior(bad)


@pytest.mark.parametrize("particles", [1, 4])
def test_calls_can_be_traced(particles):
    model = three_layers()
    v, other = model.dream(5), model.dream(5)
    guide = randomise(set_up(model, v))
    pyro.enable_validation(False)

    def program(v):
        with poutine.block(), pyro.plate("particles", particles, dim=-2):
            trace = poutine.trace(guide).get_trace(v)
            trace.compute_log_prob()
        return tuple(trace.nodes[name][what] for name in ("h1", "h2", "h3") for what in ("value", "log_prob"))

    graph = make_fx(program)(v)
    for data in (v, other):
        pyro.set_rng_seed(3)
        eager = program(data)
        pyro.set_rng_seed(3)
        assert all(torch.equal(found, wanted) for found, wanted in zip(graph(data), eager, strict=True))
    assert not torch.equal(program(v)[1], program(other)[1])


@pytest.mark.parametrize("first_is_labelled", [True, False])
def test_another_set_of_latents_is_refused(first_is_labelled: bool) -> None:
    """A semi-supervised program: labels are seen in one call and latent in the other."""

    def model(v: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(v)):
            label = pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(len(v))), obs=y)
            h = pyro.sample("h", dist.Normal(torch.zeros(len(v), 2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1) + label, 1.0), obs=v)

    v, y = torch.randn(5), torch.ones(5)
    calls = [(v, y), (v,)] if first_is_labelled else [(v,), (v, y)]
    guide = Amortized(model)
    guide(*calls[0])
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(ValueError, match=r"Expected the latents \[.*\] of the first call, but got \[.*\]\. Give every"):
        guide(*calls[1])
    torch.testing.assert_close(dict(pyro.get_param_store().items()), before, rtol=0, atol=0)
