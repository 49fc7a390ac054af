"""Posteriors: moments, sums over rows, densities and draws against enumeration and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.guides import Dirac, MeanField
from pyro_ext.guides.structured import Structured
from pyro_ext.markov_chain import MarkovChain
from pyro_ext.posterior import Posterior
from tests.oracles.enumeration import StatesMarginal, binary_states

pytestmark = pytest.mark.usefixtures("float64")

DRAWS = 20_000
K = 5.0
"""Sampled numbers are compared at 5 standard errors."""


def randomise(guide: Any) -> None:
    with torch.no_grad():
        for block in guide.blocks:
            table = guide.table(block)
            table.copy_(0.7 * torch.randn_like(table))


def posterior_of(guide: Any, *args: Any) -> Posterior:
    guide.setup(*args)
    randomise(guide)
    return guide.posterior(*args)


def binary(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def real(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def mixed(v: Tensor) -> None:
    """A site of every kind, some in an inner plate; v is (3, N), rows at dim -1."""
    with pyro.plate("rows", v.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3).expand([2]).to_event(1))
        with pyro.plate("inner", v.shape[-2], dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.sample("v", dist.Normal(a.sum(-1) + z + o[..., 0] + x, s), obs=v)


BINARY_GUIDES: dict[str, Callable[[], Any]] = {
    "mean field": lambda: MeanField(binary),
    "joint": lambda: Structured(binary),
    "pair and rest": lambda: Structured(binary, blocks=[[("h", [2, 0])]]),
}


@pytest.mark.parametrize("name", BINARY_GUIDES)
def test_sums_over_rows_are_those_of_all_states(name: str) -> None:
    posterior = posterior_of(BINARY_GUIDES[name](), torch.randn(5))
    states = binary_states(3)
    probs = posterior.log_prob({"h": states[:, None, :].expand(8, 5, 3)}).exp()
    torch.testing.assert_close(probs.sum(0), torch.ones(5))
    oracle, marginal = StatesMarginal(states, probs), posterior["h"]
    weights, x = torch.rand(5), torch.randn(5, 4)
    torch.testing.assert_close(marginal.mean, oracle.mean)
    torch.testing.assert_close(marginal.probs, oracle.mean)
    torch.testing.assert_close(marginal.sum(), oracle.sum())
    torch.testing.assert_close(marginal.sum(weights), oracle.sum(weights))
    torch.testing.assert_close(marginal.cross(x), oracle.cross(x))
    torch.testing.assert_close(marginal.gram(), oracle.gram())
    torch.testing.assert_close(marginal.gram(weights), oracle.gram(weights))
    entropy = -(probs * probs.log()).sum(0)
    torch.testing.assert_close(posterior.entropy(), entropy)
    torch.testing.assert_close(marginal.entropy(), entropy)
    torch.testing.assert_close(marginal.log_prob(states[3].expand(5, 3)), probs[3].log())


@pytest.mark.parametrize("family", [MeanField, Structured])
def test_gaussian_moments(family: Callable[[Any], Any]) -> None:
    posterior = posterior_of(family(real), torch.randn(5))
    (block,) = posterior.blocks
    fn = block.factor.marginal(posterior.conditioner(block, {}), 0, 3)
    covariance = torch.diag_embed(fn.variance) if family is MeanField else fn.covariance_matrix
    weights, marginal = torch.rand(5), posterior["h"]
    moments = covariance + fn.mean[:, :, None] * fn.mean[:, None, :]
    torch.testing.assert_close(marginal.mean, fn.mean)
    torch.testing.assert_close(marginal.gram(), moments.sum(0))
    torch.testing.assert_close(marginal.gram(weights), (weights[:, None, None] * moments).sum(0))
    torch.testing.assert_close(posterior.entropy(), fn.entropy())
    with pytest.raises(ValueError, match="Expected a discrete site, but got the real site 'h'. Use `mean`."):
        _ = marginal.probs


def test_a_point_has_its_own_moments() -> None:
    posterior = posterior_of(Dirac(real), torch.randn(5))
    h = posterior["h"].mean
    torch.testing.assert_close(posterior["h"].gram(), h.mT @ h)
    assert posterior.is_point
    assert not posterior_of(MeanField(real, name="other"), torch.randn(5)).is_point
    assert posterior.entropy().tolist() == [0] * 5


def test_entropy_and_density_of_mixed_programs_agree() -> None:
    posterior = posterior_of(MeanField(mixed), torch.randn(3, 4))
    values, log_q = posterior.sample_with_log_prob(DRAWS)
    assert log_q.shape == (DRAWS, 4)
    torch.testing.assert_close(posterior.log_prob(values), log_q)
    estimate, error = -log_q.mean(0), log_q.std(0) / DRAWS**0.5
    assert bool(((estimate - posterior.entropy()).abs() <= K * error).all())
    for name, shape in {"a": (4, 2), "z": (3, 4, 3), "o": (3, 4, 2), "x": (3, 4), "s": (3, 4)}.items():
        mean = posterior[name].mean
        assert mean.shape == shape
        site = posterior[name].site
        draws = values[name] if name == "s" else site.to_features(values[name]).reshape((DRAWS,) + shape)
        error = draws.std(0) / DRAWS**0.5
        assert bool(((draws.mean(0) - mean).abs() <= K * error + 1e-12).all())


def test_sums_of_sites_in_inner_plates_run_over_their_elements() -> None:
    posterior = posterior_of(MeanField(mixed), torch.randn(3, 4))
    mean = posterior["x"].mean
    x = torch.randn(4, 2)
    torch.testing.assert_close(posterior["x"].sum(), mean.sum(-1))
    torch.testing.assert_close(posterior["x"].cross(x), mean @ x)
    (block,) = [b for b in posterior.blocks if b.name == "x"]
    variance = posterior.conditioner(block, {})[..., 1].exp() ** 2
    torch.testing.assert_close(posterior["x"].gram(), mean @ mean.mT + torch.diag(variance.sum(-1)))
    probs = posterior["z"].probs
    torch.testing.assert_close(posterior["z"].sum(), probs.sum(1).reshape(-1))
    gram = posterior["z"].gram()
    torch.testing.assert_close(gram[:3, :3], torch.diag(probs[0].sum(0)))
    torch.testing.assert_close(gram[:3, 3:6], probs[0].mT @ probs[1])


CONSTRAINED = {
    "positive": (dist.Gamma(2.0, 1.0), lambda m, s: (m + s**2 / 2).exp()),
    "unit interval": (dist.Beta(2.0, 1.0), None),
    "simplex": (dist.Dirichlet(torch.ones(3)), None),
}


@pytest.mark.parametrize("name", CONSTRAINED)
def test_means_of_constrained_sites_are_integrals(name: str) -> None:
    fn, closed_form = CONSTRAINED[name]

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            s = pyro.sample("s", fn)
            pyro.sample("v", dist.Normal(s if name != "simplex" else s[..., 0], 1.0), obs=v)

    posterior = posterior_of(MeanField(model), torch.randn(4))
    marginal = posterior["s"]
    draws = marginal.sample(DRAWS)
    mean = marginal.mean
    error = draws.std(0) / DRAWS**0.5
    scale = 1 if name != "simplex" else 1 + (DRAWS / 4096) ** 0.5  # the mean over a simplex is drawn, from 4,096
    assert bool(((draws.mean(0) - mean).abs() <= K * error * scale).all())
    if closed_form is not None:
        (block,) = posterior.blocks
        loc, log_scale = posterior.conditioner(block, {}).unbind(-1)
        torch.testing.assert_close(mean, closed_form(loc, log_scale.exp()))


def test_draws_do_not_need_a_gradient_and_reparametrised_ones_have_it() -> None:
    guide = MeanField(real)
    v = torch.randn(5)
    posterior = posterior_of(guide, v)
    assert not posterior.sample(2)["h"].requires_grad
    assert posterior["h"].sample(7).shape == (7, 5, 3)


def test_unknown_and_visible_sites_have_no_marginal() -> None:
    posterior = posterior_of(MeanField(binary), torch.randn(5))
    with pytest.raises(KeyError, match=r"Expected a latent site \('h'\), but got 'v'. Visible sites have no posterior"):
        _ = posterior["v"]


def test_a_posterior_of_nothing_cannot_be_drawn() -> None:
    posterior = posterior_of(MeanField(binary), torch.randn(5))
    empty = Posterior(posterior.rows, (), (), posterior.conditioner)
    with pytest.raises(RuntimeError, match="Expected a posterior with latent sites, but got none. Set the guide up"):
        empty.sample(1)


def conditional_posterior() -> Posterior:
    """q(h) q(x | h): x's mean depends on the drawn h."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            x = pyro.sample("x", dist.Normal(h, 1.0))
            pyro.sample("v", dist.Normal(x, 1.0), obs=v)

    found = posterior_of(MeanField(model), torch.randn(4))

    def conditioner(block: Any, values: Any) -> Tensor:
        params = found.conditioner(block, {})
        if block.name == "x" and "h" in values:
            loc = params[..., :1] + 3 * values["h"][..., None]
            return torch.cat([loc, params[..., 1:].expand_as(loc)], -1)
        return params

    return Posterior(found.rows, found.sites, found.blocks, conditioner, static=False)


