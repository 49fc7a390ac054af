"""Networks that predict points, as encoders of `Amortized`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn import functional

from pyro_ext import EM, Gradient, elbo_terms, log_evidence
from pyro_ext.guides import Amortized, Dirac, MeanField, PointEncoder
from pyro_ext.models import BinarySparseCoding

pytestmark = pytest.mark.usefixtures("float64")

W = torch.tensor([[1.0, -0.5, 0.3], [0.2, 1.1, -0.8]], dtype=torch.float64).T
RATE, NOISE = 1.5, 0.7


class Linear(PointEncoder):
    """h = M v + m, or its positive part."""

    def __init__(self, inputs: int, outputs: int, *, positive: bool = False) -> None:
        super().__init__()
        self.linear, self.positive = nn.Linear(inputs, outputs), positive

    def forward(self, v: Tensor) -> Tensor:
        h = self.linear(v)
        return h.relu() if self.positive else h


def signed(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1 / RATE).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T.to(v), NOISE).to_event(1), obs=v)


def positive(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(RATE).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T.to(v), NOISE).to_event(1), obs=v)


def log_joint(v: Tensor, h: Tensor, *, halves: bool) -> Tensor:
    """log p(v, h) per row, written out: a Laplace prior, or an exponential one."""
    noise = -0.5 * ((v - h @ W.T) / NOISE).square() - math.log(NOISE) - 0.5 * math.log(2 * math.pi)
    price = math.log(RATE / 2 if halves else RATE) - RATE * h.abs()
    return noise.sum(-1) + price.sum(-1)


CASES = {"signed": (signed, False), "positive": (positive, True)}


@pytest.mark.parametrize("case", CASES)
def test_the_posterior_is_what_the_network_puts_out_for_any_batch(case: str) -> None:
    model, is_positive = CASES[case]
    encoder = Linear(3, 2, positive=is_positive)
    guide = Amortized(model, encoder)
    zeros = 0
    for N in (6, 1, 11, 6):
        v = torch.randn(N, 3)
        codes = encoder(v)
        mean = guide.posterior(v)["h"].mean
        torch.testing.assert_close(mean, codes, rtol=1e-13, atol=0)
        assert torch.equal(mean == 0, codes == 0)
        zeros += int((mean == 0).sum())
        h = guide(v)["h"]
        torch.testing.assert_close(h, codes, rtol=1e-13, atol=0)
        assert torch.equal(guide.posterior(v).sample(3)["h"], mean.expand(3, N, 2))
    assert (zeros > 0) == is_positive


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_pyros_loss_is_that_of_the_joint_and_trains_the_network_on_it(case: str, elbo: Callable[[], ELBO]) -> None:
    model, is_positive = CASES[case]
    encoder = Linear(3, 2, positive=is_positive)
    v = torch.randn(8, 3)
    guide = Amortized(model, encoder)
    guide.setup(v)
    found = elbo().loss_and_grads(model, guide, v)
    by_hand = copy.deepcopy(encoder)
    loss = -log_joint(v, by_hand(v), halves=not is_positive).sum()
    by_hand.zero_grad()
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-12)
    for mine, other in zip(encoder.parameters(), by_hand.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
        assert bool(mine.grad.any())


def test_codes_in_single_precision_keep_their_zeros() -> None:
    torch.set_default_dtype(torch.float32)
    encoder = Linear(3, 2, positive=True)
    v = torch.randn(50, 3)
    guide = Amortized(positive, encoder)
    mean = guide.posterior(v)["h"].mean
    assert mean.dtype == torch.float32
    assert torch.equal(mean == 0, encoder(v) == 0)
    assert bool((mean == 0).any())
    assert math.isfinite(Trace_ELBO().loss_and_grads(positive, guide, v))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())


def test_all_zeros_are_a_state_like_any_other() -> None:
    encoder = Linear(3, 2, positive=True)
    with torch.no_grad():
        encoder.linear.bias.fill_(-100.0)
    v = torch.randn(8, 3)
    guide = Amortized(positive, encoder)
    guide.setup(v)
    loss = Trace_ELBO().loss_and_grads(positive, guide, v)
    assert loss == pytest.approx(-log_joint(v, torch.zeros(8, 2), halves=False).sum().item(), rel=1e-12)
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_one_output_for_every_number_of_every_element() -> None:
    """Elements of inner plates, and events of more than one dimension."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v), dim=-2):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                h = pyro.sample("h", dist.Exponential(1.0).expand([2, 2]).to_event(2))
                pyro.sample("v", dist.Normal(g + h.sum((-1, -2)), 1.0), obs=v)

    encoder = Linear(3, 12, positive=True)
    guide = Amortized(model, {"h": encoder})
    v = torch.randn(5, 3)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, encoder(v).reshape(5, 3, 2, 2), rtol=1e-13, atol=0)
    with pyro.plate("particles", 7, dim=-3):
        drawn = guide(v)["h"]
    torch.testing.assert_close(drawn, encoder(v).reshape(5, 3, 2, 2).expand(7, 5, 3, 2, 2), rtol=1e-13, atol=0)


