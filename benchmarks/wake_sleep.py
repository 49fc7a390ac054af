"""Reweighted wake-sleep a step: a sigmoid belief network 16-32-64 on binarised digits, against Pyro's own.

Data as in `wake_sleep_digits`: 1,400 rows for training, 397 for testing; batches of 100 rows without replacement within
an epoch; K = 10 particles, wake-phi (insomnia 1). Encoders bottom-up, q(h1 | v) q(h2 | h1), each a linear path beside
tanh units. All contestants have the same network, the same start and Adam; the learning rate of each is the best
of 1e-3, 3e-3 and 1e-2 by the NLL of the last 200 training rows after training on the first 1,200 (100 samples). Then
each trains on all 1,400 rows; test NLL: -log(1/S sum_s w_s) with S = 500 samples of q, nats a row.

- *Pyro ReweightedWakeSleep* runs a program as Pyro's users write it, batched; its weights are those of the whole batch.
- *pyro-ext, eager* runs `WakeSleep` on the same program under `pyro.infer.SVI`; *with Amortized* it runs this project's
  model and guide instead.
- *pyro-ext, compiled* is `CompiledSVI` on the same program.
- *PyTorch by hand* is an eager loop with weights per row, one Adam for all tensors.

Steps are timed in turns, with Pyro's validation off for all, then on (its default). The closing line compares the
compiled step with Pyro's, validation off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, ReweightedWakeSleep
from pyro.optim import Adam
from torch import Tensor, nn

from benchmarks.compare import Run, Timing, closing_line, machine, parse, take_turns, timed
from benchmarks.wake_sleep_digits import split
from pyro_ext import WakeSleep, log_evidence
from pyro_ext.compiled_svi import CompiledSVI
from pyro_ext.guides import Amortized
from pyro_ext.guides.encoders import DefaultEncoder
from pyro_ext.models import SigmoidBeliefNetwork
from pyro_ext.models.sigmoid_belief_network import smoothed_logit

SIZES = (16, 32, 64)
NUM_PARTICLES = 10
BATCH = 100
RATES = (1e-3, 3e-3, 1e-2)
NUM_VALIDATION = 200

_NUMBERS = itertools.count()


class Decoder(nn.Module):
    """Logits of each layer of the network, given the layer above."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        top, middle, visible = SIZES
        self.prior = nn.Parameter(torch.zeros(top))
        self.to_h1 = nn.Linear(top, middle)
        self.to_v = nn.Linear(middle, visible)
        with torch.no_grad():
            for layer, bias in ((self.to_h1, torch.zeros(middle)), (self.to_v, smoothed_logit(rows))):
                layer.weight.uniform_(-1, 1).div_(math.sqrt(layer.in_features))
                layer.bias.copy_(bias)


class Encoder(nn.Module):
    """Logits of q(h1 | v) and q(h2 | h1)."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        top, middle, visible = SIZES
        self.to_h1 = DefaultEncoder(visible, middle, torch.zeros(middle), data=rows)
        self.to_h2 = DefaultEncoder(middle, top, torch.zeros(top), data=torch.rand(1000, middle).round())


class Programs:
    """Model and guide as one writes them for Pyro."""

    def __init__(self, rows: Tensor) -> None:
        self.name = f"network_{next(_NUMBERS)}"
        self.decoder, self.encoder = Decoder(rows), Encoder(rows)

    def model(self, v: Tensor) -> None:
        """p(v, h1, h2)."""
        net = pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("data", len(v)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=net.prior).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=net.to_h1(h2)).to_event(1))
            pyro.sample("v", dist.Bernoulli(logits=net.to_v(h1)).to_event(1), obs=v)

    def guide(self, v: Tensor) -> None:
        """q(h1 | v) q(h2 | h1)."""
        net = pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("data", len(v)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=net.to_h1(v)).to_event(1))
            pyro.sample("h2", dist.Bernoulli(logits=net.to_h2(h1)).to_event(1))


@dataclass
class Trainer:
    """One contestant, built: a step on a batch, and the programs that evaluate it."""

    step: Callable[[Tensor], Any]
    model: Callable[..., Any]
    guide: Callable[..., Any]


def pyros(rows: Tensor, rate: float) -> Trainer:
    """Pyro's ReweightedWakeSleep."""
    programs = Programs(rows)
    loss = ReweightedWakeSleep(num_particles=NUM_PARTICLES, insomnia=1.0, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(programs.model, programs.guide, Adam({"lr": rate}), loss=loss)
    return Trainer(svi.step, programs.model, programs.guide)


def eager(rows: Tensor, rate: float) -> Trainer:
    """WakeSleep on the same program, under Pyro's SVI."""
    programs = Programs(rows)
    loss = WakeSleep(NUM_PARTICLES, insomnia=1.0, max_plate_nesting=1)
    svi = SVI(programs.model, programs.guide, Adam({"lr": rate}), loss=loss)
    return Trainer(svi.step, programs.model, programs.guide)


def compiled(rows: Tensor, rate: float) -> Trainer:
    """WakeSleep on the same program, compiled."""
    programs = Programs(rows)
    loss = WakeSleep(NUM_PARTICLES, insomnia=1.0, max_plate_nesting=1)
    svi = CompiledSVI(programs.model, programs.guide, Adam({"lr": rate}), loss)
    return Trainer(svi.step, programs.model, programs.guide)


def amortized(rows: Tensor, rate: float) -> Trainer:
    """WakeSleep on this project's model and guide, under Pyro's SVI."""
    model = SigmoidBeliefNetwork(SIZES)
    model.initialize(rows)
    guide = Amortized(model)
    guide.setup(rows)
    svi = SVI(model, guide, Adam({"lr": rate}), loss=WakeSleep(NUM_PARTICLES, insomnia=1.0, max_plate_nesting=1))
    return Trainer(svi.step, model, guide)


def by_hand(rows: Tensor, rate: float) -> Trainer:
    """The same step in plain PyTorch."""
    programs = Programs(rows)
    decoder, encoder = programs.decoder, programs.encoder
    adam = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=rate)

    def log_prob(value: Tensor, logits: Tensor) -> Tensor:
        return -nn.functional.binary_cross_entropy_with_logits(
            logits, value.expand(logits.shape), reduction="none"
        ).sum(-1)

    def step(v: Tensor) -> float:
        logits_h1 = encoder.to_h1(v).expand(NUM_PARTICLES, -1, -1)
        h1 = torch.bernoulli(logits_h1.detach().sigmoid())
        logits_h2 = encoder.to_h2(h1)
        h2 = torch.bernoulli(logits_h2.detach().sigmoid())
        log_q = log_prob(h1, logits_h1) + log_prob(h2, logits_h2)
        log_p = log_prob(h2, decoder.prior.expand(h2.shape))
        log_p = log_p + log_prob(h1, decoder.to_h1(h2)) + log_prob(v, decoder.to_v(h1))
        log_w = (log_p - log_q).detach()
        adam.zero_grad()
        (-(log_w.softmax(0) * (log_p + log_q)).sum()).backward()
        adam.step()
        return -(log_w.logsumexp(0) - math.log(NUM_PARTICLES)).sum().item()

    return Trainer(step, programs.model, programs.guide)


