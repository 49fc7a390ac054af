"""What is remembered of a tensor: given back for the same numbers, and for no others."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from pyro_ext.discrete_factors import JointFactor, OneHotFactor
from pyro_ext.factors import Factor
from pyro_ext.memo import Memo

pytestmark = pytest.mark.usefixtures("float64")

OF = (2, 3)


def remembered() -> tuple[Memo[str], Tensor]:
    memo: Memo[str] = Memo()
    params = torch.randn(4, 6)
    memo.set(params, "found", OF)
    return memo, params


def test_views_of_the_same_numbers_share_a_result() -> None:
    memo, params = remembered()
    for view in (params, params[:, None], params.reshape(2, 12), params.detach(), params.view(-1)):
        assert memo.get(view, OF) == "found"


def test_other_numbers_do_not() -> None:
    memo, params = remembered()
    for other in (params[:2], params[1:], params.mT, params[:, :3], params.clone(), params.float(), -params):
        assert memo.get(other, OF) is None
    assert memo.get(params, (3, 2)) is None
    # As many numbers of the same memory, at another place or in another order.
    square = torch.randn(4, 4)
    memo.set(square[:2], "upper", OF)
    assert memo.get(square[2:], OF) is None
    memo.set(square, "square", OF)
    assert memo.get(square.mT, OF) is None
    assert memo.get(square[:2], OF) is None


@pytest.mark.parametrize("through", ["itself", "a view", "detached", "a later result"])
def test_a_write_ends_it(through: str) -> None:
    memo, params = remembered()
    if through == "itself":
        params.mul_(2)
    elif through == "a view":
        params[0, 0] = 1.0
    elif through == "detached":
        params.detach().zero_()
    else:
        torch.add(params, 1.0, out=params)
    assert memo.get(params, OF) is None
    memo.set(params, "new", OF)
    assert memo.get(params, OF) == "new"


def test_nothing_is_given_where_a_gradient_is_wanted() -> None:
    memo, params = remembered()
    params.requires_grad_()
    assert memo.get(params, OF) is None
    with torch.no_grad():
        assert memo.get(params, OF) == "found"
    with torch.inference_mode():
        inside = torch.randn(3)
        memo.set(inside, "inference", OF)
        assert memo.get(inside, OF) is None


def test_results_go_with_the_memory() -> None:
    memo: Memo[Tensor] = Memo()
    for number in range(200):
        params = torch.full((64,), float(number))
        assert memo.get(params, OF) is None
        memo.set(params, params.clone(), OF)
        found = memo.get(params, OF)
        assert found is not None
        assert torch.equal(found, params)
    view = params[None]
    del params
    gc.collect()
    assert memo.get(view, OF) is not None
    del view
    gc.collect()
    assert len(memo._known) == 0


FACTORS = [OneHotFactor(1, 5), JointFactor([1, 1, 3])]


@pytest.mark.parametrize("factor", FACTORS, ids=["one-hot", "joint"])
def test_a_solution_tells_what_its_copy_tells(factor: Factor) -> None:
    """Sums that E-step, M-step and ledger share against those computed anew."""
    linear, root = torch.randn(7, factor.size), torch.randn(factor.size, factor.size)
    quadratic = 0.1 * (root + root.mT)
    params, value = factor.solve(linear, quadratic)
    fresh = params.clone()
    other_linear = torch.randn(7, factor.size)

    def check() -> None:
        for known, anew in (
            (factor.mean(params), factor.mean(fresh)),
            (factor.entropy(params), factor.entropy(fresh)),
            (factor.objective(params, linear, quadratic), factor.objective(fresh, linear, quadratic)),
            (factor.objective(params, other_linear, root), factor.objective(fresh, other_linear, root)),
            (factor.second_moment(params, quadratic), factor.second_moment(fresh, quadratic)),
            (factor.moment_sum(params), factor.moment_sum(fresh)),
        ):
            torch.testing.assert_close(known, anew, rtol=1e-10, atol=1e-10)

    check()
    torch.testing.assert_close(value, factor.objective(fresh, linear, quadratic), rtol=1e-10, atol=1e-10)
    # The value is log sum exp: no other q does better.
    for _ in range(5):
        assert bool((factor.objective(fresh + 0.1 * torch.randn_like(fresh), linear, quadratic) < value).all())
    params[2] = torch.randn(factor.num_params)
    params.mul_(0.5)
    fresh = params.clone()
    check()


@pytest.mark.parametrize("factor", FACTORS, ids=["one-hot", "joint"])
def test_what_is_remembered_hides_no_gradient(factor: Factor) -> None:
    linear, quadratic = torch.randn(3, factor.size), torch.zeros(factor.size, factor.size)
    params, _ = factor.solve(linear, quadratic)
    params.requires_grad_()
    (found,) = torch.autograd.grad(factor.entropy(params).sum() + factor.mean(params)[:, 0].sum(), params)
    anew = params.detach().clone().requires_grad_()
    (truth,) = torch.autograd.grad(factor.entropy(anew).sum() + factor.mean(anew)[:, 0].sum(), anew)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert bool(found.abs().max() > 1e-3)
