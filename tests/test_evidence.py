from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_mean
from torch import nn
from torch.distributions import constraints

from pyro_ext import EM, FixedPoint, Gradient, evidence, log_evidence
from pyro_ext.draws import draw, posterior_of
from pyro_ext.evidence import Evidence
from pyro_ext.guides import Amortized, Dirac, MeanField, Structured
from pyro_ext.models import BinarySparseCoding, GaussianMixture, HelmholtzMachine, SigmoidBeliefNetwork
from pyro_ext.program import Program
from tests.oracles import enumeration as oracle
from tests.oracles.enumeration import bernoulli_log_prob, binary_states, program_log_joint
from tests.oracles.wake_sleep import Network, expected_bound

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def sparse_coding(num_latents=4):
    model = BinarySparseCoding(num_visible=5, num_latents=num_latents)
    v = model.dream(7)
    states = binary_states(num_latents)
    W, b, beta = (getattr(model, name).detach() for name in ("W", "b", "beta"))
    return model, v, oracle.binary_sparse_coding_log_joint(v, states, W, b, beta)


def mixture(num_components=3):
    model = GaussianMixture(num_components, num_visible=2)
    model.weights = torch.tensor([0.2, 0.5, 0.3])
    v = model.dream(7)
    covariances = torch.diag_embed(model.scale.detach() ** 2)
    return model, v, oracle.gaussian_mixture_log_joint(v, model.weights.detach(), model.locs.detach(), covariances)


def network():
    model = SigmoidBeliefNetwork([2, 3, 5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    v = model.dream(4)
    pairs = list(itertools.product(binary_states(3), binary_states(2)))
    states = {name: torch.stack([pair[i] for pair in pairs]).unsqueeze(1) for i, name in enumerate(("h1", "h2"))}
    return model, v, program_log_joint(model, states, v).detach()


def counts(v):
    """An integer latent of three classes and a binary one that depends on it."""
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        b = pyro.sample("b", dist.Bernoulli(logits=torch.tensor([1.0, -2.0, 0.4])[z]))
        pyro.sample("v", dist.Normal(torch.tensor([0.0, 2.0, -1.0])[z] * (1 + b), 0.8), obs=v)


def counts_case():
    v = torch.randn(6)
    z, b = (torch.tensor(x)[:, None] for x in zip(*itertools.product(range(3), (0.0, 1.0)), strict=True))
    p = torch.tensor([0.2, 0.5, 0.3])[z].log() + bernoulli_log_prob(
        b[..., None], torch.tensor([1.0, -2.0, 0.4])[z][..., None]
    )
    return counts, v, p + dist.Normal(torch.tensor([0.0, 2.0, -1.0])[z] * (1 + b), 0.8).log_prob(v)


# ------------------------------------------------------------------------------------- exact, by enumeration


@pytest.mark.parametrize("case", [sparse_coding, mixture, network, counts_case])
@pytest.mark.parametrize("route", ["chosen", "program", "chunks", "chunks of the program"])
def test_enumeration_is_brute_force(case, route, monkeypatch):
    model, v, log_joint = case()
    if "program" in route:
        monkeypatch.setattr(evidence, "_form", lambda program: None)
    if "chunks" in route:
        monkeypatch.setattr(evidence, "STATES_CHUNK", 3 * len(v) * (1 if route == "chunks" else 5))
    found = log_evidence(model, None, v)
    torch.testing.assert_close(found.log_evidence, oracle.log_evidence(log_joint))
    assert found.exact
    assert found.num_samples == 0
    assert torch.equal(found.standard_error, torch.zeros(len(v)))
    assert found.mean == pytest.approx(float(oracle.log_evidence(log_joint).mean()))
    assert found.mean_standard_error == 0
    assert (found.bound, found.gap, found.effective_sample_size) == (None, None, None)
    assert not found.log_evidence.requires_grad


def test_chunks_of_states_are_those_that_were_asked_for(monkeypatch):
    model, v, _ = network()
    sizes = []
    real = Program.log_joint

    def spy(self, values, **settings):
        sizes.append(settings.get("num_particles"))
        return real(self, values, **settings)

    monkeypatch.setattr(Program, "log_joint", spy)
    monkeypatch.setattr(evidence, "_form", lambda program: None)
    monkeypatch.setattr(evidence, "STATES_CHUNK", 6 * len(v) * 5)  # D = 5 is the widest site
    log_evidence(model, None, v)
    # The last two look whether the rows are apart.
    assert sizes == [6, 6, 6, 6, 6, 2, None, None]


def inner_plates(v):
    with pyro.plate("data", len(v), dim=-2):
        h = pyro.sample("h", dist.Bernoulli(0.3))
        with pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=2 * h - 1))
            pyro.sample("v", dist.Normal(h + 2 * z, 0.7), obs=v)


