"""One step of SVI on a variational autoencoder 64-64-16, batch 128, Adam, float32: milliseconds.

The model is a plain Pyro program with `nn.Linear` layers. Contestants take steps in turn on the same batches of
binarised digits: `CompiledSVI`, Pyro's SVI with `Trace_ELBO` and with `JitTrace_ELBO`, the same step by hand in eager
PyTorch, and NumPyro, by a jitted `update` and by `run` (which takes many steps on one batch in one compiled loop: no
data come in and no losses come out between steps). The answers that must agree are the mean losses of the last steps,
nats a row; draws differ between the libraries. Compile times are stated apart. The closing line is against Pyro's SVI.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.compare import Run, Timing, check_agreement, closing_line, machine, parse, table, take_turns
from pyro_ext import CompiledSVI

WIDTH, LATENTS = 64, 16
LEARNING_RATE = 1e-3


class Autoencoder(nn.Module):
    """The variational autoencoder as a Pyro user writes it."""

    def __init__(self, name: str = "autoencoder") -> None:
        super().__init__()
        self.name = name
        self.hidden = nn.Linear(64, WIDTH)
        self.mean, self.log_scale = nn.Linear(WIDTH, LATENTS), nn.Linear(WIDTH, LATENTS)
        self.decoder = nn.Sequential(nn.Linear(LATENTS, WIDTH), nn.Softplus(), nn.Linear(WIDTH, 64))

    def encode(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q."""
        hidden = nn.functional.softplus(self.hidden(v))
        return self.mean(hidden), self.log_scale(hidden).exp()

    def model(self, v: Tensor) -> None:
        """p(h) p(v | h)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(LATENTS), v.new_ones(LATENTS)).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=v)

    def guide(self, v: Tensor) -> None:
        """q(h | v)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(v)):
            pyro.sample("h", dist.Normal(*self.encode(v)).to_event(1))


def batches(size: int) -> list[Tensor]:
    """Batches of binarised digits."""
    v = torch.as_tensor(load_digits().data > 7).to(torch.float32)
    order = torch.randperm(len(v), generator=torch.Generator().manual_seed(0))
    return [rows for rows in v[order].split(size) if len(rows) == size]


Step = Callable[[Any], float]


def by_pyro(make: Callable[..., Any], loss: Any, name: str) -> Step:
    """A driver of Pyro's kind."""
    torch.manual_seed(0)
    network = Autoencoder(name)
    return make(network.model, network.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss).step


