"""Factors: the families that the blocks of q are drawn from, as functions of a parameter tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.tracing import holds

CHUNK_ELEMENTS = 2**20
"""Numbers in one chunk of the second moments of rows or states: a few MB, so that it stays in the cache."""


class Factor(ABC):
    """The family of one block of q: a distribution over ``size`` features.

    A factor holds no parameters: every method takes them as a tensor ``(..., num_params)``, so that a
    table and an encoder network serve alike. A *group* is a set of features that change at once; the
    groups of a factor are independent under q.

    Attributes:
        size: number of features k.
        num_params: number of parameters P.
        groups: the features of each group.
        is_joint: one group holds all features and its states are coupled.
        in_closed_form: `optimum` is the maximum; elsewhere `improve` approaches it from where q is.
    """

    size: int
    num_params: int
    groups: tuple[tuple[int, ...], ...]
    is_joint: bool = False
    is_point: bool = False
    in_closed_form: bool = True

    @abstractmethod
    def initial(self, mean: Tensor, spread: float) -> Tensor:
        """Parameters ``(..., P)`` of a broad start with the given feature means ``(..., k)``."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """E_q[h], shape ``(..., k)``: probabilities for discrete features."""

    @abstractmethod
    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        """E_q[h' Q h], shape ``(...)``, for Q of shape ``(k, k)`` or ``(..., k, k)``."""

    def moment_sum(self, params: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_n w_n E_q[h_n h_n'], shape ``(k, k)``, for parameters ``(R, P)`` and weights ``(R,)``.

        It is the derivative of the second moment in Q.
        """
        with torch.enable_grad():
            quadratic = params.new_zeros(self.size, self.size).requires_grad_()
            second = self.second_moment(params.detach(), quadratic)
            (result,) = torch.autograd.grad((second if weights is None else weights * second).sum(), quadratic)
        return result

    def second_moments(self, params: Tensor) -> Tensor:
        """E_q[h_n h_n'] row by row, shape ``(R, k, k)``, for parameters ``(R, P)``; without a gradient."""
        with torch.enable_grad():
            quadratic = params.new_zeros(len(params), self.size, self.size).requires_grad_()
            (result,) = torch.autograd.grad(self.second_moment(params.detach(), quadratic).sum(), quadratic)
        return result

    def moment_sums(self, params: Tensor, weights: Tensor) -> Tensor:
        """sum_n w_nj E_q[h_n h_n'] for every j, shape ``(W, k, k)``, for parameters ``(R, P)`` and weights ``(R, W)``.

        In chunks of rows, so that the rows' second moments are never held all at once.
        """
        rows = max(1, CHUNK_ELEMENTS // self.size**2)
        total = params.new_zeros(weights.shape[1], self.size**2)
        for part, weight in zip(params.split(rows), weights.split(rows), strict=True):
            total.addmm_(weight.mT, self.second_moments(part).flatten(1))
        return total.unflatten(1, (self.size, self.size))

    def objective(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """E_q[l'h + h'Qh / 2] + H(q), shape ``(...)``, nats."""
        expected = (linear * self.mean(params)).sum(-1) + 0.5 * self.second_moment(params, quadratic)
        return expected + self.entropy(params)

    @abstractmethod
    def entropy(self, params: Tensor) -> Tensor:
        """H(q) in nats, shape ``(...)``; 0 for a point mass."""

    @abstractmethod
    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        """Parameters of the q that maximises E_q[l'h + h'Qh / 2] + H(q), each group on its own (19.56).

        Args:
            linear: l, shape ``(..., k)``.
            quadratic: Q, shape ``(k, k)`` or ``(..., k, k)``; only its blocks within a group are read.

        Raises:
            ValueError: no maximum exists (a continuous factor whose Q is not negative definite).
        """

    def improve(self, params: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
        """Parameters that do not lower the `objective`: the `optimum` where it has a closed form, else a step to it."""
        return self.optimum(linear, quadratic)

    def is_exact_for(self, quadratic: Tensor | None) -> bool:
        """Whether the family of a factor of one group holds q proportional to exp(l'h + h'Qh / 2), whatever l.

        Args:
            quadratic: Q; None for any scores of the states.
        """
        return True

    def interpolate(self, old: Tensor, new: Tensor, damping: float | Tensor) -> Tensor:
        """Parameters of the q whose natural parameters are d old + (1 - d) new, shape ``(..., P)``.

        Args:
            old: parameters ``(..., P)``.
            new: parameters ``(..., P)``.
            damping: d in [0, 1], a number or a tensor that broadcasts against ``(...)``.
        """
        if isinstance(damping, Tensor):
            return torch.lerp(new, old, damping[..., None])
        return torch.lerp(new, old, damping)

    def solve(self, linear: Tensor, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        """The `optimum` of a factor of one group, and the value of its `objective` there."""
        params = self.optimum(linear, quadratic)
        return params, self.objective(params, linear, quadratic)

    def sums(self, params: Tensor) -> tuple[Tensor, ...]:
        """What `solve` finds on the way to these parameters and later steps would compute again; empty for nothing."""
        return ()

    def remember(self, params: Tensor, sums: tuple[Tensor, ...]) -> None:  # noqa: B027 (most factors keep nothing)
        """Know again what `sums` gave."""

    def from_scores(self, scores: Tensor) -> Tensor:
        """Parameters of the q over one group that maximises E_q[score] + H(q).

        Args:
            scores: ``(..., num_states)``, one per state of the group in the order of `enumerate_states`.

        Raises:
            TypeError: the factor is continuous.
        """
        raise TypeError(f"Expected a discrete factor, but got {type(self).__name__}. Its states cannot be enumerated.")

    def improve_scores(self, params: Tensor, scores: Tensor) -> Tensor:
        """As `improve`, for scores of the states as in `from_scores`."""
        return self.from_scores(scores)

    @abstractmethod
    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        """q(h[start:stop] | h[:start] = earlier), a distribution over features (event dimension 1)."""

    @abstractmethod
    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        """q(h[start:stop]), a distribution over features (event dimension 1)."""

    def mode(self, params: Tensor) -> Tensor:
        """The most probable features, ``(..., k)``.

        Raises:
            NotImplementedError: it is not known for the family.
        """
        raise NotImplementedError(f"The mode of a {type(self).__name__} is not known in closed form.")

    def divergence(self, target: Tensor, params: Tensor) -> Tensor:
        """KL(q_target || q_params) in nats, shape ``(...)``: the loss of a network that is trained on solved q.

        It is at least 0, and 0 where the two are the same q. Its gradient in the parameters of means and probabilities
        is that of maximum likelihood on draws of q_target.

        Args:
            target: parameters ``(..., P)``.
            params: parameters ``(..., P)``, those that are trained; they broadcast against the target's.

        Raises:
            TypeError: it is not known for the family.
        """
        raise TypeError(
            f"Expected a family with a divergence in closed form, but got {type(self).__name__}. "
            "Train the network on the objective itself, by `Gradient` or pyro.infer.SVI."
        )

    def columns(self, group: Sequence[int]) -> list[int]:
        """The parameter columns of one group."""
        return list(group)

    @abstractmethod
    def part(self, group: Sequence[int]) -> Factor:
        """The same family over one group alone."""


def bilinear(value: Tensor, quadratic: Tensor) -> Tensor:
    """x'Qx for vectors ``(..., k)`` and Q of shape ``(k, k)`` or ``(..., k, k)``."""
    if quadratic.dim() == 2:
        return (value * (value @ quadratic.mT)).sum(-1)
    return (value * (value[..., None, :] @ quadratic.mT).squeeze(-2)).sum(-1)


def check_concave(precision: Tensor) -> None:
    """Refuse a continuous latent in which log p(v, h) has no maximum.

    Raises:
        ValueError: a precision that is not positive.
    """
    if not holds((precision > 0).all()):
        raise ValueError(
            "Expected log p(v, h) to fall away from its maximum in every continuous latent, but got a precision of "
            f"{float(precision.min()):.3g}. Give the latent a proper prior."
        )
