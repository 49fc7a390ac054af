"""The best of several starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient
from pyro_ext.fit import EpochEnd, StopFit
from pyro_ext.guides import MeanField
from pyro_ext.history import Status
from pyro_ext.models import GaussianMixture
from pyro_ext.restarts import draw_new_start
from pyro_ext.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("float64")


def clusters() -> Tensor:
    """Data without clear clusters, where different starts end at different maxima."""
    return torch.cat([torch.randn(15, 2) + shift for shift in (0.0, 1.0, 2.0, 3.0)])


def mixture_em() -> tuple[EM, Tensor]:
    v = clusters()
    model = GaussianMixture(num_components=4, num_visible=2)
    model.initialize(v)
    return EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm()), v


def random_mixture(v: Tensor) -> None:
    """A plain program whose parameters start at random."""
    mu = pyro.param("mu", lambda: 3 * torch.randn(3, 2))
    pyro.param("unused", torch.tensor(2.0))
    with pyro.plate("data", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("v", dist.Normal(mu[z], 1.0).to_event(1), obs=v)


class Network(nn.Module):
    """A program with a plain torch layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, v: Tensor) -> None:
        pyro.module("network", self)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(self.layer(h), 1.0).to_event(1), obs=v)


def fixed(v: Tensor) -> None:
    w = pyro.param("w", torch.tensor(1.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(w * h, 1.0), obs=v)


def test_the_best_of_several_starts_is_kept_and_in_force() -> None:
    em, v = mixture_em()
    history = em.run(v, max_steps=60, num_restarts=6, progress=False)
    assert len(history.restarts) == 6
    best = max(history.restarts)
    assert max(history.restarts) - min(history.restarts) > 0.01
    assert history.ledger[-1].bound_per_row == best
    assert em.evaluate_loss(v) == pytest.approx(-best * len(v), rel=1e-9)
    assert history.message.endswith(f"Best of 6 starts, the one numbered {history.restarts.index(best) + 1}.")
    assert em.run(v, max_steps=5, progress=False).loss[0] <= -best + 1e-9


def test_the_first_start_is_the_present_state() -> None:
    em, v = mixture_em()
    em.guide.setup(v)
    present = Snapshot.take(em.model, em.guide)
    alone = em.run(v, max_steps=4, tolerance=0.0, progress=False)
    assert alone.restarts == []
    present.restore()
    em.guide.holds_answer = False
    history = em.run(v, max_steps=4, tolerance=0.0, num_restarts=3, progress=False)
    assert history.restarts[0] == pytest.approx(alone.ledger[-1].bound_per_row, rel=1e-12)


def test_a_seed_makes_the_starts_equal() -> None:
    v = clusters()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = GaussianMixture(num_components=4, num_visible=2)
        model.initialize(v)
        em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        runs.append(em.run(v, max_steps=20, num_restarts=3, seed=11, progress=False).restarts)
        torch.randn(5)
    assert runs[0] == runs[1]


def test_plain_programs_draw_their_random_initial_values_anew() -> None:
    v = clusters()
    em = EM(random_mixture, MeanField(random_mixture), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.1})))
    em.step(v)
    tensor = pyro.get_param_store()["mu"].unconstrained()
    old = tensor.detach().clone()
    table = em.guide.table(em.guide.blocks[0])
    answer = table.detach().clone()
    draw_new_start(em.model, em.guide, (v,), {})
    assert pyro.get_param_store()["mu"].unconstrained() is tensor
    assert bool((tensor != old).all())
    assert pyro.param("unused").item() == 2
    assert not torch.equal(table, answer)
    assert not em.guide.holds_answer
    assert set(pyro.get_param_store().keys()) == {"mu", "unused"}
    history = em.run(v, max_steps=15, num_restarts=3, progress=False)
    assert len(set(history.restarts)) == 3


def test_layers_are_reset() -> None:
    v = torch.randn(10, 3)
    model = Network()
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.1})))
    em.step(v)
    weight = model.layer.weight.detach().clone()
    draw_new_start(model, em.guide, (v,), {})
    assert bool((model.layer.weight != weight).all())
    assert pyro.get_param_store()["network$$$layer.weight"] is model.layer.weight


def test_optimizers_start_anew_with_each_start() -> None:
    v = clusters()
    optim = Adam({"lr": 0.1})
    em = EM(random_mixture, MeanField(random_mixture), e_step=FixedPoint(), m_step=Gradient(optim))
    steps: list[list[int]] = []

    def look(event: EpochEnd) -> None:
        counts = [int(s["step"]) for o in optim.optim_objs.values() for s in o.state.values()]
        steps.append([event.step, *counts])

    em.run(v, max_steps=3, num_restarts=2, tolerance=0.0, progress=False, callbacks=[look])
    assert steps == [[1, 1], [2, 2], [3, 3]] * 2


def test_a_start_that_cannot_be_drawn_anew_is_refused() -> None:
    v = torch.randn(5)
    em = EM(fixed, MeanField(fixed), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 0.1})))
    before = em.evaluate_loss(v)
    with pytest.raises(
        ValueError, match="Expected a model whose start can be drawn anew, but every parameter of fixed came"
    ):
        em.run(v, max_steps=3, num_restarts=2, progress=False)
    assert em.evaluate_loss(v) == before
    assert pyro.param("w").item() == 1


@pytest.mark.parametrize(
    ("error", "status"), [(StopFit("enough"), Status.STOPPED), (KeyboardInterrupt(), Status.INTERRUPTED)]
)
def test_a_stop_ends_all_starts(error: BaseException, status: Status) -> None:
    em, v = mixture_em()
    calls: list[int] = []

    def stop(event: EpochEnd) -> None:
        calls.append(event.step)
        if len(calls) == 7:
            raise error

    history = em.run(v, max_steps=5, tolerance=0.0, num_restarts=4, progress=False, callbacks=[stop])
    assert len(history.restarts) == 2
    assert max(history.restarts) == history.ledger[-1].bound_per_row
    assert history.status in (status, Status.MAX_STEPS)
    assert em.evaluate_loss(v) == pytest.approx(-max(history.restarts) * len(v), rel=1e-9)


def test_models_with_a_method_draw_their_own_start() -> None:
    calls: list[tuple[Any, ...]] = []

    class Model:
        def __call__(self, v: Tensor) -> None:
            fixed(v)

        def initialize(self, *args: Any) -> None:
            calls.append(args)
            with torch.no_grad():
                pyro.param("w").fill_(len(calls) + 1.0)

    model: Callable[..., Any] = Model()
    v = torch.randn(5)
    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=Gradient(Adam({"lr": 1e-3})))
    history = em.run(v, max_steps=2, num_restarts=3, progress=False)
    assert [len(args) for args in calls] == [1, 1]
    assert len(set(history.restarts)) == 3