def test_inner_plates_are_summed_within_their_row():
    v = torch.randn(4, 3)
    total = []
    for h in (0.0, 1.0):
        z = torch.stack(
            [
                bernoulli_log_prob(torch.tensor([x]), torch.tensor([2 * h - 1]))
                + dist.Normal(h + 2 * x, 0.7).log_prob(v)
                for x in (0.0, 1.0)
            ]
        )
        total.append(math.log(0.3 if h else 0.7) + z.logsumexp(0).sum(-1))
    found = log_evidence(inner_plates, None, v)
    torch.testing.assert_close(found.log_evidence, torch.stack(total).logsumexp(0))


def test_a_global_latent_makes_one_row_of_the_data():
    def program(v):
        g = pyro.sample("g", dist.Bernoulli(0.3))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.6))
            pyro.sample("v", dist.Normal(g - h, 0.7), obs=v)

    v = torch.randn(5)
    total = []
    for g in (0.0, 1.0):
        h = torch.stack([math.log(0.6 if x else 0.4) + dist.Normal(g - x, 0.7).log_prob(v) for x in (0, 1)])
        total.append(math.log(0.3 if g else 0.7) + h.logsumexp(0).sum())
    found = log_evidence(program, None, v).log_evidence
    assert found.shape == ()
    torch.testing.assert_close(found, torch.stack(total).logsumexp(0))


def test_states_of_probability_zero_add_nothing():
    def program(v):
        with pyro.plate("data", len(v)):
            k = pyro.sample("k", dist.OneHotCategorical(logits=torch.tensor([-math.inf, 0.0, math.log(3.0)])))
            b = pyro.sample("b", dist.Bernoulli(0.2).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(k @ torch.tensor([5.0, 1.0, -1.0]) + b.sum(-1), 0.7), obs=v)

    v = torch.randn(5)
    terms = [
        math.log(p * q) + dist.Normal(x + y, 0.7).log_prob(v)
        for (p, x), (q, y) in itertools.product([(0.25, 1), (0.75, -1)], [(0.64, 0), (0.32, 1), (0.04, 2)])
    ]
    torch.testing.assert_close(log_evidence(program, None, v).log_evidence, torch.stack(terms).logsumexp(0))


def test_a_row_that_cannot_be_has_evidence_minus_infinity():
    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            logits = torch.stack([h, h + 1, torch.full_like(h, -math.inf)], -1)
            pyro.sample("v", dist.Categorical(logits=logits), obs=v)

    found = log_evidence(program, None, torch.tensor([0, 2])).log_evidence
    torch.testing.assert_close(found, torch.tensor([-math.log(1 + math.e), -math.inf]))
    found = log_evidence(program, MeanField(program), torch.tensor([0, 2]), max_states=1).log_evidence
    torch.testing.assert_close(found, torch.tensor([-math.log(1 + math.e), -math.inf]))


def test_the_prior_counts_in_rows_that_a_mask_hides():
    def program(v, mask):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            with poutine.mask(mask=mask):
                pyro.sample("v", dist.Normal(h, 0.7), obs=v)

    v, mask = torch.tensor([0.4, math.nan, 1.2]), torch.tensor([True, False, True])
    clean = torch.where(mask, v, torch.zeros(3))
    terms = [math.log(0.3 if h else 0.7) + mask * dist.Normal(h, 0.7).log_prob(clean) for h in (0.0, 1.0)]
    expected = torch.stack(terms).logsumexp(0)
    assert expected[1] == pytest.approx(0)
    torch.testing.assert_close(log_evidence(program, None, v, mask).log_evidence, expected)


def subsampled(v, size=None, rows=None):
    with pyro.plate("data", len(v), subsample_size=size, subsample=rows) as chosen:
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.tensor([1.0, -2.0]), 0.7), obs=v[chosen])


