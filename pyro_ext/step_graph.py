"""One SVI step as a graph: loss, gradients and the optimizer's update, on tensors that stay where they are."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_ext.effects import DataDependentError, EffectsOutside
from pyro_ext.graph_optimizers import GraphGroup
from pyro_ext.step_signature import is_flat
from pyro_ext.tracing import tracing

_LOOK = "trying to get value out of a tracing tensor"
"""What torch says of it, within a longer text."""

LossAndGrads = Callable[..., Any]


class NotTraceableError(RuntimeError):
    """A program cannot be held by a graph; the text says where and why."""


class CompilerWarning(RuntimeWarning):
    """No machine code could be made: the traced graph is run as it is."""


class StepGraph:
    """The graph of one step, for one signature of the arguments.

    Parameters, the optimizer's state, buffers and all other tensors that the program holds are inputs of the graph, the
    very objects, and written in place: Pyro's store and the modules see every change at once.

    Args:
        loss_and_grads: called as Pyro's ELBOs are, ``loss_and_grads(model, guide, *args, **kwargs)``.
        model: the model.
        guide: the guide.
        args: example arguments.
        kwargs: example keyword arguments.
        values: the unconstrained tensors of all parameters, by name.
        groups: their updates; None to leave gradients in ``grad`` for another optimizer.
        recorded: what the objective notes beside its loss: a function that returns a tensor or None.

    Raises:
        NotTraceableError: Python looks at values of tensors, or an operation has no place in a graph.
    """

    def __init__(
        self,
        loss_and_grads: LossAndGrads,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[str, Tensor],
        groups: list[GraphGroup] | None,
        recorded: Callable[[], Tensor | None],
    ) -> None:
        self.values, self.groups = values, groups
        leaves, spec = tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._is_flat = is_flat(args, kwargs)
        self._frozen = [not value.requires_grad for value in values.values()]
        data = [leaves[i] for i in self._places]
        self._scalars = torch.tensor(self._rows(), dtype=torch.float64)
        self._row_values = self._scalars.numpy()
        self._has_gradient: list[str] = []
        self._num_losses, self._is_tuple, self._is_recorded = 1, False, False

        def function(scalars: Tensor, data: Sequence[Tensor]) -> tuple[Tensor, ...]:
            given = list(leaves)
            for place, tensor in zip(self._places, data, strict=True):
                given[place] = tensor
            new_args, new_kwargs = tree_unflatten(given, spec)
            effects = EffectsOutside()
            with effects, torch.enable_grad():
                loss = loss_and_grads(model, guide, *new_args, **new_kwargs)
                _check_store(values)
                grads = self._gradients(effects.surrogate)
            with torch.no_grad():
                noted = recorded()
                # A list would be packed and unpacked at every call.
                return tuple(self._outputs(loss, grads, noted, scalars))

        try:
            # Effects outside, tensors inside.
            with tracing(), poutine.block(), pyro.validation_enabled(False):
                # Objects of their own: one tensor may be two arguments, or one that the program holds as well.
                traced = make_fx(function)(self._scalars, [tensor.detach() for tensor in data])
                # A size leaves no trace but the number that it was.
                _refuse_sizes_of_values(traced)
                traced.graph.eliminate_dead_code()
                module, self._held = _lifted(traced)
        except Exception as error:
            raise NotTraceableError(_reason(error)) from error
        self._run = _compiled(module, [*self._held, self._scalars, *data])

    # ------------------------------------------------------------------ tracing

    def _rows(self) -> list[tuple[float, ...]]:
        rows = [group.scalars() for group in self.groups or ()]
        width = max(map(len, rows), default=1)
        return [(*row, *(0.0,) * (width - len(row))) for row in rows]

    def _gradients(self, surrogate: Tensor | None) -> dict[str, Tensor]:
        """Gradients by name; none for what has never had any, as in the eager run."""
        found: Sequence[Tensor | None] = [None] * len(self.values)
        if surrogate is not None and surrogate.requires_grad:
            free = [value for value in self.values.values() if value.requires_grad]
            by_value = dict(zip(map(id, free), torch.autograd.grad(surrogate, free, allow_unused=True), strict=True))
            found = [by_value.get(id(value)) for value in self.values.values()]
        grads: dict[str, Tensor] = {}
        for (name, value), grad in zip(self.values.items(), found, strict=True):
            if grad is not None:
                grads[name] = grad
            elif value.grad is not None:
                # SVI zeroes gradients between steps, and optimizers with momentum go on moving.
                grads[name] = torch.zeros_like(value)
        return grads

    def _outputs(self, loss: Any, grads: dict[str, Tensor], noted: Tensor | None, scalars: Tensor) -> list[Tensor]:
        self._is_tuple = isinstance(loss, tuple)
        losses = [torch.as_tensor(part) for part in (cast("tuple[Any, ...]", loss) if self._is_tuple else (loss,))]
        self._num_losses, self._is_recorded = len(losses), noted is not None
        outputs = [part.detach().clone() for part in losses] + ([noted.detach().clone()] if noted is not None else [])
        if self.groups is None:
            self._has_gradient = list(grads)
            return outputs + list(grads.values())
        for row, group in enumerate(self.groups):
            group.trace([grads[m.name] for m in group.members], scalars[row])
        return outputs

    # ------------------------------------------------------------------ running

    def is_current(self) -> bool:
        """Whether Pyro's store and the optimizers still hold the tensors and settings that were traced."""
        params = pyro.get_param_store()._params
        for (name, value), frozen in zip(self.values.items(), self._frozen, strict=True):
            if params.get(name) is not value or value.requires_grad is frozen:
                return False
        return all(group.is_current() for group in self.groups or ())

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """Take the step.

        Returns:
            The loss, a number or a tuple of numbers, and what the objective notes.
        """
        data: Sequence[Tensor] = args
        if not self._is_flat:
            leaves, _ = tree_flatten((args, kwargs))
            data = [leaves[place] for place in self._places]
        self._row_values[:] = self._rows()
        with torch.no_grad():
            outputs = self._run(*self._held, self._scalars, *data)
        for group in self.groups or ():
            group.advance()
        losses = [part.item() for part in outputs[: self._num_losses]]
        noted = outputs[self._num_losses] if self._is_recorded else None
        if self.groups is None:
            grads = outputs[self._num_losses + self._is_recorded :]
            for name, grad in zip(self._has_gradient, grads, strict=True):
                self.values[name].grad = grad
        return tuple(losses) if self._is_tuple else losses[0], noted


