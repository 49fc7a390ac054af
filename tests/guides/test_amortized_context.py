"""Arguments that encoders read beside the data."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_ext import WakeSleep
from pyro_ext.guides import Amortized
from tests.guides.test_amortized import log_q, normal, randomise

pytestmark = pytest.mark.usefixtures("float64")

K = 5.0
"""Standard errors that a sampled number may be off."""


def regression(v, x, labels=None, *, weight=1.0):
    with pyro.plate("data", len(v)):
        h = pyro.sample("h", dist.Normal(x.sum(-1), 1.0))
        pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), weight).to_event(1), obs=v)


def set_up(model, *args, context, **settings):
    kwargs = settings.pop("kwargs", {})
    guide = Amortized(model, context=context, **settings)
    guide.setup(*args, **kwargs)
    return randomise(guide)


def expected(guide, x, h):
    return normal(guide.encoders.h(x)).log_prob(h[:, None])


def test_context_stands_after_the_data_in_the_order_it_was_named():
    v, x = torch.randn(5, 3), torch.randn(5, 2)
    labels, h = torch.tensor([3, 0, 1, 2, 2]), torch.randn(5)
    for context in (["labels", "x"], [2, 1], ["labels", 1]):
        guide = set_up(regression, v, x, labels, context=context)
        both = torch.cat([v, labels[:, None].double(), x], -1)
        assert guide.encoders.h.linear.in_features == 6
        torch.testing.assert_close(log_q(guide, {"h": h}, v, x, labels)["h"], expected(guide, both, h))
        torch.testing.assert_close(guide.posterior(v, x, labels)["h"].mean, guide.encoders.h(both)[:, 0])


def test_context_of_another_batch_and_by_keyword():
    guide = set_up(regression, torch.randn(5, 3), torch.randn(5, 2), context=["x"])
    for N in (1, 5, 8):
        v, x, h = torch.randn(N, 3), torch.randn(N, 2), torch.randn(N)
        both = torch.cat([v, x], -1)
        torch.testing.assert_close(log_q(guide, {"h": h}, v, x)["h"], expected(guide, both, h))
        torch.testing.assert_close(log_q(guide, {"h": h}, v, x=x)["h"], expected(guide, both, h))
        with pyro.plate("particles", 4, dim=-2):
            assert guide(v, x)["h"].shape == (4, N)
    # The same shapes, other covariates: nothing of the last call is remembered.
    other = torch.randn(8, 2)
    torch.testing.assert_close(log_q(guide, {"h": h}, v, other)["h"], expected(guide, torch.cat([v, other], -1), h))


def test_context_of_many_dimensions_masks_and_lengths():
    def model(v, mask, image, lengths):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            obs = dist.Normal(h[:, None], 1.0).expand([len(v), 3]).mask(mask).to_event(1)
            pyro.sample("v", obs, obs=v)

    v, mask = torch.randn(4, 3), torch.rand(4, 3) < 0.5
    image, lengths = torch.randn(4, 2, 2), torch.tensor([1, 2, 3, 2])
    guide = set_up(model, v, mask, image, lengths, context=["mask", "image", "lengths"])
    both = torch.cat([v * mask, mask.double(), image.reshape(4, 4), lengths[:, None].double()], -1)
    torch.testing.assert_close(guide.posterior(v, mask, image, lengths)["h"].mean, guide.encoders.h(both)[:, 0])


def test_every_layer_reads_the_context():
    def model(v, x):
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Normal(x, 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(h2 @ torch.ones(2, 3), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h1.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    v, x = torch.randn(4, 1), torch.randn(4, 2)
    guide = set_up(model, v, x, context=["x"])
    sizes = {name: (e.linear.in_features, e.linear.out_features) for name, e in guide.encoders.named_children()}
    assert sizes == {"h1": (3, 6), "h2": (5, 4)}
    with pyro.plate("particles", 6, dim=-2):
        trace = poutine.trace(guide).get_trace(v, x)
    trace.compute_log_prob()
    h1, h2 = (trace.nodes[name] for name in ("h1", "h2"))
    read = torch.cat([h1["value"], x.expand(6, 4, 2)], -1)
    torch.testing.assert_close(h2["log_prob"], normal(guide.encoders.h2(read)).log_prob(h2["value"]))


def subsampled(v, x, size):
    with pyro.plate("data", len(v), subsample_size=size) as rows:
        h = pyro.sample("h", dist.Normal(x[rows].sum(-1), 1.0))
        pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), 1.0).to_event(1), obs=v[rows])


def given(v, x, rows):
    with pyro.plate("data", len(v), subsample=rows):
        h = pyro.sample("h", dist.Normal(x[rows].sum(-1), 1.0))
        pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), 1.0).to_event(1), obs=v[rows])


def test_the_plates_rows_pick_the_context():
    v, x = torch.randn(9, 3), torch.randn(9, 2)
    guide = set_up(subsampled, v, x, 4, context=["x"])
    seen = set()
    for _ in range(4):
        trace = poutine.trace(guide).get_trace(v, x, 4)
        trace.compute_log_prob()
        rows, h = trace.nodes["data"]["value"], trace.nodes["h"]
        both = torch.cat([v[rows], x[rows]], -1)
        torch.testing.assert_close(h["log_prob"], 9 / 4 * expected(guide, both, h["value"]))
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 1
    rows, h = torch.tensor([7, 2, 5]), torch.randn(3)
    guide = set_up(given, v, x, torch.arange(3), context=["x"])
    found = log_q(guide, {"h": h}, v, x, rows)["h"]
    torch.testing.assert_close(found, 3 * expected(guide, torch.cat([v[rows], x[rows]], -1), h))
    torch.testing.assert_close(
        guide.posterior(v, x, rows)["h"].mean, guide.encoders.h(torch.cat([v[rows], x[rows]], -1))[:, 0]
    )
    # As many rows as the plate has, in another order.
    rows, h = torch.randperm(9), torch.randn(9)
    found = log_q(guide, {"h": h}, v, x, rows)["h"]
    torch.testing.assert_close(found, expected(guide, torch.cat([v[rows], x[rows]], -1), h))


def test_context_of_a_batch_that_is_the_argument_is_read_as_it_is():
    def model(v, x, size):
        with pyro.plate("data", size, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(x.sum(-1), 1.0))
            pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), 1.0).to_event(1), obs=v)

    v, x, h = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4)
    guide = set_up(model, v, x, 12, context=["x"])
    found = log_q(guide, {"h": h}, v, x, 12)["h"]
    torch.testing.assert_close(found, 3 * expected(guide, torch.cat([v, x], -1), h))


def test_rows_of_two_plates():
    def model(v, x):
        with pyro.plate("outer", v.shape[0], dim=-2), pyro.plate("inner", v.shape[1], dim=-1):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v, x, h = torch.randn(3, 2), torch.randn(3, 2, 4), torch.randn(3, 2)
    guide = set_up(model, v, x, context=["x"])
    both = torch.cat([v.reshape(6, 1), x.reshape(6, 4)], -1)
    found = log_q(guide, {"h": h}, v, x)["h"].reshape(6)
    torch.testing.assert_close(found, expected(guide, both, h.reshape(6)))
    with pytest.raises(ValueError, match=r"Expected 2 rows along dimension 1 of the argument 'x', named as context"):
        set_up(model, v, torch.randn(3, 4), context=["x"])


def test_a_program_without_plates_reads_the_whole_argument():
    def model(v, x):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0).expand([2]).to_event(1), obs=v)

    v, x = torch.randn(2), torch.randn(3)
    guide = set_up(model, v, x, context=["x"])
    torch.testing.assert_close(guide.posterior(v, x)["h"].mean, guide.encoders.h(torch.cat([v, x])[None])[0, 0])


def test_dreams_keep_the_context_of_their_row():
    """q(h | v, x) of the sleep phase: its gradient is that of log q at dreams under the true covariates."""
    N = 30
    v, x = torch.zeros(N, 1), torch.randn(N, 1)
    linear = nn.Linear(2, 2)
    guide = Amortized(regression, linear, context=["x"])
    guide.setup(v, x)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.3, -0.2], [0.0, 0.0]]))
        linear.bias.zero_()
    loss, found = WakeSleep(), []
    for _ in range(400):
        loss.loss_and_grads(regression, guide, v, x)
        found.append(linear.weight.grad[0] / N)
        linear.weight.grad = linear.bias.grad = None
    # h = x + e, v' = h + f: E[grad of (h - 0.3 v' + 0.2 x)^2 / 2] = -E[(h - 0.3 v' + 0.2 x) (v', x)].
    second = (x**2).mean()
    mean_v = 0.7 * (second + 1) - 0.3 + 0.2 * second  # E[h v'] = E[h^2], E[v'^2] = E[h^2] + 1
    mean_x = 0.7 * second + 0.2 * second
    samples = torch.stack(found)
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) + torch.stack([mean_v, mean_x])).abs() <= K * error).all()
    assert (error < 0.05).all()


def test_a_covariate_explains_what_the_data_cannot():
    """The posterior mean is (x + v) / 2: without context it is at best v / 2."""
    x = 2 * torch.randn(200, 1)
    v = x + torch.randn(200, 1) + torch.randn(200, 1)
    exact = (x + v).squeeze(-1) / 2
    errors = []
    for context in ((), ("x",)):
        guide = Amortized(regression, context=context)
        svi = SVI(regression, guide, Adam({"lr": 0.03}), Trace_ELBO(num_particles=4, vectorize_particles=True))
        for _ in range(120):
            svi.step(v, x)
        errors.append(float((guide.posterior(v, x)["h"].mean - exact).square().mean().sqrt()))
    assert errors[0] > 0.5
    assert errors[1] < 0.1


@pytest.mark.parametrize(
    ("context", "x", "error", "message"),
    [
        (
            ["y"],
            torch.zeros(5, 2),
            ValueError,
            r"Expected `context` to name arguments of the call, some of \['v', 'x'\]",
        ),
        ([7], torch.zeros(5, 2), ValueError, r"or positions below 2, but got 7\. Correct it"),
        (["labels"], torch.zeros(5, 2), ValueError, r"but got 'labels'\. Correct it, or pass the argument in every"),
        (["x"], torch.zeros(4, 2), ValueError, r"Expected 5 rows along dimension 0 of the argument 'x', named as con"),
        (
            ["x"],
            torch.full((5, 2), math.nan),
            ValueError,
            r"finite values in the context \['x'\], but got 10 NaN or in",
        ),
        (["x"], torch.full((5, 2), math.inf), ValueError, r"the first in row 0\. Fill them in"),
    ],
)
def test_context_that_cannot_be_read(context, x, error, message):
    def model(v, x, labels=None):
        with pyro.plate("data", 5):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), 1.0).to_event(1), obs=v)

    guide = Amortized(model, context=context)
    for _ in range(2):
        with pytest.raises(error, match=message):
            guide(torch.randn(5, 3), x)
        assert not guide.is_set_up
        assert not list(guide.parameters())
        assert not list(pyro.get_param_store())


def test_context_that_is_no_tensor():
    def model(v, x):
        with pyro.plate("data", 5):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h[..., None].expand(h.shape + v.shape[1:]), 1.0).to_event(1), obs=v)

    for x, kind in (([1.0] * 5, "list"), (None, "NoneType"), (2.0, "float")):
        with pytest.raises(
            TypeError, match=rf"Expected a tensor in the argument 'x', named as context, but got {kind}\."
        ):
            Amortized(model, context=["x"]).setup(torch.randn(5, 3), x)
    for context in ("x", 3, [1.5], [True], {"x": 1}):
        with pytest.raises(TypeError, match=r"Expected `context` to list names or positions of arguments, but got"):
            Amortized(model, context=context)


def test_values_of_context_are_looked_at_in_every_call_while_validation_is_on():
    def model(v, x):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    v, x = torch.randn(5), torch.randn(5, 2)
    guide = set_up(model, v, x, context=["x"])
    bad = x.clone()
    bad[3, 1] = math.nan
    message = r"Expected finite values in the context \['x'\], but got 1 NaN or infinite, the first in row 3\."
    for call in (guide, guide.posterior):
        with pytest.raises(ValueError, match=message):
            call(v, bad)
    pyro.enable_validation(False)
    assert guide(v, bad)["h"].isnan().sum() == 1
    with pytest.raises(ValueError, match=message):
        guide.posterior(v, bad)