def test_the_scale_of_a_subsample_is_divided_out():
    v = torch.randn(10)
    whole = log_evidence(subsampled, None, v).log_evidence
    rows = torch.tensor([7, 0, 4])
    torch.testing.assert_close(log_evidence(subsampled, None, v, rows=rows).log_evidence, whole[rows])
    seen = set()
    for _ in range(5):
        found = log_evidence(subsampled, None, v, 3).log_evidence
        distance, which = (found[:, None] - whole).abs().min(-1)
        assert (distance < 1e-12).all()
        seen.add(tuple(which.tolist()))
    assert len(seen) > 1


def test_the_gap_is_the_divergence_of_q_from_the_posterior():
    model, v, log_joint = sparse_coding()
    guide = MeanField(model)
    guide.setup(v)
    with torch.no_grad():
        guide.table(guide.blocks[0]).normal_()
    q = oracle.factorial_posterior(guide.posterior(v)["h"].mean)
    posterior = oracle.exact_posterior(log_joint)
    found = log_evidence(model, guide, v)
    torch.testing.assert_close(found.bound, oracle.elbo(log_joint, q))
    torch.testing.assert_close(found.gap, (torch.xlogy(q, q) - q * posterior.log()).sum(0))

    exact = Structured(model)
    EM(model, exact, e_step=FixedPoint(), m_step=None).step(v)
    torch.testing.assert_close(log_evidence(model, exact, v).gap, torch.zeros(7), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------- exact, by a Gaussian integral


W = [[1.0, 0.5, -0.2, 0.1], [0.3, -1.0, 0.8, 0.4]]


def factor_analysis(v, x=None):
    """Covariates x, if given, make the noise of each row another."""
    noise = torch.tensor([0.5, 0.7, 0.3, 0.9]) * (1.0 if x is None else 1 + x[:, None])
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(torch.tensor([0.2, -0.3]), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h @ torch.tensor(W) + 0.5, noise).to_event(1), obs=v)


@pytest.mark.parametrize("covariates", [False, True])
def test_a_linear_gaussian_program_is_integrated(covariates):
    v, x = torch.randn(5, 4), torch.rand(5) if covariates else None
    args = (v, x) if covariates else (v,)
    noise = torch.tensor([0.5, 0.7, 0.3, 0.9]) * (1 + (x if covariates else torch.zeros(5)))[:, None]
    mean = torch.tensor([0.2, -0.3]) @ torch.tensor(W) + 0.5
    covariance = torch.tensor(W).mT @ torch.tensor(W) + torch.diag_embed(noise**2)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(v)
    guide = MeanField(factor_analysis)
    found = log_evidence(factor_analysis, guide, *args)
    torch.testing.assert_close(found.log_evidence, expected)
    assert found.exact
    assert (found.gap > 0).all()


def test_layers_and_globals_of_a_linear_gaussian_program_are_integrated():
    def program(v):
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(mu, 0.5))
            pyro.sample("v", dist.Normal(2 * h, 0.7), obs=v)

    v = torch.randn(4)
    covariance = 4 * (4.0 * torch.ones(4, 4) + 0.25 * torch.eye(4)) + 0.49 * torch.eye(4)
    expected = torch.distributions.MultivariateNormal(torch.full((4,), 2.0), covariance).log_prob(v)
    torch.testing.assert_close(log_evidence(program, None, v).log_evidence, expected)


