"""log p(v, h) at the points of q, for programs of any form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.evaluators import Evaluator, NoEvaluatorError, Parameters
from pyro_ext.layout import Layout
from pyro_ext.program import Program


def are_continuous_points(blocks: Sequence[Block]) -> bool:
    """Whether every factor is a point mass on continuous latents."""
    return all(b.factor.is_point and not b.site.kind.is_discrete for b in blocks)


class Points(Evaluator):
    """log p(v, h) at the points, by running the program there; it has no coordinate maxima in closed form.

    Args:
        program: the program.
        blocks: point masses on continuous latents.
        create_graph: keep the graph to theta, for a gradient M-step.
    """

    def __init__(self, program: Program, blocks: Sequence[Block], *, create_graph: bool = False) -> None:
        self.program = program
        self.layout = Layout(program.rows, program.latents)
        self.blocks = tuple(blocks)
        self.create_graph = create_graph

    @property
    def exact_posterior(self) -> bool:
        return False

    def bound(self, params: Parameters) -> Tensor:
        if self.create_graph:
            with torch.enable_grad():
                return self._log_joint(params)
        names = [b.name for b in self.blocks if params[b.name].requires_grad]
        if not names or not torch.is_grad_enabled():
            with torch.no_grad():
                return self._log_joint(params)
        # The value with its gradient in q alone: an E-step must leave no gradient in theta.
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        value = self._log_joint({**params, **leaves})
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        value = value.detach()
        for name, slope in zip(names, slopes, strict=True):
            value = value + ((params[name] - leaves[name].detach()) * slope).flatten(1).sum(-1)
        return value

    def _log_joint(self, params: Parameters) -> Tensor:
        values = {
            block.site.name: block.site.from_features(self.layout.from_rows(params[block.name], block.site))
            for block in self.blocks
        }
        return self.program.log_joint(values).reshape(self.layout.rows.count)

    def _refuse(self) -> NoEvaluatorError:
        names = ", ".join(repr(block.site.name) for block in self.blocks)
        return NoEvaluatorError(
            f"Expected log p(v, h) to be quadratic in {names} for FixedPoint on point masses, but it is not. "
            "Use `e_step=Maximize()`, or `Refine(Maximize(), optim)` where a network predicts the points."
        )

    def sweep(self, params: Parameters) -> Parameters:
        raise self._refuse()

    def jump(self, params: Parameters) -> Parameters:
        raise self._refuse()

    def solve(self) -> tuple[Parameters, Tensor]:
        raise self._refuse()
