"""Sites that a latent selects are read; everything else is differentiated. The oracle is the program's own log p."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.evaluators import enumerate_log_joint, latent_units
from pyro_ext.program import Program
from pyro_ext.quadratic import NotQuadraticError, QuadraticForm, quadratic_form
from pyro_ext.rest import read_rest
from pyro_ext.selected import Components, Selected
from pyro_ext.states import enumerate_states

pytestmark = pytest.mark.usefixtures("float64")

K = 3
LOCS = torch.tensor([-1.0, 0.5, 2.0])


class Normals(Components):
    """K densities over the reals."""

    support = constraints.real

    def __init__(self, locs: Tensor, scale: float = 1.0) -> None:
        self.locs, self.scale = locs, scale

    def log_prob(self, v: Tensor) -> Tensor:
        return dist.Normal(self.locs, self.scale).log_prob(v[:, None])

    def draw(self, h: Tensor) -> Tensor:
        return (h * self.locs).sum(-1) + self.scale * torch.randn(h.shape[:-1])


class Gammas(Components):
    """K densities over the positive numbers, where 0 and negative numbers have none."""

    support = constraints.positive

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def log_prob(self, v: Tensor) -> Tensor:
        return dist.LogNormal(self.rates, 1.0).log_prob(v[:, None])

    def draw(self, h: Tensor) -> Tensor:
        return torch.ones(h.shape[:-1])


def choice() -> Any:
    return dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]).double())


def select(name: str, h: Tensor, v: Tensor, locs: Tensor | None = None) -> None:
    components = Normals(LOCS.double() if locs is None else locs)
    pyro.sample(name, Selected(h, components, num_visible=None), obs=v)


def form_of(model: Callable[..., Any], *args: Any) -> tuple[QuadraticForm, Program, bool]:
    """The form, compared with log p(v, h) at every state, and whether the whole rest was read."""
    program = Program(model, args, {})
    form = quadratic_form(program)
    states = enumerate_states(latent_units(form.layout)).to(form.linear)
    for state in states:
        flat = state.expand_as(form.linear)
        truth = program.log_joint(form.layout.values(flat)).reshape(-1)
        torch.testing.assert_close(form.log_joint(flat), truth, rtol=1e-10, atol=1e-10)
    rest = read_rest(program, form.layout, program.origin(form.layout.num_features), program.peelable)
    return form, program, rest.differentiated is None


def lone(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        select("v", pyro.sample("h", choice()), v)


def two_on_one(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        select("v", h, v)
        select("w", h, 2 * v, LOCS.double() + 1)


def and_another_site(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        select("v", h, v)
        pyro.sample("w", dist.Normal(h @ LOCS.double(), 1.0), obs=v)


def and_another_latent(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        b = pyro.sample("b", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))
        select("v", h, v)
        pyro.sample("w", dist.Normal(b.sum(-1) - h[..., 0], 0.7), obs=v)


def inner(v: Tensor) -> None:
    with pyro.plate("data", v.shape[-1], dim=-1), pyro.plate("inner", v.shape[-2], dim=-2):
        select("v", pyro.sample("h", choice()), v)


def inner_left(v: Tensor) -> None:
    with pyro.plate("data", v.shape[-2], dim=-2):
        g = pyro.sample("g", choice())
        with pyro.plate("inner", v.shape[-1], dim=-1):
            h = pyro.sample("h", choice())
            select("v", h, v)
            pyro.sample("w", dist.Normal((g + h) @ LOCS.double(), 1.0), obs=v)


def shared_by_inner(v: Tensor) -> None:
    """One choice a row for all its inner elements: h is expanded there."""
    with pyro.plate("data", v.shape[-1], dim=-1):
        h = pyro.sample("h", choice())
        with pyro.plate("inner", v.shape[-2], dim=-2):
            select("v", h, v)


def two_units(v: Tensor) -> None:
    """Two one-hot units a row in one site."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.OneHotCategorical(torch.ones(2, K).double()).to_event(1))
        fn = Selected(h, Normals(LOCS.double()), num_visible=None).to_event(1)
        pyro.sample("v", fn, obs=torch.stack([v, -v], -1))


def masked(v: Tensor) -> None:
    mask = torch.arange(len(v)) % 2 == 0
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        fn = Selected(h, Normals(LOCS.double()), num_visible=None).mask(mask)
        pyro.sample("v", fn, obs=torch.where(mask, v, torch.nan))


def masked_by_handler(v: Tensor) -> None:
    mask = torch.arange(len(v)) % 2 == 0
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        with poutine.mask(mask=mask):
            select("v", h, v)


