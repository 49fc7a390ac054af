from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import Normal as TorchNormal

from pyro_ext.wake_sleep import WakeSleep
from pyro_ext.weights import SelfNormalized, Uniform
from tests.oracles.wake_sleep import PHI, THETA, Network, expected_bound, expected_sleep, expected_wake_phi

pytestmark = pytest.mark.usefixtures("float64")


class Programs:
    """The network of the oracle as a Pyro program; both programs note what they drew or were given."""

    def __init__(self, network):
        self.network = network
        self.model_calls = []
        self.guide_calls = []

    def model(self, v):
        c, W, b = (pyro.param(n, getattr(self.network, n).clone()) for n in THETA)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=c).to_event(1))
            value = pyro.sample("v", dist.Bernoulli(logits=h @ W.T + b).to_event(1), obs=v)
        self.model_calls.append((value, h))
        return value

    def guide(self, v):
        R, r = (pyro.param(n, getattr(self.network, n).clone()) for n in PHI)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=v @ R.T + r).to_event(1))
        self.guide_calls.append((v, h))


def gradients(elbo, model, guide, *args, **kwargs):
    """The loss and the gradient of every parameter in the store."""
    for parameter in pyro.get_param_store()._params.values():
        parameter.grad = None
    loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    store = pyro.get_param_store()._params
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in store.items()}


