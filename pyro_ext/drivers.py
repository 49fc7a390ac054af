"""What a training loop asks of a driver (SVI, EM, CompiledSVI), and how it finds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, Protocol

from pyro import infer
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from pyro_ext.snapshot import Part, modules_of

# Only these very classes: a subclass may return another number.
_ELBOS = (
    infer.Trace_ELBO,
    infer.TraceEnum_ELBO,
    infer.TraceGraph_ELBO,
    infer.TraceMeanField_ELBO,
    infer.JitTrace_ELBO,
    infer.JitTraceEnum_ELBO,
    infer.JitTraceGraph_ELBO,
    infer.JitTraceMeanField_ELBO,
)


class Driver(Protocol):
    """What `fit` needs: ``step``, and ``evaluate_loss`` where held-out data are given.

    Both take a batch's arguments and return the loss in nats, summed over the batch: a number, a tensor of
    one element, or a tuple whose first element is one (Pyro's ReweightedWakeSleep returns its theta loss
    first). A driver may also have

    - ``num_rows(*args, **kwargs) -> int``, where its model cannot simply be run to count the rows;
    - ``epoch() -> context manager``, entered for each pass over the loader: `EM` gathers statistics in it, and moves
      theta when it is left without an error;
    - ``guards_non_finite = True``: when its step returns a non-finite loss it has itself restored the
      state before, and `fit` takes no snapshot at each step;
    - ``parts``: the modules and optimizers that it changes besides its ``model``, ``guide`` and ``optim``;
    - ``loss_label``, such as ``"-L"``, and ``last_sleep_loss``, in nats on the scale of the loss (the mean
      over dreams times the number of rows; None where there was no sleep phase). Both are also looked
      for on the objective, the owner of the bound method ``loss``.
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step on a batch and return its loss."""
        ...


def parts_of(driver: Any) -> tuple[Part, ...]:
    """The modules and optimizers that a driver changes.

    Example:
        >>> import torch
        >>> class Linear:
        ...     model = torch.nn.Linear(2, 1)
        ...     guide = model.forward
        >>> parts_of(Linear())
        (Linear(in_features=2, out_features=1, bias=True),)
    """
    modules = modules_of(getattr(driver, "model", None), getattr(driver, "guide", None))
    optim = getattr(driver, "optim", None)
    optims = (optim,) if isinstance(optim, PyroOptim | Optimizer) else ()
    return tuple({id(part): part for part in (*modules, *optims, *getattr(driver, "parts", ()))}.values())


def epoch_of(driver: Any) -> AbstractContextManager[Any]:
    """The driver's frame around one pass over a loader; an empty one where it has none."""
    epoch: Any = getattr(driver, "epoch", None)
    frame: Any = epoch() if callable(epoch) else nullcontext()
    return frame


def objective_of(driver: Any) -> Any:
    """The object whose bound method ``loss`` the driver calls, such as a `Trace_ELBO`; None without one."""
    return getattr(getattr(driver, "loss", None), "__self__", None)


def loss_label_of(driver: Any) -> str:
    """What the driver's losses are: its own or its objective's label, ``-L`` for Pyro's ELBOs, else ``loss``."""
    objective = objective_of(driver)
    for holder in (driver, objective):
        label = getattr(holder, "loss_label", None)
        if label is not None:
            return str(label)
    return "-L" if type(objective) in _ELBOS else "loss"


def sleep_loss_of(driver: Any) -> float | None:
    """The loss of the last sleep phase, on the scale of the loss; NaN when there was none, None if there never is."""
    for holder in (driver, objective_of(driver)):
        if hasattr(holder, "last_sleep_loss"):
            loss = holder.last_sleep_loss
            return float("nan") if loss is None else float(loss)
    return None


def number(loss: Any, method: str) -> float:
    """Read a loss, as a driver's method returns it, as one float.

    Raises:
        TypeError: it is neither a number, nor a tensor of one element, nor a tuple that starts with one.

    Example:
        >>> number((3.0, 4.0), "step")
        3.0
    """
    first = loss[0] if isinstance(loss, tuple) and loss else loss
    if isinstance(first, Real) or (isinstance(first, Tensor) and first.numel() == 1):
        return float(first)
    raise TypeError(
        f"Expected `{method}` to return the loss, a number or a tuple that starts with one, "
        f"but got {type(loss).__name__}. Return -L in nats, summed over the batch."
    )
