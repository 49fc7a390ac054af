"""Where the features of a row stand."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_ext.layout import Layout
from pyro_ext.program import Program


def rows_right(v: Tensor) -> None:
    """Rows at dim -1 (5), inner plate at dim -2 (3)."""
    with pyro.plate("rows", 5, dim=-1):
        a = pyro.sample("a", dist.OneHotCategorical(torch.ones(4)))
        with pyro.plate("inner", 3, dim=-2):
            c = pyro.sample("c", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(a.sum(-1) + c.sum(-1), 1.0), obs=v)


def rows_left(v: Tensor) -> None:
    """Rows at dim -2 (5), inner plate at dim -1 (3)."""
    with pyro.plate("rows", 5, dim=-2):
        a = pyro.sample("a", dist.OneHotCategorical(torch.ones(4)))
        with pyro.plate("inner", 3, dim=-1):
            c = pyro.sample("c", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("v", dist.Normal(a.sum(-1) + c.sum(-1), 1.0), obs=v)


def two_row_plates(v: Tensor) -> None:
    """Rows in two plates (5 x 3), no inner plate."""
    with pyro.plate("rows", 5, dim=-2), pyro.plate("inner", 3, dim=-1):
        a = pyro.sample("a", dist.OneHotCategorical(torch.ones(4)))
        c = pyro.sample("c", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("v", dist.Normal(a.sum(-1) + c.sum(-1), 1.0), obs=v)


CASES = [
    pytest.param(rows_right, (3, 5), (5, 1, 3), id="rows at -1"),
    pytest.param(rows_left, (5, 3), (5, 1, 3), id="rows at -2"),
    pytest.param(two_row_plates, (5, 3), (15, 1, 1), id="two row plates"),
]


def layout_of(model: Callable[..., None], shape: tuple[int, int]) -> Layout:
    program = Program(model, (torch.zeros(shape),), {})
    return Layout(program.rows, program.latents)


@pytest.mark.parametrize(("model", "shape", "sizes"), CASES)
def test_rows_and_batches_are_one_to_one(
    model: Callable[..., None], shape: tuple[int, int], sizes: tuple[int, int, int]
) -> None:
    layout = layout_of(model, shape)
    count, *copies = sizes
    assert layout.num_features == copies[0] * 4 + copies[1] * 2
    for site, number in zip(layout.sites, copies, strict=True):
        value = torch.randn(site.batch_shape + (site.num_features,))
        rows = layout.to_rows(value, site)
        assert rows.shape == (count, number, site.num_features)
        assert torch.equal(layout.from_rows(rows, site), value)
        led = torch.randn((7,) + rows.shape)
        batched = layout.from_rows(led, site)
        assert batched.dim() == 1 + layout.rows.nesting + 1
        assert torch.equal(layout.to_rows(batched, site), led)


@pytest.mark.parametrize(("model", "shape", "sizes"), CASES)
def test_values_are_split_and_joined(
    model: Callable[..., None], shape: tuple[int, int], sizes: tuple[int, int, int]
) -> None:
    layout = layout_of(model, shape)
    values = {site.name: site.fn.sample() for site in layout.sites}
    flat = layout.flatten(values)
    assert flat.shape == (sizes[0], layout.num_features)
    again = layout.values(flat)
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_elements_stand_in_the_row_that_they_belong_to() -> None:
    layout = layout_of(rows_right, (3, 5))
    site = layout.sites[1]
    value = torch.arange(30.0).reshape(3, 5, 2)
    rows = layout.to_rows(value, site)
    assert all(torch.equal(rows[n, m], value[m, n]) for n in range(5) for m in range(3))
    assert layout.indices(site, [1]).tolist() == [[5], [7], [9]]
    flat = torch.cat([torch.zeros(5, 4), rows.reshape(5, -1)], -1)
    assert torch.equal(flat[:, layout.indices(site, [0, 1])], rows)


def test_unexpanded_parameters_are_spread_over_rows_and_copies() -> None:
    layout = layout_of(rows_left, (5, 3))
    site = layout.sites[1]
    shared = torch.randn(2)
    assert torch.equal(layout.to_rows(shared, site), shared.expand(5, 3, 2))
