from __future__ import annotations

import re
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_ext.models import (
    BinarySparseCoding,
    FactorAnalysis,
    Full,
    GaussianMixture,
    HelmholtzMachine,
    LinearGaussian,
    Model,
    ProbabilisticPCA,
    SigmoidBeliefNetwork,
    assign_parameter,
    assign_parameters,
    read_parameter,
    unconstrained_parameter,
)
from tests.oracles.enumeration import program_log_joint

D = 4
MODELS: dict[str, Callable[[], Model]] = {
    "mixture, diagonal": lambda: GaussianMixture(3, D),
    "mixture, full": lambda: GaussianMixture(3, D, Full()),
    "binary sparse coding": lambda: BinarySparseCoding(D, 3),
    "sigmoid belief network": lambda: SigmoidBeliefNetwork([2, 3, D]),
    "helmholtz machine": lambda: HelmholtzMachine(D, 2),
    "factor analysis": lambda: FactorAnalysis(D, 2),
    "probabilistic pca": lambda: ProbabilisticPCA(D, 2),
    "linear gaussian": lambda: LinearGaussian(D, 2, learn_prior=True),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def data_for(model: Model, num_rows: int = 20) -> torch.Tensor:
    v = torch.randn(num_rows, D)
    return (v > 0).to(v.dtype) if model.visible_support is constraints.boolean else v


@every_model
def test_dreams_have_the_shape_and_support_of_data(build: Callable[[], Model]) -> None:
    model = build()
    v = model.dream(7)
    assert v.shape == (7, D)
    assert not v.requires_grad
    model.check_data(v)


@every_model
def test_dreaming_leaves_no_trace_and_ignores_conditioning(build: Callable[[], Model]) -> None:
    model = build()
    with pyro.poutine.trace() as tracer, pyro.condition(data={"v": torch.full((5, D), 0.0)}):
        v = model.dream(5)
    assert not tracer.trace.nodes
    assert (v != 0).any()


@every_model
def test_conditioned_sites_and_plate(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model)
    trace = pyro.poutine.trace(model).get_trace(v)
    assert trace.nodes["_RETURN"]["value"] is v
    assert trace.nodes["v"]["is_observed"]
    for name in trace.stochastic_nodes:
        if name != "data":
            (frame,) = trace.nodes[name]["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, 20)
            assert trace.nodes[name]["fn"].batch_shape == (20,)
            assert len(trace.nodes[name]["fn"].event_shape) == 1


@every_model
def test_initialize_is_reproducible_new_and_in_place(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model)
    tensors = dict(model.named_parameters())
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.initialize(v)
        starts.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
    assert all(tensors[name] is tensor for name, tensor in model.named_parameters())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in tensors)
    assert any(not torch.equal(starts[0][name], starts[2][name]) for name in tensors)
    model(v)


@every_model
def test_initialize_follows_the_dtype(build: Callable[[], Model]) -> None:
    model = build().to(torch.float64)
    v = data_for(model).double()
    model.initialize(v)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model.dream(3).dtype == torch.float64
    trace = pyro.poutine.trace(model).get_trace(v)
    assert trace.log_prob_sum().dtype == torch.float64


@every_model
def test_refusals_of_the_call(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model)
    for call in (model, model.check_data):
        with pytest.raises(
            ValueError, match="Expected exactly one of v and size, but got neither. Pass v to condition"
        ):
            call()
        with pytest.raises(ValueError, match="Expected exactly one of v and size, but got both. Pass v to condition"):
            call(v, size=3)
        with pytest.raises(
            ValueError, match=re.escape("Expected v of shape (N, 4), but got (20, 3). Select 4 columns")
        ):
            call(v[:, :3])
        with pytest.raises(ValueError, match=re.escape("Expected v of shape (N, 4), but got (4,). Add the missing")):
            call(v[0])
        with pytest.raises(ValueError, match="Expected size >= 1, but got 0."):
            call(size=0)
    with pytest.raises(ValueError, match="Expected n >= 1, but got 0."):
        model.dream(0)


@every_model
def test_refusals_of_data(build: Callable[[], Model]) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    v = data_for(model)
    with_nan = v.clone()
    with_nan[3, 1] = torch.nan
    for call in (model.check_data, model.initialize):
        with pytest.raises(ValueError, match=re.escape("1 NaN or infinite, the first at (3, 1)")):
            call(with_nan)
        with pytest.raises(TypeError, match="Expected v of dtype torch.float32"):
            call(v.double())
        with pytest.raises(TypeError, match="Expected v of dtype torch.float32, .* but got torch.int64"):
            call(v.long())
        with pytest.raises(ValueError, match="Expected at least one row in v"):
            call(v[:0])
        if model.visible_support is constraints.boolean:
            with pytest.raises(ValueError, match="Expected only 0 and 1 in v, but got 80 other values, the first 0.3"):
                call(torch.full_like(v, 0.3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    model.check_data(v)
    model.check_data(size=3)


@every_model
def test_names_are_claimed(build: Callable[[], Model]) -> None:
    first, second = build(), build()
    assert first._pyro_name != second._pyro_name
    first(size=2)
    second(size=2)
    keys = list(pyro.get_param_store().keys())
    assert all(key.startswith((f"{first._pyro_name}.", f"{second._pyro_name}.")) for key in keys)
    assert len(keys) == len(list(first.parameters())) + len(list(second.parameters()))


def test_name_collision() -> None:
    first = BinarySparseCoding(2, 1, name="sparse")
    with pytest.raises(ValueError, match="Expected a name that no other live module holds, but got 'sparse'"):
        GaussianMixture(2, 2, name="sparse")
    first(size=1)
    assert all(key.startswith("sparse.") for key in pyro.get_param_store().keys())


def test_subclasses_must_define_the_program() -> None:
    model = Model(2)
    with pytest.raises(NotImplementedError, match="Model does not define forward"):
        model(size=1)
    with pytest.raises(NotImplementedError, match="Model does not define initialize"):
        model.initialize(torch.zeros(1, 2))


class Thing(PyroModule):
    def __init__(self) -> None:
        super().__init__("thing")
        self.loc = PyroParam(torch.zeros(2))
        self.scale = PyroParam(torch.ones(2), constraints.positive)

    def forward(self) -> torch.Tensor:
        return self.loc + self.scale


def test_assignment_before_the_first_call_registers_nothing() -> None:
    thing = Thing()
    tensor = thing.scale_unconstrained
    assign_parameter(thing, "scale", torch.tensor([2.0, 3.0]))
    assert unconstrained_parameter(thing, "scale") is tensor
    assert len(pyro.get_param_store()) == 0
    torch.testing.assert_close(read_parameter(thing, "scale"), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(thing(), torch.tensor([2.0, 3.0]))
    assert pyro.get_param_store()["thing.scale"].unconstrained() is tensor


def test_assignment_after_the_first_call_keeps_the_stored_tensor() -> None:
    thing = Thing()
    thing()
    tensor = pyro.get_param_store()["thing.scale"].unconstrained()
    storage, old = tensor.data_ptr(), read_parameter(thing, "loc")
    assign_parameters(thing, {"loc": torch.ones(2), "scale": torch.tensor([2.0, 3.0])})
    assert pyro.get_param_store()["thing.scale"].unconstrained() is tensor
    assert tensor.data_ptr() == storage
    assert (old == 0).all()
    torch.testing.assert_close(thing(), torch.tensor([3.0, 4.0]))


def test_assignment_reaches_a_tensor_that_was_replaced_in_the_store() -> None:
    thing = Thing()
    thing()
    store = pyro.get_param_store()
    store["thing.scale"] = torch.tensor([5.0, 5.0])
    torch.testing.assert_close(read_parameter(thing, "scale"), torch.tensor([5.0, 5.0]))
    store["thing.scale"] = torch.tensor([6.0, 6.0])
    with pyro.poutine.trace() as tracer:
        assign_parameter(thing, "scale", torch.tensor([2.0, 3.0]))
    assert not tracer.trace.nodes
    torch.testing.assert_close(thing(), torch.tensor([2.0, 3.0]))


def test_assignment_of_a_submodule() -> None:
    parent = PyroModule("parent")
    parent.child = Thing()
    pyro.nn.module.pyro_method(lambda self: self.child())(parent)
    assert "parent.child.scale" in pyro.get_param_store()
    assign_parameter(parent.child, "scale", torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(pyro.get_param_store()["parent.child.scale"].detach(), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loc": torch.ones(2), "width": torch.ones(2)}, "Expected a PyroParam of Thing, but got 'width'. Take one of"),
        ({"loc": torch.ones(2), "scale": torch.ones(3)}, "Expected scale of shape (2,), but got (3,). Pass one value"),
        ({"loc": torch.ones(2), "scale": -torch.ones(2)}, "Expected scale to be finite and inside its constraint"),
        ({"loc": torch.ones(2), "scale": torch.zeros(2)}, "Expected scale to be finite and inside its constraint"),
        ({"scale": torch.ones(2) * 2, "loc": torch.tensor([0, torch.nan])}, "Expected loc to be finite and inside"),
    ],
)
def test_refused_assignments_write_nothing(values: dict[str, torch.Tensor], message: str) -> None:
    thing = Thing()
    with pytest.raises(ValueError, match=re.escape(message)):
        assign_parameters(thing, values)
    torch.testing.assert_close(thing(), torch.ones(2))


def draw_latents(model: Model, v: torch.Tensor, num_draws: int) -> dict[str, torch.Tensor]:
    traces = [pyro.poutine.trace(model).get_trace(v) for _ in range(num_draws)]
    names = [name for name in traces[0].stochastic_nodes if name != "data"]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


@every_model
@pytest.mark.usefixtures("float64")
def test_leading_dimensions_of_latents_equal_a_loop(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model)
    latents = draw_latents(model, v, 5)
    joint = program_log_joint(model, latents, v)
    assert joint.shape == (5, 20)
    for s in range(5):
        for n in range(20):
            one = {name: value[s : s + 1, n : n + 1] for name, value in latents.items()}
            torch.testing.assert_close(
                program_log_joint(model, one, v[n : n + 1])[0, 0], joint[s, n], rtol=1e-12, atol=0
            )


@every_model
@pytest.mark.usefixtures("float64")
def test_states_broadcast_over_rows(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model)
    states = {name: value[:, :1] for name, value in draw_latents(model, v, 5).items()}
    expanded = {name: value.expand(-1, 20, -1) for name, value in states.items()}
    torch.testing.assert_close(
        program_log_joint(model, states, v), program_log_joint(model, expanded, v), rtol=1e-12, atol=0
    )


@every_model
@pytest.mark.usefixtures("float64")
def test_the_joint_is_differentiable_at_relaxed_latents(build: Callable[[], Model]) -> None:
    model = build()
    v = data_for(model, 3)
    latents = draw_latents(model, v, 2)
    names = list(latents)
    relaxed = [(latents[name] + torch.rand_like(latents[name])).requires_grad_() for name in names]
    with pyro.validation_enabled(False):
        assert torch.autograd.gradcheck(
            lambda *values: program_log_joint(model, dict(zip(names, values, strict=True)), v), relaxed
        )
