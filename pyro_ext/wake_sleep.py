"""Wake-sleep and reweighted wake-sleep as an ELBO for `pyro.infer.SVI`, with weights per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from pyro_ext.arguments import VisibleArguments, find_visible
from pyro_ext.call_arguments import Args, Kwargs, argument_names
from pyro_ext.matching import check_match, check_sleep
from pyro_ext.rows import Rows, is_visible, sample_sites
from pyro_ext.sandbox import FixedIndices, plate_indices, refusal, sandbox
from pyro_ext.weights import SelfNormalized, Weights

_PARTICLES = "num_particles_vectorized"  # the name that pyro.infer.ELBO gives its plate
_SELF_NORMALIZED = SelfNormalized()

Program = Callable[..., Any]


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

    Sources: Hinton, Dayan, Frey and Neal, The wake-sleep algorithm, 1995; Bornschein and Bengio,
    Reweighted wake-sleep, 2015; Le et al., Revisiting reweighted wake-sleep, 2020 (insomnia); Deep
    Learning, section 19.5.1.

    Args:
        num_particles: K, samples of q per row.
        weights: `SelfNormalized` (reweighted wake-sleep; the default) or `Uniform` (the plain mean).
        insomnia: share of the wake phase in phi's gradient, in [0, 1]. With 1 nothing is dreamt.
        num_dreams: dreams a step, in rows; None for as many as the batch has rows.
        max_plate_nesting: bound on the number of nested plates; found by a blocked run if infinite.
        vectorize_particles: draw the particles in a plate to the left of all others rather than in a loop.
        visible: the argument of a visible site where it cannot be found, ``{"site": "argument"}``.

    Attributes:
        last_sleep_loss: sleep loss of the last step, in nats, scaled as above; None if none was computed.

    Raises:
        TypeError: ``num_particles`` or ``num_dreams`` is no integer, ``weights`` no `Weights`, or, at the
            call, the guide is a messenger.
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
    ) -> None:
        _check_count("num_particles", num_particles)
        if num_dreams is not None:
            _check_count("num_dreams", num_dreams)
        if not isinstance(weights, Weights):
            raise TypeError(f"Expected weights of class Weights, but got {weights!r}. Pass SelfNormalized().")
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
        self.last_sleep_loss: Tensor | None = None
        self._found: tuple[Program, Program, VisibleArguments | None] | None = None

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """-bound in nats, summed over the batch, times N/B; nothing is dreamt."""
        with torch.no_grad(), refusal():
            value, _, _ = self._wake(model, guide, args, kwargs)
        return _as_float(value)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor of shape () whose gradient by autograd is the estimator above."""
        value, surrogate = self._estimate(model, guide, args, kwargs)
        return value + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss; adds the estimate of the gradients to the parameters' ``grad``."""
        value, surrogate = self._estimate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        return _as_float(value)

    def _estimate(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
        self.last_sleep_loss = None
        with refusal():
            value, surrogate, rows = self._wake(model, guide, args, kwargs)
            if self.insomnia == 1:
                return value, surrogate
            sleep = self._sleep(model, guide, args, kwargs, rows)
        self.last_sleep_loss = sleep.detach()
        return value, surrogate + (1 - self.insomnia) * sleep

    def _wake(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor, Rows]:
        """The loss, the surrogate of the wake phases, and the program's rows."""
        self._check_guide(guide)
        traces = list(self._get_traces(model, guide, args, kwargs))
        rows = Rows.from_trace(*traces[0], ignore={_PARTICLES})
        log_p = torch.cat([rows.log_prob(p).reshape(-1, *rows.shape) for p, _ in traces])
        log_q = torch.cat([rows.log_prob(q).reshape(-1, *rows.shape) for _, q in traces])
        log_w = (log_p - log_q).detach()
        weights = self.weights.normalise(log_w)
        value = -self.weights.bound(log_w).sum() * rows.scale
        surrogate = -_weighted_sum(weights, log_p) * rows.scale
        if self.insomnia > 0:
            surrogate = surrogate - self.insomnia * _weighted_sum(weights, log_q) * rows.scale
        return value, surrogate, rows

    def _sleep(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, rows: Rows) -> Tensor:
        """-log q of dreams, shape (): their mean times the number of rows, times N/B."""
        to_guide = self._messenger(model, guide, args, kwargs)
        count = rows.count if self.num_dreams is None else self.num_dreams
        total = torch.zeros(())
        for begin in range(0, count, rows.count):
            log_q = _dream_log_q(model, guide, args, kwargs, rows, to_guide)
            if count - begin < rows.count:
                # A random part: rows may differ in their covariates.
                log_q = log_q[torch.randperm(rows.count, device=log_q.device)[: count - begin]]
            total = total.to(log_q) + log_q.sum()
        return -total * (rows.count * rows.scale / count)

    def _messenger(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> Callable[[Trace], tuple[Args, Kwargs]]:
        """How a dream's visible values are handed to the guide."""
        if self._found is None or self._found[0] is not model or self._found[1] is not guide:
            by_keyword = "observations" in argument_names(guide) and "observations" not in argument_names(model)
            self._found = (model, guide, None if by_keyword else find_visible(model, args, kwargs, self.visible))
        found = self._found[2]
        if found is None:
            return lambda dream: (args, {**kwargs, "observations": _visible_values(dream)})
        return lambda dream: found.write(_visible_values(dream), args, kwargs, plate_indices(dream))

    def _get_traces(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> Generator[tuple[Trace, Trace], None, None]:
        if self.num_particles == 1:
            yield self._get_trace(model, guide, args, kwargs)
        elif self.vectorize_particles:
            if self.max_plate_nesting == math.inf:
                with sandbox():
                    rows = Rows.from_trace(*self._run(model, guide, args, kwargs))
                self.max_plate_nesting = rows.nesting + 1
            yield self._get_vectorized_trace(model, guide, args, kwargs)
        else:
            # All particles of a row must be of the same datum: later ones take the first one's subsample.
            indices: dict[str, Tensor] = {}
            for _ in range(self.num_particles):
                with FixedIndices(indices):
                    pair = self._get_trace(model, guide, args, kwargs)
                indices = indices or plate_indices(pair[0])
                yield pair

    def _get_trace(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        model_trace, guide_trace = self._run(model, guide, args, kwargs)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            for trace in (model_trace, guide_trace):
                for _, site in sample_sites(trace):
                    check_site_shape(site, self.max_plate_nesting)  # pyright: ignore[reportArgumentType]
        return model_trace, guide_trace

    def _run(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        with _Detached():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        check_match(model_trace, guide_trace)
        if self.insomnia < 1:
            check_sleep(model_trace, guide_trace)
        return model_trace, guide_trace

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


class _Detached(Messenger):
    """Cut the gradient at each draw, so that what is drawn next does not depend on phi through it."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _dream_log_q(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    rows: Rows,
    to_guide: Callable[[Trace], tuple[Args, Kwargs]],
) -> Tensor:
    """log q(h'|v') of one pass of dreams, shape (rows.count,), nats."""
    with torch.no_grad(), poutine.block():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    dreamt_args, dreamt_kwargs = to_guide(dream)
    trace = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*dreamt_args, **dreamt_kwargs)
    trace.compute_log_prob()
    return rows.log_prob(trace).reshape(-1)


def _visible_values(dream: Trace) -> dict[str, Tensor]:
    nodes: dict[str, Any] = dict(dream.nodes)
    return {
        name: site["value"]
        for name, site in nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed") and is_visible({**site, "is_observed": True})
    }


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