def test_values_of_a_simplex_are_taken_as_they_are() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("v", dist.Normal(p, 1.0).to_event(1), obs=v)

    class Softmax(Linear):
        def forward(self, v: Tensor) -> Tensor:
            return super().forward(v).softmax(-1)

    encoder, v = Softmax(3, 3), torch.randn(4, 3)
    torch.testing.assert_close(Amortized(model, encoder).posterior(v)["p"].mean, encoder(v))


def test_a_subsampled_program_and_its_new_rows() -> None:
    data = torch.randn(20, 3)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v), subsample_size=4) as index:
            h = pyro.sample("h", dist.Laplace(0.0, 1 / RATE).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, NOISE).to_event(1), obs=v[index])

    encoder = Linear(3, 2)
    guide = Amortized(model, encoder)
    guide.setup(data)
    trace = poutine.trace(guide).get_trace(data)
    rows = data[trace.nodes["data"]["value"]]
    torch.testing.assert_close(trace.nodes["h"]["value"], encoder(rows))


def layers(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        top = pyro.sample("top", dist.Bernoulli(0.3).expand([2]).to_event(1))
        h = pyro.sample("h", dist.Exponential(torch.exp(-top)).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T, NOISE).to_event(1), obs=v)


def test_an_encoder_above_reads_the_codes_not_their_logarithms() -> None:
    below, above = Linear(3, 2, positive=True), nn.Linear(2, 2)
    guide = Amortized(layers, {"h": below, "top": above})
    v = torch.randn(30, 3)
    assert bool((below(v) == 0).any())
    guide.setup(v)
    assert not guide.is_static
    trace = poutine.trace(guide).get_trace(v)
    logits = above(below(v))
    torch.testing.assert_close(trace.nodes["top"]["fn"].base_dist.logits, logits)
    q = guide.posterior(v)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    draws = {"h": below(v).expand(4, 30, 2), "top": states[:, None].expand(4, 30, 2)}
    expected = -functional.binary_cross_entropy_with_logits(logits.expand(4, 30, 2), draws["top"], reduction="none")
    torch.testing.assert_close(q._distribution(q.sites[1], draws).log_prob(draws["top"]), expected.sum(-1).detach())
    assert math.isfinite(Trace_ELBO(num_particles=3, vectorize_particles=True).loss_and_grads(layers, guide, v))


def test_an_encoder_above_a_latent_with_a_density_reads_its_features() -> None:
    above = nn.Linear(2, 2)
    guide = Amortized(layers, {"top": above})
    v = torch.randn(10, 3)
    trace = poutine.trace(guide).get_trace(v)
    expected = above(trace.nodes["h"]["value"].log())
    torch.testing.assert_close(trace.nodes["top"]["fn"].base_dist.logits, expected)


def mixed(v: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1 / RATE).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T, sigma).to_event(1), obs=v)


