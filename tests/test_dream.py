"""Sleep as an E-step: phi follows dreams as on paper, theta is bit-equal, and the refusals change nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import SGD, Adam
from torch import Tensor, nn

from pyro_ext import EM, FixedPoint, Gradient, fit
from pyro_ext.dream import Dream
from pyro_ext.dreams import HandOver, draw_dream, log_q_of_dreams
from pyro_ext.guides import Amortized, MeanField, PointEncoder
from pyro_ext.models import FactorAnalysis, HelmholtzMachine, SigmoidBeliefNetwork
from pyro_ext.rows import Rows
from tests.oracles.enumeration import binary_states, elbo, program_log_joint
from tests.oracles.wake_sleep import Network, expected_sleep

pytestmark = pytest.mark.usefixtures("float64")

N, D, H = 6, 4, 3
K = 5.0


class Recorded:
    """The oracle's network as a user's program, which notes what it drew."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, v: Tensor, index: Tensor | None = None) -> None:
        c, W, b = (pyro.param(n, getattr(self.network, n).clone()) for n in ("c", "W", "b"))
        with pyro.plate("data", len(v), subsample=index):
            rows = v if index is None else v[index]
            h = pyro.sample("h", dist.Bernoulli(logits=c).to_event(1))
            value = pyro.sample("v", dist.Bernoulli(logits=h @ W.T + b).to_event(1), obs=rows)
        self.calls.append((value, h))


def linear(network: Network) -> nn.Linear:
    """The recognition network of the oracle."""
    encoder = nn.Linear(D, H)
    with torch.no_grad():
        encoder.weight.copy_(network.R)
        encoder.bias.copy_(network.r)
    return encoder


def belief_network(network: Network) -> SigmoidBeliefNetwork:
    model = SigmoidBeliefNetwork([H, D])
    with torch.no_grad():
        for name, value in (("b1", network.c), ("W1", network.W), ("b0", network.b)):
            getattr(model, name).copy_(value)
    return model


def binary(n: int = N) -> Tensor:
    return torch.rand(n, D).round()


def everything() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


def changed(before: dict[str, Tensor]) -> set[str]:
    after = everything()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------- phi


@pytest.mark.parametrize(("num_dreams", "passes"), [(None, 1), (N, 1), (2 * N, 2)])
def test_a_step_is_the_gradient_on_paper_at_the_dreams(num_dreams: int | None, passes: int) -> None:
    network, lr = Network.random(D, H), 0.1
    model, encoder, v = Recorded(network), linear(network), binary()
    em = EM(model, Amortized(model, encoder=encoder), e_step=Dream(SGD({"lr": lr}), 1, num_dreams), m_step=None)
    call = em.call(v)
    em.guide(v)
    model.calls.clear()
    result = em.e_half(call)
    dreams = [pair for pair in model.calls if not torch.equal(pair[0], v)][:passes]
    dreamt_v, dreamt_h = (torch.cat(parts) for parts in zip(*dreams, strict=True))
    assert len(dreamt_v) == passes * N
    expected = network.phi_gradient(dreamt_v, dreamt_h.unsqueeze(0), torch.full((1, passes * N), 1 / passes))
    torch.testing.assert_close(encoder.weight.detach(), network.R + lr * expected["R"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(encoder.bias.detach(), network.r + lr * expected["r"], rtol=1e-10, atol=1e-12)
    assert em.e_step.last_loss == pytest.approx(-float(network.log_q(dreamt_v, dreamt_h).mean()), rel=1e-12)
    assert (result.start, result.monotone) == ("warm", False)


def test_of_a_partial_pass_a_random_part_counts() -> None:
    network, lr = Network.random(D, H), 0.1
    model, encoder, v = Recorded(network), linear(network), binary()
    em = EM(model, Amortized(model, encoder=encoder), e_step=Dream(SGD({"lr": lr}), 1, 2), m_step=None)
    call = em.call(v)
    em.guide(v)
    chosen = set()
    for _ in range(8):
        model.calls.clear()
        with torch.no_grad():
            encoder.weight.copy_(network.R)
            encoder.bias.copy_(network.r)
        em.e_half(call)
        ((dreamt_v, dreamt_h), *_) = [pair for pair in model.calls if not torch.equal(pair[0], v)]
        found = []
        for part in itertools.combinations(range(N), 2):
            index = list(part)
            grad = network.phi_gradient(dreamt_v[index], dreamt_h[None, index], torch.full((1, 2), N / 2))
            if torch.allclose(encoder.weight.detach(), network.R + lr * grad["R"], rtol=1e-9, atol=1e-10):
                found.append(part)
        assert found, "the step is that of no two dreams"
        chosen.add(found[0])
    assert len(chosen) > 1


@pytest.mark.parametrize("ours", [True, False], ids=["model of the project", "user's program"])
def test_the_expected_step_is_that_of_all_dreams(ours: bool) -> None:
    network = Network.random(D, H)
    leaves = [network.R.requires_grad_(), network.r.requires_grad_()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-N * expected_sleep(network), leaves)])
    network.R, network.r = (leaf.detach() for leaf in leaves)
    model: Any = belief_network(network) if ours else Recorded(network)
    encoder = linear(network)
    guide = Amortized(model, encoder=encoder)
    em = EM(model, guide, e_step=Dream(SGD({"lr": 1.0}), 1, 4), m_step=None)
    call, moves = em.call(binary()), []
    for _ in range(300):
        with torch.no_grad():
            encoder.weight.copy_(network.R)
            encoder.bias.copy_(network.r)
        em.e_step._stepper._step(lambda: em.e_step._sleep(call))
        moves.append(torch.cat([(encoder.weight - network.R).flatten(), encoder.bias - network.r]).detach())
    samples = torch.stack(moves)
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= K * error + 1e-9).all()


