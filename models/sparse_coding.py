"""Sparse coding: data as sums of few atoms of a dictionary (section 19.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_noise, check_statistics

from .base import Model, assign_parameters, read_parameter
from .dictionaries import ColumnNorm, Dictionary
from .missing import column_mean_and_variance, column_moments, observed_entries
from .shared_scale import SharedScaleNormal
from .sparse_priors import LaplacePrior, SparsePrior


class SparseCoding(Model):
    r"""Gaussian data around W h + bias, with a prior that makes most latents (nearly) zero.

    .. math::
        p(h_i) = \tfrac{\lambda_i}{2} e^{-\lambda_i |h_i|} \quad (19.14), \qquad
        p(v | h) = N(v; W h + \mathrm{bias}, \beta^{-1} I) \quad (19.15)

    and so, up to a constant, in nats per row,

    .. math:: -\log p(h, v) = \tfrac{\beta}{2} |v - W h - \mathrm{bias}|^2 + \sum_i \lambda_i |h_i|.

    (19.16), |h|_1 + |v - W h|^2, is beta = 2 and rate = 1. scikit-learn's |v - W h|^2 / 2 + alpha |h|_1 has
    alpha = rate / beta.

    The posterior is intractable. MAP inference, q(h | v) a point (`Dirac`), makes learning (19.16), alternately in h
    and in W. Atoms must not grow without end meanwhile, which is the dictionary's rule: see `ColumnNorm` and
    `WeightDecay`.

    Sites: ``"h"``, shape (N, H); ``"v"``, shape (N, D); the factor ``"weight_decay"`` with `WeightDecay`.

    Args:
        num_visible: number D of visible variables.
        num_latents: number H of latent variables.
        rate: short for ``prior=LaplacePrior(rate)``: a number or one for each latent, (H,); 1 by default.
        prior: the density of h: `LaplacePrior`, `ExponentialPrior` (h >= 0), `StudentTPrior` or `CauchyPrior`.
            Its hyperparameters are buffers, and not learned: jointly with points h, log p(h, v) rises without bound
            in them, see `SparsePrior`.
        beta: precision of the noise; the first one with `learn_noise`.
        dictionary: the rule for W; ``ColumnNorm(radius=1.0)`` by default.
        bias: whether to learn one; else it is 0, for data that are centred.
        learn_noise: whether beta is a parameter. The scale of h, and so of the penalty, hangs on it.
        variance_floor: least noise variance 1 / beta that `maximize` and `initialize` give with `learn_noise`, in
            squared units of v; 0 sets no limit.
        name: see `Model`.

    Attributes:
        W: dictionary, shape (D, H), with the atoms in the columns.
        bias: shape (D,); a parameter, or a buffer of zeros.
        beta: precision, shape (); a buffer, or a parameter with `learn_noise`.
        prior, dictionary: as given. The prior's hyperparameters are the buffers ``rate``, ``df`` or ``scale``.
        shift: buffer, shape (D,); `statistics` takes moments around it, which saves digits when the data lie far
            from 0. `initialize` sets it to the data mean. Do not add statistics from before and after that.

    Raises:
        ValueError, TypeError: D or H is no positive int; a rate, scale or beta that is not positive and finite, or a
            rate of another shape; both rate and prior; a prior or dictionary that is none; a negative floor.

    Example:
        >>> from pyro_ext import EM, ClosedForm, Maximize
        >>> from pyro_ext.guides import Dirac
        >>> model = SparseCoding(num_visible=16, num_latents=24, rate=1.0, beta=10.0)
        >>> em = EM(model, Dirac(model), e_step=Maximize(), m_step=ClosedForm())
        >>> em.run(torch.randn(50, 16), max_steps=3, progress=False).steps
        3
    """

    W: Tensor
    bias: Tensor
    beta: Tensor
    shift: Tensor

    def __init__(
        self,
        num_visible: int,
        num_latents: int,
        *,
        rate: float | Tensor | None = None,
        prior: SparsePrior | None = None,
        beta: float = 1.0,
        dictionary: Dictionary | None = None,
        bias: bool = True,
        learn_noise: bool = False,
        variance_floor: float = 1e-6,
        name: str | None = None,
    ) -> None:
        check_count(num_visible, "num_visible")
        check_count(num_latents, "num_latents")
        prior = _prior(rate, prior)
        hyperparameters = prior.hyperparameters()
        for key, value in hyperparameters.items():
            if value.shape not in ((), (num_latents,)):
                raise ValueError(
                    f"Expected {key} of shape () or ({num_latents},), but got {tuple(value.shape)}. "
                    "Pass a number, or one for each latent."
                )
        dictionary = ColumnNorm() if dictionary is None else dictionary
        if not isinstance(dictionary, Dictionary):
            raise TypeError(
                f"Expected dictionary to be a Dictionary, but got {dictionary!r}. Pass ColumnNorm() or "
                "WeightDecay(rate), for example."
            )
        if not 0 < beta < math.inf:
            raise ValueError(f"Expected a positive and finite beta, but got {beta}. It is 1 / variance of the noise.")
        if not variance_floor >= 0:
            raise ValueError(f"Expected variance_floor >= 0, but got {variance_floor}. Pass 0 for no floor.")
        super().__init__(num_visible, name=name)
        self.num_latents = num_latents
        self.prior, self.dictionary = prior, dictionary
        self.learn_noise, self.variance_floor = bool(learn_noise), float(variance_floor)
        for key, value in hyperparameters.items():
            self.register_buffer(key, value)
        self.register_buffer("shift", torch.zeros(num_visible))
        atoms = torch.randn(num_visible, num_latents) / math.sqrt(num_visible)
        self.declare("W", dictionary.start(atoms), dictionary.constraint)
        self.learn_bias = bool(bias)
        if bias:
            self.declare("bias", torch.zeros(num_visible))
        else:
            self.register_buffer("bias", torch.zeros(num_visible))
        if learn_noise:
            self.declare("beta", torch.tensor(float(beta)), constraints.positive)
        else:
            self.register_buffer("beta", torch.tensor(float(beta)))

    def forward(self, v: Tensor | None = None, *, mask: Tensor | None = None, size: int | None = None) -> Tensor:
        """Run the program on v, shape (N, D), or dream `size` rows; returns v.

        Entries of v where the mask, boolean of v's shape, is False count nothing and are never read.
        """
        W, bias, scale = self.W, self.bias, self.beta.rsqrt()
        values = {name: getattr(self, name) for name in self.prior.hyperparameters()}
        penalty = self.dictionary.log_penalty(W)
        with self.data_plate(v, size):
            h = pyro.sample("h", self.prior.distribution(values, self.num_latents))
            if penalty is not None:
                pyro.factor("weight_decay", penalty)
            v_given_h = SharedScaleNormal(h @ W.T + bias, scale)
            return pyro.sample("v", self.hide(v_given_h, v, mask).to_event(1), obs=v)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q with x = v - shift, summed over rows.

        Under a mask each visible column has sums of its own, over the rows where it is observed. They broadcast
        against the shared ones: statistics of masked and of complete batches add up.

        Returns:
            ``count`` (), the number of rows; ``observed`` () or (D,), that of observed entries of a column; ``sum``
            (H,) or (D, H), sum_n E[h_n]; ``gram`` (H, H) or (D, H, H), sum_n E[h_n h_n^T]; ``cross`` (H, D),
            sum_n E[h_n] x_n^T; ``total`` (D,), sum_n x_n; ``square`` (D,), sum_n x_n^2.

        Raises:
            ValueError: a point mass where the dictionary is `Unconstrained`; no point mass where h >= 0.
        """
        mask, h = data.get("mask"), posterior["h"]
        is_point = bool(getattr(posterior, "is_point", False))
        if is_point and not self.dictionary.bounded:
            raise ValueError(
                f"Expected a dictionary that bounds W for point masses, but got {self.dictionary!r}: as W grows and h "
                "shrinks, log p(h, v) rises and has no maximum. Pass dictionary=ColumnNorm() or WeightDecay(rate), or "
                "take a guide with a spread, such as MeanField."
            )
        if self.prior.nonnegative:
            if not is_point:
                raise ValueError(
                    f"Expected a point mass for {type(self.prior).__name__}, but got {posterior!r}: other factors "
                    "hold the moments of log h, not those of h. Use `Dirac`, or m_step=Gradient(optim)."
                )
            h = _Points(h.mean)
        x = observed_entries(data["v"] - self.shift, mask)
        return {
            "count": x.new_tensor(x.shape[0]),
            **column_moments(h, x, mask),
            "cross": h.cross(x),
            "total": x.sum(0),
            "square": x.square().sum(0),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set W and the bias to their joint maximum, and then the noise with the new ones, where it is learned.

        The bias is eliminated: given W it is the mean of v - W h, so that W is found from centred moments. W stays
        where the objective is flat (atoms that no row uses; columns of v that no row observes, as far as the norms
        leave it free); so does the bias of a column that no row observes.

        With `ColumnNorm` the best W does not depend on beta, and all three are at their joint maximum. With
        `WeightDecay`, W is the best one at the old beta: the two steps are coordinate ascent. With
        `BlockCoordinateDescent`, W is better than before, not best.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: the noise variance vanishes while `variance_floor` is 0; nothing has been changed then.
        """
        check_statistics(statistics, "observed", "sum", "gram", "cross", "total", "square")
        moments = {name: value.double() for name, value in statistics.items()}
        observed, total = moments["observed"].expand(self.num_visible), moments["total"]
        gram, cross, square, sums = moments["gram"], moments["cross"].mT, moments["square"], moments["sum"]
        # 0 / 0: a column that no row observes.
        seen = observed > 0
        mean = torch.where(seen, total / observed, 0)
        average = (sums / moments["observed"].unsqueeze(-1)).nan_to_num()
        if self.learn_bias:
            gram = _centred(gram, sums, average, torch.finfo(statistics["gram"].dtype).eps)
            cross = (cross - sums * mean.unsqueeze(-1)) * (gram.diagonal(dim1=-2, dim2=-1) > 0)
            square = square - total * mean
        old, beta = read_parameter(self, "W"), self._read("beta")
        W = self.dictionary.maximize(gram, cross, old.double(), count=moments["count"], beta=beta.double())
        values = {"W": W.to(old.dtype)}
        if self.learn_bias:
            bias = self.shift + mean - (W * average).sum(-1)
            values["bias"] = torch.where(seen, bias, read_parameter(self, "bias")).to(old.dtype)
        if self.learn_noise:
            energy = (W @ gram if gram.dim() == 2 else (gram @ W.unsqueeze(-1)).squeeze(-1)) * W
            residual = (square - 2 * (W * cross).sum(-1) + energy.sum(-1)).sum()
            variance = (residual / observed.sum()).clamp(min=self.variance_floor)
            check_noise(variance)
            values["beta"] = (1 / variance).to(old.dtype)
        assign_parameters(self, values)

    def _read(self, name: str) -> Tensor:
        """The value of a parameter, or of the buffer in its place."""
        return read_parameter(self, name) if name in self._pyro_params else getattr(self, name)

    @torch.no_grad()
    def initialize(self, v: Tensor, *, mask: Tensor | None = None) -> None:
        """Start from rows of the data as atoms, the data's mean as bias, and a tenth of their variance as noise.

        The atoms are random rows without the bias, hidden entries filled by 0, plus a tenth of the data's standard
        deviation of noise. `ColumnNorm` gives them their full length. Bias and noise move only where they are learned.

        Raises:
            TypeError, ValueError: see `check_data`; or a column that the mask hides in every row; or data without any
                variance (around 0 without a bias).
        """
        self.check_data(v, mask=mask)
        mean, variance, observed = column_mean_and_variance(v, mask)
        if not self.learn_bias:
            variance, mean = variance + mean.square(), torch.zeros_like(mean)
        pooled = (variance * observed).sum() / observed.expand(variance.shape).sum()
        # The mean of equal rows differs from them by its rounding.
        if not pooled.sqrt() > 16 * torch.finfo(v.dtype).eps * observed_entries(v, mask).abs().max():
            raise ValueError(
                f"Expected rows that differ from {'each other' if self.learn_bias else '0'}, but got "
                f"{len(v)} that do not. There is nothing to learn; look at the data."
            )
        x = observed_entries(v - mean, mask)
        order = torch.cat([torch.randperm(len(x)) for _ in range(-(-self.num_latents // len(x)))])
        atoms = x[order[: self.num_latents].to(x.device)].mT
        values = {"W": self.dictionary.start(atoms + 0.1 * pooled.sqrt() * torch.randn_like(atoms))}
        if self.learn_bias:
            values["bias"] = mean
        if self.learn_noise:
            values["beta"] = 1 / (0.1 * pooled).clamp(min=self.variance_floor)
        assign_parameters(self, values)
        self.shift.copy_(mean)


class _Points:
    """Sums over rows of values h (N, H) themselves, in place of a marginal's."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def sum(self) -> Tensor:
        return self.values.sum(0)

    def cross(self, x: Tensor) -> Tensor:
        return self.values.mT @ x

    def gram(self) -> Tensor:
        return self.values.mT @ self.values

    def grams(self, weights: Tensor) -> Tensor:
        return torch.stack([(self.values * weight.unsqueeze(-1)).mT @ self.values for weight in weights.mT])


def _prior(rate: float | Tensor | None, prior: SparsePrior | None) -> SparsePrior:
    if prior is None:
        return LaplacePrior(1.0 if rate is None else rate)
    if not isinstance(prior, SparsePrior):
        raise TypeError(f"Expected prior to be a SparsePrior, but got {prior!r}. Pass LaplacePrior(rate), for example.")
    if rate is not None:
        raise ValueError(f"Expected rate or prior, but got both. Write prior={type(prior).__name__}({rate}).")
    return prior


def _centred(gram: Tensor, sums: Tensor, average: Tensor, precision: float) -> Tensor:
    """Second moments (..., H, H) around the averages, with rows and columns of 0 for latents that never vary.

    What rounding leaves of these would be taken for the weight of an atom that is used.
    """
    centred = gram - sums.unsqueeze(-1) * average.unsqueeze(-2)
    varies = centred.diagonal(dim1=-2, dim2=-1) > 64 * precision * gram.diagonal(dim1=-2, dim2=-1)
    return torch.where(varies.unsqueeze(-1) & varies.unsqueeze(-2), centred, 0)
