"""Wake-sleep and reweighted wake-sleep as an ELBO for `pyro.infer.SVI`, with weights per row."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_ext.call_arguments import Args, Kwargs
from pyro_ext.dreams import HandOver, log_q_of_dreams
from pyro_ext.particles import Program, Run, Structures, observed_are_valid
from pyro_ext.proposals import FromGuide, Particles, Proposal
from pyro_ext.rows import Rows
from pyro_ext.sandbox import FixedIndices, plate_indices, random_states, refusal, sandbox, set_random_states
from pyro_ext.weights import SelfNormalized, Weights

_SELF_NORMALIZED = SelfNormalized()
_FROM_GUIDE = FromGuide()


class Estimate(NamedTuple):
    """What one step of `WakeSleep` comes to, as tensors.

    Attributes:
        loss: -bound in nats, shape (), without gradient: summed over the batch, times N/B.
        surrogate: shape (); its gradient is the estimator of `WakeSleep`, its value means nothing.
        sleep_loss: sleep loss in nats, shape (), without gradient; None if nothing was dreamt.
        log_weights: log w_nk of the particles, shape (K, *rows), nats: (sum w)^2 / sum w^2 over the first
            dimension is the effective sample size of each row.
        log_guide: log q(h_nk | v_n), shape (K, *rows), nats.
    """

    loss: Tensor
    surrogate: Tensor
    sleep_loss: Tensor | None
    log_weights: Tensor
    log_guide: Tensor


class WakeSleep(ELBO):
    """Wake-sleep: theta learns from data with h ~ q(h|v), phi from dreams (h, v) ~ p.

    With K particles h_k ~ q(h|v_n), log w_nk = log p(v_n, h_k) - log q(h_k|v_n) and weights W_nk that are
    normalised over the particles of each row n, one step follows

        theta:  -sum_n sum_k W_nk grad log p(v_n, h_k)                                       (wake)
        phi:    insomnia * [-sum_n sum_k W_nk grad log q(h_k|v_n)]                           (wake)
                + (1 - insomnia) * [-sum_n grad log q(h'|v')],  (h', v') ~ p                 (sleep)

    and the loss is -bound in nats, summed over the batch and multiplied by N/B under subsampling: for
    `SelfNormalized` weights -sum_n log 1/K sum_k w_nk, for `Uniform` ones -sum_n 1/K sum_k log w_nk. The
    sleep loss is scaled to be comparable: the mean over dreams times the number of rows, times N/B.
    Inner plates are summed before weighting; masks are kept; a program without a plate common to all
    sites of model and guide is one row, in which scales are kept.

    A dream reaches the guide through the very arguments that carry the data (`find_visible`), or through
    the keyword ``observations={site: value}`` if the guide has one and the model does not. Dreams are
    drawn without gradients, by running the model unconditioned on the same arguments (covariates stay).

    Where Pyro validates (its default under ``python`` without ``-O``), all values are validated at the first call
    of a signature (shapes and dtypes of the arguments). At later calls visible values are compared with their
    supports. Where one lies outside, an error is raised or the loss is NaN, the call is repeated with the same draws
    and all validation, before any gradient. Whether model and guide match is checked once for each structure of
    their sites that is met.

    Settings per parameter go to Pyro's optimizer: ``Adam(lambda name: {"lr": 1e-2 if name == "w" else 1e-3})``.

    Sources: Hinton, Dayan, Frey and Neal, The wake-sleep algorithm, 1995; Bornschein and Bengio,
    Reweighted wake-sleep, 2015; Le et al., Revisiting reweighted wake-sleep, 2020 (insomnia); Deep
    Learning, section 19.5.1.

    Args:
        num_particles: K, samples of q per row.
        weights: `SelfNormalized` (reweighted wake-sleep; the default) or `Uniform` (the plain mean).
        insomnia: share of the wake phase in phi's gradient, in [0, 1]. With 1 nothing is dreamt.
        num_dreams: dreams a step, in rows; None for as many as the batch has rows. The model is run anew for each
            batch of rows; of the last run a random part of the rows counts.
        max_plate_nesting: bound on the number of nested plates; found by a blocked run if infinite.
        vectorize_particles: draw the particles in a plate to the left of all others rather than in a loop.
        visible: the argument of a visible site where it cannot be found, ``{"site": "argument"}``.
        proposal: what draws the particles: `FromGuide` (the default), or `Defensive` for a mixture of the guide and
            the model's prior; w_nk then divides by the density of the mixture.

    Attributes:
        last_sleep_loss: sleep loss of the last step, in nats, scaled as above; None if none was computed.

    Raises:
        TypeError: ``num_particles`` or ``num_dreams`` is no integer, ``weights`` no `Weights`, ``proposal`` no
            `Proposal`, or, at the call, the guide is a messenger.
        ValueError: a number is out of range; ``insomnia`` above 0 with one particle or `Uniform` weights,
            whose expected gradient of phi is zero. At the call: sites of model and guide do not match;
            nothing is visible; the guide holds a Delta on a continuous site (its entropy is -inf); and, when
            there is a sleep phase, a table guide, auxiliary or Delta sites, ``pyro.factor`` in the model,
            or a visible site whose argument is not found. Parameters that a refused call brought into
            being are removed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(v):
        ...     w = pyro.param("w", torch.tensor([2.0, -1.0]))
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.3))
        ...         pyro.sample("v", dist.Bernoulli(logits=w[h.long()]), obs=v)
        >>> def guide(v):
        ...     a, b = pyro.param("a", torch.zeros(())), pyro.param("b", torch.zeros(()))
        ...     with pyro.plate("data", len(v)):
        ...         pyro.sample("h", dist.Bernoulli(logits=a + b * v))
        >>> pyro.clear_param_store()
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=WakeSleep(num_particles=5))
        >>> loss = svi.step(torch.tensor([0.0, 1.0, 1.0]))
    """

    def __init__(
        self,
        num_particles: int = 1,
        weights: Weights = _SELF_NORMALIZED,
        insomnia: float = 0.0,
        num_dreams: int | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
        visible: Mapping[str, str | int] | None = None,
        proposal: Proposal = _FROM_GUIDE,
    ) -> None:
        _check_count("num_particles", num_particles)
        if num_dreams is not None:
            _check_count("num_dreams", num_dreams)
        if not isinstance(weights, Weights):
            raise TypeError(f"Expected weights of class Weights, but got {weights!r}. Pass SelfNormalized().")
        if not isinstance(proposal, Proposal):
            raise TypeError(f"Expected a proposal of class Proposal, but got {proposal!r}. Pass FromGuide().")
        if isinstance(insomnia, bool) or not isinstance(insomnia, int | float):
            raise TypeError(f"Expected insomnia to be a number in [0, 1], but got {insomnia!r}. Pass 0 for sleep only.")
        if not 0 <= insomnia <= 1:
            raise ValueError(f"Expected insomnia in [0, 1], but got {insomnia!r}. Pass 0 for sleep only.")
        if insomnia > 0 and (num_particles == 1 or not isinstance(weights, SelfNormalized)):
            raise ValueError(
                f"Expected insomnia=0 with one particle or equal weights, but got insomnia={insomnia}, "
                f"num_particles={num_particles}, weights={weights}: the expected gradient of phi would be zero. "
                "Pass num_particles=2 or more with SelfNormalized(), or insomnia=0."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,  # pyright: ignore[reportArgumentType]
            vectorize_particles=vectorize_particles,
        )
        self.weights = weights
        self.insomnia = insomnia
        self.num_dreams = num_dreams
        self.visible = visible
        self.proposal = proposal
        self.last_sleep_loss: Tensor | None = None
        self._structures: Structures | None = None
        self._hand_over = HandOver(visible)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """-bound in nats, summed over the batch, times N/B; nothing is dreamt."""
        with torch.no_grad():
            return _as_float(self._checked(model, guide, args, kwargs, dream=False).loss)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor of shape () whose gradient by autograd is the estimator above."""
        estimate = self._take(model, guide, args, kwargs)
        return estimate.loss + (estimate.surrogate - estimate.surrogate.detach())

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; adds the estimate of the gradients to the parameters' ``grad``."""
        estimate = self._take(model, guide, args, kwargs)
        if estimate.surrogate.requires_grad:
            estimate.surrogate.backward(retain_graph=self.retain_graph)
        return _as_float(estimate.loss)

    def estimate(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Estimate:
        """Loss, surrogate and weights of one step, as tensors.

        No tensor is changed and, with Pyro's validation off, no number is looked at, so that the computation can be
        traced into a graph. What is kept on this object is structure: rows, and where dreams are written.

        Args:
            model: the model.
            guide: the guide.
            args: their positional arguments.
            kwargs: their keyword arguments.

        Raises:
            TypeError, ValueError: as the class says.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(v):
            ...     with pyro.plate("data", len(v)):
            ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
            ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
            >>> def guide(v):
            ...     with pyro.plate("data", len(v)):
            ...         pyro.sample("h", dist.Normal(v / 2, 1.0))
            >>> found = WakeSleep(num_particles=5).estimate(model, guide, (torch.zeros(3),), {})
            >>> found.loss.shape, found.log_weights.shape
            (torch.Size([]), torch.Size([5, 3]))
        """
        return self._checked(model, guide, args, kwargs, dream=self.insomnia < 1)

    def _estimate(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
        return self.estimate(model, guide, args, kwargs)[:2]

    def _take(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Estimate:
        self.last_sleep_loss = None
        estimate = self.estimate(model, guide, args, kwargs)
        self.last_sleep_loss = estimate.sleep_loss
        return estimate

    def _checked(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, *, dream: bool) -> Estimate:
        self._check_guide(guide)
        structures = self._structures_of(model, guide)
        with refusal():
            if structures.is_validated(args, kwargs):
                estimate = self._quick(structures, args, kwargs, dream=dream)
                if estimate is not None:
                    return estimate
            estimate, _ = self._scored(structures, args, kwargs, dream=dream)
            structures.note_validated(args, kwargs)
        return estimate

    def _quick(self, structures: Structures, args: Args, kwargs: Kwargs, *, dream: bool) -> Estimate | None:
        """The estimate without Pyro's validation; None where something is wrong, which validation will name."""
        states = random_states()
        try:
            with pyro.validation_enabled(False):
                estimate, particles = self._scored(structures, args, kwargs, dream=dream)
            if all(observed_are_valid(p.model_trace) for p in particles) and not bool(estimate.loss.isnan()):
                return estimate
        except (RuntimeError, ValueError):
            pass
        # The same draws again: others might hide what went wrong.
        set_random_states(states)
        return None

    def _scored(
        self, structures: Structures, args: Args, kwargs: Kwargs, *, dream: bool
    ) -> tuple[Estimate, list[Particles]]:
        particles = list(self._particles(structures, args, kwargs))
        rows = particles[0].rows
        log_p = _stacked([p.log_joint for p in particles])
        log_q = _stacked([p.log_guide for p in particles])
        log_w = (log_p - _stacked([p.log_proposal for p in particles])).detach()
        loss = -self.weights.bound(log_w).sum() * rows.scale
        target = log_p + self.insomnia * log_q if self.insomnia > 0 else log_p
        surrogate = -_weighted_sum(self.weights.normalise(log_w), target) * rows.scale
        sleep = self._sleep(structures, args, kwargs, rows) if dream else None
        if sleep is not None:
            surrogate = surrogate + (1 - self.insomnia) * sleep
        estimate = Estimate(loss, surrogate, None if sleep is None else sleep.detach(), log_w, log_q.detach())
        return estimate, particles

    def _particles(self, structures: Structures, args: Args, kwargs: Kwargs) -> Generator[Particles]:
        """The particles of one step: all at once in a plate, or one by one."""
        sleep = self.insomnia < 1
        if self.num_particles > 1 and self.vectorize_particles:
            if self.max_plate_nesting == math.inf:
                with sandbox():
                    run = Run(structures, args, kwargs, sleep=sleep, max_plate_nesting=math.inf)
                    self.max_plate_nesting = _FROM_GUIDE.draw(run).rows.nesting + 1
            number = self.num_particles
            run = Run(
                structures,
                args,
                kwargs,
                sleep=sleep,
                num_vectorized=number,
                max_plate_nesting=self.max_plate_nesting,
            )
            yield self.proposal.draw(run)
            return
        # All particles of a row must be of the same datum: later ones take the first one's subsample.
        indices: dict[str, Tensor] = {}
        for _ in range(self.num_particles):
            with FixedIndices(indices):
                run = Run(structures, args, kwargs, sleep=sleep, max_plate_nesting=self.max_plate_nesting)
                particles = self.proposal.draw(run)
            indices = indices or plate_indices(particles.model_trace)
            yield particles

    def _sleep(self, structures: Structures, args: Args, kwargs: Kwargs, rows: Rows) -> Tensor:
        """-log q of dreams, shape (): their mean times the number of rows, times N/B."""
        model, guide = structures.model, structures.guide
        log_q = log_q_of_dreams(model, guide, args, kwargs, rows, self._hand_over, self.num_dreams)
        return -log_q.sum() * (rows.count * rows.scale / len(log_q))

    def _structures_of(self, model: Program, guide: Program) -> Structures:
        if self._structures is None or not self._structures.are_of(model, guide):
            self._structures = Structures(model, guide)
        return self._structures

    def _get_trace(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        raise NotImplementedError("WakeSleep runs guide and model itself; see `estimate`")

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the objective are not copies of the programs.
        return {**self.__dict__, "_structures": None, "_hand_over": HandOver(self.visible)}

    def _check_guide(self, guide: Program) -> None:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise TypeError(
                f"Expected a guide that is a program, but got the messenger {type(poutine.unwrap(guide)).__name__}. "
                "Write it as a function or a module with sample statements."
            )
        if self.insomnia < 1 and getattr(guide, "is_table", False):
            raise ValueError(
                f"Expected a guide that reads v, but got the table {type(guide).__name__}. A sleep phase with a table "
                "is refused: dreams are not rows of its data set. Use Amortized, or insomnia=1."
            )


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weighted_sum(weights: Tensor, log_prob: Tensor) -> Tensor:
    # An impossible particle has weight 0 and log-probability -inf, whose product is NaN.
    return torch.where(weights > 0, weights * log_prob, torch.zeros_like(weights)).sum()


def _as_float(value: Tensor) -> float:
    loss = value.item()
    warn_if_nan(loss, "loss")  # pyright: ignore[reportArgumentType, reportCallIssue]  (it takes numbers too)
    return loss


def _check_count(name: str, value: Any) -> None:
    rule = f"Expected {name} to be a positive integer, but got {value!r}. Pass 1 or more."
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(rule)
    if value < 1:
        raise ValueError(rule)
