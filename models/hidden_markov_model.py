"""Hidden Markov model: EM with a chain of hidden states (section 19.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.checks import check_count, check_statistics

from .base import assign_parameters, read_parameter
from .emissions import Emission
from .sequence_model import SequenceModel, observed_steps
from .sequences import chain_prior, chain_statistics, check_floor, extent, floored, seen_steps
from .unread import Unread


class HiddenMarkovModel(SequenceModel):
    r"""Hidden Markov model: a chain of hidden states, each of which emits what is seen at its step.

    .. math:: p(v, h) = \pi_{h_1} \prod_{t=2}^{T} A_{h_{t-1} h_t} \prod_{t=1}^{T} p(v_t | h_t)

    Sites, in the plate ``"data"`` over sequences: ``"h"``, the whole path as one-hot states, shape (N, T, K); ``"v"``,
    shape (N, T) + event of the emission. A row is a sequence; losses are nats per sequence.

    Sequences of different lengths are padded to T steps and come with their lengths. Steps beyond a length are never
    read (they may be NaN), and there the path goes on by uniform draws, a constant that holds no parameter: neither
    log p(v) nor what is learned depends on the padding. A step that the mask hides is part of its sequence, and only
    what it emitted is unknown.

    Baum-Welch is ``EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())``: the one chain factor a row
    is the exact posterior (Baum et al., 1970; Rabiner, 1989).

    Args:
        num_states: number K of hidden states.
        emission: `GaussianEmission`, `CategoricalEmission`, `BernoulliEmission` or `PoissonEmission`.
        probability_floor: least first-state and transition probability that `maximize` gives.
        name: see `Model`.

    Attributes:
        initial: probabilities pi of the first state, shape (K,).
        transition: probabilities A, shape (K, K), from the row's state to the column's.
        emission: the emission; its parameters are the model's.

    Raises:
        TypeError, ValueError: K is no positive int, no emission, or the floor is not in (0, 1/K).

    Example:
        >>> from pyro_ext.models import GaussianEmission
        >>> model = HiddenMarkovModel(3, GaussianEmission(num_visible=2))
        >>> model.dream(5, num_steps=20).shape
        torch.Size([5, 20, 2])

        Sequences of different lengths, what the states probably were, and the most probable path (Viterbi):

        >>> from pyro_ext import EM, ClosedForm, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> sequences = [torch.randn(20, 2), torch.randn(12, 2)]
        >>> v = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        >>> lengths = torch.tensor([len(x) for x in sequences])
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> history = em.run(v, lengths=lengths, progress=False)
        >>> path = em.guide.posterior(v, lengths=lengths)["h"]
        >>> path.mean.shape
        torch.Size([2, 20, 3])
        >>> path.mode()[1, :12].argmax(-1).shape
        torch.Size([12])
    """

    initial: Tensor
    transition: Tensor

    def __init__(
        self, num_states: int, emission: Emission, *, probability_floor: float = 1e-10, name: str | None = None
    ) -> None:
        check_count(num_states, "num_states")
        if not isinstance(emission, Emission):
            raise TypeError(f"Expected an emission, but got {emission!r}. Pass GaussianEmission(num_visible), say.")
        check_floor(probability_floor, max(num_states, 2))
        super().__init__(emission.width or 1, name=name)
        self.num_states = num_states
        self.emission = emission
        self.event_dim = 0 if emission.width is None else 1
        self.probability_floor = float(probability_floor)
        self.declare("initial", torch.full((num_states,), 1 / num_states), constraints.simplex)
        self.declare("transition", torch.full((num_states, num_states), 1 / num_states), constraints.simplex)
        emission.declare(self, num_states)

    def forward(
        self,
        v: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        size: int | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Run the program; see `SequenceModel.forward`."""
        num_rows, num_steps = extent(v, size, num_steps, self.event_dim)
        seen = seen_steps(num_steps, lengths, mask)
        initial, transition, components = self.initial, self.transition, self.emission.components(self)
        with pyro.plate("data", num_rows, dim=-1):
            h = pyro.sample("h", chain_prior(initial, transition, num_steps, lengths))
            steps = self.emission.distribution(h, components)
            return pyro.sample("v", (steps if seen is None else Unread(steps, seen)).to_event(1), obs=v)

    def check_values(self, v: Any, seen: Tensor | None) -> None:
        """Let the emission refuse what does not fit it; see `Emission.check`."""
        self.emission.check(v, next(self.parameters()), seen)

    def statistics(self, data: Mapping[str, Any], posterior: Mapping[str, Any]) -> dict[str, Tensor]:
        """Expected sufficient statistics under q, summed over sequences.

        Returns:
            ``count`` (), the number of sequences; ``initial`` (K,), expected first states; ``transition`` (K, K),
            expected transitions inside the sequences; ``responsibility`` (K,), expected number of observed steps
            in each state; and the sums of the emission (see its `statistics`) over the observed steps.
        """
        v, lengths = data["v"], data.get("lengths")
        path = posterior["h"]
        num_steps = v.shape[1]
        initial, transition = chain_statistics(path, num_steps, lengths)
        seen = seen_steps(num_steps, lengths, data.get("mask"))
        steps, responsibilities = observed_steps(v, seen), observed_steps(path.mean, seen)
        return {
            "count": responsibilities.new_tensor(len(v)),
            "initial": initial,
            "transition": transition,
            "responsibility": responsibilities.sum(0),
            **self.emission.statistics(self, steps, responsibilities),
        }

    @torch.no_grad()
    def maximize(self, statistics: Mapping[str, Tensor]) -> None:
        """Set pi, A and the emission's parameters to the maximizer of E_q[log p(v, h)] within the floors.

        A row of A whose state is never left keeps its value.

        Raises:
            ValueError: statistics that are incomplete or not finite.
            RuntimeError: a state is responsible for no observed step, or the emission has no maximum; nothing has been
                changed then.
        """
        check_statistics(statistics, "initial", "transition", "responsibility", *self.emission.sums)
        r = statistics["responsibility"]
        empty = r <= torch.finfo(r.dtype).tiny
        if empty.any():
            raise RuntimeError(
                f"Expected every state to be responsible for some observed steps, but got none for state "
                f"{int(empty.nonzero()[0])}. Use fewer states, or start anew with initialize(v). Nothing was changed."
            )
        values = {
            name: floored(statistics[name], self.probability_floor, read_parameter(self, name))
            for name in ("initial", "transition")
        }
        assign_parameters(self, {**values, **self.emission.maximize(self, statistics)})

    @torch.no_grad()
    def initialize(self, v: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Start from uniform pi and A, and the emission's random start on the observed steps.

        Raises:
            TypeError, ValueError: see `check_data`; fewer observed steps than states; or data from which the emission
                cannot start.
        """
        steps = self._start_steps(v, lengths, mask, self.num_states)
        values = self.emission.initialize(self, steps, self.num_states)
        buffers = {name: values.pop(name) for name in list(values) if name in dict(self.named_buffers())}
        like = read_parameter(self, "transition")
        uniform = torch.full_like(like, 1 / self.num_states)
        assign_parameters(self, {"initial": uniform[0], "transition": uniform, **values})
        for name, value in buffers.items():
            self.get_buffer(name).copy_(value)
