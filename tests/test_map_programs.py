"""MAP of user programs: grids, closed forms and SciPy in the constrained space; programs without a maximum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext import EM
from pyro_ext.guides import Dirac
from pyro_ext.lbfgs import LBFGS
from pyro_ext.maximize import Maximize
from pyro_ext.newton import Newton
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.solvers import Solution, Solver, SolverError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("solver", [Newton(), LBFGS()], ids=["N", "L"]),
]

TOLERANCE = 1e-6


def points(model: Callable[..., Any], solver: Solver, *args: Tensor) -> dict[str, Tensor]:
    """The MAP values that EM infers, every row converged."""
    em = EM(model, Dirac(model), e_step=Maximize(solver=solver), m_step=None)
    posterior = em.infer(*args)
    assert em.e_step.certificate.converged.all()  # pyright: ignore[reportAttributeAccessIssue]
    assert em.e_step.certificate.gap.isnan().all()  # pyright: ignore[reportAttributeAccessIssue]
    program = Program(model, args, {})
    return {site.name: posterior[site.name].mean for site in program.latents}


def solve(
    model: Callable[..., Any], solver: Solver, start: Tensor, *args: Tensor
) -> tuple[dict[str, Tensor], Solution]:
    """The values where a solver ends, from features to start at."""
    problem = ProgramProblem(Program(model, args, {}))
    solution = solver.solve(problem, start)
    return problem.layout.values(solution.x), solution


def grid_maximum(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """argmax ``(R,)`` of densities ``(R, grid)``, by a grid refined three times."""
    lows, highs = torch.tensor([[low]]), torch.tensor([[high]])
    best = lows
    for _ in range(4):
        grid = lows + (highs - lows) * torch.linspace(0, 1, 20_001)
        best = grid.expand(len(log_density(grid)), -1).gather(1, log_density(grid).argmax(-1, keepdim=True))
        width = (highs - lows) / 20_000
        lows, highs = best - 2 * width, best + 2 * width
    return best[:, 0]


# A positive scale.


def test_the_scale_of_each_row_under_a_gamma_prior_is_that_of_a_grid(solver: Solver) -> None:
    v = torch.randn(5, 4) * torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0])[:, None]

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
            pyro.sample("v", dist.Normal(torch.zeros(4), scale[:, None]).to_event(1), obs=v)

    def log_density(scale: Tensor) -> Tensor:
        return scale.log() - scale - 4 * scale.log() - (v**2).sum(-1, keepdim=True) / (2 * scale**2)

    truth = grid_maximum(log_density, 0.01, 20.0)
    torch.testing.assert_close(points(model, solver, v)["scale"], truth, atol=TOLERANCE, rtol=0)


def test_one_scale_of_all_rows_under_a_half_normal_prior_is_that_of_a_grid(solver: Solver) -> None:
    v = 1.5 * torch.randn(30)

    def model(v: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(0.0, scale), obs=v)

    def log_density(scale: Tensor) -> Tensor:
        return -(scale**2) / 8 - len(v) * scale.log() - (v**2).sum() / (2 * scale**2)

    truth = grid_maximum(log_density, 0.1, 10.0)
    torch.testing.assert_close(points(model, solver, v)["scale"], truth.squeeze(), atol=TOLERANCE, rtol=0)


def test_location_and_scale_of_each_row_are_the_closed_form(solver: Solver) -> None:
    """With an inverse-gamma prior (a, b) on the variance and a flat mean: mean v, (b + S/2) / (a + 1 + n/2)."""
    v = 3 + 2 * torch.randn(4, 6)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0).mask(False))
            variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
            pyro.sample("v", dist.Normal(loc[:, None], variance[:, None].sqrt()).to_event(1), obs=v)

    found = points(model, solver, v)
    square = ((v - v.mean(-1, keepdim=True)) ** 2).sum(-1)
    torch.testing.assert_close(found["loc"], v.mean(-1), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found["variance"], (2 + square / 2) / 7, atol=TOLERANCE, rtol=0)


# Shares.


@pytest.mark.parametrize("family", ["multinomial", "categorical"])
def test_shares_under_a_dirichlet_prior_are_the_closed_form(solver: Solver, family: str) -> None:
    """(n + alpha - 1) / (N + sum (alpha - 1)), where the counts are 0 too."""
    alpha = torch.tensor([1.5, 2.0, 3.0, 1.2])
    z = torch.tensor([[0, 0, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 0, 1]])
    counts = torch.nn.functional.one_hot(z, 4).sum(1).to(alpha)

    def model(counts: Tensor, z: Tensor) -> None:
        with pyro.plate("data", len(z)):
            share = pyro.sample("share", dist.Dirichlet(alpha))
            if family == "multinomial":
                pyro.sample("v", dist.Multinomial(total_count=6, probs=share), obs=counts)
            else:
                pyro.sample("v", dist.Categorical(share[:, None].expand(-1, 6, -1)).to_event(1), obs=z)

    truth = (counts + alpha - 1) / (6 + (alpha - 1).sum())
    torch.testing.assert_close(points(model, solver, counts, z)["share"], truth, atol=TOLERANCE, rtol=0)


def test_shares_of_a_mixture_are_those_of_slsqp_on_the_simplex(solver: Solver) -> None:
    v = torch.cat([torch.randn(15) - 2, 0.5 * torch.randn(10), torch.randn(5) + 3])
    locs, scales = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([1.0, 0.5, 1.0])
    alpha = torch.tensor([2.0, 1.5, 4.0])

    def model(v: Tensor) -> None:
        share = pyro.sample("share", dist.Dirichlet(alpha))
        with pyro.plate("data", len(v)):
            parts = dist.Normal(locs, scales)
            pyro.sample("v", dist.MixtureSameFamily(dist.Categorical(share), parts), obs=v)

    density = scipy.stats.norm.pdf(v.numpy()[:, None], locs.numpy(), scales.numpy())

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        mixed, prior = density @ w, alpha.numpy() - 1
        value = -np.log(mixed).sum() - (prior * np.log(w)).sum()
        return value, -(density / mixed[:, None]).sum(0) - prior / w

    found = scipy.optimize.minimize(
        loss,
        np.ones(3) / 3,
        jac=True,
        method="SLSQP",
        bounds=[(1e-6, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(3)},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    truth = torch.as_tensor(found.x)
    torch.testing.assert_close(points(model, solver, v)["share"], truth, atol=TOLERANCE, rtol=0)


# A hierarchy.


def grouped_regression() -> tuple[Tensor, Tensor, Tensor]:
    """Slopes and intercepts of six groups, partially pooled."""
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(60) % 6
    x = torch.randn(60, generator=generator)
    slopes = 1.0 + 0.7 * torch.randn(6, generator=generator)
    y = slopes[group] * x - 0.5 + 0.4 * torch.randn(60, generator=generator)
    return group, x, y


def hierarchy(group: Tensor, x: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.Gamma(10.0, 8.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", 6):
        slope = pyro.sample("slope", dist.Normal(mean, spread))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(slope[group] * x + bias, noise), obs=y)


def test_a_hierarchical_regression_is_that_of_scipy_in_the_constrained_space(solver: Solver) -> None:
    group, x, y = grouped_regression()
    found = points(hierarchy, solver, group, x, y)
    where, inputs, outputs = group.numpy(), x.numpy(), y.numpy()

    def loss(h: np.ndarray) -> tuple[float, np.ndarray]:
        mean, spread, noise, bias, slope = h[0], h[1], h[2], h[3], h[4:]
        rest, apart = outputs - slope[where] * inputs - bias, slope - mean
        value = mean**2 / 50 - 9 * np.log(spread) + 8 * spread + noise**2 / 2 + bias**2 / 50
        value += 6 * np.log(spread) + (apart**2).sum() / (2 * spread**2)
        value += 60 * np.log(noise) + (rest**2).sum() / (2 * noise**2)
        gradient = np.zeros_like(h)
        gradient[0] = mean / 25 - apart.sum() / spread**2
        gradient[1] = -3 / spread + 8 - (apart**2).sum() / spread**3
        gradient[2] = noise + 60 / noise - (rest**2).sum() / noise**3
        gradient[3] = bias / 25 - rest.sum() / noise**2
        gradient[4:] = apart / spread**2 - np.bincount(where, rest * inputs, 6) / noise**2
        return value, gradient

    # In its own space, with bounds; the last digits by a root of the gradient.
    start = np.array([0.0, 1.0, 1.0, 0.0, *[0.0] * 6])
    bounds = [(None, None), (1e-3, None), (1e-3, None), (None, None), *[(None, None)] * 6]
    near = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    root = scipy.optimize.root(lambda h: loss(h)[1], near, tol=1e-13)
    assert np.abs(loss(root.x)[1]).max() < 1e-8
    truth = torch.as_tensor(root.x)
    h = torch.cat([torch.stack([found[n] for n in ("mean", "spread", "noise", "bias")]), found["slope"]])
    torch.testing.assert_close(h, truth, atol=TOLERANCE, rtol=0)


# Heavy tails: a local maximum, compared with a grid.


@pytest.mark.parametrize("prior", [dist.StudentT(3.0, 0.0, 1.0), dist.Cauchy(0.0, 0.7)], ids=["student", "cauchy"])
def test_heavy_tailed_priors_are_those_of_a_grid(solver: Solver, prior: Any) -> None:
    v = torch.tensor([0.0, 0.4, -2.0, 7.0, -60.0])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", prior)
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    truth = grid_maximum(lambda h: prior.log_prob(h) - 2 * (v[:, None] - h) ** 2, -70.0, 70.0)
    torch.testing.assert_close(points(model, solver, v)["h"], truth, atol=TOLERANCE, rtol=0)


def test_an_end_is_a_local_maximum_where_there_are_several(solver: Solver) -> None:
    """Two far Cauchy observations: the mode on the side of the start."""
    grid = torch.linspace(0, 12, 1_200_001)
    height = dist.Cauchy(-6.0, 1.0).log_prob(grid) + dist.Cauchy(6.0, 1.0).log_prob(grid) - grid**2 / 200

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 10.0))
            pyro.sample("v", dist.Cauchy(h[:, None], 1.0).to_event(1), obs=v)

    v = torch.tensor([[-6.0, 6.0], [-6.0, 6.0]])
    values, solution = solve(model, solver, torch.tensor([[5.5], [-5.5]]), v)
    assert solution.converged.all()
    best = grid[height.argmax()]
    torch.testing.assert_close(values["h"], torch.stack([best, -best]), atol=1e-5, rtol=0)


# Plates, masks, rows, dtypes.


def inner_plates(v: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-2):
        scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
        with pyro.plate("inner", v.shape[1], dim=-1):
            h = pyro.sample("h", dist.StudentT(5.0, 0.0, 2.0))
            with poutine.mask(mask=seen):
                pyro.sample("v", dist.Normal(h, 0.5 + scale), obs=v)


def test_rows_together_are_rows_alone_with_inner_plates_and_masks(solver: Solver) -> None:
    v = 2 * torch.randn(5, 3)
    seen = torch.rand(5, 3) > 0.3
    start = torch.zeros(5, 4)
    together, solution = solve(inner_plates, solver, start, v, seen)
    assert together["h"].shape == (5, 3)
    for row in range(5):
        alone, one = solve(inner_plates, solver, start[:1], v[row : row + 1], seen[row : row + 1])
        assert one.num_iterations[0] == solution.num_iterations[row]
        for name, value in alone.items():
            torch.testing.assert_close(together[name][row], value[0], atol=1e-9, rtol=0)


def test_a_masked_row_keeps_its_prior_mode(solver: Solver) -> None:
    v, seen = torch.tensor([2.0, 2.0]), torch.tensor([True, False])

    def model(v: Tensor) -> None:
        with pyro.plate("data", 2):
            h = pyro.sample("h", dist.Gamma(3.0, 2.0))
            with poutine.mask(mask=seen):
                pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    truth = grid_maximum(lambda h: 2 * h.log() - 2 * h - 2 * seen[:, None] * (2 - h) ** 2, 0.01, 5.0)
    found = points(model, solver, v)["h"]
    torch.testing.assert_close(found, truth, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor(1.0), atol=TOLERANCE, rtol=0)


def test_hidden_entries_end_at_the_mode_of_their_prior(solver: Solver) -> None:
    """obs_mask makes a latent of what is hidden, with the density that it would have been seen with."""
    seen = torch.tensor([True, False, True])

    def model(v: Tensor) -> None:
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v, obs_mask=seen)

    v = torch.tensor([1.5, 99.0, -4.0])
    found = points(model, solver, v)
    prior = dist.StudentT(3.0, 0.0, 1.0)
    truth = grid_maximum(lambda h: prior.log_prob(h) - 0.5 * seen[:, None] * (v[:, None] - h) ** 2, -10.0, 10.0)
    torch.testing.assert_close(found["h"], truth, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found["v_unobserved"][1], found["h"][1], atol=TOLERANCE, rtol=0)


def test_a_subsampled_inner_plate_counts_as_the_whole(solver: Solver) -> None:
    """A posterior of 50 data, of which 5 stand for all: each counts ten times."""
    v, index = torch.randn(50) + 1, torch.arange(0, 50, 10)

    def model(index: Tensor) -> None:
        h = pyro.sample("h", dist.Cauchy(0.0, 0.3))
        with pyro.plate("data", 50, subsample=index):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    def log_density(h: Tensor) -> Tensor:
        return dist.Cauchy(0.0, 0.3).log_prob(h) - 5 * ((v[index][:, None] - h) ** 2).sum(0, keepdim=True)

    values, _ = solve(model, solver, torch.zeros(1, 1), index)
    torch.testing.assert_close(values["h"], grid_maximum(log_density, -3.0, 3.0)[0], atol=TOLERANCE, rtol=0)


def test_subsampled_rows_have_the_points_of_the_whole(solver: Solver) -> None:
    v, index = 2 * torch.randn(20), torch.tensor([3, 11, 17])

    def model(index: Tensor) -> None:
        with pyro.plate("data", 20, subsample=index):
            h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    some, _ = solve(model, solver, torch.zeros(3, 1), index)
    every, _ = solve(model, solver, torch.zeros(20, 1), torch.arange(20))
    torch.testing.assert_close(some["h"], every["h"][index], atol=1e-8, rtol=0)


def test_single_precision_ends_where_its_digits_do(solver: Solver) -> None:
    v = torch.randn(6, 8)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
            pyro.sample("v", dist.StudentT(3.0, torch.zeros(8), scale[:, None]).to_event(1), obs=v)

    double = points(model, solver, v)["scale"]
    torch.set_default_dtype(torch.float32)
    single = points(model, solver, v.float())["scale"]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)


# Maxima at the boundary of the support.


def test_a_maximum_at_the_end_of_a_support_of_finite_density_converges(solver: Solver) -> None:
    v = torch.tensor([-5.0, 0.5, 1.0])

    def half_line(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.HalfNormal(1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def interval(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Uniform(-2.0, 0.75))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    assert torch.allclose(points(half_line, solver, v)["h"], torch.tensor([0.0, 0.25, 0.5]), atol=TOLERANCE, rtol=0)
    assert torch.allclose(points(interval, solver, v)["h"], torch.tensor([-2.0, 0.5, 0.75]), atol=TOLERANCE, rtol=0)


def test_shares_without_counts_vanish_under_a_flat_prior(solver: Solver) -> None:
    counts = torch.tensor([[3.0, 0.0, 7.0], [0.0, 0.0, 10.0]])

    def model(counts: Tensor) -> None:
        with pyro.plate("data", 2):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            pyro.sample("v", dist.Multinomial(total_count=10, probs=share), obs=counts)

    torch.testing.assert_close(points(model, solver, counts)["share"], counts / 10, atol=TOLERANCE, rtol=0)


# Programs without a maximum.


def refused(model: Callable[..., Any], solver: Solver, what: str, *args: Tensor) -> None:
    """The program is refused by name, and nothing has changed after."""
    guide = Dirac(model)
    em = EM(model, guide, e_step=Maximize(solver=solver), m_step=None)
    with pytest.raises(SolverError, match=rf"maximum in h, but got {what} still rising at \|h\| = .* use `MeanField`"):
        em.infer(*args)
    with pytest.raises(RuntimeError, match="before its certificate"):
        _ = em.e_step.certificate  # pyright: ignore[reportAttributeAccessIssue]


def test_separable_logistic_regression_with_a_flat_prior_is_refused(solver: Solver) -> None:
    x = torch.randn(20, 2)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    y = (x[:, 0] > 0).double()
    refused(model, solver, "'w' in row 0", x, y)
    # With two labels changed there is a maximum.
    y[x[:, 0].abs().argsort()[-2:]] = 1 - y[x[:, 0].abs().argsort()[-2:]]
    assert points(model, solver, x, y)["w"].isfinite().all()


def test_a_wide_prior_suffices_for_separable_data(solver: Solver) -> None:
    """Not refused: the maximum is far out, and yet there."""
    x = torch.tensor([-1.0, 1.0])

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1000.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(logits=x * w), obs=y)

    def log_density(w: Tensor) -> Tensor:
        return -2 * torch.nn.functional.softplus(-w) - w**2 / 2e6

    truth = grid_maximum(log_density, 0.0, 50.0)[0]
    values, solution = solve(model, solver, torch.zeros(1, 1), x, torch.tensor([0.0, 1.0]))
    assert solution.converged.all()
    # Slopes of 1e-9 and curvatures of 1e-6 are all there is to go by.
    torch.testing.assert_close(values["w"], truth, atol=2e-3, rtol=0)


def test_a_scale_of_a_hierarchy_that_shrinks_without_end_is_refused(solver: Solver) -> None:
    """Eight schools, centred: log p grows like -8 log tau as all effects become equal."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor, sigma: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            effect = pyro.sample("effect", dist.Normal(mean, tau))
            pyro.sample("y", dist.Normal(effect, sigma), obs=y)

    refused(model, solver, "'tau' in row 0", y, sigma)