def test_conditional_factors_are_drawn_in_order_and_their_means_sampled() -> None:
    posterior = conditional_posterior()
    values, log_q = posterior.sample_with_log_prob(DRAWS)
    assert values["x"].shape == (DRAWS, 4)
    torch.testing.assert_close(posterior.log_prob(values), log_q)
    params = {b.name: posterior.conditioner(b, {}) for b in posterior.blocks}
    expected = params["x"][..., 0] + 3 * params["h"][..., 0].sigmoid()
    error = values["x"].std(0) / DRAWS**0.5
    assert bool(((values["x"].mean(0) - expected).abs() <= K * error).all())
    few = values["x"].std(0) / 128**0.5
    assert bool(((posterior["x"].mean - expected).abs() <= K * few).all())


def test_conditional_factors_have_no_closed_forms() -> None:
    posterior = conditional_posterior()
    with pytest.raises(ValueError, match="for an entropy in closed form, but got a guide with conditional factors"):
        posterior.entropy()
    with pytest.raises(ValueError, match="for a marginal in closed form"):
        posterior["x"].log_prob(torch.zeros(4))
    with pytest.raises(ValueError, match="for an entropy in closed form"):
        posterior["x"].entropy()
    with pytest.raises(ValueError, match="for second moments in closed form"):
        posterior["x"].gram()


