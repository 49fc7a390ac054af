"""Batches as arguments, loaders at the door, and the number of rows of a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_ext.batches import RowCounter, arguments, batches, check_loader
from pyro_ext.drivers import parts_of

V = torch.arange(12.0).reshape(6, 2)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield V


def test_arguments():
    assert arguments(V) == ((V,), {})
    assert arguments((V, 3)) == arguments([V, 3]) == ((V, 3), {})
    assert arguments(()) == ((), {})
    assert arguments(OrderedDict(v=V, size=3)) == ((), {"v": V, "size": 3})


@pytest.mark.parametrize("batch", [3.0, "v", None, np.zeros(3)])
def test_refuses_other_batches(batch):
    with pytest.raises(TypeError, match=r"Expected each batch to be a tensor, .* but got \w+\. Yield `\(x,\)`"):
        arguments(batch)


def test_refuses_keys_that_are_no_names():
    with pytest.raises(TypeError, match=r"Expected a batch's keys to be argument names, but got 1\. Use strings"):
        arguments({"v": V, 1: V})


@pytest.mark.parametrize("loader", [[V], [()], DataLoader(TensorDataset(V)), Stream(), range(0)])
def test_takes_what_can_be_read_again(loader):
    check_loader(loader, 3, "loader")


def test_takes_an_iterator_for_one_pass():
    check_loader(iter([V]), 1, "loader")


@pytest.mark.parametrize("loader", [V, (V, V), {"v": V}, "v"], ids=["tensor", "tuple", "dict", "str"])
def test_refuses_a_single_batch(loader):
    with pytest.raises(
        TypeError, match=r"Expected held_out to be an iterable of batches, .* got one \w+\. .*`\[batch\]`"
    ):
        check_loader(loader, 1, "held_out")


def test_refuses_a_data_set():
    with pytest.raises(
        TypeError, match=r"got the data set TensorDataset, which yields single rows\. Wrap it: DataLoader"
    ):
        check_loader(TensorDataset(V), 1, "loader")


def test_refuses_what_cannot_be_iterated():
    with pytest.raises(TypeError, match=r"Expected loader to be an iterable .* but got int\. Pass a list"):
        check_loader(3, 1, "loader")


def test_refuses_an_iterator_for_more_passes():
    with pytest.raises(ValueError, match=r"can be read 2 times, but got a generator, .* only once\. Pass a list"):
        check_loader((v for v in [V]), 2, "loader")


def test_refuses_an_empty_list():
    with pytest.raises(
        ValueError, match=r"Expected loader .* at least one batch, but got an empty list\. Pass `\[batch\]`"
    ):
        check_loader([], 1, "loader")


def test_refuses_a_pass_without_batches():
    spent = iter([V])
    assert len(list(batches(spent, "loader"))) == 1
    with pytest.raises(ValueError, match=r"Expected loader to yield at least one batch, but got none in this pass\."):
        list(batches(spent, "loader"))


# Rows


def counter(model, guide=None, **attributes) -> RowCounter:
    svi = SVI(model, guide or (lambda *_, **__: None), pyro.optim.Adam({}), Trace_ELBO())
    for name, value in attributes.items():
        setattr(svi, name, value)
    return RowCounter(svi, parts_of(svi))


def normal(v: Tensor) -> None:
    with pyro.plate("data", len(v)):
        pyro.sample("v", dist.Normal(pyro.param("loc", torch.randn(2)), 1.0).to_event(1), obs=v)


def test_counts_the_common_plates():
    def model(v: Tensor) -> None:
        with pyro.plate("data", 6, dim=-2), pyro.plate("pixel", 2, dim=-1):
            pyro.sample("v", dist.Normal(pyro.sample("h", dist.Normal(0.0, 1.0)), 1.0), obs=v)

    assert counter(normal).count((V,), {}) == 6
    assert counter(normal).count((), {"v": V[:4]}) == 4
    rows = counter(model, AutoNormal(model))
    assert rows.count((V,), {}) == 12
    assert not rows.in_total


def test_a_global_latent_or_a_sequential_plate_makes_one_row():
    def shared(v: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(loc, 1.0), obs=v)

    def sequential(v: Tensor) -> None:
        for i in pyro.plate("data", len(v)):
            pyro.sample(f"v_{i}", dist.Normal(0.0, 1.0), obs=v[i])

    for model in (shared, sequential):
        rows = counter(model, AutoNormal(model) if model is shared else None)
        assert rows.count((V[:, 0],), {}) == 1
        assert rows.in_total


def test_a_subsampled_plate_counts_in_full_for_its_scale_is_in_the_loss():
    def model(v: Tensor) -> None:
        with pyro.plate("data", 60, subsample_size=6) as index:
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=v[index])

    assert counter(model).count((torch.zeros(60),), {}) == 60


def test_an_improper_prior_is_no_obstacle():
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(pyro.param("m", torch.zeros(6)), 1.0))

    assert counter(model, guide).count((V[:, 0],), {}) == 6


def test_enumerated_sites_are_no_obstacle():
    @config_enumerate
    def model(v: Tensor) -> None:
        with pyro.plate("data", len(v)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("v", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=v)

    svi = SVI(model, config_enumerate(lambda v: None), pyro.optim.Adam({}), TraceEnum_ELBO(max_plate_nesting=1))
    assert RowCounter(svi, ()).count((V[:, 0],), {}) == 6


def test_counting_changes_nothing():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, v: Tensor) -> None:
            pyro.module("normed", self)
            normal(self.norm(v))

    module = Normed()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    assert counter(module).count((V,), {}) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_the_model_runs_once_for_each_shape():
    calls = []

    def model(v: Tensor, options: object = None) -> None:
        calls.append(1)
        normal(v)

    rows = counter(model)
    assert not rows.is_cached((V,), {})
    for _ in range(3):
        assert rows.count((V,), {}) == 6
        assert rows.count((V + 1.0,), {"options": [1, {"a": "b"}]}) == 6
        assert rows.count((V[:4],), {}) == 4
    assert rows.is_cached((V,), {})
    assert len(calls) == 3
    # An argument of unknown kind may decide on the rows: no caching.
    for _ in range(2):
        assert rows.count((V, object()), {}) == 6
    assert len(calls) == 5


def test_a_driver_that_counts_for_itself_is_asked():
    rows = counter(normal, num_rows=lambda v, scale: scale * len(v))
    assert rows.is_cached((V,), {})
    assert rows.count((V,), {"scale": 2}) == 12


def test_a_driver_without_a_model_has_its_loss_in_total():
    rows = RowCounter(SimpleNamespace(), ())
    assert rows.is_cached((V,), {})
    assert rows.count((V,), {}) == 1
    assert rows.in_total
