"""The quadratic form of a program: it reproduces log p(v, h) on the support, or the program is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_ext import EM, FixedPoint, log_evidence
from pyro_ext.distributions import Tabulated
from pyro_ext.guides import MeanField
from pyro_ext.program import Program
from pyro_ext.quadratic import NotQuadraticError, QuadraticForm, quadratic_form
from tests.oracles.programs import (
    class_means,
    sigmoid_network,
    sigmoid_network_parameters,
    sparse_coding,
    sparse_coding_parameters,
)

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-9


def random_values(program: Program) -> dict[str, Tensor]:
    """Values on the support: a draw where it is discrete, wide reals where it is not."""
    values = {}
    for site in program.latents:
        draw = site.fn.expand(site.batch_shape).sample()
        values[site.name] = draw if site.kind.is_discrete else 3 * torch.randn_like(draw)
    return values


def check(model: Callable[..., Any], *args: Any, **kwargs: Any) -> QuadraticForm:
    """Compare the form with log p(v, h) of a trace, each row and then their sum, at many states."""
    program = Program(model, args, kwargs)
    form = quadratic_form(program)
    assert torch.equal(form.coupling, form.coupling.mT)
    for _ in range(10):
        values = random_values(program)
        guess = form.log_joint(form.layout.flatten(values))
        truth = program.log_joint(values).reshape(-1)
        torch.testing.assert_close(guess, truth, atol=TOLERANCE, rtol=TOLERANCE)
        if program.rows.scale == 1:
            total = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs).log_prob_sum()
            torch.testing.assert_close(guess.sum(), total, atol=TOLERANCE, rtol=TOLERANCE)
    return form


def test_sparse_coding_has_the_books_couplings() -> None:
    b, W, beta = sparse_coding_parameters(5, 4)
    v = torch.randn(7, 5)
    form = check(sparse_coding, v)
    torch.testing.assert_close(form.coupling, -(W.mT * beta) @ W)
    torch.testing.assert_close(form.linear, b + (v * beta) @ W)


@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("num_latents", [1, 3, 12])
def test_sparse_coding_of_any_width(num_rows: int, num_latents: int) -> None:
    sparse_coding_parameters(5, num_latents)
    check(sparse_coding, torch.randn(num_rows, 5))


def test_linear_gaussian_with_two_sites() -> None:
    W, U = torch.randn(5, 2), torch.randn(5, 3)
    M = torch.randn(3, 2)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Normal(0.5, torch.tensor([1.0, 2.0])).to_event(1))
            c = pyro.sample("c", dist.MultivariateNormal(a @ M.T, 2 * torch.eye(3) + 0.5))
            pyro.sample("v", dist.Normal(a @ W.T + c @ U.T, 0.7).to_event(1), obs=v)

    assert check(model, torch.randn(6, 5)).coupling.shape == (5, 5)


def test_binary_one_hot_and_real_sites_together() -> None:
    W, U, w = torch.randn(4, 3), torch.randn(4, 5), torch.randn(4)

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(torch.rand(3)).to_event(1))
            c = pyro.sample("c", dist.OneHotCategorical(torch.rand(5)))
            x = pyro.sample("x", dist.Normal(a.sum(-1), 1.5))
            pyro.sample("v", dist.Normal(a @ W.T + c @ U.T + x[..., None] * w, 0.9).to_event(1), obs=v)

    check(_fixed(model), torch.randn(6, 4))


def _fixed(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same random constants in every run of a model."""

    def run(*args: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model(*args)

    return run


def nested_right(v: Tensor) -> None:
    """Rows at dim -1, an inner plate of latents at dim -2; v is (3, N)."""
    with pyro.plate("rows", v.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", v.shape[-2], dim=-2):
            c = pyro.sample("c", dist.Bernoulli(0.6))
            x = pyro.sample("x", dist.Normal(a - c, 1.2))
            pyro.sample("v", dist.Normal(a + 2 * c - x, 0.5), obs=v)


def nested_left(v: Tensor) -> None:
    """Rows at dim -2, an inner plate of latents at dim -1; v is (N, 3)."""
    with pyro.plate("rows", v.shape[-2], dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("inner", v.shape[-1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.6))
            x = pyro.sample("x", dist.Normal(a - c, 1.2))
            pyro.sample("v", dist.Normal(a + 2 * c - x, 0.5), obs=v)


def test_nested_plates_agree_on_either_side() -> None:
    v = torch.randn(4, 3)
    left, right = check(nested_left, v), check(nested_right, v.mT)
    assert left.layout.num_features == 7
    torch.testing.assert_close(left.coupling, right.coupling)
    torch.testing.assert_close(left.linear, right.linear)
    torch.testing.assert_close(left.constant, right.constant)


def test_a_global_latent_makes_one_row() -> None:
    def model(v: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(mu, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    assert check(model, torch.randn(4)).linear.shape == (1, 5)


def test_a_design_matrix_a_row_gives_couplings_a_row() -> None:
    def model(v: Tensor, X: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal((X * h[..., None, :]).sum(-1), 1.0).to_event(1), obs=v)

    X = torch.randn(6, 5, 3)
    form = check(model, torch.randn(6, 5), X)
    torch.testing.assert_close(form.coupling, -torch.eye(3) - X.mT @ X)


@pytest.mark.parametrize("num_latents", [1, 4])
def test_one_masked_row_among_many_is_not_overlooked(num_latents: int) -> None:
    W = torch.randn(5, num_latents)
    mask = torch.ones(50, 5, dtype=torch.bool)
    mask[17, 2] = False

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([num_latents]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, 1.0).mask(mask).to_event(1), obs=v)

    form = check(model, torch.randn(50, 5))
    assert form.coupling.shape == (50, num_latents, num_latents)


def test_handlers_that_mask_and_scale_are_kept() -> None:
    W = torch.randn(5, 3)
    mask = torch.rand(6) > 0.4

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.scale(scale=0.3):
                h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.7])).to_event(1))
            with poutine.mask(mask=mask):
                pyro.sample("v", dist.Normal(h @ W.T, 1.0).to_event(1), obs=v)

    check(model, torch.randn(6, 5))
    check(poutine.scale(model, scale=2.5), torch.randn(6, 5))


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.1, 2.0, 1.0, 3.0])], ids=["one", "a row"])
def test_scaled_priors_are_read_from_their_distribution_too(scale: Any) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
                h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.1, 0.7])).to_event(1))
            pyro.sample("v", dist.Normal(z @ torch.tensor([-1.0, 0.5, 2.0]) + h.sum(-1), 0.8), obs=v)

    check(model, torch.randn(4))


