"""The lasso of a program against the program itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_ext.penalized_form import PenalizedForm, penalized_form
from pyro_ext.program import Program
from pyro_ext.quadratic import NotFiniteError, NotQuadraticError

pytestmark = pytest.mark.usefixtures("float64")

N, D, F = 5, 4, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V, W = drawn(N, D), drawn(D, F, seed=1)
MASK = drawn(N, D, seed=2) > -0.5


def random_x(form: PenalizedForm, seed: int = 3, reach: float = 2.0) -> Tensor:
    """Feasible points, some of whose entries are 0."""
    x = reach * drawn(form.problem.num_rows, form.problem.rate.shape[-1], seed=seed).to(form.constant)
    x = torch.where(drawn(*x.shape, seed=seed + 1) > 0.8, 0, x)
    bounded = form.problem.nonnegative
    return x if bounded is None else torch.where(bounded, x.abs(), x)


def log_joint_at(form: PenalizedForm, program: Program, x: Tensor) -> Tensor:
    values = form.penalties.layout.values(x + form.penalties.shift)
    return program.log_joint(values).reshape(-1)


def assert_same_function(model: Callable[..., Any], *args: Any, tolerance: float = 1e-10) -> PenalizedForm:
    program = Program(model, args, {})
    form = penalized_form(program)
    for seed in (3, 5, 7):
        x = random_x(form, seed)
        truth, mine = log_joint_at(form, program, x), form.constant - form.problem.objective(x)
        assert mine.dtype == truth.dtype
        assert bool(((mine - truth).abs() <= tolerance * (1 + truth.abs())).all()), (mine, truth)
    return form


def observe(h: Tensor, v: Tensor, w: Tensor = W) -> None:
    pyro.sample("v", dist.Normal(h @ w.mT, 0.7).to_event(1), obs=v)


def shifted(v: Tensor) -> None:
    loc, scale = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.5, 1.0, 2.0])
    with pyro.plate("data", len(v)):
        observe(pyro.sample("h", dist.Laplace(loc, scale).to_event(1)), v)


def per_row(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        prior = dist.Laplace(drawn(len(v), F, seed=8), drawn(len(v), F, seed=9).exp())
        observe(pyro.sample("h", prior.to_event(1)), v)


def scale_of_each_row(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        prior = dist.Laplace(0.0, drawn(len(v), 1, seed=9).exp()).expand([len(v), F]).to_event(1)
        observe(pyro.sample("h", prior), v)


def exponential(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        observe(pyro.sample("h", dist.Exponential(torch.tensor([0.5, 1.0, 2.0])).to_event(1)), v)


def half_normal(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        observe(pyro.sample("h", dist.HalfNormal(torch.tensor([0.5, 1.0, 2.0])).to_event(1)), v)


def half_normal_per_row(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        observe(pyro.sample("h", dist.HalfNormal(drawn(len(v), F, seed=9).exp()).to_event(1)), v)


def mixed(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Normal(torch.tensor([1.0, -1.0]), 2.0).to_event(1))
        h = pyro.sample("h", dist.Laplace(0.3, 0.5).expand([F]).to_event(1))
        e = pyro.sample("e", dist.Exponential(2.0))
        s = pyro.sample("s", dist.HalfNormal(0.7))
        y = pyro.sample("y", dist.Normal(z.sum(-1) + h[..., 0], 0.5))
        mean = h @ W.T + z @ W[:, :2].T + (e - s + y)[..., None]
        pyro.sample("v", dist.Normal(mean, 0.7).to_event(1), obs=v)


def inner_plates(v: Tensor) -> None:
    scale = torch.tensor([[0.3], [0.5], [0.7], [0.9]])
    with pyro.plate("data", len(v), dim=-1):
        top = pyro.sample("top", dist.Laplace(0.2, 1.0))
        with pyro.plate("dims", D, dim=-2):
            h = pyro.sample("h", dist.Laplace(scale, 2 * scale))
            e = pyro.sample("e", dist.Exponential(1.5).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(top + h + e.sum(-1), 0.5), obs=v.T)


def rows_inside(v: Tensor) -> None:
    """The row plate stands left of the inner one."""
    with pyro.plate("data", len(v), dim=-2), pyro.plate("dims", D, dim=-1):
        h = pyro.sample("h", dist.Laplace(torch.arange(4.0), 1 + torch.arange(4.0)))
        pyro.sample("v", dist.Normal(h, 0.5), obs=v)


def subsampled(v: Tensor) -> None:
    with pyro.plate("data", 40, subsample_size=len(v)):
        h = pyro.sample("h", dist.Laplace(0.1, 0.5).expand([F]).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(h + z[..., None], v)


def inner_subsampled(v: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-1):
        top = pyro.sample("top", dist.Laplace(0.2, 0.5))
        with pyro.plate("dims", 12, subsample_size=D, dim=-2):
            h = pyro.sample("h", dist.Laplace(0.1, 0.5))
            pyro.sample("v", dist.Normal(h + top, 0.5), obs=v.T)


def nested_events(v: Tensor) -> None:
    loc, scale = drawn(3, 4, seed=8), drawn(3, 4, seed=9).exp()
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(loc, scale).to_event(2))
        e = pyro.sample("e", dist.Exponential(scale).to_event(2))
        pyro.sample("v", dist.Normal(h.sum(-2) + e.cumsum(-2)[..., 1, :], 0.5).to_event(1), obs=v)


def held_prior(v: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D, F]).to_event(2), obs=W)
    pyro.factor("penalty", -3.0 * w.abs().sum())
    with pyro.plate("data", len(v)):
        observe(pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1)), v, w)


def masked_by_handler(v: Tensor) -> None:
    with pyro.plate("data", len(v), dim=-1):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        with pyro.plate("dims", D, dim=-2), poutine.mask(mask=MASK.T):
            pyro.sample("v", dist.Normal((h @ W.T).mT, 0.5), obs=v.T)


def masked_by_distribution(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.T, 0.5).mask(MASK).to_event(1), obs=v)


def scaled(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        with poutine.scale(scale=2.5):
            h = pyro.sample("h", dist.Laplace(0.2, 0.5).expand([F]).to_event(1))
            s = pyro.sample("s", dist.HalfNormal(0.5))
        with poutine.scale(scale=0.3):
            observe(h + s[..., None], v)


def scaled_by_row(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        with poutine.scale(scale=1 + torch.arange(float(N))):
            h = pyro.sample("h", dist.Laplace(0.2, 0.5).expand([F]).to_event(1))
            s = pyro.sample("s", dist.HalfNormal(0.5))
        observe(h + s[..., None], v)


def own_design(v: Tensor) -> None:
    w = drawn(N, D, F, seed=4)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.4, 0.5).expand([F]).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(0.5))
        mean = (w @ h.unsqueeze(-1)).squeeze(-1) + s[..., None]
        pyro.sample("v", dist.Normal(mean, 0.7).to_event(1), obs=v)


def without_plate(v: Tensor) -> None:
    h = pyro.sample("h", dist.Laplace(0.4, 0.5).expand([F]).to_event(1))
    pyro.sample("v", dist.Normal(h @ W.T, 0.7).expand(v.shape).to_event(2), obs=v)


SERVED = [
    shifted,
    per_row,
    scale_of_each_row,
    exponential,
    half_normal,
    half_normal_per_row,
    mixed,
    inner_plates,
    rows_inside,
    subsampled,
    inner_subsampled,
    nested_events,
    held_prior,
    masked_by_handler,
    masked_by_distribution,
    scaled,
    scaled_by_row,
    own_design,
    without_plate,
]


@pytest.mark.parametrize("model", SERVED, ids=lambda m: m.__name__)
def test_the_form_is_the_program(model: Callable[..., Any]) -> None:
    assert_same_function(model, V)


@pytest.mark.parametrize(
    "program",
    [shifted, own_design, mixed],
)
def test_one_row(program: Callable[..., Any]) -> None:
    if program is not own_design:
        assert_same_function(program, V[:1])
    assert_same_function(without_plate, V[:1])


def test_hidden_values_are_never_read() -> None:
    hidden = torch.where(MASK, V, torch.nan)
    for model in (masked_by_handler, masked_by_distribution):
        whole, holed = penalized_form(Program(model, (V,), {})), penalized_form(Program(model, (hidden,), {}))
        assert torch.equal(whole.problem.linear, holed.problem.linear)
        assert torch.equal(whole.constant, holed.constant)
        # Rows differ in what is observed, and so in G.
        assert holed.problem.quadratic.shape == (N, F, F)


def test_shapes_of_what_rows_share() -> None:
    shared = penalized_form(Program(shifted, (V,), {}))
    assert shared.problem.quadratic.shape == (F, F)
    assert shared.problem.rate.shape == (F,)
    assert shared.penalties.shift.shape == (F,)
    assert shared.problem.nonnegative is None
    apart = penalized_form(Program(per_row, (V,), {}))
    assert apart.problem.quadratic.shape == (F, F)
    assert apart.problem.rate.shape == (N, F)
    assert apart.penalties.shift.shape == (N, F)
    assert penalized_form(Program(own_design, (V,), {})).problem.quadratic.shape == (N, F + 1, F + 1)


def test_rates_and_bounds_of_several_sites() -> None:
    form = penalized_form(Program(mixed, (V,), {}))
    # z (2), h (3), e, s, y in the order of the program.
    assert torch.allclose(form.problem.rate, torch.tensor([0.0, 0, 2, 2, 2, 2, 0, 0]))
    assert form.problem.nonnegative is not None
    assert form.problem.nonnegative.tolist() == [False] * 5 + [True, True, False]
    assert form.penalties.names == {"h", "e", "s"}
    assert form.penalties.shift.tolist() == [0, 0, 0.3, 0.3, 0.3, 0, 0, 0]


def test_rows_of_a_subsample_are_not_scaled() -> None:
    """N/B multiplies a row's prior and its data alike, and is divided out."""
    assert torch.allclose(penalized_form(Program(subsampled, (V,), {})).problem.rate[:F], torch.tensor(2.0))
    # A plate inside a row is not.
    form = penalized_form(Program(inner_subsampled, (V,), {}))
    assert torch.allclose(form.problem.rate, torch.tensor([2.0] + D * [2.0 * 12 / D]))


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)

    def single(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.3, 0.5).expand([F]).to_event(1))
            s = pyro.sample("s", dist.HalfNormal(0.5))
            observe(h + s[..., None], v, W.float())

    form = assert_same_function(single, V.float(), tolerance=1e-5)
    assert {form.problem.quadratic.dtype, form.problem.rate.dtype, form.constant.dtype} == {torch.float32}


