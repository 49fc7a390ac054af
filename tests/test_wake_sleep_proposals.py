from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_ext.guides import Amortized, MeanField
from pyro_ext.models import SigmoidBeliefNetwork
from pyro_ext.proposals import Defensive, FromGuide, Proposal
from pyro_ext.wake_sleep import WakeSleep
from pyro_ext.weights import Uniform

pytestmark = pytest.mark.usefixtures("float64")


def model(v):
    w = pyro.param("w", torch.tensor(1.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)


def guide(v):
    a, s = pyro.param("a", torch.tensor(0.5)), pyro.param("s", torch.tensor(0.3))
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Normal(a * v, s))


def log_normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


class Draws(pyro.poutine.messenger.Messenger):
    """Keep the values of site "h" of every run, in order."""

    def __init__(self):
        super().__init__()
        self.values = []

    def _pyro_post_sample(self, msg):
        if msg["name"] == "h":
            self.values.append(msg["value"])


@pytest.mark.parametrize(
    ("vectorize", "nesting"), [(True, 1), (True, 3), (False, 1)], ids=["plate", "plate far left", "loop"]
)
def test_weights_divide_by_the_density_of_the_mixture(vectorize, nesting):
    v = torch.randn(200)
    elbo = WakeSleep(3, insomnia=1.0, proposal=Defensive(0.4), vectorize_particles=vectorize, max_plate_nesting=nesting)
    with Draws() as draws:
        estimate = elbo.estimate(model, guide, (v,), {})
    # Each particle: the guide's draw, the prior's, and the mixture of both in guide and model.
    runs = [torch.cat([x.reshape(-1, 200) for x in draws.values[i::4]]) for i in range(4)]
    from_guide, from_prior, mixed, again = runs
    assert torch.equal(mixed, again)
    chosen = mixed == from_prior
    assert torch.equal(torch.where(chosen, from_prior, from_guide), mixed)
    assert chosen.double().mean().item() == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 600))
    h = mixed.detach()
    log_q, log_prior = log_normal(h, 0.5 * v, 0.3), log_normal(h, 0.0, 1.0)
    log_w = log_prior + log_normal(v, h, 1.0) - torch.logaddexp(math.log(0.6) + log_q, math.log(0.4) + log_prior)
    torch.testing.assert_close(estimate.log_weights, log_w)
    torch.testing.assert_close(estimate.log_guide, log_q)
    W = log_w.softmax(0)
    store = pyro.get_param_store()._params
    grads = dict(zip(store, torch.autograd.grad(estimate.surrogate, list(store.values())), strict=True))
    torch.testing.assert_close(grads["w"], -(W * (v - h) * h).sum())
    torch.testing.assert_close(grads["a"], -(W * (h - 0.5 * v) * v / 0.09).sum())


@pytest.mark.parametrize("vectorize", [True, False], ids=["plate", "loop"])
def test_one_coin_serves_all_latents_of_a_row(vectorize):
    """Under model and guide alike h1 copies h2, so that pairs of one origin agree."""

    def model(v):
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Bernoulli(0.5))
            h1 = pyro.sample("h1", dist.Bernoulli(0.001 + 0.998 * h2))
            pyro.sample("v", dist.Normal(h1, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", dist.Bernoulli(0.5))
            pyro.sample("h2", dist.Bernoulli(0.001 + 0.998 * h1))

    elbo = WakeSleep(3, insomnia=1.0, proposal=Defensive(0.5), vectorize_particles=vectorize)
    log_guide = elbo.estimate(model, guide, (torch.zeros(1000),), {}).log_guide
    assert (log_guide < -5).double().mean() < 0.01


def test_weights_stay_bounded_where_the_guide_is_far_off():
    v = torch.full((2000,), 0.5)

    def far(v):
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(pyro.param("far", torch.tensor(6.0)), 0.2))

    # w <= p(v | h) / share <= 1 / (share sqrt(2 pi)), and the guide's own draws weigh next to nothing.
    log_w = WakeSleep(5, insomnia=1.0, proposal=Defensive(0.25)).estimate(model, far, (v,), {}).log_weights
    assert log_w.max() <= -math.log(0.25) - 0.5 * math.log(2 * math.pi) + 1e-12
    w = log_w.exp().flatten()
    evidence = torch.distributions.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(0.5)).exp()
    assert (w.mean() - evidence).abs() < 5 * w.std() / math.sqrt(len(w))