def masked_by_number(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        pyro.sample("v", Selected(h, Normals(LOCS.double()), num_visible=None).mask(False), obs=v)
        select("w", h, v)


def scaled(v: Tensor) -> None:
    """As many rows as classes: a scale a row must not be taken for one a class."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", choice())
        with poutine.scale(scale=1.0 + torch.arange(len(v)).double()):
            select("v", h, v)


def subsampled(v: Tensor) -> None:
    with pyro.plate("data", 4 * len(v), subsample=torch.arange(len(v))):
        select("v", pyro.sample("h", choice()), v)


def subsampled_inside(v: Tensor, size: int = 10) -> None:
    """A choice a row and one in every element of an inner plate, of which some stand for all."""
    with pyro.plate("data", v.shape[-1], dim=-1):
        select("w", pyro.sample("g", choice()), v[0])
        with pyro.plate("inner", size, subsample_size=v.shape[-2], dim=-2):
            select("v", pyro.sample("h", choice()), v)


READ = [lone, two_on_one, inner, two_units, masked, scaled, subsampled, subsampled_inside]
MIXED = [and_another_site, and_another_latent, inner_left, shared_by_inner, masked_by_handler, masked_by_number]


@pytest.mark.parametrize("model", READ + MIXED, ids=lambda m: m.__name__)
def test_the_form_is_log_p_at_every_state(model: Callable[..., None]) -> None:
    v = torch.randn(2, 3) if "inner" in model.__name__ or "inside" in model.__name__ else torch.randn(3)
    assert form_of(model, v)[2] is (model in READ)


def test_subsampling_scales_the_inner_plate_alone() -> None:
    v = torch.randn(2, 3)
    form, program, _ = form_of(subsampled_inside, v)
    assert program.rows.scale == 1.0
    whole = form_of(subsampled_inside, v, 2)[0]
    torch.testing.assert_close(form.linear[:, :K], whole.linear[:, :K])
    torch.testing.assert_close(form.linear[:, K:], 5.0 * whole.linear[:, K:])
    torch.testing.assert_close(form_of(subsampled, v[0])[0].linear, form_of(lone, v[0])[0].linear)


@pytest.mark.parametrize(
    "change",
    [lambda h: h[..., [1, 0, 2]], lambda h: 1 - h, lambda h: h.clone(), lambda h: h.reshape(h.shape)],
    ids=["other order", "turned over", "copy", "view"],
)
def test_a_changed_latent_is_not_read(change: Callable[[Tensor], Tensor]) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            select("v", change(pyro.sample("h", choice())), v)

    assert not form_of(model, torch.randn(4))[2]


def test_a_narrower_choice_is_not_read() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", choice())
            select("v", h[..., :2], v, LOCS[:2].double())

    assert not form_of(model, torch.randn(4))[2]


def test_components_that_another_latent_moves_are_not_read() -> None:
    class Moved(Normals):
        """Means that depend on the row."""

        def log_prob(self, v: Tensor) -> Tensor:
            return dist.Normal(self.locs, 1.0).log_prob(v[..., None])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", choice())
            b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("v", Selected(h, Moved(b[..., None] + LOCS.double()), num_visible=None), obs=v)

    with pytest.raises(NotQuadraticError):
        quadratic_form(Program(model, (torch.randn(4),), {}))


def test_gradients_pass_what_is_hidden() -> None:
    """A hidden NaN, and a hidden value outside the support, reach no gradient of theta."""
    mask = torch.tensor([False, True, True, False])
    v = torch.tensor([torch.nan, 1.5, 0.2, -3.0])

    def model(v: Tensor) -> None:
        rates = pyro.param("rates", torch.tensor([0.1, 1.0, -0.5]).double())
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", choice())
            pyro.sample("v", Selected(h, Gammas(rates), num_visible=None).mask(mask), obs=v)

    def visible(v: Tensor) -> None:
        rates = pyro.param("rates")
        with pyro.plate("data", len(v)):
            pyro.sample("v", Selected(pyro.sample("h", choice()), Gammas(rates), num_visible=None), obs=v)

    form = quadratic_form(Program(model, (v,), {}), create_graph=True)
    rates = pyro.param("rates").unconstrained()
    (found,) = torch.autograd.grad(form.linear.exp().sum(), rates)
    truth = quadratic_form(Program(visible, (v[mask],), {}), create_graph=True)
    (expected,) = torch.autograd.grad(truth.linear.exp().sum(), rates)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_read_form_is_that_of_enumeration() -> None:
    def model(v: Tensor) -> None:
        locs = pyro.param("locs", LOCS.double())
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(K).double())))
            select("v", h, v, locs)

    program = Program(model, (torch.randn(5),), {})
    form = quadratic_form(program, create_graph=True)
    theta = [pyro.param(name).unconstrained() for name in ("locs", "logits")]
    found = torch.autograd.grad((form.constant[:, None] + form.linear).logsumexp(-1).sum(), theta)
    expected = torch.autograd.grad(enumerate_log_joint(program).logsumexp(-1).sum(), theta)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_reading_does_not_write_over_the_models_numbers() -> None:
    v = torch.randn(4)
    program = Program(lone, (v,), {})
    first, second = quadratic_form(program), quadratic_form(program)
    torch.testing.assert_close(first.linear, second.linear, rtol=0, atol=0)
    assert first.linear.data_ptr() != second.linear.data_ptr()
