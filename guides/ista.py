"""ISTA on sparse codes, which networks unroll, and what these read of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor


@dataclass(frozen=True)
class Ista:
    """Iterative shrinkage on (19.16), for Gaussian data around sums of atoms, v = bias + W h + noise.

    Attributes:
        W: atoms in the columns, shape ``(D, F)``.
        rate: nats that a unit of each |h_i| costs, shape ``(F,)``.
        beta: precisions of the noise, shape ``(D,)``.
        bias: the mean of v at h = 0, shape ``(D,)``.
    """

    W: Tensor
    rate: Tensor
    beta: Tensor
    bias: Tensor

    @classmethod
    def of(cls, W: Any, rate: Any, beta: Any = 1.0, bias: Any = None) -> Ista:
        """Check the four and give them their full shapes; beta and rate may be single numbers, bias None for 0.

        Raises:
            TypeError: W is no floating tensor.
            ValueError: W is no finite matrix or is 0; a rate or a beta that is not positive; a bias that is not finite;
                shapes that do not fit.
        """
        check_matrix(W)
        D, F = W.shape
        bias = torch.zeros_like(W[:, 0]) if bias is None else bias
        W = W.detach()
        return cls(W, positive(rate, F, W, "rate"), positive(beta, D, W, "beta"), vector(bias, D, W, "bias"))

    @classmethod
    def from_model(cls, model: Any) -> Ista:
        """The iterations for a model with the attributes W, rate, beta and bias, as they are now.

        Raises:
            TypeError: an attribute is missing.
            ValueError: see `of`.
        """
        return cls.of(**read_attributes(model, "W", "rate", "beta", "bias"))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """A = W' beta / L ``(F, D)``, S = I - W' beta W / L ``(F, F)`` and theta = rate / L ``(F,)``.

        L is the largest eigenvalue of W' beta W. With these, h <- shrink(A (v - bias) + S h, theta) is one iteration
        of ISTA on -log p(v, h), with the step 1 / L that never raises it (Daubechies et al., 2004).
        """
        weighted = self.W.mT * self.beta
        gram = weighted @ self.W
        largest = torch.linalg.eigvalsh(gram)[-1] if bool(gram.isfinite().all()) else gram.new_tensor(torch.inf)
        theta = self.rate / largest
        if not bool(largest.isfinite() & theta.isfinite().all() & (theta > 0).all()):
            raise ValueError(
                f"Expected W' beta W with a largest eigenvalue that {gram.dtype} can tell from 0, but got "
                f"{float(largest):.3g}. Scale W, or use float64."
            )
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return (weighted / largest).contiguous(), eye - gram / largest, theta

    @classmethod
    def random(cls, num_visible: int, num_latents: int) -> Ista:
        """Atoms of length 1 in random directions, with a rate of 0.1 and no bias."""
        W = torch.randn(num_visible, num_latents)
        return cls.of(W / W.norm(dim=0), 0.1)


def is_nonnegative(model: Any, given: bool | None) -> bool:
    """What was asked for, else whether the model's ``prior`` says that h >= 0 by an attribute ``nonnegative``."""
    return bool(getattr(getattr(model, "prior", None), "nonnegative", False) if given is None else given)


def shrink(x: Tensor, threshold: Tensor, *, nonnegative: bool = False) -> Tensor:
    """sign(x) max(|x| - threshold, 0), or max(x - threshold, 0) where only h >= 0 is allowed; exact zeros.

    Example:
        >>> shrink(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
        tensor([-2.,  0.,  1.])
    """
    return (x - threshold).relu() if nonnegative else x - x.clamp(-threshold, threshold)


def read_attributes(model: Any, *names: str) -> Mapping[str, Any]:
    """Attributes of a model without their gradients, as its next call will read them.

    Raises:
        TypeError: one is missing.
    """
    missing = [name for name in names if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"Expected a model with the attributes {', '.join(names)}, but got {type(model).__name__} without "
            f"{missing[0]!r}. Build the network from the tensors themselves."
        )
    prefix = f"{getattr(model, '_pyro_name', '')}."
    context = getattr(model, "_pyro_context", None)
    with torch.no_grad(), poutine.block():
        # Pyro's store wins over a module's own tensors, after a load for example.
        if context is None or not any(name.startswith(prefix) for name in pyro.get_param_store().keys()):
            found = {name: getattr(model, name) for name in names}
        else:
            with context:
                found = {name: getattr(model, name) for name in names}
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}


def check_matrix(W: Any) -> None:
    """Refuse anything but a finite floating matrix that is not 0.

    Raises:
        TypeError: no floating tensor.
        ValueError: another number of dimensions, no entries, values that are not finite, or zeros alone.
    """
    if not isinstance(W, Tensor) or not W.is_floating_point():
        got = W.dtype if isinstance(W, Tensor) else type(W).__name__
        raise TypeError(f"Expected W to be a floating tensor, but got {got}. Pass the dictionary, shape (D, F).")
    if W.dim() != 2 or W.numel() == 0:
        raise ValueError(f"Expected W of shape (D, F), but got {tuple(W.shape)}. Put one atom in each column.")
    if not W.isfinite().all():
        raise ValueError("Expected finite values in W, but got NaN or infinite ones. Look where they come from.")
    if not W.any():
        raise ValueError("Expected a dictionary W with entries other than 0, but got zeros alone. Initialise it first.")


def vector(value: Any, size: int, like: Tensor, name: str) -> Tensor:
    """A finite vector from a number or a vector, in the dtype and on the device of another tensor.

    Raises:
        ValueError: another shape than () or (size,), or values that are not finite.
    """
    found = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if found.shape not in (torch.Size(()), torch.Size((size,))):
        raise ValueError(f"Expected {name} of shape () or ({size},), but got {tuple(found.shape)}. It belongs to W.")
    if not found.isfinite().all():
        raise ValueError(f"Expected finite values in {name}, but got NaN or infinite ones. Look where they come from.")
    return found.expand(size).clone()


def positive(value: Any, size: int, like: Tensor, name: str) -> Tensor:
    """As `vector`, and positive.

    Raises:
        ValueError: see `vector`; or a value that is not above 0.
    """
    found = vector(value, size, like, name)
    if not (found > 0).all():
        raise ValueError(f"Expected {name} > 0, but got {found.min().item():.3g}. Pass 1.0, say.")
    return found


def rows_of(v: Tensor, num_visible: int) -> Tensor:
    """The rows ``(R, D)`` of inputs ``(..., D)``.

    Raises:
        ValueError: another width.
    """
    if v.shape[-1:] != (num_visible,):
        raise ValueError(
            f"Expected inputs of shape (..., {num_visible}), but got {tuple(v.shape)}. "
            f"Build the network with num_visible={v.shape[-1] if v.dim() else 1}."
        )
    return v.reshape(-1, num_visible)