def test_theta_is_the_present_one() -> None:
    def model(v: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5))
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(v)):
            observe(pyro.sample("h", dist.Laplace(loc, scale).expand([F]).to_event(1)), v)

    program = Program(model, (V,), {})
    assert torch.allclose(penalized_form(program).problem.rate, torch.tensor(2.0))
    pyro.param("scale").data.fill_(0.25)
    pyro.param("loc").data.fill_(1.5)
    form = penalized_form(program)
    assert torch.allclose(form.problem.rate, torch.tensor(4.0))
    assert torch.allclose(form.penalties.shift, torch.tensor(1.5))
    x = random_x(form)
    assert torch.allclose(form.constant - form.problem.objective(x), log_joint_at(form, program, x), rtol=1e-12)
    for part in (form.problem.rate, form.problem.linear, form.problem.quadratic, form.constant, form.penalties.shift):
        assert not part.requires_grad


def logistic(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.Bernoulli(logits=h @ W.T).to_event(1), obs=(v > 0).double())


def heavy_tails(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(3.0, h @ W.T, 1.0).to_event(1), obs=v)


def huber(v: Tensor) -> None:
    """Quadratic for a long way: the kink lies three standard deviations of the prior out."""
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
        loss = torch.nn.functional.huber_loss(h @ W.T, v.expand(h.shape[:-1] + (D,)), reduction="none", delta=3.0)
        pyro.sample("y", dist.Normal(h[..., 0], 1.0), obs=v[:, 0])
        pyro.factor("loss", -loss.sum(-1))


