"""What a guide's table holds after a run, in whatever way it ended: exact E-steps write it only at the end.

The oracle is the same run with a callback, which may look at the table after every step: there nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_ext import EM, ClosedForm, Cold, FixedPoint, Gradient, Warm
from pyro_ext.guides import MeanField, Structured, Tree
from pyro_ext.history import History, Status
from pyro_ext.models import BinarySparseCoding, GaussianMixture
from pyro_ext.steps import Call, EResult, MStep

pytestmark = pytest.mark.usefixtures("float64")


class Ending(ClosedForm):
    """A closed form that does something else at one call."""

    def __init__(self, at: int, what: Callable[[Any], None]) -> None:
        super().__init__()
        self.at, self.what, self.calls = at, what, 0

    def improve(self, call: Call, result: EResult) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.what(call.model)
        super().improve(call, result)


def interrupt(model: Any) -> None:
    raise KeyboardInterrupt


def fail(model: Any) -> None:
    raise RuntimeError("an emptied component")


def spoil(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    raise ValueError("not finite")


def mixture() -> Any:
    return GaussianMixture(num_components=3, num_visible=2)


def coding() -> Any:
    return BinarySparseCoding(num_visible=6, num_latents=3)


@dataclass
class Ended:
    em: EM
    history: History | None
    v: Tensor

    @property
    def table(self) -> Tensor:
        return self.em.guide.table(self.em.guide.blocks[0]).detach().clone()


def run(
    make: Callable[[], Any],
    guide: Callable[[Any], Any],
    *,
    defers: bool,
    m_step: Callable[[], MStep] = ClosedForm,
    times: int = 1,
    **settings: Any,
) -> Ended:
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    model = make()
    v = torch.randn(30, model.num_visible) + 3 * (torch.arange(30) % 3)[:, None]
    model.initialize(v)
    em = EM(model, guide(model), e_step=FixedPoint(), m_step=m_step())
    history = None
    callbacks = () if defers else (lambda event: None,)
    for _ in range(times):
        try:
            history = em.run(v, progress=False, callbacks=callbacks, **{"tolerance": 0.0, "max_steps": 6, **settings})
        except RuntimeError:
            history = None
    return Ended(em, history, v)


ENDINGS = [
    ("max_steps", ClosedForm, {}),
    ("converged", ClosedForm, {"tolerance": 1e-3, "max_steps": 200}),
    ("interrupted", lambda: Ending(4, interrupt), {}),
    ("interrupted", lambda: Ending(1, interrupt), {}),
    ("raised", lambda: Ending(4, fail), {}),
    ("raised", lambda: Ending(1, fail), {}),
    ("non_finite", lambda: Ending(4, spoil), {}),
    ("max_steps", ClosedForm, {"num_restarts": 3}),
    ("max_steps", ClosedForm, {"times": 2}),
    ("max_steps", lambda: Gradient(Adam({"lr": 0.05})), {}),
    ("max_steps", lambda: Gradient(Adam({"lr": 0.05}), loss=Trace_ELBO()), {}),
]


@pytest.mark.parametrize(("ending", "m_step", "settings"), ENDINGS)
@pytest.mark.parametrize(
    ("make", "guide"), [(mixture, MeanField), (coding, Structured), (coding, MeanField)], ids=["GMM", "joint", "MF"]
)
def test_tables_end_as_in_a_run_that_writes_them_always(
    ending: str, m_step: Callable[[], MStep], settings: dict[str, Any], make: Any, guide: Any
) -> None:
    found = run(make, guide, defers=True, m_step=m_step, **settings)
    truth = run(make, guide, defers=False, m_step=m_step, **settings)
    assert found.em.guide.is_set_up == truth.em.guide.is_set_up
    if found.em.guide.is_set_up:
        torch.testing.assert_close(found.table, truth.table, rtol=1e-12, atol=1e-12)
    assert found.em.guide.holds_answer == truth.em.guide.holds_answer
    assert found.em.evaluate_loss(found.v) == pytest.approx(truth.em.evaluate_loss(truth.v), rel=1e-12)
    if ending == "raised":
        assert found.history is truth.history is None
        return
    assert found.history is not None
    assert truth.history is not None
    if not (ending == "converged" and guide is MeanField and make is coding):
        assert found.history.status.value == ending
    assert [e.bound for e in found.history.ledger] == [e.bound for e in truth.history.ledger]
    if found.history.status in (Status.MAX_STEPS, Status.CONVERGED):
        # The last entry of the ledger is of the theta and the q in force.
        last = found.history.ledger[-1]
        assert found.em.evaluate_loss(found.v) == pytest.approx(-last.bound, rel=1e-10)


@pytest.mark.parametrize(("make", "guide"), [(mixture, MeanField), (coding, Structured)], ids=["GMM", "joint"])
def test_a_converged_runs_table_is_the_posterior(make: Any, guide: Any) -> None:
    ended = run(make, guide, defers=True, tolerance=1e-6, max_steps=500)
    assert ended.history is not None
    assert ended.history.status is Status.CONVERGED
    table, posterior = ended.em.guide.posterior(ended.v)["h"].mean, ended.em.infer(ended.v)["h"].mean
    torch.testing.assert_close(table, posterior, rtol=1e-12, atol=1e-12)


class Reader(MStep):
    """An M-step that looks at the guide, and the table it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def check(self, model: Any, guide: Any) -> None: ...

    def improve(self, call: Call, result: EResult) -> None:
        table = call.guide.posterior(*call.args, **call.kwargs)["h"].mean
        self.seen.append((table.clone(), result.posterior["h"].mean.clone()))
        with torch.no_grad():
            call.model.locs.add_(0.1)


