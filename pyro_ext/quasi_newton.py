"""A partial M-step: some quasi-Newton steps on the exact L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]

from pyro_ext.evaluators import NoEvaluatorError
from pyro_ext.gradient import theta_objective
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.steps import Call, EResult, MStep


class QuasiNewton(MStep):
    r"""theta moves uphill on E_q[log p(v, h; theta)] by L-BFGS with a strong-Wolfe line search; q does not move (19.2).

    For models without a closed form, and for a generalised EM (Dempster et al., 1977) without a learning rate: a few
    steps raise L, many reach its maximum in theta. The steps are taken in the unconstrained parameters of the program
    (Nocedal and Wright, 2006, algorithms 7.5 and 3.5), with L exact. Theta ends where L was highest of all
    points that were evaluated, the old theta among them, so that on full data L never falls; where the line search
    finds nothing better, theta stays as it was.

    Args:
        num_steps: L-BFGS steps of one half-step, of one or a few evaluations of L and its gradient each.
        history_size: pairs of steps and gradient changes kept for the approximation of the curvature. They are gathered
            anew in each half-step, for another q has another L.

    Raises:
        ValueError: num_steps or history_size below 1.
        NoEvaluatorError: at the first step, where L is not exact (neither quadratic in the latents nor enumerable).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> pyro.clear_param_store()
        >>> def model(x, y):  # two groups of rows, each with a slope of its own
        ...     slopes = pyro.param("slopes", torch.tensor([-1.0, 1.0]))
        ...     with pyro.plate("data", len(y)):
        ...         h = pyro.sample("h", dist.OneHotCategorical(torch.ones(2) / 2))
        ...         pyro.sample("y", dist.Bernoulli(logits=(h @ slopes) * x), obs=y)
        >>> x, y = torch.tensor([3.0, -3.0, 3.0, -2.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=QuasiNewton(num_steps=2))
        >>> em.step(x, y) > em.step(x, y)
        True
    """

    def __init__(self, num_steps: int = 10, history_size: int = 10) -> None:
        for name, value in (("num_steps", num_steps), ("history_size", history_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected {name} of at least 1, but got {value!r}. Use m_step=None to hold theta.")
        self.num_steps = num_steps
        self.history_size = history_size

    @property
    def monotone(self) -> bool:
        """Always: L cannot fall on full data: what was found is compared with the old theta."""
        return True

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Every model will do whose L turns out to be exact."""

    def improve(self, call: Call, result: EResult) -> None:
        """Take the steps on theta."""
        with torch.enable_grad(), poutine.trace(param_only=True) as capture:
            try:
                if not call.guide.is_static:
                    raise NoEvaluatorError("Factors depend on other latents' values.")
                start = -theta_objective(call, result)
            except NoEvaluatorError as error:
                raise NoEvaluatorError(
                    f"Expected an exact L for QuasiNewton, which compares its values, but got none. ({error}) "
                    "Use `m_step=Gradient(optim)`."
                ) from error
        nodes = cast("dict[str, Any]", capture.trace.nodes)
        theta = list({site["value"].unconstrained(): None for site in nodes.values()})
        theta = [tensor for tensor in theta if tensor.requires_grad]
        if not (theta and start.requires_grad):
            return
        _Climb(call, result, theta, start).run(self.num_steps, self.history_size)


class _Climb:
    """One maximisation of L in theta, which remembers the best point."""

    def __init__(self, call: Call, result: EResult, theta: list[Tensor], start: Tensor) -> None:
        self.call = call
        self.result = result
        self.theta = theta
        self.start = start.detach()
        self.best = float(self.start)
        self.best_theta = self._copies()
        self._known: tuple[Tensor, list[Tensor]] | None = self._with_grads(start)

    def run(self, num_steps: int, history_size: int) -> None:
        """Climb, and leave the parameters at the best point and their gradients as they were."""
        grads = [tensor.grad for tensor in self.theta]
        optimizer = torch.optim.LBFGS(
            self.theta,
            max_iter=num_steps,
            max_eval=5 * num_steps + 20,
            history_size=history_size,
            tolerance_grad=0.0,
            # Below the rounding of L no line search can tell up from down.
            tolerance_change=torch.finfo(self.start.dtype).eps * max(1.0, abs(self.best)),
            line_search_fn="strong_wolfe",
        )
        try:
            optimizer.step(self._evaluate)
        finally:
            with torch.no_grad():
                for tensor, value, grad in zip(self.theta, self.best_theta, grads, strict=True):
                    tensor.copy_(value)
                    tensor.grad = grad

    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.theta]

    def _evaluate(self) -> Tensor:
        loss, grads = self._loss_and_grads()
        for tensor, grad in zip(self.theta, grads, strict=True):
            tensor.grad = grad
        if float(loss) < self.best:
            self.best, self.best_theta = float(loss), self._copies()
        return loss

    def _loss_and_grads(self) -> tuple[Tensor, list[Tensor]]:
        """-L and its gradient; far above the start, and flat, where the program cannot be evaluated."""
        # The search begins where it was evaluated already.
        known, self._known = self._known, None
        if known is not None:
            return known
        try:
            with torch.enable_grad(), poutine.block():
                loss = -theta_objective(self.call, self.result)
            found = self._with_grads(loss)
        except (NoEvaluatorError, NotFiniteError, LinAlgError):
            pass
        else:
            if all(bool(value.isfinite().all()) for value in (found[0], *found[1])):
                return found
        # The line search interpolates between what it has seen: an infinite loss would lead it to NaN.
        wall = self.start + 1e3 * (1 + self.start.abs())
        return wall, [torch.zeros_like(tensor) for tensor in self.theta]

    def _with_grads(self, loss: Tensor) -> tuple[Tensor, list[Tensor]]:
        grads: Any = torch.autograd.grad(loss, self.theta, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(self.theta, grads, strict=True)]
        return loss.detach(), found