def test_points_beside_the_table_of_a_global_latent() -> None:
    encoder, v = Linear(3, 2), torch.randn(40, 3)
    guide = Amortized(mixed, encoder)
    svi = SVI(mixed, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(v) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 100
    torch.testing.assert_close(guide.posterior(v)["h"].mean, encoder(v))
    assert bool(guide.posterior(v)["sigma"].sample(100).var() > 0)


def test_which_guides_are_points() -> None:
    v = torch.randn(4, 3)
    guide = Amortized(signed, Linear(3, 2))
    assert not guide.is_point
    guide.setup(v)
    assert guide.is_point
    table = Amortized(mixed, Linear(3, 2))
    table.setup(v)
    plain = Amortized(signed)
    plain.setup(v)
    assert [table.is_point, plain.is_point, MeanField(signed).is_point, Dirac(signed).is_point] == [False] * 3 + [True]


# ------------------------------------------------------------------------------------- inside Pyro and EM


def test_training_by_svi_lowers_the_loss_and_names_the_parameters() -> None:
    encoder, v = Linear(3, 2, positive=True), torch.randn(60, 3).abs()
    guide = Amortized(positive, encoder, name="predictor")
    svi = SVI(positive, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(v) for _ in range(200)]
    assert losses[-1] < losses[0] - 5
    assert set(pyro.get_param_store()) == {f"predictor.encoders.h$$$linear.{name}" for name in ("weight", "bias")}
    assert set(guide.state_dict()) == {f"encoders.h.linear.{name}" for name in ("weight", "bias")}


def test_predictive_draws_around_the_points() -> None:
    encoder, v = Linear(3, 2), torch.randn(5, 3)
    guide = Amortized(signed, encoder)
    draws = Predictive(poutine.uncondition(signed), guide=guide, num_samples=8)(v)
    torch.testing.assert_close(draws["h"], encoder(v).detach().expand(8, 5, 2))


def test_em_moves_the_network_and_reports_the_joint() -> None:
    encoder, v = Linear(3, 2), torch.randn(40, 3)
    guide = Amortized(signed, encoder)
    em = EM(signed, guide, e_step=Gradient(Adam({"lr": 0.02}), num_steps=5), m_step=None)
    first = em.step(v)
    assert em.loss_label == "-log p(h, v)"
    for _ in range(30):
        last = em.step(v)
    assert last < first - 2
    assert em.evaluate_loss(v) == pytest.approx(-log_joint(v, encoder(v), halves=True).sum().item(), rel=1e-10)
    torch.testing.assert_close(em.infer(v[:3])["h"].mean, encoder(v[:3]))


def test_a_quadratic_program_trains_points_on_its_exact_form() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, NOISE).to_event(1), obs=v)

    encoder, v = Linear(3, 2), torch.randn(30, 3)
    em = EM(model, Amortized(model, encoder), e_step=Gradient(Adam({"lr": 0.05}), num_steps=400), m_step=None)
    em.step(v)
    # The posterior mean is linear in v, and is the MAP point.
    precision = torch.eye(2) + W.T @ W / NOISE**2
    best = torch.linalg.solve(precision, W.T / NOISE**2)
    torch.testing.assert_close(encoder.linear.weight.detach(), best, atol=1e-3, rtol=0)


def test_bounds_are_refused_as_for_dirac() -> None:
    v = torch.randn(4, 3)
    for model, encoder in ((signed, Linear(3, 2)), (positive, Linear(3, 2, positive=True)), (mixed, Linear(3, 2))):
        guide = Amortized(model, encoder)
        for name, refused in (("log_evidence", log_evidence), ("elbo_terms", elbo_terms)):
            with pytest.raises(ValueError, match=f"with a density for {name}, but got a point mass on the cont.* 'h'"):
                refused(model, guide, v)
            assert not guide.is_set_up


# ------------------------------------------------------------------------------------- what is refused


def test_points_of_a_discrete_latent_are_refused_by_name() -> None:
    model = BinarySparseCoding(num_visible=3, num_latents=2)
    guide = Amortized(model, Linear(3, 2))
    before = list(pyro.get_param_store())
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"Expected a continuous latent for a PointEncoder, but got the binary site 'h'\. Pass a net",
        ):
            guide(torch.randn(4, 3))
    assert not guide.is_set_up
    assert list(pyro.get_param_store()) == before


