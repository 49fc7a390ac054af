"""The warning for W that grows while the points of h shrink: when it comes, when not, and that nothing moves."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.optim import SGD
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import EM, ClosedForm, Gradient, Maximize, QuasiNewton, fit
from pyro_ext.fixed_point import FixedPoint
from pyro_ext.guides import Amortized, Dirac, MeanField, PointEncoder
from pyro_ext.models import ColumnNorm, SparseCoding, Unconstrained, WeightDecay
from pyro_ext.snapshot import rng_state
from pyro_ext.unbounded import UnboundedWarning, warn_if_unbounded

D, F, N = 4, 3, 8


def still() -> Gradient:
    """A gradient M-step that moves nothing: what is seen afterwards is the check's doing."""
    return Gradient(SGD({"lr": 0.0}))


def data(n: int = N) -> Tensor:
    return 2 * torch.randn(n, D)


def lasso(v: Tensor) -> None:
    W = pyro.param("W", lambda: torch.randn(D, F))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, 0.5).to_event(1), obs=v)


def decayed(v: Tensor) -> None:
    pyro.factor("decay", -0.01 * pyro.param("W", lambda: torch.randn(D, F)).square().sum())
    lasso(v)


def hardly_decayed(v: Tensor) -> None:
    """The penalty takes over beyond c = 100, and log p at c = 1000 is still above that at c = 1."""
    pyro.factor("decay", -4e-7 * pyro.param("W", lambda: torch.randn(D, F)).square().sum())
    lasso(v)


def factors(v: Tensor) -> None:
    W, mean = pyro.param("W", lambda: torch.randn(D, F)), pyro.param("mean", torch.zeros(D))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT + mean, 0.5).to_event(1), obs=v)


def shifted(v: Tensor) -> None:
    mean = pyro.param("mean", lambda: 0.1 * torch.randn(D))
    log_scale = pyro.param("log_scale", torch.tensor(-0.3))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.sample("v", dist.Normal(h + mean, log_scale.exp()).to_event(1), obs=v)


def at_zero(v: Tensor) -> None:
    mean = pyro.param("mean", torch.zeros(D))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        pyro.sample("v", dist.Normal(h + mean, 1.0).to_event(1), obs=v)


def bounded(v: Tensor) -> None:
    W = pyro.param("W", lambda: torch.rand(D, F), constraint=constraints.unit_interval)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, 0.5).to_event(1), obs=v)


def cone(v: Tensor) -> None:
    """W above 0 may grow too, but the check keeps to parameters without a constraint."""
    W = pyro.param("W", lambda: 5 + torch.rand(D, F), constraint=constraints.softplus_positive)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, 0.5).to_event(1), obs=v)


def positive(v: Tensor) -> None:
    W = pyro.param("W", lambda: torch.rand(D, F))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Exponential(1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, 0.5).to_event(1), obs=v)


class Network(PyroModule):
    """A decoder that Pyro knows by `pyro.module` alone: its parameters are read past the store."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(F, D)
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(self.decoder(h), self.scale).to_event(1), obs=v)


def em_of(model: Any, e_step: Any = None, m_step: Any = None, guide: Any = None) -> EM:
    return EM(
        model,
        Dirac(model) if guide is None else guide,
        e_step=Maximize() if e_step is None else e_step,
        m_step=still() if m_step is None else m_step,
    )


def warned(em: EM, *args: Tensor) -> list[str]:
    """The messages of one step."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        em.step(*args)
    assert all(w.category is UnboundedWarning for w in found)
    return [str(w.message) for w in found]


MESSAGE = (
    "Expected log p(v, h) with a maximum, but it rises as 'W' grows and the points of 'h' shrink (Deep Learning, after "
    "19.16). Constrain the norm of 'W', give it a prior (weight decay), or use a guide with an entropy."
)


