"""Optimizer updates as tensor code on the optimizers' own state."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer


class GraphUpdate(ABC):
    """What one class of torch optimizer does at a step, for a graph.

    Numbers that change from step to step (learning rate, bias corrections) come in as `scalars`; all others are
    constants of the graph. The state tensors are the optimizer's own and are written in place, so that the
    optimizer can go on eagerly at any time.
    """

    settings: tuple[str, ...]
    """The settings of a parameter group that the update depends on, the learning rate first."""

    state_names: tuple[str, ...]
    """The state tensors that the graph writes."""

    def serves(self, group: dict[str, Any]) -> bool:
        """Whether all that a parameter group asks for is in the graph."""
        return isinstance(group["lr"], float | int)

    @abstractmethod
    def scalars(self, settings: tuple[Any, ...], step: int) -> tuple[float, ...]:
        """The numbers of the `step`-th step, counted from 1."""

    @abstractmethod
    def update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], s: Tensor) -> None:
        """Move a parameter and its state in place.

        Args:
            value: the parameter, unconstrained.
            grad: its gradient; may be written to.
            state: the tensors of `state_names`.
            group: the settings, constants of the graph.
            s: the `scalars`, shape (n,), float64.
        """

    def advance(self, group: dict[str, Any]) -> None:  # noqa: B027  most leave them alone
        """What a step does to the settings themselves."""


class _Adam(GraphUpdate):
    """torch's Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019), without AMSGrad."""

    settings = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
    state_names = ("exp_avg", "exp_avg_sq")

    def serves(self, group: dict[str, Any]) -> bool:
        return super().serves(group) and not (group["amsgrad"] or group.get("capturable") or group["differentiable"])

    def scalars(self, settings: tuple[Any, ...], step: int) -> tuple[float, ...]:
        lr, (beta1, beta2) = settings[:2]
        return lr / (1 - beta1**step), math.sqrt(1 - beta2**step), 1 - lr * settings[3]

    def update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], s: Tensor) -> None:
        beta1, beta2 = group["betas"]
        grad = -grad if group["maximize"] else grad
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            value.mul_(s[2])
        elif group["weight_decay"]:
            grad = grad.add(value, alpha=group["weight_decay"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.sub_(s[0] * (mean / (square.sqrt() / s[1]).add_(group["eps"])))


class _ClippedAdam(GraphUpdate):
    """Pyro's ClippedAdam: gradients clamped element by element, the learning rate decayed at each step."""

    settings = ("lr", "betas", "eps", "weight_decay", "clip_norm", "centered_variance", "lrd")
    state_names = ("exp_avg", "exp_avg_sq")

    def scalars(self, settings: tuple[Any, ...], step: int) -> tuple[float, ...]:
        lr, (beta1, beta2) = settings[:2]
        return (lr * settings[-1] * math.sqrt(1 - beta2**step) / (1 - beta1**step),)

    def update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], s: Tensor) -> None:
        beta1, beta2 = group["betas"]
        grad = grad.clamp(-group["clip_norm"], group["clip_norm"])
        if group["weight_decay"]:
            grad = grad.add(value, alpha=group["weight_decay"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        spread = grad - mean if group["centered_variance"] else grad
        square.mul_(beta2).addcmul_(spread, spread, value=1 - beta2)
        value.sub_(s[0] * (mean / square.sqrt().add_(group["eps"])))

    def advance(self, group: dict[str, Any]) -> None:
        group["lr"] *= group["lrd"]


class _SGD(GraphUpdate):
    """torch's SGD, with momentum, dampening, Nesterov's momentum and weight decay."""

    settings = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    state_names = ("momentum_buffer",)

    def serves(self, group: dict[str, Any]) -> bool:
        return super().serves(group) and not group["differentiable"]

    def scalars(self, settings: tuple[Any, ...], step: int) -> tuple[float, ...]:
        return (float(settings[0]),)

    def update(self, value: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], s: Tensor) -> None:
        grad = -grad if group["maximize"] else grad
        if group["weight_decay"]:
            grad = grad.add(value, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = state["momentum_buffer"]
            buffer.mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
            grad = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        value.sub_(s[0] * grad)


_UPDATES: dict[type[Optimizer], GraphUpdate] = {
    Adam: _Adam(),
    AdamW: _Adam(),
    ClippedAdam: _ClippedAdam(),
    SGD: _SGD(),
}


@dataclass
class Member:
    """One parameter in the graph's update.

    Attributes:
        name: of the parameter in Pyro's store.
        value: its unconstrained tensor.
        optimizer: the torch optimizer that PyroOptim made for it.
        optim: that PyroOptim.
        held: what the PyroOptim holds for the parameter: the optimizer, or a schedule around it.
    """

    name: str
    value: Tensor
    optimizer: Optimizer
    optim: PyroOptim
    held: Any

    def is_held(self) -> bool:
        """Whether the PyroOptim still holds the optimizer."""
        return self.optim.optim_objs.get(self.value) is self.held

    @property
    def group(self) -> dict[str, Any]:
        """Its settings."""
        return self.optimizer.param_groups[0]

    @property
    def state(self) -> dict[str, Any]:
        """Its state."""
        return self.optimizer.state[self.value]

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return int(self.state.get("step", 0))


@dataclass
class GraphGroup:
    """Parameters with one update, the same settings and the same number of steps behind them.

    Attributes:
        update: the update.
        members: the parameters.
        settings: what all members' groups must be set to at the next step.
    """

    update: GraphUpdate
    members: list[Member]
    settings: tuple[Any, ...]

    def __post_init__(self) -> None:
        self._get = operator.itemgetter(*self.update.settings)
        self._groups = [m.group for m in self.members]
        self._states = [m.state for m in self.members]
        self.tensors = [{name: s[name] for name in self.update.state_names if name in s} for s in self._states]
        self._views: list[Tensor] = []
        self._steps: Tensor | None = None
        if all(isinstance(state.get("step"), Tensor) for state in self._states):
            # One tensor with a view for each: a single addition advances all.
            self._steps = torch.stack([state["step"] for state in self._states])
            self._counts = self._steps.numpy()
            self._views = list(self._steps.unbind())
            for state, view in zip(self._states, self._views, strict=True):
                state["step"] = view

    def is_current(self) -> bool:
        """Whether the graph's constants still hold; learning rates may differ from before, but must be common."""
        first = self._get(self._groups[0])
        is_restored = False
        for i, (member, group, state) in enumerate(zip(self.members, self._groups, self._states, strict=True)):
            optimizer = member.optimizer
            is_restored = is_restored or optimizer.state.get(member.value) is not state
            if optimizer.param_groups[0] is not group or self._get(group) != first or not member.is_held():
                return False
            if not is_restored and not self._is_same(state, i):
                return False
        if first[1:] != self.settings[1:] or (is_restored and not self._takes_restored()):
            return False
        self.settings = first
        return self._steps is None or bool((self._counts == self._counts[0]).all())

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self._states[0].get("step", 0) if self._steps is None else self._counts[0])

    def _takes_restored(self) -> bool:
        """Whether another state dictionary, as a snapshot puts back, holds the same tensors; take it then."""
        states = [m.state for m in self.members]
        if not all(self._is_same(state, i) for i, state in enumerate(states)):
            return False
        self._states = states
        return len({member.step for member in self.members}) == 1

    def _is_same(self, state: dict[str, Any], i: int) -> bool:
        """Whether the state of the i-th member holds the tensors that the graph writes."""
        if self._views and state.get("step") is not self._views[i]:
            return False
        return all(state.get(name) is tensor for name, tensor in self.tensors[i].items())

    def scalars(self) -> tuple[float, ...]:
        """The numbers of the next step."""
        return self.update.scalars(self.settings, self.step + 1)

    def advance(self) -> None:
        """Count a step."""
        if self._steps is not None:
            self._steps.add_(1)
        for group, state in zip(self._groups, self._states, strict=True):
            self.update.advance(group)
            if self._steps is None and "step" in state:
                state["step"] += 1

    def trace(self, grads: Sequence[Tensor], s: Tensor) -> None:
        """Move all members in place."""
        for member, group, state, grad in zip(self.members, self._groups, self.tensors, grads, strict=True):
            self.update.update(member.value, grad, state, group, s)


def graph_groups(optim: PyroOptim, values: dict[str, Tensor]) -> list[GraphGroup] | None:
    """The parameters by update; None where some optimizer has no counterpart for graphs.

    Args:
        optim: has taken a step on every parameter.
        values: unconstrained tensors by name.
    """
    found: dict[Any, tuple[GraphUpdate, list[Member]]] = {}
    for name, value in values.items():
        held = optim.optim_objs.get(value)
        if held is None or optim.grad_clip.get(value) is not None:
            return None
        optimizer = cast("Optimizer", getattr(held, "optimizer", held))  # inside a learning-rate schedule
        update = _UPDATES.get(type(optimizer))
        if update is None or len(optimizer.param_groups) != 1:
            return None
        member = Member(name, value, optimizer, optim, held)
        if not update.serves(member.group) or not _has_state(update, member):
            return None
        settings = operator.itemgetter(*update.settings)(member.group)
        key = (type(optimizer), settings, member.step)
        found.setdefault(key, (update, []))[1].append(member)
    return [GraphGroup(update, members, key[1]) for key, (update, members) in found.items()]


def _has_state(update: GraphUpdate, member: Member) -> bool:
    if isinstance(update, _SGD) and not member.group["momentum"]:
        return True
    return all(isinstance(member.state.get(name), Tensor) for name in update.state_names)
