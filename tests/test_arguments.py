from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.arguments import find_visible
from pyro_ext.sandbox import plate_indices


class VAE(nn.Module):
    """The model of Pyro's VAE tutorial, with the reshape inside ``obs=``."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 784)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], 2)))
            z = pyro.sample("latent", dist.Normal(z_loc, 1.0).to_event(1))
            loc = torch.sigmoid(self.decoder(z))
            pyro.sample("obs", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=x.reshape(-1, 784))
            return loc


def hmm(data):
    """Time slices of one argument, a site each; data has shape (N, T, D)."""
    with pyro.plate("sequences", data.shape[0]):
        h = 0
        for t in range(data.shape[1]):
            h = pyro.sample(f"h_{t}", dist.Bernoulli(0.3 + 0.4 * torch.as_tensor(h, dtype=data.dtype)))
            pyro.sample(
                f"v_{t}", dist.Normal(h.unsqueeze(-1).expand(-1, data.shape[2]), 1.0).to_event(1), obs=data[:, t]
            )


def padded_hmm(sequences, lengths, batch_size=None):
    """The loop of Pyro's HMM examples: a subsample of padded sequences, tones in an inner plate."""
    with pyro.plate("sequences", len(sequences), batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        tones = pyro.plate("tones", sequences.shape[-1], dim=-1)
        for t in range(int(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                pyro.sample(f"x_{t}", dist.Bernoulli(0.5))
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(0.5), obs=sequences[batch, t])


def subsampled(x, batch_size):
    with pyro.plate("data", len(x), subsample_size=batch_size) as ind:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h.unsqueeze(-1).expand(-1, x.shape[1]), 1.0).to_event(1), obs=x[ind])


def observing(transform):
    """A model that observes some function of its argument, in a plate over the rows of the result."""

    def model(x):
        value = transform(x)
        with pyro.plate("data", len(value)):
            pyro.sample("v", dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim() - 1), obs=value)

    return model


def observed(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and s["is_observed"]}, trace


# ---------------------------------------------------------------------------------------------- found


def test_found_in_the_vae_of_pyro():
    vae = VAE()
    x = torch.rand(5, 1, 28, 28).round()
    found = find_visible(vae.model, (x,), {})
    assert found.arguments == {"obs": "x"}
    other = torch.rand(3, 1, 28, 28).round()
    assert torch.equal(found.read("obs", (other,), {}), other.reshape(3, 784))
    dream = torch.rand(3, 784).round()
    (dreamt,), kwargs = found.write({"obs": dream}, (other,), {})
    assert kwargs == {}
    assert torch.equal(dreamt, dream.reshape(3, 1, 28, 28))


def test_found_in_a_time_sliced_hmm():
    data = torch.randn(4, 6, 3)
    found = find_visible(hmm, (data,), {})
    assert found.arguments == {f"v_{t}": "data" for t in range(6)}
    other = torch.randn(2, 8, 3)
    assert all(torch.equal(found.read(f"v_{t}", (other,), {}), other[:, t]) for t in range(8))
    dreams = {f"v_{t}": torch.randn(2, 3) for t in range(8)}
    (dreamt,), _ = found.write(dreams, (other,), {})
    assert torch.equal(dreamt, torch.stack(list(dreams.values()), 1))


def test_found_in_a_subsampled_program():
    x = torch.randn(20, 3)
    found = find_visible(subsampled, (x, 4), {})
    assert found.arguments == {"v": "x"}
    ind = torch.tensor([7, 0, 19, 3])
    assert torch.equal(found.read("v", (x, 4), {}, {"data": ind}), x[ind])
    values, trace = observed(subsampled, x, 4)
    assert torch.equal(found.read("v", (x, 4), {}, plate_indices(trace)), values["v"])
    other = torch.randn(9, 3)
    assert torch.equal(found.read("v", (other, 2), {}, {"data": torch.tensor([8, 1])}), other[[8, 1]])
    with pytest.raises(ValueError, match=r"Expected the indices of the subsampled plate 'data'.*indices=\{'data'"):
        found.read("v", (x, 4), {})


