"""What all models share: a name of their own, checks at the door, dreams, and parameters written in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_ext.checks import check_binary, check_count, check_finite, check_rows
from pyro_ext.naming import claim_name
from pyro_ext.tracing import holds

from .unread import Unread


def unconstrained_parameter(module: PyroModule, name: str) -> Tensor:
    """The unconstrained tensor that the module's next call will read.

    It is the module's own one, or that of Pyro's parameter store where the two differ (after a `scope`, or after
    loading): the store wins in a call, so writing to the module's tensor would be lost. Nothing is registered.

    Raises:
        ValueError: the module has no parameter of that name.
    """
    if name not in module._pyro_params:
        raise ValueError(
            f"Expected a PyroParam of {type(module).__name__}, but got {name!r}. "
            f"Take one of {', '.join(module._pyro_params) or 'none'}."
        )
    full_name = f"{module._pyro_name}.{name}" if module._pyro_name else name
    store: Any = pyro.get_param_store()
    if full_name in store and store._params[full_name] is not module._parameters.get(f"{name}_unconstrained"):
        # A read inside the module's context is Pyro's own way to fetch the store's tensor.
        with pyro.poutine.block(), module._pyro_context:
            getattr(module, name)
    return getattr(module, f"{name}_unconstrained")


def read_parameter(module: PyroModule, name: str) -> Tensor:
    """A copy of the constrained value of a parameter, as the next call of the module will see it."""
    value = unconstrained_parameter(module, name).detach().clone()
    constraint, _ = module._pyro_params[name]
    return transform_to(constraint)(value)


def assign_parameter(module: PyroModule, name: str, value: Tensor) -> None:
    """Write one value in place; see `assign_parameters`."""
    assign_parameters(module, {name: value})


def assign_parameters(module: PyroModule, values: Mapping[str, Tensor]) -> None:
    """Write constrained values into the unconstrained tensors of a module, in place.

    u <- T^-1(value) for the constraint's transform T. The tensors stay the same objects, so the parameter store and
    optimizers go on with them; an optimizer's own state (momentum) is not touched. All values are checked before the
    first is written. Works before the module's first call.

    Args:
        module: the module that owns the parameters.
        values: constrained value of each parameter, by name, in the parameter's shape.

    Raises:
        ValueError: an unknown name, another shape, or a value that is not finite or violates the constraint; nothing
            has been written then.

    Example:
        >>> from pyro_ext.models import BinarySparseCoding
        >>> model = BinarySparseCoding(num_visible=2, num_latents=1)
        >>> assign_parameter(model, "beta", torch.tensor([4.0, 1.0]))
        >>> model.beta.tolist()
        [4.0, 1.0]
    """
    writes: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, value in values.items():
            target = unconstrained_parameter(module, name)
            constraint, _ = module._pyro_params[name]
            shape = transform_to(constraint)(target).shape
            if value.shape != shape:
                raise ValueError(
                    f"Expected {name} of shape {tuple(shape)}, but got {tuple(value.shape)}. Pass one value an entry."
                )
            source = transform_to(constraint).inv(value)
            if not (constraint.check(value).all() and source.isfinite().all()):
                raise ValueError(
                    f"Expected {name} to be finite and inside its constraint {constraint}, but got {value}. "
                    "Nothing was written; look for NaN or empty groups in what the value was computed from."
                )
            writes.append((target, source))
        for target, source in writes:
            target.copy_(source)


class Model(PyroModule):
    """Base of the models: a Pyro program p(v, h) over rows, conditioned on v or dreaming.

    A subclass declares its parameters by `declare` and writes `forward` inside ``self.data_plate(v, size)``; models
    with a closed-form M-step add `statistics` and `maximize`.

    Args:
        num_visible: number D of visible variables in a row.
        name: prefix of the parameters in Pyro's store; by default the class name, numbered when it is taken.

    Raises:
        ValueError: another live module holds the name, or `num_visible` is below one.
    """

    visible_support: ClassVar[constraints.Constraint] = constraints.real
    """Where the visible variables live: `constraints.real` or `constraints.boolean` (0 and 1)."""

    def __init__(self, num_visible: int, *, name: str | None = None) -> None:
        check_count(num_visible, "num_visible")
        super().__init__()
        self._pyro_name = claim_name(self, name)
        self.num_visible = num_visible

    def forward(self, v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: condition on `v`, shape (N, D), or dream `size` rows. Returns v, shape (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def initialize(self, v: Tensor) -> None:
        """Draw a new start suited to the data v, shape (N, D), in place, from torch's global generator."""
        raise NotImplementedError(f"{type(self).__name__} does not define initialize")

    def declare(self, name: str, value: Tensor, constraint: constraints.Constraint = constraints.real) -> None:
        """Make a parameter of this model: a `PyroParam` of the given first (constrained) value."""
        setattr(self, name, PyroParam(value, constraint))

    @property
    def takes_mask(self) -> bool:
        """Whether the program can hide entries of v: `forward` has the argument ``mask``."""
        return "mask" in inspect.signature(self.forward).parameters

    @property
    def is_untouched(self) -> bool:
        """Whether all parameters still hold the values they were constructed with.

        `EM.run` starts such a model by `initialize`. In-place writes of any kind (initialize, optimizers, loading)
        show in the tensors' version counters.
        """
        store = pyro.get_param_store()
        prefix = f"{self._pyro_name}."
        held = [tensor for name, tensor in store.named_parameters() if name.startswith(prefix)]
        return all(tensor._version == 0 for tensor in (*self.parameters(), *held))

    def data_plate(self, v: Tensor | None, size: int | None) -> pyro.plate:
        """The plate over rows, after the checks that every call can afford (arguments and width, no values).

        Raises:
            ValueError: not exactly one of v and size, or v of another width.
        """
        return pyro.plate("data", self._num_rows(v, size), dim=-1)

    def hide(self, fn: TorchDistribution, v: Tensor | None, mask: Tensor | None) -> TorchDistribution:
        """The distribution of v's entries, batch (..., N, D), of which those that the mask hides count nothing.

        Raises:
            ValueError: see `check_mask_shape`.
        """
        if mask is None:
            return fn
        self.check_mask_shape(v, mask)
        return Unread(fn, mask)

    def check_mask_shape(self, v: Tensor | None, mask: Tensor) -> None:
        """The check of a mask that every call can afford; see `check_mask`.

        Raises:
            ValueError: a mask of another shape than v, or without v.
        """
        if v is None or mask.shape != v.shape[-mask.dim() :] or mask.dim() < 2:
            raise ValueError(
                f"Expected mask of shape {'(N, D)' if v is None else tuple(v.shape)}, but got "
                f"{tuple(mask.shape)}. Say for each entry of v whether it is observed."
            )

    def _num_rows(self, v: Tensor | None, size: int | None) -> int:
        if v is not None and size is None:
            # Leading dimensions (particles of dreams) are left to Pyro's own check of shapes.
            if v.dim() < 2 or v.shape[-1] != self.num_visible:
                check_rows(v, self.num_visible)
            return v.shape[-2]
        if v is None and size is not None:
            check_count(size, "size")
            return size
        raise ValueError(
            f"Expected exactly one of v and size, but got {'neither' if v is None else 'both'}. "
            "Pass v to condition on data, or size=n to dream n rows."
        )

    def dream(self, n: int) -> Tensor:
        """Sample from the model, v ~ p(v), whatever handlers surround the call.

        Args:
            n: number of rows.

        Returns:
            Tensor of shape (n, D), without gradient.

        Raises:
            ValueError: n below one.
        """
        check_count(n, "n")
        with torch.no_grad(), pyro.poutine.block():
            return self(size=n)

    def check_mask(self, v: Tensor, mask: Any) -> None:
        """Refuse a mask that does not tell, entry by entry of v, what is observed (True) and what is not.

        Args:
            v: the data, any shape ``(N, ...)``.
            mask: boolean, of v's shape.

        Raises:
            TypeError: the mask is no boolean tensor.
            ValueError: it has another shape or device than v, or hides a whole row.

        Example:
            >>> from pyro_ext.models import FactorAnalysis
            >>> model = FactorAnalysis(num_visible=2, num_factors=1)
            >>> model.check_mask(torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.bool))
            Traceback (most recent call last):
            ValueError: Expected mask of shape (3, 2), but got (3, 1). Say for each entry of v whether it is observed.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Expected mask to be a boolean tensor, but got {kind}. Pass `~v.isnan()`, for example.")
        if mask.shape != v.shape:
            raise ValueError(
                f"Expected mask of shape {tuple(v.shape)}, but got {tuple(mask.shape)}. "
                "Say for each entry of v whether it is observed."
            )
        if mask.device != v.device:
            raise ValueError(
                f"Expected mask on device {v.device}, that of v, but got {mask.device}. "
                f"Move it, `mask.to({str(v.device)!r})`."
            )
        seen = mask.flatten(1).any(1)
        if not holds(seen.all()):
            raise ValueError(
                f"Expected at least one observed entry in every row, but got none in row {int((~seen).nonzero()[0])}. "
                "Leave the row out."
            )

    def check_data(self, v: Any = None, *, mask: Any = None, size: int | None = None) -> None:
        """Refuse bad data; drivers call this once at the door, with the arguments of `forward`.

        Entries that the mask hides are not looked at.

        Raises:
            TypeError: v is no tensor, or not of the parameters' dtype; a mask for a model that takes none, or that is
                not boolean.
            ValueError: not exactly one of v and size; v of another shape or device, empty, with NaN or infinite
                values, or with values other than 0 and 1 for a binary model; a mask with `size`; a bad mask (see
                `check_mask`).
        """
        if mask is not None and not self.takes_mask:
            raise TypeError(
                f"Expected no mask for {type(self).__name__}, but got one. Leave rows with missing entries out."
            )
        if v is None or size is not None:
            self._num_rows(v, size)
            if mask is not None:
                raise ValueError("Expected a mask only with v, but got one with size. Dream whole rows.")
            return
        check_rows(v, self.num_visible, like=next(self.parameters(), None))
        if mask is not None:
            self.check_mask(v, mask)
            v = torch.where(mask, v, 0)
        check_finite(v)
        if self.visible_support is constraints.boolean:
            check_binary(v)
