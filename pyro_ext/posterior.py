"""The result of inference: q of the latents, its marginals, and the sums that M-steps need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext.blocks import Block, site_distribution
from pyro_ext.chain_moments import pair_sum, time_gram
from pyro_ext.factors import CHUNK_ELEMENTS, Factor
from pyro_ext.layout import Layout
from pyro_ext.rows import Rows
from pyro_ext.sites import Kind, Site

NUM_MIXTURE_DRAWS = 128


@dataclass(frozen=True)
class Posterior:
    """q(h | v) as a product of factors.

    Attributes:
        rows: the rows it speaks of.
        sites: the latent sites, in the order in which q draws them.
        blocks: the factors.
        conditioner: parameters of a block, ``batch + (P,)``, given the values drawn so far.
        static: no factor depends on the value of another latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ext.guides import MeanField
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> posterior = MeanField(model).posterior(torch.zeros(3))
        >>> posterior["h"].mean
        tensor([0.5000, 0.5000, 0.5000])
    """

    rows: Rows
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    conditioner: Callable[[Block, Mapping[str, Tensor]], Tensor]
    static: bool = True

    @classmethod
    def from_parameters(
        cls, rows: Rows, sites: Sequence[Site], blocks: Sequence[Block], params: Mapping[str, Tensor]
    ) -> Posterior:
        """A posterior whose parameters are given, batch-shaped ``batch + (P,)``, for each block."""
        held = {name: value.detach() for name, value in params.items()}
        return cls(rows, tuple(sites), tuple(blocks), lambda block, _: held[block.name])

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name!r} ({site.kind.value})" for site in self.sites)
        return f"Posterior({sites}; {self.rows.count} rows)"

    @property
    def is_point(self) -> bool:
        """Whether some factor is a point mass."""
        return any(block.factor.is_point for block in self.blocks)

    def _holding(self, site: Site) -> list[Block]:
        return [b for b in self.blocks if b.span(site.name) is not None]

    def _distribution(self, site: Site, values: Mapping[str, Tensor]) -> TorchDistributionMixin:
        blocks = self._holding(site)
        params = {b.name: self.conditioner(b, values) for b in blocks}
        return site_distribution(site, blocks, params, values)

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draw all latents jointly: for each site ``(num_samples,) + batch + event``."""
        return self.sample_with_log_prob(num_samples)[0]

    def sample_with_log_prob(
        self, num_samples: int, *, reparametrised: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw all latents and give log q of the draws per row, ``(num_samples,) + rows.shape``, nats."""
        values, terms = self.sample_with_site_log_probs(num_samples, reparametrised=reparametrised)
        return values, sum(list(terms.values())[1:], next(iter(terms.values())))

    def sample_with_site_log_probs(
        self, num_samples: int, *, reparametrised: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `sample_with_log_prob`, with log q of each site apart, ``(num_samples,) + rows.shape``."""
        values: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        for site in self.sites:
            fn = self._distribution(site, values)
            if len(fn.batch_shape) <= len(site.batch_shape):
                fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, site.batch_shape))
            # A factor that reads earlier draws has their sample dimension already.
            shape = (num_samples,) if len(fn.batch_shape) == len(site.batch_shape) else ()
            value = fn.rsample(shape) if reparametrised and fn.has_rsample else fn.sample(shape).detach()
            values[site.name] = value
            terms[site.name] = self._to_rows(fn.log_prob(value), site)
        if not terms:
            raise RuntimeError("Expected a posterior with latent sites, but got none. Set the guide up first.")
        return values, terms

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """log q of given values ``(S,) + batch + event`` per row, ``(S,) + rows.shape``, nats."""
        terms = [self._to_rows(self._distribution(s, values).log_prob(values[s.name]), s) for s in self.sites]
        return sum(terms[1:], terms[0])

    def _to_rows(self, log_prob: Tensor, site: Site) -> Tensor:
        batch = len(site.batch_shape)
        leading = log_prob.shape[: log_prob.dim() - batch]
        ones = (1,) * (self.rows.nesting - batch)
        padded = log_prob.reshape(leading + ones + log_prob.shape[len(leading) :])
        inner = math.prod((f.full_size) / site.batch_shape[f.dim] for f in site.frames if f.name not in self.rows.names)
        return self.rows.sum_to_rows(padded) * inner

    def entropy(self) -> Tensor:
        """H(q) per row in nats, shape ``rows.shape``.

        For constrained latents the mean log-volume of their bijection is integrated as `Marginal.mean` is.

        Raises:
            ValueError: a factor depends on another latent's value; draw samples and use `log_prob`.
        """
        self._require_static("an entropy in closed form")
        terms: list[Tensor] = []
        for block in self.blocks:
            term = block.factor.entropy(self.conditioner(block, {}))
            terms.append(self._to_rows(term.expand(block.site.batch_shape), block.site))
        terms += [
            self[s.name].log_volume for s in self.sites if s.kind is Kind.CONSTRAINED and not self[s.name].is_point
        ]
        return sum(terms[1:], terms[0])

    def _require_static(self, what: str) -> None:
        if not self.static:
            raise ValueError(
                f"Expected factors that do not depend on each other's values for {what}, but got a guide with "
                "conditional factors. Use `sample` and `log_prob`."
            )

    def time_gram(self, names: Sequence[str], weights: Tensor | None = None) -> Tensor:
        """sum_n sum_t w_nt E[g_nt g_nt'], shape ``(G, G)``, where g joins the states of some Markov chains at one step.

        Args:
            names: the chains' sites, in the order in which g joins them; G is the sum of their numbers of states.
            weights: ``(R, T)``; None for ones.

        Raises:
            ValueError: a site that is no Markov chain under q.
        """
        self._require_static("second moments in closed form")
        return time_gram(self, names, weights)

    def mode(self) -> dict[str, Tensor]:
        """The most probable value of every block, for each site ``batch + event``: of a chain the best path (Viterbi).

        Raises:
            ValueError: a constrained continuous site, whose mode depends on the measure.
        """
        self._require_static("a mode in closed form")
        found: dict[str, Tensor] = {}
        for site in self.sites:
            if site.kind is Kind.CONSTRAINED and not self[site.name].is_point:
                raise ValueError(f"Expected unconstrained sites, but got the constrained {site.name!r}. Use `mean`.")
            marginal = self[site.name]
            features = marginal.place(lambda block, params: block.factor.mode(params))
            found[site.name] = site.from_features(features)
        return found

    def __getitem__(self, name: str) -> Marginal:
        """The marginal of one site."""
        for site in self.sites:
            if site.name == name:
                return Marginal(self, site)
        known = ", ".join(repr(site.name) for site in self.sites)
        raise KeyError(f"Expected a latent site ({known}), but got {name!r}. Visible sites have no posterior.")


