"""Closed-form M-steps: theta from expected statistics, of all data at once, of an epoch, or averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_ext.checks import check_statistics
from pyro_ext.snapshot import modules_of, unchanged_on_error
from pyro_ext.steps import Call, EResult, MStep


class ClosedForm(MStep):
    r"""theta <- argmax E_q[log p(v, h)], by the model's own ``statistics`` and ``maximize`` (19.2).

    Statistics s(v, q) are sums over rows, so that they add up over batches. What theta maximises at is

    - without a step size, the sum over *all the data*: of the call in `EM.step` and `EM.run`, and of the epoch in
      `fit(em, loader)` and `EM.epoch`, where each batch only adds its statistics and one M-step ends the epoch.
      The data are never held, and where one sweep of the E-step is exact this is EM on all of them, digit by digit;
    - with a step size, a running average per row after every batch: stepwise EM (Cappe & Moulines, 2009),

      .. math:: \bar s \leftarrow (1 - \gamma)\, \bar s + \gamma\, s(v, q) / B, \qquad
          1 - \gamma = (1 - \rho_t)^{B / B_{max}}

      with B the rows of the batch and B_max those of the largest so far: a last, smaller batch of an epoch moves theta
      by its share, and gamma = rho_t for batches of one size.

    The rows of a subsampled program are counted as they are: N/B multiplies losses and gradients, and cancels here.

    Args:
        step_size: rho_t in (0, 1] for the t-th call, from t = 1 (where it is taken as 1); such as
            ``lambda t: (t + 2) ** -0.7``. None for no averaging.

    Raises:
        TypeError: at the door, for a model without these two methods.
        ValueError: a step size outside (0, 1], or statistics of a batch that are not finite.

    Example:
        >>> from pyro_ext import EM, FixedPoint, fit
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import GaussianMixture
        >>> model = GaussianMixture(num_components=2, num_visible=1)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> batches = [torch.tensor([[0.0], [0.1]]), torch.tensor([[5.0], [5.1], [5.2]])]
        >>> fit(em, batches, num_epochs=50, progress=False).status
        <Status.MAX_STEPS: 'max_steps'>
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
        self._largest = 0.0
        self._gathered: _Sum | None = None

    @property
    def monotone(self) -> bool:
        """Whether L cannot fall: without averaging, on the full data."""
        return self.step_size is None

    @property
    def reads_guide(self) -> bool:
        """The statistics are those of the E-step's posterior."""
        return False

    def reset(self) -> None:
        """Forget the running average, for another start or other data.

        Raises:
            RuntimeError: inside an epoch, whose statistics would be lost.
        """
        if self._gathered is not None:
            raise RuntimeError(
                "Expected a new start outside of `EM.epoch()`, but got one while its batches are gathered. "
                "Call `EM.run` after the epoch."
            )
        self.num_calls = 0
        self._average, self._largest = {}, 0.0

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse models without a closed form."""
        missing = [name for name in ("statistics", "maximize") if not callable(getattr(model, name, None))]
        if missing:
            label = getattr(model, "__name__", type(model).__name__)
            raise TypeError(
                f"Expected a model with `statistics` and `maximize` for ClosedForm, but got {label} without "
                f"{' and '.join(missing)}. Use `Gradient(optim)` for its M-step."
            )

    @contextmanager
    def epoch(self, model: Callable[..., Any]) -> Generator[None, None, None]:
        """Gather the statistics of the batches in the block, and maximise at their sum where it ends.

        When the block raises, the statistics are dropped and theta stays. With a step size, nothing is gathered.

        Raises:
            RuntimeError: one epoch inside another.
        """
        if self.step_size is not None:
            yield
            return
        if self._gathered is not None:
            raise RuntimeError("Expected one epoch at a time, but got one inside another. Leave the first one before.")
        gathered = self._gathered = _Sum()
        try:
            yield
            if gathered.is_empty:
                return
            with unchanged_on_error(*modules_of(model), rng=False):
                any_model: Any = model
                any_model.maximize(gathered.total)
        finally:
            self._gathered = None

    def improve(self, call: Call, result: EResult) -> None:
        """Collect the statistics under q and maximise, at once or at the end of the epoch."""
        model: Any = call.model
        found = call.statistics(result)
        if self._gathered is not None:
            check_statistics(found, *found)
            self._gathered.add(found)
        elif self.step_size is None:
            model.maximize(found)
        else:
            check_statistics(found, *found)
            average = self._averaged(found, self.step_size)
            model.maximize(average)
            # Kept only now: a refused maximisation leaves the average as it was.
            self._average, self.num_calls = average, self.num_calls + 1
            self._largest = max(self._largest, float(found["count"]))

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
        count = float(found["count"])
        weight = 1 - (1 - rho) ** (count / max(count, self._largest))
        return {name: self._average[name].lerp(value, weight) for name, value in rows.items()}


class _Sum:
    """Statistics added up batch by batch, in double precision: an epoch may have more rows than float32 can count."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def is_empty(self) -> bool:
        return not self._sums

    def add(self, found: Mapping[str, Tensor]) -> None:
        if not self._sums:
            self._dtypes = {name: value.dtype for name, value in found.items()}
        # A view into a batch would keep the batch.
        new = {name: value.to(torch.float64, copy=True) for name, value in found.items()}
        self._sums = {name: value + self._sums[name] if self._sums else value for name, value in new.items()}

    @property
    def total(self) -> dict[str, Tensor]:
        return {name: value.to(self._dtypes[name]) for name, value in self._sums.items()}
