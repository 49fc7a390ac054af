"""Sparse coding: the density by hand, the M-step as a maximum, masks, refusals, and learning with points."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import SGD, Adam
from scipy import stats
from torch import Tensor

from pyro_ext import EM, ClosedForm, Gradient
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.models import (
    BlockCoordinateDescent,
    CauchyPrior,
    ColumnNorm,
    Dictionary,
    ExponentialPrior,
    LaplacePrior,
    SparseCoding,
    SparsePrior,
    StudentTPrior,
    Unconstrained,
    WeightDecay,
    assign_parameters,
    read_parameter,
)
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import StatesMarginal, expected_log_joint, program_log_joint, random_posterior

pytestmark = pytest.mark.usefixtures("float64")
N, D, H = 40, 5, 6

PRIORS: dict[str, tuple[SparsePrior, Any]] = {
    "laplace": (LaplacePrior(1.5), stats.laplace(scale=1 / 1.5)),
    "exponential": (ExponentialPrior(1.5), stats.expon(scale=1 / 1.5)),
    "student": (StudentTPrior(df=3.0, scale=0.5), stats.t(df=3.0, scale=0.5)),
    "cauchy": (CauchyPrior(0.5), stats.cauchy(scale=0.5)),
}
every_prior = pytest.mark.parametrize(("prior", "oracle"), PRIORS.values(), ids=PRIORS.keys())
RULES: dict[str, Dictionary] = {"norm": ColumnNorm(), "wide": ColumnNorm(3.0), "decay": WeightDecay(0.1)}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


class Points:
    """The marginal of points h (N, H), with the sums of `pyro_ext.Marginal`."""

    def __init__(self, values: Tensor) -> None:
        self.mean = values

    def sum(self) -> Tensor:
        return self.mean.sum(0)

    def cross(self, x: Tensor) -> Tensor:
        return torch.einsum("nh,nd->hd", self.mean, x)

    def gram(self) -> Tensor:
        return torch.einsum("nh,nk->hk", self.mean, self.mean)

    def grams(self, weights: Tensor) -> Tensor:
        return torch.einsum("nd,nh,nk->dhk", weights, self.mean, self.mean)


class PointPosterior(dict[str, Points]):
    is_point = True


def posterior_of(h: Tensor) -> PointPosterior:
    return PointPosterior(h=Points(h))


def moved(model: SparseCoding) -> SparseCoding:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def points(num_rows: int = N) -> Tensor:
    return torch.randn(num_rows, H) * (torch.rand(num_rows, H) < 0.5)


def data_of(h: Tensor) -> Tensor:
    return 3 + torch.randn(len(h), D) + h @ torch.randn(H, D)


def some_mask(num_rows: int = N) -> Tensor:
    mask = torch.rand(num_rows, D) > 0.3
    mask[torch.arange(num_rows), torch.arange(num_rows) % D] = True
    return mask


def snapshot(model: SparseCoding) -> list[Tensor]:
    return [p.detach().clone() for p in (*model.parameters(), *model.buffers())]


def assert_unchanged(model: SparseCoding, before: list[Tensor]) -> None:
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))


def log_joint(model: SparseCoding, h: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """log p(h_n, v_n) of the program, shape (N,)."""
    return program_log_joint(model, {"h": h.unsqueeze(0)}, v, **kwargs)[0]


def log_joint_by_hand(model: SparseCoding, oracle: Any, h: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    residual = torch.where(mask, v - h @ model.W.T - model.bias, 0)
    beta = model.beta
    gaussian = 0.5 * mask.sum(-1) * torch.log(beta / (2 * math.pi)) - 0.5 * beta * residual.square().sum(-1)
    return gaussian + torch.as_tensor(oracle.logpdf(h.numpy())).sum(-1)


@every_prior
@pytest.mark.parametrize("learn_noise", [False, True])
def test_joint_is_the_formula(prior: SparsePrior, oracle: Any, learn_noise: bool) -> None:
    model = moved(SparseCoding(D, H, prior=prior, beta=4.0, learn_noise=learn_noise))
    h = points().abs() if prior.nonnegative else points()
    v, mask = data_of(h), some_mask()
    everything = torch.ones_like(mask)
    by_hand = log_joint_by_hand(model, oracle, h, v, everything)
    torch.testing.assert_close(log_joint(model, h, v), by_hand, rtol=1e-12, atol=1e-12)
    hidden = v.masked_fill(~mask, torch.nan)
    by_hand = log_joint_by_hand(model, oracle, h, v, mask)
    torch.testing.assert_close(log_joint(model, h, hidden, mask=mask), by_hand, rtol=1e-12, atol=1e-12)


def test_the_conventions_of_the_docstring() -> None:
    # (19.16): |h|_1 + |v - W h|^2 up to a constant is beta = 2, rate = 1.
    model = SparseCoding(D, H, rate=1.0, beta=2.0, bias=False)
    h, v = points(), torch.randn(N, D)
    cost = h.abs().sum(-1) + (v - h @ model.W.T).square().sum(-1)
    total = cost + log_joint(model, h, v)
    torch.testing.assert_close(total, total[0].expand(N), rtol=1e-12, atol=1e-12)


def test_the_default_is_a_laplace_prior_of_rate_one() -> None:
    model = SparseCoding(D, H)
    other = SparseCoding(D, H, rate=1.0)
    assert model.rate == other.rate == 1
    assert isinstance(model.dictionary, ColumnNorm)
    assert isinstance(model.prior, LaplacePrior)
    assert torch.equal(SparseCoding(D, H, rate=2 * torch.ones(H)).rate, 2 * torch.ones(H))


def test_one_rate_for_each_latent() -> None:
    rate = torch.linspace(0.5, 3, H)
    h = points()
    for prior in (LaplacePrior(rate), ExponentialPrior(rate)):
        values = h.abs()
        density = prior.distribution(prior.hyperparameters(), H).log_prob(values)
        half = 2.0 if isinstance(prior, LaplacePrior) else 1.0
        torch.testing.assert_close(density, ((rate / half).log() - rate * values).sum(-1), rtol=1e-12, atol=1e-12)


@every_prior
def test_the_prior_is_the_plain_distribution_of_pyro(prior: SparsePrior, oracle: Any) -> None:
    plain = {
        LaplacePrior: pyro.distributions.Laplace,
        ExponentialPrior: pyro.distributions.Exponential,
        StudentTPrior: pyro.distributions.StudentT,
        CauchyPrior: pyro.distributions.Cauchy,
    }
    trace = pyro.poutine.trace(SparseCoding(D, H, prior=prior)).get_trace(size=3)
    fn = trace.nodes["h"]["fn"]
    assert fn.event_shape == (H,)
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    assert type(fn) is plain[type(prior)]


def test_weight_decay_counts_once_a_row() -> None:
    model = moved(SparseCoding(D, H, dictionary=WeightDecay(0.3)))
    plain = SparseCoding(D, H, dictionary=Unconstrained())
    assign_parameters(plain, {"W": model.W.detach(), "bias": model.bias.detach()})
    h = points()
    v = data_of(h)
    difference = log_joint(model, h, v) - log_joint(plain, h, v)
    torch.testing.assert_close(difference, (-0.15 * model.W.square().sum()).expand(N), rtol=1e-9, atol=1e-9)


@every_prior
def test_dreams(prior: SparsePrior, oracle: Any) -> None:
    model = moved(SparseCoding(D, H, prior=prior, beta=4.0))
    v = model.dream(20_000)
    assert v.shape == (20_000, D)
    assert not v.requires_grad
    # Medians of what is symmetric exist for the Cauchy prior, too; means and variances where the prior has them.
    if not prior.nonnegative:
        at_least = (v >= model.bias).double().mean(0)
        assert ((at_least - 0.5).abs() < 5 * 0.5 / math.sqrt(20_000)).all()
    if not isinstance(prior, StudentTPrior | CauchyPrior):
        mean = model.W @ torch.full((H,), float(oracle.mean())) + model.bias
        assert ((v.mean(0) - mean).abs() < 5 * v.std(0) / math.sqrt(20_000)).all()
        variance = model.W.square().sum(-1) * oracle.var() + 0.25
        squares = (v - mean).square()
        assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(20_000)).all()


@every_rule
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "centred"])
@pytest.mark.parametrize("masked", [False, True], ids=["complete", "masked"])
def test_maximize_is_a_maximum(rule: Dictionary, bias: bool, masked: bool) -> None:
    model = moved(SparseCoding(D, H, dictionary=rule, bias=bias, beta=3.0))
    h = points()
    v, mask = data_of(h), some_mask()
    data = {"v": v.masked_fill(~mask, torch.nan), "mask": mask} if masked else {"v": v}
    model.maximize(model.statistics(data, posterior_of(h)))
    assert_maximum(model, lambda: log_joint(model, h, **data).sum())
    # Norms that do not bind, and decay, leave no gradient at all.
    if isinstance(rule, WeightDecay):
        assert_zero_gradient(model, lambda: log_joint(model, h, **data).sum(), scale=N)
    elif rule.radius == 1:
        assert (read_parameter(model, "W").norm(dim=0) > 1 - 1e-9).sum() >= 3


@pytest.mark.parametrize("masked", [False, True], ids=["complete", "masked"])
def test_maximize_under_a_posterior_with_spread(masked: bool) -> None:
    class Spread(StatesMarginal):
        def grams(self, weights: Tensor) -> Tensor:
            return torch.stack([self.gram(w) for w in weights.T])

    for rule in (ColumnNorm(), Unconstrained(), WeightDecay(0.2)):
        model = moved(SparseCoding(D, H, dictionary=rule, beta=3.0, learn_noise=rule == ColumnNorm()))
        states, q = torch.randn(12, H), random_posterior(12, N)
        v, mask = 3 + torch.randn(N, D), some_mask()
        data = {"v": v, "mask": mask} if masked else {"v": v}
        model.maximize(model.statistics(data, {"h": Spread(states, q)}))

        def objective(model: SparseCoding = model, states: Tensor = states, q: Tensor = q, data: Any = data) -> Tensor:
            joint = program_log_joint(model, {"h": states.unsqueeze(1).expand(-1, N, -1)}, **data)
            return expected_log_joint(joint, q)

        assert_maximum(model, objective)
        if rule != ColumnNorm():
            assert_zero_gradient(model, objective, scale=N)


@pytest.mark.parametrize("masked", [False, True], ids=["complete", "masked"])
def test_noise_dictionary_and_bias_are_at_their_joint_maximum(masked: bool) -> None:
    model = moved(SparseCoding(D, H, learn_noise=True, variance_floor=0.0))
    h = points()
    v, mask = data_of(h), some_mask()
    data = {"v": v.masked_fill(~mask, torch.nan), "mask": mask} if masked else {"v": v}
    model.maximize(model.statistics(data, posterior_of(h)))
    assert_maximum(model, lambda: log_joint(model, h, **data).sum())
    seen = mask if masked else torch.ones_like(mask)
    residual = (v - h @ model.W.T - model.bias)[seen]
    torch.testing.assert_close(1 / model.beta, residual.square().mean(), rtol=1e-10, atol=0)


def test_weight_decay_with_noise_takes_the_old_noise_for_the_dictionary() -> None:
    h = points()
    v = data_of(h)
    model = SparseCoding(D, H, dictionary=WeightDecay(0.2), beta=3.0, learn_noise=True)
    held = SparseCoding(D, H, dictionary=WeightDecay(0.2), beta=3.0)
    previous = -math.inf
    for step in range(20):
        for each in (model, held)[: 2 - min(step, 1)]:
            each.maximize(each.statistics({"v": v}, posterior_of(h)))
        if step == 0:
            torch.testing.assert_close(model.W, held.W, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                1 / model.beta, (v - h @ model.W.T - model.bias).square().mean(), rtol=1e-10, atol=0
            )
        value = log_joint(model, h, v).sum().item()
        assert value >= previous - 1e-10
        previous = value


def test_the_floor_bounds_the_noise() -> None:
    model = SparseCoding(D, H, learn_noise=True, variance_floor=0.5, dictionary=ColumnNorm(100.0))
    h = points()
    model.maximize(model.statistics({"v": h @ torch.randn(H, D)}, posterior_of(h)))
    assert model.beta.item() == pytest.approx(2.0, rel=1e-12)


def test_vanishing_noise_is_refused_without_a_floor() -> None:
    model = moved(SparseCoding(D, H, learn_noise=True, variance_floor=0.0))
    before = snapshot(model)
    h = points()
    statistics = model.statistics({"v": torch.zeros(N, D)}, posterior_of(0 * h))
    with pytest.raises(RuntimeError, match="Expected a positive noise variance, but got 0: the components explain"):
        model.maximize(statistics)
    assert_unchanged(model, before)


def test_one_sweep_of_descent_is_an_ascent_but_no_maximum() -> None:
    h = points()
    v = data_of(h)
    best = SparseCoding(D, H)
    W = read_parameter(best, "W")
    values = []
    for model in (SparseCoding(D, H, dictionary=ColumnNorm(solver=BlockCoordinateDescent(num_sweeps=1))), best):
        assign_parameters(model, {"W": W, "bias": v.mean(0) - h.mean(0) @ W.T})
        before = log_joint(model, h, v).sum().item()
        model.maximize(model.statistics({"v": v}, posterior_of(h)))
        values.append(log_joint(model, h, v).sum().item())
    assert before < values[0] < values[1]


def test_unused_atoms_stay_and_constant_ones_leave_their_share_to_the_bias() -> None:
    model = moved(SparseCoding(D, H))
    old = read_parameter(model, "W")
    h = points()
    h[:, 1], h[:, 4] = 0, 0.7
    v = data_of(h)
    model.maximize(model.statistics({"v": v}, posterior_of(h)))
    torch.testing.assert_close(read_parameter(model, "W")[:, [1, 4]], old[:, [1, 4]], rtol=1e-14, atol=0)
    torch.testing.assert_close(model.bias, (v - h @ model.W.T).mean(0), rtol=1e-12, atol=1e-12)
    assert_maximum(model, lambda: log_joint(model, h, v).sum())


def test_rounding_is_not_taken_for_the_use_of_an_atom() -> None:
    model = moved(SparseCoding(D, H, dictionary=WeightDecay(1e-6)))
    h = points()
    h[:, 4] = 0.7
    v = 100 + data_of(h)
    model.float()
    model.maximize(model.statistics({"v": v.float()}, posterior_of(h.float())))
    assert read_parameter(model, "W")[:, 4].abs().max() < 1e-12


def test_a_column_that_no_row_observes_keeps_its_bias() -> None:
    model = moved(SparseCoding(D, H, dictionary=ColumnNorm(100.0), learn_noise=True))
    old_bias, old_W = read_parameter(model, "bias"), read_parameter(model, "W")
    h, mask = points(), some_mask()
    mask[:, 2] = False
    v = data_of(h).masked_fill(~mask, torch.nan)
    model.maximize(model.statistics({"v": v, "mask": mask}, posterior_of(h)))
    torch.testing.assert_close(read_parameter(model, "bias")[2], old_bias[2], rtol=1e-14, atol=0)
    torch.testing.assert_close(read_parameter(model, "W")[2], old_W[2], rtol=1e-6, atol=0)
    residual = torch.where(mask, v - h @ model.W.T - model.bias, 0)
    torch.testing.assert_close(1 / model.beta, residual.square().sum() / mask.sum(), rtol=1e-8, atol=0)


def test_the_shift_changes_nothing_but_digits() -> None:
    h = points()
    v = data_of(h)
    found = []
    for shift in (0.0, 3.0):
        pyro.set_rng_seed(1)
        model = SparseCoding(D, H, learn_noise=True)
        model.shift.fill_(shift)
        model.maximize(model.statistics({"v": v}, posterior_of(h)))
        found.append([read_parameter(model, name) for name in ("W", "bias", "beta")])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_statistics_of_masked_and_complete_batches_add_up() -> None:
    model, h, mask = SparseCoding(D, H), points(), some_mask()
    mask[:10] = True
    v = data_of(h).masked_fill(~mask, torch.nan)

    def statistics(rows: slice, *, masked: bool = True) -> dict[str, Tensor]:
        data = {"v": v[rows], **({"mask": mask[rows]} if masked else {})}
        return model.statistics(data, posterior_of(h[rows]))

    whole = statistics(slice(0, N))
    assert whole["count"] == N
    parts = [statistics(slice(0, 10), masked=False), statistics(slice(10, 25)), statistics(slice(25, N))]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=1e-12)


@every_rule
def test_averages_over_rows_serve_as_well_as_sums(rule: Dictionary) -> None:
    h = points()
    v = data_of(h)
    model = moved(SparseCoding(D, H, dictionary=rule, learn_noise=True))
    other = copy.deepcopy(model)
    statistics = model.statistics({"v": v}, posterior_of(h))
    model.maximize(statistics)
    other.maximize({name: value / N for name, value in statistics.items()})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_statistics_of_the_library_are_those_of_the_points() -> None:
    for prior in (LaplacePrior(), ExponentialPrior()):
        model = SparseCoding(D, H, prior=prior)
        v, mask = torch.randn(N, D), some_mask()
        for data in ({"v": v}, {"v": v, "mask": mask}):
            em = EM(model, Dirac(model), e_step=Gradient(Adam({"lr": 0.1}), num_steps=3), m_step=None)
            posterior = em.e_half(em.call(**data)).posterior
            h = posterior["h"].mean.detach()
            assert h.std() > 0.01
            assert (h >= 0).all() == prior.nonnegative
            ours, expected = model.statistics(data, posterior), model.statistics(data, posterior_of(h))
            for name, value in expected.items():
                torch.testing.assert_close(ours[name].detach(), value, rtol=1e-12, atol=1e-12)
            # By hand, not through the same code.
            gram = torch.einsum("nd,nh,nk->dhk", data.get("mask", torch.ones(N, 1)).double(), h, h)
            torch.testing.assert_close(ours["gram"].detach().expand_as(gram), gram, rtol=1e-12, atol=1e-12)


def test_points_without_a_bound_on_the_dictionary_are_refused() -> None:
    model = SparseCoding(D, H, dictionary=Unconstrained())
    message = (
        "Expected a dictionary that bounds W for point masses, but got Unconstrained(): as W grows and h shrinks, "
        "log p(h, v) rises and has no maximum. Pass dictionary=ColumnNorm() or WeightDecay(rate)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.statistics({"v": torch.randn(N, D)}, posterior_of(points()))
    em = EM(model, Dirac(model), e_step=Gradient(Adam({"lr": 0.1})), m_step=ClosedForm())
    model.initialize(torch.randn(N, D))
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        em.step(torch.randn(N, D))
    assert_unchanged(model, before)


def test_the_unbounded_solution_is_real() -> None:
    # What the refusal says: c W and h / c cost less the larger c.
    model = SparseCoding(D, H, dictionary=Unconstrained())
    h = points()
    v = data_of(h)
    values = []
    W = read_parameter(model, "W")
    for c in (1.0, 10.0, 100.0):
        assign_parameters(model, {"W": c * W})
        values.append(log_joint(model, h / c, v).sum().item())
    assert values[0] < values[1] < values[2]


def test_moments_of_log_h_are_refused() -> None:
    model = SparseCoding(D, H, prior=ExponentialPrior())
    with pytest.raises(ValueError, match="Expected a point mass for ExponentialPrior, but got .*: other factors hold"):
        model.statistics({"v": torch.randn(N, D)}, MeanField(model).posterior(torch.randn(N, D)))


def test_bad_statistics_are_refused() -> None:
    model = SparseCoding(D, H)
    before = snapshot(model)
    with pytest.raises(ValueError, match="with count, observed, sum, gram, cross, total, square, but got count"):
        model.maximize({"count": torch.tensor(1.0)})
    statistics = model.statistics({"v": torch.randn(N, D)}, posterior_of(points()))
    with pytest.raises(ValueError, match="Expected finite values in the statistic 'cross'"):
        model.maximize({**statistics, "cross": statistics["cross"] / 0})
    assert_unchanged(model, before)


REFUSALS: list[tuple[Callable[[], SparseCoding], type[Exception], str]] = [
    (lambda: SparseCoding(0, 1), ValueError, "Expected num_visible >= 1, but got 0."),
    (lambda: SparseCoding(2, 0), ValueError, "Expected num_latents >= 1, but got 0."),
    (lambda: SparseCoding(2, 3, rate=0.0), ValueError, "Expected a positive and finite rate, but got 0.0. It is a sc"),
    (lambda: SparseCoding(2, 3, rate=math.inf), ValueError, "Expected a positive and finite rate, but got inf."),
    (lambda: SparseCoding(2, 3, rate=math.nan), ValueError, "Expected a positive and finite rate, but got nan."),
    (lambda: ExponentialPrior(-1.0), ValueError, "Expected a positive and finite rate, but got -1.0."),
    (lambda: StudentTPrior(df=0.0), ValueError, "Expected a positive and finite df, but got 0.0."),
    (lambda: StudentTPrior(scale=-2.0), ValueError, "Expected a positive and finite scale, but got -2.0."),
    (lambda: CauchyPrior(math.inf), ValueError, "Expected a positive and finite scale, but got inf."),
    (lambda: SparseCoding(2, 3, rate=torch.ones(2)), ValueError, "Expected rate of shape () or (3,), but got (2,)."),
    (
        lambda: SparseCoding(2, 3, prior=StudentTPrior(scale=torch.ones(3, 1))),
        ValueError,
        "Expected scale of shape () or (3,), but got (3, 1). Pass a number, or one for each latent.",
    ),
    (
        lambda: SparseCoding(2, 3, rate=2.0, prior=LaplacePrior(1.0)),
        ValueError,
        "Expected rate or prior, but got both. Write prior=LaplacePrior(2.0).",
    ),
    (lambda: SparseCoding(2, 3, prior="laplace"), TypeError, "Expected prior to be a SparsePrior, but got 'laplace'."),
    (lambda: SparseCoding(2, 3, dictionary=1.0), TypeError, "Expected dictionary to be a Dictionary, but got 1.0."),
    (lambda: SparseCoding(2, 3, beta=0.0), ValueError, "Expected a positive and finite beta, but got 0.0."),
    (lambda: SparseCoding(2, 3, variance_floor=-1.0), ValueError, "Expected variance_floor >= 0, but got -1.0."),
]


@pytest.mark.parametrize(("build", "error", "message"), REFUSALS)
def test_refusals_of_the_constructor(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


@pytest.mark.parametrize("num_rows", [3, 200])
def test_initialize(num_rows: int) -> None:
    v = 4 + torch.randn(num_rows, 30) @ torch.randn(30, 30)
    model = SparseCoding(30, 12, dictionary=ColumnNorm(2.0), learn_noise=True)
    model.initialize(v)
    W = read_parameter(model, "W")
    torch.testing.assert_close(W.norm(dim=0), torch.full((12,), 2.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(read_parameter(model, "bias"), v.mean(0))
    torch.testing.assert_close(model.shift, v.mean(0))
    torch.testing.assert_close(1 / read_parameter(model, "beta"), 0.1 * v.var(0, correction=0).mean())
    # Every atom looks like some row, and no two are the same.
    x = (v - v.mean(0)) / (v - v.mean(0)).norm(dim=-1, keepdim=True)
    closest = (x @ W / 2).max(0)
    assert (closest.values > 0.97).all()
    assert len(closest.indices.unique()) == min(num_rows, 12)
    assert torch.unique(W, dim=1).shape[1] == 12


def test_initialize_reads_what_is_observed() -> None:
    v, mask = data_of(points()), some_mask()
    model = SparseCoding(D, H, dictionary=WeightDecay(0.1), learn_noise=True)
    starts = []
    for hidden in (torch.nan, 1e6):
        pyro.set_rng_seed(1)
        model.initialize(v.masked_fill(~mask, hidden), mask=mask)
        starts.append(snapshot(model))
    assert all(map(torch.equal, *starts))
    means = torch.stack([v[seen, d].mean() for d, seen in enumerate(mask.T)])
    torch.testing.assert_close(read_parameter(model, "bias"), means)
    squares = torch.where(mask, v - means, 0).square().sum() / mask.sum()
    torch.testing.assert_close(1 / read_parameter(model, "beta"), 0.1 * squares)


def test_initialize_without_a_bias_and_with_given_noise() -> None:
    model = SparseCoding(D, H, bias=False, beta=7.0)
    model.initialize(2 + 0.01 * torch.randn(N, D))
    assert model.beta == 7
    assert torch.equal(model.bias, torch.zeros(D))
    assert torch.equal(model.shift, torch.zeros(D))
    # Atoms are rows, not differences from the mean.
    assert (read_parameter(model, "W").mT @ torch.ones(D) / D**0.5 > 0.9).all()


@pytest.mark.parametrize(("bias", "value"), [(True, 1.0), (True, 0.1), (False, 0.0)])
def test_data_that_do_not_vary_are_refused(bias: bool, value: float) -> None:
    model = SparseCoding(D, H, bias=bias)
    before = snapshot(model)
    v = torch.full((N, D), value)
    with pytest.raises(ValueError, match=f"Expected rows that differ from {'each other' if bias else '0'}, but got 40"):
        model.initialize(v)
    assert_unchanged(model, before)


def test_bad_data_are_refused() -> None:
    model = SparseCoding(D, H)
    before = snapshot(model)
    mask = some_mask()
    mask[:, 3], mask[:, 0] = False, True
    with pytest.raises(ValueError, match=r"Expected v of shape \(N, 5\), but got \(40, 4\)"):
        model.initialize(torch.randn(N, 4))
    with pytest.raises(ValueError, match="Expected finite values in v"):
        model.initialize(torch.full((N, D), torch.nan))
    with pytest.raises(ValueError, match="observed in some row, but got none in column 3"):
        model.initialize(torch.randn(N, D), mask=mask)
    with pytest.raises(ValueError, match=r"Expected mask of shape \(40, 5\), but got \(40, 1\)"):
        model(torch.randn(N, D), mask=mask[:, :1])
    assert_unchanged(model, before)


def test_parameters_stay_the_same_tensors() -> None:
    model, h = SparseCoding(D, H, learn_noise=True), points()
    model(data_of(h))
    store = pyro.get_param_store()
    tensors = {name: store[name].unconstrained() for name in store}
    assert len(tensors) == 3
    model.maximize(model.statistics({"v": data_of(h)}, posterior_of(h)))
    assert all(store[name].unconstrained() is tensor for name, tensor in tensors.items())


def test_hyperparameters_are_copies() -> None:
    rate = torch.ones(H)
    model = SparseCoding(D, H, rate=rate)
    rate.fill_(5)
    assert (model.rate == 1).all()


def test_hyperparameters_are_buffers_and_move_with_the_model() -> None:
    model = SparseCoding(D, H, prior=StudentTPrior(df=3.0, scale=torch.ones(H)))
    assert {name for name, _ in model.named_buffers()} == {"df", "scale", "shift", "beta"}
    model.float()
    v = torch.randn(N, D, dtype=torch.float32)
    assert model.df.dtype == torch.float32
    assert model(v).dtype == torch.float32
    h = points().float()
    model.maximize(model.statistics({"v": v}, posterior_of(h)))
    assert read_parameter(model, "W").dtype == torch.float32


@pytest.mark.parametrize("make_guide", [Dirac, AutoDelta])
def test_gradients_of_svi_keep_the_norms(make_guide: Callable[[SparseCoding], Any]) -> None:
    v = data_of(points(100))
    model = SparseCoding(D, H, beta=5.0)
    model.initialize(v)
    guide = make_guide(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = []
    start = read_parameter(model, "W")
    for _ in range(150):
        losses.append(svi.step(v))
        norms = read_parameter(model, "W").norm(dim=0)
        assert (norms <= 1 + 1e-12).all()
    assert losses[-1] < losses[0] - 100
    assert (norms > 0.99).sum() >= 3
    assert (read_parameter(model, "W") - start).abs().max() > 0.1


def test_gradient_m_steps_reach_the_closed_form() -> None:
    h = points(200)
    v = data_of(h)
    model, best = SparseCoding(D, H), SparseCoding(D, H)
    best.maximize(best.statistics({"v": v}, posterior_of(h)))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_joint(model, h, v).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.W, best.W, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prior", [LaplacePrior(1.0), ExponentialPrior(1.0), StudentTPrior(), CauchyPrior()])
@every_rule
def test_em_with_points_learns(prior: SparsePrior, rule: Dictionary) -> None:
    truth = SparseCoding(D, H, rate=2.0, beta=20.0)
    v = truth.dream(100)
    model = SparseCoding(D, H, prior=prior, beta=20.0, dictionary=rule)
    model.initialize(v)
    em = EM(model, Dirac(model), e_step=Gradient(Adam({"lr": 0.03}), num_steps=10), m_step=ClosedForm())
    losses = [em.step(v) for _ in range(15)]
    assert losses[-1] < losses[0] - 1
    assert all(math.isfinite(loss) for loss in losses)


def test_each_closed_form_m_step_lowers_the_loss() -> None:
    v = data_of(points(100))
    model = SparseCoding(D, H, beta=5.0, learn_noise=True)
    model.initialize(v)
    em = EM(model, Dirac(model), e_step=Gradient(SGD({"lr": 1e-3}), num_steps=5), m_step=ClosedForm())
    for _ in range(10):
        call = em.call(v)
        result = em.e_half(call)
        h = result.posterior["h"].mean.detach()
        before = log_joint(model, h, v).sum()
        em.m_half(call, result)
        assert log_joint(model, h, v).sum() >= before - 1e-9


def test_em_with_a_mask() -> None:
    h = points(100)
    v, mask = data_of(h), some_mask(100)
    model = SparseCoding(D, H, beta=5.0)
    em = EM(model, Dirac(model), e_step=Gradient(Adam({"lr": 0.05}), num_steps=10), m_step=ClosedForm())
    history = em.run(v.masked_fill(~mask, torch.nan), mask=mask, max_steps=15, tolerance=0, progress=False)
    assert history.loss[-1] < history.loss[0] - 1


def test_stepwise_em_with_one_sweep_a_step() -> None:
    v = data_of(points(120))
    model = SparseCoding(D, H, beta=5.0, dictionary=ColumnNorm(solver=BlockCoordinateDescent(num_sweeps=1)))
    model.initialize(v)
    m_step = ClosedForm(step_size=lambda t: (t + 2) ** -0.7)
    em = EM(model, Dirac(model), e_step=Gradient(Adam({"lr": 0.05}), num_steps=10), m_step=m_step)
    before = read_parameter(model, "W")
    losses = [em.step(v) for _ in range(20)]
    assert losses[-1] < losses[0] - 1
    assert (read_parameter(model, "W") != before).all()
    assert (read_parameter(model, "W").norm(dim=0) <= 1 + 1e-12).all()
