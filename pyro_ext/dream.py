"""Sleep as an E-step: dreams of the model train the guide, and theta stays as it is (19.5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_ext.checks import check_count
from pyro_ext.dreams import HandOver, log_q_of_dreams
from pyro_ext.gradient import Gradient
from pyro_ext.over_states import bound_over_states
from pyro_ext.rows import is_factor, sample_sites
from pyro_ext.steps import Call, EResult, EStep


class Dream(EStep):
    r"""Sleeps: takes optimizer steps in phi on dreams (h', v') of the model, which no gradient enters (19.5.1).

    Every step draws its dreams anew and follows the gradient of

    .. math:: -\frac{N}{M} \sum_{m=1}^{M} \log q(h'_m | v'_m; \phi), \qquad (h'_m, v'_m) \sim p(v, h; \theta)

    with M = `num_dreams` and N the rows of the batch (times N/B in a subsampled program), the scale of the other
    losses. Its expectation is N KL(p(h | v) || q) averaged over v ~ p, and a constant. Theta is left bit-equal.

    With ``m_step=Gradient(optim, num_steps)`` this is wake-sleep in phases as long as one likes, each with an optimizer
    of its own: asleep q draws near the posterior and the gap between L and log p(v) closes; awake L rises while theta
    moves away from what q was trained for, and the gap grows (Deep Learning, 19.5.1; `Gap` measures it). The objective
    of sleep is not L: the first is KL(p || q) on dreams, the second has KL(q || p) on data, so that L may fall in a
    sleep, and no monotony is promised.

    Dreams reach the guide through the very arguments that carry the data. A model of this project dreams `num_dreams`
    rows at once; any other Pyro program is run on the arguments at hand, as often as it takes, for it may read
    covariates there.

    In the ledger L is exact where the states can be summed, else a mean over `num_particles` draws. Where nothing may
    be trained (`EM.infer`, `EM.evaluate_loss`), q is the guide's own.

    Args:
        optim: an optimizer from `pyro.optim`, for the guide.
        num_steps: optimizer steps of one sleep.
        num_dreams: dreams of one optimizer step, in rows; None for as many as the batch has rows.
        num_particles: samples of L in the ledger where it is not exact.
        visible: the argument of a visible site where it cannot be found, ``{"site": "argument"}``.

    Raises:
        TypeError: optim is no PyroOptim; a number is no integer. At the door of `EM`, a guide with tables.
        ValueError: a number below 1. At the step: ``pyro.factor`` in the model, which sampling ignores; points (Delta
            factors) or tables of single latents in the guide; parameters that guide and model share; a visible site
            whose argument is not found. Nothing has changed then.

    Example:
        >>> from pyro.optim import Adam
        >>> from pyro_ext import EM, Gradient
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import SigmoidBeliefNetwork
        >>> model = SigmoidBeliefNetwork([2, 4])
        >>> asleep, awake = Dream(Adam({"lr": 0.02}), num_steps=50, num_dreams=100), Gradient(Adam({"lr": 0.01}), 50)
        >>> em = EM(model, Amortized(model), e_step=asleep, m_step=awake)
        >>> history = em.run(torch.rand(20, 4).round(), max_steps=2, progress=False)
        >>> [(entry.half, entry.parameters, entry.exact) for entry in history.ledger[:2]]
        [('E', 'theta 0, q 1', True), ('M', 'theta 1, q 1', True)]

    Sources: Hinton, Dayan, Frey and Neal, The wake-sleep algorithm, 1995.
    """

    def __init__(
        self,
        optim: PyroOptim,
        num_steps: int = 1,
        num_dreams: int | None = None,
        num_particles: int = 10,
        visible: Mapping[str, str | int] | None = None,
    ) -> None:
        check_count(num_steps, "num_steps")
        if num_dreams is not None:
            check_count(num_dreams, "num_dreams")
        check_count(num_particles, "num_particles")
        self._stepper = Gradient(optim, num_steps)
        self.optim = optim
        self.num_steps = num_steps
        self.num_dreams = num_dreams
        self.num_particles = num_particles
        self._hand_over = HandOver(visible)
        self._last_loss: float | None = None
        self._sampled_model: Callable[..., Any] | None = None

    @property
    def last_loss(self) -> float:
        """Mean of -log q(h' | v') over the dreams of the latest optimizer step, before it, nats per dream.

        Raises:
            RuntimeError: nothing was dreamt yet.
        """
        if self._last_loss is None:
            raise RuntimeError("Expected a sleep before its loss, but there was none. Call `em.step` first.")
        return self._last_loss

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse guides with tables.

        Raises:
            TypeError: as above.
        """
        if getattr(guide, "is_table", False) or not hasattr(guide, "rows_parameters"):
            raise TypeError(
                f"Expected a guide with a network (Amortized) for Dream, but got {type(guide).__name__}. Dreams are "
                "not rows of its data set: use FixedPoint() or Gradient(optim) for a table."
            )

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Sleep, and give L of the q that came of it."""
        if keep:
            self._check(call)
            for _ in range(self.num_steps):
                self._stepper._step(lambda: self._sleep(call))
        result = own_result(call, self.num_particles, try_exact=call.model is not self._sampled_model)
        if not result.exact:
            # To find again at every step that nothing exact serves would take longer than the step.
            self._sampled_model = call.model
        return result

    def _sleep(self, call: Call) -> None:
        rows = call.program.rows
        with torch.enable_grad():
            log_q = log_q_of_dreams(
                call.model, call.guide, call.args, call.kwargs, rows, self._hand_over, self.num_dreams
            )
            loss = -log_q.mean()
            (loss * rows.count * rows.scale).backward()
        _refuse_shared(call)
        self._last_loss = float(loss.detach())

    def _check(self, call: Call) -> None:
        factors = [name for name, site in sample_sites(call.program.trace) if is_factor(site)]
        if factors:
            raise ValueError(
                f"Expected a model that can be sampled for Dream, but got the pyro.factor sites {factors}, which "
                "sampling ignores. Write them as distributions, or use Gradient(optim)."
            )
        points = [block.site.name for block in call.blocks if block.factor.is_point]
        if points:
            raise ValueError(
                f"Expected factors with a density at any dream, but got points on the sites {points}. Give them an "
                "encoder of parameters, or use Refine(Maximize(), optim)."
            )
        tables = tabled_sites(call.guide)
        if tables:
            raise ValueError(
                f"Expected an encoder for every latent, but got tables for {tables}, which stand outside the data's "
                "plates. Dreams would train a table to the prior: make them parameters, or use Gradient(optim)."
            )


def own_result(call: Call, num_particles: int, *, try_exact: bool = True) -> EResult:
    """What an E-step ends with that leaves q at the guide's own: L per row, exact where it can be."""
    guide = call.guide
    params = guide.rows_parameters(call.program) if guide.is_static else None
    posterior = guide.posterior_at(call.program) if params is None else call.posterior(params)
    if params is None and try_exact:
        bound = bound_over_states(call.program, posterior)
        if bound is not None:
            return EResult(bound, True, "warm", posterior, monotone=False)
    bound, exact = call.bound(posterior, params if try_exact else None, num_particles)
    return EResult(bound, exact, "warm", posterior, monotone=False)


def tabled_sites(guide: Any) -> list[str]:
    """The latents of an amortized guide that have a table, for they stand outside the data's plates."""
    held = getattr(getattr(guide, "tables", None), "_pyro_params", {})
    return sorted(held)


def _refuse_shared(call: Call) -> None:
    """Refuse a guide through which dreams would move theta."""
    nodes: dict[str, Any] = dict(call.program.trace.nodes)
    theta: dict[str, Tensor] = {
        name: node["value"].unconstrained() for name, node in nodes.items() if node["type"] == "param"
    }
    shared = [name for name, tensor in theta.items() if tensor.grad is not None]
    if shared:
        for _, tensor in pyro.get_param_store().named_parameters():
            tensor.grad = None
        raise ValueError(
            f"Expected a guide with parameters of its own, but got one that shares {shared} with the model. Sleep "
            "leaves theta as it is: give the guide copies, or use Gradient(optim)."
        )
