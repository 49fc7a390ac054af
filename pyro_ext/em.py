"""EM: the driver that alternates an E-step and an M-step, with a ledger of L after each half (19.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pyro
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from pyro_ext.call_arguments import is_same_program
from pyro_ext.checkpoint import Checkpoint
from pyro_ext.checks import check_data_of
from pyro_ext.closed_form import ClosedForm
from pyro_ext.compiled import Compilation
from pyro_ext.fixed_point import FixedPoint
from pyro_ext.history import History
from pyro_ext.posterior import Posterior
from pyro_ext.program import Program
from pyro_ext.run import Run
from pyro_ext.snapshot import Snapshot, modules_of, rng_state, set_rng_state
from pyro_ext.steps import Call, EResult, EStep, MStep
from pyro_ext.unbounded import warn_if_unbounded


class EM:
    """Coordinate ascent on L(theta, q): an E-step moves q, an M-step moves theta (19.2).

    The same driver serves exact EM, variational EM, MAP learning and amortized inference: they differ in
    the guide and in the two steps. `step` and `evaluate_loss` have the contract of `pyro.infer.SVI`.

    Args:
        model: any Pyro model.
        guide: a guide of `pyro_ext.guides` on that model.
        e_step: how q moves: `FixedPoint()`, `Gradient(optim)`, ...
        m_step: how theta moves: `ClosedForm()`, `Gradient(optim)`, ...; None holds theta.
        compile: run `FixedPoint` E-steps that are exact in one sweep, and the statistics of a `ClosedForm` M-step with
            them, as one graph made by torch.compile (which needs a C++ compiler); for other quadratic programs the
            extraction of c, b and J. A graph is made once for every shape of the data, in some ten seconds, and
            compared with the eager run from time to time. Sums over paths and enumerations run as without it.

    Raises:
        TypeError: model, guide or step that do not go together, named.
        RuntimeError: at a step with `compile`, for a model with Python branches on values of tensors.

    Example:
        >>> import torch
        >>> from pyro_ext import ClosedForm, FixedPoint
        >>> from pyro_ext.guides import MeanField
        >>> from pyro_ext.models import GaussianMixture
        >>> v = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 5])
        >>> model = GaussianMixture(num_components=2, num_visible=2)
        >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
        >>> history = em.run(v, max_steps=100, tolerance=1e-6, progress=False)
        >>> history.status
        <Status.CONVERGED: 'converged'>
    """

    def __init__(
        self, model: Callable[..., Any], guide: Any, *, e_step: EStep, m_step: MStep | None, compile: bool = False
    ) -> None:
        if not callable(model):
            raise TypeError(f"Expected a Pyro model, but got {type(model).__name__}. Pass a callable.")
        if isinstance(guide, type):
            raise TypeError(f"Expected a guide, but got the class {guide.__name__}. Write {guide.__name__}(model).")
        if not hasattr(guide, "make_blocks"):
            raise TypeError(
                f"Expected a guide of pyro_ext.guides for EM, but got {type(guide).__name__}. "
                "Use MeanField, Dirac, Structured or Amortized; your own Pyro guides work in pyro.infer.SVI."
            )
        if not is_same_program(guide.model, model):
            raise TypeError(
                "Expected a guide that was built from this model, but got one built from another. "
                f"Write {type(guide).__name__}(model)."
            )
        if not isinstance(e_step, EStep):
            raise TypeError(f"Expected an E-step object, but got {e_step!r}. Write FixedPoint() or Gradient(optim).")
        if m_step is not None and not isinstance(m_step, MStep):
            raise TypeError(
                f"Expected an M-step object or None, but got {m_step!r}. Write ClosedForm() or Gradient(optim)."
            )
        e_step.check(model, guide)
        if m_step is not None:
            m_step.check(model, guide)
        self.model = model
        self.guide = guide
        self.e_step = e_step
        self.m_step = m_step
        self.compile = compile
        self._quadratic = True
        self._parameter_names: set[str] | None = None
        statistics = cast("Any", model).statistics if isinstance(m_step, ClosedForm) else None
        # Gradients in q need the eager run.
        self._compilation = Compilation(statistics) if compile and isinstance(e_step, FixedPoint) else None
        self._snapshot: Snapshot | None = None
        # A maximum in closed form exists, or the model refuses.
        self._may_be_unbounded = not isinstance(m_step, ClosedForm)
        if guide.is_table:
            guide.inference = self.infer

    @property
    def parts(self) -> tuple[Any, ...]:
        """The optimizers that steps move beside theta and q."""
        optims = [getattr(step, "optim", None) for step in (self.e_step, self.m_step)]
        return tuple(o for o in optims if o is not None)

    @property
    def loss_label(self) -> str:
        """What the losses are: -L, or -log p(h, v) under a point mass on continuous latents."""
        return "-log p(h, v)" if self._is_point() else "-L"

    def _is_point(self) -> bool:
        return any(b.factor.is_point and not getattr(b.factor, "discrete", False) for b in self.guide.blocks)

    # ------------------------------------------------------------------ one call

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """Check the data and trace the model on them.

        Raises:
            ValueError: bad data, or a model without visible or latent sites.
        """
        return self._call(args, kwargs, bind=True)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, bind: bool) -> Call:
        with self.refusal():
            _refuse_containers((*args, *kwargs.values()))
            check_data_of(self.model, args, kwargs)
            # A table belongs to the data that it is trained on: merely looking at data does not bind it to them.
            if bind or not self.guide.is_table or self.guide.was_loaded_for(args, kwargs):
                self.guide.setup(*args, **kwargs)
            program = Program.with_fresh_rows(self.model, args, kwargs)
            self._note_parameters(program)
            return Call(self.model, self.guide, program, self._quadratic, self._compilation)

    def _note_parameters(self, program: Program) -> None:
        names = {name for name, node in program.trace.nodes.items() if node["type"] == "param"}
        self._parameter_names = names | (self._parameter_names or set())

    @property
    def parameter_names(self) -> frozenset[str] | None:
        """The parameters that the model was seen to ask for; None before its first call."""
        return None if self._parameter_names is None else frozenset(self._parameter_names)

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the parameters: which tests of the program need no other try."""
        return {"quadratic": self._quadratic, "may_be_unbounded": self._may_be_unbounded}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Put back what `checkpoint_state` gave."""
        self._quadratic, self._may_be_unbounded = state["quadratic"], state["may_be_unbounded"]

    @contextmanager
    def refusal(self, is_under_way: Callable[[], bool] = bool) -> Generator[None, None, None]:
        """Leave no parameters and no set-up guide behind when an error ends this before it is under way."""
        store = pyro.get_param_store()
        before, was_set_up = set(store.keys()), self.guide.is_set_up
        try:
            yield
        except Exception:
            if not is_under_way():
                for name in set(store.keys()) - before:
                    del store[name]
                if not was_set_up:
                    self.guide.undo_setup()
            raise

    def e_half(self, call: Call) -> EResult:
        """The E half-step: raise L in q. New data of a table guide are inferred from a cold start."""
        keep = not self.guide.is_table or self.guide.owns(call.args, call.kwargs)
        if not keep and self.m_step is not None:
            self.e_step.check_other_data(call)
        result = self.e_step.improve(call, keep=keep)
        self._quadratic = call.quadratic
        return result

    def m_half(self, call: Call, result: EResult) -> None:
        """The M half-step: raise L in theta."""
        if self.m_step is not None:
            if self._may_be_unbounded:
                self._may_be_unbounded = False
                warn_if_unbounded(call, result)
            if self.m_step.reads_guide:
                call.flush()
            self.m_step.improve(call, result)
            call.theta_changed()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One E half-step and one M half-step on a batch.

        Returns:
            -L after the E half-step and before the M half-step, nats, summed over the batch (times N/B for a
            subsampled program); -log p(h, v) under a point mass on continuous latents. Where that is not finite
            there was no M half-step.

        Raises:
            ValueError: bad data. Nothing has changed then.
        """
        with self.refusal():
            call = self.call(*args, **kwargs)
            if self._snapshot is None:
                self._snapshot = Snapshot.take(*modules_of(self.model, self.guide), *self.parts)
            self._snapshot.retake()
            answered = self.guide.is_table and self.guide.holds_answer
            try:
                result = self.e_half(call)
                loss = float(-result.bound.sum() * call.scale)
                if math.isfinite(loss):
                    self.m_half(call, result)
            except Exception:
                self._snapshot.restore()
                if self.guide.is_table:
                    # To write the table back is no answer.
                    self.guide.holds_answer = answered
                raise
        return loss

    @contextmanager
    def epoch(self) -> Generator[None, None, None]:
        """Take the steps in the block as the batches of one data set, as `fit` does for each pass over a loader.

        `ClosedForm()` adds up their statistics and moves theta once, at the end of the block: EM on data that are
        never in memory at once. Steps that move theta at every batch are not changed by it. When the block
        raises, what was gathered is dropped.

        Raises:
            RuntimeError: one epoch inside another.

        Example:
            >>> import torch
            >>> from pyro_ext import ClosedForm, FixedPoint
            >>> from pyro_ext.guides import MeanField
            >>> from pyro_ext.models import GaussianMixture
            >>> model = GaussianMixture(num_components=2, num_visible=1)
            >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=ClosedForm())
            >>> with em.epoch():
            ...     for batch in torch.randn(12, 1).split(5):
            ...         _ = em.step(batch)
        """
        with nullcontext() if self.m_step is None else self.m_step.epoch(self.model):
            yield

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """-L on a batch in nats, summed; nothing changes.

        The data of a table guide are evaluated at the table, once it holds an answer; other data are inferred first.
        """
        with self.refusal():
            is_table = self.guide.is_table
            infers = self.e_step.infers_itself or (is_table and self.e_step.infers_for_tables)
            call = self._call(args, kwargs, bind=not infers)
            if infers and not (is_table and self.guide.holds_answer and self.guide.owns(args, kwargs)):
                bound = self.e_step.improve(call, keep=False).bound
            else:
                params = self.guide.rows_parameters(call.program) if self.guide.is_static else None
                bound, _ = call.bound(None, params, num_particles=getattr(self.e_step, "num_particles", 10))
        return float(-bound.sum() * call.scale)

    def infer(self, *args: Any, **kwargs: Any) -> Posterior:
        """q(h | v) of new data: the E-step from a cold start; theta and tables do not change.

        Example:
            >>> import torch
            >>> from pyro_ext import FixedPoint
            >>> from pyro_ext.guides import MeanField
            >>> from pyro_ext.models import BinarySparseCoding
            >>> model = BinarySparseCoding(num_visible=4, num_latents=3)
            >>> em = EM(model, MeanField(model), e_step=FixedPoint(), m_step=None)
            >>> em.infer(torch.randn(5, 4))["h"].mean.shape
            torch.Size([5, 3])
        """
        with self.refusal():
            return self.e_step.improve(self._call(args, kwargs, bind=False), keep=False).posterior

    def num_rows(self, *args: Any, **kwargs: Any) -> int:
        """Number of rows of a batch; N where a subsampled program's losses speak for N rows."""
        rows = Program(self.model, args, kwargs).rows
        return round(rows.count * rows.scale)

    # ------------------------------------------------------------------ a whole run

    def run(
        self,
        *args: Any,
        max_steps: int = 100,
        tolerance: float = 1e-5,
        num_restarts: int = 1,
        seed: int | None = None,
        progress: bool = True,
        callbacks: Sequence[Callable[[Any], None]] = (),
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> History:
        """Alternate the half-steps until L settles.

        A model of this project whose parameters nobody has touched yet is started by its ``initialize(*args)``.

        Args:
            *args: arguments of the model.
            max_steps: most EM steps of one start.
            tolerance: nats per row: a step that raises L by less has converged.
            num_restarts: number of starts; the first is the present state, the others are drawn by the model's
                ``initialize(*args)`` (or anew from its parameters' initial values), and the best L is kept.
            seed: seeds Pyro's generators first, when given.
            progress: show a progress bar.
            callbacks: called after each EM step with an `EpochEnd`; one may raise `StopFit`.
            checkpoint: a file to keep the run in after its EM steps. Where that file exists, the run goes on from it,
                with the same numbers as if it had never stopped: parameters, optimizers, ledger, restarts and random
                generators are those of the last step that was written. A run that had ended is returned at once, or
                goes on when it had taken all steps and `max_steps` is larger now. Build model, guide and steps as they
                were; callbacks are called again for steps that were not written.
            **kwargs: keyword arguments of the model.

        Returns:
            History with a ledger of L after each half-step and an ending status: ``converged``, ``max_steps``,
            ``decreased`` (L fell where the steps promise that it does not), ``non_finite`` (the state before is
            restored), ``stopped`` or ``interrupted``.

        Raises:
            ValueError: bad data or settings. Nothing has changed then.
            CheckpointError: (a ValueError) the checkpoint is damaged, or was written with other settings, data, model
                or versions of the packages. Nothing has changed then.
            OSError: the checkpoint could not be written; the last one is still there.
        """
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"Expected max_steps of at least 1, but got {max_steps!r}. Use evaluate_loss for none.")
        if not isinstance(num_restarts, int) or num_restarts < 1:
            raise ValueError(f"Expected num_restarts of at least 1, but got {num_restarts!r}. 1 is a single start.")
        if not tolerance >= 0:
            raise ValueError(f"Expected a tolerance of at least 0, but got {tolerance!r}. It is in nats per row.")
        run: Run | None = None
        generators = rng_state()
        try:
            with self.refusal(lambda: run is not None and run.is_under_way):
                if seed is not None:
                    pyro.set_rng_seed(seed)
                run = Run(self, args, kwargs, max_steps, tolerance, progress, callbacks)
                return run.best_of(num_restarts, checkpoint, seed)
        except Exception:
            if run is None or not run.is_under_way:
                set_rng_state(generators)
            raise


def _refuse_containers(arguments: tuple[Any, ...]) -> None:
    """Refuse what holds data but is no tensor.

    Raises:
        TypeError: a DataLoader or a NumPy array, with the remedy.
    """
    has_tensor = any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments))
    for value in arguments:
        if isinstance(value, DataLoader):
            raise TypeError(f"Expected the data, but got a {type(value).__name__}. Use `fit(em, loader)` for batches.")
        if isinstance(value, np.ndarray) and not has_tensor:
            raise TypeError("Expected tensors, but got a NumPy array. Write torch.as_tensor(array).")
