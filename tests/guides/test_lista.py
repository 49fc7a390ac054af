"""LISTA: exactly ISTA before training, and what training it on the objective does."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.distributions import constraints

from pyro_ext.guides import LISTA, PSD, Amortized
from pyro_ext.guides.ista import shrink
from pyro_ext.models.sparse_coding import SparseCoding
from pyro_ext.models.sparse_priors import ExponentialPrior, LaplacePrior, SparsePrior, StudentTPrior

pytestmark = pytest.mark.usefixtures("float64")

D, F = 6, 9


def objective(v: Tensor, h: Tensor, W: Tensor, rate: Tensor, beta: Tensor, bias: Tensor) -> Tensor:
    """-log p(v, h) up to a constant, (R,)."""
    return 0.5 * ((v - bias - h @ W.T).square() * beta).sum(-1) + (rate * h.abs()).sum(-1)


def ista(
    v: Tensor, W: Tensor, rate: Tensor, beta: Tensor, bias: Tensor, num: int, *, nonnegative: bool = False
) -> Tensor:
    """Gradient steps of length 1 / L from h = 0, each followed by the shrinkage, element by element."""
    step = 1 / torch.linalg.eigvalsh(W.T @ torch.diag(beta) @ W).max()
    h = torch.zeros(len(v), W.shape[1])
    for _ in range(num):
        x = h - step * (-(v - bias - h @ W.T) * beta) @ W
        least = step * rate
        h = torch.where(x > least, x - least, torch.where((x < -least) & (not nonnegative), x + least, 0.0))
    return h


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v (20, D), W, rate (F,), beta (D,) and bias."""
    return 2 * torch.randn(20, D), torch.randn(D, F), 0.2 + torch.rand(F), 0.5 + torch.rand(D), torch.randn(D)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_untrained_layers_are_iterations_of_ista(num_layers: int, tied: bool, nonnegative: bool) -> None:
    v, *parts = problem()
    network = LISTA.from_dictionary(*parts, num_layers=num_layers, tied=tied, nonnegative=nonnegative)
    found = network(v)
    torch.testing.assert_close(found, ista(v, *parts, num_layers, nonnegative=nonnegative), rtol=1e-12, atol=1e-12)
    assert bool((found == 0).any())
    assert bool((found < 0).any()) != nonnegative


def test_numbers_serve_as_rate_and_precision_and_no_bias_is_zero() -> None:
    v, W, *_ = problem()
    parts = (W, torch.full((F,), 0.4), torch.full((D,), 2.0), torch.zeros(D))
    found = LISTA.from_dictionary(W, 0.4, 2.0, num_layers=3)(v)
    torch.testing.assert_close(found, ista(v, *parts, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_many_layers_reach_the_lasso(nonnegative: bool) -> None:
    v, W, *_ = problem()
    rate, beta = 0.7, 1.5
    found = LISTA.from_dictionary(W, rate, beta, num_layers=4000, nonnegative=nonnegative)(v[:4])
    lasso = Lasso(rate / (beta * D), fit_intercept=False, tol=1e-14, max_iter=100_000, positive=nonnegative)
    expected = torch.stack([torch.as_tensor(lasso.fit(W.numpy(), row.numpy()).coef_) for row in v[:4]])
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)


def test_every_layer_comes_nearer() -> None:
    v, *parts = problem()
    values = [objective(v, LISTA.from_dictionary(*parts, num_layers=k)(v), *parts) for k in range(1, 12)]
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(values))
    assert bool((values[-1] < values[0]).all())


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_all_parameters_have_the_gradient_of_finite_differences(tied: bool, nonnegative: bool) -> None:
    v, *parts = problem()
    network = LISTA.from_dictionary(*parts, num_layers=3, tied=tied, nonnegative=nonnegative)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    names = [name for name, _ in network.named_parameters()]
    assert names == ["A", "S", "log_theta", "bias"]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (v[:3],))

    assert torch.autograd.gradcheck(run, tuple(network.parameters()))
    network(v).square().sum().backward()
    # Of every layer, too.
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        per_layer = parameter.grad.flatten(1) if name != "bias" else parameter.grad[None]
        assert bool(per_layer.any(-1).all())


