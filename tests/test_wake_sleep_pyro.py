"""What Pyro asks of its own `ReweightedWakeSleep`, asked of `WakeSleep` row by row.

Its tests come down to four demands: guides go to the posteriors of conjugate models, from reparametrised and other
families alike; gradients are right with either program fixed, for any insomnia; sleep teaches a guide that reads
``observations``; and valid programs (plates, nesting, sequential plates, subsamples) run while invalid ones are named.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing import fakes
from pyro.infer import SVI, ReweightedWakeSleep
from torch.distributions import constraints

from pyro_ext.proposals import Defensive
from pyro_ext.wake_sleep import WakeSleep
from pyro_ext.weights import Uniform

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------------- conjugate models


class Conjugate:
    """Three data sets of four observations, one a row; q's parameters are tables with a row each.

    Attributes:
        exact: parameters of the posterior of each row, shape (3, 1).
    """

    def __init__(self, family):
        self.family = family
        with torch.no_grad():
            getattr(self, f"set_{family}")()

    def set_normal(self):
        self.data = torch.tensor([[1.0, 2.0, 0.5, 1.5], [-1.0, 0.0, -0.5, 0.3], [0.0, 0.1, 4.0, 1.0]])
        self.prior = (dist.Normal, 0.0, 2.0)
        self.likelihood = lambda z: dist.Normal(z, 1.0)
        precision = torch.full((3, 1), 1 / 4 + 4.0)
        self.exact = {"loc": self.data.sum(1, keepdim=True) / precision, "scale": precision.rsqrt()}
        self.supports = {"loc": constraints.real, "scale": constraints.positive}

    def set_beta(self):
        self.data = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
        self.prior = (dist.Beta, 1.5, 2.0)
        self.likelihood = dist.Bernoulli
        ones = self.data.sum(1, keepdim=True)
        self.exact = {"a": 1.5 + ones, "b": 2.0 + 4 - ones}
        self.supports = {"a": constraints.positive, "b": constraints.positive}

    def set_gamma(self):
        self.data = torch.tensor([[1.0, 0.0, 3.0, 2.0], [5.0, 6.0, 4.0, 4.0], [0.0, 0.0, 1.0, 0.0]])
        self.prior = (dist.Gamma, 2.0, 1.0)
        self.likelihood = dist.Poisson
        self.exact = {"a": 2.0 + self.data.sum(1, keepdim=True), "b": torch.full((3, 1), 5.0)}
        self.supports = {"a": constraints.positive, "b": constraints.positive}

    def set_exponential(self):
        self.data = torch.tensor([[0.4, 0.1, 0.3, 0.2], [1.5, 2.0, 0.4, 0.9], [0.05, 0.1, 0.02, 0.2]])
        self.prior = (dist.Gamma, 3.0, 1.0)
        self.likelihood = dist.Exponential
        self.exact = {"a": torch.full((3, 1), 7.0), "b": 1.0 + self.data.sum(1, keepdim=True)}
        self.supports = {"a": constraints.positive, "b": constraints.positive}

    @property
    def log_evidence(self):
        """log p(data) of each row, as log p(z, data) - log p(z | data) at any z."""
        z = torch.tensor(0.5)
        kind, *values = self.prior
        posterior = kind(*self.exact.values()).log_prob(z).squeeze(1)
        return kind(*values).log_prob(z) + self.likelihood(z).log_prob(self.data).sum(1) - posterior

    def model(self, x):
        kind, *values = self.prior
        with pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", kind(*values))
            with pyro.plate("observations_of_a_row", x.shape[1], dim=-1):
                pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x, kind=None, off=0.0):
        kind = kind or self.prior[0]
        values = [
            pyro.param(name, self.exact[name] * (1 + off * (-1) ** i), constraint=self.supports[name])
            for i, name in enumerate(self.exact)
        ]
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("z", kind(*values))


FAMILIES = ["normal", "beta", "gamma", "exponential"]


@pytest.mark.parametrize("num_particles", [2, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_guide_gives_the_evidence_whatever_is_drawn_and_stays(family, num_particles):
    case = Conjugate(family)
    elbo = WakeSleep(num_particles, insomnia=1.0)
    estimate = elbo.estimate(case.model, case.guide, (case.data,), {})
    expected = case.log_evidence
    torch.testing.assert_close(elbo.weights.bound(estimate.log_weights), expected)
    assert estimate.loss.item() == pytest.approx(-expected.sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("family", "vectorize"), [*((family, True) for family in FAMILIES), ("normal", False), ("beta", False)]
)
def test_wake_phi_goes_to_the_posterior_of_each_row(family, vectorize):
    case = Conjugate(family)
    size = 40 if vectorize else 8

    def guide(x):
        case.guide(x, off=0.25)

    elbo = WakeSleep(size, insomnia=1.0, vectorize_particles=vectorize)
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.08}, "gamma": 0.97})
    svi = SVI(case.model, guide, optim, loss=elbo)
    kind = case.prior[0]
    svi.evaluate_loss(case.data)
    exact = kind(*case.exact.values())
    start = kind(*(pyro.param(name).detach().clone() for name in case.exact))
    for _ in range(130 if vectorize else 60):
        svi.step(case.data)
        optim.step()
    end = kind(*(pyro.param(name).detach() for name in case.exact))
    distance = [torch.distributions.kl_divergence(exact, q) for q in (start, end)]
    assert (distance[1] < (0.1 if vectorize else 0.35) * distance[0]).all(), distance


@pytest.mark.parametrize(
    ("family", "fake"),
    [
        ("normal", fakes.NonreparameterizedNormal),
        ("beta", fakes.NonreparameterizedBeta),
        ("gamma", fakes.NonreparameterizedGamma),
    ],
)
@pytest.mark.parametrize("insomnia", [0.0, 0.4, 1.0])
def test_reparametrised_or_not_is_the_same(family, fake, insomnia):
    grads = []
    for kind in (None, fake):
        pyro.clear_param_store()
        case = Conjugate(family)
        pyro.set_rng_seed(3)
        elbo = WakeSleep(4, insomnia=insomnia, max_plate_nesting=2)
        elbo.loss_and_grads(case.model, lambda x, case=case, kind=kind: case.guide(x, kind, 0.2), case.data)
        grads.append({name: p.grad for name, p in pyro.get_param_store()._params.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)
        assert grad.any()


def test_a_row_alone_has_the_loss_and_gradient_of_pyros_own():
    """With one row the whole batch is the row, and the two objectives coincide on the same draws."""
    case = Conjugate("normal")
    x = case.data[:1]

    def model(x):
        m = pyro.param("m", torch.tensor(0.3))
        with pyro.plate("rows", 1, dim=-2):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            with pyro.plate("inner", 4, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 1, dim=-2):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)), 0.8))

    results = []
    for elbo in (
        WakeSleep(6, insomnia=1.0, max_plate_nesting=2),
        ReweightedWakeSleep(num_particles=6, insomnia=1.0, max_plate_nesting=2),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        loss = elbo.loss_and_grads(model, guide, x)
        store = pyro.get_param_store()._params
        results.append((loss[0] if isinstance(loss, tuple) else loss, {n: p.grad.clone() for n, p in store.items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name])


def test_the_bound_tightens_with_particles_to_the_evidence():
    case = Conjugate("normal")
    means = []
    for num_particles in (1, 5, 500):
        elbo = WakeSleep(num_particles)
        losses = [elbo.loss(case.model, lambda x: case.guide(x, off=-0.4), case.data) for _ in range(100)]
        means.append(-sum(losses) / 100)
    evidence = case.log_evidence.sum().item()
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(evidence, abs=0.02)


# ------------------------------------------------------------------------------------- one program fixed


@pytest.mark.parametrize(
    "elbo", [WakeSleep(), WakeSleep(4, insomnia=0.5), WakeSleep(4, insomnia=1.0), WakeSleep(4, Uniform())]
)
@pytest.mark.parametrize("fixed", ["model", "guide"])
def test_either_program_may_be_fixed(elbo, fixed):
    def number(name, owner):
        return torch.tensor(0.3) if owner == fixed else pyro.param(name, torch.tensor(0.3))

    def model(v):
        with pyro.plate("data", 5):
            h = pyro.sample("h", dist.Bernoulli(logits=number("c", "model")))
            pyro.sample("v", dist.Normal(number("w", "model") * h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", 5):
            pyro.sample("h", dist.Bernoulli(logits=number("r", "guide") * v))

    elbo.max_plate_nesting = 2
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), loss=elbo)
    assert math.isfinite(svi.step(torch.randn(5)))
    assert set(pyro.get_param_store()) == ({"r"} if fixed == "model" else {"c", "w"})
    assert all((p != 0.3).all() for p in pyro.get_param_store().values())


# ------------------------------------------------------------------------------------- sleep


@pytest.mark.parametrize("insomnia", [0.0, 0.5])
def test_a_guide_that_reads_observations_learns_the_posterior_from_dreams(insomnia):
    """h ~ N(0, 1), v ~ N(h, 1): p(h | v) = N(v / 2, 1 / 2), whatever the data are."""

    def model(size):
        with pyro.plate("data", size):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=torch.linspace(-1.0, 3.0, size))

    def guide(size, observations=None):
        x = torch.linspace(-1.0, 3.0, size) if observations is None else observations["x"]
        a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(1.0))
        s = pyro.param("s", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("data", size):
            pyro.sample("h", dist.Normal(a * x + b, s))

    elbo = WakeSleep(8, insomnia=insomnia)
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.975})
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in range(150):
        svi.step(200)
        optim.step()
    assert pyro.param("a").item() == pytest.approx(0.5, abs=0.05)
    assert pyro.param("b").item() == pytest.approx(0.0, abs=0.05)
    assert pyro.param("s").item() == pytest.approx(math.sqrt(0.5), abs=0.05)


# ------------------------------------------------------------------------------------- valid programs


ELBOS = [
    WakeSleep(),
    WakeSleep(3, insomnia=0.5),
    WakeSleep(3, insomnia=0.5, vectorize_particles=False),
    WakeSleep(3, insomnia=1.0, proposal=Defensive()),
]


def fresh(elbo):
    return WakeSleep(
        elbo.num_particles, insomnia=elbo.insomnia, vectorize_particles=elbo.vectorize_particles, proposal=elbo.proposal
    )


def sequential(v, sample):
    for i in pyro.plate("steps", 3):
        sample(f"h_{i}", v[:, i])


def nested_sequential(v, sample):
    outer, inner = pyro.plate("outer", 2), pyro.plate("inner", 2)
    for i in outer:
        for j in inner:
            sample(f"h_{i}_{j}", v[:, 2 * i + j])


def reused_plate(v, sample):
    sample("first", v[:, 0])
    sample("second", v[:, 1])


@pytest.mark.parametrize("body", [sequential, nested_sequential, reused_plate])
@pytest.mark.parametrize("elbo", ELBOS, ids=["sleep", "half", "loop", "defensive"])
def test_sequential_and_reused_plates(elbo, body):
    v = torch.randn(4, 4)

    def model(v):
        w = pyro.param("w", torch.tensor(0.5))
        data = pyro.plate("data", 4)

        def sample(name, column):
            with data:
                h = pyro.sample(name, dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{name}", dist.Normal(w * h, 1.0), obs=column)

        body(v, sample)

    def guide(v):
        a = pyro.param("a", torch.tensor(0.5))
        data = pyro.plate("data", 4)

        def sample(name, column):
            with data:
                pyro.sample(name, dist.Normal(a * column, 1.0))

        body(v, sample)

    elbo = fresh(elbo)
    estimate = elbo.estimate(model, guide, (v,), {})
    assert estimate.log_weights.shape == (elbo.num_particles, 4)
    assert all(
        g.isfinite() and g != 0
        for g in torch.autograd.grad(estimate.surrogate, pyro.get_param_store()._params.values())
    )


@pytest.mark.parametrize("subsample", [False, True], ids=["full", "subsample"])
@pytest.mark.parametrize("elbo", ELBOS, ids=["sleep", "half", "loop", "defensive"])
def test_a_latent_outside_the_inner_plate_and_one_inside(elbo, subsample):
    v = torch.randn(6, 5)
    size = 3 if subsample else 6

    def model(v):
        with pyro.plate("rows", 6, subsample_size=size, dim=-2) as ind:
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
            with pyro.plate("columns", 5, dim=-1):
                y = pyro.sample("y", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(y, 1.0), obs=v[ind])

    def guide(v):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("rows", 6, subsample_size=size, dim=-2) as ind:
            pyro.sample("z", dist.Normal(a * v[ind].mean(-1, keepdim=True), 1.0))
            with pyro.plate("columns", 5, dim=-1):
                pyro.sample("y", dist.Normal(a * v[ind], 1.0))

    elbo = fresh(elbo)
    estimate = elbo.estimate(model, guide, (v,), {})
    assert estimate.log_weights.shape == (elbo.num_particles, size)
    assert all(
        g.isfinite() and g != 0
        for g in torch.autograd.grad(estimate.surrogate, pyro.get_param_store()._params.values())
    )


def test_vectorised_particles_stand_left_of_all_plates():
    shapes = []

    def model(v):
        with pyro.plate("rows", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("columns", 4, dim=-1):
                x = pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=v)
        shapes.append((z.shape, x.shape))

    def guide(v):
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(3)), 1.0).to_event(1))

    WakeSleep(7, insomnia=1.0).loss(model, guide, torch.randn(2, 4))
    assert shapes[-1] == ((7, 2, 1, 3), (2, 4))


def test_programs_that_index_by_a_latent_are_served_one_particle_at_a_time():
    """``table[int(k)]`` cannot be vectorised; the loop serves it."""
    table = [0.0, 1.0, 3.0]

    def model(v):
        w = pyro.param("w", torch.tensor(1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("v", dist.Normal(w * table[int(k)], 1.0), obs=v)

    def guide(v):
        pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))

    v = torch.tensor(2.5)
    with pytest.raises(ValueError, match="only one element tensors can be converted"):
        WakeSleep(5, insomnia=1.0).loss(model, guide, v)
    elbo = WakeSleep(300, insomnia=1.0, vectorize_particles=False)
    log_p = math.log(1 / 3) + dist.Normal(torch.tensor(table), 1.0).log_prob(v)
    estimate = elbo.estimate(model, guide, (v,), {})
    w = estimate.log_weights.exp()
    assert (w.mean() - log_p.exp().sum()).abs() < 5 * w.std() / math.sqrt(300)
    (grad,) = torch.autograd.grad(estimate.surrogate, [pyro.get_param_store()._params["logits"]])
    # The cross entropy of posterior and q falls towards the posterior: -(p(k | v) - q(k)).
    torch.testing.assert_close(grad, 1 / 3 - log_p.softmax(0), atol=0.12, rtol=0)


def test_marks_for_enumeration_change_nothing():
    losses = []
    for infer in ({}, {"enumerate": "parallel"}):

        def model(v):
            with pyro.plate("data", 5):
                h = pyro.sample("h", dist.Bernoulli(0.3))
                pyro.sample("v", dist.Normal(h, 1.0), obs=v)

        def guide(v, infer=infer):
            with pyro.plate("data", 5):
                pyro.sample("h", dist.Bernoulli(0.5), infer=infer)

        pyro.set_rng_seed(7)
        losses.append(WakeSleep(4).loss(model, guide, torch.linspace(0, 1, 5)))
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------- invalid programs


def good_guide(v):
    with pyro.plate("data", 4):
        pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))


def model_of_wrong_shape(v):
    with pyro.plate("data", 4):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Normal(h, 1.0), obs=v)  # no plate declares its batch


def model_of_other_size(v):
    with pyro.plate("data", 3):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v[:3])


def model_of_other_event(v):
    with pyro.plate("data", 4):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def model_that_samples_twice(v):
    with pyro.plate("data", 4):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(h, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (model_of_wrong_shape, "invalid log_prob shape"),
        (model_of_other_size, r"log_prob at site 'v':\nValue is not broadcastable"),
        (model_of_other_event, r"event_dims disagree|size|dimension|shape"),
        (model_that_samples_twice, "Multiple sample sites named 'h'"),
    ],
)
def test_invalid_programs_are_named(model, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        WakeSleep(3, insomnia=1.0).loss_and_grads(model, good_guide, torch.randn(4))
    assert not list(pyro.get_param_store())


def test_a_plate_without_vectorised_particles_of_too_little_room_is_named():
    def model(v):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match=r"collide at dim=-2|at dim -2|dim=-2"):
        WakeSleep(3, insomnia=1.0, max_plate_nesting=1).loss_and_grads(model, guide, torch.randn(4, 3))
    assert not list(pyro.get_param_store())
