"""`save` and `load`: into the same driver, into one that was never run, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_ext import EM, ClosedForm, FixedPoint, Gradient, naming
from pyro_ext.checkpoint import load, save
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.guides import Amortized, MeanField
from pyro_ext.history import History, LedgerEntry, Status
from pyro_ext.models import BinarySparseCoding, GaussianMixture, SigmoidBeliefNetwork
from pyro_ext.ownership import parameter_names
from pyro_ext.plain_data import from_plain, to_plain

V = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(12.0).remainder(2)[:, None]


class Model(PyroModule):
    def __init__(self, width: int = 2, constraint: Any = constraints.positive, name: str = "model") -> None:
        super().__init__(name)
        self.linear = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scale = PyroParam(torch.ones(3), constraint=constraint)
        self.shift = nn.Parameter(torch.zeros(3))
        self.width = width

    def forward(self, v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(self.norm(self.linear(h)) + self.shift, self.scale).to_event(1), obs=v)


def guide(v: Tensor) -> None:
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(3, 2))
    spread = pyro.param("spread", torch.full((2,), 0.5), constraint=constraints.interval(0.1, 2.0))
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Normal(v @ weight, spread).to_event(1))


def simplex_model(v: Tensor) -> None:
    probs = pyro.param("probs", torch.ones(2) / 2, constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 3))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample("v", dist.Normal(loc[h], 1.0).to_event(1), obs=v)


def nothing(v: Tensor) -> None:
    pass


def new_process(seed: int) -> None:
    pyro.clear_param_store()
    naming._holders.clear()
    pyro.set_rng_seed(seed)


def decoder(optim: Any = None) -> SVI:
    return SVI(Model(), guide, optim or pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())


def automatic() -> SVI:
    model = Model()
    return SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())


def enumerated() -> SVI:
    from pyro.infer import TraceEnum_ELBO

    return SVI(simplex_model, nothing, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))


def mixture() -> EM:
    model = GaussianMixture(num_components=2, num_visible=3, name="mixture")
    return EM(model, MeanField(model, name="q"), e_step=FixedPoint(), m_step=ClosedForm())


def trained_table() -> EM:
    model = BinarySparseCoding(num_visible=3, num_latents=2, name="sparse")
    optims = pyro.optim.Adam({"lr": 0.1}), pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
    return EM(model, MeanField(model, name="q"), e_step=Gradient(optims[0]), m_step=Gradient(optims[1]))


def encoded() -> EM:
    model = BinarySparseCoding(num_visible=3, num_latents=2, name="sparse")
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optims = pyro.optim.Adam({"lr": 0.1}), pyro.optim.Adam({"lr": 0.01})
    guide = Amortized(model, encoder, name="q")
    return EM(model, guide, e_step=Gradient(optims[0]), m_step=Gradient(optims[1]))


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def parameters() -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pyro.get_param_store().named_parameters()}


DRIVERS = [decoder, automatic, enumerated, mixture, trained_table, encoded]


@pytest.mark.parametrize("setting", ["same", "fresh", "fresh with a batch", "fresh and run"])
@pytest.mark.parametrize("make", DRIVERS)
def test_training_goes_on_as_if_it_had_never_stopped(make: Callable[[], Any], setting: str, tmp_path: Path) -> None:
    new_process(0)
    driver = make()
    for _ in range(3):
        driver.step(V)
    path = tmp_path / "c"
    save(path, driver, History(loss=[1.0, 2.0]))
    goes_on = [driver.step(V) for _ in range(3)]
    end = parameters()
    modules = [m.state_dict() for m in (driver.model, driver.guide) if isinstance(m, nn.Module)]
    if setting != "same":
        new_process(1)
        driver = make()
    if setting == "fresh and run":
        driver.step(V)
        driver.step(V)
    if setting == "fresh" and make is encoded:
        with pytest.raises(CheckpointError, match=r"'encoders\..*' of Amortized .* Pass `batch=`"):
            load(path, driver)
        return
    history = load(path, driver, batch=V if setting == "fresh with a batch" else None)
    assert history is not None
    assert history.loss == [1.0, 2.0]
    if setting == "fresh" and make is automatic:
        # Its set-up draws random numbers; without a batch that comes after the generators were put back.
        state = torch.get_rng_state()
        driver.guide(V)
        torch.set_rng_state(state)
    assert [driver.step(V) for _ in range(3)] == goes_on
    # A table that is not in the store yet waits there for the set-up.
    assert_equal({name: value for name, value in parameters().items() if name in end}, end)
    ours = [m for m in (driver.model, driver.guide) if isinstance(m, nn.Module)]
    for module, state in zip(ours, modules, strict=True):
        # The set-up of an autoguide runs the model, whose running means it moves.
        is_moved = setting == "fresh" and make is automatic
        kept = {k: v for k, v in module.state_dict().items() if not (is_moved and "norm" in k)}
        assert_equal(kept, {name: state[name] for name in kept})


def test_loading_writes_in_place(tmp_path: Path) -> None:
    svi = decoder()
    svi.step(V)
    tensors = dict(pyro.get_param_store().named_parameters())
    buffers = dict(svi.model.named_buffers())
    save(tmp_path / "c", svi)
    svi.step(V)
    load(tmp_path / "c", svi)
    assert all(pyro.get_param_store()._params[name] is tensor for name, tensor in tensors.items())
    assert all(dict(svi.model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert set(svi.optim.optim_objs) == set(tensors.values())
    made = svi.optim.optim_objs[tensors["weight"]]
    moments = made.state[tensors["weight"]]["exp_avg"]
    svi.step(V)
    moved = moments.clone()
    load(tmp_path / "c", svi)
    assert made.state[tensors["weight"]]["exp_avg"] is moments
    assert not torch.equal(moments, moved)


OPTIMS: dict[str, Callable[[], Any]] = {
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5}),
    "DCTAdam": lambda: pyro.optim.DCTAdam({"lr": 0.05, "subsample_aware": True}),
    "amsgrad": lambda: pyro.optim.AdamW({"lr": 0.05, "amsgrad": True}),
    "clipped": lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}, {"clip_norm": 1.0}),
    "per parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "scale" in name else 0.01}),
    "LambdaLR": lambda: pyro.optim.LambdaLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "lr_lambda": lambda t: 1 / (1 + t)}
    ),
    "MultiStepLR": lambda: pyro.optim.MultiStepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "milestones": [2, 4], "gamma": 0.1}
    ),
    "OneCycleLR": lambda: pyro.optim.OneCycleLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "max_lr": 0.3, "total_steps": 9}
    ),
    "CosineAnnealingWarmRestarts": lambda: pyro.optim.CosineAnnealingWarmRestarts(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "T_0": 2}
    ),
}


@pytest.mark.parametrize("name", OPTIMS)
def test_optimizers_and_schedules_go_on(name: str, tmp_path: Path) -> None:
    def steps(svi: SVI) -> list[float]:
        losses = []
        for _ in range(3):
            losses.append(svi.step(V))
            if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
                svi.optim.step()
        return losses

    new_process(0)
    svi = decoder(OPTIMS[name]())
    steps(svi)
    save(tmp_path / "c", svi)
    goes_on, end = steps(svi), parameters()
    for seed in range(2):
        new_process(seed)
        svi = decoder(OPTIMS[name]())
        load(tmp_path / "c", svi)
        assert steps(svi) == goes_on
        assert_equal(parameters(), end)


def test_gradients_of_none_and_zero_are_told_apart(tmp_path: Path) -> None:
    """Momentum moves a parameter whose gradient is zero, and leaves one whose gradient is None."""

    def sometimes(v: Tensor) -> None:
        loc, other = pyro.param("loc", torch.zeros(3)), pyro.param("other", torch.zeros(3))
        loc = loc + other if len(v) > 5 else loc
        pyro.sample("v", dist.Normal(loc, 1.0).expand(v.shape).to_event(2), obs=v)

    def make() -> SVI:
        return SVI(sometimes, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    svi = make()
    svi.step(V)
    save(tmp_path / "c", svi)
    goes_on, end = svi.step(V[:4]), parameters()
    new_process(1)
    svi = make()
    load(tmp_path / "c", svi)
    assert svi.step(V[:4]) == goes_on
    assert_equal(parameters(), end)
    new_process(1)
    svi = make()
    svi.step(V[:4])
    save(tmp_path / "c", svi)
    goes_on, end = [svi.step(V[:4]), svi.step(V)], parameters()
    load(tmp_path / "c", svi)
    assert [svi.step(V[:4]), svi.step(V)] == goes_on
    assert_equal(parameters(), end)


def test_a_torch_optimizer_with_nested_state(tmp_path: Path) -> None:
    class Driver:
        def __init__(self) -> None:
            self.model = nn.Linear(3, 2)
            self.optim = torch.optim.LBFGS(self.model.parameters(), max_iter=2)

        def step(self, v: Tensor) -> Tensor:
            def closure() -> Tensor:
                self.optim.zero_grad()
                loss = (self.model(v) - 1).square().sum()
                loss.backward()
                return loss

            return self.optim.step(closure).detach()

    driver = Driver()
    driver.step(V)
    save(tmp_path / "c", driver)
    goes_on = [driver.step(V) for _ in range(3)]
    fresh = Driver()
    load(tmp_path / "c", fresh)
    assert [fresh.step(V) for _ in range(3)] == goes_on
    other = Driver()
    other.optim = torch.optim.LBFGS([other.model.weight], max_iter=2)
    with pytest.raises(CheckpointError, match=r"Expected an optimizer of groups of \[2\] parameters .*, but got \[1\]"):
        load(tmp_path / "c", other)


# ---------------------------------------------------------------- what is in the file


def test_other_parameters_of_the_store_are_left_out_and_alone(tmp_path: Path) -> None:
    bystander = pyro.param("bystander", torch.ones(2))
    svi = decoder()
    svi.step(V)
    names = parameter_names(svi)
    assert "bystander" not in names
    assert {"weight", "spread", "model.scale", "model.linear$$$weight"} <= set(names)
    save(tmp_path / "c", svi)
    with torch.no_grad():
        bystander.fill_(7.0)
    load(tmp_path / "c", svi)
    assert bystander.tolist() == [7.0, 7.0]


def test_a_model_of_plain_layers_gets_its_layers_back(tmp_path: Path) -> None:
    """`pyro.module` ignores what the store holds when a layer is registered; the layer itself must have the values."""

    def make() -> SVI:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, v: Tensor) -> None:
                pyro.module("layer", self.layer)
                with pyro.plate("data", len(v)):
                    pyro.sample("v", dist.Normal(self.layer(torch.ones(3)), 1.0).to_event(1), obs=v)

        return SVI(Plain(), nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    svi = make()
    svi.step(V)
    save(tmp_path / "c", svi)
    goes_on = [svi.step(V) for _ in range(3)]
    new_process(1)
    svi = make()
    load(tmp_path / "c", svi)
    assert pyro.get_param_store()._params["layer$$$weight"] is svi.model.layer.weight
    assert [svi.step(V) for _ in range(3)] == goes_on


def test_layers_of_a_guide_that_was_never_set_up_need_a_batch(tmp_path: Path) -> None:
    """Layers do not look into the store: what waited there for them would be ignored."""

    def make() -> EM:
        model = BinarySparseCoding(num_visible=3, num_latents=2, name="sparse")
        optims = pyro.optim.Adam({"lr": 0.1}), pyro.optim.Adam({"lr": 0.01})
        guide = Amortized(model, nn.Linear(3, 2), name="q")
        return EM(model, guide, e_step=Gradient(optims[0]), m_step=Gradient(optims[1]))

    em = make()
    em.step(V)
    save(tmp_path / "c", em)
    loss = em.evaluate_loss(V)
    new_process(1)
    em = make()
    refused(
        tmp_path / "c", em, r"Expected 'encoders\..*' of Amortized as in .*, but got a guide that was not set up\. Pass"
    )
    load(tmp_path / "c", em, batch=V)
    assert em.evaluate_loss(V) == loss


def test_generators_of_all_kinds(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(list(range(8)), shuffle=True, generator=own)
    em = mixture()

    def draws() -> list[Any]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random(), [int(i) for i in loader]]  # noqa: NPY002

    random.gauss(0, 1)  # a second draw waits in the generator
    save(tmp_path / "c", em, loader=loader)
    first = [random.gauss(0, 1), *draws()]
    assert [random.gauss(0, 1), *draws()] != first
    load(tmp_path / "c", em, loader=loader)
    assert [random.gauss(0, 1), *draws()] == first
    with pytest.raises(CheckpointError, match="Expected loaders with 1 generators of their own .*, but got 0"):
        load(tmp_path / "c", em, loader=DataLoader(list(range(8))))


def test_a_loader_with_a_state_of_its_own(tmp_path: Path) -> None:
    class Loader(list[Any]):
        place = 3

        def state_dict(self) -> dict[str, int]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.place = state["place"]

    loader, em = Loader(), mixture()
    save(tmp_path / "c", em, loader=loader)
    loader.place = 0
    load(tmp_path / "c", em, loader=loader)
    assert loader.place == 3


def test_a_table_knows_its_data_in_another_process(tmp_path: Path) -> None:
    em = mixture()
    em.run(V, max_steps=3, progress=False)
    save(tmp_path / "c", em)
    table = em.guide.table(em.guide.blocks[0]).detach().clone()
    loss = em.evaluate_loss(V)
    for batch in (None, V):
        new_process(1)
        em = mixture()
        load(tmp_path / "c", em, batch=None if batch is None else batch.clone())
        assert em.evaluate_loss(V.clone()) == loss
        assert em.guide.holds_answer
        assert torch.equal(em.guide.table(em.guide.blocks[0]), table)
        with pytest.raises(ValueError, match="Expected the data that the table of 'q' was set up with"):
            em.guide(V + 1)
    new_process(1)
    em = mixture()
    with pytest.raises(ValueError, match="Expected the data that the table of 'q' was saved with, but got other data"):
        load(tmp_path / "c", em, batch=V.flip(0))
    load(tmp_path / "c", em)
    with pytest.raises(ValueError, match="Expected the data that the table of 'q' was saved with"):
        em.guide.setup(V + 1)
    em.guide.setup(V)
    assert torch.equal(em.guide.table(em.guide.blocks[0]), table)
    new_process(1)
    em = mixture()
    em.step(2 * V)
    load(tmp_path / "c", em)
    assert em.guide.owns((V,), {})
    assert not em.guide.owns((2 * V,), {})


def test_tests_of_the_program_are_not_repeated(tmp_path: Path) -> None:
    """A program that was no quadratic once is not tried again: other evaluators round otherwise."""

    def make() -> EM:
        model = SigmoidBeliefNetwork([2, 3], name="network")
        guide = MeanField(model, name="q")
        return EM(model, guide, e_step=FixedPoint(), m_step=Gradient(pyro.optim.Adam({"lr": 0.1})))

    em = make()
    bits = (V > 0).float()
    em.step(bits)
    save(tmp_path / "c", em)
    state = em.checkpoint_state()
    assert state == {"quadratic": False, "may_be_unbounded": False}
    new_process(1)
    em = make()
    assert em.checkpoint_state() == {"quadratic": True, "may_be_unbounded": True}
    load(tmp_path / "c", em, batch=bits)
    assert em.checkpoint_state() == state


def test_a_loaded_table_of_another_width_is_refused_at_the_set_up(tmp_path: Path) -> None:
    def driver(num: int, fn: Any) -> EM:
        return EM(fn, MeanField(fn, name="q"), e_step=FixedPoint(), m_step=None)

    def rows(v: Tensor, width: int = 2) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((width,), 0.5)).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    em = driver(2, rows)
    em.step(V)
    save(tmp_path / "c", em)
    new_process(1)

    def wider(v: Tensor) -> None:
        rows(v, 3)

    em = driver(3, wider)
    load(tmp_path / "c", em)
    with pytest.raises(ValueError, match=r"Expected q\.tables\.h of shape .* for these data, but got .* from the file"):
        em.step(V)


def test_an_untouched_model_stays_untouched(tmp_path: Path) -> None:
    """`EM.run` draws the start of a model that nobody has touched, saved or not."""
    em = mixture()
    save(tmp_path / "c", em)
    whole = em.run(V, max_steps=4, seed=3, progress=False).loss
    new_process(5)
    em = mixture()
    load(tmp_path / "c", em)
    assert em.model.is_untouched
    assert em.run(V, max_steps=4, seed=3, progress=False).loss == whole


def test_histories_are_kept_whole() -> None:
    entry = LedgerEntry(1, "E", -3.5, "theta 0, q 1", "cold", "full", exact=True, rows=4)
    history = History(
        loss=[float(i) for i in range(40)] + [float("nan"), float("inf")],
        held_out=[1.0],
        epoch_ends=list(range(20)),
        ledger=[entry] * 30,
        status=Status.CONVERGED,
        message="one\ntwo",
        restarts=[0.5],
    )
    found = from_plain(to_plain(history, "the history"))
    assert repr(vars(found)) == repr(vars(history))
    assert type(found.status) is Status
    assert type(found.ledger[3].exact) is bool
    assert type(found.epoch_ends[3]) is int
    plain = to_plain(history, "the history")
    plain["fields"]["invented"] = 1
    with pytest.raises(ValueError, match=r"Expected known fields of History, but got \['invented'\]\. Update pyro-ext"):
        from_plain(plain)
    with pytest.raises(ValueError, match="Expected a record of pyro_ext.history, but got 'Thing'"):
        from_plain({"__record__": "Thing", "fields": {}})


# ---------------------------------------------------------------- refusals


def refused(path: Path, driver: Any, match: str, **settings: Any) -> None:
    before, tensors = parameters(), dict(pyro.get_param_store().named_parameters())
    modules = [m for m in (driver.model, driver.guide) if isinstance(m, nn.Module)]
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    generator = torch.get_rng_state()
    optims = len(driver.optim.optim_objs) if isinstance(driver, SVI) else 0
    with pytest.raises(CheckpointError, match=match):
        load(path, driver, **settings)
    assert_equal(parameters(), before)
    assert all(pyro.get_param_store()._params[name] is tensor for name, tensor in tensors.items())
    for module, state in zip(modules, states, strict=True):
        assert_equal(module.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not isinstance(driver, SVI) or len(driver.optim.optim_objs) == optims


def narrow_guide(v: Tensor) -> None:
    pyro.param("weight", torch.zeros(3, 2))
    with pyro.plate("data", len(v)):
        pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def other_constraint(v: Tensor) -> None:
    pyro.param("spread", torch.full((2,), 0.5), constraint=constraints.interval(0.1, 3.0))
    guide(v)


class Wide(Model):
    """Reads more than the others, and is run in double precision or not at all."""


def svi_of(model: Any, optim: Any = None) -> SVI:
    return SVI(model, guide, optim or pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: svi_of(Model(4)),
            r"'model.linear\$\$\$weight' of shape \(3, 2\) as in '.*', but got \(3, 4\)",
        ),
        (
            lambda: svi_of(Model(constraint=constraints.softplus_positive)),
            r"'model.scale' under the constraint GreaterThan\(lower_bound=0\.0\) as in '.*', but got SoftplusPositive",
        ),
        (lambda: svi_of(Model(), pyro.optim.SGD({"lr": 0.1})), "Expected the optimizer Adam as in '.*', but got SGD"),
        (
            lambda: svi_of(Model().double()),
            r"of dtype torch\.float32 as in '.*', but got torch\.float64\. .*set_default_dtype\(torch\.float32\)",
        ),
        (lambda: svi_of(Wide()), "Expected the modules Model as in '.*', but got Wide"),
        (lambda: svi_of(guide), "Expected the modules Model as in '.*', but got none"),
    ],
    ids=["shape", "constraint", "optimizer", "dtype", "class", "no module"],
)
@pytest.mark.parametrize("has_run", [False, True])
def test_what_does_not_fit_is_refused_by_name(
    make: Callable[[], SVI], match: str, has_run: bool, tmp_path: Path
) -> None:
    path = tmp_path / "some.checkpoint"
    svi = decoder()
    svi.step(V)
    save(path, svi)
    new_process(1)
    svi = make()
    if has_run and isinstance(svi.model, Model):
        with svi.model._pyro_context:  # as in a call: registers what it reads
            assert svi.model.linear.weight.shape[0] == len(svi.model.scale) == len(svi.model.shift)
        assert list(pyro.get_param_store())
    refused(path, svi, match)


def test_missing_and_additional_parameters_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "some.checkpoint"
    svi = decoder()
    svi.step(V)
    save(path, svi)
    new_process(1)
    less = SVI(Model(), narrow_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    less.step(V)
    refused(path, less, "Expected a parameter 'spread' as in '.*some.checkpoint', but got none among '")
    save(path, less)
    new_process(1)
    svi = decoder()
    svi.step(V)
    refused(path, svi, "Expected only the parameters .* as in '.*some.checkpoint', but got 'spread' too")
    new_process(1)
    svi = SVI(Model(), other_constraint, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(V)
    save(path, svi)
    new_process(1)
    svi = decoder()
    svi.step(V)
    match = r"'spread' under the constraint Interval\(lower_bound=0\.1, upper_bound=3\.0\) .* upper_bound=2\.0"
    refused(path, svi, match)


def test_other_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    em = mixture()
    em.step(V)
    save(path, em)
    model = GaussianMixture(num_components=2, num_visible=3, name="another")
    em = EM(model, MeanField(model, name="p"), e_step=FixedPoint(), m_step=ClosedForm())
    em.step(V)
    refused(path, em, r"Expected only the parameters 'mixture\..*give them the same names \(`name=`\)")


def test_a_constraint_of_ones_own(tmp_path: Path) -> None:
    """Nobody but the program can make it; a file names it."""

    class Even(constraints.real.__class__):  # type: ignore[misc, name-defined]
        pass

    own = Even()

    def model(v: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3), constraint=own)
        pyro.sample("v", dist.Normal(loc, 1.0).expand(v.shape).to_event(2), obs=v)

    torch.distributions.transform_to.register(Even)(lambda _: torch.distributions.transforms.identity_transform)
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(V)
    save(tmp_path / "c", svi)
    loc = pyro.param("loc").detach().clone()
    new_process(1)
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    refused(tmp_path / "c", svi, r"Expected a constraint of torch or Pyro on 'loc', .* Pass `batch=`")
    load(tmp_path / "c", svi, batch=V)
    assert torch.equal(pyro.param("loc"), loc)


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.positive,
        constraints.simplex,
        constraints.lower_cholesky,
        constraints.corr_cholesky,
        constraints.unit_interval,
        constraints.real_vector,
        constraints.ordered_vector,
        constraints.softplus_lower_cholesky,
        constraints.independent(constraints.interval(-1.0, 1.0), 1),
        constraints.greater_than(torch.tensor([0.0, 1.0, 2.0])),
    ],
    ids=str,
)
def test_constraints_of_parameters_that_do_not_exist_yet(constraint: Any, tmp_path: Path) -> None:
    value = torch.distributions.transform_to(constraint)(torch.linspace(0.1, 0.9, 9).reshape(3, 3))

    def model(v: Tensor) -> None:
        pyro.param("p", value, constraint=constraint)
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("v", dist.Normal(loc, 1.0).expand(v.shape).to_event(2), obs=v)

    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(V)
    save(tmp_path / "c", svi)
    before = parameters()
    new_process(1)
    svi = SVI(model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    load(tmp_path / "c", svi)
    assert_equal(parameters(), before)
    torch.testing.assert_close(pyro.param("p"), value)
    assert type(pyro.get_param_store()._constraints["p"]) is type(constraint)
    svi.step(V)
    load(tmp_path / "c", svi)


def test_functions_that_never_ran_cannot_be_saved(tmp_path: Path) -> None:
    pyro.param("bystander", torch.ones(2))
    svi = SVI(simplex_model, nothing, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="Expected a driver whose parameters are known, but got the plain functions"):
        save(tmp_path / "c", svi)
    assert not (tmp_path / "c").exists()


def test_state_that_is_no_data_is_refused(tmp_path: Path) -> None:
    svi = decoder()
    svi.step(V)
    made = next(iter(svi.optim.optim_objs.values()))
    made.param_groups[0]["hook"] = lambda: None
    with pytest.raises(TypeError, match="Expected plain data in the optimizer of '.*', but got function"):
        save(tmp_path / "c", svi)
    assert not (tmp_path / "c").exists()


def test_arguments_are_checked(tmp_path: Path) -> None:
    em = mixture()
    with pytest.raises(TypeError, match=r"Expected a History or None, but got list\. Pass what `fit` returned"):
        save(tmp_path / "c", em, [1.0])
    with pytest.raises(ValueError, match="Expected a path in a folder that exists"):
        save(tmp_path / "none" / "c", em)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "c", em)
    (tmp_path / "c").write_bytes(b"x" * 300)
    refused(tmp_path / "c", em, "a file of another kind")


def test_an_epoch_under_way_cannot_be_saved(tmp_path: Path) -> None:
    em = mixture()
    with em.epoch():
        em.step(V)
        with pytest.raises(ValueError, match="Expected no epoch under way"):
            save(tmp_path / "c", em)


def test_an_error_while_writing_back_undoes_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    em = mixture()
    em.step(V)
    save(tmp_path / "c", em)
    em.step(V)

    def fail(state: Any) -> None:
        raise CheckpointError("no more")

    monkeypatch.setattr(em, "load_checkpoint_state", fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(em), "checkpoint_state", lambda self: None)
        refused(tmp_path / "c", em, "no more")


def test_parameters_move_to_the_device_of_the_model(tmp_path: Path) -> None:
    """There is one device here: what a file says of others is asked for and refused, or left aside on demand."""
    from pyro_ext import checkpoint_file

    svi = enumerated()
    svi.step(V)
    save(tmp_path / "c", svi)
    content = checkpoint_file.read(tmp_path / "c")
    for entry in content["state"]["parameters"].values():
        entry["device"] = "cuda:31"
    checkpoint_file.write(tmp_path / "c", content)
    before = parameters()
    new_process(1)
    refused(tmp_path / "c", enumerated(), r"Expected the device cuda:31 for '.*map_location=\"cpu\"")
    load(tmp_path / "c", enumerated(), map_location="cpu")
    assert_equal(parameters(), before)
    content["random"]["cuda"] = [torch.get_rng_state()] * 31
    checkpoint_file.write(tmp_path / "c", content)
    refused(tmp_path / "c", enumerated(), "Expected 31 CUDA devices")
    load(tmp_path / "c", enumerated(), map_location="cpu")
