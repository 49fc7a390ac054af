"""The factor over whole paths: against a table over all joint paths, dense quadratics, and the memory of its sums."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_ext import chain_factor
from pyro_ext.chain_factor import MarkovChainFactor
from pyro_ext.forward_backward import smooth
from pyro_ext.markov_chain import joint_states, paths_to_features

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"atol": 1e-11, "rtol": 1e-11}
FACTORS: dict[str, Callable[[], MarkovChainFactor]] = {
    "one chain": lambda: MarkovChainFactor([3], 4),
    "one chain, a matrix a step": lambda: MarkovChainFactor([3], 4, homogeneous=False),
    "two chains": lambda: MarkovChainFactor([2, 3], 3),
    "two chains, a matrix a step": lambda: MarkovChainFactor([2, 3], 3, homogeneous=False),
    "three chains": lambda: MarkovChainFactor([2, 2, 2], 2),
    "one step": lambda: MarkovChainFactor([3], 1),
    "one step, no matrix": lambda: MarkovChainFactor([3], 1, homogeneous=False),
    "one state": lambda: MarkovChainFactor([1], 3),
}
every_factor = pytest.mark.parametrize("name", FACTORS)


def table(factor: MarkovChainFactor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all joint paths ``(N, size)``, and their probabilities ``(..., N)`` from the potentials."""
    unary, pairwise = factor.potentials(params)
    paths = torch.tensor(list(itertools.product(range(factor.num_states), repeat=factor.num_steps)))
    score = unary[..., torch.arange(factor.num_steps), paths].sum(-1)
    if factor.num_steps > 1:
        steps = torch.arange(factor.num_steps - 1) % factor.num_matrices
        score = score + pairwise[..., steps, paths[:, :-1], paths[:, 1:]].sum(-1)
    return paths_to_features(joint_states(factor.units, params)[paths], factor.units), score.softmax(-1)


def couplings(factor: MarkovChainFactor) -> Tensor:
    """A symmetric Q over whole paths that couples states at the same step and, evenly, at neighbouring ones."""
    groups = sum(factor.units)
    own, next_ = torch.randn(groups, groups), torch.randn(groups, groups)
    blocks = [[torch.zeros(groups, groups)] * factor.num_steps for _ in range(factor.num_steps)]
    for t in range(factor.num_steps):
        blocks[t][t] = own + own.mT
        if t:
            blocks[t - 1][t], blocks[t][t - 1] = next_, next_.mT
    timed = torch.cat([torch.cat(line, 1) for line in blocks])
    order = paths_to_features(torch.arange(len(timed)).reshape(factor.num_steps, groups), factor.units)
    return timed[order[:, None], order]


@every_factor
def test_moments_and_entropy_are_those_of_the_table(name: str) -> None:
    factor = FACTORS[name]()
    params, quadratic = torch.randn(2, 3, factor.num_params), torch.randn(2, 3, factor.size, factor.size)
    features, probs = table(factor, params)
    torch.testing.assert_close(factor.mean(params), probs @ features, **EXACT)
    torch.testing.assert_close(factor.entropy(params), torch.special.entr(probs).sum(-1), **EXACT)
    moments = torch.einsum("abn,ni,nj->abij", probs, features, features)
    expected = (moments * quadratic).sum((-1, -2))
    torch.testing.assert_close(factor.second_moment(params, quadratic), expected, **EXACT)
    expected = (moments * quadratic[0, 0]).sum((-1, -2))
    torch.testing.assert_close(factor.second_moment(params, quadratic[0, 0]), expected, **EXACT)
    weights = torch.rand(3, 2)
    torch.testing.assert_close(factor.moment_sum(params[0]), moments[0].sum(0), **EXACT)
    expected = torch.einsum("n,nij->ij", weights[:, 0], moments[0])
    torch.testing.assert_close(factor.moment_sum(params[0], weights[:, 0]), expected, **EXACT)
    expected = torch.einsum("nw,nij->wij", weights, moments[0])
    torch.testing.assert_close(factor.moment_sums(params[0], weights), expected, **EXACT)


