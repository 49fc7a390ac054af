"""Gradient and bound per row against exact expectations, for every mixture of phases.

Every row has parameters of its own, of equal values, so that one call gives as many independent gradients as there
are rows. Means are compared within 5 standard errors (about 4,000 comparisons: one in 2,000 seeds would fail).
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_ext.proposals import Defensive, FromGuide
from pyro_ext.wake_sleep import WakeSleep
from pyro_ext.weights import SelfNormalized, Uniform
from tests.oracles import wake_sleep as tuples
from tests.oracles.enumeration import bernoulli_log_prob
from tests.oracles.multisets import expected_bound, expected_wake_phi

pytestmark = pytest.mark.usefixtures("float64")

REPEATS = 1500
K_ERRORS = 5.0

PHASES = [
    (1, SelfNormalized(), 0.0),
    (1, Uniform(), 0.0),
    (2, SelfNormalized(), 0.0),
    (2, Uniform(), 0.0),
    (2, SelfNormalized(), 0.5),
    (2, SelfNormalized(), 1.0),
    (10, SelfNormalized(), 0.0),
    (10, Uniform(), 0.0),
    (10, SelfNormalized(), 0.5),
    (10, SelfNormalized(), 1.0),
]
PROPOSALS = [FromGuide(), Defensive(0.3)]


def states(num_units):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_units)))


class Case:
    """A program whose rows have at most four latent states, and its tables by hand.

    Attributes:
        values: value of each parameter of one row; theta's are in `theta`.
        patterns: visible values of the rows that differ.
    """

    theta: tuple[str, ...] = ()

    def __init__(self):
        self.patterns = self.make_patterns()
        self.values = self.make_values()
        self.num_rows = REPEATS * len(self.patterns)

    def parameter(self, name):
        """One copy for each row, in the store: shape (P * REPEATS, ...)."""
        value = self.values[name]
        return pyro.param(name, value.expand(self.num_rows, *value.shape).clone())

    def rows(self, values):
        """(P, ...) -> (P * REPEATS, ...)."""
        return values.repeat_interleave(REPEATS, 0)

    def args(self):
        return (self.rows(self.patterns),)

    def all_visible(self):
        """Every visible value of a row, for dreams."""
        return states(self.patterns.shape[1])

    def row_weight(self):
        """1, or 0 for patterns whose rows are masked, shape (P,)."""
        return torch.ones(len(self.patterns))


class Plain(Case):
    """Two hidden units, two visible ones, one plate."""

    theta = ("c", "W", "b")
    batch = None

    def make_patterns(self):
        return torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])

    def make_values(self):
        return {
            name: torch.randn(shape)
            for name, shape in {"c": (2,), "W": (2, 2), "b": (2,), "R": (2, 2), "r": (2,)}.items()
        }

    def plate(self, v):
        return pyro.plate("data", len(v), subsample_size=self.batch and len(v) // self.batch)

    def model(self, v):
        c, W, b = (self.parameter(name) for name in self.theta)
        with self.plate(v) as ind:
            h = pyro.sample("h", dist.Bernoulli(logits=c[ind]).to_event(1))
            logits = (W[ind] @ h.unsqueeze(-1)).squeeze(-1) + b[ind]
            pyro.sample("v", dist.Bernoulli(logits=logits).to_event(1), obs=v[ind])

    def guide(self, v):
        R, r = self.parameter("R"), self.parameter("r")
        with self.plate(v) as ind:
            logits = (R[ind] @ v[ind].unsqueeze(-1)).squeeze(-1) + r[ind]
            pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))

    def tables(self, values, patterns, *, dreamt=False):
        """log p(h), log p(v | h) and log q(h | v), each (S, P)."""
        h, v = states(2)[:, None], patterns[None]
        prior = bernoulli_log_prob(h, values["c"].expand_as(h)).expand(-1, len(patterns))
        likelihood = bernoulli_log_prob(v, h @ values["W"].T + values["b"])
        return prior, likelihood, bernoulli_log_prob(h, v @ values["R"].T + values["r"])


class Subsampled(Plain):
    """A third of the rows at each call: scale N/B = 3."""

    batch = 3


class MaskedRows(Plain):
    """All sites of every row of the second pattern are masked."""

    def mask(self, ind):
        return self.rows(self.row_weight() > 0)[ind]

    def row_weight(self):
        return torch.tensor([1.0, 0.0, 1.0])

    def model(self, v):
        with poutine.mask(mask=self.mask(slice(None))):
            super().model(v)

    def guide(self, v):
        with poutine.mask(mask=self.mask(slice(None))):
            super().guide(v)


class Layered(Case):
    """Two latent sites, one above the other; the guide draws them from the bottom up."""

    theta = ("c", "W", "b", "a")

    def make_patterns(self):
        return torch.tensor([[1.0], [0.0]])

    def make_values(self):
        return {name: 1.5 * torch.randn(()) for name in ("c", "W", "b", "a", "R", "r", "S", "s")}

    def model(self, v):
        c, W, b, a = (self.parameter(name) for name in self.theta)
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=c))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=W * h2 + b))
            pyro.sample("v", dist.Bernoulli(logits=a * (2 * h1 - 1)), obs=v[:, 0])

    def guide(self, v):
        R, r, S, s = (self.parameter(name) for name in ("R", "r", "S", "s"))
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=R * v[:, 0] + r))
            pyro.sample("h2", dist.Bernoulli(logits=S * h1 + s))

    def tables(self, values, patterns):
        h2, h1 = states(2)[:, None, :1], states(2)[:, None, 1:]
        v = patterns[None]
        above = values["W"] * h2 + values["b"]
        prior = bernoulli_log_prob(h2, values["c"].expand_as(h2)) + bernoulli_log_prob(h1, above)
        likelihood = bernoulli_log_prob(v, (values["a"] * (2 * h1 - 1)).expand(-1, len(patterns), -1))
        log_q = bernoulli_log_prob(h1, values["R"] * v + values["r"])
        log_q = log_q + bernoulli_log_prob(h2, values["S"] * h1 + values["s"])
        return prior.expand(-1, len(patterns)), likelihood, log_q


class NestedPlates(Case):
    """Rows are the elements of two nested plates; a latent of three classes."""

    theta = ("c", "b")

    def make_patterns(self):
        return torch.tensor([[0.0], [1.0]])

    def make_values(self):
        return {name: torch.randn(shape) for name, shape in {"c": (3,), "b": (3,), "R": (3,), "r": (3,)}.items()}

    def args(self):
        return (super().args()[0].reshape(len(self.patterns), REPEATS),)

    def parameter(self, name):
        return super().parameter(name).reshape(len(self.patterns), REPEATS, *self.values[name].shape)

    def model(self, v):
        c, b = self.parameter("c"), self.parameter("b")
        with pyro.plate("outer", v.shape[0], dim=-2), pyro.plate("inner", v.shape[1], dim=-1):
            h = pyro.sample("h", dist.Categorical(logits=c))
            logits = b.expand(h.shape + (3,)).gather(-1, h.unsqueeze(-1)).squeeze(-1)
            pyro.sample("v", dist.Bernoulli(logits=logits), obs=v)

    def guide(self, v):
        R, r = self.parameter("R"), self.parameter("r")
        with pyro.plate("outer", v.shape[0], dim=-2), pyro.plate("inner", v.shape[1], dim=-1):
            pyro.sample("h", dist.Categorical(logits=R * v.unsqueeze(-1) + r))

    def tables(self, values, patterns):
        v = patterns[:, 0]
        prior = values["c"].log_softmax(0)[:, None].expand(-1, len(v))
        likelihood = bernoulli_log_prob(v[None, :, None], values["b"][:, None, None])
        return prior, likelihood, (values["R"] * v[:, None] + values["r"]).log_softmax(-1).T


class PlateInARow(Case):
    """A row holds two pixels, each with a unit of its own, and one visible unit that depends on both."""

    theta = ("c", "w", "b", "a")
    batch = None
    pixel_mask = torch.tensor([True, True])

    def make_patterns(self):
        return torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])  # two pixels, and u

    def make_values(self):
        shapes = {"c": (2,), "w": (2,), "b": (2,), "a": (2,), "R": (2,), "s": (2,), "r": (2,)}
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    def args(self):
        (rows,) = super().args()
        return rows[:, :2].contiguous(), rows[:, 2:].contiguous()

    def plates(self, v):
        size = self.batch and len(v) // self.batch
        return pyro.plate("data", len(v), subsample_size=size, dim=-2), pyro.plate("pixels", 2, dim=-1)

    def model(self, v, u):
        c, w, b, a = (self.parameter(name) for name in self.theta)
        data, pixels = self.plates(v)
        with data as ind:
            with pixels:
                h = pyro.sample("h", dist.Bernoulli(logits=c[ind]))
                with poutine.mask(mask=self.pixel_mask):
                    pyro.sample("v", dist.Bernoulli(logits=w[ind] * h + b[ind]), obs=v[ind])
            pyro.sample("u", dist.Bernoulli(logits=(a[ind] * h).sum(-1, keepdim=True)), obs=u[ind])

    def guide(self, v, u):
        R, s, r = self.parameter("R"), self.parameter("s"), self.parameter("r")
        data, pixels = self.plates(v)
        with data as ind, pixels:
            pyro.sample("h", dist.Bernoulli(logits=R[ind] * v[ind] + s[ind] * u[ind] + r[ind]))

    def tables(self, values, patterns):
        h, v, u = states(2)[:, None], patterns[None, :, :2], patterns[None, :, 2:]

        def log_prob(value, logits):  # unit by unit
            return value * nn.functional.logsigmoid(logits) + (1 - value) * nn.functional.logsigmoid(-logits)

        prior = log_prob(h, values["c"]).sum(-1).expand(-1, len(patterns))
        pixels = (log_prob(v, values["w"] * h + values["b"]) * self.pixel_mask).sum(-1)
        likelihood = pixels + log_prob(u, (values["a"] * h).sum(-1, keepdim=True)).sum(-1)
        return prior, likelihood, log_prob(h, values["R"] * v + values["s"] * u + values["r"]).sum(-1)

    def dream_tables(self, values, patterns):
        """log p(v', h') of dreams, whose masked pixels are drawn as well."""
        masked, self.pixel_mask = self.pixel_mask, torch.tensor([True, True])
        try:
            return self.tables(values, patterns)
        finally:
            self.pixel_mask = masked


class MaskedPixels(PlateInARow):
    """The second pixel of every row is hidden, and a third of the rows is taken at each call."""

    batch = 3
    pixel_mask = torch.tensor([True, False])


CASES = [Plain, Subsampled, MaskedRows, Layered, NestedPlates, PlateInARow, MaskedPixels]


def expectations(case, num_particles, weights, insomnia, proposal):
    """Bound of each pattern (P,), and the gradient of every parameter for each pattern (P, ...)."""
    bounds, grads = [], []
    for pattern, weight in zip(case.patterns, case.row_weight(), strict=True):
        values = {name: value.clone().requires_grad_() for name, value in case.values.items()}
        prior, likelihood, log_q = case.tables(values, pattern[None])
        log_p = prior + likelihood
        log_r = log_q
        if isinstance(proposal, Defensive):
            log_r = torch.logaddexp(math.log(1 - proposal.share) + log_q, math.log(proposal.share) + prior)
        bound = expected_bound(log_p, log_r, num_particles, self_normalized=isinstance(weights, SelfNormalized))
        total = -bound.sum()
        if insomnia > 0:
            total = total + insomnia * expected_wake_phi(log_p, log_q, log_r, num_particles).sum()
        if insomnia < 1:
            dream_tables = getattr(case, "dream_tables", case.tables)
            prior, likelihood, log_q = dream_tables(values, case.all_visible())
            total = total - (1 - insomnia) * ((prior + likelihood).detach().exp() * log_q).sum()
        total = total * weight
        found = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        bounds.append(weight * bound.detach().sum())
        pairs = zip(values.items(), found, strict=True)
        grads.append({n: g if g is not None else torch.zeros_like(v) for (n, v), g in pairs})
    return torch.stack(bounds), {name: torch.stack([g[name] for g in grads]) for name in case.values}


def assert_near(samples, expected, what):
    """Means of samples, (P, repeats, ...), within K_ERRORS standard errors."""
    error = samples.std(1) / math.sqrt(samples.shape[1])
    distance = (samples.mean(1) - expected).abs()
    assert (distance <= K_ERRORS * error + 1e-12).all(), (what, samples.mean(1), expected, error)


def check(case, elbo):
    """Bound and gradients of one call against what is expected."""
    estimate = elbo.estimate(case.model, case.guide, case.args(), {})
    shape = (len(case.patterns), -1)
    bounds, grads = expectations(case, elbo.num_particles, elbo.weights, elbo.insomnia, elbo.proposal)
    parameters = dict(pyro.get_param_store().named_parameters())
    found = torch.autograd.grad(estimate.surrogate, list(parameters.values()))
    for (name, _), grad in zip(parameters.items(), found, strict=True):
        assert_near(grad.reshape(*shape, *case.values[name].shape), grads[name], name)
    rows = elbo.weights.bound(estimate.log_weights)
    scale = case.num_rows / rows.numel()
    assert estimate.loss.item() == pytest.approx(-scale * rows.sum().item(), rel=1e-12)
    if scale == 1:
        assert_near(rows.reshape(shape), bounds, "bound")
    else:
        error = rows.std() / math.sqrt(rows.numel())
        assert (rows.mean() - bounds.mean()).abs() < K_ERRORS * error


@pytest.mark.parametrize("proposal", PROPOSALS, ids=["guide", "defensive"])
@pytest.mark.parametrize(
    ("num_particles", "weights", "insomnia"),
    PHASES,
    ids=lambda value: type(value).__name__ if isinstance(value, SelfNormalized | Uniform) else str(value),
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gradient_and_bound_per_row(case, num_particles, weights, insomnia, proposal):
    check(case(), WakeSleep(num_particles, weights, insomnia, proposal=proposal))


@pytest.mark.parametrize("proposal", PROPOSALS, ids=["guide", "defensive"])
@pytest.mark.parametrize("case", [Plain, Layered, MaskedPixels], ids=lambda case: case.__name__)
def test_particles_one_by_one(case, proposal):
    check(case(), WakeSleep(3, insomnia=0.5, vectorize_particles=False, proposal=proposal))


@pytest.mark.parametrize("num_dreams", [700, 4500, 10_000], ids=["fewer", "as many", "more"])
@pytest.mark.parametrize("case", [Plain, Subsampled, NestedPlates], ids=lambda case: case.__name__)
def test_number_of_dreams(case, num_dreams):
    check(case(), WakeSleep(2, insomnia=0.5, num_dreams=num_dreams))


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_multisets_and_tuples_agree(num_particles):
    network = tuples.Network.random(2, 2)
    log_p, log_q = network.tables(torch.rand(4, 2).round())
    for self_normalized in (True, False):
        torch.testing.assert_close(
            expected_bound(log_p, log_q, num_particles, self_normalized=self_normalized),
            tuples.expected_bound(log_p, log_q, num_particles, self_normalized),
        )
    torch.testing.assert_close(
        expected_wake_phi(log_p, log_q, log_q, num_particles), tuples.expected_wake_phi(log_p, log_q, num_particles)
    )
