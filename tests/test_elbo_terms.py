from __future__ import annotations

import importlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions.transforms import SoftplusTransform

from pyro_ext import EM, FixedPoint, elbo_terms
from pyro_ext.elbo_terms import ElboTerms
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.models import BinarySparseCoding, GaussianMixture, SigmoidBeliefNetwork
from tests.oracles.enumeration import bernoulli_log_prob, binary_states

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def randomised(guide, v, *args):
    guide.setup(v, *args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=0.7)
    return guide


def check(found, q, prior, likelihood, log_q=None, sampled=False):
    """Compare with sums over states: q (S, N), log p(s) (S, 1) or (S, N), log p(v_n | s) (S, N), of one site "h"."""
    log_q = q.log() if log_q is None else log_q
    expected = {
        "expected_log_likelihood": (q * likelihood).sum(0),
        "kl": (q * (log_q - prior)).sum(0),
        "entropy": -(q * log_q).sum(0),
        "bound": (q * (likelihood + prior - log_q)).sum(0),
    }
    assert found.exact is not sampled
    for name, value in expected.items():
        got = found.kl["h"] if name == "kl" else getattr(found, name)
        assert got.shape == value.shape
        if sampled:
            # The error of the bound is stated; the terms' errors are worked out here.
            term = {
                "expected_log_likelihood": likelihood,
                "kl": log_q - prior,
                "entropy": -log_q,
                "bound": likelihood + prior - log_q,
            }[name]
            error = ((q * term**2).sum(0) - (q * term).sum(0) ** 2).clamp_min(0).sqrt() / math.sqrt(sampled)
            assert ((got - value).abs() <= K * error + 1e-9).all(), name
            if name == "bound":
                torch.testing.assert_close(found.standard_error, error, rtol=0.2, atol=1e-9)
        else:
            torch.testing.assert_close(got, value)
    if not sampled:
        assert torch.equal(found.standard_error, torch.zeros_like(found.bound))
    torch.testing.assert_close(found.bound, found.expected_log_likelihood - sum(found.kl.values()))


def sparse_coding():
    model = BinarySparseCoding(num_visible=5, num_latents=3)
    v = model.dream(6)
    states = binary_states(3)
    W, b, beta = (getattr(model, name).detach() for name in ("W", "b", "beta"))
    prior = bernoulli_log_prob(states, b)[:, None]
    likelihood = dist.Normal(states @ W.T, beta.rsqrt()).to_event(1)
    likelihood = torch.stack([likelihood.log_prob(row) for row in v], -1)
    return model, v, states, prior, likelihood


@pytest.mark.parametrize("kind", ["mean field", "structured", "amortized", "point"])
def test_binary_sparse_coding(kind):
    model, v, states, prior, likelihood = sparse_coding()
    if kind == "structured":
        guide = randomised(Structured(model, [[("h", [0, 2])]]), v)
        joint, rest = guide.blocks
        p = guide.table(joint).softmax(-1).reshape(6, 2, 2)
        r = guide.table(rest).sigmoid().squeeze(-1)
        q = torch.stack([p[:, int(a), int(c)] * (r if b else 1 - r) for a, b, c in states])
    elif kind == "point":
        guide = Dirac(model)
        EM(model, guide, e_step=FixedPoint(), m_step=None).step(v)
        q = (guide.posterior(v)["h"].mean == states[:, None]).all(-1).double()
    else:
        guide = randomised(MeanField(model) if kind == "mean field" else Amortized(model), v)
        mean = guide.posterior(v)["h"].mean
        q = (states[:, None] * mean + (1 - states[:, None]) * (1 - mean)).prod(-1)
    found = elbo_terms(model, guide, v)
    check(found, q.detach(), prior, likelihood, log_q=torch.where(q > 0, q, torch.ones(())).log().detach())
    assert not found.bound.requires_grad


@pytest.mark.parametrize("one_hot", [True, False])
def test_a_mixture(one_hot):
    v = torch.randn(6, 2)
    locs, weights = torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.3])
    if one_hot:
        model = GaussianMixture(num_components=3, num_visible=2)
        with torch.no_grad():
            model.locs = locs
            model.weights = weights
    else:

        def model(v):
            with pyro.plate("data", len(v)):
                h = pyro.sample("h", dist.Categorical(weights))
                pyro.sample("v", dist.Normal(locs[h], 1.0).to_event(1), obs=v)

    guide = randomised(MeanField(model), v)
    q = guide.posterior(v)["h"].mean.T
    likelihood = torch.stack([dist.Normal(loc, 1.0).to_event(1).log_prob(v) for loc in locs])
    check(elbo_terms(model, guide, v), q, weights.log()[:, None], likelihood)