@every_factor
def test_distributions_are_those_of_the_table(name: str) -> None:
    factor = FACTORS[name]()
    params = torch.randn(4, factor.num_params)
    features, probs = table(factor, params)
    found = factor.marginal(params, 0, factor.size).log_prob(features[:, None])
    torch.testing.assert_close(found.exp(), probs.mT, **EXACT)
    cut = factor.num_steps * factor.units[0]
    if cut < factor.size:
        first = factor.marginal(params, 0, cut).log_prob(features[:, None, :cut])
        rest = factor.conditional(params, cut, factor.size, features[:, None, :cut]).log_prob(features[:, None, cut:])
        torch.testing.assert_close((first + rest).exp(), probs.mT, **EXACT)


@every_factor
def test_the_mode_is_the_most_probable_path(name: str) -> None:
    factor = FACTORS[name]()
    params = torch.randn(5, 2, factor.num_params)
    features, probs = table(factor, params)
    assert bool((factor.mode(params) == features[probs.argmax(-1)]).all())


@every_factor
def test_a_cold_start_has_the_means_it_is_given(name: str) -> None:
    factor = FACTORS[name]()
    mean = torch.cat([torch.rand(factor.num_steps, k).softmax(-1).flatten() for k in factor.units])
    torch.testing.assert_close(factor.mean(factor.initial(mean, 1.0)), mean, **EXACT)


