from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from scipy.signal import correlate2d
from torch import nn

from pyro_ext import elbo_terms
from pyro_ext.guides import Amortized, DefaultEncoder
from pyro_ext.guides.convolutional import Convolutional
from pyro_ext.guides.encoders import MLP, EncoderDesign, default_hidden

pytestmark = pytest.mark.usefixtures("float64")


def test_it_starts_at_the_given_parameters_for_every_input():
    start = torch.randn(3)
    encoder = DefaultEncoder(5, 3, start, data=torch.randn(20, 5))
    assert torch.equal(encoder(10 * torch.randn(7, 5)), start.expand(7, 3))


def test_it_computes_a_linear_and_a_bent_path_of_the_standardised_input():
    data = 3 * torch.randn(50, 4) + 2
    encoder = DefaultEncoder(4, 2, torch.zeros(2), data=data)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    x = torch.randn(6, 4)
    z = (x - data.mean(0)) / ((data - data.mean(0)) ** 2).mean().sqrt()
    A, e = encoder.linear.weight, encoder.linear.bias
    B, C, d = encoder.output.weight, encoder.hidden.weight, encoder.hidden.bias
    torch.testing.assert_close(encoder(x), z @ A.T + e + torch.tanh(z @ C.T + d) @ B.T)


def test_every_parameter_learns():
    encoder = DefaultEncoder(4, 2, torch.zeros(2), data=torch.randn(50, 4))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    x = torch.randn(200, 4)
    target = torch.stack([x.sum(-1), (x[:, 0] * x[:, 1]).sin()], -1)
    first = (encoder(x) - target).square().mean()
    for _ in range(300):
        optimizer.zero_grad()
        loss = (encoder(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * first
    after = encoder.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == set(after) - {"mean", "scale"}


def test_an_input_that_never_varies_does_not_blow_up():
    for data in (torch.full((10, 3), 0.1), torch.randn(1, 3), torch.zeros(4, 3)):
        assert torch.equal(DefaultEncoder(3, 1, torch.zeros(1), data=data).scale, torch.ones(3))
    # One hardly varying input among others shares their scale.
    data = torch.randn(1000, 2) * torch.tensor([1.0, 1e-9])
    encoder = DefaultEncoder(2, 1, torch.zeros(1), data=data)
    assert encoder.scale[0] == encoder.scale[1]
    assert 0.5 < encoder.scale[0] < 1


def test_without_data_it_reads_the_input_as_it_is():
    encoder = DefaultEncoder(3, 2, torch.zeros(2))
    assert torch.equal(encoder.mean, torch.zeros(3))
    assert torch.equal(encoder.scale, torch.ones(3))


def test_leading_dimensions_and_a_single_row():
    encoder = DefaultEncoder(3, 2, torch.zeros(2), data=torch.randn(1, 3))
    assert encoder(torch.randn(5, 7, 3)).shape == (5, 7, 2)
    assert encoder(torch.randn(3)).shape == (2,)


@pytest.mark.parametrize(("inputs", "outputs", "width"), [(4, 2, 32), (64, 20, 84), (500, 12, 512), (5000, 100, 512)])
def test_the_hidden_width(inputs, outputs, width):
    assert default_hidden(inputs, outputs) == width
    assert DefaultEncoder(inputs, outputs, torch.zeros(outputs)).hidden.out_features == width


def test_a_guide_starts_at_the_prior_whatever_the_data():
    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.1, 0.7])).to_event(1))
            k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))
            loc = h @ torch.ones(2, 4) + k @ torch.ones(3, 4) + z[..., None]
            pyro.sample("v", dist.Normal(loc, 1.0).to_event(1), obs=v)

    posterior = Amortized(model).posterior(3 * torch.randn(6, 4))
    for name, probs in {"h": [0.1, 0.7], "k": [0.2, 0.3, 0.5], "z": [0.6, 0.4]}.items():
        torch.testing.assert_close(posterior[name].mean, torch.tensor(probs).expand(6, -1))


def test_it_takes_the_precision_of_the_program():
    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    for dtype in (torch.float32, torch.float64):
        guide = Amortized(model)
        assert guide.posterior(torch.randn(5, 1, dtype=dtype))["h"].mean.dtype == dtype
        assert {parameter.dtype for parameter in guide.parameters()} == {dtype}


