"""Learned inference by refinement: solve from the network's answer, then train the network on the solution (19.5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_ext.evaluators import Parameters
from pyro_ext.fixed_point import FixedPoint
from pyro_ext.gradient import Gradient
from pyro_ext.local_gradient import LocalGradient
from pyro_ext.maximize import Maximize
from pyro_ext.pull import in_rows, point_values, weight_of
from pyro_ext.steps import Call, EResult, EStep


class Refine(EStep):
    r"""Improves the q of a network by another E-step, and trains the network to put out what that found (19.5.2).

    Each half-step reads f, the network's parameters of these rows, lets `target` find q* from there, and takes some
    optimizer steps on

    .. math:: \sum_n D(q^*_n \| q_n), \qquad D = KL \text{, or } \tfrac12 |h^*_n - f_n|^2 \text{ between points}

    with q* fixed (times N/B in a subsampled program). The M-step sees q*, not the network's q.

    - `Refine(Maximize(), optim, strength=alpha)` with a `PSD` encoder is predictive sparse decomposition (Kavukcuoglu,
      Ranzato & LeCun, 2008): h* minimises -log p(h, v) + alpha/2 |h - f|^2, and W is learned at h*.
    - The same with `LISTA` and strength 0 trains the network of Gregor & LeCun (2010) while the dictionary is learned.
    - `Refine(FixedPoint(max_sweeps=1), optim)` is the learned mean field of Salakhutdinov & Larochelle (2010): a sweep
      improves the network's estimate, which is trained to be the improved one. More sweeps, `Parallel(damping)` and
      any program that `FixedPoint` serves will do.
    - `Refine(LocalGradient(num_steps), optim)` takes gradient steps in each row's parameters instead, for programs that
      have no fixed points in closed form.

    In the ledger L belongs to q*: log p(v, h*) of points, without alpha's term. It promises no monotony. Where nothing
    may be trained (`EM.infer`, `EM.evaluate_loss`), q is the network's own; `SemiAmortized` takes the local steps there
    too. `Gradient(optim, loss=...)` as M-step runs the guide, and so sees the network's q.

    Args:
        target: `Maximize(...)` for points, such as a `PointEncoder` puts out; `FixedPoint(...)` for factors that it
            serves; `LocalGradient(...)` for other densities. `FixedPoint` and `LocalGradient` start at f, whatever
            their `start` is; so does `Maximize`, unless its start is `Cold()` or `Better()`.
        optim: an optimizer from `pyro.optim`, for the network.
        num_steps: optimizer steps of one half-step.
        strength: alpha, at least 0, nats per squared unit of the latents; with `Maximize` only.

    Raises:
        TypeError: target or optim of another type; at the door of `EM`, a guide with tables; there or at the first
            step, factors that depend on each other's values, and factors under `Maximize` that are no points.
        ValueError: num_steps below 1; a strength that is negative or not finite, or one above 0 with `FixedPoint`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.optim import SGD
        >>> from pyro_ext import EM
        >>> from pyro_ext.guides import Amortized
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> step = Refine(FixedPoint(), SGD({"lr": 0.1}))
        >>> em = EM(model, Amortized(model), e_step=step, m_step=None)
        >>> v = torch.tensor([0.5, 3.0])
        >>> loss = em.step(v)
        >>> step.last_loss  # mean KL from sigmoid(v - 0.5) to the network's 0.5
        0.2123
        >>> em.step(v) == loss  # -L at q*, wherever the network is
        True
        >>> step.last_loss < 0.2
        True
    """

    num_particles = 10
    """Samples of L for a network's own q where it is not exact."""

    def __init__(
        self,
        target: Maximize | FixedPoint | LocalGradient,
        optim: PyroOptim,
        num_steps: int = 1,
        strength: float = 0.0,
    ) -> None:
        if not isinstance(target, Maximize | FixedPoint | LocalGradient):
            raise TypeError(
                f"Expected target to be Maximize(), FixedPoint() or LocalGradient(), but got {target!r}. Pass what "
                "solves, as an object."
            )
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ValueError(f"Expected a strength of at least 0, but got {strength!r}. 0 leaves the points free.")
        if strength and not isinstance(target, Maximize):
            raise ValueError(
                f"Expected strength=0 with {type(target).__name__}, but got {strength!r}. Only points are pulled, by "
                "Maximize()."
            )
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(
                f"Expected num_steps of at least 1, but got {num_steps!r}. A network that is trained already needs no "
                "Refine: call `guide.posterior`."
            )
        self._stepper = Gradient(optim, num_steps)
        self.target = target
        self.optim = optim
        self.num_steps = num_steps
        self.strength = float(strength)
        self._last_loss: float | None = None

    @property
    def last_loss(self) -> float:
        """The regression's loss that the latest optimizer step started from, a mean over rows.

        In nats; in squared units of the latents where factors are points.

        Raises:
            RuntimeError: nothing was trained yet.
        """
        if self._last_loss is None:
            raise RuntimeError("Expected an E-step before its loss, but there was none. Call `em.step` first.")
        return self._last_loss

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse guides with tables, and what is known to be unfit of a guide that was set up already.

        Raises:
            TypeError: as above.
        """
        if getattr(guide, "is_table", False) or not hasattr(guide, "rows_parameters"):
            raise TypeError(
                f"Expected a guide with a network (Amortized) for Refine, but got {type(guide).__name__}. "
                f"Use {_for_tables(self.target)} itself for a table."
            )
        if guide.is_set_up:
            self._check_factors(guide, guide.blocks)

    def _check_factors(self, guide: Any, blocks: Any) -> None:
        if not guide.is_static:
            raise TypeError(
                "Expected factors that do not depend on each other's values for Refine, but got a guide with "
                "conditional factors or density encoders. Use `Gradient(optim)`, or pyro.infer.SVI."
            )
        others = [b.name for b in blocks if not b.factor.is_point]
        if others and isinstance(self.target, Maximize):
            raise TypeError(
                f"Expected points for Refine(Maximize()), but got densities for {', '.join(map(repr, others))}. Pass "
                "encoders of values (PointEncoder), or use Refine(FixedPoint(), optim)."
            )

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Solve from the network's q, and train the network on the solution."""
        self._check_factors(call.guide, call.blocks)
        found = call.guide.rows_parameters(call.program)
        if not keep:
            posterior = call.posterior(found)
            bound, exact = call.bound(posterior, found, self.num_particles)
            return EResult(bound, exact, "warm", posterior, monotone=False)
        result, solved = self._solve(call, found)
        for _ in range(self.num_steps):
            self._stepper._step(lambda: self._regress(call, solved))
        return result

    def _solve(self, call: Call, found: Parameters) -> tuple[EResult, Parameters]:
        if isinstance(self.target, Maximize):
            return self.target.solve(call, found, pull=self.strength)
        return self.target.solve(call, found)

    def _regress(self, call: Call, solved: Parameters) -> None:
        with torch.enable_grad():
            loss = _divergence(call, solved, call.guide.rows_parameters(call.program, detach=False))
            (loss * call.scale).backward()
        self._last_loss = float(loss.detach()) / call.program.rows.count


def _for_tables(target: Maximize | FixedPoint | LocalGradient) -> str:
    return "Gradient(optim)" if isinstance(target, LocalGradient) else f"{type(target).__name__}()"


def _divergence(call: Call, solved: Parameters, params: Parameters) -> Tensor:
    """The sum over rows of what parts the network's q from the solved one."""
    rows = call.program.rows
    terms: list[Tensor] = []
    for block in call.blocks:
        name, site = block.name, block.site
        if block.factor.is_point:
            # By values: the feature of a positive site's 0 is no number to regress on.
            wanted, got = (in_rows(point_values(p, [block], rows), [site], rows) for p in (solved, params))
            term = 0.5 * (wanted - got).square()
        else:
            term = block.factor.divergence(solved[name], params[name])
        terms.append(weight_of(site, rows) * term.sum())
    return torch.stack(terms).sum()
