"""CompiledSVI: the steps of `pyro.infer.SVI`, number by number, and what a graph cannot hold."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from pyro_ext import CompiledSVI, CompilerWarning, Status, WakeSleep, fit, step_graph
from pyro_ext.guides import Amortized
from pyro_ext.models import BinarySparseCoding, SigmoidBeliefNetwork

pytestmark = [
    # Of torch's own compiler.
    pytest.mark.filterwarnings("ignore:.*torch._prims_common:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they were traced, in double precision: the same operations, at once."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(step_graph, "_compiled", lambda module, inputs: module)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.get_default_dtype())


Problem = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


class Autoencoder(nn.Module):
    """A VAE of plain modules, as in Pyro's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 6)

    def model(self, v: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=v)

    def guide(self, v: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(v)):
            mean, log_scale = self.encoder(v).chunk(2, -1)
            pyro.sample("h", dist.Normal(mean, log_scale.exp()).to_event(1))


def autoencoder() -> Problem:
    network = Autoencoder()
    return network.model, network.guide, ((uniform(12, 6) > 0.5).to(torch.get_default_dtype()),)


def regression() -> Problem:
    """Robust regression, hierarchical, subsampled, with a constrained parameter and a full covariance."""
    x = uniform(40, 3) - 0.5
    y = x @ torch.tensor([1.0, -2.0, 0.5]).to(x) + 0.1 * uniform(40, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        df = pyro.param("df", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", 40, subsample_size=15) as rows:
            pyro.sample("y", dist.StudentT(df, x[rows] @ weights, scale), obs=y[rows])

    return model, AutoMultivariateNormal(model), (x, y)


def mixture() -> Problem:
    """A mixture of Normals whose assignments are summed out in the model."""
    v = uniform(30) + 3 * (uniform(30, seed=1) > 0.5)

    @config_enumerate
    def model(v: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        means = pyro.param("means", torch.tensor([0.0, 2.0]))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(v)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("v", dist.Normal(means[k], scale), obs=v)

    return model, AutoNormal(poutine.block(model, hide=["k"])), (v,)


def discrete() -> Problem:
    """Binary latents with a score-function gradient."""

    def model(v: Tensor) -> None:
        w = pyro.param("w", torch.tensor([2.0, -1.0, 0.5]))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3 * v.new_ones(3)).to_event(1))
            pyro.sample("v", dist.Normal(h @ w, 1.0), obs=v)

    def guide(v: Tensor, observations: Any = None) -> None:
        a, b = pyro.param("a", torch.zeros(3)), pyro.param("b", torch.zeros(3))
        seen = v if observations is None else observations["v"]
        with pyro.plate("data", v.shape[0]):
            pyro.sample("h", dist.Bernoulli(logits=a + b * seen[..., None]).to_event(1))

    return model, guide, (uniform(9),)


def network() -> Problem:
    v = (uniform(10, 6) > 0.5).to(torch.get_default_dtype())
    model = SigmoidBeliefNetwork([2, 3, 6])
    model.initialize(v)
    return model, Amortized(model), (v,)


def run(
    driver: Any, problem: Callable[[], Problem], loss: Callable[[], Any], optim: Callable[[], Any], num_steps: int = 8
) -> tuple[list[Any], list[Tensor], Tensor]:
    """Losses, parameters in the order of the store, and the next random number."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = problem()
    svi = driver(model, guide, optim(), loss())
    losses = [svi.step(*args) for _ in range(num_steps)]
    return losses, [p.detach().clone() for p in pyro.get_param_store().values()], torch.rand(1)


def assert_same(problem: Any, loss: Any, optim: Any, *, tolerance: float, num_steps: int = 8) -> None:
    expected = run(SVI, problem, loss, optim, num_steps)
    found = run(CompiledSVI, problem, loss, optim, num_steps)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=tolerance, atol=tolerance)
    for p, q in zip(found[1], expected[1], strict=True):
        assert float((p - q).norm()) <= tolerance * float(q.norm())
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.01})


# ------------------------------------------------------------------ the same numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "loss", "optim"),
    [
        (autoencoder, Trace_ELBO, adam),
        (regression, Trace_ELBO, lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99})),
        (mixture, TraceEnum_ELBO, lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})),
        (discrete, lambda: WakeSleep(num_particles=4, insomnia=0.5), adam),
    ],
)
def test_compiled_steps_are_pyros_own(problem: Any, loss: Any, optim: Any) -> None:
    """Four programs, a hundred steps each: 1e-5 relative in the parameters, float32."""
    assert_same(problem, loss, optim, tolerance=1e-5, num_steps=100)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("problem", "loss"),
    [
        (autoencoder, Trace_ELBO),
        (autoencoder, lambda: Trace_ELBO(num_particles=3)),
        (autoencoder, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
        (autoencoder, TraceMeanField_ELBO),
        (autoencoder, lambda: RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
        (discrete, Trace_ELBO),
        (discrete, TraceGraph_ELBO),
        (discrete, lambda: WakeSleep(num_particles=3)),
        (discrete, lambda: WakeSleep(num_particles=4, insomnia=1.0)),
        (discrete, lambda: WakeSleep(num_particles=4, insomnia=0.5, vectorize_particles=False)),
        (discrete, lambda: WakeSleep(num_particles=4, insomnia=0.5, num_dreams=4)),
        (discrete, lambda: ReweightedWakeSleep(num_particles=3, insomnia=0.5, max_plate_nesting=1)),
        (mixture, TraceEnum_ELBO),
        (regression, lambda: Trace_ELBO(num_particles=2)),
        (network, lambda: WakeSleep(num_particles=2)),
        (network, lambda: WakeSleep(num_particles=5, insomnia=1.0)),
        (network, TraceGraph_ELBO),
    ],
)
def test_every_objective(problem: Any, loss: Any) -> None:
    """The graph holds the very operations: parameters equal to 1e-10 after eight steps, draws bit for bit."""
    assert_same(problem, loss, adam, tolerance=1e-10)


@pytest.mark.usefixtures("traced")
def test_a_callable_loss() -> None:
    def loss(model: Any, guide: Any, v: Tensor) -> Tensor:
        trace = poutine.trace(guide).get_trace(v)
        return trace.log_prob_sum() - poutine.trace(poutine.replay(model, trace=trace)).get_trace(v).log_prob_sum()

    assert_same(autoencoder, lambda: loss, adam, tolerance=1e-10)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
        lambda: pyro.optim.Adam({"lr": 0.01, "maximize": True}),
        lambda: pyro.optim.Adam({"lr": 0.01, "amsgrad": True}),  # eagerly
        lambda: pyro.optim.AdamW({"lr": 0.01, "weight_decay": 0.1}),
        lambda: pyro.optim.SGD({"lr": 1e-3}),
        lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9, "nesterov": True, "maximize": True}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.01, "betas": (0.8, 0.95), "centered_variance": True}),
        lambda: pyro.optim.RMSprop({"lr": 0.01}),  # eagerly
        lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),  # eagerly
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "bias" in name else 0.01}),
    ],
)
def test_every_optimizer(optim: Any) -> None:
    assert_same(autoencoder, Trace_ELBO, optim, tolerance=1e-10)


@pytest.mark.usefixtures("traced")
def test_learning_rate_schedules_reach_the_graph() -> None:
    losses, params = [], []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = autoencoder()
        scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
        svi = driver(model, guide, scheduler, Trace_ELBO())
        for _ in range(6):
            losses.append(svi.step(*args))
            scheduler.step()
        params.append([p.detach().clone() for p in pyro.get_param_store().values()])
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-10)
    for p, q in zip(*params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("optim", [adam, lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9})])
def test_pyros_svi_goes_on_from_any_step(optim: Any) -> None:
    """Both drivers in turn on one optimizer: twelve steps of SVI."""
    expected = run(SVI, autoencoder, Trace_ELBO, optim, 12)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = autoencoder()
    both = [driver(model, guide, optimizer, Trace_ELBO()) for optimizer in [optim()] for driver in (CompiledSVI, SVI)]
    losses = [both[i].step(*args) for i in (0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1)]
    assert losses == pytest.approx(expected[0], rel=1e-10)
    for p, q in zip(pyro.get_param_store().values(), expected[1], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("traced")
def test_buffers_and_modes_of_modules() -> None:
    """BatchNorm's buffers move in the graph, and evaluation mode is another signature."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.linear = nn.Linear(4, 1)

        def forward(self, v: Tensor) -> None:
            pyro.module("normalised", self)
            with pyro.plate("data", len(v)):
                pyro.sample("y", dist.Normal(self.linear(self.norm(v)).squeeze(-1), 1.0), obs=v[:, 0])

    states = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Normalised()
        svi = driver(model, lambda v: None, adam(), Trace_ELBO())
        for _ in range(5):
            svi.step(uniform(9, 4))
        if isinstance(svi, CompiledSVI):
            assert len(svi._graphs) == 1
        model.eval()
        svi.step(uniform(9, 4))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-12)
    assert int(states[1]["norm.num_batches_tracked"]) == 5


