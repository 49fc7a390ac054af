"""Factorial HMM, exact E-step: log p(v) and posterior of all chains, seconds a call.

Three chains of four states, 50 sequences of 100 steps, D = 6. Ours is `Structured`, one factor over their product;
the peer is hmmlearn on the HMM over the 64 product states, with parameters written out by hand. The structured
approximation of Ghahramani & Jordan (1997), `MeanField` with a factor a chain, is shown beside it, with its L. float64.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare import Run, check_agreement, closing_line, machine, parse, table, take_turns, timed
from pyro_ext import EM, FixedPoint
from pyro_ext.guides import MeanField, Structured
from pyro_ext.models import FactorialHMM, assign_parameters, read_parameter


def make_model(chains: int, states: int, visible: int) -> FactorialHMM:
    """A model with sticky chains and overlapping contributions."""
    generator = torch.Generator().manual_seed(0)
    model = FactorialHMM(visible, [states] * chains).double()
    values: dict[str, Tensor] = {
        "W": torch.randn(visible, chains * states, generator=generator, dtype=torch.float64),
        "scale": torch.full((visible,), 0.7, dtype=torch.float64),
    }
    for chain in range(1, chains + 1):
        values[f"transition{chain}"] = 0.8 * torch.eye(states).double() + 0.2 / states
    assign_parameters(model, values)
    return model


def ours(model: FactorialHMM, v: Tensor, guide_class: type) -> Run:
    """The library's E-step on new data, posterior means of every chain included."""
    em = EM(model, guide_class(model), e_step=FixedPoint(), m_step=None)
    names = [f"h{i + 1}" for i in range(len(model.num_states))]

    def infer() -> float:
        call = em.call(v)
        result = em.e_half(call)
        for name in names:
            _ = result.posterior[name].mean
        return float(result.bound.sum())

    return lambda: timed(infer)


def hmmlearn(model: FactorialHMM, v: np.ndarray) -> Run:
    """hmmlearn on the product space."""
    from hmmlearn.hmm import GaussianHMM

    sizes = list(model.num_states)
    edges = np.concatenate([[0], np.cumsum(sizes)])
    W, scale = (read_parameter(model, name).detach().numpy() for name in ("W", "scale"))
    shift = model.shift.numpy()
    initial, transition = np.ones(1), np.ones((1, 1))
    for chain in range(1, len(sizes) + 1):
        initial = np.kron(initial, read_parameter(model, f"initial{chain}").detach().numpy())
        transition = np.kron(transition, read_parameter(model, f"transition{chain}").detach().numpy())
    joint = itertools.product(*(range(size) for size in sizes))
    means = np.stack([sum(W[:, edges[m] + k] for m, k in enumerate(state)) for state in joint]) + 0 * shift
    peer = GaussianHMM(len(initial), "diag")
    peer.startprob_, peer.transmat_ = initial / initial.sum(), transition / transition.sum(-1, keepdims=True)
    peer.means_, peer.covars_ = means, np.broadcast_to(scale**2, means.shape)
    peer.n_features = v.shape[-1]
    flat, lengths = v.reshape(-1, v.shape[-1]), [v.shape[1]] * len(v)
    return lambda: timed(lambda: float(peer.score_samples(flat, lengths)[0]))


def main(options: list[str]) -> None:
    """Run the comparison."""
    arguments = parse(options, __doc__, sequences=50, steps=100, chains=3, states=4, visible=6)
    torch.manual_seed(1)
    model = make_model(arguments.chains, arguments.states, arguments.visible)
    v = model.dream(arguments.sequences, num_steps=arguments.steps)
    print(
        f"{arguments.sequences} sequences of {arguments.steps} steps, {arguments.chains} chains of {arguments.states} "
        f"states, D = {arguments.visible}; {machine()}"
    )
    exact = take_turns(
        {"pyro-ext, joint factor": ours(model, v, Structured), "hmmlearn, product space": hmmlearn(model, v.numpy())},
        arguments.repeats,
    )
    check_agreement(exact, 1e-8)
    structured = take_turns({"pyro-ext, factor a chain": ours(model, v, MeanField)}, arguments.repeats)
    print(table("exact posterior", exact, "log p(v)"))
    print(table("structured approximation", structured, "L"))
    print(closing_line("fhmm", exact))