@pytest.mark.parametrize("structured", [False, True])
def test_a_linear_gaussian_program(structured):
    W, m, s = torch.randn(2, 4), torch.tensor([0.2, -0.3]), torch.tensor([0.8, 1.3])

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(m, s).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, 0.6).to_event(1), obs=v)

    v = torch.randn(5, 4)
    guide = randomised((Structured if structured else MeanField)(program), v)
    (block,) = guide.blocks
    mean, scale = (x.detach() for x in block.factor.moments(guide.table(block)))
    root = scale if structured else torch.diag_embed(scale)
    covariance = root @ root.mT
    found = elbo_terms(program, guide, v)
    spread = torch.einsum("hd,nhg,gd->n", W, covariance, W)
    likelihood = -0.5 * (((v - mean @ W) ** 2).sum(-1) + spread) / 0.36 - 4 * math.log(0.6 * math.sqrt(2 * math.pi))
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    second = ((mean - m) ** 2 + covariance.diagonal(dim1=-2, dim2=-1)) / s**2
    kl = -entropy + 0.5 * second.sum(-1) + s.log().sum() + math.log(2 * math.pi)
    assert found.exact
    torch.testing.assert_close(found.expected_log_likelihood, likelihood)
    torch.testing.assert_close(found.kl, {"h": kl})
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.bound, likelihood - kl)


def test_several_sites_each_have_a_term():
    def program(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
            x = pyro.sample("x", dist.Normal(0.5, 2.0))
            pyro.sample("v", dist.Normal(a.sum(-1) + x, 0.7), obs=v)

    v = torch.randn(5)
    guide = randomised(MeanField(program), v)
    posterior = guide.posterior(v)
    p = posterior["a"].mean
    loc, scale = (guide.table(guide.blocks[1]).detach()).T
    scale = scale.exp()
    kl_a = (p * (p / torch.tensor([0.3, 0.6])).log() + (1 - p) * ((1 - p) / torch.tensor([0.7, 0.4])).log()).sum(-1)
    kl_x = math.log(2) - scale.log() + (scale**2 + (loc - 0.5) ** 2) / 8 - 0.5
    mean = p.sum(-1) + loc
    spread = (p * (1 - p)).sum(-1) + scale**2
    likelihood = -0.5 * ((v - mean) ** 2 + spread) / 0.49 - math.log(0.7 * math.sqrt(2 * math.pi))
    found = elbo_terms(program, guide, v)
    assert found.exact
    assert list(found.kl) == ["a", "x"]
    torch.testing.assert_close(found.kl["a"], kl_a)
    torch.testing.assert_close(found.kl["x"], kl_x)
    torch.testing.assert_close(found.expected_log_likelihood, likelihood)
    torch.testing.assert_close(found.bound, likelihood - kl_a - kl_x)


def test_inner_plates_are_summed_within_their_row():
    def program(v):
        with pyro.plate("data", len(v), dim=-2):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.6))
                pyro.sample("v", dist.Normal(h + z, 0.7), obs=v)

    v = torch.randn(4, 3)
    guide = randomised(MeanField(program), v)
    found = elbo_terms(program, guide, v)
    h, z = (guide.posterior(v)[name].mean for name in ("h", "z"))

    def kl(p, r):
        return p * (p / r).log() + (1 - p) * ((1 - p) / (1 - r)).log()

    assert found.exact
    torch.testing.assert_close(found.kl, {"h": kl(h, 0.3).squeeze(-1), "z": kl(z, 0.6).sum(-1)})
    mean, spread = h + z, h * (1 - h) + z * (1 - z)
    likelihood = -0.5 * ((v - mean) ** 2 + spread) / 0.49 - math.log(0.7 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found.expected_log_likelihood, likelihood.sum(-1))