# ---------------------------------------------------------------------- when it comes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [lasso, factors])
@pytest.mark.parametrize("m_step", [still, QuasiNewton])
def test_a_free_dictionary_is_told_of(model: Any, m_step: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    assert warned(em_of(model, m_step=m_step()), data()) == [MESSAGE]


def several_steps(em: EM, v: Tensor) -> None:
    for _ in range(3):
        em.step(v)


def a_run(em: EM, v: Tensor) -> None:
    em.run(v, max_steps=3, progress=False)


def a_fit(em: EM, v: Tensor) -> None:
    fit(em, DataLoader(TensorDataset(v), batch_size=4), num_epochs=2, progress=False)


@pytest.mark.parametrize("way", [several_steps, a_run, a_fit])
def test_it_is_told_once(way: Any) -> None:
    with pytest.warns(UnboundedWarning) as found:
        way(em_of(lasso), data())
    assert len(found) == 1


def test_the_rise_that_it_tells_of_is_there() -> None:
    """By hand: log p at W c and h / c rises with c to its limit."""
    torch.set_default_dtype(torch.float64)
    v = data()
    em = em_of(lasso, guide=Dirac(lasso))
    assert warned(em, v)
    W, h = pyro.param("W").detach(), em.guide.posterior(v)["h"].mean
    found = []
    for c in (1.0, 1.5, 20.0, 1e6):
        fit_of = dist.Normal((h / c) @ (W * c).mT, 0.5).log_prob(v).sum()
        found.append(float(fit_of + dist.Laplace(0.0, 1.0).log_prob(h / c).sum()))
    assert found == sorted(found)
    assert found[-1] - found[0] == pytest.approx(float(h.abs().sum()), rel=1e-5)


def test_weights_of_a_plain_network_are_found() -> None:
    model = Network()
    (message,) = warned(em_of(model), data())
    assert "as 'decoder.weight' grows" in message


class Reader(PointEncoder):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(F, inputs))

    def forward(self, v: Tensor) -> Tensor:
        return 0.1 * v @ self.A.mT


def layered(v: Tensor) -> None:
    W, U = (pyro.param(name, lambda n=n: torch.randn(n, F)) for name, n in (("W", D), ("U", F)))
    with pyro.plate("data", len(v)):
        top = pyro.sample("top", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        h = pyro.sample("h", dist.Normal(top @ U.mT, 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h @ W.mT, 0.5).to_event(1), obs=v)


def test_points_that_read_one_another_are_looked_at_too() -> None:
    v = data()
    reader = Reader(D)
    with torch.no_grad():
        # Near the maximum: elsewhere shrinking alone would raise log p.
        reader.A.copy_(10 * pyro.param("W", torch.randn(D, F)).pinverse())
    guide = Amortized(layered, encoder={"h": reader, "top": Reader(F)})
    guide.setup(v)
    assert not guide.is_static
    (message,) = warned(em_of(layered, Gradient(SGD({"lr": 0.0})), guide=guide), v)
    assert "'W' grows and the points of 'top', 'h' shrink" in message


def test_discrete_points_beside_stay_as_they_are() -> None:
    def switched(v: Tensor) -> None:
        W = pyro.param("W", lambda: torch.randn(D))
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h.unsqueeze(-1) * W + z.unsqueeze(-1), 0.5).to_event(1), obs=v)

    assert warned(em_of(switched, FixedPoint()), data()) == [MESSAGE]


# ---------------------------------------------------------------------- when not


@pytest.mark.parametrize("model", [decayed, hardly_decayed, shifted, at_zero, bounded, cone, positive])
def test_other_programs_are_left_in_peace(model: Any) -> None:
    """`filterwarnings = error` would tell."""
    em_of(model).step(data())


@pytest.mark.parametrize("dictionary", [ColumnNorm(), WeightDecay(0.1)])
def test_a_dictionary_with_a_rule_is_left_in_peace(dictionary: Any) -> None:
    model = SparseCoding(D, F, dictionary=dictionary)
    em_of(model).step(data())