@every_factor
@pytest.mark.parametrize("shared", [True, False])
def test_no_move_beats_the_optimum_of_a_dense_quadratic(name: str, shared: bool) -> None:
    factor = FACTORS[name]()
    linear, quadratic = torch.randn(4, factor.size), couplings(factor)
    if not shared:
        quadratic = torch.stack([quadratic, couplings(factor), couplings(factor), couplings(factor)])
    best = factor.optimum(linear, quadratic)
    assert best.shape == (4, factor.num_params)
    features, probs = table(factor, best)
    scores = linear @ features.mT + 0.5 * torch.einsum("ni,...ij,nj->...n", features, quadratic, features)
    torch.testing.assert_close(probs, scores.softmax(-1), **EXACT)
    value = factor.objective(best, linear, quadratic)
    torch.testing.assert_close(value, scores.logsumexp(-1), **EXACT)
    best.requires_grad_()
    (gradient,) = torch.autograd.grad(factor.objective(best, linear, quadratic).sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(10):
            moved = best.detach() + size * torch.randn_like(best)
            assert bool((factor.objective(moved, linear, quadratic) <= value + 1e-10).all())
    params, solved = factor.solve(linear, quadratic)
    torch.testing.assert_close((params, solved), (best.detach(), value), **EXACT)


def test_couplings_that_the_family_cannot_hold_are_refused() -> None:
    factor = MarkovChainFactor([2], 4)
    far = torch.zeros(8, 8)
    far[0, 5] = far[5, 0] = 0.5
    with pytest.raises(ValueError, match="Expected couplings between neighbouring steps"):
        factor.optimum(torch.zeros(3, 8), far)
    uneven = torch.zeros(8, 8)
    uneven[0, 2] = uneven[2, 0] = 0.5
    with pytest.raises(ValueError, match="Expected the same coupling between all neighbouring steps"):
        factor.optimum(torch.zeros(3, 8), uneven)
    free = MarkovChainFactor([2], 4, homogeneous=False)
    features, probs = table(free, free.optimum(torch.zeros(3, 8), uneven))
    scores = 0.5 * torch.einsum("ni,ij,nj->n", features, uneven, features)
    torch.testing.assert_close(probs, scores.softmax(-1).expand(3, -1), **EXACT)


@every_factor
def test_scores_of_all_paths_give_their_potentials(name: str) -> None:
    factor = FACTORS[name]()
    params = torch.randn(4, factor.num_params)
    if factor.num_states == 1:
        states = torch.ones(1, factor.size)
    else:
        units = [torch.arange(size) for size in factor.units for _ in range(factor.num_steps)]
        picks = torch.cartesian_prod(*units).reshape(-1, len(units))
        sizes = [size for size in factor.units for _ in range(factor.num_steps)]
        states = torch.cat([torch.eye(size)[picks[:, i]] for i, size in enumerate(sizes)], -1)
    scores = factor.marginal(params[:, None], 0, factor.size).log_prob(states) + torch.randn(4, 1)
    torch.testing.assert_close(factor.mean(factor.from_scores(scores)), factor.mean(params), **EXACT)
    if name == "one chain":
        with pytest.raises(ValueError, match="sum over the steps of a chain and over neighbouring steps"):
            factor.from_scores(torch.randn(4, 81))


def test_parts_that_cut_a_chain_are_refused() -> None:
    factor = MarkovChainFactor([2, 3], 4)
    with pytest.raises(ValueError, match="Expected a part of whole chains, but got features 0 to 5"):
        factor.marginal(torch.zeros(factor.num_params), 0, 5)


def test_gradients_are_those_of_finite_differences() -> None:
    factor = MarkovChainFactor([2, 2], 3)
    params = torch.randn(2, factor.num_params, requires_grad=True)
    linear, quadratic = torch.randn(2, factor.size), couplings(factor)
    assert torch.autograd.gradcheck(lambda p: factor.objective(p, linear, quadratic), (params,))


# ---------------------------------------------------------------------- the sums that are kept

Counter = list[int]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """One entry for every pass of forward-backward."""
    made: Counter = []

    def counted(unary: Tensor, pairwise: Tensor):
        made.append(len(unary))
        return smooth(unary, pairwise)

    monkeypatch.setattr(chain_factor, "smooth", counted)
    return made


def fresh_mean(factor: MarkovChainFactor, params: Tensor) -> Tensor:
    features, probs = table(factor, params.detach())
    return probs @ features


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_over_paths_are_made_once(sums: Counter, dtype: torch.dtype) -> None:
    factor = MarkovChainFactor([3], 4)
    params = torch.randn(5, factor.num_params, dtype=dtype)
    mean = factor.mean(params)
    assert mean.dtype == dtype
    factor.entropy(params)
    factor.mean(params[:, None])
    factor.moment_sum(params)
    assert sums == [5]
    solved, chain = factor.solve_steps(*factor.potentials(params)[:1], torch.zeros(1, 1, 3, 3, dtype=dtype))
    assert factor.smooth(solved[:, None]) is chain
    assert sums == [5, 5]


def add(p: Tensor) -> None:
    p.add_(0.3 * torch.arange(p.numel()).reshape(p.shape) % 1.7)


WRITES: dict[str, Callable[[Tensor], None]] = {
    "in place": add,
    "copy": lambda p: p.copy_(torch.randn_like(p)),
    "index": lambda p: p.__setitem__((0, 3), 2.0),
    "a matrix alone": lambda p: p.__setitem__((0, -1), 2.0),
    "view": lambda p: add(p[1:]),
    "data, as pyro.optim.ClippedAdam writes": lambda p: add(p.data),
    "detached": lambda p: add(p.detach()),
    "numpy": lambda p: p.detach().numpy().__setitem__((1, 2), 5.0),
    "new storage": lambda p: setattr(p, "data", torch.randn_like(p)),
}


@pytest.mark.parametrize("way", WRITES)
def test_written_tables_have_new_sums(way: str) -> None:
    factor = MarkovChainFactor([3], 4)
    params = torch.randn(3, factor.num_params)
    old = factor.mean(params)
    WRITES[way](params)
    torch.testing.assert_close(factor.mean(params), fresh_mean(factor, params), **EXACT)
    assert not torch.equal(factor.mean(params), old)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_make_new_sums(optimizer: type[torch.optim.Optimizer]) -> None:
    factor = MarkovChainFactor([3], 4)
    params = torch.nn.Parameter(torch.randn(3, factor.num_params))
    optim = optimizer([params], lr=0.1)  # pyright: ignore[reportCallIssue]
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(factor.mean(params), fresh_mean(factor, params), **EXACT)
        factor.entropy(params).sum().backward()
        optim.step()


def test_the_parameter_store_makes_new_sums() -> None:
    factor = MarkovChainFactor([3], 4)
    table_ = pyro.param("table", torch.randn(3, factor.num_params))
    optim = ClippedAdam({"lr": 0.1})
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(factor.mean(table_), fresh_mean(factor, table_), **EXACT)
        factor.entropy(table_).sum().backward()
        optim([table_])
    with torch.no_grad():
        pyro.get_param_store()["table"] = torch.randn(3, factor.num_params)
        now = pyro.param("table")
        torch.testing.assert_close(factor.mean(now), fresh_mean(factor, now), **EXACT)
    module = torch.nn.ParameterDict({"p": torch.nn.Parameter(table_.detach().clone())})
    with torch.no_grad():
        factor.mean(module["p"])
        module.load_state_dict({"p": torch.randn(3, factor.num_params)})
        torch.testing.assert_close(factor.mean(module["p"]), fresh_mean(factor, module["p"]), **EXACT)


def test_slices_of_one_storage_have_their_own_sums() -> None:
    factor = MarkovChainFactor([3], 4)
    params = torch.randn(6, factor.num_params)
    for part in (params[:3], params[3:], params[::2], params, params.flip(0)):
        torch.testing.assert_close(factor.mean(part), fresh_mean(factor, part), **EXACT)


def test_factors_of_other_shapes_share_a_storage() -> None:
    """12 numbers are 4 steps of 2 states, 1 step of 3, or two chains of one step."""
    params = torch.randn(2, 12)
    for units, steps, homogeneous in (
        ([2], 4, True),
        ([3], 1, True),
        ([2], 2, True),
        ([1, 3], 1, True),
        ([2], 4, True),
    ):
        factor = MarkovChainFactor(units, steps, homogeneous=homogeneous)
        mine = params.flatten()[: 12 // factor.num_params * factor.num_params].reshape(-1, factor.num_params)
        torch.testing.assert_close(factor.mean(mine), fresh_mean(factor, mine), **EXACT)
    # As many numbers and steps, another number of matrices: 2 + 1 and 2 + 2 of one state.
    params = torch.randn(12)
    for steps, homogeneous in ((2, True), (3, True), (2, False), (3, False), (4, True), (1, True)):
        factor = MarkovChainFactor([1], steps, homogeneous=homogeneous)
        mine = params[: 12 // factor.num_params * factor.num_params].reshape(-1, factor.num_params)
        torch.testing.assert_close(factor.entropy(mine), torch.zeros(len(mine)), **EXACT)


def test_wanted_gradients_never_meet_kept_sums() -> None:
    factor = MarkovChainFactor([3], 4)
    params = torch.randn(3, factor.num_params, requires_grad=True)
    with torch.no_grad():
        factor.mean(params)
    assert factor.mean(params).requires_grad
    assert factor.entropy(params).requires_grad
    with torch.no_grad():
        assert not factor.mean(params).requires_grad
    assert not factor.mean(params.detach()).requires_grad


def test_inference_mode_is_served() -> None:
    factor = MarkovChainFactor([3], 4)
    with torch.inference_mode():
        params = torch.randn(3, factor.num_params)
        torch.testing.assert_close(factor.mean(params), fresh_mean(factor, params), **EXACT)


def num_kept() -> int:
    return len(chain_factor._SMOOTHED) + len(chain_factor._SOLVED._known)


def test_kept_sums_die_with_their_storage() -> None:
    factor = MarkovChainFactor([3], 4)
    gc.collect()
    before = num_kept()
    params = torch.randn(3, factor.num_params)
    factor.mean(params)
    solved, chain = factor.solve_steps(torch.randn(3, 4, 3), torch.randn(1, 1, 3, 3))
    assert num_kept() == before + 2
    view = solved[1:]
    del params, solved, chain
    gc.collect()
    assert num_kept() == before + 1
    del view
    gc.collect()
    assert num_kept() == before