def _check_store(values: dict[str, Tensor]) -> None:
    """Refuse a program that puts other tensors into Pyro's store.

    Raises:
        NotTraceableError: naming the parameter.
    """
    params = pyro.get_param_store()._params
    for name, value in values.items():
        if params.get(name) is not value:
            raise NotTraceableError(f"it puts another tensor into Pyro's store for {name!r} at every step")


def _refuse_sizes_of_values(module: GraphModule) -> None:
    """Refuse operations whose output has a size that depends on values.

    Raises:
        NotTraceableError: naming the operation.
    """
    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape not in tags:
            continue
        if node.target is torch.ops.aten.index.Tensor and not any(map(_is_boolean, node.args[1], repeat(module))):
            continue
        raise NotTraceableError(
            f"it takes {node.target.overloadpacket.__name__}, whose output has as many elements as the values say (sum "
            "with a mask, or torch.where, in its place)"
        )


def _is_boolean(index: Any, module: GraphModule) -> bool:
    if index is None:
        return False
    value = getattr(module, index.target, None) if index.op == "get_attr" else index.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _lifted(module: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph with all tensors that it holds as its first inputs, and these tensors."""
    graph: Graph = module.graph
    first = next(iter(graph.nodes))
    found: dict[int, Any] = {}
    held: list[Tensor] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, cast("str", node.target))
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in found:
            with graph.inserting_before(first):
                found[id(tensor)] = graph.placeholder(f"held_{len(held)}")
            held.append(tensor)
        node.replace_all_uses_with(found[id(tensor)])
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta.clear()
    # Inputs and outputs are flat: packing and unpacking them would take as long as the small operations.
    graph.set_codegen(CodeGen())
    return GraphModule(nn.Module(), graph), held


def _compiled(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Machine code for a graph; the graph itself, with a warning, where there is no compiler."""
    # Late: the compiler's front end takes seconds to import.
    from torch._inductor import compile as compile_graph
    from torch._inductor import config

    try:
        with torch.no_grad(), config.patch(fallback_random=True):
            return cast("Callable[..., Sequence[Tensor]]", compile_graph(module, cast("list[Any]", inputs)))
    except Exception as error:
        if not _is_missing_compiler(error):
            raise NotTraceableError(f"the compiler refused the graph: {error}") from error
        warnings.warn(
            f"Expected a C++ compiler, but found none ({_first_line(error)}). The traced graph is run without one, "
            "slower than compiled and faster than Pyro's own step. Install g++ or clang++.",
            CompilerWarning,
            stacklevel=2,
        )
        return module


def _is_missing_compiler(error: BaseException | None) -> bool:
    from torch._inductor import exc

    while error is not None:
        if isinstance(error, exc.InvalidCxxCompiler | FileNotFoundError):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _reason(error: BaseException) -> str:
    """Where in the user's program tracing failed, and why."""
    if isinstance(error, DataDependentError | NotTraceableError):
        return _first_line(error)
    ours = Path(__file__).parent
    library = (Path(torch.__file__).parent, Path(pyro.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(folder in Path(frame.filename).parents for folder in library) and Path(frame.filename).parent != ours
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "the program"
    if _LOOK in str(error):
        return f"{place} looks at the value of a tensor (sequential plates and one-hot draws do, too)"
    return f"{place} raised {type(error).__name__}: {_first_line(error)}"
