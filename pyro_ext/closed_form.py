"""Closed-form M-steps: theta from expected sufficient statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pyro_ext.steps import Call, EResult, MStep


class ClosedForm(MStep):
    """theta <- argmax E_q[log p(v, h; theta)], by the model's own ``statistics`` and ``maximize`` (19.2).

    Raises:
        TypeError: at the door, for a model without these two methods.

    Example:
        >>> import torch
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import GaussianMixture
        >>> model = GaussianMixture(num_components=2, num_visible=1)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> _ = em.step(torch.tensor([[0.0], [0.1], [5.0], [5.1]]))
    """

    monotone = True

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse models without a closed form."""
        missing = [name for name in ("statistics", "maximize") if not callable(getattr(model, name, None))]
        if missing:
            label = getattr(model, "__name__", type(model).__name__)
            raise TypeError(
                f"Expected a model with `statistics` and `maximize` for ClosedForm, but got {label} without "
                f"{' and '.join(missing)}. Use `Gradient(optim)` for its M-step."
            )

    def improve(self, call: Call, result: EResult) -> None:
        """Collect the statistics under q and maximise."""
        forward = getattr(call.model, "forward", call.model)
        data = inspect.signature(forward).bind(*call.args, **call.kwargs).arguments
        model: Any = call.model
        model.maximize(model.statistics(data, result.posterior))