def test_an_improper_or_bent_program_is_not_integrated():
    def bent(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h**2, 1.0), obs=v)

    def improper(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("push", 5 * h**2)
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    for program in (bent, improper):
        with pytest.raises(
            ValueError, match="Expected a guide, for the latents can neither be enumerated nor integrated"
        ):
            log_evidence(program, None, torch.randn(3))
    assert not log_evidence(bent, MeanField(bent), torch.randn(3)).exact


# ------------------------------------------------------------------------------------- by importance sampling


class Toy:
    """The network of the oracle: program, hand-written guide and tables of log p and log q over all states."""

    def __init__(self, num_rows=6):
        net = Network.random(num_visible=4, num_latents=3)
        self.net = Network(**{name: 0.6 * value for name, value in net.parameters().items()})
        self.v = torch.rand(num_rows, 4).round()
        log_p, self.log_q = self.net.tables(self.v)
        self.log_joint, self.exact = log_p, log_p.logsumexp(0)

    def model(self, v, size=None, rows=None):
        with pyro.plate("data", len(v), subsample_size=size, subsample=rows) as chosen:
            h = pyro.sample("h", dist.Bernoulli(logits=self.net.c).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=h @ self.net.W.T + self.net.b).to_event(1), obs=v[chosen])

    def guide(self, v, size=None, rows=None):
        with pyro.plate("data", len(v), subsample_size=size, subsample=rows) as chosen:
            pyro.sample("h", dist.Bernoulli(logits=v[chosen] @ self.net.R.T + self.net.r).to_event(1))

    def amortized(self):
        encoder = nn.Linear(4, 3)
        with torch.no_grad():
            encoder.weight.copy_(self.net.R)
            encoder.bias.copy_(self.net.r)
        return Amortized(self.model, encoder)

    def table(self):
        """The same q, in a table."""
        guide = MeanField(self.model)
        guide.setup(self.v)
        with torch.no_grad():
            guide.table(guide.blocks[0]).copy_(self.v @ self.net.R.T + self.net.r)
        return guide

    def estimate(self, guide, num_samples, *args, **kwargs):
        # No state may be enumerated: 1 < 8.
        return log_evidence(self.model, guide, self.v, *args, num_samples=num_samples, max_states=1, **kwargs)

    def many(self, guide, num_samples, repeats):
        found = [self.estimate(guide, num_samples) for _ in range(repeats)]
        return torch.stack([f.log_evidence for f in found]), torch.stack([f.standard_error for f in found])


GUIDES = ["guide by hand", "amortized", "table"]


def guide_of(toy, kind):
    return {"guide by hand": lambda: toy.guide, "amortized": toy.amortized, "table": toy.table}[kind]()


@pytest.mark.parametrize("kind", GUIDES)
def test_the_weights_are_unbiased_and_the_error_is_calibrated(kind):
    toy = Toy()
    repeats, S = 250, 100
    estimates, errors = toy.many(guide_of(toy, kind), S, repeats)
    # E[1/S sum w] = p(v)
    p = estimates.exp()
    assert ((p.mean(0) - toy.exact.exp()).abs() <= K * p.std(0) / math.sqrt(repeats)).all()
    # In expectation below log p(v), at the value that all tuples of two samples give for S = 2.
    assert (estimates.mean(0) < toy.exact + K * estimates.std(0) / math.sqrt(repeats)).all()
    # The stated variance is that of the estimates: averaged over rows, to within K errors of a variance.
    stated, seen = errors.square().mean(0), estimates.var(0)
    assert abs(float((seen / stated).mean()) - 1) <= K * math.sqrt(2 / (repeats * len(toy.v))) + 0.15
    # and an interval of two errors covers the truth about 95 times in 100.
    covered = ((estimates - toy.exact).abs() <= 2 * errors).double().mean()
    assert 0.90 <= float(covered) <= 0.99


def test_it_is_the_expected_bound_of_few_samples_and_rises_with_them():
    toy = Toy()
    means, ends = [], []
    for S, repeats in ((1, 400), (2, 400), (8, 200), (64, 100)):
        estimates, _ = toy.many(toy.guide, S, repeats)
        means.append(estimates.mean(0))
        ends.append(estimates.std(0) / math.sqrt(repeats))
        if S <= 2:
            expected = expected_bound(toy.log_joint, toy.log_q, S, self_normalized=True)
            assert ((means[-1] - expected).abs() <= K * ends[-1]).all()
    for lower, higher in itertools.pairwise(means):
        assert lower.mean() < higher.mean()
    assert means[-1].mean() < toy.exact.mean() + K * ends[-1].square().mean().sqrt()
    assert (toy.exact - means[-1]).mean() < 0.1 * (toy.exact - means[0]).mean()


