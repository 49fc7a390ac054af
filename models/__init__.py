"""Pyro programs, one family a file."""

from .base import Model, assign_parameter, assign_parameters, read_parameter, unconstrained_parameter
from .binary_sparse_coding import BinarySparseCoding
from .condensed import condense
from .covariance import Covariance, Diagonal, Full, Spherical, Tied
from .dictionaries import ColumnNorm, Dictionary, Unconstrained, WeightDecay
from .dictionary_solvers import BlockCoordinateDescent, DictionarySolver, LagrangeDual
from .emissions import BernoulliEmission, CategoricalEmission, Emission, GaussianEmission, PoissonEmission
from .factor_analysis import FactorAnalysis, ProbabilisticPCA
from .factorial_hmm import FactorialHMM
from .gaussian_mixture import GaussianMixture
from .helmholtz_machine import HelmholtzMachine
from .hidden_markov_model import HiddenMarkovModel
from .linear_gaussian import LinearGaussian
from .sigmoid_belief_network import SigmoidBeliefNetwork
from .sparse_coding import SparseCoding
from .sparse_priors import CauchyPrior, ExponentialPrior, LaplacePrior, SparsePrior, StudentTPrior

__all__ = [
    "BernoulliEmission",
    "BinarySparseCoding",
    "BlockCoordinateDescent",
    "CategoricalEmission",
    "CauchyPrior",
    "ColumnNorm",
    "Covariance",
    "Diagonal",
    "Dictionary",
    "DictionarySolver",
    "Emission",
    "ExponentialPrior",
    "FactorAnalysis",
    "FactorialHMM",
    "Full",
    "GaussianEmission",
    "GaussianMixture",
    "HelmholtzMachine",
    "HiddenMarkovModel",
    "LagrangeDual",
    "LaplacePrior",
    "LinearGaussian",
    "Model",
    "PoissonEmission",
    "ProbabilisticPCA",
    "SigmoidBeliefNetwork",
    "SparseCoding",
    "SparsePrior",
    "Spherical",
    "StudentTPrior",
    "Tied",
    "Unconstrained",
    "WeightDecay",
    "assign_parameter",
    "assign_parameters",
    "condense",
    "read_parameter",
    "unconstrained_parameter",
]
