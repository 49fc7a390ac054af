"""Which lassos have no minimum, by linear programming."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog

from pyro_ext.bounded import check_bounded
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.solvers import SolverError


def has_minimum(problem: PenalizedQuadratic, row: int) -> bool:
    """Whether b - G z lies within the rates for some z."""
    G, b, rate = problem.quadratic.numpy(), problem.linear[row].numpy(), problem.rate.numpy()
    below = [i for i in range(len(b)) if problem.nonnegative is None or not problem.nonnegative[i]]
    rows = torch.cat((-problem.quadratic, problem.quadratic[below])).numpy()
    limits = torch.cat((problem.rate - problem.linear[row], (problem.rate + problem.linear[row])[below])).numpy()
    assert G.shape == (len(b), len(rate))
    return linprog(0 * b, A_ub=rows, b_ub=limits, bounds=(None, None)).success


@pytest.mark.parametrize("nonnegative", [False, True])
def test_linear_programming(nonnegative):
    """60 rows of rank 3 of 6, about half of which have a minimum; asked one by one."""
    torch.manual_seed(0)
    A = torch.randn(3, 6, dtype=torch.float64)
    signs = torch.arange(6) < 3 if nonnegative else None
    b = (2 if nonnegative else 1) * torch.randn(60, 6, dtype=torch.float64)
    problem = PenalizedQuadratic(A.T @ A, b, 0.4 + torch.rand(6, dtype=torch.float64), signs)
    expected = [has_minimum(problem, row) for row in range(60)]
    assert 10 < sum(expected) < 50
    for row, bounded in enumerate(expected):
        part = problem.rows(torch.tensor([row]))
        if bounded:
            check_bounded(part)
        else:
            with pytest.raises(SolverError, match=r"Expected a minimum of.*row \(number 0\).*without end"):
                check_bounded(part)
    with pytest.raises(SolverError, match=rf"number {expected.index(False)}\)"):
        check_bounded(problem)


def test_one_sided():
    """b_i = -5 and G_ii = 0: no minimum, unless x_i may not fall below 0."""
    G, b, rate = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[1.0, -5.0]]), torch.ones(2)
    with pytest.raises(SolverError, match="without end"):
        check_bounded(PenalizedQuadratic(G, b, rate))
    check_bounded(PenalizedQuadratic(G, b, rate, torch.tensor([False, True])))


def test_gram_and_rates_of_rows():
    G = torch.stack((torch.eye(2), torch.ones(2, 2)))
    b = torch.tensor([[2.0, -2.0], [2.0, -2.0]])
    check_bounded(PenalizedQuadratic(G, b, torch.tensor([[1.0, 1.0], [2.0, 2.5]])))
    with pytest.raises(SolverError, match="number 1"):
        check_bounded(PenalizedQuadratic(G, b, torch.tensor([[1.0, 1.0], [1.0, 1.0]])))
