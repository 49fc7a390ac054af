from __future__ import annotations

import pytest
import torch

from pyro_ext.provenance import Provenance, get, put


def recipes(transform, x, indices=None):
    with Provenance() as provenance:
        provenance.add_source(("x",), x)
        for name, value in (indices or {}).items():
            provenance.add_plate(name, value)
        y = transform(x)
    return y, provenance.trace(y)


MOVES = {
    "as it is": lambda x: x,
    "view": lambda x: x.view(2, 2, 6)[:, 1, ::2],
    "clone": lambda x: x.clone(),
    "conversion": lambda x: x.double(),
    "transposed reshape": lambda x: x.T.reshape(2, 12),
    "index": lambda x: x[[2, 0], [1, 5]],
    "index in the middle": lambda x: x.view(2, 2, 6)[:, torch.tensor([1])],
    "boolean": lambda x: x[torch.tensor([True, False, False, True])],
    "index_select": lambda x: x.index_select(1, torch.tensor([4, 0, 1])),
    "gather": lambda x: x.gather(0, torch.tensor([[3, 0, 1, 1, 2, 0]])),
    "flip": lambda x: x.flip(0, 1),
    "chain": lambda x: x.double().flip(1)[[3, 1]].T[2:].contiguous()[0],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_what_is_put_is_got(move):
    x = torch.arange(24.0).reshape(4, 6)
    y, ((path, steps),) = recipes(move, x)
    assert path == ("x",)
    assert torch.equal(get(steps, x, {}), y)
    other = torch.randn(4, 6)
    assert torch.equal(get(steps, other, {}), move(other))
    value = torch.randn(y.shape).to(y.dtype)
    put(steps, other, value, {})
    assert torch.equal(move(other), value)
    # Nothing but the elements read is written.
    put(steps, x, torch.full_like(y, -1.0), {})
    assert int((x == -1).sum()) == y.numel()


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x + 1,
        lambda x: torch.zeros(4, 6),
        lambda x: x.view(torch.int32),
        lambda x: x.expand(0, 4, 6),
        torch.sin,
    ],
    ids=["sum", "other", "bits", "empty", "sine"],
)
def test_arithmetic_ends_a_recipe(transform):
    assert recipes(transform, torch.randn(4, 6))[1] == []


def test_a_wider_view_is_not_inside():
    base = torch.randn(6, 4)
    with Provenance() as provenance:
        provenance.add_source(("rows",), base[2:4])
        provenance.add_source(("column",), base[:, 1])
        provenance.add_source(("repeated",), base[0, 0].expand(3))
    assert provenance.trace(base) == []
    assert [path for path, _ in provenance.trace(base[3])] == [("rows",)]
    assert [path for path, _ in provenance.trace(base[2:4, 1])] == [("rows",), ("column",)]
    assert [path for path, _ in provenance.trace(base[4:, 1])] == [("column",)]
    assert [path for path, _ in provenance.trace(base[0, 0])] == [("repeated",)]


def test_the_indices_of_a_plate_are_left_open():
    ind = torch.tensor([3, 1])
    x = torch.randn(5, 2)
    _, ((_, steps),) = recipes(lambda x: x[ind], x, {"data": ind})
    assert steps[0].plates == {"data"}
    assert steps[0].is_static
    assert torch.equal(get(steps, x, {"data": torch.tensor([0, 4])}), x[[0, 4]])
    _, ((_, steps),) = recipes(lambda x: x[ind + 1], x, {"data": ind})
    assert not steps[0].plates
    assert not steps[0].is_static


@pytest.mark.parametrize(("dim", "select"), [(0, lambda x, i: x[i]), (1, lambda x, i: x.index_select(1, i))])
def test_what_a_plate_leaves_out_repeats_what_it_takes(dim, select):
    ind = torch.tensor([3, 1])
    x = torch.randn(5, 5)
    _, ((_, steps),) = recipes(lambda x: select(x, ind), x, {"data": ind})
    target = torch.full((5, 5), torch.nan)
    value = torch.randn(2, 5) if dim == 0 else torch.randn(5, 2)
    put(steps, target, value, {"data": ind})
    assert torch.equal(target, value.index_select(dim, torch.tensor([0, 1, 0, 0, 0])))
