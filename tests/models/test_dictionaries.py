"""The rules for W and their M-steps: against scipy, the Kuhn-Tucker conditions and naive loops."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import transform_to

from pyro_ext.models import (
    BlockCoordinateDescent,
    ColumnNorm,
    Dictionary,
    DictionarySolver,
    LagrangeDual,
    Unconstrained,
    WeightDecay,
    assign_parameters,
    dictionary_solvers,
    read_parameter,
)
from pyro_ext.models.column_ball import ColumnBall, into_ball
from pyro_ext.models.dictionary_solvers import distance_to_optimum

pytestmark = pytest.mark.usefixtures("float64")
TO_THE_END = BlockCoordinateDescent(num_sweeps=20_000, tolerance=1e-12)
ONE, BETA = torch.ones(()), torch.ones(())


def moments(h: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A and C of the points h (N, H) and the data v (N, D); with a mask one A for each column of v."""
    if mask is None:
        return h.T @ h, v.T @ h
    weights = mask.double()
    return torch.einsum("nd,nh,nk->dhk", weights, h, h), (weights * v).T @ h


def objective(W: Tensor, gram: Tensor, cross: Tensor) -> float:
    """f(W), by the formula."""
    grams = gram.expand(len(W), -1, -1)
    return (0.5 * torch.einsum("dh,dhk,dk->", W, grams, W) - (W * cross).sum()).item()


def unit_columns(D: int, H: int, radius: float = 1.0) -> Tensor:
    W = torch.randn(D, H)
    return radius * W / W.norm(dim=0)


def sparse(N: int, H: int, on: float = 0.5) -> Tensor:
    return torch.randn(N, H) * (torch.rand(N, H) < on)


def assert_kuhn_tucker(W: Tensor, gram: Tensor, cross: Tensor, radius: float, tolerance: float = 1e-8) -> None:
    """The gradient vanishes inside the ball; on its surface it points outwards and nowhere else."""
    gradient = cross - torch.einsum("dh,dhk->dk", W, gram.expand(len(W), -1, -1))
    # Of the terms that the gradient is a difference of.
    scale = gram.diagonal(dim1=-2, dim2=-1).reshape(-1, W.shape[1]).amax(0) * radius + cross.norm(dim=0)
    norms = W.norm(dim=0)
    assert (norms <= radius * (1 + 1e-14)).all()
    inside = norms < radius * (1 - 1e-10)
    outward = (W * gradient).sum(0) / norms.clamp(min=1e-300)
    along = gradient - outward * W / norms.clamp(min=1e-300)
    assert (gradient[:, inside].norm(dim=0) <= tolerance * scale[inside]).all()
    assert (along[:, ~inside].norm(dim=0) <= tolerance * scale[~inside]).all()
    assert (outward[~inside] >= -tolerance * scale[~inside]).all()


def scipy_minimum(gram: Tensor, cross: Tensor, start: Tensor, radius: float) -> float:
    """f at the minimum that SLSQP finds, moved to the nearest feasible point."""
    shape = start.shape
    grams = gram.expand(shape[0], -1, -1)

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        W = torch.as_tensor(x).reshape(shape)
        product = torch.einsum("dh,dhk->dk", W, grams)
        return (0.5 * (W * product) - W * cross).sum().item(), (product - cross).flatten().numpy()

    def slack(x: Any) -> Any:
        return radius**2 - (x.reshape(shape) ** 2).sum(0)

    def slack_gradient(x: Any) -> Any:
        W = torch.as_tensor(x).reshape(shape)
        return torch.stack([-2 * W * (torch.arange(shape[1]) == k) for k in range(shape[1])]).flatten(1).numpy()

    found = minimize(
        value_and_gradient,
        0.5 * start.flatten().numpy(),
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slack_gradient},
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    W = torch.as_tensor(found.x).reshape(shape)
    return objective(W / (W.norm(dim=0) / radius).clamp(min=1), gram, cross)


def regular() -> tuple[Tensor, Tensor]:
    h = sparse(60, 6)
    return moments(h, torch.randn(60, 4) + h @ torch.randn(6, 4))


