"""-log p(h, v) as a problem: values against traces, derivatives against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_ext.program_problem as program_problem
from pyro_ext.layout import Layout
from pyro_ext.penalties import Penalties, penalty_layout
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.solvers import SolverError

pytestmark = pytest.mark.usefixtures("float64")


def mixed(v: Tensor) -> None:
    """Rows with a real, a positive and a simplex-valued latent, the real one in an inner plate of two."""
    with pyro.plate("data", len(v), dim=-2):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
        with pyro.plate("inner", 2, dim=-1):
            h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("v", dist.Normal(h * share[..., 0] + share[..., 1].log(), scale), obs=v)


def problem_of(model: Callable[..., Any], *args: Any, **settings: Any) -> ProgramProblem:
    return ProgramProblem(Program(model, args, {}), **settings)


def slopes_by_differences(problem: ProgramProblem, x: Tensor, step: float = 1e-6) -> Tensor:
    columns = []
    for move in step * torch.eye(x.shape[1]):
        columns.append((problem.smooth(x + move)[0] - problem.smooth(x - move)[0]) / (2 * step))
    return torch.stack(columns, -1)


def test_it_is_minus_log_p_of_the_trace_without_a_jacobian() -> None:
    v = torch.randn(3, 2)
    problem = problem_of(mixed, v)
    x = torch.randn(3, problem.layout.num_features)
    values = problem.layout.values(x)
    trace = poutine.trace(poutine.condition(mixed, data=values)).get_trace(v)
    torch.testing.assert_close(problem.smooth(x)[0].sum(), -trace.log_prob_sum(), atol=1e-12, rtol=1e-12)
    one = x.clone()
    one[1] += 1
    changed = problem.smooth(one)[0] != problem.smooth(x)[0]
    assert changed.tolist() == [False, True, False]


def test_gradient_and_second_derivative_agree_with_differences() -> None:
    problem = problem_of(mixed, torch.randn(4, 2))
    x = torch.randn(4, problem.layout.num_features)
    gradient = problem.smooth(x)[1]
    torch.testing.assert_close(gradient, slopes_by_differences(problem, x), atol=1e-7, rtol=1e-7)
    step = 1e-5
    columns = [
        (problem.smooth(x + move)[1] - problem.smooth(x - move)[1]) / (2 * step)
        for move in step * torch.eye(x.shape[1])
    ]
    hessian = problem.hessian(x)
    torch.testing.assert_close(hessian, torch.stack(columns, -1), atol=1e-6, rtol=1e-6)
    assert torch.equal(hessian, hessian.mT)


def test_theta_takes_part_but_gets_no_gradient() -> None:
    def model(v: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, scale), obs=v)

    problem = problem_of(model, torch.tensor([1.0, -1.0]))
    with torch.no_grad():
        value, gradient = problem.smooth(torch.zeros(2, 1))
        hessian = problem.hessian(torch.zeros(2, 1))
    torch.testing.assert_close(gradient, torch.tensor([[-0.25], [0.25]]))
    torch.testing.assert_close(hessian, torch.full((2, 1, 1), 1.25))
    assert not any(found.requires_grad for found in (value, gradient, hessian))
    assert pyro.param("scale").grad is None


def test_some_rows_are_the_same_rows() -> None:
    problem = problem_of(mixed, torch.randn(5, 2))
    x = torch.randn(5, problem.layout.num_features)
    value, gradient = problem.smooth(x)
    index = torch.tensor([4, 1, 2])
    part = problem.rows(index)
    assert not problem.can_select
    assert part.num_rows == 3
    for some, where in ((part, index), (part.rows(torch.tensor([2, 0])), torch.tensor([2, 4]))):
        # Nothing has to be known of the rows that are left out.
        found, slope = some.smooth(x[where])
        torch.testing.assert_close(found, value[where])
        torch.testing.assert_close(slope, gradient[where])
        torch.testing.assert_close(some.hessian(x[where]), problem.hessian(x)[where])
        torch.testing.assert_close(some.values(x[where]), problem.values(x)[where])
        torch.testing.assert_close(some.roundtrip(x[where]), x[where])
        torch.testing.assert_close(some.unit(x[where]), value[where].abs().clamp(min=1))


def test_peeled_laplace_priors_are_absolute_values() -> None:
    """Together with the rates, and shifted, the whole is -log p up to the constant of the priors."""
    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.5, 2.0])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(loc, scale).to_event(1))
            tau = pyro.sample("tau", dist.Gamma(2.0, 3.0))
            pyro.sample("v", dist.StudentT(3.0, h.sum(-1), tau), obs=v)

    program = Program(model, (torch.randn(3),), {})
    names = frozenset({"h"})
    layout = penalty_layout(program, names)
    penalties = Penalties.read(program, names, layout, {s.name: s.fn for s in program.latents})
    problem = ProgramProblem(program, layout, shift=penalties.shift, rate=penalties.rate, skip=names)
    assert not problem.is_smooth
    x = torch.randn(3, 3)
    truth = -program.log_joint(Layout(program.rows, program.latents).values(x + penalties.shift))
    torch.testing.assert_close(problem.objective(x), truth + penalties.constant, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(problem.smooth(x)[1], slopes_by_differences(problem, x), atol=1e-7, rtol=1e-7)


def test_peeled_exponential_priors_stand_in_their_own_space() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Exponential(torch.tensor([2.0, 3.0])).to_event(1))
            pyro.sample("v", dist.Poisson(1 + h.sum(-1)), obs=v)

    v = torch.tensor([1.0, 0.0, 4.0])
    program = Program(model, (v,), {})
    names = frozenset({"h"})
    layout = penalty_layout(program, names)
    problem = ProgramProblem(
        program, layout, rate=torch.tensor([2.0, 3.0]), nonnegative=torch.tensor([True, True]), skip=names
    )
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 2.0]])
    total = 1 + x.sum(-1)
    torch.testing.assert_close(problem.smooth(x)[0], total - v * total.log() + torch.lgamma(v + 1))
    torch.testing.assert_close(problem.smooth(x)[1], (1 - v / total)[:, None].expand(3, 2))
    torch.testing.assert_close(problem.penalty(x), x @ torch.tensor([2.0, 3.0]))
    assert not problem.constrained.any()


def test_points_outside_are_infinitely_high_and_other_rows_do_not_notice() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(4.0, 0.1))
            pyro.sample("v", dist.Normal(h.sqrt(), 1.0), obs=v)

    problem = problem_of(model, torch.tensor([1.0, 1.0, 1.0]))
    value, gradient = problem.smooth(torch.tensor([[1.0], [-1.0], [4.0]]))
    assert value.isinf().tolist() == [False, True, False]
    assert float(value[1]) > 0
    assert gradient.isnan().tolist() == [[False], [True], [False]]
    # A value with an infinite slope leads nowhere either.
    assert problem.smooth(torch.zeros(3, 1))[0].isposinf().all()


def test_a_density_of_infinity_is_infinitely_low() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Gamma(0.5, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    value = problem_of(model, torch.zeros(2)).smooth(torch.tensor([[0.0], [-1e4]]))[0]
    assert value.isfinite().tolist() == [True, False]
    assert float(value[1]) == -math.inf


def test_matrices_without_a_decomposition_are_infinitely_high() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 0.1))
            matrix = torch.eye(2) + h[:, None, None] * (1 - torch.eye(2))
            factor = torch.linalg.cholesky(matrix)
            pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=v)

    problem = problem_of(model, torch.ones(2, 2))
    assert problem.smooth(torch.tensor([[0.5], [0.1]]))[0].isfinite().all()
    assert problem.smooth(torch.tensor([[0.5], [2.0]]))[0].isposinf().all()


def test_scales_of_row_plates_are_divided_out_and_those_of_inner_plates_kept() -> None:
    v = torch.randn(6, 4)

    def model(rows: Tensor, columns: Tensor) -> None:
        with pyro.plate("data", 6, subsample=rows, dim=-2):
            h = pyro.sample("h", dist.Cauchy(0.0, 1.0))
            with pyro.plate("inner", 4, subsample=columns, dim=-1):
                pyro.sample("v", dist.Normal(h, 1.0), obs=v[rows][:, columns])

    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 3])
    problem = problem_of(model, rows, columns)
    x = torch.tensor([[0.3], [-2.0]])
    truth = -dist.Cauchy(0.0, 1.0).log_prob(x[:, 0])
    truth = truth - 2 * dist.Normal(x, 1.0).log_prob(v[rows][:, columns]).sum(-1)
    torch.testing.assert_close(problem.smooth(x)[0], truth)


def test_a_global_latent_has_one_row_and_weighs_a_subsample() -> None:
    v = torch.randn(8)

    def model(index: Tensor) -> None:
        h = pyro.sample("h", dist.Cauchy(0.0, 1.0))
        with pyro.plate("data", 8, subsample=index):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    index = torch.tensor([2, 5])
    problem = problem_of(model, index)
    truth = -dist.Cauchy(0.0, 1.0).log_prob(torch.tensor(0.7)) - 4 * dist.Normal(0.7, 1.0).log_prob(v[index]).sum()
    assert problem.num_rows == 1
    torch.testing.assert_close(problem.smooth(torch.tensor([[0.7]]))[0], truth.reshape(1))


def test_masked_rows_and_hidden_entries_do_not_count() -> None:
    v = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    seen = ~v.isnan()

    def by_handler(v: Tensor) -> None:
        with pyro.plate("data", 2, dim=-2):
            h = pyro.sample("h", dist.Cauchy(0.0, 1.0))
            with pyro.plate("inner", 2, dim=-1), poutine.mask(mask=seen):
                pyro.sample("v", dist.Normal(h, 1.0), obs=v.nan_to_num())

    def by_distribution(v: Tensor) -> None:
        with pyro.plate("data", 2):
            h = pyro.sample("h", dist.Cauchy(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[:, None], 1.0).mask(seen).to_event(1), obs=v)

    x = torch.tensor([[0.5], [1.5]])
    prior = -dist.Cauchy(0.0, 1.0).log_prob(x[:, 0])
    truth = prior - torch.where(seen, dist.Normal(x, 1.0).log_prob(v.nan_to_num()), 0).sum(-1)
    for model in (by_handler, by_distribution):
        value, gradient = problem_of(model, v).smooth(x)
        torch.testing.assert_close(value, truth)
        assert gradient.isfinite().all()


def test_entries_hidden_by_obs_mask_are_latents() -> None:
    seen = torch.tensor([True, False])

    def model(v: Tensor) -> None:
        with pyro.plate("data", 2):
            pyro.sample("v", dist.StudentT(3.0, 1.0, 1.0), obs=v, obs_mask=seen)

    problem = problem_of(model, torch.tensor([2.0, 0.0]))
    value, gradient = problem.smooth(torch.tensor([[0.0], [0.0]]))
    prior = -dist.StudentT(3.0, 1.0, 1.0).log_prob(torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(value, prior)
    assert float(gradient[0]) == 0
    assert float(gradient[1]) < 0


def test_a_program_without_h_is_flat() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.mask(mask=False):
                pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v)

    problem = problem_of(model, torch.zeros(2))
    assert torch.equal(problem.smooth(torch.ones(2, 1))[1], torch.zeros(2, 1))
    assert torch.equal(problem.hessian(torch.ones(2, 1)), torch.zeros(2, 1, 1))


def test_values_and_names_are_those_of_the_sites() -> None:
    problem = problem_of(mixed, torch.randn(3, 2))
    x = torch.randn(3, problem.layout.num_features)
    values = problem.layout.values(x)
    rows = torch.cat([values["scale"], values["share"].flatten(1), values["h"]], -1)
    torch.testing.assert_close(problem.values(x), rows)
    assert [problem.site_name(i) for i in range(5)] == ["scale", "share", "share", "h", "h"]
    assert problem.constrained.tolist() == [True, True, True, False, False]
    assert problem.size_of("h", 1, x) == float(values["h"][1].abs().max())


def test_a_value_cut_off_at_the_end_of_its_support_does_not_come_back() -> None:
    problem = problem_of(mixed, torch.zeros(1, 2))
    x = torch.tensor([[0.0, 0.5, 60.0, 0.0, 0.0]])
    back = problem.roundtrip(x)
    torch.testing.assert_close(back[0, [0, 1, 3, 4]], x[0, [0, 1, 3, 4]])
    assert float(back[0, 2]) < 50


def test_the_dtype_is_that_of_the_program() -> None:
    torch.set_default_dtype(torch.float32)
    problem = problem_of(mixed, torch.randn(2, 2))
    value, gradient = problem.smooth(torch.zeros(2, 5))
    assert {value.dtype, gradient.dtype, problem.rate.dtype, problem.hessian(torch.zeros(2, 5)).dtype} == {
        torch.float32
    }


def test_discrete_latents_are_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    with pytest.raises(SolverError, match=r"continuous latents, but got the binary site 'z'. Use `e_step=FixedPoint"):
        problem_of(model, torch.zeros(2))


def test_matrices_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(mixed, torch.randn(3, 2))
    monkeypatch.setattr(program_problem, "MAX_ROW_COUPLINGS", 74)
    with pytest.raises(SolverError, match=r"3 rows of 5 features. Use `LBFGS\(\)`"):
        problem.hessian(torch.zeros(3, 5))
    monkeypatch.setattr(program_problem, "MAX_ROW_COUPLINGS", 75)
    assert problem.hessian(torch.zeros(3, 5)).shape == (3, 5, 5)