def test_subsampled_inner_plates_keep_their_scale() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            with pyro.plate("inner", 6, dim=-2, subsample=torch.tensor([5, 0, 3])):
                c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
                pyro.sample("v", dist.Normal(a + c @ torch.tensor([-1.0, 0.5, 2.0]), 0.5), obs=v)

    check(model, torch.randn(3, 4))


@pytest.mark.parametrize("explicit", [False, True])
def test_subsampled_rows_are_not_scaled(explicit: bool) -> None:
    b, W, beta = sparse_coding_parameters(5, 4)

    def model(v: Tensor, index: Tensor | None) -> None:
        chosen = {"subsample": index} if explicit else {"subsample_size": 6}
        with pyro.plate("data", len(v), **chosen) as rows:
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("b")).to_event(1))
            mean = h @ pyro.param("W").T
            pyro.sample("v", dist.Normal(mean, pyro.param("beta").rsqrt()).to_event(1), obs=v[rows])

    v = torch.randn(20, 5)
    index = torch.tensor([3, 19, 0, 7, 2, 11])
    program = Program(model, (v, index), {})
    form = check(model, v, index)
    rows = index if explicit else program.indices["data"]
    torch.testing.assert_close(quadratic_form(program).linear, b + (v[rows] * beta) @ W)
    torch.testing.assert_close(form.coupling, -(W.mT * beta) @ W)


