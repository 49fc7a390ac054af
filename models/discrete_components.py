"""Densities of discrete values: K tables of categories, K products of Bernoullis or of Poisson densities."""

# torch's stubs declare `support` as a property; every distribution sets it as an attribute.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from pyro_ext.selected import Components


class CategoricalComponents(Components):
    """K tables of probabilities over C categories, from their logs (K, C)."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        self.support = constraints.integer_interval(0, log_probs.shape[-1] - 1)

    def log_prob(self, v: Tensor) -> Tensor:
        return self.log_probs.mT[v.long()]

    def draw(self, h: Tensor) -> Tensor:
        probs = h @ self.log_probs.exp()
        return torch.multinomial(probs.flatten(0, -2), 1).reshape(probs.shape[:-1])


class BernoulliComponents(Components):
    """K products of D Bernoullis, from their logits (K, D)."""

    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, v: Tensor) -> Tensor:
        return torch.addmm(functional.logsigmoid(-self.logits).sum(-1), v, self.logits.mT)

    def draw(self, h: Tensor) -> Tensor:
        return torch.bernoulli((h @ self.logits).sigmoid())


class PoissonComponents(Components):
    """K products of D Poisson densities, with rates (K, D)."""

    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def log_prob(self, v: Tensor) -> Tensor:
        found = torch.addmm(-self.rates.sum(-1), v, self.rates.log().mT)
        return found - torch.lgamma(v + 1).sum(-1, keepdim=True)

    def draw(self, h: Tensor) -> Tensor:
        return torch.poisson(h @ self.rates)
