"""CompiledSVI: `pyro.infer.SVI` with the whole step as one compiled graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_ext.checks import check_data_of
from pyro_ext.eager_step import EagerStep
from pyro_ext.graph_optimizers import GraphGroup, graph_groups
from pyro_ext.snapshot import Snapshot, modules_of
from pyro_ext.step_graph import NotTraceableError, StepGraph
from pyro_ext.step_signature import check_leaves, is_plain_surroundings, noting_modules, settings_of, signature

_OTHER_SHAPES = 100
"""Eager steps on a second shape before it gets a graph: the last batch of an epoch is not worth one."""

_MANY_SIGNATURES = 16

_MOST_SIGNATURES = 256

_MANY_GRAPHS = 8

_EARLY_CHECKS = (1, 3, 11, 31, 101, 307)
"""Steps of a graph that are compared in any case: two steps from one state would not tell constants of that state.

They are primes, as is the default of `check_every`, to fall on all batches of an epoch in the end.
"""


class CompiledSVI:
    """`pyro.infer.SVI` with loss, gradients and optimizer update in one graph made by torch.compile's back end.

    The first step is Pyro's own: parameters come into being, and guides are set up. The second step traces what Pyro
    does on the present arguments down to tensor operations and compiles them, which takes some seconds; later steps
    run the graph. Draws are those of the eager run with the same seed, and parameters agree with it to rounding. Any
    objective written like Pyro's ELBOs is served (`Trace_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO`,
    `TraceGraph_ELBO`, `RenyiELBO`, `WakeSleep`, a callable), with the limits of a graph:

    - Programs whose Python code looks at values of tensors are refused, with the place.
    - Whatever Python computes by itself is a constant of the graph: an annealing factor must come in as a tensor. To
      notice such constants, both ways are taken from the same state and compared: at a graph's first steps, more and
      more rarely, then every `check_every` steps.
    - A graph belongs to one signature: shapes, dtypes and devices of tensors, the values of all other arguments,
      training or evaluation mode of modules. Steps inside handlers of Pyro's, or without gradients, are eager. A
      second signature, such as the last batch of an epoch, is stepped eagerly a hundred times before it gets a graph
      of its own.
    - Tensors that a program holds may be written in place between steps, but not be replaced by others.
    - Pyro's validation is off inside the graph: data outside the support of a distribution are not noticed, and a NaN
      shows in the loss only.

    Parameters stay in Pyro's store and in their modules, and optimizer states in the torch optimizers of `optim`:
    `fit`, `save`, snapshots and Pyro's own SVI go on from them at any time. Adam, AdamW, SGD and ClippedAdam are
    inside the graph, learning-rate schedules included; other optimizers and ``clip_args`` run eagerly on the graph's
    gradients. CPU and GPU.

    Args:
        model: any Pyro model.
        guide: any Pyro guide.
        optim: a `pyro.optim.PyroOptim`.
        loss: an ELBO, or a callable ``loss(model, guide, *args, **kwargs)``.
        loss_and_grads: as in `pyro.infer.SVI`, for a callable `loss`.
        check_every: steps between two comparisons with Pyro's own step; 0 for the early ones only.

    Raises:
        TypeError: `optim` is no PyroOptim, a program is not callable, `check_every` no integer, or, at a step, an
            argument that is neither a tensor nor plain.
        ValueError: `check_every` below 0; at a step, data that the model refuses.
        RuntimeError: at a step: the program cannot be traced, with the place and the reason; or graph and Pyro's step
            disagree, with both. Parameters and optimizer are as they were before the step then.

    Warns:
        CompilerWarning: no C++ compiler was found; the traced graph is run as it is.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(v)):
        ...         pyro.sample("v", dist.Normal(mean, 1.0), obs=v)
        >>> pyro.clear_param_store()
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> losses = [svi.step(torch.ones(10)) for _ in range(5)]
    """

    checkpoint_kind = "SVI"
    """A fit that Pyro's SVI began goes on from its file with this driver, and the other way round."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        check_every: int = 997,
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(
                    f"Expected a callable {name}, but got {type(program).__name__}. Pass the program itself."
                )
        if not isinstance(optim, PyroOptim):
            raise TypeError(
                f"Expected an optimizer of pyro.optim, but got {type(optim).__name__}. "
                'Write pyro.optim.Adam({"lr": 1e-3}).'
            )
        if not isinstance(check_every, int) or isinstance(check_every, bool):
            raise TypeError(
                f"Expected an integer check_every, but got {check_every!r}. Pass 0 for the early checks only."
            )
        if check_every < 0:
            raise ValueError(
                f"Expected check_every of at least 0, but got {check_every}. Pass 0 for the early checks only."
            )
        if isinstance(loss, type) or not (isinstance(loss, ELBO) or callable(loss)):
            raise TypeError(
                f"Expected an ELBO object or a callable as loss, but got {loss!r}. Write Trace_ELBO() or WakeSleep()."
            )
        self._svi = SVI(model, guide, optim, loss, loss_and_grads)
        self.model, self.guide, self.optim = model, guide, optim
        self.loss, self.loss_and_grads = self._svi.loss, self._svi.loss_and_grads
        self.check_every = check_every
        self._owners: tuple[Any, ...] = ()
        self._num_traced = 0
        self._forget()

    # ------------------------------------------------------------------ as pyro.infer.SVI

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step.

        Returns:
            The loss at the parameters before the step, as the objective gives it (nats, summed over the batch).
        """
        self._notice_changes()
        key = signature(args, kwargs, self._modules)
        graph = self._graphs.get(key)
        if not is_plain_surroundings():
            return self._eager(key, args, kwargs)
        if graph is None or not graph.is_current():
            return self._without_graph(key, args, kwargs)
        # A graph takes whatever values come.
        self._check_data(args, kwargs)
        uses = self._uses[key] = self._uses[key] + 1
        if uses in _EARLY_CHECKS or (self.check_every and uses % self.check_every == 0):
            return self._checked(lambda: graph, graph.values, args, kwargs)
        return self._run(graph, args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step, by Pyro's own run."""
        self._notice_changes()
        return self._svi.evaluate_loss(*args, **kwargs)

    # ------------------------------------------------------------------ steps

    def _forget(self) -> None:
        self._modules: list[nn.Module] = []
        self._graphs: dict[Any, StepGraph] = {}
        self._uses: dict[Any, int] = {}
        self._values: dict[Any, dict[str, Tensor]] = {}
        self._groups: list[GraphGroup] | None = None

    def _notice_changes(self) -> None:
        """Begin anew where the driver's parts, or the settings of its objective, were changed."""
        owners = (self.model, self.guide, self.optim, self.loss, self.loss_and_grads)
        if self._owners and all(a is b for a, b in zip(owners, self._owners, strict=True)):
            if self._settings() == self._were:
                return
            self._forget()
        elif self._owners:
            self._forget()
            svi = self._svi
            svi.model, svi.guide, svi.optim, svi.loss, svi.loss_and_grads = owners
        self._owners = owners
        self._settings = settings_of(getattr(self.loss, "__self__", None))
        self._were = self._settings()

    def _check_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_data_of(self.model, args, kwargs)
        if getattr(self.guide, "is_set_up", False):
            cast("Any", self.guide).check_call(args, kwargs)

    def _without_graph(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_leaves(args, kwargs)
        seen = self._uses.get(key, 0)
        is_stale = key in self._graphs
        wait = 1 if not self._graphs or is_stale else _OTHER_SHAPES
        if seen < wait or not self._has_all(key):
            self._warn_of_many(key)
            return self._eager(key, args, kwargs)
        if is_stale:
            self._graphs.clear()
            self._groups = None
        values = self._values[key]
        loss = self._checked(lambda: self._traced(key, args, kwargs), values, args, kwargs)
        self._uses[key] = 0
        return loss

    def _warn_of_many(self, key: Any) -> None:
        if key in self._uses or len(self._uses) != _MANY_SIGNATURES:
            return
        warnings.warn(
            f"Expected few signatures of arguments, but got more than {_MANY_SIGNATURES}; steps with a new one are "
            "Pyro's own, and slow. Pass numbers that change, such as an annealing factor, as tensors, and batches of "
            "one size.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _has_all(self, key: Any) -> bool:
        """Whether the parameters that a signature was seen with are still those of the store."""
        params = _store()
        return all(params.get(name) is value for name, value in self._values.get(key, {"": None}).items())

    def _eager(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with poutine.trace(param_only=True) as capture, noting_modules() as modules:
            loss = self._svi.step(*args, **kwargs)
        params = _store()
        found = {name: params[name] for name in capture.trace.nodes if name in params}
        known = len(self._modules)
        self._modules = list({id(m): m for m in (*self._modules, *self._own_modules(), *modules)}.values())
        if known != len(self._modules):
            # Their modes belong to the signature.
            key = signature(args, kwargs, self._modules)
        # Objectives find the nesting of plates in their first run.
        self._were = self._settings()
        if len(self._uses) > _MOST_SIGNATURES:
            self._uses = {k: n for k, n in self._uses.items() if k in self._graphs}
            self._values = {k: v for k, v in self._values.items() if k in self._graphs}
        # Tied parameters have several names, and one step.
        self._values[key] = {name: value for value, name in {v: n for n, v in reversed(found.items())}.items()}
        self._uses[key] = self._uses.get(key, 0) + 1
        return loss

    def _own_modules(self) -> list[nn.Module]:
        return [child for module in modules_of(self.model, self.guide) for child in module.modules()]

    def _traced(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepGraph:
        values = self._values[key]
        objective = getattr(self.loss, "__self__", None)
        self._num_traced += 1
        if self._num_traced == _MANY_GRAPHS:
            warnings.warn(
                f"Expected few graphs, but this is number {_MANY_GRAPHS}, each of which takes seconds. Between steps "
                "something replaces parameters or states of the optimizer: write them in place, and give every "
                "CompiledSVI an optimizer of its own.",
                RuntimeWarning,
                stacklevel=6,
            )
        if self._groups is None:
            moved = {name: value for name, value in values.items() if value.grad is not None}
            self._groups = graph_groups(self.optim, moved)
        groups = self._groups
        if groups is not None and not _are(groups, values):
            groups = None
        snapshot = self._snapshot()
        try:
            graph = StepGraph(
                self.loss_and_grads, self.model, self.guide, args, kwargs, values, groups, self._recorded(objective)
            )
        except NotTraceableError as error:
            raise RuntimeError(
                f"Expected a program that a graph can hold, but {error}. "
                "Pass what changes as tensors and let no Python branch depend on them, or use pyro.infer.SVI."
            ) from error
        finally:
            # Tracing took the step.
            snapshot.restore()
        self._graphs[key] = graph
        return graph

    @staticmethod
    def _recorded(objective: Any) -> Callable[[], Tensor | None]:
        return lambda: getattr(objective, "last_sleep_loss", None)

    def _run(self, graph: StepGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loss, noted = graph(args, kwargs)
        if graph.groups is None:
            values = {value for value in graph.values.values() if value.grad is not None}
            self.optim(cast("Any", values))
            for value in values:
                value.grad = torch.zeros_like(value)
        if noted is not None:
            cast("Any", self.loss).__self__.last_sleep_loss = noted
        return loss

    def _snapshot(self) -> Snapshot:
        return Snapshot.take(*self._modules, *modules_of(self.model, self.guide), self.optim, rng=True)

    def _checked(
        self,
        graph_of: Callable[[], StepGraph],
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Take the step both ways from the same state; the graph's is kept.

        Raises:
            RuntimeError: they differ.
        """
        snapshot = self._snapshot()
        objective = getattr(self.loss, "__self__", None)
        noted = getattr(objective, "last_sleep_loss", None)
        try:
            # Pyro's own first: what the program itself refuses is raised as it is.
            eager = EagerStep(self, values, args, kwargs)
            snapshot.restore()
            graph = graph_of()
            if not graph.is_current():
                raise RuntimeError(
                    "Expected parameters that stay what they are, but a step replaced one. Use pyro.infer.SVI."
                )
            loss = self._run(graph, args, kwargs)
            eager.compare(loss, graph.values)
        except BaseException:
            snapshot.restore()
            if objective is not None and hasattr(objective, "last_sleep_loss"):
                objective.last_sleep_loss = noted
            raise
        return loss


def _store() -> dict[str, Tensor]:
    return pyro.get_param_store()._params


def _are(groups: list[GraphGroup], values: dict[str, Tensor]) -> bool:
    moved = {name for name, value in values.items() if value.grad is not None}
    return moved == {member.name for group in groups for member in group.members}