@pytest.mark.parametrize("num_samples", [1, 2, 500])
def test_error_bound_and_effective_size_are_those_of_the_weights(num_samples):
    toy = Toy()
    program = Program(toy.model, (toy.v,), {})
    pyro.set_rng_seed(3)
    with torch.no_grad():
        values, log_q = draw(toy.guide, None, program, num_samples)
    log_w = toy.net.log_p(toy.v, values["h"]) - log_q["h"]
    torch.testing.assert_close(log_q["h"], toy.net.log_q(toy.v, values["h"]))
    # The guide is run twice, without effect, to look for point masses.
    pyro.set_rng_seed(3)
    found = toy.estimate(toy.guide, num_samples)
    w = log_w.exp()
    torch.testing.assert_close(found.log_evidence, w.mean(0).log())
    torch.testing.assert_close(found.bound, log_w.mean(0))
    torch.testing.assert_close(found.effective_sample_size, w.sum(0) ** 2 / (w**2).sum(0))
    assert found.num_samples == num_samples
    assert not found.exact
    if num_samples == 1:
        assert found.standard_error.isnan().all()
    else:
        torch.testing.assert_close(found.standard_error, w.std(0) / w.mean(0) / math.sqrt(num_samples))
    torch.testing.assert_close(found.gap, found.log_evidence - found.bound)


@pytest.mark.parametrize("per_chunk", [1, 7, 64])
def test_chunks_of_samples_add_up_to_the_whole(per_chunk, monkeypatch):
    """Memory is bounded: samples come in chunks, and the same samples give the same numbers in any chunks."""
    toy = Toy()
    S = 64
    with torch.no_grad():
        whole, log_q = draw(toy.guide, None, Program(toy.model, (toy.v,), {}), S)
    asked = []

    def replayed(guide, posterior, program, size):
        start = sum(asked)
        asked.append(size)
        return (
            {name: x[start : start + size] for name, x in whole.items()},
            {name: x[start : start + size] for name, x in log_q.items()},
        )

    monkeypatch.setattr("pyro_ext.evidence.draw", replayed)
    reference = toy.estimate(toy.guide, S)
    assert asked == [S]
    asked.clear()
    monkeypatch.setattr("pyro_ext.draws.CHUNK_ELEMENTS", per_chunk * 6 * 4)  # rows times the widest site
    found = toy.estimate(toy.guide, S)
    assert asked == [per_chunk] * (S // per_chunk) + ([S % per_chunk] if S % per_chunk else [])
    for name in ("log_evidence", "standard_error", "bound", "effective_sample_size"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name))


def test_chunked_draws_have_the_same_statistics(monkeypatch):
    toy = Toy()
    monkeypatch.setattr("pyro_ext.draws.CHUNK_ELEMENTS", 1000 * 6 * 4)
    for kind in GUIDES:
        found = toy.estimate(guide_of(toy, kind), 20_000)
        assert ((found.log_evidence - toy.exact).abs() <= K * found.standard_error).all()


def test_a_layered_guide_draws_its_layers_one_after_the_other():
    model, v, log_joint = network()
    guide = Amortized(model)
    guide.setup(v)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_(std=0.3)
    found = log_evidence(model, guide, v, num_samples=20_000, max_states=1)
    exact = oracle.log_evidence(log_joint)
    assert ((found.log_evidence - exact).abs() <= K * found.standard_error).all()
    torch.testing.assert_close(log_evidence(model, guide, v, num_samples=10).log_evidence, exact)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", GUIDES)
def test_guides_follow_the_rows_of_a_subsampled_program(kind, given):
    toy = Toy(num_rows=9)
    guide = guide_of(toy, kind)
    settings = {"rows": torch.tensor([7, 0, 4])} if given else {"size": 3}
    if kind == "table":
        guide = MeanField(toy.model)
        guide.setup(toy.v, **settings)
        with torch.no_grad():
            guide.table(guide.blocks[0]).copy_(toy.v @ toy.net.R.T + toy.net.r)
    seen = set()
    for _ in range(4):
        found = toy.estimate(guide, 5000, **settings)
        assert found.log_evidence.shape == (3,)
        # L tells the rows apart: q at the right row must give the right row's L.
        bounds = (toy.log_q.exp() * (toy.log_joint - toy.log_q)).sum(0)
        distance, which = ((found.log_evidence[:, None] - toy.exact) / found.standard_error[:, None]).abs().min(-1)
        assert (distance <= K).all()
        assert ((found.bound[:, None] - bounds).abs().min(-1).values <= 0.2).all()
        seen.add(tuple(which.tolist()))
    if not given:
        assert len(seen) > 1
    else:
        expected = toy.exact[settings["rows"]]
        assert ((found.log_evidence - expected).abs() <= K * found.standard_error).all()
        assert (found.bound - bounds[settings["rows"]]).abs().max() <= 0.2


