"""SIGKILL at random moments: each run goes on from its file and ends bit-equal to one that was never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoint_jobs


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    # In a process of its own: forks need one in which no other test has started threads.
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.checkpoint_jobs", str(tmp_path)]
    # A process that has found a GPU cannot run autograd in its forks.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == set(checkpoint_jobs.JOBS)
    for counts in report.values():
        assert counts["kills"] == counts["equal"] == checkpoint_jobs.KILLS, report
        assert counts["in a write"] == counts["equal after a write"] == len(checkpoint_jobs.PHASES), report
        assert counts["left behind"] >= 2, report
        assert counts["litter"] == 0, report
