"""Sampled fixed points: stochastic natural-gradient steps for programs that nothing exact serves (19.56)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.colours import Group, groups_of
from pyro_ext.evaluators import (
    CHUNK_ELEMENTS,
    Evaluator,
    NoEvaluatorError,
    Parameters,
    check_rows_apart,
    group_units,
)
from pyro_ext.layout import Layout
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError
from pyro_ext.sites import Kind
from pyro_ext.states import enumerate_states


@dataclass(frozen=True)
class Sampled:
    """Estimates of the optima (19.56) from samples of q, for discrete latents whatever the program.

    Sweep t moves every group's natural parameters by a stochastic natural-gradient step,

        lambda_i <- (1 - rho_t) lambda_i + rho_t * E[log p(v, h)] as a function of the states of h_i,
        rho_t = step_size * (1 + t) ** -decay,  t = 0, 1, ...

    The expectation over the other groups is a mean over samples that all states of h_i share (Rao-Blackwellised; the
    estimate is unbiased). A sweep runs the program num_samples times for every state of every group. L is estimated
    too, with a standard error, and ledger and evidence say that it is sampled.

    Hoffman, Blei, Wang and Paisley (2013) take such steps; with decay in (0.5, 1] they converge (Robbins and Monro).

    Args:
        num_samples: samples of the other groups in every estimate.
        step_size: rho_0, in (0, 1].
        decay: how fast the steps shrink, in [0, 1]; 1 averages all sweeps, 0 keeps the step and its noise.
        num_bound_samples: samples of the estimate of L.

    Raises:
        ValueError: settings outside their ranges.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_ext import EM, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):  # 2^40 states, and not quadratic
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.1).expand([40]).to_event(1))
        ...         pyro.sample("v", dist.Bernoulli(1 - 0.9 * 0.5 ** h.sum(-1)), obs=v)
        >>> e_step = FixedPoint(evaluator=Sampled(num_samples=4), max_sweeps=3)
        >>> em = EM(model, MeanField(model), e_step=e_step, m_step=None)
        >>> em.run(torch.ones(2), max_steps=1, progress=False).ledger[0].exact
        False
    """

    num_samples: int = 64
    step_size: float = 1.0
    decay: float = 0.7
    num_bound_samples: int = 256

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_bound_samples", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected {name} of at least {least}, but got {value!r}. More samples, less noise.")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"Expected step_size in (0, 1], but got {self.step_size!r}. 1 starts at the estimate.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"Expected decay in [0, 1], but got {self.decay!r}. 0 keeps the step size.")

    def build(self, program: Program, blocks: Sequence[Block]) -> SampledEvaluator:
        """The evaluator of one program at the present theta.

        Raises:
            NoEvaluatorError: continuous latents, or point masses.
        """
        return SampledEvaluator(program, blocks, self)


class SampledEvaluator(Evaluator):
    """Estimates of L and of its coordinate maxima.

    Args:
        program: the program.
        blocks: the factors of q.
        settings: numbers of samples and step sizes.

    Raises:
        NoEvaluatorError: continuous latents, or point masses.
    """

    exact = False

    def __init__(self, program: Program, blocks: Sequence[Block], settings: Sampled) -> None:
        self.program, self.blocks, self.settings = program, tuple(blocks), settings
        self.layout = Layout(program.rows, program.latents)
        _refuse_unsuitable(program, self.blocks)
        check_rows_apart(program, self.layout)
        self._index = [self.indices(b).to(program.number.device) for b in self.blocks]
        self._groups = groups_of(self.blocks, self._index)
        self._sweeps = 0
        widest = max(program.trace.nodes[name]["fn"].event_shape.numel() for name in program.visible)
        self._chunk = max(1, CHUNK_ELEMENTS // (program.rows.count * max(widest, self.layout.num_features)))

    def _log_joint(self, flat: Tensor) -> Tensor:
        """log p(v, h) at ``(S, R, F)``, shape ``(S, R)``."""
        found = [
            self.program.log_joint(self.layout.values(part), num_particles=len(part)).reshape(len(part), -1)
            for part in flat.split(self._chunk)
        ]
        log_joint = torch.cat(found)
        if not bool(torch.isfinite(log_joint).all()):
            draw, row = (~torch.isfinite(log_joint)).nonzero()[0].tolist()
            raise NotFiniteError(
                "Expected p(v, h) above 0 and finite on every state (the proviso of 19.56), but got log p = "
                f"{float(log_joint[draw, row]):g} at a sampled state of row {row}. Keep probabilities inside (0, 1)."
            )
        return log_joint

    def _draw(self, params: Parameters, count: int) -> Tensor:
        """Samples of q, ``(count, R, F)``."""
        first = params[self.blocks[0].name]
        flat = first.new_zeros(count, self.layout.rows.count, self.layout.num_features)
        for group in self._groups:
            self._redraw(flat, params, group)
        return flat

    def _redraw(self, flat: Tensor, params: Parameters, group: Group) -> None:
        factor = group.block.factor.part(group.features)
        columns = params[group.block.name][:, group.copy, group.block.factor.columns(group.features)]
        draws = factor.marginal(columns.detach(), 0, factor.size).sample(torch.Size([len(flat)]))
        flat[..., group.positions] = draws.to(flat)

    def estimate_bound(self, params: Parameters) -> tuple[Tensor, Tensor]:
        """An unbiased estimate of L per row and its standard error, both ``(R,)``, nats; the entropy is exact."""
        with torch.no_grad():
            log_joint = self._log_joint(self._draw(params, self.settings.num_bound_samples))
        error = log_joint.std(0) / len(log_joint) ** 0.5
        return log_joint.mean(0) + self.entropy(params), error

    def bound(self, params: Parameters) -> Tensor:
        return self.estimate_bound(params)[0]

    def scores(self, groups: Sequence[Group], flat: Tensor) -> list[Tensor]:
        """For each group the mean of log p(v, h) over the samples of the others, for each of its states: ``(R, U)``."""
        rooms = []
        for group in groups:
            states = enumerate_states(group_units(group.block, group.features), device=flat.device).to(flat)
            there = flat.expand(len(states), *flat.shape).clone()
            there[..., group.positions] = states[:, None, None, :]
            rooms.append(there)
        log_joint = self._log_joint(torch.cat([room.flatten(0, 1) for room in rooms]))
        parts = log_joint.split([room.shape[0] * room.shape[1] for room in rooms])
        return [part.unflatten(0, room.shape[:2]).mean(1).mT for part, room in zip(parts, rooms, strict=True)]

    def _write(self, params: Parameters, group: Group, scores: Tensor, step: float) -> None:
        factor = group.block.factor.part(group.features)
        columns = group.block.factor.columns(group.features)
        table = params[group.block.name]
        new = factor.from_scores(scores / self.weight(group.block))
        table[:, group.copy, columns] = factor.interpolate(table[:, group.copy, columns], new, 1 - step)

    def _next_step(self) -> float:
        step = self.settings.step_size * (1 + self._sweeps) ** -self.settings.decay
        self._sweeps += 1
        return step

    def sweep(self, params: Parameters) -> Parameters:
        step = self._next_step()
        params = {name: value.clone() for name, value in params.items()}
        with torch.no_grad():
            flat = self._draw(params, self.settings.num_samples)
            for group in self._groups:
                self._write(params, group, self.scores([group], flat)[0], step)
                self._redraw(flat, params, group)
        return params

    def jump(self, params: Parameters) -> Parameters:
        step = self._next_step()
        params = {name: value.clone() for name, value in params.items()}
        with torch.no_grad():
            flat = self._draw(params, self.settings.num_samples)
            together = max(1, self._chunk // (2 * len(flat)))
            for start in range(0, len(self._groups), together):
                groups = self._groups[start : start + together]
                for group, scores in zip(groups, self.scores(groups, flat), strict=True):
                    self._write(params, group, scores, step)
        return params

    def solve(self) -> tuple[Parameters, Tensor]:
        raise NoEvaluatorError(
            "Expected an exact evaluator to solve for the posterior, but got samples. Sweep instead."
        )


def _refuse_unsuitable(program: Program, blocks: Sequence[Block]) -> None:
    continuous = [s.name for s in program.latents if s.kind not in (Kind.BINARY, Kind.ONE_HOT, Kind.CATEGORICAL)]
    if continuous:
        raise NoEvaluatorError(
            f"Expected binary, one-hot or categorical latents for Sampled(), but got "
            f"{', '.join(map(repr, continuous))}. Use `Gradient`, or pyro.infer.SVI."
        )
    points = [b.name for b in blocks if b.factor.is_point]
    if points:
        raise NoEvaluatorError(
            f"Expected factors with a spread for Sampled(), but got the point masses {', '.join(map(repr, points))}. "
            "Use MeanField or Structured."
        )