@dataclass(frozen=True)
class Marginal:
    """q of one site: moments, entropy, draws, and sums over rows.

    Attributes:
        posterior: the posterior it belongs to.
        site: the site.
    """

    posterior: Posterior
    site: Site

    def __repr__(self) -> str:
        shape = tuple(self.site.batch_shape) + tuple(self.site.event_shape)
        return f"Marginal({self.site.name!r}, {self.site.kind.value}, shape {shape})"

    @cached_property
    def distribution(self) -> TorchDistributionMixin:
        """The marginal as a distribution, batch ``site.batch_shape``."""
        self.posterior._require_static("a marginal in closed form")
        blocks = self.posterior._holding(self.site)
        params = {b.name: self.posterior.conditioner(b, {}) for b in blocks}
        fn = site_distribution(self.site, blocks, params, None)
        return fn.expand(torch.broadcast_shapes(fn.batch_shape, self.site.batch_shape))

    @cached_property
    def features(self) -> Tensor:
        """E_q of the features, ``batch + (num_features,)``: probabilities for discrete sites."""
        if not self.posterior.static:
            with torch.random.fork_rng(devices=[]):
                values = self.posterior.sample(NUM_MIXTURE_DRAWS)
            return self.site.to_features(values[self.site.name]).mean(0)
        return self.place(lambda block, params: block.factor.mean(params))

    def place(self, function: Callable[[Block, Tensor], Tensor]) -> Tensor:
        """Collect a per-feature quantity of all blocks that hold the site, ``batch + (num_features,)``."""
        batch = self.site.batch_shape
        result: Tensor | None = None
        for block in self.posterior._holding(self.site):
            span = block.span(self.site.name)
            if span is None:
                continue
            value = function(block, self.posterior.conditioner(block, {}))[..., span[0] : span[1]]
            components = block.components(self.site.name)
            if components == tuple(range(self.site.num_features)):
                return value.expand(batch + value.shape[-1:])
            if result is None:
                result = value.new_zeros(batch + (self.site.num_features,))
            index = torch.tensor(components, device=value.device)
            result = result.index_copy(-1, index, value.expand(batch + value.shape[-1:]))
        if result is None:
            raise RuntimeError(f"Expected a block over {self.site.name!r}, but got none. Set the guide up first.")
        return result

    @property
    def is_point(self) -> bool:
        """Whether a point mass holds the site; another site's factor may have a density beside it."""
        return any(block.factor.is_point for block in self.posterior._holding(self.site))

    @cached_property
    def mean(self) -> Tensor:
        """E_q[h], ``batch + event``; probabilities of the classes ``batch + event + (K,)`` for categorical sites.

        Constrained sites are integrated by Gauss-Hermite quadrature where their bijection acts entry
        by entry, else by 4,096 draws.
        """
        if self.site.kind is not Kind.CONSTRAINED or self.is_point:
            return self.site.from_real(self.features.reshape(self.site.batch_shape + self.site.real_shape))
        if self._is_elementwise:
            return self._quadrature()
        return self.sample(4096).mean(0)

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Features ``(64,) + batch + (F,)`` of Gauss-Hermite quadrature, and the weights ``(64,)``."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        spread = self.place(lambda block, params: _scales(block, params))
        like = self.features
        x = torch.as_tensor(nodes).to(like).reshape((-1,) + (1,) * like.dim())
        return like + spread * x, torch.as_tensor(weights / weights.sum()).to(like)

    @property
    def _is_elementwise(self) -> bool:
        return self.site.real_shape == self.site.event_shape and self.posterior.static

    def _quadrature(self) -> Tensor:
        features, weights = self._nodes()
        values = self.site.from_features(features)
        return (weights.reshape((-1,) + (1,) * (values.dim() - 1)) * values).sum(0)

    @cached_property
    def log_volume(self) -> Tensor:
        """E_q[log |det dT/du|] of a constrained site's bijection T per row, nats: what it adds to the entropy."""
        if self._is_elementwise:
            features, weights = self._nodes()
        else:
            features = self.site.to_features(self.sample(4096))
            weights = features.new_full((4096,), 1 / 4096)
        real = features.reshape(features.shape[:-1] + self.site.real_shape)
        volume = self.site.transform.log_abs_det_jacobian(real, self.site.transform(real))
        volume = volume.reshape(features.shape[:-1] + (-1,)).sum(-1)
        mean = (weights.reshape((-1,) + (1,) * (volume.dim() - 1)) * volume).sum(0)
        return self.posterior._to_rows(mean, self.site)

    @property
    def probs(self) -> Tensor:
        """Probabilities of a discrete site: of one for binary units, of each class for the others."""
        if not self.site.kind.is_discrete:
            raise ValueError(
                f"Expected a discrete site, but got the {self.site.kind.value} site {self.site.name!r}. Use `mean`."
            )
        return self.mean

    def sample(self, num_samples: int) -> Tensor:
        """Draws ``(num_samples,) + batch + event``, from the joint q."""
        with torch.no_grad():
            return self.posterior.sample(num_samples)[self.site.name]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), batch-shaped, nats."""
        return self.distribution.log_prob(value)

    def entropy(self) -> Tensor:
        """Entropy of the marginal per row, nats (see `Posterior.entropy`)."""
        blocks = self.posterior._holding(self.site)
        self.posterior._require_static("an entropy in closed form")
        terms: list[Tensor] = []
        for block in blocks:
            span = block.span(self.site.name)
            params = self.posterior.conditioner(block, {})
            if span is None:
                continue
            whole = len(block.parts) == 1
            term = block.factor.entropy(params) if whole else block.factor.marginal(params, *span).entropy()
            terms.append(self.posterior._to_rows(term.expand(self.site.batch_shape), self.site))
        if self.site.kind is Kind.CONSTRAINED and not self.is_point:
            terms.append(self.log_volume)
        return sum(terms[1:], terms[0])

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self.posterior.rows, [self.site])

    @cached_property
    def _flat(self) -> Tensor:
        rows = self._layout.to_rows(self.features, self.site)
        return rows.reshape(rows.shape[0], -1)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """sum_n w_n E[h_n], shape ``(F,)``; weights ``(R,)``."""
        return self._flat.sum(0) if weights is None else weights @ self._flat

    def cross(self, x: Tensor) -> Tensor:
        """sum_n E[h_n] x_n', shape ``(F, D)``, for x of shape ``(R, D)``."""
        return self._flat.mT @ x

    def pairwise(self, weights: Tensor | None = None) -> Tensor:
        """sum_n sum_t w_nt E[h_{n,t-1} h_nt'] of a Markov chain, shape ``(K, K)``: expected numbers of transitions.

        Args:
            weights: of the transition into each step from the second on, ``(R, T - 1)``; None for ones.

        Raises:
            ValueError: the site is no Markov chain under q.
        """
        self.posterior._require_static("second moments in closed form")
        return pair_sum(self.posterior, self.site, weights)

    def mode(self) -> Tensor:
        """The most probable value, ``batch + event``; see `Posterior.mode`."""
        return self.posterior.mode()[self.site.name]

    def gram(self, weights: Tensor | None = None) -> Tensor:
        """sum_n w_n E[h_n h_n'], shape ``(F, F)``, covariances under q included; weights ``(R,)``."""
        self.posterior._require_static("second moments in closed form")
        flat = self._flat
        result = (flat if weights is None else flat * weights[:, None]).mT @ flat
        for block in self.posterior._holding(self.site):
            params = self._layout.to_rows(self.posterior.conditioner(block, {}), self.site)
            span = block.span(self.site.name)
            if span is None:
                continue
            local = torch.as_tensor(block.components(self.site.name))
            for copy in range(params.shape[1]):
                index = copy * self.site.num_features + local
                moments = block.factor.moment_sum(params[:, copy].detach(), weights)
                # Within a block the product of means is no second moment.
                result[index[:, None], index[None, :]] = moments[span[0] : span[1], span[0] : span[1]]
        return result

    def grams(self, weights: Tensor) -> Tensor:
        """sum_n w_nj E[h_n h_n'] for every j, shape ``(W, F, F)``, for weights ``(R, W)``; see `gram`."""
        flat = self._flat
        size = flat.shape[1]
        result = flat.new_zeros(weights.shape[1], size * size)
        rows = max(1, CHUNK_ELEMENTS // size**2)
        for mean, weight in zip(flat.split(rows), weights.split(rows), strict=True):
            result.addmm_(weight.mT, (mean[:, :, None] * mean[:, None, :]).flatten(1))
        result = result.unflatten(1, (size, size))
        return self._with_blocks(result, lambda factor, params: factor.moment_sums(params, weights))

    def second_moments(self) -> Tensor:
        """E[h_n h_n'] row by row, shape ``(R, F, F)``; `gram` and `grams` sum them without holding them."""
        flat = self._flat
        result = flat[:, :, None] * flat[:, None, :]
        return self._with_blocks(result, lambda factor, params: factor.second_moments(params))

    def _with_blocks(self, result: Tensor, moments: Callable[[Factor, Tensor], Tensor]) -> Tensor:
        """Products of means ``(..., F, F)``, with the second moments of every block in their places."""
        self.posterior._require_static("second moments in closed form")
        for block in self.posterior._holding(self.site):
            params = self._layout.to_rows(self.posterior.conditioner(block, {}), self.site)
            span = block.span(self.site.name)
            if span is None:
                continue
            local = torch.as_tensor(block.components(self.site.name))
            for copy in range(params.shape[1]):
                index = copy * self.site.num_features + local
                found = moments(block.factor, params[:, copy].detach())
                result[..., index[:, None], index[None, :]] = found[..., span[0] : span[1], span[0] : span[1]]
        return result


def _scales(block: Block, params: Tensor) -> Tensor:
    factor = block.factor
    columns = [factor.marginal(params, i, i + 1) for i in range(factor.size)]
    return torch.stack([fn.stddev.squeeze(-1) for fn in columns], -1)
