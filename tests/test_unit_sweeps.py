"""Sweeps over binary units in their own layout: the general sweep unit by unit is the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyro_ext.blocks import Block
from pyro_ext.evaluators import Evaluator, Quadratic
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding
from pyro_ext.program import Program
from pyro_ext.quadratic import QuadraticForm, quadratic_form
from pyro_ext.unit_sweeps import UnitSweeps

pytestmark = pytest.mark.usefixtures("float64")


def evaluator(num_rows: int = 9, num_latents: int = 5) -> Quadratic:
    model = BinarySparseCoding(num_visible=6, num_latents=num_latents)
    program = Program(model, (model.dream(num_rows),), {})
    return Quadratic(quadratic_form(program), MeanField(model).make_blocks(program))


def plain_bound(form: QuadraticForm, logits: Tensor) -> Tensor:
    """L of (19.42) by the book: every term written out."""
    mean = logits.sigmoid()
    second = mean[:, :, None] * mean[:, None, :]
    second.diagonal(dim1=-2, dim2=-1).copy_(mean)
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1)
    return form.constant + (form.linear * mean).sum(-1) + 0.5 * (form.coupling * second).sum((-1, -2)) + entropy


@pytest.mark.parametrize(("num_rows", "num_latents"), [(9, 5), (1, 4), (3, 1), (2, 8)])
def test_a_sweep_is_the_general_one(num_rows: int, num_latents: int) -> None:
    quadratic = evaluator(num_rows, num_latents)
    (block,) = quadratic.blocks
    params = {block.name: torch.randn(num_rows, 1, num_latents)}
    for _ in range(3):
        kept = params[block.name].clone()
        new, old = quadratic.sweep(params), quadratic._sweep_groups(params)
        torch.testing.assert_close(new[block.name], old[block.name], rtol=1e-10, atol=1e-10)
        assert torch.equal(params[block.name], kept)
        torch.testing.assert_close(quadratic.means(new), Evaluator.means(quadratic, new), rtol=1e-12, atol=1e-12)
        bound = quadratic.bound(new)
        torch.testing.assert_close(bound, plain_bound(quadratic.form, new[block.name][:, 0]), rtol=1e-10, atol=1e-10)
        params = new


def test_the_bound_is_that_of_any_logits() -> None:
    quadratic = evaluator()
    (block,) = quadratic.blocks
    logits = 3 * torch.randn(9, 5)
    found = quadratic.bound({block.name: logits[:, None]})
    torch.testing.assert_close(found, plain_bound(quadratic.form, logits), rtol=1e-10, atol=1e-10)
    # Logits out of reach of the precision are limited, not NaN.
    far = torch.full((9, 5), 1e6)
    limited = block.factor.logits(far)
    assert torch.equal(quadratic.bound({block.name: far[:, None]}), quadratic.bound({block.name: limited[:, None]}))


def test_sweeps_never_lower_the_bound_and_end_where_no_unit_moves() -> None:
    quadratic = evaluator(20, 7)
    (block,) = quadratic.blocks
    params = {block.name: torch.zeros(20, 1, 7)}
    bounds = [quadratic.bound(params)]
    for _ in range(200):
        params = quadratic.sweep(params)
        bounds.append(quadratic.bound(params))
    assert all(bool((b >= a - 1e-10).all()) for a, b in itertools.pairwise(bounds))
    means = quadratic.means(params)
    coupling = quadratic.form.coupling
    field = quadratic.form.linear + means @ (coupling - coupling.diagonal().diag()) + 0.5 * coupling.diagonal()
    torch.testing.assert_close(means, field.sigmoid(), rtol=1e-8, atol=1e-8)


def test_means_of_other_parameters_are_not_those_of_the_last_sweep() -> None:
    quadratic = evaluator()
    (block,) = quadratic.blocks
    swept = quadratic.sweep({block.name: torch.zeros(9, 1, 5)})
    truth = quadratic.means(swept).clone()
    other = {block.name: swept[block.name] + 1}
    torch.testing.assert_close(quadratic.means(other), other[block.name][:, 0].sigmoid())
    quadratic.coloured_sweep(swept)
    assert torch.equal(quadratic.means(swept), truth)


def test_features_in_another_order_keep_their_places() -> None:
    """A block may hold its features in another order than the rows' vectors do."""
    quadratic = evaluator()
    (block,) = quadratic.blocks
    order = [3, 1, 4, 0, 2]
    turned = Quadratic(quadratic.form, [Block(block.name, ((block.site, tuple(order)),), block.factor)])
    params = {block.name: torch.randn(9, 1, 5)}
    new = turned.sweep(params)
    torch.testing.assert_close(new[block.name], turned._sweep_groups(params)[block.name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned.means(new)[:, order], new[block.name][:, 0].sigmoid(), rtol=1e-10, atol=1e-10)
    logits = torch.empty(9, 5)
    logits[:, order] = new[block.name][:, 0]
    torch.testing.assert_close(turned.bound(new), plain_bound(turned.form, logits), rtol=1e-10, atol=1e-10)


def test_one_unit_is_the_logistic_of_its_field() -> None:
    units = UnitSweeps.of(torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.8]]))
    logits, means = units.sweep(torch.zeros(2, 1))
    torch.testing.assert_close(logits, torch.tensor([[0.9], [-0.6]]))
    torch.testing.assert_close(means, logits.sigmoid())
    # One unit's L is log(1 + e^field).
    torch.testing.assert_close(units.bound(logits), torch.nn.functional.softplus(logits[:, 0]))


def test_forms_with_a_graph_keep_it() -> None:
    quadratic = evaluator()
    form = quadratic.form
    linear = form.linear.clone().requires_grad_()
    graphed = Quadratic(QuadraticForm(form.constant, linear, form.coupling, form.layout), quadratic.blocks)
    params = {quadratic.blocks[0].name: torch.randn(9, 1, 5)}
    (found,) = torch.autograd.grad(graphed.bound(params).sum(), linear)
    torch.testing.assert_close(found, params[quadratic.blocks[0].name][:, 0].sigmoid())