def test_the_prior_draws_for_the_rows_that_the_guide_took():
    x = torch.tensor([1e-9, 1 - 1e-9] * 50)  # the prior of a row knows h

    def model(x, v):
        with pyro.plate("data", len(x), subsample_size=20) as ind:
            h = pyro.sample("h", dist.Bernoulli(x[ind]))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[ind])

    def guide(x, v):
        with pyro.plate("data", len(x), subsample_size=20):
            pyro.sample("h", dist.Bernoulli(logits=pyro.param("r", torch.zeros(()))))

    estimate = WakeSleep(400, insomnia=1.0, proposal=Defensive(0.9)).estimate(model, guide, (x, torch.zeros(100)), {})
    impossible = (estimate.log_weights < -10).double().mean(0)
    # One in twenty: half of the guide's tenth.
    assert (impossible - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
def test_layered_model_and_amortized_guide_learn_with_it(insomnia):
    v = (torch.rand(50, 6) < 0.5).double()
    v[:, 3:] = v[:, :3]
    model = SigmoidBeliefNetwork([2, 4, 6])
    guide = Amortized(model)
    elbo = WakeSleep(8, insomnia=insomnia, proposal=Defensive(0.2))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=elbo)
    first = svi.evaluate_loss(v)
    for _ in range(150):
        svi.step(v)
    assert svi.evaluate_loss(v) < first - 30


def test_the_guide_alone_is_the_default():
    assert WakeSleep().proposal == FromGuide()
    assert Defensive() == Defensive(0.2)
    with pytest.raises(TypeError, match="abstract"):
        Proposal()


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, math.nan, "half", True])
def test_shares_outside_are_refused(share):
    with pytest.raises(ValueError, match="share above 0 and below 1, but got"):
        Defensive(share)


def test_a_proposal_by_name_is_refused():
    with pytest.raises(TypeError, match="proposal of class Proposal, but got 'defensive'. Pass FromGuide"):
        WakeSleep(proposal="defensive")


def scaled_model(v):
    with pyro.plate("data", 3, dim=-2):
        pyro.sample("u", dist.Normal(0.0, 1.0), obs=v[:, :1])
        with pyro.plate("pixels", 4, subsample_size=2, dim=-1) as ind:
            h = pyro.sample("h", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[:, ind])


def scaled_guide(v):
    with pyro.plate("data", 3, dim=-2), pyro.plate("pixels", 4, subsample_size=2, dim=-1):
        pyro.sample("h", dist.Normal(pyro.param("a", torch.zeros(())), 1.0))