def test_graph_to_theta_is_kept_on_demand() -> None:
    sparse_coding_parameters(5, 3)
    v, h = torch.randn(4, 5), torch.bernoulli(torch.full((4, 3), 0.5))
    program = Program(sparse_coding, (v,), {})
    assert not quadratic_form(program).log_joint(h).requires_grad
    quadratic_form(program, create_graph=True).log_joint(h).sum().backward()
    got = [pyro.param(name).unconstrained().grad for name in ("b", "W", "beta")]
    for name in ("b", "W", "beta"):
        pyro.param(name).unconstrained().grad = None
    program.log_joint({"h": h}).sum().backward()
    for gradient, name in zip(got, ("b", "W", "beta"), strict=True):
        torch.testing.assert_close(gradient, pyro.param(name).unconstrained().grad)


def not_quadratic(model: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(NotQuadraticError, match="Expected log p.* to be quadratic in 'h.* at the present theta. Use"):
        quadratic_form(Program(model, args, {}))


@pytest.mark.parametrize("num_rows", [1, 2, 10])
def test_a_sigmoid_network_is_refused(num_rows: int) -> None:
    sigmoid_network_parameters(4)
    not_quadratic(sigmoid_network, torch.bernoulli(torch.full((num_rows, 4), 0.5)))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10])
@pytest.mark.parametrize("order", [2, 3, 6])
def test_a_product_of_units_is_refused_however_rarely_all_are_on(num_rows: int, order: int) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([order]).to_event(1))
            pyro.sample("v", dist.Normal(h.prod(-1), 1.0), obs=v)

    not_quadratic(model, torch.randn(num_rows))


def test_a_link_function_of_real_latents_is_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Bernoulli(logits=h), obs=v)

    not_quadratic(model, torch.ones(3))


def test_a_network_without_weights_is_quadratic() -> None:
    sigmoid_network_parameters(4)
    with torch.no_grad():
        pyro.param("W1").zero_()
        pyro.param("W2").zero_()
    check(sigmoid_network, torch.bernoulli(torch.full((6, 4), 0.5)))


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (dist.Categorical(torch.ones(3)), "categorical"),
        (dist.Gamma(1.0, 1.0), "constrained continuous"),
        (dist.Poisson(1.0), "other discrete"),
    ],
)
def test_kinds_without_a_quadratic_form_are_named(fn: Any, kind: str) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", fn)
            pyro.sample("v", dist.Normal(h.double(), 1.0), obs=v)

    with pytest.raises(
        NotQuadraticError, match=f"Expected binary, one-hot or real latents, but got the {kind} site 'h'"
    ):
        quadratic_form(Program(model, (torch.zeros(2),), {}))


def test_a_hard_zero_of_a_prior_is_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.tensor([0.0, torch.inf])).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    pyro.enable_validation(False)
    with pytest.raises(ValueError, match=r"Expected a prior above 0 on every state of 'h' .*19.56.* hard zero"):
        quadratic_form(Program(model, (torch.zeros(2),), {}))


def test_a_hard_zero_of_the_likelihood_is_named() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.factor("never both", torch.where(h * v > 0.5, -torch.inf, 0.0))

    with pytest.raises(
        ValueError, match=r"Expected p.* above 0 and finite on every state .*but got log p = -inf in row 0"
    ):
        quadratic_form(Program(model, (torch.ones(2),), {}))


def test_too_many_couplings_a_row_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(v: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(x * h.sum(-1), 1.0), obs=v)

    monkeypatch.setattr("pyro_ext.quadratic.MAX_ROW_COUPLINGS", 15)
    with pytest.raises(
        NotQuadraticError, match="Expected rows that share their couplings, but got 4 rows of 2 features"
    ):
        quadratic_form(Program(model, (torch.randn(4), torch.randn(4)), {}))


def test_a_prior_without_natural_parameters_is_tested_like_the_rest() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", Tabulated(torch.tensor([0.3, 0.1, 0.2, 2.0]), [1, 1]))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    not_quadratic(model, torch.randn(3))


def test_integers_are_left_to_enumeration() -> None:
    pyro.param("logits", torch.randn(3))
    pyro.param("mu", torch.randn(3, 2))
    with pytest.raises(NotQuadraticError, match="the categorical site 'z'"):
        quadratic_form(Program(class_means, (torch.randn(4, 2),), {}))


