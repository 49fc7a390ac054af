"""Pyro programs, one family a file."""

from .base import Model, assign_parameter, assign_parameters, read_parameter, unconstrained_parameter
from .binary_sparse_coding import BinarySparseCoding
from .condensed import condense
from .covariance import Covariance, Diagonal, Full, Spherical, Tied
from .emissions import BernoulliEmission, CategoricalEmission, Emission, GaussianEmission, PoissonEmission
from .factor_analysis import FactorAnalysis, ProbabilisticPCA
from .factorial_hmm import FactorialHMM
from .gaussian_mixture import GaussianMixture
from .helmholtz_machine import HelmholtzMachine
from .hidden_markov_model import HiddenMarkovModel
from .linear_gaussian import LinearGaussian
from .sigmoid_belief_network import SigmoidBeliefNetwork

__all__ = [
    "BernoulliEmission",
    "BinarySparseCoding",
    "CategoricalEmission",
    "Covariance",
    "Diagonal",
    "Emission",
    "FactorAnalysis",
    "FactorialHMM",
    "Full",
    "GaussianEmission",
    "GaussianMixture",
    "HelmholtzMachine",
    "HiddenMarkovModel",
    "LinearGaussian",
    "Model",
    "PoissonEmission",
    "ProbabilisticPCA",
    "SigmoidBeliefNetwork",
    "Spherical",
    "Tied",
    "assign_parameter",
    "assign_parameters",
    "condense",
    "read_parameter",
    "unconstrained_parameter",
]