def layered():
    model = SigmoidBeliefNetwork([2, 3, 4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    v = model.dream(4)
    pairs = list(itertools.product(binary_states(3), binary_states(2)))
    h1, h2 = (torch.stack([pair[i] for pair in pairs]).unsqueeze(1) for i in (0, 1))
    held = {"h1": h1, "h2": h2}
    trace = poutine.trace(poutine.condition(model, data=held)).get_trace(v)
    trace.compute_log_prob()
    return model, v, held, {name: trace.nodes[name]["log_prob"].detach() for name in ("h1", "h2", "v")}


@pytest.mark.parametrize("kind", ["mean field", "structured", "amortized"])
def test_sampled_terms_of_a_layered_network_are_those_of_enumeration(kind):
    model, v, held, log_p = layered()
    guide = {"mean field": MeanField, "structured": Structured, "amortized": Amortized}[kind](model)
    guide = randomised(guide, v)
    held = {name: value.expand(-1, 4, -1) for name, value in held.items()}
    trace = poutine.trace(poutine.condition(guide, data=held))
    with pyro.plate("states", 32, dim=-2):
        trace = trace.get_trace(v)
    trace.compute_log_prob()
    log_q = {name: trace.nodes[name]["log_prob"].detach() for name in ("h1", "h2")}
    q = sum(log_q.values()).exp()
    torch.testing.assert_close(q.sum(0), torch.ones(4))
    S = 20_000
    found = elbo_terms(model, guide, v, num_samples=S)
    assert not found.exact
    terms = {
        "expected_log_likelihood": log_p["v"],
        "entropy": -sum(log_q.values()),
        "bound": sum(log_p.values()) - sum(log_q.values()),
        "h1": log_q["h1"] - log_p["h1"],
        "h2": log_q["h2"] - log_p["h2"],
    }
    for name, term in terms.items():
        got = found.kl[name] if name in found.kl else getattr(found, name)
        expected = (q * term).sum(0)
        error = ((q * term**2).sum(0) - expected**2).clamp_min(0).sqrt() / math.sqrt(S)
        assert ((got - expected).abs() <= K * error + 1e-9).all(), name
        if name == "bound":
            torch.testing.assert_close(found.standard_error, error, rtol=0.1, atol=0)
    torch.testing.assert_close(found.bound, found.expected_log_likelihood - sum(found.kl.values()))


def test_a_guide_written_by_hand_is_sampled():
    model, v, states, prior, likelihood = sparse_coding()
    R, r = torch.randn(5, 3), torch.randn(3)

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(logits=v @ R + r).to_event(1))

    log_q = bernoulli_log_prob(states[:, None], v @ R + r)
    S = 20_000
    check(elbo_terms(model, guide, v, num_samples=S), log_q.exp(), prior, likelihood, log_q=log_q, sampled=S)


@pytest.mark.parametrize(("per_chunk", "sizes"), [(70, [70] * 7 + [10]), (1, [1] * 500)])
def test_samples_come_in_chunks(per_chunk, sizes, monkeypatch):
    model, v, states, prior, likelihood = sparse_coding()
    log_q = bernoulli_log_prob(states[:, None], v @ torch.randn(5, 3))
    index = torch.distributions.Categorical(logits=log_q.mT).sample((500,))
    drawn = []

    def replayed(guide, posterior, program, size):
        part = index[sum(drawn) : sum(drawn) + size]
        drawn.append(size)
        return {"h": states[part]}, {"h": log_q.mT.gather(1, part.mT).mT}

    # The package shows the function under the name of its module.
    monkeypatch.setattr(importlib.import_module("pyro_ext.elbo_terms"), "draw", replayed)

    def guide(v):
        # Masked, so that no closed form takes the place of the samples.
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.5)).mask(True).to_event(1))

    reference = elbo_terms(model, guide, v, num_samples=500)
    assert not reference.closed_form_kl
    check(reference, log_q.exp(), prior, likelihood, log_q=log_q, sampled=500)
    drawn.clear()
    monkeypatch.setattr("pyro_ext.draws.CHUNK_ELEMENTS", per_chunk * 6 * 5)
    found = elbo_terms(model, guide, v, num_samples=500)
    assert drawn == sizes
    for name in ("expected_log_likelihood", "kl", "entropy", "bound", "standard_error"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name))


def test_the_error_does_not_cancel_in_single_precision():
    """A bound of about -1e5 with a spread of about 1, in chunks."""
    torch.set_default_dtype(torch.float32)

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("far", torch.full((len(v),), -1e5) + h)
            pyro.sample("v", dist.Normal(h, 1e3), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(torch.zeros(len(v)), 1.0))

    for num_samples in (100, 10_000):
        found = elbo_terms(program, guide, torch.zeros(3), num_samples=num_samples)
        torch.testing.assert_close(
            found.standard_error,
            torch.full((3,), num_samples**-0.5),
            rtol=K / math.sqrt(2 * num_samples) + 0.02,
            atol=0,
        )


