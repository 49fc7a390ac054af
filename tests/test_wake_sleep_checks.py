"""What is checked when: structure once a structure, values once a signature, visible values always."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext import particles as particles_module
from pyro_ext.proposals import Defensive
from pyro_ext.wake_sleep import WakeSleep
from pyro_ext.weights import Uniform

pytestmark = pytest.mark.usefixtures("float64")


class Programs:
    def __init__(self):
        self.runs = {"model": 0, "guide": 0}

    def model(self, v):
        self.runs["model"] += 1
        w = pyro.param("w", torch.tensor([1.0, -0.5]))
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Bernoulli(logits=w[h.long()]), obs=v)

    def guide(self, v):
        self.runs["guide"] += 1
        r = pyro.param("r", torch.tensor(0.2))
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Bernoulli(logits=r * v))


V = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("elbo", "model_runs", "guide_runs"),
    [
        (WakeSleep(5, insomnia=1.0), 1, 1),
        (WakeSleep(5, insomnia=0.5), 2, 2),
        (WakeSleep(5, Uniform()), 2, 2),
        (WakeSleep(5, insomnia=0.5, num_dreams=9), 4, 4),
        (WakeSleep(5, insomnia=1.0, vectorize_particles=False), 5, 5),
        (WakeSleep(5, insomnia=1.0, proposal=Defensive()), 2, 2),
    ],
)
def test_a_step_runs_each_program_as_often_as_it_must(elbo, model_runs, guide_runs):
    programs = Programs()
    elbo.loss_and_grads(programs.model, programs.guide, V)
    programs.runs = {"model": 0, "guide": 0}
    elbo.loss_and_grads(programs.model, programs.guide, V)
    assert programs.runs == {"model": model_runs, "guide": guide_runs}


def test_structure_is_checked_once(monkeypatch):
    calls = []
    check = particles_module.check_match
    monkeypatch.setattr(particles_module, "check_match", lambda *traces: (calls.append(1), check(*traces)))
    programs, elbo = Programs(), WakeSleep(3, insomnia=0.5, max_plate_nesting=1)
    for _ in range(4):
        elbo.loss_and_grads(programs.model, programs.guide, V)
    assert len(calls) == 1
    elbo.loss_and_grads(programs.model, programs.guide, V[:2])
    assert len(calls) == 2
    other = Programs()
    elbo.loss_and_grads(other.model, other.guide, V)
    assert len(calls) == 3


def test_a_site_that_appears_later_is_refused_as_at_the_first_call():
    branch = [False]

    def model(v):
        pyro.param("w", torch.tensor(1.0))
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            if branch[0]:
                h = h + pyro.sample("more", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", 4):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    elbo = WakeSleep(3, insomnia=1.0)
    elbo.loss_and_grads(model, guide, V)
    branch[0] = True
    with pytest.raises(ValueError, match=r"draws every latent site of the model, but got one without \['more'\]"):
        elbo.loss_and_grads(model, guide, V)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("family", r"a Delta on the continuous sites \['h'\]"),
        ("observed", r"latent sites of the model only, but got \['h'\]"),
    ],
)
def test_sites_that_change_their_kind_are_checked_anew(change, match):
    changed = []

    def model(v):
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Normal(0.0, 1.0), obs=v if changed == ["observed"] else None)
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        a = pyro.param("a", torch.tensor(0.0))
        with pyro.plate("data", 4):
            pyro.sample("h", dist.Delta(a * v) if changed == ["family"] else dist.Normal(a * v, 1.0))

    elbo = WakeSleep(3, insomnia=1.0)
    elbo.loss_and_grads(model, guide, V)
    changed.append(change)
    with pytest.raises(ValueError, match=match):
        elbo.loss_and_grads(model, guide, V)


def test_a_loss_of_nan_without_an_error_is_validated():
    def model(v):
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", 4):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)) * v, 1.0))

    elbo = WakeSleep(3, insomnia=1.0)
    elbo.loss_and_grads(model, guide, V)
    pyro.get_param_store()._params["a"].data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"(?s)parameter loc.*nan"):
        elbo.loss_and_grads(model, guide, V)


def test_rows_of_equal_batches_of_unequal_data_sets_differ_in_scale():
    full = [8]

    def model(v):
        with pyro.plate("data", full[0], subsample=torch.arange(4)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("data", full[0], subsample=torch.arange(4)):
            pyro.sample("h", dist.Bernoulli(0.5))

    elbo = WakeSleep(3, insomnia=1.0, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    first = elbo.loss(model, guide, V)
    full[0] = 40
    pyro.set_rng_seed(1)
    assert elbo.loss(model, guide, V) == pytest.approx(5 * first, rel=1e-12)


def test_settings_that_change_between_calls_are_checked_anew():
    def model(v):
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        pyro.factor("penalty", torch.tensor(-1.0))

    def guide(v):
        with pyro.plate("data", 4):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)) * v, 1.0))

    elbo = WakeSleep(3, insomnia=1.0)
    elbo.loss_and_grads(model, guide, V)
    elbo.insomnia = 0.5
    with pytest.raises(ValueError, match=r"got the pyro.factor sites \['penalty'\]"):
        elbo.loss_and_grads(model, guide, V)


# ------------------------------------------------------------------------------------- values


def test_visible_values_outside_their_support_are_refused_at_any_call():
    programs, elbo = Programs(), WakeSleep(3, insomnia=1.0)
    svi = SVI(programs.model, programs.guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    svi.step(V)
    svi.step(V)
    before = {name: p.clone() for name, p in pyro.get_param_store()._params.items()}
    with pytest.raises(ValueError, match=r"(?s)log_prob at site 'v'.*within the support \(Boolean"):
        svi.step(torch.tensor([0.0, 1.0, 0.5, 0.0]))
    for name, value in pyro.get_param_store()._params.items():
        assert torch.equal(value, before[name])
    with pyro.validation_enabled(False):
        assert math.isfinite(svi.step(torch.tensor([0.0, 1.0, 0.5, 0.0])))


def test_a_program_that_fails_on_some_draws_fails():
    """Repeating a call with other draws until it passes would choose among draws."""

    def model(v):
        h = pyro.sample("h", dist.Bernoulli(0.5))
        if h > 0:
            raise ValueError("no such state")
        pyro.sample("v", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=v)

    def guide(v):
        pyro.sample("h", dist.Bernoulli(logits=pyro.param("r", torch.tensor(0.0))))

    elbo, v = WakeSleep(insomnia=0.0, max_plate_nesting=0), torch.tensor(0.3)
    failures = 0
    for seed in range(40):
        pyro.set_rng_seed(seed)
        expected = pyro.sample("h", dist.Bernoulli(0.5)) > 0
        pyro.set_rng_seed(seed)
        try:
            elbo.loss(model, guide, v)
            assert not expected
        except ValueError:
            assert expected
            failures += 1
    assert 5 < failures < 35


def test_values_that_a_mask_hides_are_left_alone():
    def model(v, mask):
        with pyro.plate("data", 4):
            h = pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("v", dist.Poisson(h.exp(), validate_args=False), obs=v)

    def guide(v, mask):
        with pyro.plate("data", 4):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    elbo, mask = WakeSleep(3, insomnia=1.0), torch.tensor([True, True, False, True])
    elbo.loss_and_grads(model, guide, V, mask)
    v = torch.tensor([0.0, 1.0, -7.5, 0.0])
    assert math.isfinite(elbo.loss_and_grads(model, guide, v, mask))


@pytest.mark.parametrize("method", ["loss", "loss_and_grads", "differentiable_loss"])
def test_a_loss_that_turns_nan_is_traced_to_its_site_before_any_gradient(method):
    programs, elbo = Programs(), WakeSleep(3, insomnia=1.0)
    elbo.loss_and_grads(programs.model, programs.guide, V)
    store = pyro.get_param_store()._params
    grads = {name: p.grad.clone() for name, p in store.items()}
    store["r"].data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"(?s)parameter logits.*nan"):
        getattr(elbo, method)(programs.model, programs.guide, V)
    for name, value in store.items():
        assert torch.equal(value.grad, grads[name])


def test_validation_is_as_it_was_after_a_step():
    programs, elbo = Programs(), WakeSleep(3, insomnia=1.0)
    seen = []

    def guide(v):
        seen.append((pyro.infer.util.is_validation_enabled(), poutine.util.is_validation_enabled()))
        programs.guide(v)

    for _ in range(3):
        elbo.loss_and_grads(programs.model, guide, V)
        assert pyro.infer.util.is_validation_enabled()
        assert pyro.distributions.torch_distribution.TorchDistribution._validate_args
    # The first call runs the guide twice: once to find the nesting of its plates.
    assert seen == [(True, True)] * 2 + [(False, False)] * 2
    with pytest.raises(ValueError, match="logits"):
        elbo.loss_and_grads(programs.model, lambda v: pyro.sample("h", dist.Bernoulli(logits=math.nan * v)), V)


def test_draws_are_the_same_with_and_without_validation():
    losses = []
    for validate in (True, False):
        pyro.clear_param_store()
        programs, elbo = Programs(), WakeSleep(3, insomnia=0.5)
        with pyro.validation_enabled(validate):
            elbo.loss(programs.model, programs.guide, V)
            pyro.set_rng_seed(1)
            losses.append([elbo.loss_and_grads(programs.model, programs.guide, V) for _ in range(3)])
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------- arguments, settings, graphs


def two_copies(x, y):
    with pyro.plate("data", 4):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=(x + y) / 2)


def reader(x, y):
    with pyro.plate("data", 4):
        pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)) * x, 1.0))


def test_a_visible_site_that_two_arguments_carry_is_refused():
    x = torch.randn(4)
    with pytest.raises(ValueError, match=r"one argument to carry the visible site 'v', but got 2: \['x', 'y'\]"):
        WakeSleep().loss_and_grads(two_copies, reader, x, x.clone())
    assert not list(pyro.get_param_store())
    elbo = WakeSleep(visible={"v": "x"})
    elbo.loss_and_grads(two_copies, reader, x, x.clone())
    assert elbo.last_sleep_loss.isfinite()


@pytest.mark.parametrize("insomnia", ["half", None, True])
def test_insomnia_that_is_no_number_is_refused(insomnia):
    with pytest.raises(TypeError, match=r"insomnia to be a number in \[0, 1\], but got"):
        WakeSleep(2, insomnia=insomnia)


def test_settings_per_parameter_by_a_callable():
    programs = Programs()
    optim = pyro.optim.SGD(lambda name: {"lr": 0.1 if name == "w" else 0.0})
    svi = SVI(programs.model, programs.guide, optim, loss=WakeSleep(5, insomnia=0.5))
    svi.evaluate_loss(V)
    w, r = pyro.param("w").clone(), pyro.param("r").clone()
    svi.step(V)
    assert not torch.equal(pyro.param("w"), w)
    assert torch.equal(pyro.param("r"), r)


@pytest.mark.parametrize(
    "elbo",
    [
        WakeSleep(),
        WakeSleep(3, insomnia=1.0),
        WakeSleep(3, Uniform(), num_dreams=6),
        WakeSleep(3, insomnia=0.5, vectorize_particles=False),
        WakeSleep(3, insomnia=0.5, proposal=Defensive()),
    ],
    ids=["one particle", "wake", "uniform", "loop", "defensive"],
)
def test_the_estimate_can_be_traced_into_a_graph(elbo):
    programs = Programs()
    elbo.estimate(programs.model, programs.guide, (V,), {})
    parameters = list(pyro.get_param_store()._params.values())

    def step(v):
        with pyro.validation_enabled(False):
            estimate = elbo.estimate(programs.model, programs.guide, (v,), {})
        return estimate.loss, *torch.autograd.grad(estimate.surrogate, parameters)

    graph = make_fx(step)(V)
    for v in (V, 1 - V):
        results = []
        for run in (graph, step):
            pyro.set_rng_seed(2)
            results.append(run(v))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_copy_holds_no_programs():
    programs, elbo = Programs(), WakeSleep(3, insomnia=0.5)
    elbo.loss_and_grads(programs.model, programs.guide, V)
    again = pickle.loads(pickle.dumps(elbo))
    assert again._structures is None
    losses = []
    for objective in (elbo, again, copy.deepcopy(elbo)):
        pyro.set_rng_seed(4)
        losses.append(objective.loss_and_grads(programs.model, programs.guide, V))
    assert losses[0] == losses[1] == losses[2]


def test_an_estimate_notes_nothing():
    programs, elbo = Programs(), WakeSleep(3, insomnia=0.5)
    estimate = elbo.estimate(programs.model, programs.guide, (V,), {})
    assert elbo.last_sleep_loss is None
    assert all(p.grad is None for p in pyro.get_param_store()._params.values())
    assert estimate.surrogate.requires_grad
    assert not any(
        part.requires_grad for part in (estimate.loss, estimate.sleep_loss, estimate.log_weights, estimate.log_guide)
    )
    assert estimate.log_weights.shape == estimate.log_guide.shape == (3, 4)
    assert WakeSleep(3, insomnia=1.0).estimate(programs.model, programs.guide, (V,), {}).sleep_loss is None