def test_the_rows_of_a_full_plate_need_no_indices():
    x = torch.randn(6, 3)
    found = find_visible(subsampled, (x, None), {})
    assert torch.equal(found.read("v", (x, None), {}), x)


def test_the_rows_of_an_explicit_subsample_are_those_of_the_model():
    def model(x, rows):
        with pyro.plate("data", len(x), subsample=rows) as ind:
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[ind])

    x = torch.randn(10)
    found = find_visible(model, (x, torch.tensor([1, 2])), {})
    for rows in (torch.tensor([1, 2]), torch.tensor([9, 4])):
        assert torch.equal(found.read("v", (x, rows), {}), x[rows])


def test_found_in_padded_sequences():
    sequences, lengths = torch.rand(10, 6, 3).round(), torch.tensor([3, 4, 4, 2, 1, 3, 4, 2, 3, 4])
    found = find_visible(padded_hmm, (sequences, lengths), {"batch_size": 4})
    assert set(found.arguments.values()) == {"sequences"}
    ind = {"sequences": torch.tensor([7, 1, 3, 5])}
    assert torch.equal(found.read("y_2", (sequences, lengths), {"batch_size": 4}, ind), sequences[ind["sequences"], 2])
    # The same shapes, but longer: the contents of an integer argument count.
    read = found.read("y_5", (sequences, lengths + 2), {"batch_size": 4}, {"sequences": torch.tensor([1, 2, 3, 4])})
    assert torch.equal(read, sequences[[1, 2, 3, 4], 5])


TRANSFORMS = {
    "same object": lambda x: x,
    "detached": lambda x: x.detach(),
    "slice": lambda x: x[1:],
    "strided": lambda x: x[::2, 1::2],
    "transposed": lambda x: x.T,
    "transposed copy": lambda x: x.T.reshape(-1),
    "converted": lambda x: x.double(),
    "converted, then sliced": lambda x: x.double()[:, 1],
    "copied": lambda x: x.clone()[2:].contiguous(),
    "list of rows": lambda x: x[[3, 0, 2]],
    "boolean rows": lambda x: x[x[:, 0] > 0],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "gathered": lambda x: x.gather(1, torch.tensor([[3], [0], [1], [2]])),
    "flipped": lambda x: x.flip(0, 1),
    "through numpy": lambda x: torch.from_numpy(x.numpy()),
    "arithmetic that changes nothing": lambda x: x * 1.0,
    "arithmetic after conversion": lambda x: x.double() + 0.0,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided argument"])
def test_read_and_write_undo_what_the_program_does(transform, contiguous):
    model = observing(transform)
    x = torch.randn(4, 5).T[:4].T.contiguous() if contiguous else torch.randn(10, 8)[::2].T[::2]
    x[0, 0] = 1.0
    before = x.clone()
    found = find_visible(model, (x,), {})
    assert found.arguments == {"v": "x"}
    values, _ = observed(model, x)
    assert torch.equal(found.read("v", (x,), {}), values["v"])
    dream = (torch.rand(values["v"].shape) + 1.0).to(values["v"].dtype)
    (dreamt,), _ = found.write({"v": dream}, (x,), {})
    assert torch.equal(x, before)
    again, _ = observed(model, dreamt)
    assert torch.equal(again["v"].float(), dream.float())


def test_a_new_batch_size_is_a_new_view():
    model = observing(lambda x: x.reshape(len(x), -1)[:, 1:])
    found = find_visible(model, (torch.randn(4, 2, 3),), {})
    for size in (1, 7, 4):
        x = torch.randn(size, 2, 3)
        assert torch.equal(found.read("v", (x,), {}), x.reshape(size, 6)[:, 1:])


def test_selection_by_the_content_of_an_argument_is_not_remembered():
    def model(x, order, threshold):
        with pyro.plate("data", len(x)):
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[order])
        pyro.sample("w", dist.Normal(0.0, 1.0), obs=x[int((threshold > 0).sum())])

    x, order = torch.randn(4), torch.tensor([3, 2, 1, 0])
    found = find_visible(model, (x, order, torch.zeros(1)), {})
    other = torch.tensor([1, 0, 3, 2])
    assert torch.equal(found.read("v", (x, other, torch.zeros(1)), {}), x[other])


