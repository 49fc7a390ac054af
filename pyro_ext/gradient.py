"""Gradient steps: raise L in q or in theta by an optimizer of Pyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_ext.choose import choose_evaluator
from pyro_ext.evaluators import NoEvaluatorError
from pyro_ext.steps import Call, EResult, EStep, MStep


def theta_objective(call: Call, result: EResult) -> Tensor:
    """L under the q of an E half-step as a function of theta: exact, summed over rows, times N/B, in nats.

    Raises:
        NoEvaluatorError: nothing exact serves this program and its factors.
    """
    with torch.no_grad(), poutine.block():
        params = call.parameters(result)
    evaluator = choose_evaluator(call.program, call.blocks, try_quadratic=call.quadratic, create_graph=True)
    return evaluator.bound(params).sum() * call.scale


def sampled_theta_objective(call: Call, result: EResult) -> Tensor:
    """log p(v, h) at one draw of an E half-step's q as a function of theta: summed over rows, times N/B, in nats."""
    with torch.no_grad(), poutine.block():
        values = result.posterior.sample(1)
    return call.program.log_joint({name: value[0] for name, value in values.items()}).sum() * call.scale


class Gradient(EStep, MStep):
    """Some optimizer steps on L, in q (as E-step) or in theta (as M-step); the other block does not move.

    L is exact where an evaluator serves the program and the factors (quadratic, or enumerable states). Elsewhere it is
    estimated: in q by a Pyro ELBO on the guide, in theta at a draw of the q that the E-step ended with.

    *Stochastic gradient ascent on log p(v)* is the special case of an exact E-step and one gradient M-step: where q is
    the posterior, KL(q || p(h | v)) is 0, and so is its gradient in theta, so that

        grad_theta L(theta, q) = E_{p(h | v)}[grad_theta log p(v, h)] = grad_theta log p(v)      (19.21-19.27).

    On batches of a loader, ``Gradient(SGD({"lr": r}))`` then moves theta by r times the gradient of sum_n log p(v_n)
    over the batch; in a subsampled program, by N/B times that, an unbiased estimate of the gradient over all N rows.

    Args:
        optim: an optimizer from `pyro.optim`; E- and M-step may have different ones.
        num_steps: optimizer steps of one half-step.
        loss: the Pyro ELBO to use in place of the exact L, which runs the guide; None for the exact L where there is
            one, else one draw (in q ``Trace_ELBO()``).
        num_particles: samples of L in the ledger where it is not exact.

    Raises:
        TypeError: optim is no PyroOptim, or loss no ELBO; at the first E-step, point masses on discrete latents.
        ValueError: num_steps below 1.

    Example:
        >>> import torch
        >>> from pyro.optim import Adam
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import BinarySparseCoding
        >>> model = BinarySparseCoding(num_visible=4, num_latents=2)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.01})))
        >>> _ = em.step(torch.randn(10, 4))
    """

    def __init__(self, optim: PyroOptim, num_steps: int = 1, loss: ELBO | None = None, num_particles: int = 10) -> None:
        if not isinstance(optim, PyroOptim):
            raise TypeError(
                f"Expected an optimizer from pyro.optim, but got {type(optim).__module__}.{type(optim).__name__}. "
                'Write pyro.optim.Adam({"lr": 1e-3}), for example.'
            )
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"Expected num_steps of at least 1, but got {num_steps!r}. Use m_step=None to hold theta.")
        if loss is not None and not isinstance(loss, ELBO):
            raise TypeError(f"Expected an ELBO of pyro.infer, but got {type(loss).__name__}. Pass an instance.")
        self.optim = optim
        self.num_steps = num_steps
        self.loss = loss
        self.num_particles = num_particles

    infers_for_tables = False

    @property
    def reads_guide(self) -> bool:
        """Only a Pyro ELBO runs the guide."""
        return self.loss is not None

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Every model and guide with parameters will do."""

    def improve(self, call: Call, result: EResult | None = None, *, keep: bool = True) -> Any:
        """Take the steps: on q when called as an E-step, on theta when given the E-step's result."""
        return self._improve_q(call, keep) if result is None else self._improve_theta(call, result)

    def _improve_q(self, call: Call, keep: bool) -> EResult:
        guide = call.guide
        if keep:
            call.flush()
            points = [b.site.name for b in call.blocks if b.factor.is_point and b.site.kind.is_discrete]
            if points:
                raise TypeError(
                    "Expected factors with a gradient for Gradient, but got point masses on the discrete sites "
                    f"{', '.join(map(repr, points))}. Use FixedPoint() (coordinate-wise MAP), or MeanField."
                )
            for _ in range(self.num_steps):
                self._step(lambda: self._loss_of_q(call))
            if guide.is_table:
                guide.holds_answer = True
        elif guide.is_table and not (guide.is_set_up and guide.owns(call.args, call.kwargs)):
            raise ValueError(
                "Expected an E-step that can infer new data, but got Gradient on the tables of "
                f"{type(guide).__name__}. Use FixedPoint(), or the Amortized guide."
            )
        params = guide.rows_parameters(call.program) if guide.is_static else None
        posterior = guide.posterior(*call.args, **call.kwargs) if params is None else call.posterior(params)
        bound, exact = call.bound(posterior, params, self.num_particles)
        return EResult(bound, exact, "warm", posterior, monotone=False)

    def _improve_theta(self, call: Call, result: EResult) -> None:
        for _ in range(self.num_steps):
            self._step(lambda: self._loss_of_theta(call, result))

    def _step(self, backward: Callable[[], None]) -> None:
        """One optimizer step on the parameters that ``backward`` shows, on no others."""
        store = pyro.get_param_store()
        # Gradients of the other half-step, or of an SVI before, would let momentum drift its parameters.
        for _, tensor in store.named_parameters():
            tensor.grad = None
        with poutine.trace(param_only=True) as capture:
            backward()
        nodes = cast("dict[str, Any]", capture.trace.nodes)
        params = {site["value"].unconstrained(): None for site in nodes.values()}
        moved = [p for p in params if p.grad is not None]
        if moved:
            self.optim(moved)
        for _, tensor in store.named_parameters():
            tensor.grad = None

    def _loss_of_q(self, call: Call) -> None:
        if self.loss is None and call.guide.is_static:
            try:
                evaluator = call.evaluator()
            except NoEvaluatorError:
                pass
            else:
                with torch.enable_grad():
                    params = call.guide.rows_parameters(call.program, detach=False)
                    (-evaluator.bound(params).sum() * call.scale).backward()
                return
        model = poutine.block(call.model, hide_types=["param"])
        self._elbo().loss_and_grads(model, call.guide, *call.args, **call.kwargs)

    def _loss_of_theta(self, call: Call, result: EResult) -> None:
        if self.loss is None and call.guide.is_static:
            try:
                objective = theta_objective(call, result)
            except NoEvaluatorError:
                pass
            else:
                (-objective).backward()
                return
        if self.loss is None:
            objective = sampled_theta_objective(call, result)
            if objective.requires_grad:
                (-objective).backward()
            return
        call.flush()
        guide = poutine.block(call.guide, hide_types=["param"])
        self._elbo().loss_and_grads(call.model, guide, *call.args, **call.kwargs)

    def _elbo(self) -> Any:
        return Trace_ELBO() if self.loss is None else self.loss