def test_auxiliary_sites_of_autoguides_have_terms_of_their_own():
    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 0.7), obs=v)

    v = torch.randn(5)
    guide = AutoNormal(program, init_scale=0.5)
    guide(v)
    loc = guide.locs.h.detach()
    found = elbo_terms(program, guide, v, num_samples=20_000)
    assert set(found.kl) == {"h", "h_unconstrained"}
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.5)
    bound = (
        entropy - math.log(2 * math.pi) - 0.5 * (loc**2 + 0.25) - math.log(0.7) - 0.5 * ((v - loc) ** 2 + 0.25) / 0.49
    )
    assert ((found.bound - bound).abs() <= K * found.standard_error).all()
    assert ((found.entropy - entropy).abs() <= K * math.sqrt(0.5 / 20_000)).all()
    torch.testing.assert_close(found.bound, found.expected_log_likelihood - sum(found.kl.values()))


def test_a_subsample_and_a_mask():
    def program(v, size=None, mask=None):
        with pyro.plate("data", len(v), subsample_size=size) as rows:
            h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
            with poutine.mask(mask=torch.tensor(True) if mask is None else mask[rows]):
                pyro.sample("v", dist.Normal(h.sum(-1), 0.7), obs=v[rows])

    v = torch.randn(9)
    guide = randomised(MeanField(program), v)
    whole = elbo_terms(program, guide, v)
    part = elbo_terms(program, guide, v, 3)
    assert part.exact
    for name in ("bound", "entropy", "expected_log_likelihood"):
        one, all_ = getattr(part, name), getattr(whole, name)
        assert one.shape == (3,)
        assert ((one[:, None] - all_).abs().min(-1).values < 1e-12).all()

    mask = torch.arange(9) % 2 == 0
    other = randomised(MeanField(program), v, None, mask)
    with torch.no_grad():
        other.table(other.blocks[0]).copy_(guide.table(guide.blocks[0]))
    masked = elbo_terms(program, other, v, None, mask)
    assert masked.exact
    torch.testing.assert_close(masked.expected_log_likelihood, whole.expected_log_likelihood * mask)
    torch.testing.assert_close(masked.kl, whole.kl)


def test_masked_priors_are_sampled():
    """A mask on the latent itself: no closed form is claimed."""

    def program(v, mask):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).mask(mask))
            pyro.sample("v", dist.Normal(h, 0.7), obs=v)

    v, mask = torch.randn(4), torch.tensor([True, True, False, True])
    guide = randomised(MeanField(program), v, mask)
    p = guide.posterior(v, mask)["h"].mean
    found = elbo_terms(program, guide, v, mask, num_samples=20_000)
    assert not found.exact
    q = torch.stack([1 - p, p])
    prior = mask * torch.tensor([0.7, 0.3]).log()[:, None]
    likelihood = torch.stack([dist.Normal(h, 0.7).log_prob(v) for h in (0.0, 1.0)])
    check(found, q, prior, likelihood, sampled=20_000)


def test_a_constrained_latent_is_sampled():
    def program(v):
        with pyro.plate("data", len(v)):
            s = pyro.sample("s", dist.Gamma(3.0, 2.0))
            pyro.sample("v", dist.Normal(0.0, s), obs=v)

    v = torch.randn(4)
    guide = randomised(MeanField(program), v)
    loc, log_scale = guide.table(guide.blocks[0]).detach().T
    found = elbo_terms(program, guide, v, num_samples=40_000)
    assert not found.exact
    # The entropy of a log-normal, on its own scale.
    entropy = loc + log_scale + 0.5 * math.log(2 * math.pi * math.e)
    spread = (0.5 + log_scale.exp() ** 2).sqrt() / 200
    assert ((found.entropy - entropy).abs() <= K * spread).all()
    mean, expected_log = (loc + log_scale.exp() ** 2 / 2).exp(), loc
    kl = -entropy - (2 * expected_log - 2 * mean + 3 * math.log(2) - math.lgamma(3))
    deviation = ((2 * log_scale.exp() ** 2).exp() * mean**2 * 4).sqrt() / 200 + spread * 3
    assert ((found.kl["s"] - kl).abs() <= K * deviation).all()


