from __future__ import annotations

from collections import OrderedDict, namedtuple
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule

from pyro_ext.call_arguments import argument_names, label_of, leaves_of, root_of, signature_of, with_leaves

Pair = namedtuple("Pair", ["x", "y"])


class Module(PyroModule):
    def forward(self, v, *, size=None):
        pass


def function(x, y=None, *rest, mask=None, **more):
    pass


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "expected"),
    [
        (function, (), {}, ["x", "y", "mask"]),
        (function, (1, 2, 3), {"z": 4}, ["x", "y", 2, "mask", "z"]),
        (Module(), (1,), {"size": 2}, ["v", "size"]),
        (Module().forward, (), {}, ["v", "size"]),
        (poutine.block(poutine.scale(Module(), scale=2.0)), (), {}, ["v", "size"]),
        (pyro.plate("particles", 3)(function), (), {}, ["x", "y", "mask"]),
        (partial(function, 1), (2,), {}, ["y", "mask"]),
        (partial(function, 1, 2), (), {}, ["mask"]),
        (dict.fromkeys, (1, 2), {}, ["iterable", "value"]),
        (type, (1,), {"a": 2}, [0, "a"]),
    ],
)
def test_names(fn, args, kwargs, expected):
    assert argument_names(fn, args, kwargs) == expected


def test_leaves_are_replaced_in_copies():
    args = ([1, (2, Pair(3, {"a": 4}))], OrderedDict(b=[5]))
    leaves = leaves_of(args, {"k": 6})
    assert list(leaves.values()) == [1, 2, 3, 4, 5, 6]
    new, kwargs = with_leaves(args, {"k": 6}, {path: -leaf for path, leaf in leaves.items() if leaf in (1, 4, 6)})
    assert new == ([-1, (2, Pair(3, {"a": -4}))], OrderedDict(b=[5]))
    assert kwargs == {"k": -6}
    assert new[1] is args[1]
    assert args == ([1, (2, Pair(3, {"a": 4}))], OrderedDict(b=[5]))


def test_labels_and_roots():
    names = ["x", 1]
    assert [label_of(p, names) for p in (("args", 0, "a", 2), ("args", 1), ("kwargs", "k", 0))] == [
        "x['a'][2]",
        "args[1]",
        "k[0]",
    ]
    assert root_of("x", (1, 2), {}, names) == root_of(0, (1, 2), {}, names) == ("args", 0)
    assert root_of("x", (), {"x": 1}, names) == ("kwargs", "x")
    with pytest.raises(
        ValueError, match=r"an argument of the call, one of \['x', 'k'\] or a position below 1, but got 'y'"
    ):
        root_of("y", (1,), {"k": 2}, names)


def test_signatures_tell_layouts_apart_and_not_data():
    x, y = torch.randn(4, 4), torch.randn(4, 4)

    def signature(*args, **kwargs):
        return signature_of(args, kwargs)

    assert signature(x, 0.1) == signature(y, 0.2)
    different = [
        (x, 1),
        (x, 2),
        (x, True),
        (x.T, 1),
        (x[1:], 1),
        (x.double(), 1),
        ([x], 1),
        (x, x),
        (x, y),
        (x.to_sparse(),),
    ]
    assert len({signature(*args) for args in different}) == len(different)
    assert signature(x=x) != signature(y=x)
    unhashable = torch.zeros(1).numpy()
    assert signature(unhashable) == signature(unhashable)
