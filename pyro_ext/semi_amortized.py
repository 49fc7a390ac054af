"""Semi-amortized inference: a network proposes q, and local steps improve it, row by row (19.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.optim import PyroOptim

from pyro_ext.fixed_point import FixedPoint
from pyro_ext.local_gradient import LocalGradient
from pyro_ext.steps import Call, EResult, EStep


class SemiAmortized(EStep):
    r"""q is where local steps lead to from the network's output, in learning and in inference alike.

    .. math:: q_n = \mathrm{local}(f(v_n; \phi)), \qquad L(v_n, q_n) \ge L(v_n, f(v_n; \phi))

    for local steps that never lower an exact L. The M-step, the ledger, `EM.infer` and `EM.evaluate_loss` see q_n.
    The network itself is trained by another E-step, before the local steps of each half-step:

    - ``train=Gradient(optim)``: the network raises L at its own output (Krishnan, Liang & Hoffman, 2018);
    - ``train=Dream(optim)``: it learns from dreams;
    - ``train=Refine(local, optim)``: it learns to put out what the local steps find. `Refine` alone learns theta at the
      same q, but infers with the network's own.

    No gradient passes through the local steps (Kim et al., 2018, pass one).

    Args:
        local: `FixedPoint(max_sweeps=k)`, sweeps of (19.56), or `LocalGradient(num_steps=k)`. It starts at the
            network's q, whatever its `start` is.
        train: the E-step that trains the network; None holds it.

    Raises:
        TypeError: local or train of another type; at the door of `EM`, a guide with tables, or one that `train`
            refuses; there or at the first step, factors that read each other's values.

    Example:
        >>> import torch
        >>> from pyro.optim import Adam
        >>> from pyro_ext import EM, ClosedForm, Gradient
        >>> from pyro_ext.guides import Amortized
        >>> from pyro_ext.models import BinarySparseCoding
        >>> model = BinarySparseCoding(num_visible=4, num_latents=3)
        >>> e_step = SemiAmortized(FixedPoint(max_sweeps=2), train=Gradient(Adam({"lr": 0.01})))
        >>> em = EM(model, Amortized(model), e_step=e_step, m_step=ClosedForm())
        >>> v = torch.randn(20, 4)
        >>> _ = em.step(v)
        >>> own = EM(model, em.guide, e_step=Gradient(Adam({"lr": 0.01})), m_step=None)
        >>> em.evaluate_loss(v) <= own.evaluate_loss(v)
        True
    """

    infers_itself = True

    def __init__(self, local: FixedPoint | LocalGradient, train: EStep | None = None) -> None:
        if not isinstance(local, FixedPoint | LocalGradient):
            raise TypeError(
                f"Expected local to be FixedPoint() or LocalGradient(), but got {local!r}. Pass an object, such as "
                "FixedPoint(max_sweeps=2)."
            )
        if train is not None and not isinstance(train, EStep):
            raise TypeError(
                f"Expected train to be an E-step or None, but got {train!r}. Write Gradient(optim), Dream(optim) or "
                "Refine(local, optim)."
            )
        self.local = local
        self.train = train

    @property
    def optim(self) -> PyroOptim | None:
        """The optimizer of the network."""
        return getattr(self.train, "optim", None)

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Refuse guides with tables.

        Raises:
            TypeError: as above.
        """
        if getattr(guide, "is_table", False) or not hasattr(guide, "rows_parameters"):
            raise TypeError(
                f"Expected a guide with a network (Amortized) for SemiAmortized, but got {type(guide).__name__}. "
                "For a table, FixedPoint(start=Warm()) goes on from the last answer."
            )
        if self.train is not None:
            self.train.check(model, guide)
        if guide.is_set_up:
            _check_static(guide)

    def improve(self, call: Call, *, keep: bool) -> EResult:
        """Train the network, and take the local steps from its output."""
        _check_static(call.guide)
        if keep and self.train is not None:
            self.train.improve(call, keep=True)
        return self.local.solve(call, call.guide.rows_parameters(call.program))[0]


def _check_static(guide: Any) -> None:
    if not guide.is_static:
        raise TypeError(
            "Expected factors that do not depend on each other's values for SemiAmortized, but got a guide with "
            "conditional factors or density encoders. Use `Gradient(optim)` or `Dream(optim)`."
        )