# ----------------------------------------------------------------- closed forms where the likelihood has to be sampled


LOC, SCALE = torch.tensor([0.4, -1.0, 2.0]), torch.tensor([0.3, 0.8, 0.5])


def bent(v):
    """One Gaussian latent a row, through what no closed form follows."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.5, 1.3))
        pyro.sample("v", dist.Normal(h.sin(), 0.7), obs=v)


def bent_guide(v):
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Normal(LOC.to(v), SCALE.to(v)))


def bent_factors(v):
    """The same q as a guide of this project."""
    guide = MeanField(bent)
    guide.setup(v)
    with torch.no_grad():
        guide.table(guide.blocks[0]).copy_(torch.stack([LOC, SCALE.log()], -1))
    return guide


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_gaussian_latent_of_a_bent_likelihood(by_hand):
    """KL and entropy by their formulas, the rest against quadrature."""
    v, S = torch.tensor([0.3, -0.6, 1.1]), 20_000
    found = elbo_terms(bent, bent_guide if by_hand else bent_factors(v), v, num_samples=S)
    loc, scale = LOC.double(), SCALE.double()
    kl = math.log(1.3) - scale.log() + (scale**2 + (loc - 0.5) ** 2) / (2 * 1.69) - 0.5
    entropy = scale.log() + 0.5 * math.log(2 * math.pi * math.e)
    assert (found.exact, found.closed_form_kl, found.closed_form_entropy) == (False, {"h"}, True)
    torch.testing.assert_close(found.kl, {"h": kl})
    torch.testing.assert_close(found.entropy, entropy)
    grid = torch.linspace(-8, 8, 8001)[:, None]
    h = loc + scale * grid
    weight = dist.Normal(0.0, 1.0).log_prob(grid).exp() * 16 / 8000
    log_w = (
        dist.Normal(h.sin(), 0.7).log_prob(v) + dist.Normal(0.5, 1.3).log_prob(h) - dist.Normal(loc, scale).log_prob(h)
    )
    bound = (weight * log_w).sum(0)
    error = ((weight * log_w**2).sum(0) - bound**2).sqrt() / math.sqrt(S)
    assert ((found.bound - bound).abs() <= K * error).all()
    torch.testing.assert_close(found.standard_error, error, rtol=0.1, atol=0)
    torch.testing.assert_close(found.expected_log_likelihood, found.bound + kl)
    likelihood = (weight * dist.Normal(h.sin(), 0.7).log_prob(v)).sum(0)
    assert ((found.expected_log_likelihood - likelihood).abs() <= K * error).all()
    assert repr(found).endswith("; nats per row, sampled but for KL[h], H(q))")


@pytest.mark.parametrize("structured", [False, True])
def test_a_log_normal_latent_has_the_kl_of_its_logarithm(structured):
    m, s = torch.tensor([0.2, -0.3]), torch.tensor([0.8, 1.3])

    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.LogNormal(m, s).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 0.6), obs=v)

    v = torch.randn(4)
    guide = randomised((Structured if structured else MeanField)(program), v)
    (block,) = guide.blocks
    mean, scale = (x.detach() for x in block.factor.moments(guide.table(block)))
    covariance = scale @ scale.mT if structured else torch.diag_embed(scale**2)
    trace = (covariance.diagonal(dim1=-2, dim2=-1) / s**2).sum(-1)
    kl = 0.5 * (trace + ((mean - m) ** 2 / s**2).sum(-1) - 2 + (s**2).log().sum() - torch.logdet(covariance))
    found = elbo_terms(program, guide, v, num_samples=10)
    assert found.closed_form_kl == {"h"}
    assert not found.closed_form_entropy
    torch.testing.assert_close(found.kl, {"h": kl})


def test_another_bijection_than_the_priors_has_no_closed_form():
    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [SoftplusTransform()]))
            pyro.sample("v", dist.Normal(h, 0.6), obs=v)

    v = torch.randn(4)
    assert not elbo_terms(program, randomised(MeanField(program), v), v, num_samples=10).closed_form_kl


def test_of_a_guide_by_hand_only_latents_that_read_no_other_are_in_closed_form():
    def program(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            c = pyro.sample("c", dist.Normal(0.0, 2.0))
            d = pyro.sample("d", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(a + b * c + d, 0.7), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("a", dist.Bernoulli(0.8))
            pyro.sample("b", dist.Normal(v, 0.5))
            c = pyro.sample("c", dist.Normal(v, 0.5))
            pyro.sample("d", dist.Normal(c, 0.9))

    v = torch.randn(3)
    found = elbo_terms(program, guide, v, num_samples=20_000)
    assert found.closed_form_kl == {"a", "c"}
    assert not found.closed_form_entropy
    assert list(found.kl) == ["a", "b", "c", "d"]

    def gaussian(loc, scale, prior_loc, prior_scale):
        ratio = scale / prior_scale
        return 0.5 * (ratio**2 + ((loc - prior_loc) / prior_scale) ** 2 - 1) - math.log(ratio)

    a = 0.8 * math.log(0.8 / 0.3) + 0.2 * math.log(0.2 / 0.7)
    torch.testing.assert_close(found.kl["a"], torch.full((3,), a))
    torch.testing.assert_close(found.kl["c"], gaussian(v, 0.5, 0.0, 2.0))
    # Sampled: b's prior depends on a, d's factor on c. Second moments bound their spread.
    b = 0.8 * gaussian(v, 0.5, 1.0, 1.0) + 0.2 * gaussian(v, 0.5, 0.0, 1.0)
    d = 0.5 * (0.81 + v**2 + 0.25 - 1) - math.log(0.9)
    for name, value in {"b": b, "d": d}.items():
        assert not torch.equal(found.kl[name], value)
        assert ((found.kl[name] - value).abs() <= K * (1 + v.abs()) * 1.5 / math.sqrt(20_000)).all(), name
    torch.testing.assert_close(found.bound, found.expected_log_likelihood - sum(found.kl.values()))


def test_plates_and_subsamples_of_a_guide_by_hand():
    def program(v, size=None):
        with pyro.plate("data", len(v), subsample_size=size, dim=-2) as rows:
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
                pyro.sample("v", dist.Normal(h.sin() * g, 0.7), obs=v[rows])

    def guide(v, size=None):
        with pyro.plate("data", len(v), subsample_size=size, dim=-2) as rows:
            pyro.sample("g", dist.Normal(0.5, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("h", dist.Normal(v[rows], 0.5))

    v = torch.randn(5, 3)
    expected = (0.5 * (0.25 + v**2 - 1) - math.log(0.5)).sum(-1)
    whole = elbo_terms(program, guide, v, num_samples=10)
    assert whole.closed_form_kl == {"g", "h"}
    torch.testing.assert_close(whole.kl, {"g": torch.full((5,), 0.125), "h": expected})
    entropy = 4 * 0.5 * math.log(2 * math.pi * math.e) + 3 * math.log(0.5)
    torch.testing.assert_close(whole.entropy, torch.full((5,), entropy))
    part = elbo_terms(program, guide, v, 2, num_samples=10)
    assert part.kl["h"].shape == (2,)
    assert ((part.kl["h"][:, None] - expected).abs().min(-1).values < 1e-12).all()
    torch.testing.assert_close(part.entropy, torch.full((2,), entropy))


MASK = torch.tensor([[True, False], [True, True], [False, True]])

SPOILT = {
    "none": lambda fn: pyro.sample("h", fn.to_event(1)),
    "mask": lambda fn: pyro.sample("h", fn.to_event(1).mask(MASK[:, 1])),
    "mask inside": lambda fn: pyro.sample("h", fn.mask(MASK).to_event(1)),
    "mask of the site": lambda fn: poutine.mask(pyro.sample, mask=MASK[:, 0])("h", fn.to_event(1)),
    "scale": lambda fn: poutine.scale(pyro.sample, scale=0.5)("h", fn.to_event(1)),
}


@pytest.mark.parametrize("of_prior", [True, False])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_masks_and_scales_leave_no_closed_form(spoilt, of_prior):
    """With a mask or a scale of its own, what a latent adds to L is no KL."""
    prior, factor = (spoilt, "none") if of_prior else ("none", spoilt)

    def program(v):
        with pyro.plate("data", len(v)):
            h = SPOILT[prior](dist.Bernoulli(0.3).expand([3, 2]))
            pyro.sample("v", dist.Normal(h.sum(-1).sin(), 0.7), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            SPOILT[factor](dist.Bernoulli(0.6).expand([3, 2]))

    v = torch.randn(3)
    for each in [guide, MeanField(program)] if of_prior else [guide]:
        found = elbo_terms(program, each, v, num_samples=10)
        assert bool(found.closed_form_kl) == (spoilt == "none")
        assert found.exact == (spoilt == "none" and each is not guide)


def test_two_masks_leave_no_closed_form():
    """Pyro has a KL between masked distributions, of what both masks leave; L has what each leaves of its own."""

    def site(mask):
        return pyro.sample("h", dist.Normal(0.0, 2.0).expand([3]).mask(mask))

    def program(v):
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(site(MASK[:, 0]).sin(), 0.7), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            site(MASK[:, 1])

    v = torch.randn(3)
    found = elbo_terms(program, guide, v, num_samples=100)
    assert not found.closed_form_kl
    assert not found.closed_form_entropy
    assert (found.kl["h"][[0, 2]] != 0).all()


def test_factors_of_this_project_inside_another_guide_are_sampled():
    """Their KL is refused for Pyro's ELBOs, not here."""
    model, v, *_ = sparse_coding()
    guide = randomised(MeanField(model), v)
    exact = elbo_terms(model, guide, v)
    found = elbo_terms(model, lambda v: guide(v), v, num_samples=20_000)
    assert not found.closed_form_kl
    assert ((found.bound - exact.bound).abs() <= K * found.standard_error).all()


