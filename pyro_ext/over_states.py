"""L by summing over all joint states, for guides whose factors read each other's values."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_ext.evaluators import can_enumerate, check_rows_apart, latent_units
from pyro_ext.factors import CHUNK_ELEMENTS
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.states import enumerate_states

MAX_STATES = 2**12
"""Most joint states of a row that are summed: every one of them is a pass of the encoders."""


def bound_over_states(program: Program, posterior: Posterior, max_states: int = MAX_STATES) -> Tensor | None:
    """L = sum_h q(h | v) [log p(v, h) - log q(h | v)] per row ``(R,)``, nats; None where there are too many states.

    For a posterior with conditional factors, such as q(h1 | v) q(h2 | h1), which no `Evaluator` serves.

    Args:
        program: the model at its data.
        posterior: q of its rows.
        max_states: most joint states of a row.

    Example:
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import SigmoidBeliefNetwork
        >>> model = SigmoidBeliefNetwork([2, 3, 4])
        >>> v = torch.rand(5, 4).round()
        >>> program = Program(model, (v,), {})
        >>> bound_over_states(program, Amortized(model).posterior(v)).shape
        torch.Size([5])
    """
    if posterior.is_point or not can_enumerate(program, max_states):
        return None
    layout = Layout(program.rows, program.latents)
    states = enumerate_states(latent_units(layout), device=program.number.device).to(program.number.dtype)
    rows = program.rows.count
    widest = max(program.trace.nodes[name]["fn"].event_shape.numel() for name in program.visible)
    total = program.number.new_zeros(rows)
    with torch.no_grad():
        for part in states.split(max(1, CHUNK_ELEMENTS // max(1, rows * max(widest, layout.num_features)))):
            values = layout.values(part[:, None, :].expand(len(part), rows, layout.num_features))
            log_p = program.log_joint(values, num_particles=len(part)).reshape(len(part), rows)
            plain = {s.name: _unpadded(values[s.name], len(part), s.batch_shape + s.event_shape) for s in layout.sites}
            log_q = posterior.log_prob(plain).reshape(len(part), rows)
            # States that q rules out count nothing, even where p rules them out too.
            total = total + torch.where(log_q.isneginf(), 0, log_q.exp() * (log_p - log_q)).sum(0)
    check_rows_apart(program, layout)
    return total


def _unpadded(value: Tensor, leading: int, shape: torch.Size) -> Tensor:
    return value.reshape((leading,) + tuple(shape))
