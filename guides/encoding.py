"""From an encoder that a user gives to the factor of its latent and the network of one guide, checked at set-up."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_ext.blocks import Block
from pyro_ext.factors import Factor
from pyro_ext.guides.density_encoders import DensityFactor, check_density, is_density
from pyro_ext.guides.encoders import DefaultEncoder, EncoderDesign, PointEncoder
from pyro_ext.guides.joint_encoder import Joint, joint_factor
from pyro_ext.guides.mean_field import mean_field_factor
from pyro_ext.guides.reading import Structure
from pyro_ext.initial import initial_parameters, prior_spread
from pyro_ext.point_factor import DeltaFactor, point_features
from pyro_ext.sites import Site

Given = nn.Module | EncoderDesign


def check_given(encoder: Any) -> None:
    """Refuse what is neither a network, nor a design of one, nor a mapping to these.

    Raises:
        TypeError: as above.
    """
    for given in encoder.values() if isinstance(encoder, Mapping) else (encoder,):
        if given is not None and not isinstance(given, nn.Module | EncoderDesign):
            raise TypeError(
                "Expected an nn.Module, an EncoderDesign or a mapping from sites to these, but got "
                f"{type(given).__name__}. Pass the network itself."
            )


def given_encoders(given: Any, encoded: list[str]) -> dict[str, Given]:
    """The encoder that each latent was given; those without one get the default.

    Raises:
        ValueError: an encoder for a site that is no encoded latent, or one network for several latents.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(encoded))
        if unknown:
            raise ValueError(
                f"Expected encoders for the latents {encoded}, but got one for {unknown[0]!r}. "
                "Name a latent inside the data's plates."
            )
        return {name: encoder for name, encoder in given.items() if encoder is not None}
    if isinstance(given, EncoderDesign) and not (isinstance(given, Joint) and isinstance(given.network, nn.Module)):
        return dict.fromkeys(encoded, given)
    if len(encoded) != 1:
        raise ValueError(
            f"Expected one encoded latent for a single encoder, but got {encoded}. "
            'Pass a mapping, such as {"h1": net1, "h2": net2}.'
        )
    return {encoded[0]: given}


def factor_of(site: Site, given: Given | None) -> Factor:
    """The family whose parameters an encoder puts out.

    Raises:
        ValueError: a `PointEncoder` of a discrete latent, or too many joint states.
    """
    if isinstance(given, PointEncoder):
        if site.kind.is_discrete:
            raise ValueError(
                f"Expected a continuous latent for a PointEncoder, but got the {site.kind.value} site {site.name!r}. "
                "Pass a network whose outputs are logits, or use Dirac with FixedPoint()."
            )
        return DeltaFactor(site.num_features, site.unit_size, discrete=False)
    return joint_factor(site) if isinstance(given, Joint) else mean_field_factor(site)


def network_of(given: Given | None, block: Block, x: Tensor, structure: Structure) -> nn.Module:
    """The network of one latent, sized where it is a design or None, and tried out on the data.

    Args:
        given: what the user gave.
        block: the block of the latent.
        x: features of the rows, ``(R, num_inputs)``.
        structure: what the guide knows of the call.

    Raises:
        ValueError: the network does not fit the features or the factor.
        TypeError: a density encoder whose output is no distribution.
    """
    site = block.site
    layout = structure.layout(site)
    copies = layout.copies(site)
    if is_density(given) and copies != 1:
        raise ValueError(
            f"Expected a latent outside inner plates for a density encoder, but got {site.name!r} with {copies} "
            "elements a row. Make the inner plate part of one value by `.to_event(1)`."
        )
    dense = isinstance(block.factor, DensityFactor)
    start_factor = mean_field_factor(site) if dense else block.factor
    start = initial_parameters(Block(block.name, block.parts, start_factor), prior_spread(site))
    start = layout.to_rows(start, site).mean(0).reshape(-1)
    if dense:
        num_outputs = site.num_features
    else:
        num_outputs = copies * (math.prod(site.event_shape) if block.factor.is_point else block.factor.num_params)
    if given is None:
        network: nn.Module = DefaultEncoder(x.shape[-1], num_outputs, start, data=x).to(start)
    elif isinstance(given, EncoderDesign):
        network = given.sized(x, num_outputs, start, site.name)
    else:
        network = given
    with evaluating(network):
        # A density is tried on two rows, which tell the rows from what is shared by all of them.
        output = _tried(network, x[:1].expand(2, -1) if dense else x[:1], site)
        if dense:
            check_density(output, site)
        else:
            _check_output(network, output, num_outputs, site)
    for parameter in network.parameters():
        # Pyro's store would hold a contiguous copy, which an optimizer moves while the network stays.
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    return network


def factor_parameters(block: Block, site: Site, structure: Structure, output: Tensor) -> Tensor:
    """A factor's parameters, ``batch + (P,)``, from an encoder's outputs ``leading + (R, M * X)``."""
    params = structure.from_rows(site, output)
    if not block.factor.is_point:
        return params
    return point_features(site, params.reshape(params.shape[:-1] + site.event_shape))


@contextmanager
def evaluating(encoder: nn.Module) -> Generator[None]:
    """Evaluation mode, put back after: running means must not move, and batch norm refuses a single row."""
    modes = {module: module.training for module in encoder.modules()}
    try:
        encoder.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tried(encoder: nn.Module, x: Tensor, site: Site) -> Any:
    try:
        return encoder(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"Expected an encoder of {site.name!r} that reads {x.shape[-1]} features, but it failed: {error}. "
            f"Its input is (R, {x.shape[-1]})."
        ) from error


def _check_output(encoder: nn.Module, output: Any, num_outputs: int, site: Site) -> None:
    if not isinstance(output, Tensor) or output.shape != (1, num_outputs):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        what = (
            "one for each number of the latent" if isinstance(encoder, PointEncoder) else "the parameters of its factor"
        )
        raise ValueError(
            f"Expected an encoder of {site.name!r} with {num_outputs} outputs, {what}, but got {got}. "
            f"Let its last layer have {num_outputs} units."
        )