def test_densities_that_are_infinite_at_an_end_are_refused(solver: Solver) -> None:
    v = torch.tensor([1.0, 1.0])

    def positive(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Gamma(0.5, 1.0))
            pyro.sample("v", dist.Normal(h, 3.0), obs=v)

    def upper_end(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Beta(2.0, 0.5))
            pyro.sample("v", dist.Normal(h, 3.0), obs=v)

    def shares(v: Tensor) -> None:
        h = pyro.sample("h", dist.Dirichlet(torch.full((3,), 0.1)))
        pyro.sample("v", dist.Normal(h[:2], 1.0).to_event(1), obs=v)

    refused(positive, solver, "'h' in row [01]", v)
    refused(upper_end, solver, "'h' in row [01]", v)
    refused(shares, solver, "'h' in row 0", v)


def test_a_log_rate_without_counts_is_refused_in_its_row_only(solver: Solver) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("v", dist.Poisson(h.exp()), obs=v)

    torch.testing.assert_close(
        points(model, solver, torch.tensor([3.0, 1.0]))["h"], torch.tensor([3.0, 1.0]).log(), atol=TOLERANCE, rtol=0
    )
    refused(model, solver, "'h' in row 2", torch.tensor([3.0, 1.0, 0.0]))


def test_a_linear_density_is_refused(solver: Solver) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).mask(False))
            pyro.factor("f", (v * h).clamp(min=-1))
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    refused(model, solver, "'h' in row 0", torch.tensor([1.0]))