@pytest.mark.usefixtures("traced")
def test_the_objectives_notes_come_out_of_the_graph() -> None:
    model, guide, args = network()
    objective = WakeSleep(num_particles=2)
    svi = CompiledSVI(model, guide, adam(), objective)
    noted = []
    for _ in range(5):
        svi.step(*args)
        assert objective.last_sleep_loss is not None
        noted.append(float(objective.last_sleep_loss))
    assert len(set(noted)) == 5
    history = fit(svi, [args[0]], 2, progress=False)
    assert len(history.sleep_loss) == 2


@pytest.mark.usefixtures("traced")
def test_evaluate_loss_is_that_of_svi() -> None:
    model, guide, args = autoencoder()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO())
    for _ in range(3):
        svi.step(*args)
    before = [p.detach().clone() for p in pyro.get_param_store().values()]
    pyro.set_rng_seed(1)
    found = svi.evaluate_loss(*args)
    pyro.set_rng_seed(1)
    assert found == SVI(model, guide, adam(), Trace_ELBO()).evaluate_loss(*args)
    for p, q in zip(pyro.get_param_store().values(), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)


# ------------------------------------------------------------------ when a graph is made


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, traced: None) -> list[Any]:
    """Every graph that is made."""
    made: list[Any] = []

    def compiled(module: Any, inputs: Any) -> Any:
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(step_graph, "_compiled", compiled)
    return made


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
def test_a_sleeping_objective_is_traced_once(insomnia: float, graphs: list[Any]) -> None:
    model, guide, args = network()
    svi = CompiledSVI(model, guide, adam(), WakeSleep(num_particles=3, insomnia=insomnia))
    for _ in range(12):
        svi.step(*args)
    assert len(graphs) == 1