def test_a_slice_by_the_content_of_an_argument_is_not_remembered():
    def model(x, start):
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[start.item()])

    x = torch.randn(4)
    found = find_visible(model, (x, torch.tensor(1)), {})
    for start in (0, 3, 1):
        assert found.read("v", (x, torch.tensor(start)), {}) == x[start]


def test_found_by_keyword_and_without_names():
    def model(*args, mask=None, **kwargs):
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=args[1])
        pyro.sample("w", dist.Normal(0.0, 1.0), obs=kwargs["w"])

    v, w = torch.tensor(0.3), torch.tensor(0.4)
    found = find_visible(model, (torch.tensor(0.1), v), {"w": w})
    assert found.arguments == {"v": "args[1]", "w": "w"}
    args, kwargs = found.write({"v": torch.tensor(1.0), "w": torch.tensor(2.0)}, (torch.tensor(0.1), v), {"w": w})
    assert args[1] == 1.0
    assert kwargs == {"w": torch.tensor(2.0)}


Batch = namedtuple("Batch", ["x", "y"])


def test_found_inside_containers():
    def model(data, pair, batch):
        for i, value in enumerate(data["series"]):
            pyro.sample(f"v_{i}", dist.Normal(0.0, 1.0), obs=value)
        pyro.sample("a", dist.Normal(0.0, 1.0), obs=pair[1])
        pyro.sample("b", dist.Normal(batch.x, 1.0), obs=batch.y)

    args = (
        {"series": [torch.tensor(0.1), torch.tensor(0.2)], "beta": 1.0},
        (1, torch.tensor(0.3)),
        Batch(torch.tensor(0.4), torch.tensor(0.5)),
    )
    found = find_visible(model, args, {})
    assert found.arguments == {"v_0": "data['series'][0]", "v_1": "data['series'][1]", "a": "pair[1]", "b": "batch[1]"}
    (data, pair, batch), _ = found.write({s: torch.tensor(9.0) for s in found.sites}, args, {})
    assert (data["series"], data["beta"], pair, batch) == (
        [9.0, 9.0],
        1.0,
        (1, 9.0),
        Batch(args[2].x, torch.tensor(9.0)),
    )
    assert args[0]["series"] == [torch.tensor(0.1), torch.tensor(0.2)]


def test_equal_rows_of_a_subsample():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as ind:
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[ind] * 1.0)

    x = torch.randn(8)
    found = find_visible(model, (x,), {})
    ind = torch.tensor([5, 1, 0])
    assert torch.equal(found.read("v", (x,), {}, {"data": ind}), x[ind])


def test_two_equal_arguments_are_told_apart_by_the_one_used():
    def model(x, y):
        pyro.sample("v", dist.Normal(x, 1.0), obs=y)

    assert find_visible(model, (torch.tensor(1.0), torch.tensor(1.0)), {}).arguments == {"v": "y"}