def few_rows() -> tuple[Tensor, Tensor]:
    return moments(sparse(4, 6), torch.randn(4, 4))


def repeated_atoms() -> tuple[Tensor, Tensor]:
    h = sparse(60, 6)
    h[:, 1], h[:, 2] = h[:, 0], 2 * h[:, 3] - h[:, 0]
    return moments(h, torch.randn(60, 4) + h @ torch.randn(6, 4))


def unused_atoms() -> tuple[Tensor, Tensor]:
    h = sparse(60, 6)
    h[:, [1, 4]] = 0
    return moments(h, torch.randn(60, 4) + h @ torch.randn(6, 4))


def rare_atoms() -> tuple[Tensor, Tensor]:
    h = sparse(60, 6) * torch.logspace(0, -8, 6)
    return moments(h, torch.randn(60, 4) + h @ torch.randn(6, 4))


def alike_atoms() -> tuple[Tensor, Tensor]:
    h = torch.randn(60, 1) + 1e-3 * torch.randn(60, 6)
    return moments(h, torch.randn(60, 4) + 3 * h[:, :1])


def masked() -> tuple[Tensor, Tensor]:
    h = sparse(60, 6)
    return moments(h, torch.randn(60, 4) + h @ torch.randn(6, 4), torch.rand(60, 4) > 0.3)


def masked_few_rows() -> tuple[Tensor, Tensor]:
    mask = torch.rand(8, 4) > 0.3
    mask[:, 1] = False
    return moments(sparse(8, 6), torch.randn(8, 4), mask)


PROBLEMS: list[Callable[[], tuple[Tensor, Tensor]]] = [
    regular,
    few_rows,
    repeated_atoms,
    unused_atoms,
    rare_atoms,
    alike_atoms,
    masked,
    masked_few_rows,
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda f: f.__name__)
# All constraints active, some, none.
every_radius = pytest.mark.parametrize("radius", [1e-3, 0.7, 2.0, 1e5])


@every_problem
@every_radius
def test_the_dual_satisfies_the_kuhn_tucker_conditions(
    problem: Callable[[], tuple[Tensor, Tensor]], radius: float
) -> None:
    for _ in range(5):
        gram, cross = problem()
        W = LagrangeDual().solve(gram, cross, unit_columns(4, 6, radius), radius)
        assert_kuhn_tucker(W, gram, cross, radius)


def test_the_radii_of_these_tests_bind_all_some_and_no_atoms() -> None:
    gram, cross = regular()
    bound = [
        int((LagrangeDual().solve(gram, cross, unit_columns(4, 6, r), r).norm(dim=0) > 0.999999 * r).sum())
        for r in (1e-3, 0.7, 2.0, 1e5)
    ]
    assert bound[0] == 6
    assert 0 < bound[2] < 6
    assert bound[3] == 0


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p is not rare_atoms], ids=lambda f: f.__name__)
@pytest.mark.parametrize("radius", [0.3, 1.0, 3.0])
def test_the_dual_is_as_low_as_scipy(problem: Callable[[], tuple[Tensor, Tensor]], radius: float) -> None:
    gram, cross = problem()
    start = unit_columns(4, 6, radius)
    ours = objective(LagrangeDual().solve(gram, cross, start, radius), gram, cross)
    theirs = scipy_minimum(gram, cross, start, radius)
    assert ours <= theirs + 1e-9 * abs(theirs)
    # SLSQP comes less far where atoms are alike.
    assert ours == pytest.approx(theirs, rel=1e-3 if problem is alike_atoms else 1e-6)


@pytest.mark.parametrize("problem", [regular, masked, unused_atoms], ids=lambda f: f.__name__)
@pytest.mark.parametrize("radius", [1e-3, 0.7, 2.0])
def test_both_solvers_agree(problem: Callable[[], tuple[Tensor, Tensor]], radius: float) -> None:
    gram, cross = problem()
    old = unit_columns(4, 6, radius)
    dual, descent = (solver.solve(gram, cross, old, radius) for solver in (LagrangeDual(), TO_THE_END))
    torch.testing.assert_close(dual, descent, rtol=0, atol=1e-8 * radius)


