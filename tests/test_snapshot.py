"""Snapshots: the same tensors, the old values, and a run that goes on as if nothing had happened."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_ext.snapshot import (
    Snapshot,
    modules_of,
    num_non_finite,
    rng_state,
    set_rng_state,
    unchanged,
    unchanged_on_error,
)

DATA = torch.tensor([[0.3, -1.2], [1.5, 0.4], [-0.2, 0.9]])


class Model(PyroModule):
    """A module with every kind of parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, v: Tensor) -> None:
        self.calls += 1
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(self.linear(h) + self.shift, self.scale).to_event(1), obs=v)


def make_svi(optim: pyro.optim.PyroOptim | None = None) -> SVI:
    model = Model()
    return SVI(model, AutoNormal(model), optim or pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())


def values() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_writes_plain_parameters_back_into_the_same_tensors():
    pyro.param("p", torch.tensor([0.2, 0.8]), constraint=constraints.simplex)
    pyro.param("w", torch.tensor([1.0, -1.0]))
    store = pyro.get_param_store()
    tensors, before = dict(store.named_parameters()), values()
    snapshot = Snapshot.take()
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.tensor([1.0, 5.0]))
    snapshot.restore()
    assert_same(values(), before)
    assert all(dict(store.named_parameters())[name] is tensor for name, tensor in tensors.items())
    assert store.param_name(tensors["p"]) == "p"
    assert isinstance(store._constraints["p"], type(constraints.simplex))


def test_restores_again_and_again():
    w = pyro.param("w", torch.zeros(2))
    snapshot = Snapshot.take()
    for _ in range(3):
        with torch.no_grad():
            w.add_(1.0)
        snapshot.restore()
        assert torch.equal(pyro.param("w"), torch.zeros(2))


def test_removes_created_parameters_and_brings_deleted_and_replaced_ones_back_in_order():
    for name in ("a", "b", "c"):
        pyro.param(name, torch.ones(2), constraint=constraints.positive)
    store = pyro.get_param_store()
    tensors = dict(store.named_parameters())
    snapshot = Snapshot.take()
    del store["a"]
    store["b"] = torch.tensor([3.0, 3.0, 3.0])
    pyro.param("new", torch.zeros(1))
    snapshot.restore()
    assert list(store.keys()) == ["a", "b", "c"]
    assert all(store._params[name] is tensor for name, tensor in tensors.items())
    assert set(store._param_to_name) == set(tensors.values())
    assert torch.equal(store["b"], torch.ones(2))


def test_module_parameters_are_the_stores_tensors_before_and_after():
    model = Model()
    model(DATA)
    store = pyro.get_param_store()
    names = {"linear$$$weight": "linear.weight", "scale": "scale_unconstrained", "shift": "shift"}
    parameters = dict(model.named_parameters())
    assert all(store._params[ours] is parameters[theirs] for ours, theirs in names.items())
    snapshot, before = Snapshot.take(), values()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(0.5)
    snapshot.restore()
    assert_same(values(), before)
    assert all(store._params[ours] is dict(model.named_parameters())[theirs] for ours, theirs in names.items())
    assert torch.equal(model.scale, before["scale"])


def test_a_module_not_yet_registered_goes_back_too():
    svi = make_svi()
    before = {name: tensor.clone() for name, tensor in svi.model.state_dict().items()}
    snapshot = Snapshot.take(svi.model)
    svi.step(DATA)
    assert len(pyro.get_param_store()) > 0
    snapshot.restore()
    assert len(pyro.get_param_store()) == 0
    assert_same(dict(svi.model.state_dict()), before)


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "replaced"])
def test_buffers(replace):
    model = Model()
    buffer = model.calls
    snapshot = Snapshot.take(model)
    if replace:
        model.calls = torch.tensor(7.0)
    else:
        model.calls += 7.0
    snapshot.restore()
    assert model.calls is buffer
    assert buffer == 0


OPTIMS: dict[str, Callable[[], pyro.optim.PyroOptim]] = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    # Its rate depends on the number of steps that the schedule has counted.
    "schedule": lambda: pyro.optim.LambdaLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "lr_lambda": lambda step: 1.0 / (1 + step)}
    ),
}


