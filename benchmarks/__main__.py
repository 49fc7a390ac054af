"""``python -m benchmarks`` lists the benchmarks, ``python -m benchmarks NAME [OPTIONS]`` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "bars": "binary sparse coding on bars with one joint factor over 2^10 states: bars found, L and seconds",
    "bsc_joint": "exact EM for binary sparse coding over 2^10 states, against the same by hand",
    "bsc_mean_field": "variational EM for binary sparse coding, against the same by hand",
    "dictionary": "minibatch dictionary learning on image patches, against scikit-learn",
    "dreams": "a Helmholtz machine on digits: dreams beside data",
    "eight_schools": "reference of the eight schools posterior: quadrature, and Pyro's NUTS",
    "factor_analysis": "raw data to the log-likelihood at which scikit-learn stops",
    "fhmm": "exact posterior of a factorial HMM, against hmmlearn on the product space",
    "gmm_diag": "EM for a diagonal Gaussian mixture, against scikit-learn and pomegranate",
    "gmm_full": "EM for a full Gaussian mixture, against scikit-learn and pomegranate",
    "gradient_variance": "a VAE's gradients: variance of reparametrised, score-function and wake-sleep estimates",
    "hmm_gaussian": "EM for a Gaussian HMM, against hmmlearn",
    "lista": "learned sparse inference (LISTA, PSD): code error and time, against ISTA, FISTA and exact solvers",
    "patches": "binary sparse coding on whitened image patches: how many features are oriented",
    "phases": "long phases awake and asleep on an enumerable model: L and exact log p",
    "refine_digits": "a recognition network refined by fixed-point sweeps on digits: L and time",
    "sparse_codes": "sparse codes of image patches from the Pyro program, against scikit-learn; memory",
    "sparse_patches": "sparse coding of whitened image patches: how many features are oriented",
    "streaming": "EM on data drawn when they are read: resident memory at N rows and at 10 N (1 GB)",
    "svi_step": "a step of SVI on a VAE, against Pyro, NumPyro and the same by hand",
    "uci_binary": "reweighted wake-sleep on ADULT, DNA and MUSHROOMS: test NLL, against the published table",
    "vae": "a VAE on few digits by both forms of L and by the reconstruction alone: overfitting, log p(v)",
    "wake_sleep": "reweighted wake-sleep a step: compiled and eager, against Pyro's and PyTorch by hand",
    "wake_sleep_digits": "reweighted wake-sleep on binarised digits: test NLL of five seeds",
}
"""What `python -m benchmarks` knows: a module of this package, and what it measures."""


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named first, or list all."""
    if not arguments:
        print("python -m benchmarks NAME [--help]\n")
        for name, text in BENCHMARKS.items():
            print(f"  {name:20}{text}")
        return 0
    name, *options = arguments
    if name not in BENCHMARKS:
        print(f"Expected one of {', '.join(BENCHMARKS)}, but got {name}.", file=sys.stderr)
        return 2
    importlib.import_module(f"benchmarks.{name}").main(options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