def test_a_second_shape_waits_for_its_graph(graphs: list[Any]) -> None:
    model, guide, (v,) = autoencoder()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO())
    for _ in range(100):
        svi.step(v)
        svi.step(v[:5])
    assert len(graphs) == 1
    svi.step(v[:5])
    assert len(graphs) == 2
    svi.step(v)
    assert len(graphs) == 2


@pytest.mark.parametrize("optim", [adam, lambda: pyro.optim.RMSprop({"lr": 0.01})])
def test_both_shapes_keep_one_optimizer(optim: Any, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps and two graphs on one set of states are the steps of SVI."""
    monkeypatch.setattr("pyro_ext.compiled_svi._OTHER_SHAPES", 2)
    losses: list[list[float]] = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, (v,) = autoencoder()
        svi = driver(model, guide, optim(), Trace_ELBO())
        losses.append([svi.step(v[:rows]) for rows in (12, 12, 5, 12, 5, 5, 12, 5, 12, 5)])
    assert len(graphs) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


def test_parameters_without_a_gradient_go_on_with_their_momentum(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in SVI, whose gradients are zero between steps, not none."""
    monkeypatch.setattr("pyro_ext.compiled_svi._OTHER_SHAPES", 1)

    def model(v: Tensor) -> None:
        mean, shift = pyro.param("mean", torch.tensor(0.0)), pyro.param("shift", torch.tensor(0.0))
        location = mean + shift if len(v) > 3 else mean
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(location, 1.0), obs=v)

    values = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        svi = driver(model, lambda v: None, adam(), Trace_ELBO())
        for rows in (5, 5, 2, 2, 2):
            svi.step(uniform(rows))
        values.append([float(p.detach()) for p in pyro.get_param_store().values()])
    assert len(graphs) == 2
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def test_shapes_with_parameters_of_their_own(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What one shape does not touch stays, as in SVI."""
    monkeypatch.setattr("pyro_ext.compiled_svi._OTHER_SHAPES", 1)

    def model(v: Tensor) -> None:
        location = pyro.param("mean", torch.tensor(0.0))
        if len(v) > 3:
            location = location + pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(location, 1.0), obs=v)

    values = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        svi = driver(model, lambda v: None, adam(), Trace_ELBO())
        for rows in (5, 5, 2, 2, 5, 2, 2):
            svi.step(uniform(rows))
        values.append([float(p.detach()) for p in pyro.get_param_store().values()])
    assert len(graphs) == 2
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def test_parameters_put_into_the_store_are_traced_anew(graphs: list[Any]) -> None:
    values = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, args = mixture()
        svi = driver(model, guide, adam(), TraceEnum_ELBO())
        for _ in range(3):
            svi.step(*args)
        pyro.get_param_store()["means"] = torch.tensor([0.5, 2.5])
        for _ in range(3):
            svi.step(*args)
        values.append(torch.cat([p.detach().reshape(-1) for p in pyro.get_param_store().values()]))
    assert len(graphs) == 2
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-12)


def test_a_refused_trace_leaves_the_objectives_notes(graphs: list[Any]) -> None:
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.5 * torch.ones(len(v))))
            shift = 1.0 if v.sum() > 0 else 0.0
            pyro.sample("v", dist.Normal(h + pyro.param("mean", torch.tensor(0.0)) + shift, 1.0), obs=v)

    def guide(v: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(logits=a + v))

    objective = WakeSleep(num_particles=2)
    svi = CompiledSVI(model, guide, adam(), objective)
    svi.step(uniform(4))
    noted = objective.last_sleep_loss
    with pytest.raises(RuntimeError, match="Expected a program that a graph can hold"):
        svi.step(uniform(4))
    assert objective.last_sleep_loss is noted
    assert not graphs


def test_other_settings_are_traced_anew(graphs: list[Any]) -> None:
    model, guide, args = autoencoder()
    optim = adam()
    svi = CompiledSVI(model, guide, optim, Trace_ELBO())
    for _ in range(3):
        svi.step(*args)
    for optimizer in optim.optim_objs.values():
        optimizer.param_groups[0]["lr"] = 0.02
    svi.step(*args)
    assert len(graphs) == 1
    for optimizer in optim.optim_objs.values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    svi.step(*args)
    assert len(graphs) == 2


def test_many_signatures_are_worth_a_warning(graphs: list[Any]) -> None:
    def model(v: Tensor, factor: float) -> None:
        with poutine.scale(scale=factor):
            pyro.sample("v", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0).expand([3]).to_event(1), obs=v)

    svi = CompiledSVI(model, lambda v, factor: None, adam(), Trace_ELBO())
    for step in range(16):
        svi.step(uniform(3), (step + 1) / 20)
    with pytest.warns(RuntimeWarning, match="Expected few signatures of arguments, but got more than 16"):
        svi.step(uniform(3), 1.0)
    svi.step(uniform(3), 2.0)
    assert not graphs


def test_numbers_that_change_come_in_as_tensors(graphs: list[Any]) -> None:
    def model(v: Tensor, factor: Tensor) -> None:
        with poutine.scale(scale=factor):
            pyro.sample("v", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0).expand([3]).to_event(1), obs=v)

    losses = []
    for driver in (SVI, CompiledSVI):
        pyro.clear_param_store()
        svi = driver(model, lambda v, factor: None, adam(), Trace_ELBO())
        losses.append([svi.step(uniform(3), factor=torch.tensor((i + 1) / 20)) for i in range(20)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert len(graphs) == 1


# ------------------------------------------------------------------ what is refused


def state() -> list[Tensor]:
    return [p.detach().clone() for p in pyro.get_param_store().values()]


def assert_unchanged(before: list[Tensor]) -> None:
    for p, q in zip(pyro.get_param_store().values(), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)


@pytest.mark.usefixtures("traced")
def test_a_number_of_pythons_is_noticed_at_the_check() -> None:
    shift = [0.0]

    def model(v: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        pyro.sample("v", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=v + shift[0])

    svi = CompiledSVI(model, lambda v: None, adam(), Trace_ELBO(), check_every=4)
    for _ in range(5):  # Pyro's own, the one that is traced, three of the graph
        svi.step(uniform(3))
    shift[0] = 1.0
    before = state()
    with pytest.raises(
        RuntimeError, match=r"Expected the compiled step to give the loss .* of Pyro's own step, but got"
    ):
        svi.step(uniform(3))
    assert_unchanged(before)


@pytest.mark.usefixtures("traced")
def test_a_gradient_that_only_python_knows_is_noticed() -> None:
    factors = itertools.chain([1.0, 1.0], itertools.repeat(3.0))

    def loss_and_grads(model: Any, guide: Any, v: Tensor) -> float:
        loss = -poutine.trace(model).get_trace(v).log_prob_sum()
        (next(factors) * loss).backward()
        return loss.item()

    def model(v: Tensor) -> None:
        pyro.sample("v", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0).expand([3]).to_event(1), obs=v)

    optim = pyro.optim.SGD({"lr": 0.01})
    svi = CompiledSVI(model, lambda v: None, optim, lambda *args: 0.0, loss_and_grads)
    svi.step(uniform(3))
    before = state()
    with pytest.raises(RuntimeError, match=r"Expected the compiled step to move 'mean' as Pyro's own step does, by"):
        svi.step(uniform(3))
    assert_unchanged(before)


def branching(v: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    if v.sum() > 0:
        mean = mean + 1
    pyro.sample("v", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=v)


def counting(v: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    for i in range(int(v.sum() * 0 + 3)):
        pyro.sample(f"v{i}", dist.Normal(mean, 1.0), obs=v[i])


def sequential(v: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    for i in pyro.plate("steps", 3):
        pyro.sample(f"v{i}", dist.Normal(mean, 1.0), obs=v[i])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (branching, r"test_compiled_svi.py:\d+ looks at the value of a tensor by a Python branch"),
        (counting, r"test_compiled_svi.py:\d+ looks at the value of a tensor by int\(\)"),
        (sequential, r"test_compiled_svi.py:\d+ looks at the value of a tensor \(sequential plates .*\)"),
    ],
)
def test_programs_that_look_at_values_are_refused(model: Any, reason: str) -> None:
    optim = adam()
    svi = CompiledSVI(model, lambda v: None, optim, Trace_ELBO())
    svi.step(uniform(3))
    before, count = state(), [int(s["step"]) for o in optim.optim_objs.values() for s in o.state.values()]
    with pytest.raises(RuntimeError, match=rf"Expected a program that a graph can hold, but .*{reason}\. Pass what"):
        svi.step(uniform(3))
    assert_unchanged(before)
    assert [int(s["step"]) for o in optim.optim_objs.values() for s in o.state.values()] == count


def test_bad_arguments_are_refused_by_name() -> None:
    model, guide, (v,) = autoencoder()
    with pytest.raises(TypeError, match=r"Expected a callable model, but got int\. Pass the program itself\."):
        CompiledSVI(3, guide, adam(), Trace_ELBO())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Expected an optimizer of pyro.optim, but got Adam\. Write pyro\.optim\.Adam"):
        CompiledSVI(model, guide, torch.optim.Adam([torch.zeros(1)]), Trace_ELBO())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Expected an integer check_every, but got 2\.5"):
        CompiledSVI(model, guide, adam(), Trace_ELBO(), check_every=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"Expected check_every of at least 0, but got -1"):
        CompiledSVI(model, guide, adam(), Trace_ELBO(), check_every=-1)
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO())
    with pytest.raises(
        TypeError, match=r"Expected tensors and plain values as arguments, but got ndarray\. Convert it"
    ):
        svi.step(v.numpy())
    with pytest.raises(ValueError, match=r"Expected data without gradients, but got a tensor with requires_grad"):
        svi.step(v.clone().requires_grad_())
    assert not list(pyro.get_param_store().keys())


@pytest.mark.usefixtures("traced")
def test_data_are_checked_at_every_step() -> None:
    model = BinarySparseCoding(num_visible=6, num_latents=2)
    v = uniform(8, 6)
    svi = CompiledSVI(model, Amortized(model), adam(), Trace_ELBO())
    for _ in range(3):
        svi.step(v)
    before = state()
    with pytest.raises(ValueError, match="Expected finite values in v, but got 1 NaN"):
        svi.step(torch.where(v == v[0, 0], torch.nan, v))
    assert_unchanged(before)


@pytest.mark.usefixtures("traced")
def test_a_non_finite_loss_ends_a_fit_at_the_state_before() -> None:
    def model(v: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v = uniform(8)
    svi = CompiledSVI(model, AutoNormal(model), adam(), Trace_ELBO())
    fit(svi, [v], 3, progress=False)
    before = state()
    broken = v.clone()
    broken[0] = torch.nan
    history = fit(svi, [broken], 3, progress=False)
    assert history.status is Status.NON_FINITE
    assert_unchanged(before)
    assert fit(svi, [v], 1, progress=False).status is not Status.NON_FINITE


# ------------------------------------------------------------------ no compiler


def test_without_a_compiler_the_graph_is_run_as_it_is() -> None:
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler.cache_clear() if hasattr(get_cpp_compiler, "cache_clear") else None
        with pytest.warns(CompilerWarning, match=r"Expected a C\+\+ compiler, but found none .* Install g\+\+"):
            assert_same(discrete, Trace_ELBO, adam, tolerance=1e-5)
