"""Compiled E-steps: the ledger of the eager run, what makes a new graph, and what is refused."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding, GaussianMixture

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Of torch's own compiler.
    pytest.mark.filterwarnings("ignore:.*torch._prims_common:FutureWarning"),
]


def bounds(model: Any, v: Tensor, *, compile: bool, steps: int) -> list[float]:
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(), compile=compile)
    if em._compilation is not None:
        em._compilation.check_every = 4
    history = em.run(v, max_steps=steps, tolerance=0.0, progress=False)
    if compile:
        assert em._compilation is not None
        assert len(em._compilation._graphs) == 1
    return [entry.bound for entry in history.ledger]


def mixture(v: Tensor, num_components: int = 3) -> GaussianMixture:
    pyro.set_rng_seed(1)
    model = GaussianMixture(num_components=num_components, num_visible=v.shape[1])
    model.initialize(v)
    return model


def blobs(num_rows: int) -> Tensor:
    centers = torch.tensor([[0.0, 0.0], [4.0, 1.0], [-2.0, 5.0]])
    return centers[torch.arange(num_rows) % 3] + torch.randn(num_rows, 2)


def test_a_mixtures_ledger_is_the_eager_one_on_every_data() -> None:
    v = blobs(60)
    eager = bounds(mixture(v), v, compile=False, steps=6)
    model = mixture(v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(), compile=True)
    compilation = em._compilation
    assert compilation is not None
    history = em.run(v, max_steps=6, tolerance=0.0, progress=False)
    torch.testing.assert_close(torch.tensor([e.bound for e in history.ledger]), torch.tensor(eager), rtol=1e-10, atol=0)
    # The table holds the last q, and other data of the same shape need no other graph.
    other = blobs(60) + 0.5
    plain = EM(model, em.guide, e_step=FixedPoint(), m_step=None)
    torch.testing.assert_close(em.infer(other)["h"].mean, plain.infer(other)["h"].mean, rtol=1e-10, atol=1e-12)
    assert em.evaluate_loss(other) == pytest.approx(plain.evaluate_loss(other), rel=1e-10)
    assert len(compilation._graphs) == 1
    # In-place changes of theta are seen.
    with torch.no_grad():
        model.locs.add_(0.3)
    torch.testing.assert_close(em.infer(other)["h"].mean, plain.infer(other)["h"].mean, rtol=1e-10, atol=1e-12)
    assert len(compilation._graphs) == 1


@pytest.mark.slow
def test_sparse_codings_form_is_compiled() -> None:
    pyro.set_rng_seed(2)
    model = BinarySparseCoding(num_visible=6, num_latents=3)
    v = model.dream(40)
    ledgers = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        fresh = BinarySparseCoding(num_visible=6, num_latents=3)
        fresh.initialize(v)
        ledgers.append(bounds(fresh, v, compile=compile, steps=9))
    torch.testing.assert_close(*map(torch.tensor, ledgers), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_other_shapes_and_other_parameters_make_another_graph() -> None:
    v = blobs(30)
    model = mixture(v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None, compile=True)
    plain = EM(model, em.guide, e_step=FixedPoint(), m_step=None)
    compilation = em._compilation
    assert compilation is not None
    em.infer(v)
    assert len(compilation._graphs) == 1
    store = pyro.get_param_store()
    name = next(n for n in store.keys() if n.endswith("locs"))
    store[name] = store[name].detach() + 1.0
    found, truth = em.infer(v)["h"].mean, plain.infer(v)["h"].mean
    assert len(compilation._graphs) == 2
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def branching(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
        loc = h.sum(-1) if v.mean() > 0 else -h.sum(-1)
        pyro.sample("v", dist.Normal(loc, 1.0), obs=v)


def test_a_branch_on_a_tensor_is_refused_by_name() -> None:
    em = EM(branching, MeanField(branching), e_step=FixedPoint(), m_step=None, compile=True)
    before = set(pyro.get_param_store().keys())
    with pytest.raises(RuntimeError, match="Expected a model without Python branches on values of tensors"):
        em.infer(torch.randn(5))
    assert set(pyro.get_param_store().keys()) == before


class Shifted:
    """A model that reads a Python number, which no graph can see."""

    __name__ = "Shifted"

    def __init__(self) -> None:
        self.shift = 0.0

    def __call__(self, v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1) + self.shift, 1.0), obs=v)


def test_a_changing_number_is_found_at_the_next_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    # The graph runs as traced: what the compiler adds is no part of this.
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    model, v = Shifted(), torch.randn(5)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None, compile=True)
    assert em._compilation is not None
    em._compilation.check_every = 2
    first = em.infer(v)["h"].mean
    model.shift = 1.0
    torch.testing.assert_close(em.infer(v)["h"].mean, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"(?s)Expected the compiled E-step to give .* a Python value that changes"):
        em.infer(v)


def test_every_graph_is_compared_however_calls_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    model, v = Shifted(), torch.randn(5)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None, compile=True)
    assert em._compilation is not None
    em._compilation.check_every = 2
    short = v[:3].clone()
    em.infer(v)
    em.infer(short)
    model.shift = 1.0
    em.infer(v)
    em.infer(short)
    for data in (v, short):
        with pytest.raises(RuntimeError, match="compare|Expected the compiled"):
            em.infer(data)


def test_a_buffer_put_in_anothers_place_makes_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    v = blobs(30)
    model = mixture(v)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(), compile=True)
    em.step(v)
    assert em._compilation is not None
    number = len(em._compilation._graphs)
    model.shift = model.shift + 3.0
    with torch.no_grad():
        before = em.evaluate_loss(v)
    em.step(v)
    assert len(em._compilation._graphs) == number + 1
    assert em.evaluate_loss(v) <= before


def test_statistics_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    v = blobs(30)
    model = mixture(v)
    factor = [1.0]
    monkeypatch.setattr(
        model,
        "statistics",
        lambda data, posterior: {
            "count": data["v"].new_tensor(len(data["v"])),
            "total": factor[0] * posterior["h"].mean.sum(0),
        },
    )
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm(), compile=True)
    assert em._compilation is not None
    em._compilation.check_every = 1
    call = em.call(v)
    call.evaluator()
    factor[0] = 2.0
    call.theta_changed()
    with pytest.raises(RuntimeError, match="statistic 'total'"):
        call.evaluator()


def test_gradient_e_steps_run_as_without_it() -> None:
    v = blobs(20)
    model = mixture(v)
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        optim = Adam({"lr": 0.1})
        fresh = mixture(v)
        em = EM(fresh, MeanField(fresh), e_step=Gradient(optim), m_step=None, compile=compile)
        losses.append([em.step(v) for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert model.num_components == 3