CONTESTANTS: dict[str, Callable[[Tensor, float], Trainer]] = {
    "pyro-ext, compiled": compiled,
    "pyro-ext, eager": eager,
    "pyro-ext, eager, Amortized": amortized,
    "PyTorch by hand": by_hand,
    "Pyro ReweightedWakeSleep": pyros,
}


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Batches without end, in a new order each epoch."""
    while True:
        for chosen in torch.randperm(len(rows))[: len(rows) // BATCH * BATCH].split(BATCH):
            yield rows[chosen]


def trained(build: Callable[[Tensor, float], Trainer], rows: Tensor, rate: float, num_steps: int) -> Trainer:
    """A contestant after training from seed 0."""
    pyro.set_rng_seed(0)
    trainer = build(rows, rate)
    for v in itertools.islice(batches(rows), num_steps):
        trainer.step(v)
    return trainer


def nll(trainer: Trainer, rows: Tensor, num_samples: int) -> tuple[float, float]:
    """Negative log-likelihood and its Monte-Carlo error, nats a row."""
    evidence = log_evidence(trainer.model, trainer.guide, rows, num_samples=num_samples)
    return -evidence.mean, evidence.mean_standard_error


def chosen_rate(build: Callable[[Tensor, float], Trainer], rows: Tensor, num_steps: int) -> float:
    """The learning rate with the lowest NLL of the validation rows."""
    train, validation = rows[:-NUM_VALIDATION], rows[-NUM_VALIDATION:]
    return min(RATES, key=lambda rate: nll(trained(build, train, rate, num_steps), validation, 100)[0])


def timing_run(trainer: Trainer, rows: Tensor, num_steps: int, validate: bool) -> Run:
    """Steps on ready batches; seconds a step, and the loss of the last one in nats a row."""
    stream = batches(rows)

    def run() -> tuple[float, float]:
        ready = list(itertools.islice(stream, num_steps))

        def steps() -> Any:
            loss: Any = None
            for v in ready:
                loss = trainer.step(v)
            return loss

        with pyro.validation_enabled(validate):
            seconds, loss = timed(steps)
        return seconds / num_steps, float(loss[0] if isinstance(loss, tuple) else loss) / BATCH

    return run


def show(title: str, timings: list[Timing], notes: dict[str, str]) -> None:
    """Medians, ratios to Pyro's step, and what each contestant learned."""
    pyros_median = timings[-1].median
    print(title)
    print(f"  {'':28}{'median ms':>11}{'least ms':>10}{'Pyro / this':>13}  {'rate':8}{'test NLL':>9}{'error':>7}")
    for timing in timings:
        print(
            f"  {timing.label:28}{1e3 * timing.median:11.3f}{1e3 * min(timing.seconds):10.3f}"
            f"{pyros_median / timing.median:13.2f}  {notes[timing.label]}",
            flush=True,
        )


def main(options: list[str]) -> None:
    """Choose rates, train, evaluate, and time."""
    given = parse(options, __doc__, steps=2000, samples=500, timed_steps=100)
    train, test = split()
    print(f"{given.steps} steps of training, K = {NUM_PARTICLES}, batches of {BATCH}; {machine()}")
    notes: dict[str, str] = {}
    rates: dict[str, float] = {}
    for label, build in CONTESTANTS.items():
        pyro.clear_param_store()
        rates[label] = chosen_rate(build, train, given.steps)
        value, error = nll(trained(build, train, rates[label], given.steps), test, given.samples)
        notes[label] = f"{rates[label]:<8g}{value:9.3f}{error:7.3f}"
    pyro.clear_param_store()
    timings: list[Timing] = []
    for validate in (True, False):
        trainers = {label: build(train, rates[label]) for label, build in CONTESTANTS.items()}
        runs = {label: timing_run(t, train, given.timed_steps, validate) for label, t in trainers.items()}
        timings = take_turns(runs, given.repeats)
        show(f"ms a step, Pyro's validation {'on (its default)' if validate else 'off'}", timings, notes)
    print(closing_line("wake_sleep", timings, "Pyro"))