def test_continuous_latents_by_a_hand_written_guide():
    """The exact posterior as the guide: every weight is p(v), and the error vanishes."""
    v = torch.randn(5, 4)
    expected = log_evidence(factor_analysis, None, v).log_evidence
    noise = torch.tensor([0.5, 0.7, 0.3, 0.9])
    precision = torch.tensor(W) @ torch.diag(noise**-2) @ torch.tensor(W).mT + torch.eye(2)
    offset = (v - 0.5) * noise**-2 @ torch.tensor(W).mT + torch.tensor([0.2, -0.3])

    def unlike(v):  # the same program, whose form is hidden from the integral
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.tensor([0.2, -0.3]), 1.0).to_event(1))
            nothing = torch.where(h.sum(-1, keepdim=True) > -50, 0.0, 1.0)
            pyro.sample("v", dist.Normal(h @ torch.tensor(W) + 0.5 + nothing, noise).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.MultivariateNormal(offset @ torch.linalg.inv(precision), precision_matrix=precision))

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(evidence, "_gaussian_integral", lambda program: None)
        found = log_evidence(unlike, guide, v, num_samples=50)
    torch.testing.assert_close(found.log_evidence, expected)
    torch.testing.assert_close(found.standard_error, torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.effective_sample_size, torch.full((5,), 50.0))


def test_pyros_autoguides_hand_on_auxiliary_draws():
    def program(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.Gamma(8.0, 8.0))
            pyro.sample("v", dist.Normal(h, s), obs=v)

    v = torch.tensor([0.3, -0.6])
    grid = torch.linspace(1e-4, 8, 20_001)
    # h integrates out: v ~ N(0, 1 + s^2); s by the trapezium rule.
    density = (dist.Gamma(8.0, 8.0).log_prob(grid) + dist.Normal(0.0, (1 + grid**2).sqrt()).log_prob(v[:, None])).exp()
    exact = torch.trapezoid(density, grid).log()
    guide = AutoNormal(program, init_loc_fn=init_to_mean, init_scale=0.6)
    found = log_evidence(program, guide, v, num_samples=40_000)
    assert (found.effective_sample_size > 2000).all()
    assert ((found.log_evidence - exact).abs() <= K * found.standard_error).all()

    # One joint density of all rows has no value per row, ...
    joint = AutoMultivariateNormal(program)
    with pytest.raises(
        ValueError, match=r"guide's sites inside the plates of the rows, \['data'\], but got '_.*latent'"
    ):
        log_evidence(program, joint, v)

    # ... and of a program with one row it has.
    def single(v):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(8.0, 8.0))
        pyro.sample("v", dist.Normal(h, s), obs=v)

    found = log_evidence(
        single, AutoMultivariateNormal(single, init_loc_fn=init_to_mean, init_scale=0.6), v[0], num_samples=40_000
    )
    assert (found.log_evidence - exact[0]).abs() <= K * found.standard_error


def test_a_table_guide_infers_new_data_by_its_em():
    model, v, _ = sparse_coding()
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    em.step(v)
    new = model.dream(5)
    table = guide.table(guide.blocks[0]).clone()
    states = binary_states(4)
    exact = oracle.log_evidence(program_log_joint(model, {"h": states.unsqueeze(1)}, new).detach())
    found = log_evidence(model, guide, new, num_samples=4000, max_states=1)
    assert ((found.log_evidence - exact).abs() <= K * found.standard_error).all()
    torch.testing.assert_close(log_evidence(model, guide, new).bound, -em_losses(em, new))
    assert torch.equal(guide.table(guide.blocks[0]), table)


def em_losses(em, v):
    return -em.e_step.improve(em.call(v), keep=False).bound


