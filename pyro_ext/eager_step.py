"""Pyro's own step beside the compiled one, from the same state: what must agree."""

from __future__ import annotations

import math
import random
from typing import Any, cast

import numpy as np
import torch
from pyro.infer.util import torch_item
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of the loss."""

_STEP_TOLERANCE = {torch.float64: 1e-4, torch.float32: 0.05}
"""Largest difference of a parameter's moves, relative to the move, both weighed by the gradient."""

_REMEDY = (
    "The program takes a Python value that changes between steps, or random numbers from outside torch: pass it as a "
    "tensor argument, or use pyro.infer.SVI."
)


def _host_generators() -> tuple[Any, ...]:
    state: Any = np.random.get_state()  # noqa: NPY002  it is the global one that programs use
    name, keys, *rest = state
    return random.getstate(), name, keys.tobytes(), *rest


class EagerStep:
    """Pyro's own step, taken, with what it did to the parameters.

    Args:
        svi: the driver: its objective, programs and optimizer.
        values: unconstrained tensors of the parameters, by name.
        args: arguments of the step.
        kwargs: keyword arguments of the step.
    """

    def __init__(self, svi: Any, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before = {name: value.detach().clone() for name, value in values.items()}
        generators = _host_generators()
        loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        if _host_generators() != generators:
            raise RuntimeError(
                "Expected random numbers of torch only, but the program drew from Python's or NumPy's generator, whose "
                "draws a graph holds for good. Draw by torch.rand or pyro.sample, or use pyro.infer.SVI."
            )
        parts = cast("tuple[Any, ...]", loss) if isinstance(loss, tuple) else (loss,)
        self.losses = [float(cast("float", torch_item(part))) for part in parts]
        self.grads = {name: value.grad.clone() for name, value in values.items() if value.grad is not None}
        svi.optim(cast("Any", set(values.values())))
        self.moves = {name: value.detach() - self.before[name] for name, value in values.items()}

    def compare(self, loss: Any, values: dict[str, Tensor]) -> None:
        """Compare the graph's step from the same state: its loss, and its moves as far as the loss feels them.

        Where a gradient is rounding noise, optimizers that divide by its size move by noise. Moves are therefore
        weighed by the gradient, and what changes the loss by less than a thousandth of the step's effect passes.

        Raises:
            RuntimeError: naming what differs.
        """
        dtype = next((value.dtype for value in values.values()), torch.float32)
        for got, want in zip(
            cast("tuple[float, ...]", loss) if isinstance(loss, tuple) else (loss,), self.losses, strict=True
        ):
            is_same = math.isclose(got, want, rel_tol=_TOLERANCE.get(dtype, 1e-3), abs_tol=1e-6)
            if not is_same and not (math.isnan(got) and math.isnan(want)):
                raise RuntimeError(
                    f"Expected the compiled step to give the loss {want:.10g} of Pyro's own step, but got {got:.10g}. "
                    f"{_REMEDY}"
                )
        effects = {name: float((grad * self.moves[name]).abs().sum()) for name, grad in self.grads.items()}
        total = sum(effects.values())
        for name, grad in self.grads.items():
            error = values[name].detach() - self.before[name] - self.moves[name]
            difference = float((grad * error).abs().sum())
            if difference > _STEP_TOLERANCE.get(dtype, 0.05) * effects[name] and difference > 1e-3 * total:
                raise RuntimeError(
                    f"Expected the compiled step to move {name!r} as Pyro's own step does, by {effects[name]:.4g} nats "
                    f"to first order, but the moves differ by {difference:.4g}. {_REMEDY}"
                )
