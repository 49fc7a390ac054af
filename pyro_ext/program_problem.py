"""-log p(h, v) of any Pyro program as what a solver minimises."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]

from pyro_ext.layout import Layout
from pyro_ext.problems import Problem
from pyro_ext.program import Program
from pyro_ext.quadratic import MAX_ROW_COUPLINGS
from pyro_ext.sites import Kind
from pyro_ext.solvers import SolverError


class ProgramProblem(Problem):
    r"""-log p(v, h) per row, up to a constant, in the features of a row.

    .. math:: P(x) = -\log p(v, h(x)) = f(x) + \sum_i rate_i |x_i|, \qquad h(x) = T(x + shift)

    T is Pyro's bijection from the real line to the support of each site. The density is that of h, without the
    Jacobian of T: the minimum is the maximum of p(h | v) (19.13), whatever coordinates it is looked for in. Rates stand
    for sites whose priors were peeled off: those of Laplace priors, with x = h - loc, and those of exponential priors,
    with x = h in their own space and not below 0.

    One evaluation runs the program once, for all rows; the gradient is that of autograd. Where log p or its gradient
    is NaN, or p is 0, f is infinite and the gradient NaN, so that solvers take such a point for no improvement. Where
    p is infinite f is minus infinity.

    Args:
        program: the program; its latents are continuous.
        layout: where each feature stands; that of all the latents by default.
        shift: what is added to x, ``(F,)`` or ``(R, F)``; nothing by default.
        rate: shape ``(F,)`` or ``(R, F)``, at least 0, nats per unit of x; zeros by default.
        nonnegative: which x_i may not fall below 0, boolean ``(F,)``; None for none.
        skip: names of the sites whose priors were peeled off.

    Attributes:
        constrained: which features are mapped to a support by T, boolean ``(F,)``.

    Raises:
        SolverError: a discrete latent.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(v):
        ...     with pyro.plate("data", len(v)):
        ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
        ...         pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        >>> problem = ProgramProblem(Program(model, (torch.tensor([0.0, 2.0]),), {}))
        >>> problem.smooth(torch.ones(2, 1))
        (tensor([2.8379, 2.8379]), tensor([[2.],
                [0.]]))
    """

    def __init__(
        self,
        program: Program,
        layout: Layout | None = None,
        *,
        shift: Tensor | None = None,
        rate: Tensor | None = None,
        nonnegative: Tensor | None = None,
        skip: Collection[str] = (),
    ) -> None:
        self.program = program
        self.layout = Layout(program.rows, program.latents) if layout is None else layout
        for site in self.layout.sites:
            if site.kind.is_discrete:
                raise SolverError(
                    f"Expected continuous latents, but got the {site.kind.value} site {site.name!r}. "
                    "Use `e_step=FixedPoint()`, which moves one discrete unit at a time."
                )
        width = self.layout.num_features
        self.shift = program.number.new_zeros(width) if shift is None else shift
        self.rate = program.number.new_zeros(width) if rate is None else rate
        self.nonnegative = nonnegative
        self.skip = frozenset(skip)
        self.num_rows = program.rows.count
        self.constrained = torch.cat(
            [
                torch.full((self.layout.copies(site) * site.num_features,), site.kind is Kind.CONSTRAINED)
                for site in self.layout.sites
            ]
        ).to(program.number.device)
        self._index: Tensor | None = None
        self._others = program.number.new_zeros(self.num_rows, width)

    @property
    def can_select(self) -> bool:
        return False

    def rows(self, index: Tensor) -> ProgramProblem:
        part = ProgramProblem(
            self.program,
            self.layout,
            shift=self.shift,
            rate=self.rate if self.rate.dim() == 1 else self.rate[index],
            nonnegative=self.nonnegative,
            skip=self.skip,
        )
        part.num_rows = len(index)
        part._index = index if self._index is None else self._index[index]
        part._others = self._others
        return part

    def unit(self, x: Tensor) -> Tensor:
        """The size of f, and at least one nat."""
        with torch.no_grad():
            return self._negative_log_joint(x)[self._own].abs().clamp(min=1)

    def smooth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            try:
                every = self._negative_log_joint(leaf)
            except LinAlgError:
                # Which of the rows has no decomposition is not told: all of them try again nearer by.
                return x.new_full((len(x),), torch.inf), torch.full_like(x, torch.nan)
            value = every[self._own]
            gradient = _gradient(value, leaf, create_graph=False)
        value = value.detach()
        if self._index is None:
            self._others = x.detach()
        broken = value.isnan() | ~gradient.isfinite().all(-1) & ~value.isneginf()
        value = torch.where(broken, torch.inf, value)
        return value, torch.where(value.isfinite()[:, None], gradient, torch.nan)

    def hessian(self, x: Tensor) -> Tensor:
        """The second derivative of f at x ``(R, F)``, symmetric, ``(R, F, F)``: one product a feature.

        Raises:
            SolverError: R * F * F beyond `MAX_ROW_COUPLINGS`.
        """
        count, width = x.shape
        if count * width * width > MAX_ROW_COUPLINGS:
            raise SolverError(
                f"Expected room for a matrix of second derivatives a row, but got {count} rows of {width} features. "
                "Use `LBFGS()`, or minibatches."
            )
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            gradient = _gradient(self._negative_log_joint(leaf)[self._own], leaf, create_graph=True)
            if not gradient.requires_grad:
                return x.new_zeros(count, width, width)
            columns = []
            for i in range(width):
                column = torch.autograd.grad(
                    gradient[:, i].sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                columns.append(column[0])
        hessian = torch.stack(columns, -1).detach()
        return 0.5 * (hessian + hessian.mT)

    def values(self, x: Tensor) -> Tensor:
        """All latent values of each row in one vector, in the order of the sites, ``(R, V)``."""
        return torch.cat(list(self._site_values(x).values()), -1)

    def roundtrip(self, x: Tensor) -> Tensor:
        """The features of h(x), ``(R, F)``: other than x where T was cut off near the end of a support."""
        with torch.no_grad():
            whole = self._whole(x)
            return x + (self.layout.flatten(self.layout.values(whole)) - whole)[self._own]

    def site_name(self, feature: int) -> str:
        """The site that a feature belongs to."""
        return [site.name for site in self.layout.sites if self.layout.offsets[site.name] <= feature][-1]

    def size_of(self, name: str, row: int, x: Tensor) -> float:
        """The largest value in size of a site in one row."""
        return float(self._site_values(x)[name][row].abs().max())

    @property
    def _own(self) -> Tensor | slice:
        return slice(None) if self._index is None else self._index

    def _whole(self, x: Tensor) -> Tensor:
        """The features of all rows of the program."""
        own = x if self._index is None else self._others.to(x).index_copy(0, self._index, x)
        return own + self.shift

    def _negative_log_joint(self, x: Tensor) -> Tensor:
        """-log p of all rows of the program, ``(count,)``."""
        values = self.layout.values(self._whole(x))
        return -self.program.log_joint(values, skip=self.skip).reshape(self.program.rows.count)

    def _site_values(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            values = self.layout.values(self._whole(x))
            for site in self.layout.sites:
                flat = values[site.name].reshape(tuple(site.batch_shape) + (-1,))
                rows = self.layout.to_rows(flat, site)
                found[site.name] = rows.reshape(len(rows), -1)[self._own]
        return found


def _gradient(value: Tensor, leaf: Tensor, *, create_graph: bool) -> Tensor:
    """The gradient of every row; zeros where nothing depends on it."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value.sum(), leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True)[
        0
    ]