def test_latent_and_unobserved_sites_are_not_visible():
    def model(v, w=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("z2", 2 * z)
        pyro.factor("f", -(z**2))
        pyro.sample("w", dist.Normal(z, 1.0), obs=w)
        pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    assert find_visible(model, (torch.tensor(0.5),), {}).sites == ("v",)


def test_sites_that_come_and_go_are_found_when_they_come():
    def model(x, y, flags):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        if flags.on:
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    flags = SimpleNamespace(on=False)
    x, y = torch.tensor(0.1), torch.tensor(0.2)
    found = find_visible(model, (x, y, flags), {})
    with pytest.raises(ValueError, match=r"Expected visible sites of the model, but got \['y'\].*observes \['x'\]"):
        found.read("y", (x, y, flags), {})
    flags.on = True
    assert found.read("y", (x, y, flags), {}) == y


# ---------------------------------------------------------------------------------------------- named


def test_named_where_it_cannot_be_found():
    model = observing(lambda x: 2.0 * x)
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"carry the visible site 'v', but got none.*visible=\{'v': 'argument'\}"):
        find_visible(model, (x,), {})
    for argument in ("x", 0):
        found = find_visible(model, (x,), {}, {"v": argument})
        assert found.arguments == {"v": "x"}
        assert torch.equal(found.read("v", (x,), {}), x)


def test_values_from_elsewhere_are_not_found():
    def model(x):
        pyro.sample("v", dist.Normal(x.mean(), 1.0))

    conditioned = poutine.condition(model, data={"v": torch.tensor(0.7)})
    with pytest.raises(ValueError, match="Expected an argument to carry the visible site 'v'"):
        find_visible(conditioned, (torch.tensor([0.1, 0.2]),), {})


def test_a_constant_proves_nothing():
    model = observing(lambda x: torch.zeros(3))
    with pytest.raises(ValueError, match="'v', but got none"):
        find_visible(model, (torch.zeros(3),), {})


def test_a_copy_that_was_written_to_is_not_the_argument():
    def transform(x):
        x = x.clone()
        x[0] = 0.0
        return x

    x = torch.randn(3)
    with pytest.raises(ValueError, match="'v', but got none"):
        find_visible(observing(transform), (x,), {})


def test_two_arguments_that_hold_the_value_are_refused():
    def model(x, y):
        with pyro.plate("data", len(y)):
            pyro.sample("v", dist.Normal(x.mean(), 1.0), obs=y)

    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"one argument to carry the visible site 'v', but got 2: \['x', 'y'\]"):
        find_visible(model, (x, x[:, 1]), {})
    y = torch.randn(4)
    with pytest.raises(ValueError, match=r"but got 2: \['x', 'y'\]"):
        find_visible(model, (y, y), {})
    found = find_visible(model, (y, y), {}, {"v": "y"})
    assert found.arguments == {"v": "y"}
    # What was unique for two tensors is not for the same one twice.
    found = find_visible(model, (torch.randn(4), y), {})
    with pytest.raises(ValueError, match=r"but got 2: \['x', 'y'\]"):
        found.write({"v": y}, (y, y), {})


@pytest.mark.parametrize(
    ("visible", "error", "match"),
    [
        ({"u": "x"}, ValueError, r"name visible sites of the model, but got \['u'\].*observes \['v'\]"),
        ({"v": "y"}, ValueError, r"name an argument of the call, one of \['x'\] or a position below 1, but got 'y'"),
        ({"v": 1}, ValueError, "a position below 1, but got 1"),
        ({"v": True}, TypeError, "names of sites to names or positions"),
        ("x", TypeError, "Expected `visible` to map"),
    ],
)
def test_bad_names_are_refused(visible, error, match):
    with pytest.raises(error, match=match):
        find_visible(observing(lambda x: x), (torch.randn(3),), {}, visible)


def test_a_named_argument_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"in the argument named for the visible site 'v', but got none in it: 'x'"):
        find_visible(observing(lambda x: x.sum(-1)), (torch.randn(3, 2),), {}, {"v": "x"})


# ---------------------------------------------------------------------------------------------- leaks


def nan_like(x):
    return torch.full_like(x, torch.nan)


