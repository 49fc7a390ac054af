"""Exact E-steps as one compiled graph: form, posterior, L and the statistics of the M-step, traced from the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_ext.blocks import Block
from pyro_ext.evaluators import Evaluator, Parameters, Quadratic
from pyro_ext.quadratic import QuadraticForm, quadratic_form
from pyro_ext.snapshot import modules_of
from pyro_ext.tracing import tracing

if TYPE_CHECKING:
    from pyro_ext.steps import Call

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest relative difference of L between the graph and the eager run."""


class Compilation:
    """The compiled graphs of a driver's E-steps, traced once for each shape of the data.

    The program is traced with everything in it that Python decides; data, theta and the last q come in as tensors.
    Where one sweep is exact the graph holds the whole E-step and the statistics of the M-step; elsewhere it holds the
    quadratic form, on which sweeps run. Every `check_every` steps the eager run, with all its tests, is compared.

    Args:
        statistics: the model's own ``statistics(data, posterior)``, traced too; None to leave them out.
        check_every: steps between two comparisons.
    """

    def __init__(self, statistics: Callable[..., Mapping[str, Tensor]] | None, check_every: int = 50) -> None:
        self.statistics, self.check_every = statistics, check_every
        self._graphs: dict[tuple[Any, ...], _Solution | _Form] = {}
        self._uses: dict[tuple[Any, ...], int] = {}

    def evaluator(self, call: Call, choose: Callable[[], Evaluator]) -> Evaluator:
        """The evaluator of a call: the compiled one where it serves, compared with the eager one from time to time."""
        key = _key(call)
        graph = self._graphs.get(key)
        if graph is not None:
            self._uses[key] += 1
            if self._uses[key] % self.check_every:
                return graph.evaluator(call)
        eager = choose()
        if not isinstance(eager, Quadratic) or eager.form.coupling.dim() != 2:
            # Sums over paths and states are matrix code already.
            return eager
        if graph is None:
            # A graph is traced once: exactness that depends on the numbers in J, as a tree's does, is no part of it.
            is_exact = eager.exact_posterior and eager.blocks[0].factor.is_exact_for(None)
            kind = _Solution if is_exact else _Form
            graph = self._graphs[key] = kind(call, eager, self.statistics)
            self._uses[key] = 0
        found: Any = graph.evaluator(call)
        graph.compare(found, eager)
        return found