def test_posterior_of_a_subsampled_program_is_that_of_all_rows() -> None:
    def model(v: Tensor) -> None:
        with (
            pyro.plate("inner", 6, subsample_size=2, dim=-2) as j,
            pyro.plate("rows", 10, subsample_size=4, dim=-1) as i,
        ):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[j[:, None], i])

    def local(v: Tensor) -> None:
        with pyro.plate("rows", 10, subsample_size=4, dim=-1) as i:
            a = pyro.sample("a", dist.Bernoulli(0.3))
            with pyro.plate("inner", 6, subsample_size=2, dim=-2) as j:
                h = pyro.sample("h", dist.Normal(a, 1.0))
                pyro.sample("v", dist.Normal(h, 1.0), obs=v[j[:, None], i])

    v = torch.randn(6, 10)
    for number, program in enumerate((model, local)):
        guide = MeanField(program, name=f"guide_{number}")
        posterior = posterior_of(guide, v)
        (block,) = [b for b in posterior.blocks if b.name == "h"]
        entropy = block.factor.entropy(guide.table(block).detach())
        assert entropy.shape == (6, 10)
        if number:
            (other,) = [b for b in posterior.blocks if b.name == "a"]
            entropy = entropy.sum(0) + other.factor.entropy(guide.table(other).detach())
        torch.testing.assert_close(posterior.entropy(), entropy)
        values, log_q = posterior.sample_with_log_prob(3)
        assert values["h"].shape == (3, 6, 10)
        terms = posterior["h"].log_prob(values["h"])
        if number:
            terms = terms.sum(1) + posterior["a"].log_prob(values["a"])
        torch.testing.assert_close(log_q, terms)


