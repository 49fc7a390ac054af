"""A Markov chain as one Pyro site: densities, moments and draws against enumeration, and Pyro's handlers around it."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pyro_ext.markov_chain import (
    ChainPaths,
    MarkovChain,
    features_to_paths,
    joint_states,
    paths_to_features,
)

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-12, "rtol": 1e-12}
INF = float("inf")
DRAWS = 20_000


def all_paths(states: int, steps: int) -> Tensor:
    """One-hot paths ``(S^T, T, S)``."""
    return torch.eye(states)[torch.tensor(list(itertools.product(range(states), repeat=steps)))]


def log_prob_by_hand(initial: Tensor, transition: Tensor, path: Tensor, steps: int) -> Tensor:
    """log p of one path of one chain, with a matrix ``(K, K)`` or ``(T - 1, K, K)``."""
    state = path.argmax(-1).tolist()
    total = initial.log_softmax(-1)[state[0]]
    for t in range(1, steps):
        matrix = transition if transition.dim() == 2 else transition[t - 1]
        total = total + matrix.log_softmax(-1)[state[t - 1], state[t]]
    return total


@pytest.mark.parametrize(("states", "steps"), [(3, 4), (2, 1), (1, 3), (1, 1), (4, 2)])
@pytest.mark.parametrize("varying", [False, True])
def test_density_moments_and_entropy_are_those_of_enumeration(states: int, steps: int, varying: bool) -> None:
    initial, transition = torch.randn(states), torch.randn((steps - 1, states, states) if varying else (states, states))
    chain = MarkovChain(initial, transition, steps)
    paths = all_paths(states, steps)
    found = chain.log_prob(paths)
    expected = torch.stack([log_prob_by_hand(initial, transition, path, steps) for path in paths])
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(found.exp().sum(), torch.ones(()), **EXACT)
    torch.testing.assert_close(chain.mean, torch.einsum("n,ntk->tk", found.exp(), paths), **EXACT)
    torch.testing.assert_close(chain.entropy(), -(found.exp() * found).sum(), **EXACT)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("own", ["both", "initial", "transition"])
def test_rows_of_a_batch_have_their_own_logits(varying: bool, own: str) -> None:
    tail = (3, 2, 2) if varying else (2, 2)
    initial = torch.randn((1 if own == "transition" else 5, 2))
    transition = torch.randn((1 if own == "initial" else 5, *tail))
    chain = MarkovChain(initial, transition, 4)
    assert (chain.batch_shape, chain.event_shape) == ((5,), (4, 2))
    paths = all_paths(2, 4)
    found = chain.log_prob(paths[:, None])
    assert found.shape == (16, 5)
    for row in range(5):
        one = MarkovChain(initial.expand(5, 2)[row], transition.expand(5, *tail)[row], 4)
        torch.testing.assert_close(found[:, row], one.log_prob(paths), **EXACT)
        torch.testing.assert_close(chain.mean[row], one.mean, **EXACT)
        torch.testing.assert_close(chain.entropy()[row], one.entropy(), **EXACT)
    wide = chain.expand((3, 5))
    torch.testing.assert_close(wide.log_prob(paths[:, None, None]), found[:, None].expand(16, 3, 5), **EXACT)
    torch.testing.assert_close(wide.mean, chain.mean.expand(3, 5, 4, 2), **EXACT)
    torch.testing.assert_close(wide.entropy(), chain.entropy().expand(3, 5), **EXACT)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_shapes_of_draws(shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    chain = MarkovChain(torch.zeros(3), torch.zeros(3, 3), 4).expand(batch)
    value = chain.sample(shape)
    assert value.shape == (*shape, *batch, 4, 3)
    if value.numel():
        assert chain.support.check(value).all()
        assert chain.log_prob(value).shape == (*shape, *batch)
    assert chain.mean.shape == (*batch, 4, 3)
    assert chain.entropy().shape == batch


def test_draws_have_the_frequencies_of_the_paths() -> None:
    """5 standard errors, for every path of every row."""
    chain = MarkovChain(torch.randn(2, 3), torch.randn(2, 3, 3), 3)
    paths = all_paths(3, 3)
    probs = chain.log_prob(paths[:, None]).exp()
    draws = chain.sample((DRAWS,)).argmax(-1)
    index = (draws * torch.tensor([9, 3, 1])).sum(-1)
    for row in range(2):
        found = torch.bincount(index[:, row], minlength=27) / DRAWS
        error = (probs[:, row] * (1 - probs[:, row]) / DRAWS).sqrt()
        assert bool(((found - probs[:, row]).abs() <= 5 * error).all())


def test_log_density_is_bilinear_off_the_support() -> None:
    chain = MarkovChain(torch.randn(3), torch.randn(4, 3, 3), 5, validate_args=False)
    x, y, z = torch.randn(3, 5, 3)
    # Every other step may be moved along a line: no product of steps that are no neighbours.
    one, other, mixed = (z.clone() for _ in range(3))
    one[::2], other[::2], mixed[::2] = x[::2], y[::2], 0.3 * x[::2] + 0.7 * y[::2]
    expected = 0.3 * chain.log_prob(one) + 0.7 * chain.log_prob(other)
    torch.testing.assert_close(chain.log_prob(mixed), expected, **EXACT)
    path = chain.sample().requires_grad_()
    (gradient,) = torch.autograd.grad(chain.log_prob(path), path)
    expected = chain.transition_logits[0, path[0].argmax()] + chain.transition_logits[1, :, path[2].argmax()]
    torch.testing.assert_close(gradient[1], expected, **EXACT)


def test_hard_zeros_have_no_paths_and_no_nan() -> None:
    initial = torch.tensor([0.0, -INF])
    transition = torch.tensor([[0.0, 0.0], [-INF, 0.0]])
    chain = MarkovChain(initial, transition, 4)
    paths = all_paths(2, 4)
    log_prob = chain.log_prob(paths)
    possible = (paths[:, 0, 0] == 1) & (paths[..., 1].diff(dim=-1) >= 0).all(-1)
    assert bool((log_prob.isfinite() == possible).all())
    assert bool((log_prob[~possible] == -INF).all())
    torch.testing.assert_close(log_prob.exp().sum(), torch.ones(()), **EXACT)
    torch.testing.assert_close(chain.entropy(), torch.special.entr(log_prob.exp()).sum(), **EXACT)
    assert bool(chain.log_prob(chain.sample((1000,))).isfinite().all())


def test_gradients_with_hard_zeros_are_finite() -> None:
    initial = torch.tensor([0.3, -INF], requires_grad=True)
    transition = torch.tensor([[0.0, 0.0], [-INF, 0.0]], requires_grad=True)
    chain = MarkovChain(initial, transition, 3)
    for value in (chain.log_prob(torch.eye(2)[[0, 0, 1]]), chain.entropy()):
        for gradient in torch.autograd.grad(value, (initial, transition), retain_graph=True):
            assert bool(gradient.isfinite().all())


def test_nan_is_not_hidden() -> None:
    chain = MarkovChain(torch.tensor([torch.nan, 0.0]), torch.zeros(2, 2), 3)
    assert bool(chain.log_prob(torch.eye(2)[[0, 0, 1]]).isnan())


@pytest.mark.parametrize(
    ("initial", "transition", "steps", "message"),
    [
        ((3,), (3, 3), 0, "Expected num_steps of at least 1, but got 0"),
        ((3,), (3, 3), True, "Expected num_steps of at least 1, but got True"),
        ((3,), (3, 3), 2.0, "Expected num_steps of at least 1, but got 2.0"),
        ((), (3, 3), 4, r"Expected initial_logits of shape batch \+ \(K,\), but got \(\)"),
        ((0,), (0, 0), 4, r"Expected initial_logits of shape batch \+ \(K,\), but got \(0,\)"),
        ((3,), (2, 2), 4, r"Expected transition_logits of shape batch \+ \(3, 3\)"),
        ((3,), (3,), 4, r"Expected transition_logits of shape batch \+ \(3, 3\)"),
        ((3,), (4, 3, 3), 4, r"or batch \+ \(3, 3, 3\), but got \(4, 3, 3\)"),
        ((5, 3), (3, 3), 4, r"but got \(3, 3\) beside initial_logits of shape \(5, 3\)"),
        ((5, 3), (3, 3, 3), 4, r"but got \(3, 3, 3\) beside initial_logits of shape \(5, 3\)"),
        ((5, 3), (4, 3, 3, 3), 4, r"but got \(4, 3, 3, 3\) beside initial_logits of shape \(5, 3\)"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(initial, transition, steps, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarkovChain(torch.zeros(initial), torch.zeros(transition), steps)


def test_validation_refuses_what_is_no_path() -> None:
    relaxed = torch.full((4, 3), 1 / 3)
    with pytest.raises(ValueError, match="support"):
        MarkovChain(torch.zeros(3), torch.zeros(3, 3), 4).log_prob(relaxed)
    with pytest.raises(ValueError, match="support"):
        MarkovChain(torch.zeros(3), torch.zeros(3, 3), 4).expand((2,)).log_prob(relaxed.expand(2, 4, 3))
    with pytest.raises(ValueError, match="event_shape"):
        MarkovChain(torch.zeros(3), torch.zeros(3, 3), 4).log_prob(torch.eye(3)[[0, 1, 2]])
    free = MarkovChain(torch.zeros(3), torch.zeros(3, 3), 4, validate_args=False).expand((2,))
    torch.testing.assert_close(free.log_prob(relaxed), torch.full((2,), -4 * math.log(3)))


# ---------------------------------------------------------------------- in Pyro programs

INITIAL = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
TRANSITION = torch.tensor([[1.2, 0.1, -0.5], [0.3, 0.8, -1.0], [-0.7, 0.2, 1.5]], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def hidden_markov(v: Tensor | None = None, count: int = 6) -> Tensor:
    with pyro.plate("data", count):
        h = pyro.sample("h", MarkovChain(INITIAL, TRANSITION, 4))
        return pyro.sample("v", dist.Normal(h @ MEANS, 1.0).to_event(1), obs=v)


def two_plates() -> Tensor:
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
        return pyro.sample("h", MarkovChain(INITIAL, TRANSITION, 4))


def test_plates_expand_the_chain() -> None:
    trace = poutine.trace(hidden_markov).get_trace()
    assert trace.nodes["h"]["value"].shape == (6, 4, 3)
    trace.compute_log_prob()
    assert trace.nodes["h"]["log_prob"].shape == (6,)
    assert two_plates().shape == (3, 2, 4, 3)
    trace = poutine.trace(two_plates).get_trace()
    trace.compute_log_prob()
    expected = MarkovChain(INITIAL, TRANSITION, 4).log_prob(trace.nodes["h"]["value"])
    torch.testing.assert_close(trace.nodes["h"]["log_prob"], expected, **EXACT)


def test_replay_and_condition_give_the_path() -> None:
    first = poutine.trace(hidden_markov).get_trace()
    again = poutine.trace(poutine.replay(hidden_markov, trace=first)).get_trace()
    assert bool((again.nodes["h"]["value"] == first.nodes["h"]["value"]).all())
    path = first.nodes["h"]["value"]
    held = poutine.trace(poutine.condition(hidden_markov, {"h": path})).get_trace()
    assert held.nodes["h"]["is_observed"]
    held.compute_log_prob()
    torch.testing.assert_close(held.nodes["h"]["log_prob"], MarkovChain(INITIAL, TRANSITION, 4).log_prob(path))


def test_predictive_draws_paths() -> None:
    found = Predictive(hidden_markov, num_samples=5)()
    assert found["h"].shape == (5, 6, 4, 3)
    parallel = Predictive(hidden_markov, num_samples=5, parallel=True)()
    assert parallel["h"].shape == (5, 6, 4, 3)


def test_vectorised_particles_stand_left_of_the_plates() -> None:
    with pyro.plate("particles", 7, dim=-2):
        trace = poutine.trace(hidden_markov).get_trace()
    assert trace.nodes["h"]["value"].shape == (7, 6, 4, 3)
    trace.compute_log_prob()
    assert trace.nodes["h"]["log_prob"].shape == (7, 6)


# ---------------------------------------------------------------------- paths under potentials


def chain_paths(units: list[int], steps: int, start: int, stop: int, *batch: int, by_step: bool = False) -> ChainPaths:
    states = math.prod(units)
    matrices = steps - 1 if by_step else 1
    unary, pairwise = torch.randn(*batch, steps, states), torch.randn(*batch, matrices, states, states)
    return ChainPaths(unary, pairwise, units, start, stop)


def feature_paths(units: list[int], steps: int) -> Tensor:
    """All joint paths as features ``(N, T * sum(units))``."""
    states = joint_states(units, torch.zeros(()))
    index = torch.tensor(list(itertools.product(range(len(states)), repeat=steps)))
    return paths_to_features(states[index], units)


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize(("units", "steps"), [([3], 3), ([2, 3], 3), ([2, 2, 2], 2), ([3], 1), ([1, 2], 3)])
def test_paths_under_potentials(units: list[int], steps: int, by_step: bool) -> None:
    fn = chain_paths(units, steps, 0, len(units), 2, by_step=by_step)
    features = feature_paths(units, steps)
    log_prob = fn.log_prob(features[:, None])
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(2), **EXACT)
    torch.testing.assert_close(fn.mean, log_prob.exp().mT @ features, **EXACT)
    torch.testing.assert_close(fn.entropy(), -(log_prob.exp() * log_prob).sum(0), **EXACT)
    draws = fn.sample((3,))
    assert draws.shape == (3, 2, features.shape[-1])
    assert fn.expand((4, 2)).sample().shape == (4, 2, features.shape[-1])
    torch.testing.assert_close(fn.expand((4, 2)).log_prob(draws[:, None]), fn.log_prob(draws)[:, None].expand(3, 4, 2))


def test_a_part_of_the_chains_sums_the_others_out() -> None:
    units, steps = [2, 3, 2], 2
    whole = chain_paths(units, steps, 0, 3, 4)
    features = feature_paths(units, steps)
    probs = whole.log_prob(features[:, None]).exp()
    middle = ChainPaths(whole.unary, whole.pairwise, units, 1, 2)
    for value in feature_paths([3], steps):
        agree = (features[:, 4:10] == value).all(-1).double()
        torch.testing.assert_close(middle.log_prob(value).exp(), agree @ probs, **EXACT)
    torch.testing.assert_close(middle.mean, probs.mT @ features[:, 4:10], **EXACT)
    with pytest.raises(NotImplementedError, match="no entropy in closed form"):
        middle.entropy()


def test_given_the_earlier_chains() -> None:
    units, steps = [2, 3], 3
    whole = chain_paths(units, steps, 0, 2, 4)
    first = ChainPaths(whole.unary, whole.pairwise, units, 0, 1)
    features = feature_paths(units, steps)[:, None]
    second = ChainPaths(whole.unary, whole.pairwise, units, 1, 2, features[..., :6])
    assert second.batch_shape == (len(features), 4)
    total = first.log_prob(features[..., :6]) + second.log_prob(features[..., 6:])
    torch.testing.assert_close(total, whole.log_prob(features), atol=1e-10, rtol=1e-10)
    assert second.sample().shape == (len(features), 4, 9)


def test_hard_zeros_of_potentials() -> None:
    unary, pairwise = torch.zeros(3, 2), torch.tensor([[[0.0, -INF], [0.0, 0.0]]])
    unary[1, 0] = -INF
    fn = ChainPaths(unary, pairwise, [2], 0, 1)
    features = feature_paths([2], 3)
    log_prob = fn.log_prob(features)
    assert not bool(log_prob.isnan().any())
    possible = [path for path in itertools.product(range(2), repeat=3) if path[1] and path[0]]
    assert int(log_prob.isfinite().sum()) == len(possible)
    torch.testing.assert_close(log_prob.exp().sum(), torch.ones(()), **EXACT)


def test_score_gradients_are_those_of_finite_differences() -> None:
    unary, pairwise = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 1, 4, 4, requires_grad=True)
    path = feature_paths([2, 2], 3)[[5, 40]]

    def score(u: Tensor, p: Tensor) -> Tensor:
        first = ChainPaths(u, p, [2, 2], 0, 1).log_prob(path[:, :6])
        second = ChainPaths(u, p, [2, 2], 1, 2, path[:, :6]).log_prob(path[:, 6:])
        return first + second + ChainPaths(u, p, [2, 2], 0, 2).log_prob(path)

    assert torch.autograd.gradcheck(score, (unary, pairwise))


def test_features_and_paths_are_inverse() -> None:
    value = torch.randn(5, 4, 6)
    features = paths_to_features(value, [1, 2, 3])
    torch.testing.assert_close(features_to_paths(features, [1, 2, 3], 4), value)
    torch.testing.assert_close(features[:, 4:12], value[..., 1:3].flatten(-2))
    torch.testing.assert_close(paths_to_features(value, [1, 2, 3], 1, 2), features[:, 4:12])
    assert joint_states([2, 3], value).shape == (6, 5)
