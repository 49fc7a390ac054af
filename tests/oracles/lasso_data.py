"""Lassos with the data they come from, and their minima by other routes: every pattern of signs, and scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from pyro_ext.problems import PenalizedQuadratic


@dataclass(frozen=True)
class Data:
    """R lassos |y - A x|^2 / 2 + sum_i rate_i |x_i|: A ``(N, F)`` or ``(R, N, F)``, y ``(R, N)``."""

    A: Tensor
    y: Tensor
    rate: Tensor
    nonnegative: Tensor | None = None

    @property
    def problem(self) -> PenalizedQuadratic:
        return PenalizedQuadratic(self.A.mT @ self.A, self.b, self.rate, self.nonnegative)

    @property
    def b(self) -> Tensor:
        return (self.A.mT @ self.y.unsqueeze(-1)).squeeze(-1)

    @property
    def start(self) -> Tensor:
        return torch.zeros(len(self.y), self.A.shape[-1], dtype=self.y.dtype)

    def to(self, dtype: torch.dtype) -> Data:
        return replace(self, A=self.A.to(dtype), y=self.y.to(dtype), rate=self.rate.to(dtype))


def random_data(
    num_rows: int,
    size: int,
    num: int,
    seed: int = 0,
    rate: float = 0.3,
    *,
    per_row_rate: bool = False,
    per_row_gram: bool = False,
    nonnegative: bool = False,
) -> Data:
    """Gaussian A with columns of length about 1, and y of length about sqrt(N)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = normal(*((num_rows,) if per_row_gram else ()), num, size) / num**0.5
    shape = (num_rows, size) if per_row_rate else (size,)
    rates = rate * (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64))
    signs = torch.rand(size, generator=generator) < 0.6 if nonnegative else None
    return Data(A, normal(num_rows, num), rates, signs)


def brute_force(problem: PenalizedQuadratic) -> tuple[Tensor, Tensor]:
    """The minimum by all 3^F patterns of signs: x ``(R, F)`` and P ``(R,)``.

    A minimum with linearly independent columns of A exists wherever there is one, so singular systems are left out.
    """
    rows, size = problem.linear.shape
    patterns = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=size)), dtype=problem.linear.dtype)
    if problem.nonnegative is not None:
        patterns = patterns[~((patterns < 0) & problem.nonnegative).any(-1)]
    active = patterns != 0
    points, values = [], []
    for row in range(rows):
        G = problem.quadratic if problem.shares else problem.quadratic[row]
        rate = problem.rate if problem.rate.dim() == 1 else problem.rate[row]
        systems = torch.where(active[:, :, None] & active[:, None, :], G, 0) + torch.diag_embed((~active).to(G))
        regular = torch.linalg.eigvalsh(systems)[:, 0] > 1e-11
        right = torch.where(active, problem.linear[row] - rate * patterns, 0)[regular]
        x = torch.linalg.solve(systems[regular], right.unsqueeze(-1)).squeeze(-1)
        x = x[(x * patterns[regular] >= 0).all(-1)]
        P = 0.5 * ((x @ G) * x).sum(-1) - x @ problem.linear[row] + (rate * x.abs()).sum(-1)
        points.append(x[P.argmin()])
        values.append(P.min())
    return torch.stack(points), torch.stack(values)


def scikit_learn(data: Data, positive: bool = False) -> Tensor:
    """x ``(R, F)`` by scikit-learn's coordinate descent, one row after the other."""
    found = []
    for row in range(len(data.y)):
        A = data.A if data.A.dim() == 2 else data.A[row]
        rate = data.rate if data.rate.dim() == 1 else data.rate[row]
        # Columns in units of their rates, for scikit-learn has one rate, and divides by the number of observations.
        lasso = Lasso(alpha=1 / len(A), fit_intercept=False, positive=positive, tol=1e-13, max_iter=1_000_000)
        lasso.fit((A / rate).numpy(), data.y[row].numpy())
        found.append(torch.from_numpy(lasso.coef_) / rate)
    return torch.stack(found)