@pytest.mark.parametrize(
    ("prior", "q"),
    [
        (dist.HalfNormal(2.0), lambda loc, scale: dist.LogNormal(loc, scale).entropy()),
        (dist.Beta(2.0, 3.0), None),
        (dist.Dirichlet(torch.ones(3)), None),
    ],
    ids=["positive", "unit interval", "simplex"],
)
def test_the_entropy_of_constrained_latents_is_that_of_their_values(prior: Any, q: Any) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", prior)
            pyro.sample("v", dist.Normal(z if z.dim() == 1 else z.sum(-1), 1.0), obs=v)

    posterior = MeanField(model).posterior(torch.zeros(2))
    _, log_q = posterior.sample_with_log_prob(20000)
    error = log_q.std(0) / 20000**0.5
    # k = 5 standard errors of the reference, and of the 4,096 draws that a simplex takes.
    assert bool(((posterior.entropy() + log_q.mean(0)).abs() < 5 * error * (1 + 20000 / 4096) ** 0.5).all())
    torch.testing.assert_close(posterior["z"].entropy(), posterior.entropy(), rtol=0.02, atol=0.05)
    if q is not None:
        base = posterior["z"].distribution.base_dist
        torch.testing.assert_close(posterior.entropy(), q(base.mean, base.stddev), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- modes


def test_the_mode_of_mean_field_is_that_of_each_unit() -> None:
    v = torch.randn(4, 3)
    posterior = posterior_of(MeanField(mixed), v)
    with pytest.raises(ValueError, match="Expected unconstrained sites, but got the constrained 's'"):
        posterior.mode()
    posterior = posterior_of(MeanField(binary), torch.randn(5))
    assert bool((posterior.mode()["h"] == (posterior["h"].mean > 0.5)).all())
    posterior = posterior_of(MeanField(real), torch.randn(5))
    torch.testing.assert_close(posterior["h"].mode(), posterior["h"].mean)


def classes(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
        pyro.sample("v", dist.Normal(z + o[..., 0], 1.0), obs=v)


@pytest.mark.parametrize("make", [MeanField, Structured])
def test_the_mode_is_the_most_probable_of_all_states(make: Any) -> None:
    posterior = posterior_of(make(classes), torch.randn(6))
    mode = posterior.mode()
    assert mode["z"].dtype == torch.long
    best = posterior.log_prob({name: value[None] for name, value in mode.items()})[0]
    for z in range(3):
        for o in range(2):
            values = {"z": torch.full((1, 6), z), "o": torch.eye(2)[o].expand(1, 6, 2)}
            assert bool((posterior.log_prob(values) <= best + 1e-12).all())


def test_the_mode_of_a_point_is_the_point() -> None:
    posterior = posterior_of(Dirac(real), torch.randn(3))
    torch.testing.assert_close(posterior.mode()["h"], posterior["h"].mean)


# ---------------------------------------------------------------------- Markov chains


def chains(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        one = pyro.sample("one", MarkovChain(torch.zeros(2), torch.zeros(2, 2), 3))
        two = pyro.sample("two", MarkovChain(torch.zeros(3), torch.zeros(2, 3, 3), 3))
        pyro.sample("v", dist.Normal(one[..., 0] + two[..., 0], 1.0).to_event(1), obs=v)


def paths(states: int) -> Tensor:
    return torch.eye(states)[torch.cartesian_prod(*[torch.arange(states)] * 3)]


@pytest.mark.parametrize("make", [MeanField, Structured])
def test_pairs_of_chains_are_those_of_all_paths(make: Any) -> None:
    posterior = posterior_of(make(chains), torch.randn(4, 3))
    one, two = paths(2).repeat_interleave(27, 0), paths(3).repeat(8, 1, 1)
    values = {"one": one[:, None].expand(-1, 4, -1, -1), "two": two[:, None].expand(-1, 4, -1, -1)}
    probs = posterior.log_prob(values).exp()
    torch.testing.assert_close(probs.sum(0), torch.ones(4))
    for name, states in (("one", one), ("two", two)):
        torch.testing.assert_close(posterior[name].mean, torch.einsum("sn,stk->ntk", probs, states))
        weights = torch.rand(4, 2)
        pairs = torch.einsum("sn,stj,stk->ntjk", probs, states[:, :-1], states[:, 1:])
        torch.testing.assert_close(posterior[name].pairwise(), pairs.sum((0, 1)))
        torch.testing.assert_close(posterior[name].pairwise(weights), torch.einsum("nt,ntjk->jk", weights, pairs))
    for names in (["one", "two"], ["two", "one"], ["two"]):
        joined = torch.cat([{"one": one, "two": two}[name] for name in names], -1)
        grams = torch.einsum("sn,sti,stj->ntij", probs, joined, joined)
        weights = torch.rand(4, 3)
        torch.testing.assert_close(posterior.time_gram(names), grams.sum((0, 1)))
        torch.testing.assert_close(posterior.time_gram(names, weights), torch.einsum("nt,ntij->ij", weights, grams))
    flat = torch.einsum("sn,si,sj->ij", probs, one.flatten(1), one.flatten(1))
    torch.testing.assert_close(posterior["one"].gram(), flat)
    mode = posterior.mode()
    best = posterior.log_prob({name: value[None] for name, value in mode.items()})[0]
    torch.testing.assert_close(best, probs.amax(0).log())
    draws = posterior.sample(DRAWS)
    error = (posterior["two"].mean * (1 - posterior["two"].mean) / DRAWS).sqrt()
    assert bool(((draws["two"].mean(0) - posterior["two"].mean).abs() <= K * error).all())


def test_sums_over_chains_name_what_they_cannot_serve() -> None:
    posterior = posterior_of(MeanField(binary), torch.randn(4))
    with pytest.raises(ValueError, match="Expected a site with a Markov-chain factor, but got 'h' without one"):
        posterior["h"].pairwise()
    with pytest.raises(ValueError, match="Expected a site with a Markov-chain factor, but got 'h' without one"):
        posterior.time_gram(["h"])
    posterior = posterior_of(MeanField(chains), torch.randn(4, 3))
    with pytest.raises(KeyError, match="Expected a latent site \\('one', 'two'\\), but got 'three'"):
        posterior.time_gram(["three"])
    with pytest.raises(ValueError, match="Expected the name of at least one chain, but got none"):
        posterior.time_gram([])

    def lengths(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            one = pyro.sample("one", MarkovChain(torch.zeros(2), torch.zeros(2, 2), 3))
            two = pyro.sample("two", MarkovChain(torch.zeros(2), torch.zeros(2, 2), 4))
            pyro.sample("v", dist.Normal(one[..., 0, 0] + two[..., 0, 0], 1.0), obs=v)

    posterior = posterior_of(MeanField(lengths), torch.randn(4))
    with pytest.raises(ValueError, match="Expected chains of the same number of steps, but got 3 and 4"):
        posterior.time_gram(["one", "two"])