def assert_near(samples, expected, k=5.0):
    """The mean of independent samples (first dimension) is within k standard errors of what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= k * error + 1e-9).all(), (samples.mean(0), expected, error)


# ------------------------------------------------------------------------------------- the same draws


@pytest.mark.parametrize(
    ("num_particles", "weights", "insomnia"),
    [
        (1, SelfNormalized(), 0.0),
        (3, SelfNormalized(), 0.0),
        (3, SelfNormalized(), 1.0),
        (3, SelfNormalized(), 0.3),
        (1, Uniform(), 0.0),
        (3, Uniform(), 0.0),
    ],
)
def test_gradient_equals_the_one_on_paper_on_the_same_draws(num_particles, weights, insomnia):
    network = Network.random(num_visible=4, num_latents=3)
    programs = Programs(network)
    v = torch.rand(5, 4).round()
    elbo = WakeSleep(num_particles, weights, insomnia, max_plate_nesting=1)
    loss, grads = gradients(elbo, programs.model, programs.guide, v)

    h = programs.guide_calls[0][1].detach().reshape(num_particles, 5, 3)
    log_w = network.log_p(v, h) - network.log_q(v, h)
    if isinstance(weights, Uniform):
        bound, W = log_w.mean(0), torch.full_like(log_w, 1 / num_particles)
    else:
        bound, W = log_w.exp().mean(0).log(), log_w.exp() / log_w.exp().sum(0)
    assert loss == pytest.approx(-bound.sum().item(), rel=1e-12)

    expected = network.theta_gradient(v, h, W)
    wake = network.phi_gradient(v, h, W)
    if insomnia < 1:
        dreamt_v, dreamt_h = programs.guide_calls[1]
        assert len(programs.guide_calls) == 2
        assert any(torch.equal(a, dreamt_v) and torch.equal(b, dreamt_h) for a, b in programs.model_calls)
        assert not torch.equal(dreamt_v, v)
        sleep = network.phi_gradient(dreamt_v, dreamt_h.unsqueeze(0), torch.ones(1, 5))
        expected |= {n: insomnia * wake[n] + (1 - insomnia) * sleep[n] for n in PHI}
        torch.testing.assert_close(elbo.last_sleep_loss, -network.log_q(dreamt_v, dreamt_h).sum())
    else:
        expected |= wake
        assert elbo.last_sleep_loss is None
    for name, grad in grads.items():
        torch.testing.assert_close(grad, -expected[name], rtol=1e-10, atol=1e-10)


class Inject(Messenger):
    """Give latent site "h" prepared draws, shape (K, N, H): all at once, or one particle a run of the guide."""

    def __init__(self, draws, one_by_one):
        super().__init__()
        self.draws = iter(draws) if one_by_one else iter([draws])

    def _pyro_sample(self, msg):
        if msg["name"] == "h" and msg["value"] is None:
            msg["value"] = next(self.draws)


@pytest.mark.parametrize("weights", [SelfNormalized(), Uniform()])
def test_the_loop_equals_the_plate_on_the_same_draws(weights):
    programs = Programs(Network.random(4, 3))
    v, draws = torch.rand(5, 4).round(), torch.rand(3, 5, 3).round()
    insomnia = 1.0 if isinstance(weights, SelfNormalized) else 0.0
    results = []
    for vectorize in (True, False):
        elbo = WakeSleep(3, weights, insomnia, vectorize_particles=vectorize, max_plate_nesting=1)
        with Inject(draws, not vectorize):
            results.append(elbo.loss(programs.model, programs.guide, v))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_the_loop_has_the_gradient_of_the_plate_on_the_same_draws():
    programs = Programs(Network.random(4, 3))
    v, draws = torch.rand(5, 4).round(), torch.rand(3, 5, 3).round()
    results = []
    for vectorize in (True, False):
        elbo = WakeSleep(3, insomnia=1.0, vectorize_particles=vectorize, max_plate_nesting=1)
        with Inject(draws, not vectorize):
            results.append(gradients(elbo, programs.model, programs.guide, v))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name])


def plates_and_masks(x, mask, batch_size):
    """A latent a row, pixels in an inner plate, some of them masked, the rows subsampled."""
    mu, w = pyro.param("mu", torch.tensor(0.3)), pyro.param("w", torch.tensor(0.8))
    with pyro.plate("data", len(x), subsample_size=batch_size, dim=-2) as ind:
        h = pyro.sample("h", dist.Normal(mu, 1.0))
        with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=mask[ind]):
            pyro.sample("v", dist.Normal(w * h, 1.0), obs=x[ind])


class PlatesGuide:
    def __init__(self):
        self.calls = []

    def __call__(self, x, mask, batch_size):
        a, c = pyro.param("a", torch.tensor(0.4)), pyro.param("c", torch.tensor(-0.1))
        with pyro.plate("data", len(x), subsample_size=batch_size, dim=-2) as ind:
            mean = x[ind].mean(-1, keepdim=True)
            h = pyro.sample("h", dist.Normal(a * mean + c, 1.0))
        self.calls.append((x, ind, mean, h.detach()))


@pytest.mark.parametrize("vectorize", [True, False], ids=["plate", "loop"])
@pytest.mark.parametrize("batch_size", [None, 4], ids=["full", "subsampled"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_nested_plates_masks_and_subsampling(masked, batch_size, vectorize):
    x = torch.randn(8, 5)
    mask = torch.rand(8, 5) < 0.6 if masked else torch.ones(8, 5, dtype=torch.bool)
    guide, K, B = PlatesGuide(), 3, batch_size or 8
    elbo = WakeSleep(K, insomnia=0.25, max_plate_nesting=2, vectorize_particles=vectorize)
    loss, grads = gradients(elbo, plates_and_masks, guide, x, mask, batch_size)

    wake = guide.calls[:1] if vectorize else guide.calls[:K]
    ind, mean = wake[0][1], wake[0][2].squeeze(-1)
    assert all(torch.equal(ind, call[1]) for call in wake)
    h = torch.cat([call[3].reshape(-1, B) for call in wake])
    data, seen = x[ind], mask[ind]

    def log_normal(value, loc):
        return -0.5 * (value - loc) ** 2 - 0.5 * math.log(2 * math.pi)

    pixels = torch.where(seen, log_normal(data, 0.8 * h.unsqueeze(-1)), 0.0).sum(-1)
    log_q = log_normal(h, 0.4 * mean - 0.1)
    log_w = log_normal(h, torch.tensor(0.3)) + pixels - log_q
    scale = 8 / B
    assert loss == pytest.approx(-scale * log_w.exp().mean(0).log().sum().item(), rel=1e-10)

    W = log_w.softmax(0)
    error = torch.where(seen, data - 0.8 * h.unsqueeze(-1), 0.0).sum(-1)
    _, dreamt_ind, dreamt_mean, dreamt_h = guide.calls[-1]
    dreamt_error = (dreamt_h - (0.4 * dreamt_mean - 0.1)).reshape(B)
    phi_error = h - (0.4 * mean - 0.1)
    expected = {
        "mu": (W * (h - 0.3)).sum(),
        "w": (W * error * h).sum(),
        "a": 0.25 * (W * phi_error * mean).sum() + 0.75 * (dreamt_error * dreamt_mean.reshape(B)).sum(),
        "c": 0.25 * (W * phi_error).sum() + 0.75 * dreamt_error.sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], -scale * value, rtol=1e-9, atol=1e-9)

    dreamt_x = guide.calls[-1][0]
    assert not torch.isin(dreamt_x, x).any()
    torch.testing.assert_close(dreamt_x[dreamt_ind].mean(-1, keepdim=True), dreamt_mean)


def test_a_program_without_a_common_plate_is_one_row_with_scales_kept():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        mu = pyro.sample("mu", dist.Normal(loc, 1.0))
        with pyro.plate("schools", len(x), subsample_size=2) as ind:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("v", dist.Normal(theta, 1.0), obs=x[ind])

    draws = []

    def guide(x):
        a = pyro.param("a", torch.tensor(0.1))
        mu = pyro.sample("mu", dist.Normal(a, 1.0))
        with pyro.plate("schools", len(x), subsample_size=2) as ind:
            theta = pyro.sample("theta", dist.Normal(x[ind], 1.0))
        draws.append((ind, mu.detach(), theta.detach()))

    x = torch.randn(6)
    loss, grads = gradients(WakeSleep(4, insomnia=1.0, max_plate_nesting=1), model, guide, x)
    ((ind, mu, theta),) = draws
    assert mu.shape == (4, 1)
    normal = TorchNormal(0.0, 1.0)
    log_p = normal.log_prob(mu - 0.5)[:, 0] + 3 * (normal.log_prob(theta - mu) + normal.log_prob(x[ind] - theta)).sum(
        -1
    )
    log_q = normal.log_prob(mu - 0.1)[:, 0] + 3 * normal.log_prob(theta - x[ind]).sum(-1)
    log_w = log_p - log_q
    assert loss == pytest.approx(-log_w.exp().mean().log().item(), rel=1e-10)
    torch.testing.assert_close(grads["loc"], -(log_w.softmax(0) * (mu[:, 0] - 0.5)).sum())
    torch.testing.assert_close(grads["a"], -(log_w.softmax(0) * (mu[:, 0] - 0.1)).sum())


def test_no_gradient_flows_through_the_draws():
    def model(v):
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Normal(0.0, 1.0))
            h1 = pyro.sample("h1", dist.Normal(h2, 1.0))
            pyro.sample("v", dist.Normal(h1, 1.0), obs=v)

    draws = []

    def guide(v):
        m, s = pyro.param("m", torch.tensor(0.2)), pyro.param("s", torch.tensor(0.7))
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", dist.Normal(m * v, 1.0))
            h2 = pyro.sample("h2", dist.Normal(s * h1, 1.0))
        draws.append((h1, h2))

    v = torch.randn(4)
    _, grads = gradients(WakeSleep(3, insomnia=1.0, max_plate_nesting=1), model, guide, v)
    ((h1, h2),) = draws
    assert not h1.requires_grad
    normal = TorchNormal(0.0, 1.0)
    log_p = normal.log_prob(h2) + normal.log_prob(h1 - h2) + normal.log_prob(v - h1)
    W = (log_p - normal.log_prob(h1 - 0.2 * v) - normal.log_prob(h2 - 0.7 * h1)).softmax(0).detach()
    torch.testing.assert_close(grads["m"], -(W * (h1 - 0.2 * v) * v).sum())
    torch.testing.assert_close(grads["s"], -(W * (h2 - 0.7 * h1) * h1).sum())


# ------------------------------------------------------------------------------------- in expectation

PATTERNS = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def expected_gradients(network, num_particles, weights, insomnia):
    """Gradient of the target and -bound, summed over the three patterns, by enumeration."""
    parameters = {n: p.requires_grad_(True) for n, p in network.parameters().items()}
    log_p, log_q = network.tables(PATTERNS)
    loss = -expected_bound(log_p, log_q, num_particles, isinstance(weights, SelfNormalized)).sum()
    total = loss
    if insomnia > 0:
        total = total + insomnia * expected_wake_phi(log_p, log_q, num_particles).sum()
    if insomnia < 1:
        total = total + (1 - insomnia) * len(PATTERNS) * expected_sleep(network)
    grads = torch.autograd.grad(total, list(parameters.values()))
    for p in parameters.values():
        p.requires_grad_(False)
    return loss.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize(
    ("num_particles", "weights", "insomnia", "num_dreams"),
    [
        (1, SelfNormalized(), 0.0, None),
        (2, SelfNormalized(), 0.0, None),
        (2, SelfNormalized(), 1.0, None),
        (3, SelfNormalized(), 1.0, None),
        (3, SelfNormalized(), 0.5, None),
        (2, Uniform(), 0.0, None),
        (1, SelfNormalized(), 0.0, 700),
        (2, SelfNormalized(), 0.3, 200),
    ],
)
def test_gradient_equals_the_target_of_k_particles_in_expectation(num_particles, weights, insomnia, num_dreams):
    network = Network.random(num_visible=2, num_latents=2)
    programs = Programs(network)
    repeats, calls = 100, 40
    v = PATTERNS.repeat(repeats, 1)
    elbo = WakeSleep(num_particles, weights, insomnia, num_dreams, max_plate_nesting=1)
    results = [gradients(elbo, programs.model, programs.guide, v) for _ in range(calls)]
    loss, grads = expected_gradients(network, num_particles, weights, insomnia)
    assert_near(torch.tensor([loss for loss, _ in results]) / repeats, loss)
    for name, expected in grads.items():
        assert_near(torch.stack([g[name] for _, g in results]) / repeats, expected)


def test_the_loop_equals_the_target_in_expectation():
    network = Network.random(2, 2)
    programs = Programs(network)
    elbo = WakeSleep(2, insomnia=0.5, vectorize_particles=False)
    results = [gradients(elbo, programs.model, programs.guide, PATTERNS.repeat(100, 1)) for _ in range(40)]
    loss, grads = expected_gradients(network, 2, SelfNormalized(), 0.5)
    assert_near(torch.tensor([loss for loss, _ in results]) / 100, loss)
    for name, expected in grads.items():
        assert_near(torch.stack([g[name] for _, g in results]) / 100, expected)


def test_the_bound_of_a_batch_is_the_sum_of_the_rows_bounds_which_pyros_is_not():
    network = Network.random(3, 2)
    programs = Programs(network)
    v = torch.rand(100, 3).round()
    expected = -expected_bound(*network.tables(v), 4, self_normalized=True).sum()
    ours = WakeSleep(4, max_plate_nesting=1)
    batch = torch.tensor([ours.loss(programs.model, programs.guide, v) for _ in range(60)])
    rows = torch.tensor([[ours.loss(programs.model, programs.guide, row[None]) for row in v] for _ in range(4)])
    pyros = ReweightedWakeSleep(num_particles=4, insomnia=1.0, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([float(pyros.loss(programs.model, programs.guide, v)[0]) for _ in range(60)])
    assert_near(batch, expected)
    assert (rows.sum(1).mean() - expected).abs() < 5 * batch.std() / 2
    assert theirs.mean() - expected > 10 * theirs.std() / math.sqrt(60)


# ------------------------------------------------------------------------------------- use


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)
        self.prior = nn.Parameter(torch.zeros(2))

    def forward(self, v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=v.reshape(-1, 6))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 2)

    def forward(self, v):
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(logits=self.encoder(v.reshape(-1, 6))).to_event(1))


@pytest.mark.parametrize(
    "loss",
    [WakeSleep(), WakeSleep(4, insomnia=1.0), WakeSleep(4, insomnia=0.5), WakeSleep(3, Uniform(), num_dreams=7)],
    ids=["sleep", "wake", "half", "uniform"],
)
def test_svi_learns_with_it(loss):
    model, guide = Model(), Guide()
    v = torch.zeros(40, 2, 3)
    v[:20, 0] = 1.0
    v[20:, 1] = 1.0
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    before = {n: p.clone() for n, p in [*model.named_parameters(), *guide.named_parameters()]}
    first = svi.evaluate_loss(v)
    steps = [svi.step(v) for _ in range(250)]
    assert all(isinstance(value, float) for value in (first, *steps))
    assert all((p != before[n]).any() for n, p in [*model.named_parameters(), *guide.named_parameters()])
    # Half the rows are of either kind: the entropy is 40 log 2 = 27.7 nats, and 6 fair coins a row cost 166.
    assert first > 140
    assert svi.evaluate_loss(v) < 80


def test_evaluating_changes_nothing():
    programs = Programs(Network.random(4, 3))
    elbo = WakeSleep()
    _, grads = gradients(elbo, programs.model, programs.guide, torch.zeros(3, 4))
    sleep = elbo.last_sleep_loss
    loss = elbo.loss(programs.model, programs.guide, torch.zeros(3, 4))
    assert isinstance(loss, float)
    assert elbo.last_sleep_loss is sleep
    for name, parameter in pyro.get_param_store()._params.items():
        assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
def test_the_differentiable_loss_is_the_same_estimator(insomnia):
    programs = Programs(Network.random(4, 3))
    elbo, v = WakeSleep(3, insomnia=insomnia), torch.rand(5, 4).round()
    elbo.loss(programs.model, programs.guide, v)
    pyro.set_rng_seed(3)
    loss, grads = gradients(elbo, programs.model, programs.guide, v)
    pyro.set_rng_seed(3)
    value = elbo.differentiable_loss(programs.model, programs.guide, v)
    assert value.shape == ()
    assert value.item() == pytest.approx(loss, rel=1e-12)
    store = pyro.get_param_store()._params
    for name, grad in zip(store, torch.autograd.grad(value, list(store.values()), allow_unused=True), strict=True):
        torch.testing.assert_close(grad, grads[name])


def test_it_is_a_module_like_other_elbos():
    model, guide = Model(), Guide()
    module = WakeSleep(3, insomnia=0.5)(model, guide)
    module(torch.ones(4, 2, 3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_finding_the_nesting_of_plates_changes_no_draw():
    programs = Programs(Network.random(4, 3))
    v, losses = torch.rand(5, 4).round(), []
    for nesting in (1, math.inf):
        pyro.set_rng_seed(4)
        losses.append(WakeSleep(3, max_plate_nesting=nesting).loss(programs.model, programs.guide, v))
    assert losses[0] == losses[1]


def test_sleep_leaves_the_gradient_of_theta_alone():
    programs = Programs(Network.random(4, 3))
    v = torch.rand(5, 4).round()
    grads = []
    for insomnia in (1.0, 0.4, 0.0):
        pyro.set_rng_seed(5)
        grads.append(
            gradients(WakeSleep(2, insomnia=insomnia, max_plate_nesting=1), programs.model, programs.guide, v)[1]
        )
    for name in THETA:
        assert torch.equal(grads[0][name], grads[1][name])
        assert torch.equal(grads[0][name], grads[2][name])


@pytest.mark.parametrize(("num_dreams", "passes"), [(None, 1), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_dreams_are_counted_in_rows(num_dreams, passes):
    programs = Programs(Network.random(4, 3))
    WakeSleep(num_dreams=num_dreams).loss_and_grads(programs.model, programs.guide, torch.zeros(4, 4))
    assert len(programs.guide_calls) == 1 + passes


def test_nothing_is_dreamt_without_sleep():
    programs = Programs(Network.random(4, 3))
    v = torch.rand(5, 4).round()
    elbo = WakeSleep(2, insomnia=1.0, max_plate_nesting=1)
    elbo.loss_and_grads(programs.model, programs.guide, v)
    assert len(programs.model_calls) == 1
    assert all(torch.equal(value, v) for value, _ in (*programs.model_calls, *programs.guide_calls))
    assert elbo.last_sleep_loss is None


def test_the_observations_keyword_takes_the_dreams():
    network = Network.random(2, 2)
    programs = Programs(network)
    given = []

    def guide(v, observations=None):
        given.append(observations)
        programs.guide(v if observations is None else observations["v"])

    v = PATTERNS.repeat(100, 1)
    elbo = WakeSleep(2, insomnia=0.5, num_dreams=500)
    results = [gradients(elbo, programs.model, guide, v) for _ in range(40)]
    assert all((o is None) == (i % 3 == 0) for i, o in enumerate(given[1:]))
    _, grads = expected_gradients(network, 2, SelfNormalized(), 0.5)
    for name, expected in grads.items():
        assert_near(torch.stack([g[name] for _, g in results]) / 100, expected)


def test_observations_that_the_model_takes_too_are_an_argument():
    def model(observations):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=observations["x"])

    seen = []

    def guide(observations):
        seen.append(observations["x"])
        with pyro.plate("data", 3):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(1.0)) * observations["x"], 1.0))

    data = {"x": torch.randn(3)}
    WakeSleep().loss_and_grads(model, guide, data)
    assert torch.equal(seen[0], data["x"])
    assert not torch.isin(seen[1], data["x"]).any()


def test_a_named_argument_is_used():
    def model(x):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=2.0 * x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(1.0)) * x, 1.0))

    with pytest.raises(ValueError, match=r"carry the visible site 'v'.*visible="):
        WakeSleep().loss_and_grads(model, guide, torch.randn(3))
    assert not list(pyro.get_param_store())
    elbo = WakeSleep(visible={"v": "x"})
    elbo.loss_and_grads(model, guide, torch.randn(3))
    assert elbo.last_sleep_loss.isfinite()


def test_programs_without_parameters_need_no_backward():
    def model(v):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", 3):
            pyro.sample("h", dist.Normal(v, 1.0))

    assert math.isfinite(WakeSleep(2, insomnia=0.5).loss_and_grads(model, guide, torch.zeros(3)))


def test_impossible_particles_weigh_nothing():
    def model(v):
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", 200):
            h = pyro.sample("h", dist.Categorical(logits=torch.tensor([-math.inf, 0.4, 0.6])))
            pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)

    def guide(v):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 200):
            pyro.sample("h", dist.Categorical(logits=logits))

    elbo = WakeSleep(20, insomnia=0.5)
    loss, grads = gradients(elbo, model, guide, torch.ones(200))
    assert math.isfinite(loss)
    assert elbo.differentiable_loss(model, guide, torch.ones(200)).isfinite()
    assert all(g.isfinite().all() for g in grads.values())


def test_pyros_autonormal_is_taken_without_sleep():
    def model(v):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Gamma(2.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    guide = AutoNormal(model)
    _, grads = gradients(WakeSleep(5, insomnia=1.0), model, guide, torch.ones(3))
    assert all(g.any() for g in grads.values())
    with pytest.raises(ValueError, match=r"density at any dream, but got the auxiliary or Delta sites \['h', 'h_"):
        WakeSleep().loss_and_grads(model, guide, torch.ones(3))


# ------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_particles": 0}, ValueError, "num_particles to be a positive integer, but got 0"),
        ({"num_particles": 2.0}, TypeError, "num_particles to be a positive integer, but got 2.0"),
        ({"num_particles": True}, TypeError, "but got True"),
        ({"num_dreams": 0}, ValueError, "num_dreams to be a positive integer, but got 0"),
        ({"num_dreams": "all"}, TypeError, "num_dreams to be a positive integer"),
        ({"weights": "uniform"}, TypeError, "weights of class Weights, but got 'uniform'"),
        ({"num_particles": 2, "insomnia": 1.5}, ValueError, r"insomnia in \[0, 1\], but got 1.5"),
        ({"num_particles": 2, "insomnia": -0.1}, ValueError, r"insomnia in \[0, 1\]"),
        ({"num_particles": 2, "insomnia": math.nan}, ValueError, r"insomnia in \[0, 1\]"),
        ({"insomnia": 0.5}, ValueError, "insomnia=0 with one particle or equal weights"),
        ({"num_particles": 4, "weights": Uniform(), "insomnia": 1.0}, ValueError, "gradient of phi would be zero"),
    ],
)
def test_bad_settings_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        WakeSleep(**arguments)


def simple_model(v):
    w = pyro.param("w", torch.tensor(1.0))
    with pyro.plate("data", 3):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)


def simple_guide(v):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("data", 3):
        pyro.sample("h", dist.Normal(a * v, 1.0))


def extra_guide(v):
    simple_guide(v)
    pyro.sample("k", dist.Normal(0.0, 1.0))


def empty_guide(v):
    pyro.param("a", torch.tensor(1.0))


def delta_guide(v):
    with pyro.plate("data", 3):
        pyro.sample("h", dist.Delta(pyro.param("a", torch.tensor(1.0)) * v))


def other_dim_guide(v):
    with pyro.plate("data", 3, dim=-2):
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([3, 1]))


def factor_model(v):
    simple_model(v)
    pyro.factor("penalty", torch.tensor(-1.0))


def latent_model(v):
    with pyro.plate("data", 3):
        pyro.sample("h", dist.Normal(pyro.param("w", torch.tensor(1.0)), 1.0))


def binary_model(v):
    with pyro.plate("data", 3):
        h = pyro.sample("h", dist.Bernoulli(0.5))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


class Table(PyroModule):
    is_table = True

    def forward(self, v):
        simple_guide(v)


@pytest.mark.parametrize(
    ("model", "guide", "insomnia", "error", "match"),
    [
        (
            simple_model,
            empty_guide,
            1.0,
            ValueError,
            r"draws every latent site of the model, but got one without \['h'\]",
        ),
        (simple_model, extra_guide, 1.0, ValueError, r"latent sites of the model only, but got \['k'\] beside them"),
        (simple_model, delta_guide, 1.0, ValueError, r"got a Delta on the continuous sites \['h'\].*is -inf"),
        (simple_model, other_dim_guide, 1.0, ValueError, "plate 'data' at dim=-1, as in the model, but got dim=-2"),
        (latent_model, simple_guide, 1.0, ValueError, "a visible site, but got one in which nothing is observed"),
        (simple_model, Table(), 0.0, ValueError, "A sleep phase with a table is refused.*insomnia=1"),
        (
            factor_model,
            simple_guide,
            0.0,
            ValueError,
            r"got the pyro.factor sites \['penalty'\], which sampling ignores",
        ),
        (binary_model, delta_guide, 0.0, ValueError, r"the auxiliary or Delta sites \['h'\]"),
        (simple_model, poutine.trace(simple_guide).msngr, 1.0, TypeError, "got the messenger TraceMessenger"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "loss_and_grads", "differentiable_loss"])
def test_programs_that_do_not_fit_are_refused(model, guide, insomnia, error, match, method):
    elbo = WakeSleep(2, insomnia=insomnia)
    with pytest.raises(error, match=match):
        getattr(elbo, method)(model, guide, torch.ones(3))
    assert not list(pyro.get_param_store())


def test_a_table_and_a_factor_are_taken_without_sleep():
    assert math.isfinite(WakeSleep(2, insomnia=1.0).loss(factor_model, Table(), torch.ones(3)))


def test_a_dirac_on_discrete_sites_is_taken_without_sleep():
    def guide(v):
        with pyro.plate("data", 3):
            pyro.sample("h", dist.Delta((v > 0).to(v.dtype)))

    v = torch.tensor([1.0, -1.0, 2.0])
    loss = WakeSleep(2, insomnia=1.0).loss(binary_model, guide, v)
    expected = 3 * math.log(2.0) - TorchNormal((v > 0).to(v), 1.0).log_prob(v).sum()
    assert loss == pytest.approx(expected.item())


def test_pyros_autodelta_is_refused():
    with pytest.raises(ValueError, match=r"a Delta on the continuous sites \['h'\]"):
        WakeSleep(2, insomnia=1.0).loss(simple_model, AutoDelta(simple_model), torch.ones(3))