def test_a_model_of_the_project_dreams_all_rows_at_once() -> None:
    model = SigmoidBeliefNetwork([H, D])
    guide, v = Amortized(model), binary()
    em = EM(model, guide, e_step=Dream(SGD({"lr": 0.1}), 1, 50), m_step=None)
    sizes = []

    def spy(v: Tensor | None = None, *, size: int | None = None) -> Tensor:
        sizes.append(size)
        return SigmoidBeliefNetwork.forward(model, v, size=size)

    call = em.call(v)
    model.forward = spy  # type: ignore[method-assign]
    em.e_half(call)
    assert [size for size in sizes if size is not None] == [50]


@pytest.mark.parametrize("named", [True, False])
def test_dreams_of_any_number_reach_a_guide_of_the_project(named: bool) -> None:
    model = SigmoidBeliefNetwork([2, H, D])
    guide, v = Amortized(model), binary()
    guide(v)
    args, kwargs = ((), {"v": v}) if named else ((v,), {})
    rows = Rows.from_trace(poutine.trace(model).get_trace(v))
    for count in (1, N, 40):
        log_q = log_q_of_dreams(model, guide, args, kwargs, rows, HandOver(), count)
        assert log_q.shape == (count,)
        assert log_q.requires_grad
    assert log_q_of_dreams(model, guide, args, kwargs, rows, HandOver()).shape == (N,)


def test_a_mask_belongs_to_its_rows() -> None:
    """Other arguments than the data keep the dreams at the rows at hand."""
    model = FactorAnalysis(num_visible=D, num_factors=2)
    v, mask = torch.randn(N, D), torch.rand(N, D) < 0.8
    mask[:, 0] = True
    guide = Amortized(model)
    guide(v, mask=mask)
    found = HandOver().resizable(model, guide, (v,), {"mask": mask})
    assert found is None
    assert HandOver().resizable(model, guide, (v,), {}) == ("v", ("args", 0))
    rows = Rows.from_trace(poutine.trace(model).get_trace(v, mask=mask))
    assert log_q_of_dreams(model, guide, (v,), {"mask": mask}, rows, HandOver(), 2 * N + 1).shape == (2 * N + 1,)


