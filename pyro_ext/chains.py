"""L and its coordinate maxima where all latents are Markov chains: forward-backward chain by chain (19.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.chain_form import ChainForm
from pyro_ext.evaluators import Evaluator, Parameters
from pyro_ext.forward_backward import Smoothed, smooth, times
from pyro_ext.markov_chain import features_to_paths, joint_states


class Chains(Evaluator):
    """L and its coordinate maxima from the step-by-step form of a program of Markov chains.

    With one factor over all chains a single sweep is the exact posterior; with one a chain it is the structured
    approximation of Ghahramani and Jordan (1997).

    Args:
        form: b, J and the transitions of the program.
        blocks: factors of whole chains.
    """

    def __init__(self, form: ChainForm, blocks: Sequence[Block]) -> None:
        self.form = form
        self.layout = form.layout
        self.blocks = tuple(blocks)
        edges = [sum(form.units[:i]) for i in range(len(form.units) + 1)]
        names = [site.name for site in form.layout.sites]
        self._chains = [[names.index(site.name) for site, _ in block.parts] for block in self.blocks]
        self._columns = [
            torch.tensor([g for chain in chains for g in range(edges[chain], edges[chain + 1])])
            for chains in self._chains
        ]

    @staticmethod
    def serves(blocks: Sequence[Block]) -> bool:
        """Whether all factors are those of whole chains."""
        return all(isinstance(block.factor, MarkovChainFactor) for block in blocks)

    @property
    def exact_posterior(self) -> bool:
        """Whether one factor holds all chains."""
        return len(self.blocks) == 1

    def _factor(self, number: int) -> MarkovChainFactor:
        factor = self.blocks[number].factor
        if not isinstance(factor, MarkovChainFactor):
            raise TypeError(f"Expected factors of whole chains, but got {type(factor).__name__}. Use MeanField.")
        return factor

    def _pairwise(self, number: int) -> Tensor:
        """The transitions of a block's chains as scores of pairs of joint states."""
        factor, chains = self._factor(number), self._chains[number]
        if len(chains) == 1:
            return self.form.transitions[chains[0]]
        states = joint_states(factor.units, self.form.linear).split(factor.units, -1)
        lifted = (s @ self.form.transitions[c] @ s.mT for s, c in zip(states, chains, strict=True))
        return sum(lifted, torch.zeros(()))

    def _within(self, number: int) -> Tensor | None:
        """h'Jh / 2 of a block's joint states, ``(1 or R, 1 or T, S)``."""
        if self.form.coupling is None:
            return None
        factor, mine = self._factor(number), self._columns[number]
        own = self.form.coupling[..., mine[:, None], mine]
        states = joint_states(factor.units, own)
        return 0.5 * ((states @ own) * states).sum(-1)

    def _field(self, number: int, means: Tensor) -> Tensor:
        """The linear score of a block's features given the means of the other chains, ``(R, T, k)``."""
        mine = self._columns[number]
        field = self.form.linear if len(self.blocks) == 1 else self.form.linear[..., mine]
        if self.form.coupling is None or len(self.blocks) == 1:
            return field
        others = torch.ones(means.shape[-1], dtype=torch.bool)
        others[mine] = False
        rest = others.nonzero().squeeze(-1)
        return field + times(means[..., rest], self.form.coupling[..., rest[:, None], mine])

    def _unary(self, number: int, means: Tensor) -> Tensor:
        """Scores of a block's joint states, ``(R, T, S)``."""
        factor, field = self._factor(number), self._field(number, means)
        scores = field if len(factor.units) == 1 else field @ joint_states(factor.units, field).mT
        within = self._within(number)
        return scores if within is None else scores + within

    def _solve(self, number: int, means: Tensor) -> tuple[Tensor, Smoothed]:
        return self._factor(number).solve_steps(self._unary(number, means), self._pairwise(number))

    def _timed_means(self, params: Parameters) -> Tensor:
        """E_q of all chains' states, ``(R, T, G)``."""
        means = torch.empty_like(self.form.linear)
        for number, block in enumerate(self.blocks):
            factor = self._factor(number)
            mean = factor.mean(params[block.name][:, 0])
            means[..., self._columns[number]] = features_to_paths(mean, factor.units, factor.num_steps)
        return means

    def solve(self) -> tuple[Parameters, Tensor]:
        params, chain = self._solve(0, self.form.linear)
        return {self.blocks[0].name: params[:, None]}, self.form.constant + chain.log_normalizer

    def log_evidence(self) -> Tensor:
        """log p(v) per row ``(R,)``, nats, where one factor holds all chains."""
        chain = smooth(self._unary(0, self.form.linear), self._pairwise(0))
        return self.form.constant + chain.log_normalizer

    def sweep(self, params: Parameters) -> Parameters:
        means, result = self._timed_means(params), dict(params)
        for number, block in enumerate(self.blocks):
            new, chain = self._solve(number, means)
            result[block.name] = new[:, None]
            means[..., self._columns[number]] = self._state_means(number, chain)
        return result

    def jump(self, params: Parameters) -> Parameters:
        means = self._timed_means(params)
        return {b.name: self._solve(number, means)[0][:, None] for number, b in enumerate(self.blocks)}

    def _state_means(self, number: int, chain: Smoothed) -> Tensor:
        factor = self._factor(number)
        single = len(factor.units) == 1
        return chain.marginals if single else chain.marginals @ joint_states(factor.units, chain.marginals)

    def bound(self, params: Parameters) -> Tensor:
        form = self.form
        total = form.constant
        chains = [self._factor(i).smooth(params[b.name][:, 0]) for i, b in enumerate(self.blocks)]
        parts = [self._state_means(i, chain) for i, chain in enumerate(chains)]
        for number, chain in enumerate(chains):
            mine = self._columns[number]
            scores = form.linear if len(chains) == 1 else form.linear[..., mine]
            if len(self._factor(number).units) > 1:
                scores = scores @ joint_states(self._factor(number).units, scores).mT
            within = self._within(number)
            scores = scores if within is None else scores + within
            total = total + chain.objective(scores, self._pairwise(number))
            if form.coupling is None:
                continue
            for other in range(number):
                between = form.coupling[..., self._columns[other][:, None], mine]
                total = total + (times(parts[other], between) * parts[number]).sum((-1, -2))
        return total
