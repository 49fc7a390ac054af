"""Two short jobs that keep themselves in a file, killed with SIGKILL at random moments and started again.

``python -m tests.checkpoint_jobs FOLDER`` forks the attempts from one process that has imported everything;
``--fresh`` starts a new interpreter for each. The last line of its output is JSON.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext import EM, EarlyStopping, FixedPoint, Gradient, History, checkpoint_file, fit
from pyro_ext.checkpoint import Checkpoint
from pyro_ext.checkpoint_file import unfinished
from pyro_ext.guides import MeanField
from pyro_ext.models import BinarySparseCoding
from pyro_ext.snapshot import rng_state

KILLS = 10
V = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(40.0).remainder(3)[:, None]


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__("decoder")
        self.linear = nn.Linear(2, 3)

    def forward(self, v: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(self.linear(h), 1.0).to_event(1), obs=v)


def guide(v: Tensor) -> None:
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(3, 2))
    with pyro.plate("data", 40, subsample_size=len(v)):
        pyro.sample("h", dist.Normal(v @ weight, 0.5).to_event(1))


def minibatches(path: Path | None) -> tuple[Any, History]:
    """SVI with Adam on shuffled minibatches, with early stopping that never comes."""
    pyro.set_rng_seed(1)
    svi = SVI(Decoder(), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    loader = DataLoader(TensorDataset(V), batch_size=16, shuffle=True)
    history = fit(
        svi,
        loader,
        num_epochs=10,
        held_out=[V[:8]],
        early_stopping=EarlyStopping(patience=10),
        progress=False,
        checkpoint=None if path is None else Checkpoint(path, seconds=0.0),
    )
    return svi, history


def table(path: Path | None) -> tuple[Any, History]:
    """EM with a table guide and a gradient M-step, of two starts."""
    pyro.set_rng_seed(2)
    model = BinarySparseCoding(num_visible=3, num_latents=3, name="model")
    optim = pyro.optim.Adam({"lr": 0.05})
    em = EM(model, MeanField(model, name="q"), e_step=FixedPoint(max_sweeps=2), m_step=Gradient(optim))
    history = em.run(
        V,
        max_steps=6,
        tolerance=0.0,
        num_restarts=2,
        progress=False,
        checkpoint=None if path is None else Checkpoint(path, seconds=0.0),
    )
    return em, history


JOBS: dict[str, Callable[[Path | None], tuple[Any, History]]] = {"minibatches": minibatches, "table": table}


def numbers(driver: Any, history: History) -> str:
    """Everything that a job ends with, digit by digit."""
    store = pyro.get_param_store()
    optim = driver.optim if isinstance(driver, SVI) else driver.m_step.optim
    found: dict[str, Any] = {name: value.detach().flatten().tolist() for name, value in store.named_parameters()}
    if isinstance(driver, EM):
        found["table"] = [driver.guide.table(block).flatten().tolist() for block in driver.guide.blocks]
    for tensor, made in optim.optim_objs.items():
        found[f"optim {store.param_name(tensor)}"] = {k: v.flatten().tolist() for k, v in made.state[tensor].items()}
    record = vars(history) | {"seconds": len(history.seconds), "ledger": history.ledger_records}
    state = rng_state()
    generators = [state["torch"].tolist(), state["numpy"][1].tolist(), state["random"]]
    draws = [torch.rand(2).tolist(), float(np.random.rand())]  # noqa: NPY002
    # The order of parameters is that of a set of tensors.
    return json.dumps([found, record, generators, draws], sort_keys=True)


def attempt(name: str, path: Path | None, answer: Path) -> None:
    torch.set_num_threads(1)
    answer.write_text(numbers(*JOBS[name](path)))


PHASES = ("half written", "before it takes its place", "after it took its place")


def die_in_write(phase: str, number: int) -> None:
    """Let this process kill itself within its write of this number."""
    replace, opened, count = os.replace, open, itertools.count(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class HalfWritten:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> HalfWritten:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: Any) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

    def dying_replace(old: str, new: str) -> None:
        last = next(count) == number
        if last and phase == PHASES[1]:
            die()
        replace(old, new)
        if last and phase == PHASES[2]:
            die()

    if phase == PHASES[0]:
        files: Any = checkpoint_file
        files.open = lambda *given: HalfWritten(opened(*given)) if next(count) == number else opened(*given)
    else:
        os.replace = dying_replace


class Forked:
    """One attempt, forked from here."""

    def __init__(self, name: str, path: Path | None, answer: Path, phase: str = "") -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if phase:
                    die_in_write(phase, 4)
                attempt(name, path, answer)
                code = 0
            finally:
                os._exit(code)
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.001)
        return self.code or 0


def fresh(name: str, path: Path | None, answer: Path) -> Any:
    """One attempt in a new interpreter."""
    command = [sys.executable, "-m", "tests.checkpoint_jobs", "--attempt", name, str(path or ""), str(answer)]
    return subprocess.Popen(command)


def wait_for_first_write(start: Callable[..., Any], path: Path, process: Any) -> None:
    """A new interpreter spends most of its time on imports, in which nothing can be lost."""
    while start is fresh and not path.exists() and process.poll() is None:
        time.sleep(0.0005)


def kill(start: Callable[..., Any], name: str, folder: Path, longest: float, dice: random.Random) -> float:
    """Kill one run at a random moment; retried where it was over by then."""
    while True:
        path, answer = folder / f"{name}.checkpoint", folder / f"{name}.json"
        for old in (path, answer):
            old.unlink(missing_ok=True)
        process = start(name, path, answer)
        wait_for_first_write(start, path, process)
        begun, delay = time.perf_counter(), longest * dice.random()
        while time.perf_counter() - begun < delay and process.poll() is None:
            time.sleep(0.0005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                return longest
        longest *= 0.8


def warm_up(folder: Path) -> None:
    """Run everything once, so that no attempt pays for it, and forget what came of it."""
    for name, job in JOBS.items():
        job(folder / f"{name}.warm")
        pyro.clear_param_store()
    gc.collect()


def main(folder: Path, start: Callable[..., Any]) -> dict[str, Any]:
    """Kill each job `KILLS` times, and compare what it ends with after it went on with an uninterrupted run."""
    dice, report = random.Random(), {}
    for name in JOBS:
        whole = folder / f"{name}.whole.json"
        if start(name, None, whole).wait():
            raise RuntimeError(f"{name} failed")
        timed = folder / f"{name}.timed"
        process, begun = start(name, timed, folder / f"{name}.timed.json"), time.perf_counter()
        wait_for_first_write(start, timed, process)
        begun = begun if start is Forked else time.perf_counter()
        process.wait()
        duration = time.perf_counter() - begun
        counts = {"kills": 0, "equal": 0, "before the first write": 0}
        counts |= {"in a write": 0, "left behind": 0, "equal after a write": 0}
        for _ in range(KILLS):
            duration = kill(start, name, folder, duration, dice)
            path, answer = folder / f"{name}.checkpoint", folder / f"{name}.json"
            counts["kills"] += 1
            counts["left behind"] += os.path.exists(unfinished(path))
            counts["before the first write"] += not path.exists()
            if start(name, path, answer).wait():
                raise RuntimeError(f"{name} could not go on")
            counts["equal"] += answer.read_text() == whole.read_text()
            if answer.read_text() != whole.read_text():
                answer.rename(folder / f"{name}.differs.{time.time()}")
        for phase in PHASES if start is Forked else ():
            path, answer = folder / f"{name} {phase}.checkpoint", folder / f"{name}.json"
            process = Forked(name, path, answer, phase)
            counts["in a write"] += process.wait() == -signal.SIGKILL
            counts["left behind"] += os.path.exists(unfinished(path))
            Forked(name, path, answer).wait()
            counts["equal after a write"] += answer.read_text() == whole.read_text()
        counts["litter"] = len([p for p in folder.iterdir() if "unfinished" in p.name])
        report[name] = counts
    return report


if __name__ == "__main__":
    if sys.argv[1] == "--attempt":
        attempt(sys.argv[2], Path(sys.argv[3]) if sys.argv[3] else None, Path(sys.argv[4]))
    else:
        is_fresh = "--fresh" in sys.argv
        torch.set_num_threads(1)
        if not is_fresh:
            warm_up(Path(sys.argv[1]))
        print(json.dumps(main(Path(sys.argv[1]), fresh if is_fresh else Forked)))