def test_a_users_argument_of_the_name_size_is_no_number_of_dreams() -> None:
    def model(v: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    v = torch.randn(N, 1)
    guide = Amortized(model)
    guide(v)
    assert HandOver().resizable(model, guide, (v,), {}) is None
    rows = Rows.from_trace(poutine.trace(model).get_trace(v))
    assert log_q_of_dreams(model, guide, (v,), {}, rows, HandOver(), 9).shape == (9,)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_subsampled_sleep_is_scaled_as_the_losses_are(scale: int) -> None:
    network, lr = Network.random(D, H), 0.1
    model, encoder, v = Recorded(network), linear(network), binary(N)
    index = torch.arange(N // scale)
    em = EM(model, Amortized(model, encoder=encoder), e_step=Dream(SGD({"lr": lr})), m_step=None)
    call = em.call(v, index)
    em.guide(v, index)
    model.calls.clear()
    em.e_half(call)
    ((dreamt_v, dreamt_h), *_) = [pair for pair in model.calls if not torch.equal(pair[0], v[index])]
    grad = network.phi_gradient(dreamt_v, dreamt_h.unsqueeze(0), torch.full((1, N // scale), float(scale)))
    torch.testing.assert_close(encoder.weight.detach(), network.R + lr * grad["R"], rtol=1e-10, atol=1e-12)


def test_covariates_stay_in_a_dream() -> None:
    def model(x: Tensor, v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(x, 0.01))
            pyro.sample("v", dist.Normal(h, 0.01), obs=v)

    x = torch.arange(5.0) * 10
    dream = draw_dream(model, (x, torch.zeros(5)), {})
    torch.testing.assert_close(dream.nodes["v"]["value"], x, rtol=0, atol=0.2)


# ------------------------------------------------------------------------------------- theta


class Normalised(nn.Module):
    """A decoder with running means, which move whenever it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, D), nn.BatchNorm1d(D)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.linear(h))


@pytest.mark.parametrize(
    "build",
    [lambda: SigmoidBeliefNetwork([2, H, D]), lambda: HelmholtzMachine(D, 2)],
    ids=["layers", "Gaussian"],
)
def test_sleep_leaves_theta_bit_equal_and_wake_leaves_phi(build: Callable[[], Any]) -> None:
    model, v = build(), binary()
    guide = Amortized(model)
    asleep, awake = Dream(Adam({"lr": 0.1}), 3, 20), Gradient(Adam({"lr": 0.1}), 3)
    em = EM(model, guide, e_step=asleep, m_step=awake)
    call = em.call(v)
    guide(v)
    own = {name for name, _ in pyro.get_param_store().named_parameters() if name.startswith(guide._pyro_name)}
    # The second round has momentum in both optimizers.
    for _ in range(2):
        before = everything()
        result = em.e_half(call)
        assert changed(before)
        assert changed(before) <= own
        before = everything()
        em.m_half(call, result)
        assert changed(before)
        assert not changed(before) & own
    state = {id(p) for p in asleep.optim.optim_objs}
    assert state == {id(pyro.get_param_store()._params[name]) for name in own}
    assert not state & {id(p) for p in awake.optim.optim_objs}


def test_dreams_put_running_means_back() -> None:
    model = HelmholtzMachine(D, 2, Normalised())
    model(binary())
    before = model.decoder.norm.running_mean.clone()
    draw_dream(model, (binary(),), {})
    assert torch.equal(model.decoder.norm.running_mean, before)
    with torch.no_grad():
        model(binary())
    assert not torch.equal(model.decoder.norm.running_mean, before)


def test_no_gradient_is_left_behind() -> None:
    model = SigmoidBeliefNetwork([2, H, D])
    em = EM(model, Amortized(model), e_step=Dream(Adam({"lr": 0.1}), 2), m_step=None)
    em.e_half(em.call(binary()))
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


# ------------------------------------------------------------------------------------- L and the driver


def conditional_table(guide: Amortized, v: Tensor) -> Tensor:
    """q(h1, h2 | v) over the 2^(3+2) states, (32, N), by the factors of the guide."""
    states = binary_states(5)
    posterior = guide.posterior(v)
    values = {
        "h1": states[:, None, :3].expand(-1, len(v), -1),
        "h2": states[:, None, 3:].expand(-1, len(v), -1),
    }
    with torch.no_grad():
        nets = guide.encoders
        first = dist.Bernoulli(logits=nets.h1(v)).to_event(1).log_prob(values["h1"])
        second = dist.Bernoulli(logits=nets.h2(values["h1"].reshape(-1, 3)).reshape(32, len(v), 2)).to_event(1)
    assert not posterior.static
    return (first + second.log_prob(values["h2"])).exp()


def test_the_ledger_holds_the_exact_bound_of_layered_guides() -> None:
    model = SigmoidBeliefNetwork([2, 3, D])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    v, guide = binary(), Amortized(model)
    em = EM(model, guide, e_step=Dream(Adam({"lr": 0.1}), 5, 30), m_step=None)
    history = em.run(v, max_steps=2, tolerance=0, progress=False)
    states = binary_states(5).unsqueeze(1)
    log_joint = program_log_joint(model, {"h1": states[..., :3], "h2": states[..., 3:]}, v).detach()
    q = conditional_table(guide, v)
    torch.testing.assert_close(q.sum(0), torch.ones(N), rtol=0, atol=1e-12)
    last = history.ledger[-1]
    assert last.exact
    assert last.bound == pytest.approx(float(elbo(log_joint, q).sum()), abs=1e-10)
    assert [(e.half, e.parameters) for e in history.ledger] == [("E", "theta 0, q 1"), ("E", "theta 1, q 2")]


def test_the_ledger_marks_an_estimate() -> None:
    model = HelmholtzMachine(D, 2)
    em = EM(model, Amortized(model), e_step=Dream(Adam({"lr": 0.01})), m_step=Gradient(Adam({"lr": 0.01})))
    history = em.run(binary(), max_steps=2, progress=False)
    assert not any(entry.exact for entry in history.ledger)


def test_sleep_draws_the_guide_to_the_posterior() -> None:
    """On a model whose posterior is a product, sleep alone ends at it: the gap closes to nothing."""
    c, a = torch.tensor([-0.4, 0.7]), torch.tensor([2.0, -1.5])

    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(logits=c).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=a * h).to_event(1), obs=v)

    v = binary_states(2)
    guide = Amortized(model, encoder=nn.Linear(2, 2))
    for rate, num_steps in ((0.1, 60), (0.01, 60)):
        em = EM(model, guide, e_step=Dream(Adam({"lr": rate}), num_steps), m_step=None)
        em.e_half(em.call(v.repeat(500, 1)))
    logits = c + v * (torch.sigmoid(a) * 2).log() + (1 - v) * (torch.sigmoid(-a) * 2).log()
    torch.testing.assert_close(guide.posterior(v)["h"].mean, logits.sigmoid(), rtol=0, atol=0.05)


def test_inference_does_not_sleep() -> None:
    model, v = SigmoidBeliefNetwork([H, D]), binary()
    em = EM(model, Amortized(model), e_step=Dream(Adam({"lr": 0.1})), m_step=None)
    em.step(v)
    before, new = everything(), binary(9)
    torch.testing.assert_close(em.infer(new)["h1"].mean, em.guide.posterior(new)["h1"].mean)
    em.evaluate_loss(new)
    assert not changed(before)


def test_it_serves_batches_of_a_loader() -> None:
    model = SigmoidBeliefNetwork([H, D])
    em = EM(model, Amortized(model), e_step=Dream(Adam({"lr": 0.1}), 2), m_step=Gradient(Adam({"lr": 0.1})))
    history = fit(em, list(binary(10).split(4)), num_epochs=2, progress=False)
    assert history.steps == 6
    assert all(math.isfinite(loss) for loss in history.loss)


def test_the_guide_may_ask_for_the_argument() -> None:
    """Two arguments are equal to the data: the user says which one carries them."""

    def model(a: Tensor, b: Tensor) -> None:
        with pyro.plate("data", len(a)):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(h, 1.0), obs=torch.tensor(b.tolist()))

    v = torch.randn(N)
    guide = Amortized(model, visible={"v": "b"})
    for visible in (None, {"v": "b"}):
        em = EM(model, guide, e_step=Dream(SGD({"lr": 0.1}), visible=visible), m_step=None)
        if visible is None:
            em.call(v, v.clone())
            before = everything()
            with pytest.raises(ValueError, match="visible"):
                em.step(v, v.clone())
            assert not changed(before)
        else:
            em.step(v, v.clone())


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Dream(Adam({"lr": 1.0}), num_steps=0), ValueError, "Expected num_steps >= 1, but got 0."),
        (lambda: Dream(Adam({"lr": 1.0}), num_steps=True), TypeError, "Expected num_steps to be an int, but got True"),
        (lambda: Dream(Adam({"lr": 1.0}), num_dreams=0), ValueError, "Expected num_dreams >= 1, but got 0."),
        (lambda: Dream(Adam({"lr": 1.0}), num_dreams=2.0), TypeError, "Expected num_dreams to be an int, but got 2.0"),
        (lambda: Dream(Adam({"lr": 1.0}), num_particles=0), ValueError, "Expected num_particles >= 1, but got 0."),
        (lambda: Dream(torch.optim.SGD), TypeError, "Expected an optimizer from pyro.optim"),
        (lambda: Dream(Adam({"lr": 1.0})).last_loss, RuntimeError, "Expected a sleep before its loss"),
    ],
)
def test_refusals_of_the_settings(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_table_is_refused_at_the_door() -> None:
    model = SigmoidBeliefNetwork([H, D])
    with pytest.raises(TypeError, match=r"a network \(Amortized\) for Dream, but got MeanField. Dreams are not rows"):
        EM(model, MeanField(model), e_step=Dream(Adam({"lr": 0.1})), m_step=None)


def with_factor(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Bernoulli(0.5).expand([len(v), 2]).to_event(1))
        pyro.factor("tilt", h.sum(-1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def continuous(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(pyro.param("m", torch.zeros(1)), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)


def with_global(v: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(z, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


class Point(PointEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "encoder", "message"),
    [
        (with_factor, None, r"can be sampled for Dream, but got the pyro.factor sites \['tilt'\]"),
        (continuous, Point, r"density at any dream, but got points on the sites \['h'\]"),
        (with_global, None, r"an encoder for every latent, but got tables for \['z'\]"),
    ],
)
@pytest.mark.parametrize("whole_run", [True, False])
def test_what_cannot_be_dreamt_is_refused_by_name(model: Any, encoder: Any, message: str, whole_run: bool) -> None:
    v = torch.randn(N)
    guide = Amortized(model, encoder=None if encoder is None else encoder())
    em = EM(model, guide, e_step=Dream(Adam({"lr": 0.1})), m_step=None)
    em.call(v)
    before, generator = everything(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        em.run(v, max_steps=2, progress=False) if whole_run else em.step(v)
    assert not changed(before)
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(RuntimeError):
        _ = em.e_step.last_loss


def test_a_guide_that_shares_theta_is_refused() -> None:
    decoder = nn.Linear(2, D)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.scale = decoder, nn.Linear(2, 4)

        def forward(self, v: Tensor) -> Tensor:
            return self.scale(v @ self.decoder.weight)

    model, v = HelmholtzMachine(D, 2, decoder, name="machine"), binary()
    em = EM(model, Amortized(model, encoder=Tied()), e_step=Dream(Adam({"lr": 0.1})), m_step=None)
    em.call(v)
    before = everything()
    with pytest.raises(ValueError, match=r"shares \['machine.decoder\$\$\$weight'\] with the model"):
        em.step(v)
    assert not changed(before)
    with pytest.raises(ValueError, match="parameters of its own"):
        em.e_half(em.call(v))
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


def test_data_that_no_argument_carries_are_refused() -> None:
    held = torch.randn(N)

    def model(n: Tensor, v: Tensor) -> None:
        with pyro.plate("data", N):
            h = pyro.sample("h", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)
            pyro.sample("w", dist.Normal(h, 1.0), obs=held)

    em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
    em.call(torch.zeros(N), torch.randn(N))
    with pytest.raises(ValueError, match="'w'"):
        HandOver().arguments(model, em.guide, (torch.zeros(N), torch.randn(N)), {})
