"""Forward-backward against the sum over all paths written out, by both routes and where numbers leave their range."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ext import forward_backward
from pyro_ext.forward_backward import Smoothed, best_path, draw_paths, smooth

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-12, "rtol": 1e-12}
INF = float("inf")


@dataclass
class Enumeration:
    """All paths ``(N, T)`` and their probabilities ``(R, N)``; `log_weights` are unnormalised."""

    paths: Tensor
    log_weights: Tensor
    probs: Tensor
    states: int

    @property
    def one_hot(self) -> Tensor:
        return functional.one_hot(self.paths, self.states).to(self.probs)

    @property
    def log_normalizer(self) -> Tensor:
        return self.log_weights.logsumexp(-1)

    @property
    def marginals(self) -> Tensor:
        return torch.einsum("rn,nts->rts", self.probs, self.one_hot)

    @property
    def pairs(self) -> Tensor:
        return torch.einsum("rn,ntj,ntk->rtjk", self.probs, self.one_hot[:, :-1], self.one_hot[:, 1:])

    @property
    def entropy(self) -> Tensor:
        return torch.special.entr(self.probs).sum(-1)


def enumerate_paths(unary: Tensor, pairwise: Tensor) -> Enumeration:
    unary, pairwise = unary.double(), pairwise.double()
    rows, steps, states = unary.shape
    paths = torch.tensor(list(itertools.product(range(states), repeat=steps)))
    full = pairwise.expand(rows, steps - 1, states, states)
    weights = unary.new_zeros(rows, len(paths))
    for number, path in enumerate(paths.tolist()):
        for t, state in enumerate(path):
            weights[:, number] += unary[:, t, state]
            if t:
                weights[:, number] += full[:, t - 1, path[t - 1], state]
    return Enumeration(paths, weights, weights.softmax(-1), states)


def problem(rows: int = 3, steps: int = 4, states: int = 3, *, by_row: bool = False, by_step: bool = False):
    unary = 2 * torch.randn(rows, steps, states)
    shape = (rows if by_row else 1, steps - 1 if by_step else 1, states, states)
    return unary, 2 * torch.randn(shape)


def assert_is(chain: Smoothed, truth: Enumeration, pairwise: Tensor, **tolerance: float) -> None:
    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one.double(), other, **tolerance)

    close(chain.log_normalizer, truth.log_normalizer)
    close(chain.marginals, truth.marginals)
    close(chain.pairs, truth.pairs)
    close(chain.pair_sum(), truth.pairs.sum((0, 1)))
    weights = torch.rand(truth.pairs.shape[:2])
    close(chain.pair_sum(weights.to(chain.unary)), (weights[..., None, None] * truth.pairs).sum((0, 1)))
    for scores in (pairwise, torch.randn(pairwise.shape[1:])[None].to(pairwise)):
        products = torch.where(truth.pairs > 0, truth.pairs * scores.double(), 0)
        close(chain.pair_expectation(scores), products.sum((-1, -2, -3)))
    close(chain.entropy, truth.entropy)


ROUTES = {"scaled": forward_backward._smooth_scaled, "logs": forward_backward._smooth_logs}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("steps", "states"), [(4, 3), (2, 3), (1, 3), (5, 1), (1, 1), (9, 2), (10, 2)])
def test_sums_over_paths_are_those_of_enumeration(route: str, by_row: bool, by_step: bool, steps: int, states: int):
    unary, pairwise = problem(3, steps, states, by_row=by_row, by_step=by_step)
    assert_is(ROUTES[route](unary, pairwise), enumerate_paths(unary, pairwise), pairwise, **EXACT)


@pytest.mark.parametrize("by_row", [False, True])
def test_both_routes_agree_on_long_chains(by_row: bool) -> None:
    unary, pairwise = problem(4, 60, 5, by_row=by_row)
    one, other = (route(5 * unary, pairwise) for route in ROUTES.values())
    assert one is not None
    for name in ("log_normalizer", "marginals", "pairs", "entropy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-9, rtol=1e-11)


def test_chunks_of_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unary, pairwise = problem(2, 6, 3, by_step=True)
    monkeypatch.setattr(forward_backward, "CHUNK_ELEMENTS", 2 * 2 * 9)
    chain = forward_backward._smooth_logs(unary, pairwise)
    assert len(list(chain._pair_chunks())) == 3
    assert_is(chain, enumerate_paths(unary, pairwise), pairwise, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4])
def test_large_potentials_stay_exact(dtype: torch.dtype, size: float) -> None:
    unary = (size * torch.randn(5, 4, 3)).to(dtype)
    pairwise = (size * torch.randn(1, 1, 3, 3)).to(dtype)
    chain, eps = smooth(unary, pairwise), torch.finfo(dtype).eps
    assert chain.marginals.dtype == dtype
    atol = 32 * eps * max(1.0, size)
    assert_is(chain, enumerate_paths(unary, pairwise), pairwise, atol=atol, rtol=32 * eps)


SWAP_FORBIDDEN = torch.tensor([[[[0.0, -INF], [-INF, 0.0]]]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "unary",
    [
        [[0.0, -50.0], [0.0, -48.0], [-INF, 0.0]],  # the survivor has lost its digits in float32 where it is rescaled
        [[0.0, -98.0], [-96.0, 0.0]],  # the two directions rule out each other's states
        [[0.0, -746.0], [-744.0, 0.0]],
        [[0.0, -1000.0], [-1000.0, 0.0]],
        [[0.0, -720.0], [0.0, 0.0], [-INF, 0.0]],
    ],
)
def test_messages_that_lose_their_digits_are_found_out(dtype: torch.dtype, unary: list[list[float]]) -> None:
    given, pairwise = torch.tensor([unary]).to(dtype), SWAP_FORBIDDEN.to(dtype)
    eps = torch.finfo(dtype).eps
    truth = enumerate_paths(given, pairwise)
    chain = smooth(given, pairwise)
    torch.testing.assert_close(chain.log_normalizer.double(), truth.log_normalizer, atol=0, rtol=4 * eps)
    # A difference of two potentials is as exact as these are.
    torch.testing.assert_close(chain.marginals.double(), truth.marginals, atol=1e3 * eps, rtol=0)
    torch.testing.assert_close(chain.pairs.double(), truth.pairs, atol=1e3 * eps, rtol=0)


def test_a_slow_death_over_many_rescalings_is_found_out() -> None:
    """One state starts with 1e-318 of the mass, and the other loses it step by step."""
    steps = 40
    unary = torch.zeros(1, steps, 2)
    unary[0, 0, 1] = -732.3
    unary[0, 1:, 0] = -732.3 / (steps - 1)
    chain = smooth(unary, SWAP_FORBIDDEN)
    expected = unary.sum(1).softmax(-1)
    torch.testing.assert_close(chain.marginals, expected[:, None].expand(1, steps, 2), atol=1e-11, rtol=0)
    torch.testing.assert_close(chain.log_normalizer, unary.sum(1).logsumexp(-1), atol=0, rtol=1e-14)


@pytest.mark.parametrize("route", ["scaled", "logs"])
def test_hard_zeros_silence_their_paths(route: str) -> None:
    unary, pairwise = problem(3, 4, 3)
    unary[:, 1, 0] = -INF
    unary[0, 3, 1:] = -INF
    pairwise[..., 0, 2] = -INF
    assert_is(ROUTES[route](unary, pairwise), enumerate_paths(unary, pairwise), pairwise, **EXACT)


def test_a_state_that_cannot_be_reached_has_no_gradient_and_no_nan() -> None:
    unary, pairwise = problem(2, 4, 3)
    unary[:, 1, 0] = -INF
    pairwise[..., 2] = -INF
    unary.requires_grad_()
    pairwise.requires_grad_()
    chain = smooth(unary, pairwise)
    for value, wanted in ((chain.log_normalizer, chain.marginals), (chain.entropy, None)):
        gradient, other = torch.autograd.grad(value.sum(), (unary, pairwise), retain_graph=True)
        assert bool(gradient.isfinite().all() & other.isfinite().all())
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, **EXACT)


def test_a_row_without_a_path_has_no_evidence() -> None:
    unary = torch.zeros(2, 2, 2)
    unary[0, 0, 0] = unary[0, 1, 1] = -INF
    assert smooth(unary, SWAP_FORBIDDEN).log_normalizer[0] == -INF
    torch.testing.assert_close(smooth(unary, SWAP_FORBIDDEN).marginals[1], torch.full((2, 2), 0.5))


def test_nan_is_not_hidden() -> None:
    unary, pairwise = problem(2, 3, 2)
    unary[0, 1, 0] = torch.nan
    assert bool(smooth(unary, pairwise).log_normalizer.isnan()[0])


@pytest.mark.parametrize("by_step", [False, True])
def test_gradients_of_the_normaliser_are_the_marginals(by_step: bool) -> None:
    unary, pairwise = problem(2, 4, 3, by_row=True, by_step=by_step)
    truth = enumerate_paths(unary, pairwise)
    unary.requires_grad_()
    pairwise.requires_grad_()
    one, two = torch.autograd.grad(smooth(unary, pairwise).log_normalizer.sum(), (unary, pairwise))
    torch.testing.assert_close(one, truth.marginals, **EXACT)
    torch.testing.assert_close(two, truth.pairs if by_step else truth.pairs.sum(1, keepdim=True), **EXACT)


@pytest.mark.parametrize("name", ["log_normalizer", "marginals", "pairs", "entropy"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    unary, pairwise = problem(2, 3, 2)
    inputs = (unary.requires_grad_(), pairwise.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, p: getattr(smooth(u, p), name), inputs)


def test_scores_have_gradients_on_both_routes() -> None:
    unary, pairwise = problem(2, 4, 3)
    scores = torch.randn(1, 1, 3, 3, requires_grad=True)
    truth = enumerate_paths(unary, pairwise).pairs.sum((0, 1))
    for route in ROUTES.values():
        (gradient,) = torch.autograd.grad(route(unary, pairwise).pair_expectation(scores).sum(), scores)
        torch.testing.assert_close(gradient[0, 0], truth, **EXACT)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("by_row", [False, True])
def test_draws_have_the_frequencies_of_the_paths(route: str, by_row: bool) -> None:
    """5 standard errors, for every path."""
    count = 20_000
    unary, pairwise = problem(2, 3, 3, by_row=by_row, by_step=by_row)
    unary[0, 1, 0] = -INF
    truth = enumerate_paths(unary, pairwise)
    draws = draw_paths(ROUTES[route](unary, pairwise), count)
    assert draws.shape == (count, 2, 3)
    index = (draws * torch.tensor([9, 3, 1])).sum(-1)
    for row in range(2):
        found = torch.bincount(index[:, row], minlength=27) / count
        error = (truth.probs[row] * (1 - truth.probs[row]) / count).sqrt()
        assert bool(((found - truth.probs[row]).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_best_path_has_the_largest_weight(by_row: bool, by_step: bool, steps: int) -> None:
    unary, pairwise = problem(20, steps, 3, by_row=by_row, by_step=by_step)
    truth = enumerate_paths(unary, pairwise)
    assert bool((best_path(unary, pairwise) == truth.paths[truth.log_weights.argmax(-1)]).all())


def test_a_best_path_among_ties_is_one_of_the_best() -> None:
    unary = torch.randint(0, 2, (50, 5, 3)).double()
    pairwise = torch.randint(0, 2, (1, 1, 3, 3)).double()
    unary[:, 2, 0] = -INF
    truth = enumerate_paths(unary, pairwise)
    index = (best_path(unary, pairwise) * torch.tensor([81, 27, 9, 3, 1])).sum(-1)
    found = truth.log_weights.gather(-1, index[:, None]).squeeze(-1)
    assert bool((found == truth.log_weights.amax(-1)).all())


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.size = max(self.size, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("by_step", [False, True])
def test_no_pairs_of_all_rows_and_steps_are_held(by_step: bool) -> None:
    rows, steps, states = 40, 30, 8
    unary, pairwise = problem(rows, steps, states, by_step=by_step)
    with LargestTensor() as seen:
        chain = smooth(unary, pairwise)
        chain.pair_sum(torch.rand(rows, steps - 1))
        chain.pair_expectation(pairwise)
        _ = chain.entropy
        draw_paths(chain, 1)
    assert seen.size <= 2 * rows * steps * states
    with LargestTensor() as seen:
        _ = chain.pairs
    assert seen.size >= rows * (steps - 1) * states**2
