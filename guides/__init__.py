"""Guides: families of q for any Pyro model."""

from pyro_ext.guides.amortized import Amortized
from pyro_ext.guides.autoregressive import AutoregressiveBernoulli
from pyro_ext.guides.block_entries import Tree
from pyro_ext.guides.convolutional import Convolutional
from pyro_ext.guides.density_encoders import DensityDesign, DensityEncoder
from pyro_ext.guides.dirac import Dirac
from pyro_ext.guides.encoders import MLP, DefaultEncoder, EncoderDesign, PointEncoder
from pyro_ext.guides.flows import ConditionalFlow, affine_layer, spline_layer
from pyro_ext.guides.joint_encoder import Joint
from pyro_ext.guides.lista import LISTA
from pyro_ext.guides.mean_field import MeanField
from pyro_ext.guides.mean_field_network import MeanFieldNetwork
from pyro_ext.guides.noisy import Noisy
from pyro_ext.guides.psd import PSD
from pyro_ext.guides.structured import Structured

__all__ = [
    "LISTA",
    "MLP",
    "PSD",
    "Amortized",
    "AutoregressiveBernoulli",
    "ConditionalFlow",
    "Convolutional",
    "DefaultEncoder",
    "DensityDesign",
    "DensityEncoder",
    "Dirac",
    "EncoderDesign",
    "Joint",
    "MeanField",
    "MeanFieldNetwork",
    "Noisy",
    "PointEncoder",
    "Structured",
    "Tree",
    "affine_layer",
    "spline_layer",
]
