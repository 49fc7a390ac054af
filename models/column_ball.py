"""The constraint |w_k| <= radius on the columns of a matrix, for `PyroParam` and gradient steps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform


def into_ball(W: Tensor, radius: float | Tensor) -> Tensor:
    """The nearest matrix whose columns, shape (..., D, H), have norms of at most the radius, () or (H,).

    Columns inside stay as they are, to the last digit. Gradients are finite everywhere, at 0 as well.
    """
    bound = torch.as_tensor(radius, dtype=W.dtype, device=W.device).square()
    # Inside, the clamped square is the bound, and the quotient 1 to the last digit.
    return W * (bound / W.square().sum(-2, keepdim=True).clamp(min=bound)).sqrt()


class ColumnBall(constraints.Constraint):
    """Real matrices (D, H) whose columns have norms |w_k| of at most the radius, up to rounding.

    `transform_to` of it is W = U min(1, radius / |u_k|) with the identity as its inverse: nothing changes inside. An
    atom that a gradient step carried out keeps a gradient along the sphere only, and so stays on it. That is where
    sparse coding wants it: a longer atom does the same with smaller h, which costs less under every prior that falls
    with |h|.

    Args:
        radius: positive.

    Example:
        >>> W = transform_to(ColumnBall(1.0))(torch.tensor([[3.0, 0.1], [4.0, 0.2]]))
        >>> W
        tensor([[0.6000, 0.1000], [0.8000, 0.2000]])
        >>> ColumnBall(1.0).check(W)
        tensor(True)
    """

    event_dim = 2

    def __init__(self, radius: float) -> None:
        self.radius = radius
        super().__init__()

    def __repr__(self) -> str:
        return f"ColumnBall(radius={self.radius})"

    def check(self, value: Tensor) -> Tensor:
        """Whether all norms are at most the radius, up to the rounding of the dtype; shape (...)."""
        slack = 1 + 64 * torch.finfo(value.dtype).eps
        return (value.square().sum(-2) <= (self.radius * slack) ** 2).all(-1)


class IntoColumnBall(Transform):
    """The transform of `ColumnBall`, from all matrices."""

    domain = constraints.independent(constraints.real, 2)
    bijective = False

    def __init__(self, radius: float) -> None:
        self.radius = radius
        # The class attribute is the plain one; a transform is told apart by its radius.
        self.codomain = cast("constraints.Constraint", ColumnBall(radius))
        super().__init__()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntoColumnBall) and self.radius == other.radius

    def __hash__(self) -> int:
        return hash((IntoColumnBall, self.radius))

    def _call(self, x: Tensor) -> Tensor:
        return into_ball(x, self.radius)

    def _inverse(self, y: Tensor) -> Tensor:
        return y


@transform_to.register(ColumnBall)
def _into_column_ball(constraint: ColumnBall) -> IntoColumnBall:
    return IntoColumnBall(constraint.radius)
