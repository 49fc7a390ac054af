"""Factors over whole paths: one Markov chain, or several that are coupled, a row (Saul and Jordan, 1996)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyro_ext.factors import Factor
from pyro_ext.forward_backward import Smoothed, best_path, smooth
from pyro_ext.markov_chain import ChainPaths, features_to_paths, joint_states, paths_to_features
from pyro_ext.memo import Memo

_SMOOTHED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The last sums over paths of a table's storage, compared by value: optimizers may write to it unseen."""

_SOLVED: Memo[Smoothed] = Memo()
"""The sums over paths that an E-step solved for: M-step and ledger ask for the same ones."""


class MarkovChainFactor(Factor):
    """Paths of chains of T steps; the parameters are their log-potentials.

    q(s) is proportional to exp(sum_t u_t(s_t) + sum_t P_t(s_{t-1}, s_t)) over the joint states s_t of the chains. The
    parameters are u, ``T * S`` numbers, then P, ``S * S`` numbers or ``(T - 1) * S * S``. The features are the one-hot
    paths, chain by chain, step by step.

    Args:
        units: number of states of each chain; S is their product.
        num_steps: T.
        homogeneous: one matrix P for all steps.
    """

    is_joint = True

    def __init__(self, units: Sequence[int], num_steps: int, *, homogeneous: bool = True) -> None:
        self.units, self.num_steps = tuple(units), num_steps
        self.homogeneous = homogeneous
        self.num_states = math.prod(units)
        self.size = num_steps * sum(units)
        self.num_matrices = 1 if homogeneous else num_steps - 1
        self.num_params = num_steps * self.num_states + self.num_matrices * self.num_states**2
        self.groups = (tuple(range(self.size)),)

    # ------------------------------------------------------------------ parameters

    def pack(self, unary: Tensor, pairwise: Tensor) -> Tensor:
        """Parameters ``(..., P)`` of potentials ``(..., T, S)`` and ``(..., 1 or T - 1, S, S)``."""
        matrices = pairwise.flatten(-3)
        return torch.cat([unary.flatten(-2), matrices.expand(unary.shape[:-2] + matrices.shape[-1:])], -1)

    def potentials(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Unary potentials ``(..., T, S)`` and pairwise ones ``(..., 1 or T - 1, S, S)``, nats."""
        cut = self.num_steps * self.num_states
        unary = params[..., :cut].reshape(params.shape[:-1] + (self.num_steps, self.num_states))
        shape = (self.num_matrices, self.num_states, self.num_states)
        return unary, params[..., cut:].reshape(params.shape[:-1] + shape)

    def smooth(self, params: Tensor) -> Smoothed:
        """The sums over all paths, with all leading dimensions of the parameters flattened into one."""
        if torch.is_grad_enabled() and params.requires_grad:
            return smooth(*self._flat(params))
        solved = _SOLVED.get(params, (self.units, self.num_steps, self.num_matrices))
        if solved is not None:
            return solved
        unary, pairwise = (x.detach() for x in self._flat(params))
        found = _SMOOTHED.get(params.untyped_storage())
        if found is None or not _belong(found, unary, pairwise):
            # Copies: a value that held on to its key would never be forgotten.
            found = smooth(unary.clone(), pairwise.clone())
            self.keep(params, found)
        return found

    def _flat(self, params: Tensor) -> tuple[Tensor, Tensor]:
        unary, pairwise = self.potentials(params)
        rows = (math.prod(params.shape[:-1]),)
        return unary.reshape(rows + unary.shape[-2:]), pairwise.reshape(rows + pairwise.shape[-3:])

    def keep(self, params: Tensor, found: Smoothed) -> None:
        """Keep the sums over paths that belong to these parameters; they must share no storage with them."""
        _SMOOTHED[params.untyped_storage()] = found

    # ------------------------------------------------------------------ moments

    def mean(self, params: Tensor) -> Tensor:
        return self.features(self.smooth(params)).reshape(params.shape[:-1] + (self.size,))

    def features(self, chain: Smoothed) -> Tensor:
        """Expected features ``(R, size)``."""
        if len(self.units) == 1:
            return chain.marginals.flatten(-2)
        return paths_to_features(chain.marginals @ joint_states(self.units, chain.marginals), self.units)

    def entropy(self, params: Tensor) -> Tensor:
        return self.smooth(params).entropy.reshape(params.shape[:-1])

    def second_moment(self, params: Tensor, quadratic: Tensor) -> Tensor:
        moments = self._moments(self.smooth(params))
        weights = quadratic.expand(params.shape[:-1] + quadratic.shape[-2:]).reshape(moments.shape)
        return (moments * weights).sum((-1, -2)).reshape(params.shape[:-1])

    def moment_sum(self, params: Tensor, weights: Tensor | None = None) -> Tensor:
        moments = self._moments(self.smooth(params))
        return (moments if weights is None else moments * weights[:, None, None]).sum(0)

    def _moments(self, chain: Smoothed) -> Tensor:
        """E[h h'] of each row, steps that are far apart included, ``(R, size, size)``: for short chains."""
        rows, steps, states = chain.marginals.shape
        onward = chain.pairs / chain.marginals[:, :-1, :, None].clamp_min(torch.finfo(chain.marginals.dtype).tiny)
        blocks = [[chain.marginals.new_zeros(rows, states, states)] * steps for _ in range(steps)]
        for first in range(steps):
            block = chain.marginals[:, first].diag_embed()
            blocks[first][first] = block
            for later in range(first + 1, steps):
                block = block @ onward[:, later - 1]
                blocks[first][later], blocks[later][first] = block, block.mT
        joint = torch.stack([torch.stack(line, 2) for line in blocks], 1)
        states = joint_states(self.units, joint)
        moments = joint.new_empty(rows, self.size, self.size)
        one, other = self._positions(joint.device)
        moments[:, one, other] = torch.einsum("ratbu,tg,uh->ragbh", joint, states, states)
        return moments

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices that take ``(..., size, size)`` to ``(..., T, G, T, G)``, G features a step."""
        index = features_to_paths(torch.arange(self.size, device=device), self.units, self.num_steps)
        return index[:, :, None, None], index[None, None]

    # ------------------------------------------------------------------ optima

    def initial(self, mean: Tensor, spread: float) -> Tensor:
        log_mean = features_to_paths(mean, self.units, self.num_steps).clamp_min(torch.finfo(mean.dtype).tiny).log()
        unary = log_mean @ joint_states(self.units, mean).mT
        return self.pack(unary, mean.new_zeros((self.num_matrices, self.num_states, self.num_states)))

    def solve_steps(self, unary: Tensor, pairwise: Tensor) -> tuple[Tensor, Smoothed]:
        """Parameters ``(R, P)`` of given potentials ``(R, T, S)``, ``(1 or R, 1 or T - 1, S, S)``, and their sums."""
        with torch.no_grad():
            found = smooth(unary, pairwise)
            params = self.pack(unary, pairwise.expand((-1, self.num_matrices, -1, -1)))
        # No optimizer owns these: a version counter tells whether they are still the same numbers.
        _SOLVED.set(params, found, (self.units, self.num_steps, self.num_matrices))
        return params, found

    def is_exact_for(self, quadratic: Tensor | None) -> bool:
        return quadratic is not None

    def optimum(self, linear: Tensor, quadratic: Tensor) -> Tensor:
        """The chain that maximises E_q[l'h + h'Qh / 2] + H(q), exactly.

        Raises:
            ValueError: Q couples steps that are no neighbours, or neighbours otherwise from step to step in a
                homogeneous factor.
        """
        states = joint_states(self.units, linear)
        one, other = self._positions(linear.device)
        coupling = torch.einsum("tg,...agbh,uh->...abtu", states, quadratic[..., one, other], states)
        steps = torch.arange(self.num_steps, device=linear.device)
        apart = (steps[:, None] - steps).abs()
        scale = coupling.abs().amax().clamp_min(1) * 64 * torch.finfo(linear.dtype).eps
        if bool((coupling[..., apart > 1, :, :].abs() > scale).any()):
            raise ValueError(
                "Expected couplings between neighbouring steps of a chain only, but got others. Put the steps that are "
                "coupled in a block of their own, `blocks=[[(site, steps)]]`."
            )
        own = 0.5 * coupling[..., steps, steps, :, :].diagonal(dim1=-2, dim2=-1)
        unary = features_to_paths(linear, self.units, self.num_steps) @ states.mT + own
        pairwise = coupling[..., steps[:-1], steps[1:], :, :]
        if self.homogeneous and self.num_steps == 1:
            pairwise = pairwise.new_zeros(pairwise.shape[:-3] + (1,) + pairwise.shape[-2:])
        elif self.homogeneous:
            if bool(((pairwise - pairwise[..., :1, :, :]).abs() > scale).any()):
                raise ValueError(
                    "Expected the same coupling between all neighbouring steps of a homogeneous chain, but got another "
                    "at some step. Give the prior one transition matrix a step."
                )
            pairwise = pairwise[..., :1, :, :]
        return self.pack(unary, pairwise)

    def from_scores(self, scores: Tensor) -> Tensor:
        """Parameters of the q proportional to exp(score), for scores of all joint paths.

        Raises:
            ValueError: the scores are no sum over single steps and neighbouring ones, or neighbours count otherwise
                from step to step in a homogeneous factor.
        """
        lead, steps, states = scores.shape[:-1], self.num_steps, self.num_states
        # Enumeration runs through one chain after the other; a joint state takes one step of each.
        table = scores.reshape(lead + tuple(size for size in self.units for _ in range(steps)))
        order = [len(lead) + chain * steps + t for t in range(steps) for chain in range(len(self.units))]
        table = table.permute(*range(len(lead)), *order).reshape(lead + (states,) * steps)
        first = (0,) * steps
        single = [table[(..., *first[:t], slice(None), *first[t + 1 :])] for t in range(steps)]
        unary = torch.stack(single, -2) - table[(..., *first)][..., None, None]
        pairs = [
            table[(..., *first[: t - 1], slice(None), slice(None), *first[t + 1 :])]
            - single[t - 1][..., :, None]
            - single[t][..., None, :]
            + table[(..., *first)][..., None, None]
            for t in range(1, steps)
        ]
        pairwise = torch.stack(pairs, -3) if pairs else unary.new_zeros(lead + (0, states, states))
        if self.homogeneous:
            same = pairwise if pairs else unary.new_zeros(lead + (1, states, states))
            pairwise = same[..., :1, :, :]
        total = table[(..., *first)].reshape(lead + (1,) * steps)
        for t in range(steps):
            total = total + unary[..., t, :].reshape(lead + (1,) * t + (states,) + (1,) * (steps - 1 - t))
            if t:
                pair = pairwise[..., 0 if self.homogeneous else t - 1, :, :]
                total = total + pair.reshape(lead + (1,) * (t - 1) + (states, states) + (1,) * (steps - 1 - t))
        if bool(((total - table).abs() > 1e4 * torch.finfo(scores.dtype).eps * (1 + table.abs())).any()):
            raise ValueError(
                "Expected log p(v, h) that is a sum over the steps of a chain and over neighbouring steps, but got one "
                "that couples others. Put the steps that are coupled in a block of their own."
            )
        return self.pack(unary, pairwise)

    # ------------------------------------------------------------------ distributions

    def mode(self, params: Tensor) -> Tensor:
        """The most probable joint path (Viterbi, 1967)."""
        path = best_path(*self._flat(params.detach()))
        values = joint_states(self.units, params)[path]
        return paths_to_features(values, self.units).reshape(params.shape[:-1] + (self.size,))

    def chains(self, start: int, stop: int) -> tuple[int, int]:
        """The first chain of some features, and one past the last.

        Raises:
            ValueError: the features cut through a chain.
        """
        edges = [0]
        for size in self.units:
            edges.append(edges[-1] + size * self.num_steps)
        if start not in edges or stop not in edges:
            raise ValueError(
                f"Expected a part of whole chains, but got features {start} to {stop}. Split between chains."
            )
        return edges.index(start), edges.index(stop)

    def conditional(self, params: Tensor, start: int, stop: int, earlier: Tensor) -> TorchDistributionMixin:
        first, last = self.chains(start, stop)
        return ChainPaths(*self.potentials(params), self.units, first, last, earlier if first else None)

    def marginal(self, params: Tensor, start: int, stop: int) -> TorchDistributionMixin:
        return ChainPaths(*self.potentials(params), self.units, *self.chains(start, stop))

    def columns(self, group: Sequence[int]) -> list[int]:
        return list(range(self.num_params))

    def part(self, group: Sequence[int]) -> MarkovChainFactor:
        return self


def _belong(found: Smoothed, unary: Tensor, pairwise: Tensor) -> bool:
    """Whether sums over paths are those of given potentials.

    The numbers themselves are compared: a version counter misses what optimizers write through ``.data``.
    """
    if found.unary.shape != unary.shape or found.unary.dtype != unary.dtype:
        return False
    if any(one not in (1, other) for one, other in zip(found.pairwise.shape, pairwise.shape, strict=True)):
        return False
    return torch.equal(found.unary, unary) and torch.equal(found.pairwise.expand_as(pairwise), pairwise)