def by_hand() -> Step:
    """The same objective and update, eager PyTorch without Pyro."""
    torch.manual_seed(0)
    network = Autoencoder()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def step(v: Tensor) -> float:
        mean, scale = network.encode(v)
        noise = torch.randn_like(mean)
        h = mean + scale * noise
        log_p = -0.5 * h.square().sum() - nn.functional.binary_cross_entropy_with_logits(
            network.decoder(h), v, reduction="sum"
        )
        loss = -(log_p + scale.log().sum() + 0.5 * noise.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_numpyro() -> tuple[Callable[[Any], tuple[Any, Any]], Callable[[Any, int], Any]]:
    """NumPyro's jitted `update`, and its `run`."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI as NumPyroSVI
    from numpyro.infer import Trace_ELBO as NumPyroELBO

    shapes = {"hidden": (64, WIDTH), "mean": (WIDTH, LATENTS), "log_scale": (WIDTH, LATENTS)}
    shapes |= {"decoder0": (LATENTS, WIDTH), "decoder1": (WIDTH, 64)}
    rng = np.random.default_rng(0)
    start: dict[str, Any] = {}
    for name, (rows, columns) in shapes.items():
        start[f"{name}_W"] = jnp.asarray(rng.uniform(-1, 1, (rows, columns)) * rows**-0.5, dtype=jnp.float32)
        start[f"{name}_b"] = jnp.asarray(rng.uniform(-1, 1, columns) * rows**-0.5, dtype=jnp.float32)

    def linear(name: str, x: Any) -> Any:
        return x @ numpyro.param(f"{name}_W", start[f"{name}_W"]) + numpyro.param(f"{name}_b", start[f"{name}_b"])

    def model(v: Any) -> None:
        with numpyro.plate("data", len(v)):
            h = numpyro.sample("h", ndist.Normal(jnp.zeros(LATENTS), 1.0).to_event(1))
            logits = linear("decoder1", jax.nn.softplus(linear("decoder0", h)))
            numpyro.sample("v", ndist.Bernoulli(logits=logits).to_event(1), obs=v)

    def guide(v: Any) -> None:
        hidden = jax.nn.softplus(linear("hidden", v))
        mean, scale = linear("mean", hidden), jnp.exp(linear("log_scale", hidden))
        with numpyro.plate("data", len(v)):
            numpyro.sample("h", ndist.Normal(mean, scale).to_event(1))

    svi = NumPyroSVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), NumPyroELBO())
    update = jax.jit(svi.update)
    states: list[Any] = []

    def step(v: Any) -> float:
        if not states:
            states.append(svi.init(jax.random.PRNGKey(0), v))
        states[0], loss = update(states[0], v)
        return float(loss)

    def run(v: Any, num_steps: int) -> Any:
        return svi.run(jax.random.PRNGKey(0), num_steps, v, progress_bar=False).losses.block_until_ready()

    return step, run  # pyright: ignore[reportReturnType]


def contestant(step: Step, data: list[Any], num_steps: int) -> Run:
    """`num_steps` steps a repeat; the answer is the mean loss, nats a row."""

    def run() -> tuple[float, float]:
        losses = []
        started = time.perf_counter()
        for i in range(num_steps):
            losses.append(step(data[i % len(data)]))
        return (time.perf_counter() - started) / num_steps, float(np.mean(losses)) / len(data[0])

    return run


def first_steps(label: str, step: Step, v: Any) -> str:
    """Seconds until a contestant has taken three steps: set-up and compilation."""
    started = time.perf_counter()
    for _ in range(3):
        step(v)
    return f"  {label:28}{time.perf_counter() - started:8.1f}"


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, steps=400, batch=128, unrolled=2000)
    warnings.filterwarnings("ignore", module="torch|pyro")
    pyro.enable_validation(False)
    data = batches(arguments.batch)
    steps: dict[str, Step] = {
        "pyro-ext CompiledSVI": by_pyro(CompiledSVI, Trace_ELBO(), "ours"),
        "Pyro SVI": by_pyro(SVI, Trace_ELBO(), "pyro"),
        "JitTrace_ELBO (Pyro)": by_pyro(SVI, JitTrace_ELBO(ignore_jit_warnings=True), "jit"),
        "by hand, eager PyTorch": by_hand(),
    }
    arrays: list[Any] = []
    try:
        import jax.numpy as jnp

        update, unrolled = by_numpyro()
        arrays = [jnp.asarray(v.numpy()) for v in data]
        steps["NumPyro update"] = update  # pyright: ignore[reportArgumentType]
    except ImportError:
        print("NumPyro is not installed: left out.")
        unrolled = None
    print(machine())
    print("Seconds until three steps were taken (set-up and compilation):")
    for label, step in steps.items():
        print(first_steps(label, step, arrays[0] if "NumPyro" in label else data[0]), flush=True)
    runs = {
        label: contestant(step, arrays if "NumPyro" in label else data, arguments.steps)
        for label, step in steps.items()
    }
    timings = take_turns(runs, arguments.repeats)
    check_agreement(timings, 0.02)
    if unrolled is not None:
        timings.append(_in_one_loop(unrolled, arrays[0], arguments.unrolled, arguments.repeats))
    print(table("A step of SVI, VAE 64-64-16", timings, "mean loss, nats a row"))
    numpyro = next((t for t in timings if t.label == "NumPyro update"), None)
    if numpyro is not None:
        print(f"Against NumPyro's update: {numpyro.median / timings[0].median:.2f} (above 1: ours is faster).")
    print(closing_line("svi_step", timings, "Pyro SVI"))


def _in_one_loop(run: Callable[[Any, int], Any], v: Any, num_steps: int, repeats: int) -> Timing:
    """NumPyro's `run` on one batch, a step, its compilation left out as far as two lengths tell."""
    timing = Timing("NumPyro run, one batch", peer=False)
    run(v, num_steps)
    for _ in range(repeats):
        started = time.perf_counter()
        losses = run(v, num_steps)
        timing.seconds.append((time.perf_counter() - started) / num_steps)
        timing.answer = float(losses[-100:].mean()) / len(v)
    return timing
