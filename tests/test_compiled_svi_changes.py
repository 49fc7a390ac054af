"""CompiledSVI when something changes between steps: the numbers of SVI, or a refusal, never silence."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch import Tensor, nn

from pyro_ext import EM, CompiledSVI, FixedPoint, step_graph
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they were traced, in double precision."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(step_graph, "_compiled", lambda module, inputs: module)


X, Y = torch.arange(6.0, dtype=torch.float64) / 3, torch.ones(6, dtype=torch.float64)


def nothing(*args: Any, **kwargs: Any) -> None:
    """A guide without latents."""


def mean() -> Tensor:
    return pyro.param("mean", torch.tensor(0.5))


def observe(location: Tensor, v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(location, 1.0), obs=v)


def both(make: Callable[[], tuple[Any, Any]], act: Callable[[Any], None], loss: Any = Trace_ELBO) -> list[Any]:
    """What `act` leaves in the store under either driver."""
    found = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide = make()
        svi = driver(model, guide, pyro.optim.Adam({"lr": 0.01}), loss())
        act(svi)
        found.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    return found


def steps(*calls: Any) -> Callable[[Any], None]:
    def act(svi: Any) -> None:
        for args in calls:
            svi.step(*args)

    return act


def two(x: Any, y: Any = None, *rest: Any) -> None:
    """2 x + y for any nesting of the arguments."""
    flat = torch.utils._pytree.tree_leaves((x, y, rest))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    first = x if isinstance(x, list) else [x]
    shift = sum(t.sum() for t in tensors) + sum(t.sum() for t in first if isinstance(t, Tensor))
    observe(mean() * shift, tensors[0])


@pytest.mark.parametrize(
    "calls",
    [
        [(X, X)] * 4 + [(X, Y)] * 2,
        [([X, Y], [X])] * 4 + [([X], [Y, X])] * 3,
        [({"a": X},)] * 4,
        [([X], [Y])] * 4,
        [((X, None),)] * 4,
    ],
)
def test_arguments_are_told_apart_however_they_nest_or_share(calls: Any) -> None:
    both(lambda: (two, nothing), steps(*calls))


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0.0, -0.0)])
def test_equal_numbers_of_other_kinds_are_other_signatures(pair: Any) -> None:
    def model(v: Tensor, number: Any) -> None:
        sign = float(np.copysign(1.0, number)) + 3 * isinstance(number, bool) + 5 * isinstance(number, float)
        observe(mean() * sign, v)

    both(lambda: (model, nothing), steps(*[(X, pair[0])] * 4, *[(X, pair[1])] * 3))


def test_data_that_the_program_holds_as_well() -> None:
    def model(v: Tensor) -> None:
        observe(mean() * X.sum(), v)

    both(lambda: (model, nothing), steps(*[(X,)] * 4, (Y,), (Y,)))


def test_a_table_refuses_other_data_at_every_step() -> None:
    model = BinarySparseCoding(num_visible=4, num_latents=2)
    v = torch.randn(6, 4)
    svi = CompiledSVI(model, MeanField(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(5):
        svi.step(v)
    with pytest.raises(ValueError, match="other data"):
        svi.step(v + 1)


class Held(nn.Module):
    """A program that looks at a tensor which it holds."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look = look
        self.register_buffer("beta", torch.tensor(2.0))

    def forward(self, v: Tensor) -> None:
        pyro.module("held", self)
        observe(mean() * self.look(self.get_buffer("beta")), v)


@pytest.mark.parametrize(
    "look",
    [float, int, lambda beta: 1.0 if beta > 0 else 0.0, lambda beta: beta.tolist(), lambda beta: float(beta.numpy())],
)
def test_looks_at_tensors_that_a_program_holds_are_refused(look: Any) -> None:
    svi = CompiledSVI(Held(look), nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    with pytest.raises(
        RuntimeError, match=r"graph can hold, but .*test_compiled_svi_changes\.py:\d+ looks at the value"
    ):
        svi.step(X)


@pytest.mark.parametrize(
    "use",
    [
        lambda beta: beta.item(),
        lambda beta: torch.tensor([1.0, beta.item()]).sum(),
        lambda beta: torch.as_tensor([[beta, beta], [beta, 1.0]]).sum(),
    ],
)
def test_tensors_made_of_held_ones_follow_them(use: Any) -> None:
    def act(svi: Any) -> None:
        for step in range(6):
            svi.step(X)
            svi.model.get_buffer("beta").fill_(step)

    both(lambda: (Held(use), nothing), act)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (lambda v: len(v[v > 1]), "index"),
        (lambda v: v.nonzero().numel(), "nonzero"),
        (lambda v: v.masked_select(v > 1).numel(), "masked_select"),
        (lambda v: len(torch.unique(v)), "unique"),
        (lambda v: torch.bincount(v.long()).numel(), "bincount"),
        (lambda v: torch.repeat_interleave(v, v.long()).numel(), "repeat_interleave"),
    ],
)
def test_sizes_that_depend_on_values_are_refused(size: Any, name: str) -> None:
    def model(v: Tensor) -> None:
        observe(mean() * size(v), v)

    svi = CompiledSVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    with pytest.raises(
        RuntimeError, match=rf"graph can hold, but it takes _?{name}.*as many elements as the values say"
    ):
        svi.step(X)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])  # noqa: NPY002
def test_random_numbers_from_outside_torch_are_refused(draw: Any) -> None:
    def model(v: Tensor) -> None:
        observe(mean() * draw(), v)

    svi = CompiledSVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    with pytest.raises(RuntimeError, match="Expected random numbers of torch only"):
        svi.step(X)