# ------------------------------------------------------------------------------------- words, effects, refusals


def test_it_says_what_the_terms_are():
    model, v, *_ = sparse_coding()
    guide = MeanField(model)
    found = elbo_terms(model, guide, v)
    assert isinstance(found, ElboTerms)
    text = repr(found)
    assert text.startswith(f"ElboTerms(L = {float(found.bound.mean()):.6g}, E_q[log p(v|h)] = ")
    assert text.endswith(
        f"KL[h] = {float(found.kl['h'].mean()):.6g}, H(q) = {float(found.entropy.mean()):.6g}; nats per row, exact)"
    )
    model, v, *_ = layered()
    text = repr(elbo_terms(model, MeanField(model), v, num_samples=3))
    assert text.endswith("nats per row, sampled but for KL[h2], H(q))")
    assert repr(elbo_terms(model, Amortized(model), v, num_samples=3)).endswith("nats per row, sampled)")


def test_nothing_is_changed():
    model, v, *_ = layered()
    guide = Amortized(model)
    guide(v), model(v)
    store = pyro.get_param_store()
    before = {name: store[name].detach().clone() for name in store.keys()}
    with poutine.trace() as outside:
        elbo_terms(model, guide, v, num_samples=10)
    assert {name: store[name] for name in store.keys()}.keys() == before.keys()
    assert all(torch.equal(store[name], value) for name, value in before.items())
    assert not outside.trace.nodes.keys() - {"_INPUT", "_RETURN"}
    assert all(parameter.grad is None for parameter in guide.parameters())


