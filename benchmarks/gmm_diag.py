"""EM for a mixture of Gaussians with diagonal covariances, N = 100,000, D = K = 16: seconds an iteration.

Ours is `EM.run`, with its ledger, snapshots and posterior; the peers are scikit-learn and pomegranate on the
same data, dtype and start. The closing line is against scikit-learn, in the dtype of the smaller ratio.
"""

from __future__ import annotations

from benchmarks.gmm import compare


def main(options: list[str]) -> None:
    """Run the comparison."""
    compare("gmm_diag", False, options, __doc__)
