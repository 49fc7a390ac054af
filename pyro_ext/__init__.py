"""pyro-ext: approximate inference for Pyro programs, honest about how good its answer is."""

from pyro_ext.checkpoint import Checkpoint, load, save
from pyro_ext.checkpoint_file import CheckpointError
from pyro_ext.closed_form import ClosedForm
from pyro_ext.compiled_svi import CompiledSVI
from pyro_ext.coordinate_descent import CoordinateDescent
from pyro_ext.criteria import BoundChange, MeanChange
from pyro_ext.dream import Dream
from pyro_ext.early_stopping import EarlyStopping
from pyro_ext.elbo_terms import ElboTerms, elbo_terms
from pyro_ext.em import EM
from pyro_ext.evidence import Evidence, log_evidence
from pyro_ext.feature_sign import FeatureSign
from pyro_ext.fit import EpochEnd, StopFit, fit
from pyro_ext.fixed_point import FixedPoint
from pyro_ext.gap import Gap, GapEntry
from pyro_ext.gradient import Gradient
from pyro_ext.health import Health
from pyro_ext.history import HealthEntry, History, LedgerEntry, Status
from pyro_ext.in_turn import InTurn
from pyro_ext.lbfgs import LBFGS
from pyro_ext.local_gradient import LocalGradient
from pyro_ext.maximize import Certificate, Maximize
from pyro_ext.newton import Newton
from pyro_ext.optimal_form import OptimalForm, optimal_form
from pyro_ext.posterior import Marginal, Posterior
from pyro_ext.proposals import Defensive, FromGuide, Proposal
from pyro_ext.proximal import FISTA, SpaRSA
from pyro_ext.quasi_newton import QuasiNewton
from pyro_ext.refine import Refine
from pyro_ext.sampled import Sampled
from pyro_ext.schedules import Adaptive, Coloured, Parallel, Sequential
from pyro_ext.semi_amortized import SemiAmortized
from pyro_ext.solvers import SolverError
from pyro_ext.starts import Better, Cold, Warm
from pyro_ext.step_graph import CompilerWarning
from pyro_ext.unbounded import UnboundedWarning
from pyro_ext.wake_sleep import Estimate, WakeSleep
from pyro_ext.weights import SelfNormalized, Uniform

__all__ = [
    "EM",
    "FISTA",
    "LBFGS",
    "Adaptive",
    "Better",
    "BoundChange",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "ClosedForm",
    "Cold",
    "Coloured",
    "CompiledSVI",
    "CompilerWarning",
    "CoordinateDescent",
    "Defensive",
    "Dream",
    "EarlyStopping",
    "ElboTerms",
    "EpochEnd",
    "Estimate",
    "Evidence",
    "FeatureSign",
    "FixedPoint",
    "FromGuide",
    "Gap",
    "GapEntry",
    "Gradient",
    "Health",
    "HealthEntry",
    "History",
    "InTurn",
    "LedgerEntry",
    "LocalGradient",
    "Marginal",
    "Maximize",
    "MeanChange",
    "Newton",
    "OptimalForm",
    "Parallel",
    "Posterior",
    "Proposal",
    "QuasiNewton",
    "Refine",
    "Sampled",
    "SelfNormalized",
    "SemiAmortized",
    "Sequential",
    "SolverError",
    "SpaRSA",
    "Status",
    "StopFit",
    "UnboundedWarning",
    "Uniform",
    "WakeSleep",
    "Warm",
    "elbo_terms",
    "fit",
    "load",
    "log_evidence",
    "optimal_form",
    "save",
]