def test_a_continuous_latent_starts_at_the_spread_of_its_prior() -> None:
    def model(v: torch.Tensor) -> None:
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(1.0, 2.5).expand([3]).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1, keepdim=True), 1.0).to_event(1), obs=v)

    q = Amortized(model).posterior(torch.randn(6, 1))["h"].distribution
    torch.testing.assert_close(q.stddev, torch.full_like(q.stddev, 2.5))


# ------------------------------------------------------------------------------------------------ designs


def gaussian(width: int, inputs: int):
    """A program with one Gaussian latent of a given width."""
    W = torch.randn(width, inputs)

    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.5, 2.0).expand([width]).to_event(1))
            pyro.sample("v", dist.Normal(h @ W.to(h), 1.0).to_event(1), obs=v.reshape(len(v), -1))

    return model


DESIGNS = {
    "default": MLP(),
    "linear": MLP(hidden=()),
    "deep": MLP(hidden=(5, 4, 3), activation=nn.Softplus),
    "without a linear path": MLP(hidden=[7], linear_path=False),
    "convolutional": Convolutional((2, 3, 2), channels=(4, 5)),
    "convolutional, dense": Convolutional([1, 3, 4], (3,), 2, hidden=(6,), activation=nn.ELU(0.5), linear_path=False),
}


def randomise(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.7)
    return network


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_starts_at_the_given_parameters_and_takes_any_number_of_rows(name):
    start, data = torch.randn(3), 4 * torch.randn(20, 12) + 1
    network = DESIGNS[name].sized(data, 3, start, "h")
    assert torch.equal(network(10 * torch.randn(7, 12)), start.expand(7, 3))
    randomise(network)
    x = torch.randn(9, 12)
    torch.testing.assert_close(torch.cat([network(x[:2]), network(x[2:3]), network(x[3:])]), network(x))
    assert network(x).std(0).min() > 1e-3


@pytest.mark.parametrize("name", DESIGNS)
def test_every_parameter_of_a_design_learns(name):
    network = DESIGNS[name].sized(torch.randn(50, 12), 2, torch.zeros(2), "h")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    x = torch.randn(100, 12)
    target = torch.stack([x.sum(-1), x[:, 0]], -1)
    first = (network(x) - target).square().mean()
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first
    after = network.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == set(after) - {"mean", "scale"}


def test_an_mlp_is_its_formula():
    data = 3 * torch.randn(50, 4) + 2
    network = randomise(MLP(hidden=(6, 5), activation=nn.Softplus).sized(data, 2, torch.zeros(2), "h"))
    (C1, d1), (C2, d2) = ((layer.weight, layer.bias) for layer in (network.layers[0], network.layers[2]))
    x = torch.randn(8, 4)
    z = (x - data.mean(0)) / ((data - data.mean(0)) ** 2).mean().sqrt()
    g = torch.nn.functional.softplus(torch.nn.functional.softplus(z @ C1.T + d1) @ C2.T + d2)
    expected = z @ network.linear.weight.T + network.linear.bias + g @ network.output.weight.T
    torch.testing.assert_close(network(x), expected)
    assert network.output.bias is None
    assert len(network.layers) == 4


def test_convolutions_are_those_of_scipy():
    """Correlation with zeros around, every second pixel, channel by channel; images are read in the order of axes."""
    design = Convolutional((2, 5, 4), channels=(3,), hidden=(4,), activation=nn.Softplus, linear_path=False)
    network = randomise(design.sized(torch.zeros(1, 40), 2, torch.zeros(2), "h"))
    convolution = network.layers[1]
    images = torch.randn(6, 2, 5, 4)
    maps = torch.zeros(6, 3, 3, 2)
    for n, image in enumerate(images):
        for to in range(3):
            whole = sum(
                correlate2d(image[c].numpy(), convolution.weight[to, c].detach().numpy(), mode="same") for c in range(2)
            )
            maps[n, to] = torch.as_tensor(whole)[::2, ::2] + convolution.bias[to].detach()
    bend, dense = nn.functional.softplus, network.layers[-2]
    expected = network.output(bend(bend(maps).reshape(6, -1) @ dense.weight.T + dense.bias))
    torch.testing.assert_close(network(images.reshape(6, -1)), expected)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (1, 1, 1), (1, 28, 28)])