def branching_model(v):
    w = pyro.param("w", torch.tensor(1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    if k > 0:
        pyro.sample("more", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Normal(w * k, 1.0), obs=v)


def branching_guide(v):
    k = pyro.sample("k", dist.Bernoulli(logits=pyro.param("r", torch.tensor(0.0))))
    if k > 0:
        pyro.sample("more", dist.Normal(0.0, 1.0))


def test_scaled_latents_are_refused():
    with pytest.raises(ValueError, match=r"density for a Defensive proposal, but got the scaled site 'h'"):
        WakeSleep(2, insomnia=1.0, proposal=Defensive()).loss(scaled_model, scaled_guide, torch.zeros(3, 4))
    assert not list(pyro.get_param_store())


def test_sites_that_come_and_go_are_refused():
    elbo = WakeSleep(2, insomnia=1.0, vectorize_particles=False, proposal=Defensive(0.5))

    def losses():
        return [elbo.loss(branching_model, branching_guide, torch.tensor(0.3)) for _ in range(50)]

    with pytest.raises(ValueError, match=r"same latent sites.*changes in \['more'\].*FromGuide"):
        losses()
    assert math.isfinite(
        WakeSleep(2, insomnia=1.0, vectorize_particles=False).loss(branching_model, branching_guide, torch.tensor(0.3))
    )


def test_sites_that_only_the_mixture_has_are_refused():
    def draw(data, probs):
        with data:
            h = pyro.sample("h", dist.Bernoulli(probs))
            if h[0] == h[1]:
                pyro.sample("more", dist.Normal(0.0, 1.0))
        return h

    def model(v):
        data = pyro.plate("data", 2)
        h = draw(data, torch.tensor([0.0, 1.0]))
        with data:
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        draw(pyro.plate("data", 2), torch.tensor([1.0, 0.0]))

    elbo = WakeSleep(20, insomnia=1.0, vectorize_particles=False, proposal=Defensive(0.5))
    with pytest.raises(ValueError, match=r"same latent sites.*changes in \['more'\]"):
        elbo.loss(model, guide, torch.zeros(2))


def test_shapes_are_validated_as_by_pyro():
    def undeclared(v):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    elbo = WakeSleep(2, insomnia=1.0, vectorize_particles=False, proposal=Defensive())
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        elbo.loss(undeclared, guide, torch.zeros(3))


def test_a_guide_that_misses_a_site_is_refused_as_such():
    def empty(v):
        pyro.param("a", torch.tensor(1.0))

    elbo = WakeSleep(2, insomnia=1.0, proposal=Defensive(), max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"draws every latent site of the model, but got one without \['h'\]"):
        elbo.loss(model, empty, torch.zeros(3))
    assert not list(pyro.get_param_store())


def test_guides_without_a_density_are_refused():
    elbo = WakeSleep(2, insomnia=1.0, proposal=Defensive())
    with pytest.raises(ValueError, match=r"density at a Defensive proposal, but got the auxiliary or Delta sites"):
        elbo.loss(model, AutoNormal(model), torch.zeros(3))
    assert not list(pyro.get_param_store())


def test_a_table_serves_without_sleep():
    v = torch.tensor([0.0, 1.0, 3.0])

    def binary(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    table = MeanField(binary)
    estimate = WakeSleep(4000, insomnia=1.0, proposal=Defensive()).estimate(binary, table, (v,), {})
    w = estimate.log_weights.exp()
    evidence = 0.5 * (log_normal(v, 0.0, 1.0).exp() + log_normal(v, 1.0, 1.0).exp())
    assert ((w.mean(0) - evidence).abs() < 5 * w.std(0) / math.sqrt(len(w)) + 1e-12).all()


def test_equal_weights_give_the_bound_of_the_mixture():
    v = torch.zeros(1, 2000).squeeze(0)
    estimate = WakeSleep(4, Uniform(), proposal=Defensive(0.3)).estimate(model, guide, (v,), {})
    assert estimate.loss.item() == pytest.approx(-estimate.log_weights.mean(0).sum().item(), rel=1e-12)
    # KL(mixture || posterior) by quadrature, for the row v = 0: p(h | v) = N(0, 1/2).
    h = torch.linspace(-12, 12, 200_001)
    mixture = 0.7 * log_normal(h, 0.0, 0.3).exp() + 0.3 * log_normal(h, 0.0, 1.0).exp()
    expected = torch.trapezoid(mixture * (log_normal(h, 0.0, 1.0) + log_normal(0.0, h, 1.0) - mixture.log()), h)
    rows = estimate.log_weights.mean(0)
    assert (rows.mean() - expected).abs() < 5 * rows.std() / math.sqrt(len(rows))