def test_no_nan_of_the_data_reaches_the_dreamt_argument():
    vae = VAE()
    x = torch.rand(5, 1, 28, 28).round()
    (dreamt,), _ = find_visible(vae.model, (x,), {}).write({"obs": torch.ones(5, 784)}, (nan_like(x),), {})
    assert torch.equal(dreamt, torch.ones_like(x))

    data = torch.randn(4, 6, 3)
    dreams = {f"v_{t}": torch.randn(4, 3) for t in range(6)}
    (dreamt,), _ = find_visible(hmm, (data,), {}).write(dreams, (nan_like(data),), {})
    assert dreamt.isfinite().all()


def test_rows_outside_the_subsample_repeat_the_dreams():
    x = torch.randn(7, 3)
    ind = torch.tensor([5, 1, 2])
    dream = torch.randn(3, 3)
    (dreamt, _), _ = find_visible(subsampled, (x, 3), {}).write({"v": dream}, (nan_like(x), 3), {}, {"data": ind})
    assert torch.equal(dreamt[ind], dream)
    assert torch.equal(dreamt[[0, 3, 4, 6]], dream[[0, 0, 1, 0]])


def test_rows_outside_the_subsample_repeat_the_dreams_of_every_time_step():
    sequences, lengths = torch.rand(10, 4, 3).round(), torch.tensor([3, 4, 4, 2, 1, 3, 4, 2, 3, 4])
    found = find_visible(padded_hmm, (sequences, lengths), {"batch_size": 4})
    dreams = {f"y_{t}": torch.rand(4, 3) for t in range(4)}
    ind = torch.tensor([7, 1, 3, 6])
    (dreamt, same), _ = found.write(dreams, (nan_like(sequences), lengths), {"batch_size": 4}, {"sequences": ind})
    assert torch.equal(dreamt[ind], torch.stack(list(dreams.values()), 1))
    assert dreamt.isfinite().all()
    assert same is lengths


def test_covariates_in_the_same_argument_keep_their_values():
    def model(table):
        with pyro.plate("data", len(table), subsample_size=2) as ind:
            pyro.sample("v", dist.Normal(table[ind, 0], 1.0), obs=table[ind][:, 1])

    table = torch.randn(4, 2)
    data = torch.stack([table[:, 0], nan_like(table[:, 1])], 1)
    ind = torch.tensor([2, 0])
    (dreamt,), _ = find_visible(model, (table,), {}).write({"v": torch.tensor([5.0, 6.0])}, (data,), {}, {"data": ind})
    assert torch.equal(dreamt[[2, 0]], torch.stack([table[ind, 0], torch.tensor([5.0, 6.0])], 1))
    assert dreamt.isfinite().all()


def test_what_no_site_observes_keeps_its_values():
    model = observing(lambda x: x[:, 1:])
    x = torch.randn(4, 3)
    (dreamt,), _ = find_visible(model, (x,), {}).write({"v": torch.zeros(4, 2)}, (x,), {})
    assert torch.equal(dreamt[:, 0], x[:, 0])
    assert (dreamt[:, 1:] == 0).all()


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("transform", "x", "dream"),
    [
        (lambda x: x.unsqueeze(0).expand(3, 4), torch.randn(4), torch.randn(3, 4)),
        (lambda x: x[[1, 1, 0]], torch.randn(4), torch.randn(3)),
        (lambda x: x.float(), torch.arange(4), torch.randn(4)),
    ],
    ids=["expanded", "row twice", "integers"],
)
def test_arguments_that_cannot_hold_a_dream_are_refused(transform, x, dream):
    found = find_visible(observing(transform), (x,), {})
    with pytest.raises(ValueError, match="Expected an argument that can hold any value of site 'v'"):
        found.write({"v": dream}, (x,), {})


