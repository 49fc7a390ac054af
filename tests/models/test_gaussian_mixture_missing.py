"""Mixtures of Gaussians whose data have missing entries: brute-force marginals, and EM on their likelihood."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, log_evidence
from pyro_ext.arguments import find_visible
from pyro_ext.guides import Amortized, MeanField, Structured
from pyro_ext.models import Covariance, Diagonal, Full, GaussianMixture, assign_parameters, read_parameter
from tests.models.covariance_structures import covariances_of, project, root_of, structures
from tests.models.stationarity import assert_maximum
from tests.oracles.enumeration import StatesMarginal, one_hot_states, program_log_joint, random_posterior

N, D, K = 60, 3, 2


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    pass


def data() -> tuple[Tensor, Tensor]:
    """Two overlapping correlated clusters, NaN where hidden, and the mask; no row is hidden as a whole."""
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.0, 0.0, 0.6]])
    v = torch.randn(N, D) @ mix + 3 * torch.randint(2, (N, 1)) * torch.tensor([1.0, -0.5, 0.3]) + 7
    mask = torch.rand(N, D) < 0.7
    mask[torch.arange(N), torch.randint(D, (N,))] = True
    return v.masked_fill(~mask, torch.nan), mask


def start(covariance: Covariance, v: Tensor, mask: Tensor, **kwargs: float) -> GaussianMixture:
    model = GaussianMixture(K, D, covariance, **kwargs)
    model.initialize(v, mask=mask)
    return model


def marginals(v: Tensor, mask: Tensor, weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """log pi_k + log N(v_o; mu_k, Sigma_k) row by row, shape (K, N)."""
    columns = []
    for row, seen in zip(v, mask, strict=True):
        o = seen.nonzero()[:, 0]
        emission = MultivariateNormal(locs[:, o], covariances[:, o][:, :, o])
        columns.append(weights.log() + emission.log_prob(row[o]))
    return torch.stack(columns, 1)


def marginals_of(model: GaussianMixture, v: Tensor, mask: Tensor) -> Tensor:
    weights, locs = read_parameter(model, "weights"), read_parameter(model, "locs")
    return marginals(v, mask, weights, locs, covariances_of(model))


@structures
def test_joint_is_that_of_the_observed_entries(covariance: Covariance) -> None:
    v, mask = data()
    model = start(covariance, v, mask)
    found = program_log_joint(model, {"h": one_hot_states(K).unsqueeze(1)}, v, mask=mask)
    torch.testing.assert_close(found.detach(), marginals_of(model, v, mask), rtol=1e-10, atol=1e-10)


@structures
@pytest.mark.parametrize("guide_type", [MeanField, Structured])
def test_the_likelihood_never_falls_and_is_that_of_the_observed_entries(
    covariance: Covariance, guide_type: type
) -> None:
    v, mask = data()
    model = start(covariance, v, mask, covariance_floor=0.0)
    em = EM(model, guide_type(model), e_step=FixedPoint(), m_step=ClosedForm())
    for _ in range(5):
        expected = -marginals_of(model, v, mask).logsumexp(0).sum().item()
        assert em.step(v, mask=mask) == pytest.approx(expected, rel=1e-10)
    history = em.run(v, mask=mask, max_steps=50, tolerance=0.0, progress=False)
    bounds = [entry.bound for entry in history.ledger]
    assert all(entry.exact for entry in history.ledger)
    assert all(later >= earlier - 1e-10 * abs(earlier) for earlier, later in itertools.pairwise(bounds))


@structures
def test_at_convergence_the_likelihood_of_the_observed_entries_is_stationary(covariance: Covariance) -> None:
    v, mask = data()
    model = start(covariance, v, mask, covariance_floor=0.0)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    em.run(v, mask=mask, max_steps=1000, tolerance=1e-13, progress=False)
    total = program_log_joint(model, {"h": one_hot_states(K).unsqueeze(1)}, v, mask=mask).logsumexp(0).sum()
    for gradient in torch.autograd.grad(total, list(model.parameters())):
        assert gradient.abs().max().item() < 1e-4
    # The same by differences of the likelihood written out, in the means.
    weights, locs, covariances = read_parameter(model, "weights"), read_parameter(model, "locs"), covariances_of(model)
    best = marginals(v, mask, weights, locs, covariances).logsumexp(0).sum().item()
    assert best == pytest.approx(total.item(), rel=1e-12)
    for k, d in itertools.product(range(K), range(D)):
        step = torch.zeros(K, D)
        step[k, d] = 1e-4
        up, down = (marginals(v, mask, weights, locs + s, covariances).logsumexp(0).sum() for s in (step, -step))
        assert abs((up - down).item() / 2e-4) < 1e-4
        assert max(up.item(), down.item()) < best


@structures
@pytest.mark.parametrize("floored", [False, True], ids=["free", "floored"])
def test_maximize_is_a_maximum(covariance: Covariance, floored: bool) -> None:
    v, mask = data()
    model = start(covariance, v, mask, covariance_floor=0.0)
    q = random_posterior(K, N)
    first, second = brute_moments(model, v, mask)
    statistics = model.statistics({"v": v, "mask": mask}, {"h": StatesMarginal(one_hot_states(K), q)})
    model.maximize(statistics)

    def objective() -> Tensor:
        """E_q[log p(v, h)] with the missing entries distributed as before the M-step."""
        matrices, locs = differentiable_covariances(model), model.locs
        cross = first.unsqueeze(-1) * locs.unsqueeze(-2)
        scatter = second - cross - cross.mT + (locs.unsqueeze(-1) * locs.unsqueeze(-2)).unsqueeze(0)
        exponent = torch.einsum("kde,nkde->nk", torch.linalg.inv(matrices), scatter)
        return (q.mT * (model.weights.log() - 0.5 * torch.linalg.slogdet(matrices).logabsdet - 0.5 * exponent)).sum()

    if not floored:
        assert_maximum(model, objective)
        return
    floor = torch.linalg.eigvalsh(covariances_of(model)).quantile(0.5).item()
    model.covariance_floor = floor
    model.maximize(statistics)
    best_covariances, best = covariances_of(model), objective().item()
    assert torch.linalg.eigvalsh(best_covariances).min().item() == pytest.approx(floor)
    for _ in range(20):
        noise = torch.randn(K, D, D)
        other = project(covariance, floor * torch.eye(D) + noise @ noise.mT, torch.ones(K))
        for step in (1e-1, 1e-2, 1e-3):
            mixed = (1 - step) * best_covariances + step * other
            assign_parameters(model, {covariance.parameter: root_of(covariance, mixed)})
            assert objective().item() <= best + 1e-12 * abs(best)


def differentiable_covariances(model: GaussianMixture) -> Tensor:
    root = getattr(model, model.covariance.parameter)
    if model.covariance.parameter == "scale":
        return (root if root.dim() == 2 else root.unsqueeze(-1).expand(K, D)).square().diag_embed()
    return (root @ root.mT).expand(K, D, D)


def brute_moments(model: GaussianMixture, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """E[v_n] (N, K, D) and E[v_n v_n^T] (N, K, D, D) given the observed entries and the component."""
    locs, matrices = read_parameter(model, "locs"), covariances_of(model)
    first, second = torch.zeros(N, K, D), torch.zeros(N, K, D, D)
    for n, k in itertools.product(range(N), range(K)):
        o, m = mask[n].nonzero()[:, 0], (~mask[n]).nonzero()[:, 0]
        regression = matrices[k][m][:, o] @ torch.linalg.inv(matrices[k][o][:, o])
        mean, spread = v[n].clone(), torch.zeros(D, D)
        mean[m] = locs[k, m] + regression @ (v[n, o] - locs[k, o])
        spread[m.unsqueeze(1), m] = matrices[k][m][:, m] - regression @ matrices[k][o][:, m]
        first[n, k], second[n, k] = mean, torch.outer(mean, mean) + spread
    return first, second


@structures
def test_a_mask_that_hides_nothing_changes_nothing(covariance: Covariance) -> None:
    v, _ = data()
    v = v.nan_to_num(7.5)
    histories = []
    for mask in (None, torch.ones(N, D, dtype=torch.bool)):
        pyro.set_rng_seed(0)
        model = GaussianMixture(K, D, covariance, covariance_floor=0.0)
        model.initialize(v, mask=mask)
        em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        histories.append(em.run(v, mask=mask, max_steps=10, tolerance=0.0, progress=False).loss)
    assert histories[0] == pytest.approx(histories[1], rel=1e-10)


@structures
def test_hidden_values_are_never_read(covariance: Covariance) -> None:
    v, mask = data()
    results = []
    for hidden in (torch.nan, torch.inf, 1e300, 0.0):
        pyro.set_rng_seed(0)
        model = GaussianMixture(K, D, covariance)
        em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        v = v.masked_fill(~mask, hidden)
        results.append(em.run(v, mask=mask, max_steps=5, tolerance=0.0, progress=False).loss)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("covariance", [Diagonal(), Full()], ids=repr)
def test_a_gradient_m_step_sees_the_observed_entries_alone(covariance: Covariance) -> None:
    v, mask = data()
    model = start(covariance, v, mask)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(pyro.optim.Adam({"lr": 0.01}), num_steps=3))
    losses = [em.step(v, mask=mask) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.5
    assert losses[-1] == pytest.approx(-marginals_of(model, v, mask).logsumexp(0).sum().item(), rel=2e-2)


def test_evidence_and_new_data() -> None:
    v, mask = data()
    model = start(Full(), v, mask)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
    em.step(v, mask=mask)
    exact = marginals_of(model, v, mask)
    evidence = log_evidence(model, em.guide, v, mask=mask)
    assert evidence.exact
    torch.testing.assert_close(evidence.log_evidence, exact.logsumexp(0), rtol=1e-10, atol=1e-10)
    few = em.infer(v[:5], mask=mask[:5])["h"].mean
    torch.testing.assert_close(few, exact[:, :5].softmax(0).mT, rtol=1e-9, atol=1e-9)


def test_pyros_own_elbo_takes_a_mask(recwarn: pytest.WarningsRecorder) -> None:
    v, mask = data()
    model = start(Full(), v, mask)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=None)
    exact = em.step(v, mask=mask)
    # At the exact posterior log p(v, h) - log q(h) is log p(v) for every draw.
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    assert svi.evaluate_loss(v, mask=mask) == pytest.approx(exact, rel=1e-9)
    assert not [w for w in recwarn if "nan" in str(w.message).lower()]


def test_the_argument_that_carries_v_is_found_with_a_mask_and_without() -> None:
    v, mask = data()
    model = GaussianMixture(K, D)
    assert find_visible(model, (v.nan_to_num(0.0),), {}).arguments == {"v": "v"}
    assert find_visible(model, (v,), {"mask": mask}).arguments == {"v": "v"}
    Amortized(model).setup(v.nan_to_num(0.0))


def test_initialize_takes_hidden_entries_at_the_columns_means() -> None:
    v, mask = data()
    model = start(Diagonal(), v, mask)
    column_means = torch.stack([v[mask[:, d], d].mean() for d in range(D)])
    torch.testing.assert_close(model.shift, column_means)
    filled = torch.where(mask, v, column_means)
    locs = read_parameter(model, "locs")
    distance = (filled.unsqueeze(1) - locs).square().sum(-1)
    assert (distance.min(0).values < 1e-20).all()
    squares = (filled - locs[distance.argmin(1)]).square()
    variances = torch.stack([squares[mask[:, d], d].mean() for d in range(D)])
    torch.testing.assert_close(read_parameter(model, "scale"), variances.sqrt().expand(K, D))


def hide_row(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[4] = False
    return mask


def hide_column(mask: Tensor) -> Tensor:
    mask = torch.ones_like(mask)
    mask[:, 1] = False
    return mask


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda mask: mask[:, :2], ValueError, r"Expected mask of shape \(60, 3\).*, but got \(60, 2\)"),
        (lambda mask: mask[:9], ValueError, r"Expected mask of shape \(60, 3\).*, but got \(9, 3\)"),
        (lambda mask: mask.double(), TypeError, "Expected mask to be a boolean tensor, but got dtype torch.float64"),
        (hide_row, ValueError, "Expected at least one observed entry in every row, but got none in row 4. Leave"),
        (torch.ones_like, ValueError, "Expected finite values in v, but got"),
        (hide_column, ValueError, "observed in some row, but got none in column 1. Leave the column out"),
    ],
    ids=["width", "rows", "dtype", "row", "unhidden NaN", "column"],
)
def test_bad_masks_are_refused(change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    v, mask = data()
    bad = change(mask)
    if change is hide_column:
        v = v.nan_to_num(0.0)
    model = GaussianMixture(K, D)
    guide = MeanField(model)
    em = EM(model, guide, e_step=FixedPoint(), m_step=ClosedForm())
    before = [p.detach().clone() for p in model.parameters()]
    for call in (lambda: em.run(v, mask=bad, progress=False), lambda: model.initialize(v, mask=bad)):
        with pytest.raises(error, match=message):
            call()
        assert all(map(torch.equal, before, model.parameters()))
        assert (model.shift == 0).all()


def test_masks_need_data() -> None:
    model, mask = GaussianMixture(K, D), torch.ones(5, D, dtype=torch.bool)
    with pytest.raises(ValueError, match="Expected a mask only with v, but got one without"):
        model(mask=mask, size=5)
    with pytest.raises(ValueError, match="Expected a mask only with v, but got one with size"):
        model.check_data(size=5, mask=mask)
