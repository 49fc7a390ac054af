"""The choice of an evaluator for a program and its factors, by a test at the present theta."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from pyro_ext.blocks import Block
from pyro_ext.chain_form import are_chains, chain_form
from pyro_ext.chains import Chains
from pyro_ext.evaluators import (
    MAX_STATES,
    Enumerated,
    Evaluator,
    NoEvaluatorError,
    Quadratic,
    can_enumerate,
    enumerate_log_joint,
    log2_states,
)
from pyro_ext.layout import Layout
from pyro_ext.multilinear import Multilinear, NotMultilinearError
from pyro_ext.points import Points, are_continuous_points
from pyro_ext.program import Program
from pyro_ext.quadratic import NotQuadraticError, quadratic_form


def choose_evaluator(
    program: Program,
    blocks: Sequence[Block],
    *,
    try_quadratic: bool = True,
    create_graph: bool = False,
) -> Evaluator:
    """The exact evaluator that serves a program and its factors, found by a test at the present theta.

    Quadratic programs are turned into matrices; others are enumerated where the states allow it, or run at the points
    of q, or at its means where they are multilinear. Samples are never taken without being asked for: they would turn
    an exact step into a noisy one as soon as a model grows by one unit, and L could no longer promise not to fall.

    Args:
        program: the program.
        blocks: the factors of q.
        try_quadratic: False skips the quadratic test, for programs that failed it before.
        create_graph: keep the graph to theta, for a gradient M-step.

    Raises:
        NoEvaluatorError: nothing exact serves; the message says why and what does.
    """
    layout = Layout(program.rows, program.latents)
    reason = ""
    if try_quadratic and Chains.serves(blocks) and are_chains(program):
        with contextlib.suppress(NotQuadraticError):
            return Chains(chain_form(program, create_graph=create_graph), blocks)
    if try_quadratic:
        try:
            return Quadratic(quadratic_form(program, create_graph=create_graph), blocks)
        except NotQuadraticError as error:
            reason = str(error)
    if can_enumerate(program):
        with torch.set_grad_enabled(create_graph):
            return Enumerated(enumerate_log_joint(program), layout, blocks)
    if are_continuous_points(blocks):
        return Points(program, blocks, create_graph=create_graph)
    try:
        return Multilinear(program, blocks, create_graph=create_graph)
    except NotMultilinearError as error:
        refusal = str(error)
    if all(site.kind.is_discrete for site in program.latents):
        row = "a row" if program.rows.names else "the one row that a program without a common plate has"
        reason = (
            f"Expected log p(v, h) quadratic in its latents, or at most {MAX_STATES} joint states of {row}, but got no "
            f"quadratic form and 2^{log2_states(program):.0f} states. {refusal} Or use `Gradient`, or pyro.infer.SVI."
        )
    raise NoEvaluatorError(reason)
