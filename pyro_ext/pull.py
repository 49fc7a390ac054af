"""A pull of MAP points towards what a network predicts: the term of predictive sparse decomposition (19.5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.evaluators import Parameters
from pyro_ext.layout import Layout
from pyro_ext.problems import PenalizedQuadratic
from pyro_ext.program import Program
from pyro_ext.program_problem import ProgramProblem
from pyro_ext.rows import Rows
from pyro_ext.sites import Site


def point_values(params: Parameters, blocks: Sequence[Block], rows: Rows) -> dict[str, Tensor]:
    """The values of points, ``batch + event_shape`` for each site, from parameters ``(R, M, P)``."""
    layout = Layout(rows, [block.site for block in blocks])
    return {b.site.name: b.site.from_features(layout.from_rows(params[b.name], b.site)) for b in blocks}


def in_rows(values: Mapping[str, Tensor], sites: Sequence[Site], rows: Rows) -> Tensor:
    """The values of some sites in one vector a row, ``(R, V)``, in the order of the sites."""
    parts: list[Tensor] = []
    for site in sites:
        value = values[site.name]
        flat = value.reshape(value.shape[: value.dim() - len(site.event_shape)] + (-1,))
        parts.append(Layout(rows, [site]).to_rows(flat, site).flatten(1))
    return torch.cat(parts, -1)


def weight_of(site: Site, rows: Rows) -> float:
    """How often each element of a site counts: full size / size of the inner plates that are subsampled."""
    return math.prod(f.full_size / f.size for f in site.frames if f.name not in rows.names)


@dataclass(frozen=True)
class Pull:
    r"""What the values of a row cost for their distance from a target.

    .. math:: cost(h) = \tfrac12 \sum_i strength_i (h_i - target_i)^2

    Elements of subsampled inner plates stand for the others too, as they do in log p(v, h).

    Attributes:
        rows: the rows of the program.
        sites: the latent sites, in the order of the program.
        target: shape ``(R, V)``: all values of a row in one vector.
        strength: shape ``(V,)``, nats per squared unit.
    """

    rows: Rows
    sites: tuple[Site, ...]
    target: Tensor
    strength: Tensor

    @classmethod
    def towards(cls, params: Parameters, blocks: Sequence[Block], program: Program, strength: float) -> Pull:
        """The pull towards the points of parameters ``(R, M, P)``."""
        rows, sites = program.rows, program.latents
        target = in_rows(point_values(params, blocks, rows), sites, rows).detach()
        weights = [
            torch.full((Layout(rows, [site]).copies(site) * site.event_shape.numel(),), weight_of(site, rows))
            for site in sites
        ]
        return cls(rows, sites, target, strength * torch.cat(weights).to(target))

    def cost(self, values: Mapping[str, Tensor]) -> Tensor:
        """Shape ``(R,)``, nats."""
        distance = in_rows(values, self.sites, self.rows) - self.target
        return 0.5 * (self.strength * distance.square()).sum(-1)

    def on_lasso(
        self, problem: PenalizedQuadratic, constant: Tensor, shift: Tensor
    ) -> tuple[PenalizedQuadratic, Tensor]:
        """A lasso in x = h - shift with the pull, and the constant ``(R,)`` that goes with it, as in `PointProblem`."""
        target = self.target - shift
        pulled = PenalizedQuadratic(
            problem.quadratic + torch.diag_embed(self.strength),
            problem.linear + self.strength * target,
            problem.rate,
            problem.nonnegative,
        )
        return pulled, constant - 0.5 * (self.strength * target.square()).sum(-1)


class PulledProblem(ProgramProblem):
    """As `ProgramProblem`, with a pull added.

    Args:
        pull: the pull.
        program: see `ProgramProblem`.
        layout: see `ProgramProblem`.
        **settings: see `ProgramProblem`.
    """

    def __init__(self, pull: Pull, program: Program, layout: Layout, **settings: Any) -> None:
        super().__init__(program, layout, **settings)
        self.pull = pull

    def rows(self, index: Tensor) -> PulledProblem:
        plain = super().rows(index)
        part = PulledProblem(self.pull, self.program, self.layout)
        vars(part).update(vars(plain))
        return part

    def _negative_log_joint(self, x: Tensor) -> Tensor:
        return super()._negative_log_joint(x) + self.pull.cost(self.layout.values(self._whole(x)))