def scale_mixture(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        b = pyro.sample("b", dist.HalfNormal(1.0))
        h = pyro.sample("h", dist.Laplace(0.0, 1 + b[..., None]).expand([len(v), F]).to_event(1))
        observe(h, v)


def moving_kink(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Laplace(z[..., None], 1.0).expand([len(v), F]).to_event(1))
        observe(h, v)


def masked_prior(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        with poutine.mask(mask=torch.arange(len(v)) > 1):
            h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        observe(h, v)


def masked_prior_distribution(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1).mask(torch.arange(len(v)) > 1))
        observe(h, v)


@pytest.mark.parametrize(
    "model",
    [logistic, heavy_tails, huber, scale_mixture, moving_kink, masked_prior, masked_prior_distribution],
    ids=lambda m: m.__name__,
)
def test_what_is_not_quadratic_is_told(model: Callable[..., Any]) -> None:
    with pytest.raises(NotQuadraticError, match=r"quadratic in .* beside sparse priors, but it is not at the present"):
        penalized_form(Program(model, (V,), {}))


def test_a_prior_on_another_latent_is_part_of_the_rest() -> None:
    """Only priors that stand alone are peeled off; a Normal one that depends on a Laplace latent is quadratic."""

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            z = pyro.sample("z", dist.Normal(h * 2, 0.1).to_event(1))
            observe(z, v)

    form = assert_same_function(model, V)
    assert form.penalties.names == {"h"}


def test_a_masked_normal_prior_is_quadratic() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.mask(mask=torch.arange(len(v)) > 1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([F]).to_event(1))
            h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
            observe(h + z, v)

    assert assert_same_function(model, V).problem.quadratic.shape == (N, 2 * F, 2 * F)


def test_other_positive_latents_are_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            g = pyro.sample("g", dist.Gamma(2.0, 1.0))
            observe(h + g[..., None], v)

    with pytest.raises(NotQuadraticError, match=r"positive ones with .* but got the constrained continuous site 'g'"):
        penalized_form(Program(model, (V,), {}))


def test_what_is_not_finite_is_told() -> None:
    def model(v: Tensor) -> None:
        w = pyro.param("w", torch.ones(F))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 0.5).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal((h * w).sum(-1), 1.0), obs=v[:, 0])

    program = Program(model, (V,), {})
    pyro.param("w").data[1] = torch.nan
    with pytest.raises(NotFiniteError, match="finite at h = 0"):
        penalized_form(program)