def _key(call: Call) -> tuple[Any, ...]:
    """What a graph belongs to: shapes and kinds of the arguments, and the very tensors of the model."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    plates = call.program._plate_values
    kinds = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
    theta = tuple(map(id, _held(call)))
    shapes = tuple((name, tuple(value.shape)) for name, value in plates.items())
    return kinds, str(spec), theta, shapes


def _held(call: Call) -> list[Tensor]:
    """The tensors that a graph reads where they are: parameters, and buffers of the model."""
    buffers = [tensor for module in modules_of(call.model) for tensor in module.buffers()]
    return [*(tensor for _, tensor in pyro.get_param_store().named_parameters()), *buffers]


def _check_close(name: str, found: Tensor, truth: Tensor) -> None:
    """Raise where graph and eager run differ.

    Raises:
        RuntimeError: with both values.
    """
    difference = float((found - truth).abs().max())
    if not difference <= TOLERANCE.get(truth.dtype, 1e-3) * (1 + float(truth.abs().max())):
        raise RuntimeError(
            f"Expected the compiled E-step to give {name} = {float(truth.sum()):.10g}, that of the eager one, but got "
            f"{float(found.sum()):.10g}. The model takes a Python value that changes between steps: pass it as a "
            "tensor argument, or use compile=False."
        )


class _Graph(ABC):
    """One traced and compiled function of the data, the rows of the plates, and perhaps the q before."""

    def __init__(self, call: Call, eager: Quadratic, statistics: Callable[..., Mapping[str, Tensor]] | None) -> None:
        self.layout, self.blocks, self.statistics = eager.layout, eager.blocks, statistics
        leaves, spec = tree_flatten((call.args, call.kwargs))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._plates = list(call.program._plate_values)
        # Their ids name the graph: none may be given to another tensor meanwhile.
        self._held = _held(call)
        program = call.program

        def function(old: tuple[Tensor, ...], data: list[Tensor], plates: list[Tensor]) -> list[Tensor]:
            given = list(leaves)
            for place, tensor in zip(self._places, data, strict=True):
                given[place] = tensor
            program.args, program.kwargs = tree_unflatten(given, spec)
            program._plate_values = dict(zip(self._plates, plates, strict=True))
            return self.trace(call, old)

        state = program.args, program.kwargs, program._plate_values
        try:
            # Effects outside, tensors inside.
            with tracing(), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
                traced = make_fx(function)(self.idle(eager), self._data(call), self._plate_data(call))
        except Exception as error:
            raise RuntimeError(
                f"Expected a model without Python branches on values of tensors, but tracing it failed ({error}). "
                "Use compile=False."
            ) from error
        finally:
            program.args, program.kwargs, program._plate_values = state
        self._run = torch.compile(traced, dynamic=False)

    @abstractmethod
    def trace(self, call: Call, old: tuple[Tensor, ...]) -> list[Tensor]:
        """What the graph computes."""

    @abstractmethod
    def idle(self, eager: Quadratic) -> tuple[Tensor, ...]:
        """What stands for the q before, where there is none."""

    @abstractmethod
    def evaluator(self, call: Call) -> Evaluator:
        """The evaluator at the present theta."""

    @abstractmethod
    def compare(self, found: Any, eager: Quadratic) -> None:
        """Compare an evaluator of this graph with the eager one."""

    def _data(self, call: Call) -> list[Tensor]:
        leaves, _ = tree_flatten((call.args, call.kwargs))
        return cast("list[Tensor]", [leaves[place] for place in self._places])

    def _plate_data(self, call: Call) -> list[Tensor]:
        return [call.program._plate_values[name] for name in self._plates]

    def __call__(self, call: Call, old: tuple[Tensor, ...] = ()) -> list[Tensor]:
        with torch.no_grad():
            return self._run(old, self._data(call), self._plate_data(call))


class _Form(_Graph):
    """c, b and J."""

    def trace(self, call: Call, old: tuple[Tensor, ...]) -> list[Tensor]:
        form = quadratic_form(call.program)
        return [form.constant, form.linear, form.coupling]

    def idle(self, eager: Quadratic) -> tuple[Tensor, ...]:
        return ()

    def evaluator(self, call: Call) -> Quadratic:
        constant, linear, coupling = self(call)
        return Quadratic(QuadraticForm(constant, linear, coupling, self.layout), self.blocks)

    def compare(self, found: Quadratic, eager: Quadratic) -> None:
        for name in ("constant", "linear", "coupling"):
            _check_close(name, getattr(found.form, name), getattr(eager.form, name))


class _Solution(_Graph):
    """The exact posterior, L of it and of the q before, and the model's statistics."""

    @property
    def block(self) -> Block:
        """The one block."""
        return self.blocks[0]

    def idle(self, eager: Quadratic) -> tuple[Tensor, ...]:
        with torch.no_grad():
            params, _ = eager.solve()
        old = params[self.block.name][:, 0].detach()
        self.names: list[str] = []
        self.nothing = (torch.zeros_like(old), *(torch.zeros_like(s) for s in self.block.factor.sums(old)))
        return self.nothing

    def trace(self, call: Call, old: tuple[Tensor, ...]) -> list[Tensor]:
        factor, name = self.block.factor, self.block.name
        factor.remember(old[0], old[1:])
        evaluator = Quadratic(quadratic_form(call.program), self.blocks)
        params, bound = evaluator.solve()
        flat = params[name][:, 0]
        old_bound = evaluator.bound({name: old[0][:, None]})
        found: dict[str, Tensor] = {}
        if self.statistics is not None:
            found = dict(self.statistics(call.bound_arguments(), call.posterior(params)))
        self.names = list(found)
        return [flat, bound, old_bound, *factor.sums(flat), *found.values()]

    def evaluator(self, call: Call) -> CompiledSolution:
        return CompiledSolution(self, call)

    def compare(self, found: CompiledSolution, eager: Quadratic) -> None:
        truth, bound = eager.solve()
        params, found_bound = found.solve()
        _check_close("L", found_bound, bound)
        statistics = found.statistics(params)
        if statistics is None or self.statistics is None:
            return
        with torch.no_grad():
            expected = self.statistics(found.call.bound_arguments(), found.call.posterior(truth))
        for name, value in expected.items():
            _check_close(f"the statistic {name!r}", statistics[name], value)


class CompiledSolution(Evaluator):
    """The exact posterior at one theta from a compiled graph, with L of the q before it beside its own.

    Args:
        graph: the compiled E-step.
        call: the data.
    """

    def __init__(self, graph: _Solution, call: Call) -> None:
        self.graph, self.call = graph, call
        self.layout, self.blocks = graph.layout, graph.blocks
        self._answer: list[Tensor] | None = None

    @property
    def exact_posterior(self) -> bool:
        return True

    @property
    def _block(self) -> Block:
        return self.graph.block

    def _run(self, old: tuple[Tensor, ...]) -> list[Tensor]:
        self._answer = self.graph(self.call, old)
        params, (_, *sums) = self._answer[0], self.graph.nothing
        self._block.factor.remember(params, tuple(self._answer[3 : 3 + len(sums)]))
        return self._answer

    def solve(self) -> tuple[Parameters, Tensor]:
        answer = self._answer or self._run(self.graph.nothing)
        return {self._block.name: answer[0][:, None]}, answer[1]

    def bound(self, params: Parameters) -> Tensor:
        given = params[self._block.name][:, 0]
        if self._answer is not None and given.data_ptr() == self._answer[0].data_ptr():
            return self._answer[1]
        return self._run((given, *self._block.factor.sums(given)))[2]

    def statistics(self, params: Parameters) -> dict[str, Tensor] | None:
        """The model's statistics under the posterior; None for another q, or where they were not traced."""
        if self._answer is None or not self.graph.names:
            return None
        if params[self._block.name].data_ptr() != self._answer[0].data_ptr():
            return None
        return dict(zip(self.graph.names, self._answer[2 + len(self.graph.nothing) :], strict=True))

    def sweep(self, params: Parameters) -> Parameters:
        return self.solve()[0]

    def jump(self, params: Parameters) -> Parameters:
        return self.solve()[0]