@pytest.mark.parametrize("num_samples", [0, 1.5, True])
def test_bad_numbers_of_samples(num_samples):
    model, v, *_ = sparse_coding()
    with pytest.raises(ValueError, match=r"Expected num_samples of at least 1, but got .*\. Use 100 or more\."):
        elbo_terms(model, MeanField(model), v, num_samples=num_samples)


def test_one_sample_has_no_error_to_speak_of():
    model, v, *_ = layered()
    assert elbo_terms(model, MeanField(model), v, num_samples=1).standard_error.isnan().all()


@pytest.mark.parametrize("guide_class", [Dirac, AutoDelta])
def test_a_point_on_a_continuous_latent_is_refused(guide_class):
    def program(v):
        b = pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(b, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    with pytest.raises(ValueError, match=r"factors with a density for elbo_terms, but got a point mass on .* site 'h'"):
        elbo_terms(program, guide_class(program), torch.randn(3))
    assert not list(pyro.get_param_store())


def test_a_guide_over_other_latents_is_refused():
    model, v, *_ = sparse_coding()

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("g", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"Expected a guide over the model's latents \['h'\], but got one over \['g'\]"
    ):
        elbo_terms(model, guide, v)


def test_bad_data_are_refused():
    model, v, *_ = sparse_coding()
    with pytest.raises(ValueError, match=r"Expected .*finite.*, but got"):
        elbo_terms(model, MeanField(model), torch.full_like(v, math.nan))
