"""log p(v, h) at points, for programs of any form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim import SGD, Adam
from torch import Tensor

from pyro_ext import EM, FixedPoint, Gradient
from pyro_ext.evaluators import NoEvaluatorError, Quadratic
from pyro_ext.guides import Dirac, MeanField
from pyro_ext.points import Points, are_continuous_points
from pyro_ext.steps import EResult

pytestmark = pytest.mark.usefixtures("float64")

N, D, F = 6, 4, 3
V = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weights() -> Tensor:
    return pyro.param("W", lambda: torch.randn(F, D, generator=torch.Generator().manual_seed(1)).double())


def heavy(v: Tensor) -> None:
    w, scale = weights(), pyro.param("scale", torch.tensor(1.3), constraint=dist.constraints.positive)
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Laplace(0.0, scale).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(3.0, h @ w, 1.0).to_event(1), obs=v)


def mixed(v: Tensor) -> None:
    w = weights()
    with pyro.plate("data", len(v), dim=-1):
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(F)))
        with pyro.plate("inner", D, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = (p @ w).mT + z.sin()
        with pyro.plate("inner again", D, dim=-2):
            pyro.sample("v", dist.Normal(mean, s.sqrt()), obs=v.T)


def subsampled(v: Tensor) -> None:
    w = weights()
    with pyro.plate("data", 20, subsample=torch.arange(len(v))):
        h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([F]).to_event(1))
        pyro.sample("v", dist.StudentT(3.0, h @ w, 1.0).to_event(1), obs=v)


PROGRAMS = [heavy, mixed, subsampled]


def started(model: Callable[..., Any], **steps: Any) -> EM:
    """An EM whose points are somewhere."""
    guide = Dirac(model)
    steps = {"e_step": Gradient(Adam({"lr": 0.1})), "m_step": None, **steps}
    em = EM(model, guide, **steps)
    poutine.trace(model).get_trace(V)
    guide(V)
    for block in guide.blocks:
        guide.table(block).data.normal_()
    return em


def gradients(run: Callable[[], Any], reads: str) -> dict[str, Tensor]:
    """The gradient of parameters whose name begins so."""
    store: Any = pyro.get_param_store()
    for _, tensor in store.named_parameters():
        tensor.grad = None
    run()
    found = {name: p.grad.clone() for name, p in store.named_parameters() if p.grad is not None and reads in name}
    for _, tensor in store.named_parameters():
        tensor.grad = None
    return found


@pytest.mark.parametrize("model", PROGRAMS, ids=lambda m: m.__name__)
def test_the_bound_is_the_program(model: Callable[..., Any]) -> None:
    em = started(model)
    call = em.call(V)
    evaluator = call.evaluator()
    assert isinstance(evaluator, Points)
    assert not evaluator.exact_posterior
    assert are_continuous_points(call.blocks)
    bound = evaluator.bound(em.guide.rows_parameters(call.program))
    guide_trace = poutine.trace(em.guide).get_trace(V)
    trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(V)
    assert torch.allclose(bound.sum() * call.scale, trace.log_prob_sum(), rtol=1e-12)
    assert bound.shape == (N,)
    assert not bound.requires_grad


@pytest.mark.parametrize("model", PROGRAMS, ids=lambda m: m.__name__)
def test_gradients_are_those_of_a_pyro_elbo(model: Callable[..., Any]) -> None:
    em = started(model)
    call = em.call(V)
    step = Gradient(SGD({"lr": 0.1}))
    of_q = gradients(lambda: step._loss_of_q(call), em.guide._pyro_name)
    posterior = call.posterior(em.guide.rows_parameters(call.program))
    bound = call.bound(posterior, em.guide.rows_parameters(call.program), 1)[0]
    result = EResult(bound, True, "warm", posterior, monotone=False)
    of_theta = gradients(lambda: step._loss_of_theta(call, result), "")
    truth = gradients(lambda: Trace_ELBO().loss_and_grads(model, em.guide, V), "")
    assert of_q.keys() == {name for name in truth if name.startswith(em.guide._pyro_name)}
    assert of_theta.keys() == truth.keys() - of_q.keys()
    for name, gradient in {**of_q, **of_theta}.items():
        assert torch.allclose(gradient, truth[name], rtol=1e-10, atol=1e-10), name
        assert bool((gradient != 0).any()), name


def test_an_e_step_leaves_theta_alone() -> None:
    """Also its gradient: an optimizer with momentum would move what has one."""
    em = started(heavy)
    before = {name: p.clone() for name, p in pyro.get_param_store().items()}
    for _ in range(3):
        em.step(V)
    for name, p in pyro.get_param_store().items():
        assert torch.equal(p, before[name]) == (not name.startswith(em.guide._pyro_name)), name
    assert gradients(lambda: Gradient(SGD({"lr": 0.1}))._loss_of_q(em.call(V)), "W") == {}


def test_an_m_step_leaves_q_alone() -> None:
    em = started(heavy, e_step=Gradient(SGD({"lr": 0.0})), m_step=Gradient(Adam({"lr": 0.1})))
    before = {name: p.clone() for name, p in pyro.get_param_store().items()}
    em.step(V)
    for name, p in pyro.get_param_store().items():
        assert torch.equal(p, before[name]) == name.startswith(em.guide._pyro_name), name


def test_the_ledger_is_exact() -> None:
    em = started(heavy, m_step=Gradient(Adam({"lr": 0.01})))
    history = em.run(V, max_steps=20, tolerance=0.0, progress=False)
    assert history.loss_label == "-log p(h, v), nats per row"
    assert all(entry.exact for entry in history.ledger)
    assert history.ledger[-1].bound > history.ledger[0].bound
    trace = poutine.trace(poutine.replay(heavy, trace=poutine.trace(em.guide).get_trace(V))).get_trace(V)
    assert history.ledger[-1].bound == pytest.approx(float(trace.log_prob_sum().detach()), abs=1e-10)


@pytest.mark.parametrize("model", PROGRAMS, ids=lambda m: m.__name__)
def test_no_coordinate_maxima(model: Callable[..., Any]) -> None:
    em = started(model, e_step=FixedPoint())
    before = {name: p.clone() for name, p in pyro.get_param_store().items()}
    generator = torch.get_rng_state()
    for call in (em.step, em.infer):
        with pytest.raises(
            NoEvaluatorError, match=r"quadratic in '.*' for FixedPoint on point masses, .*e_step=Maximize\(\)"
        ):
            call(V)
    evaluator = em.call(V).evaluator()
    params = em.guide.rows_parameters(em.call(V).program)
    refused: tuple[Callable[[], Any], ...] = (
        lambda: evaluator.sweep(params),
        lambda: evaluator.jump(params),
        evaluator.solve,
    )
    for call in refused:
        with pytest.raises(NoEvaluatorError):
            call()
    assert torch.equal(generator, torch.get_rng_state())
    for name, p in pyro.get_param_store().items():
        assert torch.equal(p, before[name])


def test_quadratic_programs_keep_their_matrices() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    assert isinstance(started(model).call(V).evaluator(), Quadratic)


def test_the_quadratic_test_is_not_repeated() -> None:
    """What failed it once is not asked again: neither in the call nor in those that follow."""
    em = started(heavy)
    call = em.call(V)
    assert call.quadratic
    call.evaluator()
    assert not call.quadratic
    em.step(V)
    assert not em.call(V).quadratic


def test_other_factors_are_no_points() -> None:
    guide = MeanField(heavy)
    em = EM(heavy, guide, e_step=Gradient(Adam({"lr": 0.1})), m_step=None)
    assert not are_continuous_points(em.call(V).blocks)

    def discrete(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(h[..., None], 1.0).expand([len(v), D]).to_event(1), obs=v)

    em = EM(discrete, Dirac(discrete), e_step=FixedPoint(), m_step=None)
    assert not are_continuous_points(em.call(V).blocks)