@pytest.mark.parametrize("problem", [few_rows, repeated_atoms], ids=lambda f: f.__name__)
def test_both_solvers_reach_the_same_value_where_the_minimum_is_not_one_point(
    problem: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    gram, cross = problem()
    old = unit_columns(4, 6)
    dual, descent = (objective(s.solve(gram, cross, old, 1.0), gram, cross) for s in (LagrangeDual(), TO_THE_END))
    assert dual == pytest.approx(descent, rel=1e-10)


def test_without_active_constraints_the_dual_is_least_squares_next_to_the_old_dictionary() -> None:
    h = sparse(60, 6)
    h[:, 1] = h[:, 0]
    gram, cross = moments(h, torch.randn(60, 4))
    old = unit_columns(4, 6)
    W = LagrangeDual().solve(gram, cross, old, 100.0)
    torch.testing.assert_close(W @ gram, cross, rtol=1e-9, atol=1e-9)
    # Only the sum of the twins is determined; their difference stays.
    torch.testing.assert_close(W[:, 0] - W[:, 1], old[:, 0] - old[:, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [LagrangeDual(), BlockCoordinateDescent()], ids=["dual", "descent"])
def test_unused_atoms_stay(solver: DictionarySolver) -> None:
    gram, cross = unused_atoms()
    old = 0.5 * unit_columns(4, 6)
    W = solver.solve(gram, cross, old, 1.0)
    assert torch.equal(W[:, [1, 4]], old[:, [1, 4]])
    assert (W[:, [0, 2, 3, 5]] != old[:, [0, 2, 3, 5]]).all()
    assert torch.equal(solver.solve(0 * gram, 0 * cross, old, 1.0), old)


def test_one_atom_in_closed_form() -> None:
    for radius in (0.5, 5.0):
        W = LagrangeDual().solve(torch.tensor([[2.0]]), torch.tensor([[6.0], [8.0]]), torch.zeros(2, 1), radius)
        expected = torch.tensor([[3.0], [4.0]]) * min(1, radius / 5)
        torch.testing.assert_close(W, expected, rtol=1e-9, atol=0)


def test_a_hidden_column_makes_room_for_the_others() -> None:
    # Row 1 of W is seen by no row of the data, and costs norm: at the constraint it must vanish.
    h = sparse(60, 3) + 0.1
    mask = torch.ones(60, 2, dtype=torch.bool)
    mask[:, 1] = False
    gram, cross = moments(h, 5 * torch.randn(60, 1) + 20 * h.sum(-1, keepdim=True).expand(-1, 2), mask)
    W = LagrangeDual().solve(gram, cross, unit_columns(2, 3), 1.0)
    torch.testing.assert_close(W, torch.tensor([[1.0] * 3, [0.0] * 3]), rtol=0, atol=1e-8)


def test_solvers_are_warm_at_the_solution() -> None:
    gram, cross = regular()
    W = LagrangeDual().solve(gram, cross, unit_columns(4, 6), 1.0)
    torch.testing.assert_close(LagrangeDual(max_steps=1).solve(gram, cross, W, 1.0), W, rtol=0, atol=1e-13)
    torch.testing.assert_close(BlockCoordinateDescent(num_sweeps=1).solve(gram, cross, W, 1.0), W, rtol=0, atol=1e-13)


@every_problem
@pytest.mark.parametrize("block_size", [1, 4, 24])
def test_a_sweep_is_that_of_a_naive_loop(problem: Callable[[], tuple[Tensor, Tensor]], block_size: int) -> None:
    gram, cross = problem()
    old = unit_columns(4, 6)
    expected = old.clone()
    grams = gram.expand(4, -1, -1)
    for k in range(6):
        curvature = grams[:, k, k].max()
        if curvature > 0:
            u = expected[:, k] + (cross[:, k] - (grams[:, :, k] * expected).sum(-1)) / curvature
            expected[:, k] = u / max(u.norm(), 1)
    W = BlockCoordinateDescent(num_sweeps=1, block_size=block_size).solve(gram, cross, old, 1.0)
    torch.testing.assert_close(W, expected, rtol=1e-9, atol=1e-9)


@every_problem
def test_sweeps_never_raise_the_objective(problem: Callable[[], tuple[Tensor, Tensor]]) -> None:
    gram, cross = problem()
    W = unit_columns(4, 6)
    values = [objective(W, gram, cross)]
    for _ in range(30):
        W = BlockCoordinateDescent(num_sweeps=1).solve(gram, cross, W, 1.0)
        values.append(objective(W, gram, cross))
    steps = torch.tensor(values).diff()
    assert (steps <= 1e-12 * abs(values[-1])).all()
    assert steps.sum() < 0


def test_sweeps_end_where_nothing_moves() -> None:
    # Uncorrelated atoms: the first sweep is the answer, the second only finds that out.
    gram, cross, old = torch.eye(3), torch.randn(2, 3), torch.zeros(2, 3)
    first, many = (BlockCoordinateDescent(num_sweeps=n).solve(gram, cross, old, 1.0) for n in (1, 1000))
    assert torch.equal(first, many)
    gram, cross = regular()
    old = unit_columns(4, 6)
    first, lax = (
        BlockCoordinateDescent(num_sweeps=n, tolerance=t).solve(gram, cross, old, 1.0) for n, t in ((1, 0.0), (9, 2.0))
    )
    assert torch.equal(first, lax)


def test_a_few_newton_steps_do_however_large_the_multipliers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(*args)

    evaluate = dictionary_solvers._evaluate
    monkeypatch.setattr(dictionary_solvers, "_evaluate", counted)
    for radius in (1e-6, 1e-3, 1.0):
        gram, cross = regular()
        LagrangeDual().solve(gram, cross, unit_columns(4, 6, radius), radius)
        assert 0 < calls <= 16
        calls = 0
    torch.manual_seed(0)
    h = sparse(300, 60, 0.2) * torch.logspace(0, -2, 60)
    gram, cross = moments(h, torch.randn(300, 40) + h @ torch.randn(60, 40))
    # Twice as many where Newton's step is that on |w_k|^2.
    LagrangeDual().solve(gram, cross, unit_columns(40, 60, 10.0), 10.0)
    assert calls <= 11


def test_atoms_that_are_nearly_one() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        H = int(torch.randint(2, 28, ()))
        D, N = seed % 2 + 1, 25
        h = sparse(N, H)
        h = h.mean(1, keepdim=True) + 1e-5 * h
        gram, cross = moments(h, torch.randn(N, D))
        radius = 10 ** torch.randn(()).item()
        W = LagrangeDual().solve(gram, cross, unit_columns(D, H, radius), radius)
        assert distance_to_optimum(W, gram, cross, radius).max() < 1e-7


def test_single_precision_sums_are_solved_to_their_rounding() -> None:
    gram, cross = repeated_atoms()
    old = unit_columns(4, 6)
    for solver in (LagrangeDual(), BlockCoordinateDescent(num_sweeps=2000)):
        W = solver.solve(gram.float(), cross.float(), old.float(), 1.0)
        assert W.dtype == torch.float32
        assert distance_to_optimum(W.double(), gram, cross, 1.0).max() < 1e-5
        assert ColumnBall(1.0).check(W)


def test_single_precision_sums_that_are_not_quite_positive() -> None:
    h = (torch.randn(2000, 2) @ torch.randn(2, 30)).float()
    gram, cross = moments(h, torch.randn(2000, 4).float() + h[:, :4])
    assert torch.linalg.eigvalsh(gram.double())[0] < -1e-7 * gram.diagonal().mean()
    W = LagrangeDual().solve(gram, cross, unit_columns(4, 30).float(), 1.0)
    exact = h.double().T @ h.double()
    assert distance_to_optimum(W.double(), exact, cross.double(), 1.0).max() < 1e-4


def test_the_distance_to_the_optimum_is_zero_there_only() -> None:
    gram, cross = unused_atoms()
    W = LagrangeDual().solve(gram, cross, unit_columns(4, 6), 1.0)
    assert distance_to_optimum(W, gram, cross, 1.0).max() < 1e-10
    W[:, 0] *= -1
    distances = distance_to_optimum(W, gram, cross, 1.0)
    assert distances[0] > 0.1
    assert (distances[[1, 4]] == 0).all()


def test_random_problems_of_all_shapes() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        D, H, N = torch.randint(1, 16, (3,)).tolist()
        h = sparse(N, H, float(torch.rand(()))) * 10 ** torch.randn(H)
        h = h + 5 if seed % 5 == 0 else h
        h = h @ torch.randn(H, 2) @ torch.randn(2, H) if seed % 3 == 0 else h
        radius = 10 ** torch.randn(()).item()
        gram, cross = moments(
            h, torch.randn(N, D) * 10 ** torch.randn(()), torch.rand(N, D) > 0.3 if seed % 2 else None
        )
        W = LagrangeDual().solve(gram, cross, unit_columns(D, H, radius), radius)
        assert distance_to_optimum(W, gram, cross, radius).max() < 1e-8


def test_projection_and_its_gradient() -> None:
    U = torch.randn(4, 5) * torch.tensor([0.1, 3.0, 0.4, 2.0, 0.0])
    W = into_ball(U, 1.0)
    inside = U.norm(dim=0) <= 1
    assert 0 < inside.sum() < 5
    assert torch.equal(W[:, inside], U[:, inside])
    torch.testing.assert_close(W[:, ~inside], U[:, ~inside] / U[:, ~inside].norm(dim=0))
    assert torch.autograd.gradcheck(lambda x: into_ball(x, 1.0), U.requires_grad_())
    zero = torch.zeros(4, 5, requires_grad=True)
    into_ball(zero, 1.0).sum().backward()
    assert torch.equal(zero.grad, torch.ones(4, 5))


def test_the_transform_of_the_constraint() -> None:
    transform = transform_to(ColumnBall(2.0))
    U = 3 * torch.randn(4, 5)
    W = transform(U)
    assert ColumnBall(2.0).check(W)
    assert not ColumnBall(2.0).check(1.001 * W)
    assert not ColumnBall(1.9).check(W)
    torch.testing.assert_close(transform(transform.inv(W)), W, rtol=1e-15, atol=0)
    assert transform == transform_to(ColumnBall(2.0)) != transform_to(ColumnBall(1.0))
    assert hash(transform) == hash(transform_to(ColumnBall(2.0)))
    assert repr(ColumnBall(2.0)) == "ColumnBall(radius=2.0)"
    assert pickle.loads(pickle.dumps(ColumnBall(2.0))).radius == copy.deepcopy(ColumnBall(2.0)).radius == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_on_the_sphere_can_be_assigned(dtype: torch.dtype) -> None:
    module = PyroModule[torch.nn.Module]()
    module.W = PyroParam(torch.zeros(144, 50, dtype=dtype), ColumnBall(0.3))
    W = unit_columns(144, 50, 0.3).to(dtype)
    assign_parameters(module, {"W": W})
    torch.testing.assert_close(read_parameter(module, "W"), W, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0)
    with pytest.raises(ValueError, match=r"inside its constraint ColumnBall\(radius=0.3\)"):
        assign_parameters(module, {"W": 1.01 * W})
    assert torch.equal(module.W_unconstrained, W)


def test_the_constraint_survives_the_parameter_store() -> None:
    W = pyro.param("W", unit_columns(4, 5), constraint=ColumnBall(1.0))
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    torch.testing.assert_close(pyro.param("W"), W, rtol=1e-15, atol=0)


@every_problem
def test_weight_decay_is_ridge_regression(problem: Callable[[], tuple[Tensor, Tensor]]) -> None:
    gram, cross = problem()
    count, beta = torch.tensor(60.0), torch.tensor(4.0)
    W = WeightDecay(0.3).maximize(gram, cross, unit_columns(4, 6), count=count, beta=beta)
    ridge = gram.expand(4, -1, -1) + 60 * 0.3 / 4 * torch.eye(6)
    torch.testing.assert_close(W, torch.linalg.solve(ridge, cross.unsqueeze(-1)).squeeze(-1), rtol=1e-10, atol=1e-12)


@every_problem
def test_unconstrained_is_least_squares(problem: Callable[[], tuple[Tensor, Tensor]]) -> None:
    gram, cross = problem()
    W = Unconstrained().maximize(gram, cross, unit_columns(4, 6), count=ONE, beta=BETA)
    product = torch.einsum("dh,dhk->dk", W, gram.expand(4, -1, -1))
    scale = gram.diagonal(dim1=-2, dim2=-1).reshape(-1, 6).amax(0).sqrt()
    torch.testing.assert_close(product / scale.clamp(min=1e-300), cross / scale.clamp(min=1e-300), rtol=0, atol=1e-7)


@pytest.mark.parametrize("problem", [unused_atoms, masked_few_rows], ids=lambda f: f.__name__)
def test_unconstrained_keeps_what_the_data_leave_open(problem: Callable[[], tuple[Tensor, Tensor]]) -> None:
    gram, cross = problem()
    old = unit_columns(4, 6)
    W = Unconstrained().maximize(gram, cross, old, count=ONE, beta=BETA)
    if gram.dim() == 2:
        torch.testing.assert_close(W[:, [1, 4]], old[:, [1, 4]], rtol=1e-12, atol=0)
    else:
        # No row observes column 1.
        torch.testing.assert_close(W[1], old[1], rtol=1e-12, atol=0)


def test_the_default_of_column_norm_is_the_maximum() -> None:
    gram, cross = regular()
    W = ColumnNorm().maximize(gram, cross, unit_columns(4, 6), count=ONE, beta=BETA)
    assert_kuhn_tucker(W, gram, cross, 1.0)
    assert ColumnNorm().solver == LagrangeDual()


def test_starts_and_penalties() -> None:
    atoms = torch.randn(4, 3) * torch.tensor([5.0, 0.1, 0.0])
    norms = ColumnNorm(radius=2.0).start(atoms).norm(dim=0)
    torch.testing.assert_close(norms, torch.tensor([2.0, 2.0, 0.0]), rtol=1e-14, atol=0)
    for rule in (WeightDecay(1.0), Unconstrained()):
        assert torch.equal(rule.start(atoms), atoms)
    assert ColumnNorm().log_penalty(atoms) is None
    assert Unconstrained().log_penalty(atoms) is None
    torch.testing.assert_close(WeightDecay(0.4).log_penalty(atoms), -0.2 * atoms.square().sum())


REFUSALS: list[tuple[Callable[[], Dictionary | DictionarySolver], type[Exception], str]] = [
    (lambda: ColumnNorm(0.0), ValueError, "Expected a positive and finite radius, but got 0.0. Pass 1.0, say."),
    (lambda: ColumnNorm(math.inf), ValueError, "Expected a positive and finite radius, but got inf."),
    (lambda: ColumnNorm(1.0, "bcd"), TypeError, "Expected solver to be a DictionarySolver, but got 'bcd'. Pass Lagr"),
    (lambda: WeightDecay(0.0), ValueError, "Expected a positive and finite rate of weight decay, but got 0.0. Pass"),
    (lambda: WeightDecay(math.nan), ValueError, "Expected a positive and finite rate of weight decay, but got nan."),
    (lambda: BlockCoordinateDescent(num_sweeps=0), ValueError, "Expected num_sweeps >= 1, but got 0."),
    (lambda: BlockCoordinateDescent(block_size=0), ValueError, "Expected block_size >= 1, but got 0."),
    (lambda: BlockCoordinateDescent(tolerance=-1.0), ValueError, "Expected tolerance >= 0, but got -1.0."),
    (lambda: LagrangeDual(tolerance=0.0), ValueError, "Expected tolerance > 0, but got 0.0."),
    (lambda: LagrangeDual(max_steps=0), ValueError, "Expected max_steps >= 1, but got 0."),
]


@pytest.mark.parametrize(("build", "error", "message"), REFUSALS)
def test_refusals(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()
