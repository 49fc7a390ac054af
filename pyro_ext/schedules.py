"""Schedules: the order in which the groups of q are updated, and how far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_ext.evaluators import Evaluator, Parameters


class Schedule(ABC):
    """The order in which the groups of q are updated.

    Attributes:
        monotone: a sweep promises not to lower L.
        damps: a sweep goes only part of the way to the optima.
    """

    monotone: bool = False
    damps: bool = False

    @abstractmethod
    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sweep over all groups."""

    def sweeper(self, evaluator: Evaluator) -> Callable[[Parameters], Parameters]:
        """The sweeps of one E-step, for schedules that learn from one to the next."""
        return partial(self.apply, evaluator)


class Sequential(Schedule):
    """Each group in turn, given the newest value of the others: L never falls."""

    monotone = True

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sequential sweep."""
        return evaluator.sweep(params)


class Coloured(Schedule):
    """Groups that do not interact at once, colour after colour, given the newest value of the others.

    A greedy colouring of the graph of non-zero couplings puts two groups into one colour only where neither's optimum
    depends on the other: L never falls, and a colour is one large operation in place of many small ones. Two layers
    or a chain take two colours; where every group interacts with every other it is `Sequential`. Enumerated programs
    are swept sequentially.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5).expand([4]).to_event(1))
        ...         pyro.sample("v", dist.Normal(h[..., 1:] - h[..., :-1], 1.0).to_event(1), obs=v)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(Coloured()), m_step=None)
        >>> em.infer(torch.ones(2, 3))["h"].mean.shape
        torch.Size([2, 4])
    """

    monotone = True

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sweep, colour by colour."""
        return evaluator.coloured_sweep(params)


@dataclass(frozen=True)
class Parallel(Schedule):
    """All groups at once from the old value of the others, damped: lambda <- d lambda + (1 - d) lambda_new.

    Fast on wide models, but L may fall and undamped sweeps may oscillate for ever; `Adaptive` controls d.

    Args:
        damping: d in [0, 1): the share of the old natural parameters that is kept (logits; precision, and precision
            times mean).

    Raises:
        ValueError: damping outside [0, 1).
    """

    damping: float = 0.5
    damps = True

    def __post_init__(self) -> None:
        _check_damping(self.damping)

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One damped parallel sweep."""
        return interpolate(evaluator, params, evaluator.jump(params), self.damping)


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Parallel sweeps with a damping that each row controls: L never falls, and swings die out.

    A sweep steps by s = 1 - d towards the optima of all groups, r = E_new[h] - E[h] away in the means. Two things
    move s. *Contraction*: along the step r shrinks to c r, c = r_new'r / r'r; s / (1 - c) would have met the fixed
    point of a linear map (Aitken's relaxation; Irons and Tuck, 1969), so that c < 0, a swing, damps and 0 < c < 1
    speeds up. *The ledger*: where a row's L would fall, its step is halved until it does not, or the row stays where
    it is. Halving ends, for the step is the natural gradient of L, along which L rises unless q is a fixed point.

    Args:
        damping: d of the first sweep, in [0, 1).
        max_halvings: most halvings of one sweep's step.

    Raises:
        ValueError: damping outside [0, 1), or max_halvings below 1.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):  # two units that repel each other: undamped, both switch on, then both off, for ever
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
        ...         pyro.sample("v", dist.Normal(5 * h.sum(-1), 1.0), obs=v)
        >>> e_step = FixedPoint(Adaptive(0.0))
        >>> _ = EM(model, MeanField(model), e_step=e_step, m_step=None).infer(torch.full((1,), 5.0))
        >>> e_step.converged
        True
    """

    damping: float = 0.5
    max_halvings: int = 20
    monotone = True
    damps = True

    def __post_init__(self) -> None:
        _check_damping(self.damping)
        if self.max_halvings < 1:
            raise ValueError(f"Expected max_halvings of at least 1, but got {self.max_halvings}. 20 is plenty.")

    def apply(self, evaluator: Evaluator, params: Parameters) -> Parameters:
        """One sweep at the first damping, halved where L would fall."""
        return self.sweeper(evaluator)(params)

    def sweeper(self, evaluator: Evaluator) -> Callable[[Parameters], Parameters]:
        """A controller whose steps start at the first damping."""
        return _Controller(evaluator, 1 - self.damping, self.max_halvings)


class _Controller:
    """The steps of every row, from sweep to sweep."""

    def __init__(self, evaluator: Evaluator, step: float, max_halvings: int) -> None:
        self.evaluator, self.max_halvings = evaluator, max_halvings
        self.first_step = step
        self.step: Tensor | None = None
        self.residual: Tensor | None = None

    def __call__(self, params: Parameters) -> Parameters:
        evaluator = self.evaluator
        bound = evaluator.bound(params)
        new = evaluator.jump(params)
        step = self._next_step(bound, evaluator.means(new) - evaluator.means(params))
        least = bound - 4 * torch.finfo(bound.dtype).eps * (1 + bound.abs())
        for _ in range(self.max_halvings):
            there = interpolate(evaluator, params, new, 1 - step)
            fell = ~(evaluator.bound(there) >= least)
            if not bool(fell.any()):
                break
            step = torch.where(fell, 0.5 * step, step)
        else:
            there = interpolate(evaluator, params, new, 1 - step)
            stays = ~(evaluator.bound(there) >= least)[:, None, None]
            there = {name: torch.where(stays, params[name], value) for name, value in there.items()}
        self.step = step
        return there

    def _next_step(self, bound: Tensor, residual: Tensor) -> Tensor:
        old, self.residual = self.residual, residual
        if old is None or self.step is None:
            return torch.full_like(bound, self.first_step)
        size = old.square().sum(-1)
        contraction = (residual * old).sum(-1) / size.clamp_min(torch.finfo(size.dtype).tiny)
        # Growing faster than that trusts one sweep's contraction too far.
        growth = 1 / (1 - contraction).clamp_min(0.5)
        return (self.step * torch.where(size > 0, growth, torch.ones_like(growth))).clamp_max(1.0)


def interpolate(evaluator: Evaluator, old: Parameters, new: Parameters, damping: float | Tensor) -> Parameters:
    """Parameters with the natural parameters d old + (1 - d) new; d is a number or one a row, ``(R,)``."""
    share = damping if isinstance(damping, float | int) else damping[:, None]
    return {b.name: b.factor.interpolate(old[b.name], new[b.name], share) for b in evaluator.blocks}


def _check_damping(damping: float) -> None:
    if not 0 <= damping < 1:
        raise ValueError(f"Expected damping in [0, 1), but got {damping}. Use 0 for undamped sweeps.")
