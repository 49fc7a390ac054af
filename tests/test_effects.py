"""EffectsOutside: backward passes noted, numbers kept as tensors, Pyro's own looks answered."""

from __future__ import annotations

import warnings

import pyro.util
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.effects import DataDependentError, EffectsOutside


def weight() -> Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True)


def test_backward_passes_add_up() -> None:
    w = weight()
    with EffectsOutside() as effects:
        w.square().sum().backward()
        (3 * w).backward(torch.tensor([1.0, -1.0]), retain_graph=True)
    assert w.grad is None
    assert effects.surrogate is not None
    (grad,) = torch.autograd.grad(effects.surrogate, w)
    assert grad.tolist() == [2 + 3, 4 - 3]


def test_without_a_backward_pass_there_is_no_surrogate() -> None:
    with EffectsOutside() as effects:
        assert weight().detach().sum().item() == 3
    assert effects.surrogate is None


def test_backward_to_chosen_inputs_is_refused() -> None:
    w = weight()
    with (
        EffectsOutside(),
        pytest.raises(DataDependentError, match=r"backward\(inputs=\.\.\.\) has no place in a graph"),
    ):
        w.sum().backward(inputs=[w])


def test_item_is_a_tensor_only_while_it_stands_for_others() -> None:
    kinds = []

    def function(x: Tensor) -> Tensor:
        with EffectsOutside():
            number = x.sum().item()
            kinds.append((type(number), type(torch.tensor(2.0).item())))
            return x * number

    graph = make_fx(function)(torch.tensor([1.0, 2.0]))
    assert kinds == [(Tensor, float)]
    assert graph(torch.tensor([1.0, 4.0])).tolist() == [5.0, 20.0]


@pytest.mark.parametrize(
    ("look", "name"),
    [
        (bool, "a Python branch"),
        (int, r"int\(\)"),
        (float, r"float\(\)"),
        (lambda x: x.tolist(), r"tolist\(\)"),
        (lambda x: x.detach().numpy(), r"numpy\(\)"),
        (lambda x: torch.equal(x, x), r"equal\(\)"),
        (lambda x: range(3)[x.long()], r"int\(\)"),
    ],
)
def test_looks_at_values_are_refused_with_their_place(look: object, name: str) -> None:
    def function(x: Tensor) -> Tensor:
        with EffectsOutside():
            look(x.sum())  # type: ignore[operator]
        return x

    with pytest.raises(DataDependentError, match=rf"test_effects\.py:\d+ looks at the value of a tensor by {name}"):
        make_fx(function)(torch.tensor([1.0, 1.0]))


def test_pyros_looks_for_nan_pass_and_its_hooks_are_left_out() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        w = x.clone().requires_grad_()
        with EffectsOutside() as effects, warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = (w * torch.nan).sum()
            pyro.util.warn_if_nan(loss, "loss")
            loss.backward()
            assert effects.surrogate is not None
            return torch.autograd.grad(effects.surrogate, w)

    (grad,) = make_fx(function)(torch.tensor([1.0]))(torch.tensor([1.0]))
    assert bool(grad.isnan().all())


def test_hooks_of_others_are_kept() -> None:
    w = weight()
    with EffectsOutside() as effects:
        value = 2 * w
        value.register_hook(lambda grad: 10 * grad)
        value.sum().backward()
    assert effects.surrogate is not None
    assert torch.autograd.grad(effects.surrogate, w)[0].tolist() == [20.0, 20.0]