def test_a_dictionary_without_one_is_not() -> None:
    model = SparseCoding(D, F, dictionary=Unconstrained())
    (message,) = warned(em_of(model), data())
    assert f"'{model._pyro_name}.W' grows" in message


def test_steps_in_closed_form_and_none_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pyro_ext.em.warn_if_unbounded", fail)
    model = SparseCoding(D, F)
    em_of(model, m_step=ClosedForm()).step(data())
    EM(lasso, Dirac(lasso), e_step=Maximize(), m_step=None).step(data())
    with pytest.raises(AssertionError):
        em_of(factors).step(data())


def test_a_guide_with_an_entropy_is_left_in_peace() -> None:
    em_of(factors, FixedPoint(), guide=MeanField(factors)).step(data())


def test_held_parameters_are_left_in_peace() -> None:
    def with_scale(v: Tensor) -> None:
        W, scale = (
            pyro.param("W", lambda: torch.randn(D, F)),
            pyro.param("scale", torch.tensor(0.5), constraints.positive),
        )
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.mT, scale).to_event(1), obs=v)

    pyro.param("W", torch.randn(D, F)).unconstrained().requires_grad_(False)
    em_of(with_scale).step(data())


def test_points_that_are_not_at_their_best_tell_nothing() -> None:
    """Far from the maximum log p rises as h shrinks, whatever a parameter does that saturates."""

    def saturating(v: Tensor) -> None:
        w = pyro.param("w", torch.tensor(3.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("v", dist.Normal(h * w.sigmoid(), 1.0).to_event(1), obs=0 * v)

    v = data()
    guide = Dirac(saturating)
    guide.setup(v)
    with torch.no_grad():
        guide.table(guide.blocks[0]).fill_(30.0)
    em_of(saturating, Gradient(SGD({"lr": 0.0})), guide=guide).step(v)


def test_a_product_that_only_stays_the_same_is_no_rise() -> None:
    """With a flat prior nothing is gained by smaller points; h alone must not shrink."""

    def flat(v: Tensor) -> None:
        w = pyro.param("w", torch.tensor(1.0))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1e12).expand([D]).to_event(1))
            pyro.sample("v", dist.Normal((h * w).round(decimals=2), 1.0).to_event(1), obs=v)

    v = data()
    guide = Dirac(flat)
    guide.setup(v)
    with torch.no_grad():
        guide.table(guide.blocks[0]).copy_(v)
    em_of(flat, Gradient(SGD({"lr": 0.0})), guide=guide).step(v)


def test_a_program_that_fails_out_there_has_an_end() -> None:
    def failing(v: Tensor) -> None:
        W = pyro.param("W", lambda: torch.randn(D, F))
        if float(W.detach().abs().max()) > 100:
            raise ValueError("too large")
        lasso(v)

    em_of(failing).step(data())


# ---------------------------------------------------------------------- what stays


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_parameters_points_and_generators_stay(error: type[BaseException] | None) -> None:
    def drawing(v: Tensor) -> None:
        W = pyro.param("W", lambda: torch.randn(D, F))
        if error is not None and float(W.detach().abs().max()) > 100:
            raise error
        torch.rand(())
        lasso(v)

    v = data()
    model_em = em_of(drawing)
    call = model_em.call(v)
    result = model_em.e_half(call)
    store = pyro.get_param_store()
    before = {n: (t, t.data_ptr(), t.detach().clone()) for n, t in store.named_parameters()}
    points, noise = result.posterior["h"].mean.clone(), rng_state()
    expected: Any = UnboundedWarning if error is None else error
    with pytest.warns(expected) if error is None else pytest.raises(expected):
        warn_if_unbounded(call, result)
    assert set(store.keys()) == set(before)
    for name, tensor in store.named_parameters():
        same, pointer, value = before[name]
        assert tensor is same
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, value)
        assert tensor.requires_grad
        assert tensor.grad is None
    assert torch.equal(result.posterior["h"].mean, points)
    assert torch.equal(rng_state()["torch"], noise["torch"])
