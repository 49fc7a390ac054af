"""In which groups of latents log p(v, h) is affine, given the others: a test at the present theta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyro_ext.colours import Group
from pyro_ext.evaluators import CHUNK_ELEMENTS
from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError, rounding

NUM_TESTS = 4
"""Least number of lines that every group is tested on."""


class NotMultilinearError(ValueError):
    """log p(v, h) is not multilinear in the groups of q, and too many would have to be enumerated."""


def groups_that_bend(
    program: Program, layout: Layout, groups: Sequence[Group], units: Sequence[Sequence[int]], joint: Sequence[int]
) -> list[int]:
    """The numbers of the groups that cannot be replaced by their means: `joint` ones, and those that are not affine.

    First all other groups are at random states of the support; where log p bends along a line from one state of a
    group to a point between its states, the group is not affine. Then the groups that passed are at random points
    between their states too, until no more fail: affine in each given any values of the others is multilinear.

    Args:
        program: the program.
        layout: where each feature stands.
        groups: all groups of q.
        units: feature sizes of each group's units.
        joint: numbers of the groups that are enumerated anyway.

    Raises:
        NotFiniteError: log p(v, h) is not finite at a state.
    """
    generator = torch.Generator().manual_seed(20190423)
    test = _Lines(program, layout, groups, units, generator)
    failed = set(joint) | test.failing(set(joint), relaxed=False)
    while True:
        more = test.failing(failed, relaxed=True)
        if not more:
            return sorted(failed)
        failed |= more


class _Lines:
    """Values of log p(v, h) along lines in one group, every row another group."""

    def __init__(
        self,
        program: Program,
        layout: Layout,
        groups: Sequence[Group],
        units: Sequence[Sequence[int]],
        generator: torch.Generator,
    ) -> None:
        self.program, self.layout, self.groups, self.generator = program, layout, groups, generator
        self.units = units
        self.width, self.rows = layout.num_features, program.rows.count

    def failing(self, held: set[int], *, relaxed: bool) -> set[int]:
        """Groups, beside the `held` ones, along which log p bends; held ones stand at states, others if not relaxed."""
        asked = [number for number in range(len(self.groups)) if number not in held]
        if not asked:
            return set()
        repeats = -(-NUM_TESTS * len(asked) // self.rows)
        order = torch.tensor(asked)[torch.arange(repeats * self.rows) % len(asked)].reshape(repeats, self.rows)
        base, start, stop = (torch.zeros(repeats, self.rows, self.width, dtype=torch.float64) for _ in range(3))
        for number, group in enumerate(self.groups):
            state, between = self._points(number, (repeats, self.rows))
            mine = (order == number)[..., None]
            base[..., group.positions.cpu()] = between if relaxed and number not in held else state
            start[..., group.positions.cpu()] = torch.where(mine, state, base[..., group.positions.cpu()])
            stop[..., group.positions.cpu()] = torch.where(mine, between, base[..., group.positions.cpu()])
        share = 0.1 + 0.8 * torch.rand(repeats, self.rows, generator=self.generator, dtype=torch.float64)
        there = torch.lerp(start, stop, share[..., None])
        first, last, middle = (self._log_joint(x) for x in (start, stop, there))
        if not relaxed:
            _check_finite(first)
        bend = (middle - torch.lerp(first, last, share.to(first))).abs()
        straight = bend <= rounding(first.dtype) * (1 + first.abs() + last.abs())
        return set(order[~straight.cpu()].tolist())

    def _points(self, number: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A random state of a group, and a random point between its states that is nearer to the others."""
        states, points = [], []
        for size in self.units[number]:
            classes = max(size, 2)
            picks = torch.randint(classes, shape, generator=self.generator)
            state = functional.one_hot(picks, classes).double()
            weights = torch.rand(*shape, classes, generator=self.generator, dtype=torch.float64) + 0.1
            # Away from the state, so that a threshold or an argmax lies on the line between the two.
            weights = torch.where(state > 0, 0.05 * weights, weights)
            point = weights / weights.sum(-1, keepdim=True)
            states.append(state[..., 1:] if size == 1 else state)
            points.append(point[..., 1:] if size == 1 else point)
        return torch.cat(states, -1), torch.cat(points, -1)

    def _log_joint(self, flat: Tensor) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // max(1, self.rows * self.width))
        found = []
        for part in flat.to(self.program.number).split(chunk):
            values, skip = self.layout.values(part), self.program.peelable
            with torch.no_grad():
                found.append(self.program.log_joint(values, skip=skip, num_particles=len(part)))
        return torch.cat(found).reshape(len(flat), self.rows)


def _check_finite(log_joint: Tensor) -> None:
    if not bool(torch.isfinite(log_joint).all()):
        number, row = (~torch.isfinite(log_joint)).nonzero()[0].tolist()
        raise NotFiniteError(
            "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got log p = "
            f"{float(log_joint[number, row]):g} in row {row}. Look for NaN in the data and in the parameters, and keep "
            "probabilities inside (0, 1)."
        )
