"""Closed-form M-steps: theta from expected sufficient statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_ext.steps import Call, EResult, MStep


class ClosedForm(MStep):
    """theta <- argmax E_q[log p(v, h; theta)], by the model's own ``statistics`` and ``maximize`` (19.2).

    On batches, a step size makes it stepwise EM (Cappe & Moulines, 2009): the statistics per row are averaged,
    s <- (1 - rho_t) s + rho_t s_batch, and theta maximises at the average. Without one, every call
    maximises on its own data alone, which is right for the full data only.

    Args:
        step_size: rho_t in (0, 1] for the t-th call, from t = 1 (where it is taken as 1); such as
            ``lambda t: (t + 2) ** -0.7``. None for no averaging.

    Raises:
        TypeError: at the door, for a model without these two methods.
        ValueError: a step size outside (0, 1].

    Example:
        >>> import torch
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import GaussianMixture
        >>> model = GaussianMixture(num_components=2, num_visible=1)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> _ = em.step(torch.tensor([[0.0], [0.1], [5.0], [5.1]]))
    """

    def __init__(self, step_size: Callable[[int], float] | None = None) -> None:
        if step_size is not None and not callable(step_size):
            raise TypeError(
                f"Expected step_size to be a function of the step, but got {step_size!r}. "
                f"Write `lambda t: {step_size}`."
            )
        self.step_size = step_size
        self.num_calls = 0
        self._average: dict[str, Tensor] = {}

    @property
    def monotone(self) -> bool:
        """Whether L cannot fall: without averaging, on the full data."""
        return self.step_size is None

    def reset(self) -> None:
        """Forget the running average, for another start or other data."""
        self.num_calls = 0
        self._average = {}

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
        found = model.statistics(data, result.posterior)
        if self.step_size is None:
            model.maximize(found)
            return
        average = self._averaged(found, self.step_size)
        model.maximize(average)
        # Kept only now: a refused maximisation leaves the average as it was.
        self._average, self.num_calls = average, self.num_calls + 1

    def _averaged(self, found: Mapping[str, Tensor], step_size: Callable[[int], float]) -> dict[str, Tensor]:
        rows = {name: value / found["count"] for name, value in found.items()}
        if not self._average:
            return rows
        rho = step_size(self.num_calls + 1)
        if not 0 < rho <= 1:
            raise ValueError(
                f"Expected step sizes in (0, 1], but got {rho!r} at step {self.num_calls + 1}. "
                "Use `lambda t: (t + 2) ** -0.7`, for example."
            )
        return {name: self._average[name].lerp(value, rho) for name, value in rows.items()}
