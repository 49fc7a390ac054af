"""Guides: families of q for any Pyro model."""

from pyro_ext.guides.amortized import Amortized
from pyro_ext.guides.block_entries import Tree
from pyro_ext.guides.dirac import Dirac
from pyro_ext.guides.encoders import DefaultEncoder, PointEncoder
from pyro_ext.guides.lista import LISTA
from pyro_ext.guides.mean_field import MeanField
from pyro_ext.guides.mean_field_network import MeanFieldNetwork
from pyro_ext.guides.noisy import Noisy
from pyro_ext.guides.psd import PSD
from pyro_ext.guides.structured import Structured

__all__ = [
    "LISTA",
    "PSD",
    "Amortized",
    "DefaultEncoder",
    "Dirac",
    "MeanField",
    "MeanFieldNetwork",
    "Noisy",
    "PointEncoder",
    "Structured",
    "Tree",
]