@pytest.mark.parametrize(("tied", "shapes"), [(True, (1, 1, 1)), (False, (4, 3, 4))])
def test_layers_share_or_own_their_parameters(tied: bool, shapes: tuple[int, int, int]) -> None:
    network = LISTA(D, F, 4, tied=tied)
    a, s, t = shapes
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        "A": (a, F, D),
        "S": (s, F, F),
        "log_theta": (t, F),
        "bias": (D,),
    }
    assert LISTA(D, F, 1, tied=tied).S is None


def test_untied_layers_are_computed_one_after_the_other() -> None:
    network = LISTA(D, F, 3, tied=False)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    v = torch.randn(5, D)
    assert network.S is not None
    h = shrink((v - network.bias) @ network.A[0].T, network.theta[0])
    for k in (1, 2):
        h = shrink((v - network.bias) @ network.A[k].T + h @ network.S[k - 1].T, network.theta[k])
    torch.testing.assert_close(network(v), h)


def test_built_from_sizes_it_is_ista_on_atoms_of_length_one() -> None:
    network = LISTA(D, F, 3)
    lengths = network.A[0].norm(dim=-1)
    L = 1 / lengths[0]
    torch.testing.assert_close(lengths, lengths[:1].expand(F))
    W, v = L * network.A[0].detach().T, torch.randn(7, D)
    expected = ista(v, W, torch.full((F,), 0.1), torch.ones(D), torch.zeros(D), 3)
    torch.testing.assert_close(network(v), expected)


def test_from_model_reads_the_present_values() -> None:
    v, W, rate, beta, bias = problem()
    plain = SimpleNamespace(W=W, rate=rate, beta=beta, bias=bias)
    expected = LISTA.from_dictionary(W, rate, beta, bias, num_layers=2, tied=False, nonnegative=True)(v)
    assert torch.equal(LISTA.from_model(plain, num_layers=2, tied=False, nonnegative=True)(v), expected)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__("sparse")
            self.W, self.rate, self.bias = PyroParam(W), 0.3, None
            self.beta = PyroParam(torch.tensor(2.0), constraints.positive)

        def forward(self) -> tuple[Tensor, Tensor]:
            return self.W, self.beta

    model = Model()
    assert torch.equal(LISTA.from_model(model)(v), LISTA.from_dictionary(W, 0.3, 2.0)(v))
    assert not list(pyro.get_param_store())
    # The store wins over the module's own tensors, after a load for example.
    model()
    state = pyro.get_param_store().get_state()
    state["params"] = {name: value + 1 for name, value in state["params"].items()}
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    found = LISTA.from_model(model)(v)
    torch.testing.assert_close(found, LISTA.from_dictionary(W + 1, 0.3, 2 * math.e)(v))
    # Neither the model's tensors nor a caller's are the network's.
    network = LISTA.from_model(plain)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(bool(x.any()) for x in (W, rate, beta, bias))


def test_building_from_a_dictionary_draws_nothing() -> None:
    _, *parts = problem()
    state = torch.get_rng_state()
    LISTA.from_dictionary(*parts)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_takes_the_dtype_of_the_dictionary() -> None:
    network = LISTA.from_dictionary(torch.randn(D, F, dtype=torch.float32), 0.3)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network(torch.randn(2, D, dtype=torch.float32)).dtype == torch.float32


def test_copies_and_states() -> None:
    v, *parts = problem()
    network = LISTA.from_dictionary(*parts, num_layers=3, tied=False, nonnegative=True)
    expected = network(v)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(v), expected)
        with torch.no_grad():
            other.A.zero_()
        assert torch.equal(network(v), expected)
    fresh = LISTA(D, F, 3, tied=False, nonnegative=True)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(v), expected)


