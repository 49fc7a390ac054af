"""Pyro programs, one family a file."""

from .base import Model, assign_parameter, assign_parameters, read_parameter, unconstrained_parameter
from .binary_sparse_coding import BinarySparseCoding
from .covariance import Covariance, Diagonal, Full
from .factor_analysis import FactorAnalysis, ProbabilisticPCA
from .gaussian_mixture import GaussianMixture
from .helmholtz_machine import HelmholtzMachine
from .sigmoid_belief_network import SigmoidBeliefNetwork

__all__ = [
    "BinarySparseCoding",
    "Covariance",
    "Diagonal",
    "FactorAnalysis",
    "Full",
    "GaussianMixture",
    "HelmholtzMachine",
    "Model",
    "ProbabilisticPCA",
    "SigmoidBeliefNetwork",
    "assign_parameter",
    "assign_parameters",
    "read_parameter",
    "unconstrained_parameter",
]