def test_images_and_kernels_of_any_size(shape, kernel_size):
    data = torch.randn(4, math.prod(shape))
    network = Convolutional(shape, channels=(2, 2, 2), kernel_size=kernel_size).sized(data, 3, torch.zeros(3), "h")
    assert network(data).shape == (4, 3)


def test_an_activation_is_a_class_a_maker_or_a_module_that_is_copied():
    data = torch.randn(5, 3)
    for activation in (nn.PReLU, lambda: nn.PReLU(), nn.PReLU(init=0.25)):
        layers = MLP(hidden=(4, 4), activation=activation).sized(data, 1, torch.zeros(1), "h").layers
        first, second = layers[1], layers[3]
        assert isinstance(first, nn.PReLU)
        assert isinstance(second, nn.PReLU)
        assert first is not second
        assert first.weight is not second.weight
    own = nn.PReLU(init=0.5)
    layers = MLP(hidden=(4,), activation=own).sized(data, 1, torch.zeros(1), "h").layers
    assert layers[1] is not own
    assert layers[1].weight.item() == 0.5


@pytest.mark.parametrize("design", [MLP(), Convolutional((1, 2, 2))])
def test_a_design_takes_precision_from_the_start(design):
    for dtype in (torch.float32, torch.float64):
        network = design.sized(torch.randn(5, 4, dtype=dtype), 2, torch.zeros(2, dtype=dtype), "h")
        assert {value.dtype for value in network.state_dict().values()} == {dtype}


def test_a_design_gives_every_guide_and_every_latent_a_network_of_its_own():
    def model(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.1, 0.7])).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(a.sum(-1) + b.sum(-1), 1.0), obs=v)

    design, v = MLP(hidden=(4,)), torch.randn(6)
    guides = [Amortized(model, encoder=design), Amortized(model, encoder=design)]
    for guide in guides:
        guide.setup(v)
        # A: 2 logits; b: 3 locations and 3 scales.
        assert {network.output.out_features for network in guide.encoders.children()} == {2, 6}
    tensors = [parameter for guide in guides for parameter in guide.parameters()]
    assert len({id(t) for t in tensors}) == len(tensors) == 2 * 2 * 5
    torch.testing.assert_close(guides[0].posterior(v)["a"].mean, torch.tensor([0.1, 0.7]).expand(6, 2))


def test_designs_stand_beside_networks_in_a_mapping():
    def model(v):
        with pyro.plate("data", len(v)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.1, 0.7])).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("v", dist.Normal(a.sum(-1) + b, 1.0), obs=v)

    guide = Amortized(model, encoder={"a": MLP(hidden=(4,)), "b": nn.Linear(1, 1)})
    assert guide.posterior(torch.randn(6))["b"].mean.shape == (6,)
    assert isinstance(guide.encoders.b, nn.Linear)
    assert guide.encoders.a.layers[0].out_features == 4


@pytest.mark.parametrize("name", DESIGNS)
def test_a_guide_with_a_design_starts_at_the_prior_trains_and_reads_other_batches(name):
    model, v = gaussian(2, 12), torch.randn(40, 12)
    guide = Amortized(model, encoder=DESIGNS[name])
    q = guide.posterior(v)["h"].distribution
    assert torch.equal(q.mean, q.mean[:1].expand(40, 2))
    torch.testing.assert_close(q.stddev, torch.full((40, 2), 2.0))
    svi = SVI(model, guide, Adam({"lr": 0.02}), TraceMeanField_ELBO())
    before = elbo_terms(model, guide, v).bound.mean()
    for index in range(60):
        svi.step(v[10 * (index % 4) :][:10])
    after = elbo_terms(model, guide, v).bound.mean()
    assert after > before + 1
    for parameter in guide.parameters():
        assert parameter.grad is None or parameter.isfinite().all()
    assert guide.posterior(torch.randn(3, 12))["h"].mean.shape == (3, 2)
    assert guide.posterior(torch.randn(1, 12))["h"].mean.shape == (1, 2)


