"""Missing entries of the linear models: exact likelihoods of what is observed, M-steps, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, Sequential, Warm, log_evidence
from pyro_ext.choose import choose_evaluator
from pyro_ext.guides import Amortized, MeanField, Structured
from pyro_ext.models import (
    BinarySparseCoding,
    FactorAnalysis,
    LinearGaussian,
    Model,
    ProbabilisticPCA,
    assign_parameters,
    read_parameter,
)
from tests.models.stationarity import assert_maximum, assert_zero_gradient
from tests.oracles.enumeration import bernoulli_log_prob, binary_states

pytestmark = pytest.mark.usefixtures("float64")
N, D, K = 40, 5, 2
MODELS: dict[str, Callable[[], Model]] = {
    "factor analysis": lambda: FactorAnalysis(D, K),
    "probabilistic pca": lambda: ProbabilisticPCA(D, K),
    "binary sparse coding": lambda: BinarySparseCoding(D, K),
    "shared precision": lambda: BinarySparseCoding(D, K, shared_precision=True),
}
ALL = {**MODELS, "linear gaussian": lambda: LinearGaussian(D, K, learn_prior=True)}
every_model = pytest.mark.parametrize("build", ALL.values(), ids=ALL.keys())
diagonal_noise = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def moved(build: Callable[[], Model]) -> Model:
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def incomplete(num_rows: int = N, missing: float = 0.3) -> tuple[Tensor, Tensor]:
    """Correlated data, 30 % of them NaN, and what is observed of them; no row is empty."""
    v = torch.randn(num_rows, 1) * torch.linspace(2, -1, D) + 0.7 * torch.randn(num_rows, D) + torch.arange(D)
    mask = torch.rand(num_rows, D) > missing
    mask[torch.arange(num_rows), torch.arange(num_rows) % D] = True
    return v.masked_fill(~mask, torch.nan), mask


def observed_log_likelihood(model: Model, v: Tensor, mask: Tensor) -> Tensor:
    """log p of the observed entries row by row: submatrices of the covariance, or all states of h."""
    rows = []
    for x, seen in zip(v, mask, strict=True):
        if isinstance(model, LinearGaussian):
            noise, prior = model.noise_tril @ model.noise_tril.T, model.prior_tril @ model.prior_tril.T
            covariance, mean = model.W @ prior @ model.W.T + noise, model.W @ model.prior_mean + model.bias
            fn = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen])
            rows.append(fn.log_prob(x[seen]))
        elif isinstance(model, FactorAnalysis):
            covariance = model.W @ model.W.T + model.variance * torch.eye(D)
            fn = torch.distributions.MultivariateNormal(model.mean[seen], covariance[seen][:, seen])
            rows.append(fn.log_prob(x[seen]))
        else:
            assert isinstance(model, BinarySparseCoding)
            states = binary_states(K)
            scale = model.beta.expand(D)[seen].rsqrt()
            emission = torch.distributions.Normal(states @ model.W[seen].T, scale).log_prob(x[seen]).sum(-1)
            rows.append((bernoulli_log_prob(states, model.b) + emission).logsumexp(0))
    return torch.stack(rows)


def exact_em(model: Model) -> EM:
    return EM(model, Structured(model), e_step=FixedPoint(), m_step=ClosedForm())


@every_model
def test_the_bound_is_the_likelihood_of_what_is_observed(build: Callable[[], Model]) -> None:
    model = moved(build)
    v, mask = incomplete()
    em = exact_em(model)
    truth = observed_log_likelihood(model, v, mask)
    torch.testing.assert_close(em.e_half(em.call(v, mask=mask)).bound, truth, rtol=1e-10, atol=1e-10)
    evidence = log_evidence(model, em.guide, v, mask=mask)
    assert evidence.exact
    torch.testing.assert_close(evidence.log_evidence, truth, rtol=1e-10, atol=1e-10)


@every_model
def test_hidden_values_are_never_read(build: Callable[[], Model]) -> None:
    model = moved(build)
    v, mask = incomplete()
    em = exact_em(model)
    sums = [model.statistics({"v": x, "mask": mask}, em.infer(x, mask=mask)) for x in (v, v.nan_to_num(1e6))]
    for name in sums[0]:
        assert torch.equal(sums[0][name], sums[1][name])
    guide = MeanField(model)
    loss = Trace_ELBO().loss_and_grads(model, guide, v, mask=mask)
    assert torch.isfinite(torch.as_tensor(loss))
    assert all(p.grad is None or p.grad.isfinite().all() for p in (*model.parameters(), *guide.parameters()))


@every_model
def test_the_gradient_is_that_of_the_observed_likelihood(build: Callable[[], Model]) -> None:
    # Fisher's identity: at the exact q the gradient of L in theta is that of log p(v).
    model = moved(build)
    v, mask = incomplete()
    em = exact_em(model)
    call = em.call(v, mask=mask)
    params = call.parameters(em.e_half(call))
    bound = choose_evaluator(call.program, call.blocks, create_graph=True).bound(params).sum()
    parameters = list(model.parameters())
    ours = torch.autograd.grad(bound, parameters)
    truth = torch.autograd.grad(observed_log_likelihood(model, v, mask).sum(), parameters)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@diagonal_noise
@pytest.mark.parametrize("guide", [Structured, MeanField])
def test_the_m_step_is_a_maximum(build: Callable[[], Model], guide: Callable[[Model], MeanField]) -> None:
    model = moved(build)
    v, mask = incomplete()
    em = EM(model, guide(model), e_step=FixedPoint(), m_step=ClosedForm())
    call = em.call(v, mask=mask)
    result = em.e_half(call)
    em.m_half(call, result)
    params = call.parameters(result)

    def objective() -> Tensor:
        return choose_evaluator(call.program, call.blocks, create_graph=True).bound(params).sum()

    assert_maximum(model, objective)
    assert_zero_gradient(model, objective, scale=N)


@every_model
def test_the_likelihood_never_falls(build: Callable[[], Model]) -> None:
    model = build()
    v, mask = incomplete(100)
    history = exact_em(model).run(v, mask=mask, max_steps=25, tolerance=0, progress=False)
    losses = torch.tensor(history.loss)
    assert (losses.diff() <= 1e-10).all()
    assert losses[0] - losses[-1] > 0.05
    bound = -observed_log_likelihood(model, v, mask).mean()
    assert bound <= losses[-1] + 1e-10


@pytest.mark.parametrize("build", [FactorAnalysis, ProbabilisticPCA, LinearGaussian])
def test_em_ends_where_the_likelihood_is_flat(build: Callable[[int, int], Model]) -> None:
    model = build(D, 1)
    v, mask = incomplete(200)
    exact_em(model).run(v, mask=mask, max_steps=1500, tolerance=1e-14, progress=False)
    assert_zero_gradient(model, lambda: observed_log_likelihood(model, v, mask).sum(), scale=200 * 100)


def test_mean_field_sweeps_never_lower_the_bound() -> None:
    model = BinarySparseCoding(D, 4)
    v, mask = incomplete(100)
    e_step = FixedPoint(start=Warm(), schedule=Sequential())
    em = EM(model, MeanField(model), e_step=e_step, m_step=ClosedForm())
    losses = torch.tensor(em.run(v, mask=mask, max_steps=25, tolerance=0, progress=False).loss)
    assert (losses.diff() <= 1e-10).all()


@every_model
def test_a_mask_of_nothing_is_no_mask(build: Callable[[], Model]) -> None:
    v = torch.randn(N, D) @ torch.randn(D, D) + 3
    first, second = build(), build()
    ems = exact_em(first), exact_em(second)
    for model, kwargs in ((first, {}), (second, {"mask": torch.ones_like(v, dtype=torch.bool)})):
        torch.manual_seed(0)
        model.initialize(v, **kwargs)
    for _ in range(8):
        losses = ems[0].step(v), ems[1].step(v, mask=torch.ones_like(v, dtype=torch.bool))
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_model
def test_statistics_of_masked_and_complete_batches_add_up(build: Callable[[], Model]) -> None:
    model = moved(build)
    v, mask = incomplete()
    v[:10], mask[:10] = torch.randn(10, D), True
    em = exact_em(model)

    def statistics(rows: slice, *, masked: bool = True) -> dict[str, Tensor]:
        data = {"v": v[rows], **({"mask": mask[rows]} if masked else {})}
        return model.statistics(data, em.infer(**data))

    whole = statistics(slice(0, N))
    parts = [statistics(slice(0, 10), masked=False), statistics(slice(10, 25)), statistics(slice(25, N))]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guide", [Structured, MeanField])
@pytest.mark.parametrize("build", [MODELS["factor analysis"], MODELS["binary sparse coding"]])
def test_weighted_second_moments_are_those_of_a_loop(
    build: Callable[[], Model], guide: Callable[[Model], MeanField], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("posterior", "factors", "discrete_factors"):
        monkeypatch.setattr(f"pyro_ext.{module}.CHUNK_ELEMENTS", 3 * K**2)
    model = moved(build)
    v, mask = incomplete()
    h = EM(model, guide(model), e_step=FixedPoint(), m_step=None).infer(v, mask=mask)["h"]
    weights = torch.rand(N, 3)
    torch.testing.assert_close(h.grams(weights), torch.stack([h.gram(w) for w in weights.T]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.second_moments().sum(0), h.gram(), rtol=1e-12, atol=1e-12)


def test_weighted_second_moments_across_blocks_and_copies() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v), dim=-2):
            with pyro.plate("inner", 2, dim=-1):
                h = pyro.sample("h", pyro.distributions.Bernoulli(0.3).expand([4]).to_event(1))
            h = h.sum(-1).sum(-1, keepdim=True)
            pyro.sample("v", pyro.distributions.Normal(h, 1.0), obs=v)

    guide = Structured(model, blocks=[[("h", [0, 2])]])
    posterior = EM(model, guide, e_step=FixedPoint(), m_step=None).infer(torch.randn(6, 1))
    weights = torch.rand(6, 5)
    loop = torch.stack([posterior["h"].gram(w) for w in weights.T])
    assert loop.shape == (5, 8, 8)
    torch.testing.assert_close(posterior["h"].grams(weights), loop, rtol=1e-12, atol=1e-12)
    rows = posterior["h"].second_moments()
    torch.testing.assert_close(torch.einsum("rw,rij->wij", weights, rows), loop, rtol=1e-12, atol=1e-12)


@diagonal_noise
def test_a_column_that_no_row_observes(build: Callable[[], Model]) -> None:
    model = moved(build)
    v, mask = incomplete()
    mask[:, 3], mask[:, 0] = False, True
    v[:, 0] = torch.randn(N)
    before = {name: read_parameter(model, name) for name in model._pyro_params}
    with pytest.raises(ValueError, match=r"observed in some row, but got none in column 3. Leave the column out\."):
        model.initialize(v, mask=mask)
    assert all(torch.equal(before[name], read_parameter(model, name)) for name in before)
    exact_em(model).step(v, mask=mask)
    for name, old in before.items():
        new = read_parameter(model, name)
        if old.shape[:1] == (D,):
            torch.testing.assert_close(new[3], old[3], rtol=1e-12, atol=0)
            assert (new[[0, 1, 2, 4]] != old[[0, 1, 2, 4]]).any(-1).all()


@every_model
def test_initialize_reads_what_is_observed(build: Callable[[], Model]) -> None:
    model = build()
    v, mask = incomplete(4000)
    model.initialize(v, mask=mask)
    columns = [v[seen, d] for d, seen in enumerate(mask.T)]
    mean, variance = torch.stack([c.mean() for c in columns]), torch.stack([c.var(correction=0) for c in columns])
    pooled = (variance * mask.sum(0)).sum() / mask.sum()
    if isinstance(model, FactorAnalysis):
        torch.testing.assert_close(read_parameter(model, "mean"), mean)
        half = 0.5 * (pooled if isinstance(model, ProbabilisticPCA) else variance)
        torch.testing.assert_close(read_parameter(model, "variance"), half)
    elif isinstance(model, LinearGaussian):
        torch.testing.assert_close(read_parameter(model, "bias"), mean)
        torch.testing.assert_close(read_parameter(model, "noise_tril"), (0.5 * variance).sqrt().diag())
    else:
        assert isinstance(model, BinarySparseCoding)
        shared = model.shared_precision
        torch.testing.assert_close(1 / read_parameter(model, "beta"), pooled if shared else variance)


def test_predictions_of_hidden_entries_come_close() -> None:
    # One factor and little noise: what is hidden follows from what is seen.
    truth = FactorAnalysis(D, 1)
    assign_parameters(truth, {"W": torch.linspace(1, 3, D).unsqueeze(-1), "variance": torch.full((D,), 0.01)})
    full = truth.dream(300)
    mask = torch.rand(300, D) > 0.3
    mask[:, 0] = True
    v = full.masked_fill(~mask, torch.nan)
    model = FactorAnalysis(D, 1)
    em = exact_em(model)
    em.run(v, mask=mask, max_steps=40, progress=False)
    guess = em.infer(v, mask=mask)["h"].mean @ read_parameter(model, "W").T + read_parameter(model, "mean")
    error = (guess - full)[~mask].square().mean().sqrt()
    assert error < 0.25
    assert full[~mask].std() > 1.5


def test_gradient_steps_take_masks() -> None:
    v, mask = incomplete(60)
    model = FactorAnalysis(D, 1)
    em = EM(model, Structured(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.02}), num_steps=5))
    losses = em.run(v, mask=mask, max_steps=20, tolerance=0, progress=False).loss
    assert losses[-1] < losses[0] - 0.05
    amortized = Amortized(model)
    svi = SVI(model, amortized, Adam({"lr": 0.01}), loss=Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(v, mask=mask))) for _ in range(3))


@every_model
def test_refusals(build: Callable[[], Model]) -> None:
    model = build()
    v, mask = incomplete()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    em = exact_em(model)
    empty = mask.clone()
    empty[7] = False
    bad = v.clone()
    bad[0, 0] = torch.inf
    cases = [
        (v, mask.double(), TypeError, "Expected mask to be a boolean tensor, but got dtype torch.float64. Pass"),
        (v, [True], TypeError, "Expected mask to be a boolean tensor, but got list. Pass"),
        (v, mask[:, :2], ValueError, "Expected mask of shape (40, 5), but got (40, 2). Say for each entry of v"),
        (v, mask[0], ValueError, "Expected mask of shape (40, 5), but got (5,). Say for each entry of v"),
        (v, mask.to("meta"), ValueError, "Expected mask on device cpu, that of v, but got meta. Move it"),
        (v, empty, ValueError, "at least one observed entry in every row, but got none in row 7. Leave the row out."),
        (bad, mask | (torch.arange(D) == 0), ValueError, "Expected finite values in v, but got"),
        (v, None, ValueError, "Expected finite values in v, but got"),
    ]
    for data, given, error, message in cases:
        for call in (model.check_data, model.initialize, em.step, em.infer):
            with pytest.raises(error, match=re.escape(message)):
                call(data, mask=given)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    assert not em.guide.is_set_up
    model.check_data(v, mask=mask)


@every_model
def test_refusals_of_the_call(build: Callable[[], Model]) -> None:
    model = build()
    v, mask = incomplete()
    with pytest.raises(ValueError, match=re.escape("Expected mask of shape (40, 5), but got (5,).")):
        model(v, mask=mask[0])
    with pytest.raises(ValueError, match=re.escape("Expected mask of shape (N, D), but got (40, 5).")):
        model(mask=mask, size=40)
    with pytest.raises(ValueError, match="Expected a mask only with v, but got one with size. Dream whole rows."):
        model.check_data(mask=mask, size=40)


class Plain(Model):
    """A model without masks."""

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        raise AssertionError("no call gets here")


def test_models_without_masks_say_so() -> None:
    model = Plain(D)
    assert not model.takes_mask
    with pytest.raises(TypeError, match="Expected no mask for Plain, but got one. Leave rows with missing entries"):
        model.check_data(torch.randn(N, D), mask=torch.ones(N, D, dtype=torch.bool))
    assert FactorAnalysis(D, K).takes_mask


def test_completed_moments_are_those_of_a_loop_over_rows() -> None:
    model = moved(lambda: LinearGaussian(D, K))
    v, mask = incomplete()
    v[:3], mask[:3] = v[3], mask[3]
    guide = MeanField(model)
    h = EM(model, guide, e_step=FixedPoint(), m_step=None).infer(v, mask=mask)["h"]
    found = model.statistics({"v": v, "mask": mask}, {"h": h})
    W, bias, tril = (read_parameter(model, name) for name in ("W", "bias", "noise_tril"))
    sigma = tril @ tril.T
    # A row's (h, x) is Gaussian: x = A h + c + noise, where the noise of the observed entries is 0.
    cross, total, scatter = torch.zeros(K, D), torch.zeros(D), torch.zeros(D, D)
    for x, seen, mean, variance in zip(v, mask, h.distribution.mean, h.distribution.variance, strict=True):
        o, m = seen.nonzero().flatten(), (~seen).nonzero().flatten()
        gain = sigma[m][:, o] @ torch.linalg.inv(sigma[o][:, o])
        A, c, noise = torch.zeros(D, K), torch.zeros(D), torch.zeros(D, D)
        A[m], c[o], c[m] = W[m] - gain @ W[o], x[o], bias[m] + gain @ (x[o] - bias[o])
        noise[m[:, None], m] = sigma[m][:, m] - gain @ sigma[o][:, m]
        expected = A @ mean + c
        total += expected
        cross += torch.outer(mean, expected) + variance.diag() @ A.T
        scatter += torch.outer(expected, expected) + A @ variance.diag() @ A.T + noise
    for name, value in (("cross", cross), ("total", total), ("scatter", scatter)):
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def test_the_m_step_of_correlated_noise_raises_the_bound() -> None:
    model = moved(lambda: LinearGaussian(D, K))
    v, mask = incomplete()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    for _ in range(5):
        call = em.call(v, mask=mask)
        result = em.e_half(call)
        params = call.parameters(result)
        before = choose_evaluator(call.program, call.blocks).bound(params).sum()
        em.m_half(call, result)
        assert choose_evaluator(call.program, call.blocks).bound(params).sum() > before