def test_a_point_on_a_discrete_latent_gives_a_bound():
    model, v, log_joint = sparse_coding()
    guide = Dirac(model)
    EM(model, guide, e_step=FixedPoint(), m_step=None).step(v)
    at = guide.posterior(v)["h"].mean
    index = (at @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
    expected = log_joint.gather(0, index[None]).squeeze(0)
    found = log_evidence(model, guide, v, num_samples=10, max_states=1)
    torch.testing.assert_close(found.log_evidence, expected)
    torch.testing.assert_close(found.bound, expected)
    assert (found.effective_sample_size > 9.999).all()
    torch.testing.assert_close(log_evidence(model, guide, v).bound, expected)


# ------------------------------------------------------------------------------------- effects, words, refusals


def snapshot(*modules):
    store = pyro.get_param_store()
    return (
        {name: store[name].detach().clone() for name in store.keys()},
        [{name: value.clone() for name, value in module.state_dict().items()} for module in modules],
        [parameter.grad for module in modules for parameter in module.parameters()],
        [module.training for module in modules],
    )


def same(a, b):
    leaves = torch.utils._pytree.tree_leaves
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves(a), leaves(b), strict=True)
    )


@pytest.mark.parametrize("max_states", [1, 2**16])
@pytest.mark.parametrize("guide_class", [MeanField, Amortized, Structured])
def test_nothing_is_changed(guide_class, max_states):
    model, v, _ = sparse_coding()
    guide = guide_class(model)
    guide(v), model(v)
    before = snapshot(model, guide)
    found = log_evidence(model, guide, v, num_samples=20, max_states=max_states)
    assert same(snapshot(model, guide), before)
    assert not found.log_evidence.requires_grad
    assert not found.bound.requires_grad
    with poutine.trace() as outside:
        log_evidence(model, guide, v, num_samples=20, max_states=max_states)
    assert not outside.trace.nodes.keys() - {"_INPUT", "_RETURN"}


def test_it_counts_the_words():
    toy = Toy()
    exact = log_evidence(toy.model, toy.guide, toy.v)
    assert repr(exact).startswith(f"Evidence(log p(v) = {exact.mean:.6g} nats per row, exact, 6 rows; L = ")
    sampled = toy.estimate(toy.guide, 100)
    assert repr(sampled).startswith(
        f"Evidence(log p(v) >= {sampled.mean:.6g} +- {sampled.mean_standard_error:.2g} nats"
    )
    assert "nats per row in expectation, 6 rows, 100 samples (effective: " in repr(sampled)
    assert sampled.mean_standard_error == pytest.approx(float(sampled.standard_error.norm()) / 6)
    assert isinstance(sampled, Evidence)


@pytest.mark.parametrize("num_samples", [0, -3, 2.5, "10", True])
def test_bad_numbers_of_samples(num_samples):
    toy = Toy()
    with pytest.raises(ValueError, match=r"Expected num_samples of at least 1, but got .*\. Use 100 or more\."):
        log_evidence(toy.model, toy.guide, toy.v, num_samples=num_samples)


def continuous(v):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h.prod(-1), scale), obs=v)


@pytest.mark.parametrize("guide_class", [Dirac, AutoDelta])
def test_a_point_on_a_continuous_latent_is_refused(guide_class):
    v = torch.randn(3)
    guide = guide_class(continuous)
    message = (
        r"factors with a density for log_evidence, but got a point mass on the continuous site 'h', whose L is minus"
    )
    with pytest.raises(ValueError, match=message):
        log_evidence(continuous, guide, v)
    assert not list(pyro.get_param_store())
    if guide_class is Dirac:
        assert not guide.is_set_up
    # Where log p(v) needs no guide, such a guide has no bound to show beside it.
    found = log_evidence(factor_analysis, guide_class(factor_analysis), torch.randn(3, 4))
    assert found.exact
    assert found.bound is None


def test_a_guide_is_needed_where_nothing_is_exact():
    with pytest.raises(
        ValueError, match=r"can neither be enumerated nor integrated, but got None\. Pass a fitted guide"
    ):
        log_evidence(continuous, None, torch.randn(3))
    assert not list(pyro.get_param_store())
    toy = Toy()
    with pytest.raises(ValueError, match="but got None"):
        toy.estimate(None, 10)