@pytest.mark.parametrize("make", OPTIMS.values(), ids=OPTIMS.keys())
def test_after_restore_the_run_repeats_itself_bit_by_bit(make):
    svi = make_svi(make())

    def run() -> list[float]:
        losses = []
        for _ in range(4):
            losses.append(svi.step(DATA))
            if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
                svi.optim.step()
        return losses

    run()
    snapshot = Snapshot.take(svi.model, svi.guide, svi.optim, rng=True)
    first = run()
    snapshot.restore()
    assert run() == first
    snapshot.restore()
    assert run() == first


def test_without_the_optimizer_its_moments_stay():
    svi = make_svi()
    for _ in range(3):
        svi.step(DATA)
    snapshot = Snapshot.take(svi.model, svi.guide, rng=True)
    first = [svi.step(DATA) for _ in range(3)]
    snapshot.restore()
    assert [svi.step(DATA) for _ in range(3)] != first


def test_optimizers_made_since_are_forgotten_and_waiting_state_waits_again():
    saved = make_svi()
    saved.step(DATA)
    state = saved.optim.get_state()
    pyro.clear_param_store()
    svi = make_svi()
    svi.optim.set_state(state)
    snapshot = Snapshot.take(svi.model, svi.guide, svi.optim)
    svi.step(DATA)
    assert svi.optim.optim_objs
    assert not svi.optim._state_waiting_to_be_consumed
    snapshot.restore()
    assert not svi.optim.optim_objs
    assert not svi.optim.grad_clip
    assert set(svi.optim._state_waiting_to_be_consumed) == set(state)


def test_a_torch_optimizer():
    linear = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        linear(DATA).square().sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in linear.parameters()]

    step()
    snapshot = Snapshot.take(linear, optimizer)
    first = step()
    optimizer.param_groups[0]["lr"] = 10.0
    step()
    snapshot.restore()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def test_optimizer_state_made_since_is_forgotten():
    linear = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)
    snapshot = Snapshot.take(linear, optimizer)
    linear(DATA).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    snapshot.restore()
    assert len(optimizer.state) == 0


def test_retake_moves_the_snapshot_forward():
    w = pyro.param("w", torch.zeros(2))
    snapshot = Snapshot.take()
    memory = snapshot._values[id(w.unconstrained())][1].data_ptr()
    with torch.no_grad():
        w.fill_(2.0)
    pyro.param("later", torch.ones(1))
    snapshot.retake()
    with torch.no_grad():
        w.fill_(3.0)
    snapshot.restore()
    assert torch.equal(pyro.param("w"), torch.full((2,), 2.0))
    assert "later" in pyro.get_param_store()
    assert snapshot._values[id(w.unconstrained())][1].data_ptr() == memory


def test_shapes_and_dtypes_changed_under_a_tensor_come_back():
    linear = nn.Linear(2, 2)
    weight, before = linear.weight, linear.weight.detach().clone()
    snapshot = Snapshot.take(linear)
    linear.double()
    linear.weight.data = torch.zeros(5, 2, dtype=torch.float64)
    snapshot.restore()
    assert linear.weight is weight
    assert torch.equal(weight, before)
    assert weight.dtype == torch.float32


def test_tensors_that_cannot_be_written_are_left_alone():
    module = nn.Module()
    module.register_buffer("constant", torch.tensor(0.5).expand(3))
    module.lazy = nn.LazyLinear(2)
    snapshot = Snapshot.take(module)
    snapshot.restore()
    assert torch.equal(module.constant, torch.full((3,), 0.5))
    module.lazy(DATA)
    assert module.lazy.weight.shape == (2, 2)


def test_gradients_written_since_are_zeroed_and_others_left():
    fresh = pyro.param("fresh", torch.ones(2)).unconstrained()
    zeroed = pyro.param("zeroed", torch.ones(2)).unconstrained()
    zeroed.grad = torch.zeros(2)
    untouched = pyro.param("untouched", torch.ones(2)).unconstrained()
    untouched.grad = torch.full((2,), 3.0)
    snapshot = Snapshot.take()
    (fresh * zeroed).sum().backward()
    snapshot.restore()
    assert fresh.grad is None
    assert torch.equal(zeroed.grad, torch.zeros(2))
    assert torch.equal(untouched.grad, torch.full((2,), 3.0))