def test_a_number_that_python_changes_at_each_step_is_noticed_soon() -> None:
    count = [0]

    def model(v: Tensor) -> None:
        count[0] += 1
        observe(mean() + 0.1 * count[0], v)

    svi = CompiledSVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), check_every=0)
    with pytest.raises(RuntimeError, match="Expected the compiled step to give the loss"):
        steps(*[(X,)] * 4)(svi)


def test_a_baseline_in_the_store_is_refused() -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5 * torch.ones(len(v))))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            logits = pyro.param("logits", torch.tensor(0.0)).expand(len(v))
            pyro.sample("h", dist.Bernoulli(logits=logits), infer={"baseline": {"use_decaying_avg_baseline": True}})

    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceGraph_ELBO())
    svi.step(X)
    with pytest.raises(RuntimeError, match=r"Pyro's store|replaced one"):
        svi.step(X)


def normalised() -> tuple[Any, Any]:
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5), nn.Linear(1, 1))

    def model(v: Tensor) -> None:
        pyro.module("net", net)
        observe(net(v[:, None]).squeeze(-1), v)

    model.net = net  # type: ignore[attr-defined]
    return model, nothing


def test_modules_of_plain_functions_keep_their_buffers_and_modes() -> None:
    counts, losses = [], []

    def act(svi: Any) -> None:
        steps(*[(X,)] * 6)(svi)
        svi.model.net.eval()
        losses.append([svi.step(X) for _ in range(3)])
        counts.append({name: b.clone() for name, b in svi.model.net.named_buffers()})

    both(normalised, act)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    torch.testing.assert_close(counts[1], counts[0], rtol=1e-9, atol=1e-12)
    assert int(counts[1]["0.num_batches_tracked"]) == 6


def normal() -> tuple[Any, Any]:
    return (lambda v: observe(mean(), v)), nothing


def test_handlers_and_modes_around_a_step_count() -> None:
    def act(svi: Any) -> None:
        steps(*[(X,)] * 4)(svi)
        with poutine.scale(scale=0.1):
            svi.step(X)
        with torch.no_grad():
            svi.step(X)
        svi.step(X)

    both(normal, act)


def _clear(svi: Any) -> None:
    svi.optim.optim_objs.clear()


def _zero(svi: Any) -> None:
    for optimizer in svi.optim.optim_objs.values():
        for state in optimizer.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])
            state["step"] = torch.tensor(0.0)


def _other_optimizer(svi: Any) -> None:
    svi.optim = pyro.optim.SGD({"lr": 0.1})


def _other_model(svi: Any) -> None:
    svi.model = lambda v: observe(mean() + 1, v)


def _frozen(svi: Any) -> None:
    pyro.get_param_store()._params["mean"].requires_grad_(False)


@pytest.mark.parametrize("change", [_clear, _zero, _other_optimizer, _other_model, _frozen])
def test_changes_of_the_drivers_parts_are_noticed(change: Any) -> None:
    def act(svi: Any) -> None:
        steps(*[(X,)] * 5)(svi)
        change(svi)
        steps(*[(X,)] * 4)(svi)

    both(normal, act)


def test_many_graphs_are_worth_a_warning() -> None:
    """Two drivers on one optimizer take its states from each other at every step."""
    optim = pyro.optim.Adam({"lr": 0.01})
    drivers = [CompiledSVI(*normal(), optim, Trace_ELBO()) for _ in range(2)]
    for _ in range(15):
        for svi in drivers:
            svi.step(X)
    with pytest.warns(RuntimeWarning, match="Expected few graphs, but this is number 8"):
        drivers[0].step(X)


def test_settings_of_the_objective_are_noticed() -> None:
    def model(v: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(mean(), 1.0))
        observe(h, v)

    def act(svi: Any) -> None:
        steps(*[(X,)] * 4)(svi)
        svi.loss.__self__.num_particles = 4
        steps(*[(X,)] * 4)(svi)

    both(lambda: (model, AutoNormal(model)), act)


def test_tied_weights_and_flows_of_pyro_are_served() -> None:
    def tied() -> tuple[Any, Any]:
        one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        other.weight = one.weight

        def model(v: Tensor) -> None:
            pyro.module("one", one)
            pyro.module("other", other)
            observe(other(one(v[:, None])).squeeze(-1), v)

        return model, nothing

    both(tied, steps(*[(X,)] * 6))

    def model(v: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe(h.sum(), v)

    both(lambda: (model, AutoIAFNormal(model)), steps(*[(X,)] * 5))


def test_an_error_of_the_program_is_its_own_and_changes_nothing() -> None:
    fails = [False]

    def model(v: Tensor) -> None:
        if fails[0]:
            raise ValueError("boom")
        h = pyro.sample("h", dist.Normal(mean(), 1.0))
        observe(h, v)

    guide = AutoNormal(model)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2), check_every=1)
    steps(*[(X,)] * 4)(svi)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    generator, fails[0] = torch.get_rng_state(), True
    with pytest.raises(ValueError, match="boom"):
        svi.step(X)
    torch.testing.assert_close(dict(pyro.get_param_store().items()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    fails[0] = False
    steps(*[(X,)] * 3)(svi)


@pytest.mark.parametrize("loss", [None, "x", Trace_ELBO])
def test_what_is_no_objective_is_refused_at_the_door(loss: Any) -> None:
    with pytest.raises(TypeError, match="Expected an ELBO object or a callable as loss"):
        CompiledSVI(nothing, nothing, pyro.optim.Adam({"lr": 0.01}), loss)


def test_em_takes_bound_methods() -> None:
    """Each look at ``net.model`` makes another object of the same method."""
    sparse = BinarySparseCoding(num_visible=4, num_latents=2)
    em = EM(sparse.forward, MeanField(sparse.forward), e_step=FixedPoint(), m_step=None)
    assert em.step(torch.randn(5, 4)) != 0