@pytest.mark.parametrize("max_states", [1, 2**16])
def test_guides_over_other_latents_are_refused(max_states):
    toy = Toy()

    def guide(v):
        with pyro.plate("data", len(v)):
            pyro.sample("g", dist.Normal(0.0, 1.0))

    message = r"Expected a guide over the model's latents \['h'\], but got one over \['g'\]\. Give every latent site"
    with pytest.raises(ValueError, match=message):
        log_evidence(toy.model, guide, toy.v, max_states=max_states)

    def other(v):
        with pyro.plate("data", len(v)):
            g = pyro.sample("g", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Bernoulli(logits=g[:, None].expand(-1, 4)).to_event(1), obs=v)

    for guide_class in (MeanField, Amortized):
        with pytest.raises(ValueError, match=message):
            log_evidence(toy.model, guide_class(other), toy.v, max_states=max_states)


def test_a_guide_outside_the_rows_is_refused():
    toy = Toy()

    def guide(v):
        pyro.sample("h", dist.Bernoulli(torch.full((len(v), 3), 0.5)).to_event(2))

    with pytest.raises(
        ValueError, match=r"inside the plates of the rows, \['data'\], but got 'h' outside of \['data'\]"
    ):
        toy.estimate(guide, 10)


def test_what_is_no_guide_is_refused():
    toy = Toy()
    with pytest.raises(TypeError, match=r"Expected a guide that can be called, but got int\. Pass a Pyro guide\."):
        toy.estimate(3, 10)


def test_other_data_in_a_table_are_refused():
    model, v, _ = sparse_coding()
    guide = MeanField(model)
    guide.setup(v)
    with pytest.raises(ValueError, match=r"Expected the data that the table of .MeanField\w*. was set up with"):
        log_evidence(model, guide, v + 1, max_states=1)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GaussianMixture(num_components=2, num_visible=3),
        lambda: BinarySparseCoding(num_visible=3, num_latents=2),
        lambda: HelmholtzMachine(num_visible=3, num_latents=2),
    ],
)
def test_nan_in_the_data_is_refused(model):
    model = model()
    v = torch.ones(4, 3)
    v[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"Expected .*finite.*, but got"):
        log_evidence(model, MeanField(model), v)
    assert not list(pyro.get_param_store())


def test_nan_from_the_program_is_refused():
    def program(v, bad):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h + bad, 1.0, validate_args=False), obs=v)

    bad = torch.tensor([0.0, math.nan, 0.0])
    message = r"Expected log p\(v, h\) without NaN, but got NaN in 1 of 3 rows\. Look for NaN in the data and in the"
    for max_states in (1, 2**16):
        with pytest.raises(ValueError, match=message):
            log_evidence(program, MeanField(program), torch.randn(3), bad, num_samples=5, max_states=max_states)


def test_a_subsample_inside_a_row_is_refused():
    """A global latent and a minibatch: the likelihood to the power N/B integrates to no probability."""

    def program(v, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(v), subsample_size=size) as rows:
            pyro.sample("v", dist.Normal(mu, 1.0), obs=v[rows])

    v = torch.randn(6)
    with pytest.raises(ValueError, match=r"rows with all their elements, but got 2 of 6 elements of the plate 'data'"):
        log_evidence(program, None, v, 2)
    expected = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1).log_prob(v)
    torch.testing.assert_close(log_evidence(program, None, v).log_evidence, expected)


def test_gradient_em_hands_its_guide_to_the_evidence():
    """A fitted Amortized guide on a Helmholtz machine of one latent, whose integral a grid gives."""
    model = HelmholtzMachine(num_visible=4, num_latents=1)
    v = model.dream(30)
    guide = Amortized(model)
    em = EM(model, guide, e_step=Gradient(pyro.optim.Adam({"lr": 0.05}), num_steps=150), m_step=None)
    em.step(v)
    grid = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        density = dist.Normal(0.0, 1.0).log_prob(grid)[:, None]
        density = density + bernoulli_log_prob(v, model.decoder(grid[:, None]).unsqueeze(1))
    exact = torch.trapezoid(density.exp(), grid, dim=0).log()
    found = log_evidence(model, guide, v, num_samples=5000)
    # The error is to be trusted only where the effective sample size is not tiny.
    trusted = found.effective_sample_size > 200
    assert trusted.double().mean() > 0.8
    assert ((found.log_evidence - exact).abs() <= K * found.standard_error)[trusted].all()
    assert posterior_of(guide, Program(model, (v,), {})).rows.count == 30