def test_leading_dimensions_and_a_single_row() -> None:
    v, *parts = problem()
    network = LISTA.from_dictionary(*parts)
    codes = network(v)
    torch.testing.assert_close(network(v.reshape(4, 5, D)), codes.reshape(4, 5, F))
    torch.testing.assert_close(network(v[0]), codes[0])
    assert network(v[:0]).shape == (0, F)


@pytest.mark.parametrize("prior", [LaplacePrior(0.7), ExponentialPrior(torch.rand(F) + 0.3)])
def test_it_reads_the_sparse_coding_model_and_its_prior(prior: SparsePrior) -> None:
    model = SparseCoding(D, F, prior=prior, beta=3.0)
    v = model.dream(20)
    model.initialize(v)
    parts = (model.W, model.rate.expand(F), model.beta.expand(D), model.bias)
    with torch.no_grad():
        expected = ista(v, *parts, 4, nonnegative=prior.nonnegative)
    network = LISTA.from_model(model, num_layers=4)
    assert network.nonnegative == PSD.from_model(model).nonnegative == prior.nonnegative
    torch.testing.assert_close(network(v), expected, rtol=1e-12, atol=1e-12)
    guide = Amortized(model, network)
    torch.testing.assert_close(guide.posterior(v)["h"].mean, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(PSD.from_model(model)(v), LISTA.from_model(model, num_layers=1)(v))
    assert LISTA.from_model(model, nonnegative=True).nonnegative
    assert not LISTA.from_model(model, nonnegative=False).nonnegative


def test_other_sparse_priors_have_no_shrinkage() -> None:
    with pytest.raises(TypeError, match="the attributes W, rate, beta, bias, but got SparseCoding without 'rate'"):
        LISTA.from_model(SparseCoding(D, F, prior=StudentTPrior()))


# ------------------------------------------------------------------------------------- inside Amortized


def sparse_model(W: Tensor, rate: float, noise: float, *, nonnegative: bool):
    def model(v: Tensor) -> None:
        prior = dist.Exponential(rate) if nonnegative else dist.Laplace(0.0, 1 / rate)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", prior.expand([W.shape[1]]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.T, noise).to_event(1), obs=v)

    return model


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_trained_on_the_objective_it_beats_as_many_iterations(tied: bool, nonnegative: bool) -> None:
    W, rate, noise = torch.randn(D, F), 2.0, 0.5
    W = W / W.norm(dim=0)
    model = sparse_model(W, rate, noise, nonnegative=nonnegative)
    codes = torch.distributions.Exponential(torch.tensor(rate)).sample((150, F)) * (torch.rand(150, F) < 0.3)
    data = codes @ W.T + noise * torch.randn(150, D)
    v, new = data[:100], data[100:]
    network = LISTA.from_dictionary(W, rate, 1 / noise**2, num_layers=3, tied=tied, nonnegative=nonnegative)
    parts = (W, torch.full((F,), rate), torch.full((D,), noise**-2), torch.zeros(D))
    before = objective(new, network(new), *parts).mean()
    best = objective(new, ista(new, *parts, 2000, nonnegative=nonnegative), *parts).mean()
    guide = Amortized(model, network)
    svi = SVI(model, guide, Adam({"lr": 0.005}), Trace_ELBO())
    for _ in range(150):
        svi.step(v)
    after = objective(new, network(new), *parts).mean()
    # On held-out rows, most of what is left to the optimum after as many iterations is gone.
    assert best < after < best + 0.6 * (before - best)
    torch.testing.assert_close(guide.posterior(new)["h"].mean, network(new).detach(), rtol=1e-10, atol=0)
    names = {"A", "S", "log_theta", "bias"}
    assert set(pyro.get_param_store()) == {f"{guide._pyro_name}.encoders.h$$${name}" for name in names}


def test_thresholds_stay_above_zero_however_hard_they_are_pushed() -> None:
    # Nothing is gained by shrinking: the targets are the inputs.
    network, v = LISTA.from_dictionary(torch.eye(D), 5.0, num_layers=2), 10 * torch.randn(30, D)
    optimizer = torch.optim.Adam([network.log_theta], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        (network(v) - v).square().mean().backward()
        optimizer.step()
    assert bool((network.theta > 0).all())
    assert bool((network.theta < 0.1).all())


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"W": [[1.0]]}, TypeError, r"Expected W to be a floating tensor, but got list\. Pass the dictionary"),
        ({"W": torch.ones(2, 2).long()}, TypeError, r"Expected W to be a floating tensor, but got torch.int64\."),
        ({"W": torch.ones(3)}, ValueError, r"Expected W of shape \(D, F\), but got \(3,\)\. Put one atom"),
        ({"W": torch.ones(3, 0)}, ValueError, r"Expected W of shape \(D, F\), but got \(3, 0\)\."),
        ({"W": torch.full((2, 2), math.nan)}, ValueError, "Expected finite values in W, but got NaN or infinite ones"),
        (
            {"W": torch.zeros(2, 2)},
            ValueError,
            "Expected a dictionary W with entries other than 0, but got zeros alone",
        ),
        ({"rate": 0.0}, ValueError, r"Expected rate > 0, but got 0\. Pass 1.0, say\."),
        ({"rate": torch.tensor([1.0, -1.0])}, ValueError, r"Expected rate > 0, but got -1\."),
        ({"rate": math.inf}, ValueError, "Expected finite values in rate, but got NaN or infinite ones"),
        ({"rate": torch.ones(3)}, ValueError, r"Expected rate of shape \(\) or \(2,\), but got \(3,\)\."),
        ({"beta": -1.0}, ValueError, r"Expected beta > 0, but got -1\."),
        ({"beta": torch.ones(3)}, ValueError, r"Expected beta of shape \(\) or \(2,\), but got \(3,\)\."),
        ({"bias": torch.full((2,), math.nan)}, ValueError, "Expected finite values in bias, but got NaN"),
        ({"bias": torch.ones(1)}, ValueError, r"Expected bias of shape \(\) or \(2,\), but got \(1,\)\."),
        ({"num_layers": 0}, ValueError, "Expected num_layers >= 1, but got 0"),
        ({"num_layers": 1.5}, TypeError, "Expected num_layers to be an int, but got 1.5"),
    ],
)
def test_what_makes_no_network(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LISTA.from_dictionary(**({"W": torch.eye(2), "rate": 1.0} | change))


@pytest.mark.parametrize("sizes", [(0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_sizes_below_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"Expected num_\w+ >= 1, but got 0"):
        LISTA(*sizes)


def test_a_model_without_a_dictionary() -> None:
    with pytest.raises(
        TypeError,
        match="Expected a model with the attributes W, rate, beta, bias, but got SimpleNamespace without 'rate'",
    ):
        LISTA.from_model(SimpleNamespace(W=torch.eye(2), beta=1.0, bias=None))


def test_inputs_of_another_width() -> None:
    network = LISTA(4, 3)
    for v in (torch.randn(8, 2), torch.randn(2, 8), torch.randn(5, 1)):
        with pytest.raises(
            ValueError, match=rf"Expected inputs of shape \(\.\.\., 4\), but got \({len(v)}, {v.shape[1]}\)"
        ):
            network(v)


@pytest.mark.parametrize("size", [1e30, 1e-23])
def test_a_dictionary_that_the_dtype_cannot_square_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="largest eigenvalue that torch.float32 can tell from 0"):
        LISTA.from_dictionary(size * torch.eye(2, dtype=torch.float32), 1.0, num_layers=2)