def test_outputs_that_do_not_fit_are_refused() -> None:
    guide = Amortized(signed, Linear(3, 4))
    with pytest.raises(ValueError, match=r"with 2 outputs, one for each number of the latent, but got \(1, 4\)\. Let"):
        guide(torch.randn(5, 3))
    assert not guide.is_set_up
    with pytest.raises(ValueError, match=r"an encoder of 'h' that reads 3 features, but it failed"):
        Amortized(signed, Linear(4, 2))(torch.randn(5, 3))


def test_values_outside_the_support_are_refused_at_the_first_call_and_later() -> None:
    v = torch.randn(20, 3)
    guide = Amortized(positive, Linear(3, 2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Expected values of 'h' in its support, .* Map them onto the support"):
            guide(v)
    assert not guide.is_set_up
    assert not list(pyro.get_param_store())
    encoder = Linear(3, 2, positive=True)
    guide = Amortized(positive, encoder)
    guide(v)
    encoder.positive = False
    for call in (guide, guide.posterior):
        with pytest.raises(ValueError, match=r"Expected values of 'h' in its support"):
            call(v)


def test_one_network_for_two_latents_is_refused_as_ever() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            g = pyro.sample("g", dist.Bernoulli(0.5).expand([3]).to_event(1))
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(g + h, 1.0).to_event(1), obs=v)

    v = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"one encoded latent for a single encoder, but got \['g', 'h'\]"):
        Amortized(model, Linear(3, 3)).setup(v)
    guide = Amortized(model, {"h": Linear(3, 3)})
    guide.setup(v)
    assert [block.factor.is_point for block in guide.blocks] == [False, True]


def test_trying_an_encoder_out_leaves_its_mode_and_its_statistics_alone() -> None:
    class Normed(PointEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, v: Tensor) -> Tensor:
            return self.linear(self.norm(v)).relu()

    encoder = Normed()
    Amortized(positive, encoder).setup(torch.randn(5, 3))
    assert encoder.training
    assert encoder.norm.training
    assert not encoder.norm.running_mean.any()


class _Linear(PointEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).double()

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.layer(v).relu()


def _scaled(v: torch.Tensor) -> None:
    sigma = pyro.sample("sigma", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(torch.ones(2, dtype=v.dtype)).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True).expand(-1, 3), sigma[..., None]).to_event(1), obs=v)


def test_a_point_beside_a_density_leaves_the_density_its_moments() -> None:
    torch.manual_seed(0)
    v = torch.randn(6, 3, dtype=torch.float64)
    guide = Amortized(_scaled, _Linear())
    guide.setup(v)
    with torch.no_grad():
        guide.tables.sigma_unconstrained[...] = torch.tensor([0.2, -0.5])
    q = guide.posterior(v)
    loc, log_scale = guide.tables.sigma.detach().double()
    torch.testing.assert_close(q["sigma"].mean.double(), (loc + log_scale.exp().square() / 2).exp(), rtol=1e-5, atol=0)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + log_scale + loc
    torch.testing.assert_close(q["sigma"].entropy().double().reshape(()), entropy, rtol=1e-5, atol=1e-5)


class _Transposed(PointEncoder):
    """A parameter whose memory is another order than its shape's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64).T)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return v @ self.weight


def test_parameters_that_are_not_contiguous_are_trained() -> None:
    torch.manual_seed(0)
    v = torch.randn(20, 3, dtype=torch.float64)

    def model(v: torch.Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2, dtype=v.dtype), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, 1.0).to_event(1), obs=v)

    encoder = _Transposed()
    before = encoder.weight.detach().clone()
    guide = Amortized(model, encoder)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(v)
    assert (encoder.weight - before).abs().min() > 0.01
    codes = guide.posterior(v)["h"].mean
    torch.testing.assert_close(codes, (v @ encoder.weight).detach())
