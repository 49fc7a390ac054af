"""Gradient ascent in the parameters of q of each row, from a q that is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_ext.checks import check_count
from pyro_ext.evaluators import NoEvaluatorError, Parameters
from pyro_ext.layout import Layout
from pyro_ext.posterior import Posterior
from pyro_ext.starts import better
from pyro_ext.steps import Call, EResult


class LocalGradient:
    """Some steps of Adam on L in each row's own parameters of q, for the local steps of `SemiAmortized` and `Refine`.

    Rows do not touch each other, and neither theta nor the network moves. L is exact where an evaluator serves; else it
    is a mean over draws by reparametrisation, whose random numbers are the same at every step, so that one fixed
    function is climbed. Each row keeps the best q that it passed: with an exact L it never ends below its start.

    Args:
        num_steps: steps of Adam.
        learning_rate: its step size, in units of the factors' parameters.
        num_particles: draws where L is not exact; as many new ones give the L that is reported, with its error.

    Raises:
        TypeError, ValueError: a number that is not positive. At the step: points; latents whose draws have no gradient,
            in a program that no evaluator serves.

    Example:
        >>> from pyro_ext import EM
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import HelmholtzMachine
        >>> from pyro_ext.semi_amortized import SemiAmortized
        >>> model = HelmholtzMachine(num_visible=4, num_latents=1)
        >>> em = EM(model, Amortized(model), e_step=SemiAmortized(LocalGradient()), m_step=None)
        >>> em.infer(torch.ones(3, 4))["h"].mean.shape
        torch.Size([3, 1])
    """

    def __init__(self, num_steps: int = 20, learning_rate: float = 0.1, num_particles: int = 10) -> None:
        check_count(num_steps, "num_steps")
        check_count(num_particles, "num_particles")
        if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float):
            raise TypeError(f"Expected learning_rate to be a number, but got {learning_rate!r}. Pass 0.1, for example.")
        if not 0 < learning_rate < math.inf:
            raise ValueError(
                f"Expected a learning_rate above 0, but got {learning_rate!r}. To stay at the network's q, infer with "
                "Gradient(optim) or Dream(optim)."
            )
        self.num_steps = num_steps
        self.learning_rate = float(learning_rate)
        self.num_particles = num_particles

    def __repr__(self) -> str:
        return f"LocalGradient({self.num_steps}, {self.learning_rate:g}, {self.num_particles})"

    def solve(self, call: Call, start: Parameters) -> tuple[EResult, Parameters]:
        """Climb from a given q; nothing is written to the guide.

        Args:
            call: the model, guide and data.
            start: parameters ``(R, M, P)`` for each block.

        Returns:
            The result, and the parameters ``(R, M, P)``.
        """
        points = [block.site.name for block in call.blocks if block.factor.is_point]
        if points:
            raise ValueError(
                f"Expected factors with a density for LocalGradient, but got points on the sites {points}. Use "
                "Refine(Maximize(), optim), which solves for them."
            )
        objective, exact = self._objective(call)
        params = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
        adam = torch.optim.Adam(params.values(), lr=self.learning_rate)
        best, best_bound = dict(start), torch.full((call.program.rows.count,), -math.inf)
        for step in range(self.num_steps + 1):
            with torch.set_grad_enabled(step < self.num_steps):
                bound = objective(params)
            held = {name: value.detach().clone() for name, value in params.items()}
            best, best_bound = better(best, best_bound.to(bound), held, bound.detach())
            if step < self.num_steps:
                # Theta may be in the graph: it must not gather gradients.
                grads = torch.autograd.grad(-bound.sum(), list(params.values()))
                for value, grad in zip(params.values(), grads, strict=True):
                    value.grad = grad
                adam.step()
        posterior = call.posterior(best)
        if exact:
            return EResult(best_bound, True, "warm", posterior, monotone=False), best
        with torch.no_grad():
            # Anew, for the draws that were climbed flatter it.
            draws = sampled_bounds(call, posterior, self.num_particles)
        error = draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else torch.full_like(draws[0], math.nan)
        return EResult(draws.mean(0), False, "warm", posterior, monotone=False, error=error), best

    def _objective(self, call: Call) -> tuple[Callable[[Parameters], Tensor], bool]:
        try:
            return call.evaluator().bound, True
        except NoEvaluatorError:
            pass
        fixed = [s.name for s in call.program.latents if s.kind.is_discrete]
        if fixed:
            raise ValueError(
                f"Expected an exact L, or draws with a gradient, for LocalGradient, but got the discrete sites {fixed} "
                "in a program that no evaluator serves. Use FixedPoint(evaluator=Sampled(...))."
            )
        device = call.program.number.device
        # One seed drawn from the global generator: other calls climb on other draws.
        seed = int(torch.randint(2**31, ()))
        layout = Layout(call.program.rows, call.program.latents)
        blocks = call.blocks

        def objective(params: Parameters) -> Tensor:
            batch = {b.name: layout.from_rows(params[b.name], b.site) for b in blocks}
            posterior = Posterior(call.program.rows, call.program.latents, blocks, lambda block, _: batch[block.name])
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                return sampled_bounds(call, posterior, self.num_particles, reparametrised=True).mean(0)

        return objective, False


def sampled_bounds(call: Call, posterior: Posterior, num_particles: int, *, reparametrised: bool = False) -> Tensor:
    """log p(v, h) - log q(h | v) at draws of q, ``(num_particles, R)``, nats."""
    values, log_q = posterior.sample_with_log_prob(num_particles, reparametrised=reparametrised)
    led = {site.name: call.program.lead(values[site.name], site) for site in call.program.latents}
    return (call.program.log_joint(led, num_particles=num_particles) - log_q).reshape(num_particles, -1)