def far_away(v: Tensor, bend: Callable[[Tensor], Tensor], prior: float, noise: float) -> None:
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Normal(0.0, prior))
        pyro.sample("v", dist.Normal(bend(z), noise), obs=v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bend", "prior", "noise", "v"),
    [
        (lambda z: 100 * torch.tanh(z / 100), 100.0, 10.0, [0.0, 45.0, 90.0]),
        (lambda z: 1000 * torch.tanh(z / 1000), 100.0, 10.0, [0.0]),
        (lambda z: z.clamp(max=1), 1.0, 0.5, [2.0]),
        (lambda z: torch.relu(z - 1), 1.0, 1.0, [2.0]),
        (lambda z: z + 100 * (z / 100) ** 3, 100.0, 10.0, [0.0]),
        (lambda z: torch.where(z > 2, 5 * z, z), 1.0, 1.0, [10.0]),
    ],
    ids=["tanh", "wider tanh", "clamp", "relu", "cube", "kink"],
)
def test_bends_far_from_the_origin_are_seen(
    bend: Callable[[Tensor], Tensor], prior: float, noise: float, v: list[float], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    program = Program(far_away, (torch.tensor(v), bend, prior, noise), {})
    with pytest.raises(NotQuadraticError, match=r"quadratic in 'z'.*Gradient\(optim\)"):
        quadratic_form(program)


def test_a_bend_beyond_all_tests_is_seen_where_q_puts_its_mass() -> None:
    def bend(z: Tensor) -> Tensor:
        return torch.where(z > 60, z + 10, z)

    v = torch.tensor([0.0, 100.0])
    guide = MeanField(far_away)
    em = EM(far_away, guide, e_step=FixedPoint(), m_step=None)
    with pytest.raises(NotQuadraticError, match="where q puts its mass"):
        em.step(v, bend, 1.0, 0.1)
    evidence = log_evidence(far_away, guide, v[:1], bend, 1.0, 0.1)
    assert evidence.exact
    assert not log_evidence(far_away, AutoNormal(far_away), v, bend, 1.0, 0.1, num_samples=10).exact


@pytest.mark.parametrize("couple", [lambda z: z - z.mean(-1, keepdim=True), lambda z: torch.roll(z, 1, -1)])
def test_rows_that_couple_inside_a_plate_are_refused(couple: Callable[[Tensor], Tensor]) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(3 * couple(z), 1.0), obs=v)

    v = torch.randn(6)
    guide = MeanField(model)
    for call in (EM(model, guide, e_step=FixedPoint(), m_step=None).step, lambda v: log_evidence(model, guide, v)):
        with pytest.raises(ValueError, match="rows that do not depend on each other in the plates \\['data'\\]"):
            call(v)


@pytest.mark.parametrize("same", [True, False], ids=["one scale", "a scale a row"])
def test_rows_that_share_couplings_by_chance_have_gradients_of_their_own(same: bool) -> None:
    """At s = 1 all rows have the same J; where each has its own s, they would part at another theta."""
    W, v = torch.randn(3), torch.randn(4)

    def model(v: Tensor) -> None:
        s = pyro.param("s", torch.ones(1 if same else 4), constraint=dist.constraints.positive)
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Bernoulli(0.4).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W, s), obs=v)

    program = Program(model, (v,), {})
    assert quadratic_form(program).coupling.dim() == 2
    form = quadratic_form(program, create_graph=True)
    assert form.coupling.dim() == (2 if same else 3)
    states = torch.stack([(torch.arange(8) >> k) % 2 for k in range(3)], -1).to(v)
    log_joint = torch.stack([form.log_joint(state.expand(4, 3)) for state in states], -1)
    s = pyro.param("s").unconstrained()
    (found,) = torch.autograd.grad(log_joint.logsumexp(-1).sum(), s)
    prior = states.sum(-1) * torch.tensor(0.4).log() + (3 - states.sum(-1)) * torch.tensor(0.6).log()
    log_p = prior + dist.Normal(states @ W, pyro.param("s").expand(4)[:, None]).log_prob(v[:, None])
    (truth,) = torch.autograd.grad(log_p.logsumexp(-1).sum(), s)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