def test_images_reach_convolutions_in_their_own_layout():
    """A program that observes images as images and one that flattens them agree."""
    images = torch.randn(6, 1, 4, 6)

    def model(v):
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = h.sum(-1)[:, None, None, None].expand(-1, 1, 4, 6)
            pyro.sample("v", dist.Normal(mean, 1.0).to_event(3), obs=v)

    guide = Amortized(model, encoder=Convolutional((1, 4, 6), channels=(3,)))
    guide.setup(images)
    randomise(guide.encoders.h)
    network = guide.encoders.h
    found = guide.posterior(images)["h"].mean
    assert network(images.reshape(6, 24)).shape == (6, 4)
    by_hand = network.layers[1]((images - network.mean.reshape(1, 4, 6)) / network.scale.reshape(1, 4, 6))
    by_hand = network.output(by_hand.relu().flatten(1)) + network.linear(network.standardise(images.flatten(1)))
    torch.testing.assert_close(network(images.flatten(1)), by_hand)
    torch.testing.assert_close(found, by_hand[:, :2])


def test_layers_that_find_their_own_width():
    """torch's lazy layers are sized by the first pass, before the guide looks at their parameters."""
    model, v = gaussian(2, 5), torch.randn(8, 5)
    guide = Amortized(model, encoder=nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.LazyLinear(4)))
    svi = SVI(model, guide, Adam({"lr": 0.02}), TraceMeanField_ELBO())
    first = [svi.step(v) for _ in range(20)]
    rest = [svi.step(v) for _ in range(60)]
    assert sum(rest[-20:]) < sum(first)
    assert all(torch.equal(value, pyro.param(name)) for name, value in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLP(hidden=64), TypeError, r"Expected hidden to be a sequence of ints, but got 64 of type int\. Pass"),
        (lambda: MLP(hidden="64"), TypeError, r"Expected hidden to be a sequence of ints, but got '64' of type str"),
        (lambda: MLP(hidden=(3, 2.0)), TypeError, r"Expected hidden\[1\] to be an int, but got 2\.0"),
        (lambda: MLP(hidden=(0,)), ValueError, r"Expected hidden\[0\] >= 1, but got 0"),
        (lambda: MLP(activation=torch.tanh), TypeError, r"an activation that is or makes an nn\.Module, but got"),
        (lambda: MLP(activation="tanh"), TypeError, r"an nn\.Module, but got 'tanh'\. Pass a class such as nn\.Tanh"),
        (lambda: MLP(activation=dict), TypeError, r"an nn\.Module, but got <class 'dict'>"),
        (lambda: Convolutional((28, 28)), ValueError, r"height and width, but got \(28, 28\)\. Pass \(1, 28, 28\)"),
        (lambda: Convolutional(28), TypeError, r"Expected image_shape to be a sequence of ints, but got 28"),
        (lambda: Convolutional((1, 28, 0)), ValueError, r"Expected image_shape\[2\] >= 1, but got 0"),
        (lambda: Convolutional((1, 8, 8), ()), ValueError, r"least one convolution, but got channels=\(\)\. Use MLP"),
        (lambda: Convolutional((1, 8, 8), (4, -1)), ValueError, r"Expected channels\[1\] >= 1, but got -1"),
        (lambda: Convolutional((1, 8, 8), kernel_size=0), ValueError, r"Expected kernel_size >= 1, but got 0"),
        (lambda: Convolutional((1, 8, 8), kernel_size=3.0), TypeError, r"kernel_size to be an int, but got 3\.0"),
        (lambda: Convolutional((1, 8, 8), hidden=(0,)), ValueError, r"Expected hidden\[0\] >= 1, but got 0"),
        (lambda: Convolutional((1, 8, 8), activation=3), TypeError, r"makes an nn\.Module, but got 3"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_images_of_another_size_are_refused_and_nothing_is_left():
    model, v = gaussian(2, 12), torch.randn(5, 12)
    guide = Amortized(model, encoder=Convolutional((1, 3, 3)))
    with pytest.raises(
        ValueError,
        match=r"images of shape \(1, 3, 3\), 9 numbers, for the encoder of 'h', but got 12 features a row\. Pass",
    ):
        guide(v)
    assert not guide.is_set_up
    assert not list(guide.parameters())
    assert not list(pyro.get_param_store())


def test_a_design_of_ones_own():
    class Linear(EncoderDesign):
        def sized(self, x, num_outputs, start, site):
            assert (x.shape, start.shape, site) == ((5, 12), (num_outputs,), "h")
            return nn.Linear(x.shape[-1], num_outputs).to(start)

    guide = Amortized(gaussian(2, 12), encoder=Linear())
    assert guide.posterior(torch.randn(5, 12))["h"].mean.shape == (5, 2)
    with pytest.raises(TypeError, match="abstract"):
        EncoderDesign()