def test_an_m_step_may_look_at_the_guide() -> None:
    reader = Reader()
    run(mixture, MeanField, defers=True, m_step=lambda: reader, max_steps=3)
    assert len(reader.seen) == 3
    for table, q in reader.seen:
        torch.testing.assert_close(table, q, rtol=1e-12, atol=1e-12)
    assert not torch.equal(reader.seen[0][0], reader.seen[1][0])


class Turning(MStep):
    """Couples units that the guide's tree does not join: a sweep is exact before that step, and not after it."""

    def __init__(self, at: int, raises: int) -> None:
        self.at, self.raises, self.calls = at, raises, 0

    def check(self, model: Any, guide: Any) -> None: ...

    @property
    def reads_guide(self) -> bool:
        return False

    def improve(self, call: Call, result: EResult) -> None:
        self.calls += 1
        if self.calls == self.raises:
            raise KeyboardInterrupt
        with torch.no_grad():
            pyro.param("W").add_(torch.eye(3) if self.calls < self.at else torch.full((3, 3), 0.3))


def units(v: Tensor) -> None:
    W = pyro.param("W", lambda: torch.eye(3, dtype=torch.float64))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.4 * torch.ones(3)).to_event(1))
        pyro.sample("v", dist.Normal(h @ W, 1.0).to_event(1), obs=v)


def tree(model: Any) -> Structured:
    return Structured(model, blocks=[Tree(["h"], edges=[(0, 1), (1, 2)])])


@pytest.mark.parametrize("start", [Cold, Warm])
@pytest.mark.parametrize("raises", [99, 2, 3, 4, 5])
def test_a_step_that_stops_being_exact_leaves_nothing_old_behind(raises: int, start: Callable[[], Any]) -> None:
    v, tables = torch.randn(7, 3), []
    for callbacks in ((), (lambda event: None,)):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        em = EM(units, tree(units), e_step=FixedPoint(start=start(), max_sweeps=1), m_step=Turning(3, raises))
        assert em.call(v).evaluator().exact_posterior
        em.run(v, max_steps=6, tolerance=0.0, progress=False, callbacks=callbacks)
        tables.append(em.guide.table(em.guide.blocks[0]).detach().clone())
    assert em.call(v).evaluator().exact_posterior == (raises <= 3)
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-12, atol=1e-12)


def test_a_compiled_tree_asks_every_time_whether_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    v, bounds = torch.randn(7, 3), []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        em = EM(units, tree(units), e_step=FixedPoint(), m_step=Turning(3, 99), compile=compile)
        bounds.append([e.bound for e in em.run(v, max_steps=6, tolerance=0.0, progress=False).ledger])
    torch.testing.assert_close(*map(torch.tensor, bounds), rtol=1e-10, atol=0)