def test_two_sites_of_one_element_are_refused():
    def model(x):
        pyro.sample("a", dist.Normal(0.0, 1.0), obs=x[0])
        pyro.sample("b", dist.Normal(0.0, 1.0), obs=x[0])

    x = torch.randn(2)
    found = find_visible(model, (x,), {})
    with pytest.raises(ValueError, match="can hold any value of site 'a'"):
        found.write({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, (x,), {})


def test_rows_picked_by_two_plates_are_refused():
    def model(x):
        rows, columns = pyro.plate("rows", 6, 2, dim=-2), pyro.plate("columns", 5, 3, dim=-1)
        with rows as i, columns as j:
            pyro.sample("v", dist.Normal(0.0, 1.0), obs=x[i.unsqueeze(-1), j])

    x = torch.randn(6, 5)
    found = find_visible(model, (x,), {})
    indices = {"rows": torch.tensor([4, 0]), "columns": torch.tensor([1, 2, 3])}
    assert torch.equal(found.read("v", (x,), {}, indices), x[[4, 0]][:, 1:4])
    with pytest.raises(ValueError, match=r"indexes its data by one plate.*observations=None"):
        found.write({"v": torch.zeros(2, 3)}, (x,), {}, indices)


def test_a_value_of_another_shape_is_refused():
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"Expected a value of shape \(3,\) for site 'v', as observed, but got \(2,\)"):
        find_visible(observing(lambda x: x), (x,), {}).write({"v": torch.zeros(2)}, (x,), {})


# ---------------------------------------------------------------------------------------------- effects


def test_nothing_is_left_behind():
    def model(x, fail):
        pyro.param("w", torch.randn(3))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=2.0 * x if fail else x)

    pyro.param("old", torch.ones(1))
    state = torch.get_rng_state()
    with poutine.trace() as outer:
        find_visible(model, (torch.tensor(1.0), False), {})
        with pytest.raises(ValueError, match="'v', but got none"):
            find_visible(model, (torch.tensor(1.0), True), {})
    assert list(pyro.get_param_store()) == ["old"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not outer.trace.nodes


def test_parameters_of_a_module_survive_the_blocked_run():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("v", dist.Normal(self.linear(x), 1.0).to_event(1), obs=x[:, :1])

    model = Model()
    weight = model.linear.weight
    find_visible(model, (torch.randn(3, 2),), {})
    assert model.linear.weight is weight
    assert len(list(pyro.get_param_store())) == 0


def test_a_guide_may_read_inside_its_plates():
    found = find_visible(subsampled, (torch.randn(6, 3), 2), {})
    x = torch.randn(5, 3)
    with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 5, 2, dim=-1) as ind:
        assert torch.equal(found.read("v", (x, 2), {}, {"data": ind}), x[ind])


def test_handlers_around_the_model_are_looked_through():
    model = poutine.mask(poutine.scale(observing(lambda x: x), scale=2.0), mask=torch.tensor(True))
    assert find_visible(model, (torch.randn(3),), {}).arguments == {"v": "x"}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_it_can_be_copied(again):
    x = torch.randn(20, 3)
    found = again(find_visible(subsampled, (x, 4), {}))
    ind = torch.tensor([7, 0, 19, 3])
    assert torch.equal(found.read("v", (x, 4), {}, {"data": ind}), x[ind])


def test_the_program_runs_once_per_signature():
    runs = []

    def model(x, beta):
        runs.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x.view(-1, 3))

    found = find_visible(model, (torch.randn(4, 3), 0.1), {})
    for size, beta in ((4, 0.2), (4, 0.3), (5, 0.4), (4, 0.5), (5, 0.6)):
        found.read("v", (torch.randn(size, 3), beta), {})
    assert runs == [4, 5]


def test_reading_and_writing_can_be_compiled():
    found = find_visible(subsampled, (torch.randn(6, 3), 2), {})

    def swap(x, ind, dream):
        (dreamt, _), _ = found.write({"v": dream}, (x, 2), {}, {"data": ind})
        return found.read("v", (dreamt, 2), {}, {"data": ind})

    args = (torch.randn(6, 3), torch.tensor([3, 1]), torch.randn(2, 3))
    swap(*args)
    graph = make_fx(swap)(*args)
    other = (torch.randn(6, 3), torch.tensor([0, 4]), torch.randn(2, 3))
    assert torch.equal(graph(*other), other[2])