def draws() -> tuple[float, float, float]:
    # The global generator of NumPy is the one that Pyro seeds.
    return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_random_generators_of_torch_numpy_and_python():
    snapshot = Snapshot.take(rng=True)
    first = draws()
    snapshot.restore()
    assert draws() == first
    state = rng_state()
    second = draws()
    set_rng_state(state)
    assert draws() == second != first


def test_watching_puts_created_parameters_back_at_their_first_value():
    svi = make_svi()
    snapshot = Snapshot.take(svi.model, svi.guide, svi.optim)
    with snapshot.watching():
        svi.step(DATA)
    moved = values()
    snapshot.restore()
    restored = values()
    assert list(restored) == list(moved)
    # AutoNormal starts its scales at 0.1, and Adam has moved them by its learning rate.
    scale = "AutoNormal.scales.h"
    assert torch.allclose(restored[scale], torch.full((3, 2), 0.1))
    assert not torch.allclose(moved[scale], restored[scale])
    assert torch.equal(restored["scale"], torch.ones(2))
    assert not torch.equal(moved["scale"], torch.ones(2))
    assert torch.equal(svi.guide.scales.h, restored[scale])


def test_watching_without_keeping_empties_the_store_and_still_resets_the_guide():
    svi = make_svi()
    snapshot = Snapshot.take(svi.model, svi.guide, svi.optim)
    with snapshot.watching():
        svi.step(DATA)
    snapshot.restore(keep_created=False)
    assert len(pyro.get_param_store()) == 0
    assert torch.allclose(svi.guide.scales.h, torch.full((3, 2), 0.1))


def test_unchanged_restores_in_every_case():
    w = pyro.param("w", torch.zeros(1))
    first = torch.rand(())
    pyro.set_rng_seed(0)
    with unchanged(), torch.no_grad():
        w.fill_(1.0)
        torch.rand(())
    assert w == 0
    assert torch.rand(()) == first


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_unchanged_on_error_restores_and_raises_again(error):
    w = pyro.param("w", torch.zeros(1))
    first = torch.rand(())
    pyro.set_rng_seed(0)

    def refuse() -> None:
        with unchanged_on_error(), torch.no_grad():
            w.fill_(1.0)
            torch.rand(())
            raise error("refused")

    with pytest.raises(error, match="refused"):
        refuse()
    assert w == 0
    assert torch.rand(()) == first


def test_unchanged_on_error_lets_success_stand():
    w = pyro.param("w", torch.zeros(1))
    with unchanged_on_error(), torch.no_grad():
        w.fill_(1.0)
    assert w == 1


def test_counts_elements_that_are_not_finite():
    pyro.param("p", torch.tensor([1.0, 0.0]), constraint=constraints.simplex)
    assert num_non_finite() == Snapshot.take().num_non_finite == 1  # the logarithm of a zero probability
    pyro.param("w", torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 3e38]))
    assert num_non_finite() == Snapshot.take().num_non_finite == 4


def test_refuses_parts_it_does_not_know():
    with pytest.raises(TypeError, match=r"Expected modules and optimizers, but got function\. .*modules_of"):
        Snapshot.take(lambda v: v)


def test_modules_of_looks_behind_methods_handlers_and_partials():
    model = Model()

    def plain(v: Tensor) -> None: ...

    behind = (
        model,
        model.forward,
        poutine.block(model),
        poutine.scale(model.forward, 2.0),
        functools.partial(model, v=DATA),
    )
    for program in behind:
        assert modules_of(program) == (model,)
    assert modules_of(*behind, plain, None, functools.partial(plain, DATA)) == (model,)


def test_settled_tensors_are_recorded_again_once_they_were_written_to() -> None:
    table, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    module = nn.ParameterDict({"table": table, "other": other})
    snapshot = Snapshot.take(module, settled=[table])
    recorded = snapshot._values[id(table)][1]
    with torch.no_grad():
        other.fill_(1.0)
    snapshot.retake()
    # Nobody wrote to the table: its copy was left alone.
    assert recorded._version == 1
    with torch.no_grad():
        table.fill_(2.0)
        other.fill_(2.0)
    snapshot.restore()
    assert table.tolist() == [0.0] * 3
    assert other.tolist() == [1.0] * 2
    with torch.no_grad():
        table.fill_(3.0)
    snapshot.retake()
    with torch.no_grad():
        table.fill_(4.0)
    snapshot.restore()
    assert table.tolist() == [3.0] * 3
