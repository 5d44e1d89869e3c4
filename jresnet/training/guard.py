"""What is not finite: found in losses and weights, traced to a layer on request, answered by going back."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet.errors import JresnetError
from jresnet.training.feed import Feed
from jresnet.training.loop import Order
from jresnet.training.nans import find_non_finite
from jresnet.training.program import Program
from jresnet.training.step import Images, TrainState, prepare

ROLLBACKS = 3  # how often a run goes back to its last checkpoint


class NonFiniteLoss(JresnetError, ArithmeticError):
    """A loss or a weight is NaN or infinite; the message names the step."""


class Guard:
    """Looks at what training computes.

    Args:
        program: what is trained.
        checkpoints: the folder of the run's checkpoints, for messages.
        search: name the layer where a non-finite value comes from; costs a copy of the state before each look.
    """

    def __init__(self, program: Program, checkpoints: Path, search: bool):
        self.program, self.checkpoints, self.search = program, checkpoints, search

    def copy(self, state: TrainState) -> TrainState | None:
        """The state to search in, should the next step fail; None where nobody searches."""
        return jax.tree.map(jnp.copy, state) if self.search else None

    def check(
        self,
        state: TrainState,
        losses: np.ndarray,
        before: TrainState | None,
        split: Images | Feed,
        order: Order,
        key: jax.Array,
    ) -> None:
        """Checks the losses of the last steps, and the weights too where it searches.

        Args:
            state: after these steps.
            losses: float32 ``[steps]``.
            before: what :meth:`copy` gave before them.
            split: what the epoch's batches are taken from.
            order: the epoch's batches, int ``[steps an epoch, batch]``.
            key: of the augmentation.

        Raises:
            NonFiniteLoss: where one of them is NaN or infinite.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            step = int(state.step) - len(losses) + int(bad[0])
            raise self._error(f"the loss is {losses[bad[0]]}", step, self._layers(before, split, order, key))
        if before is not None and not self.program.finite(state):
            raise self._error("a weight is not finite", int(state.step) - 1, self._layers(before, split, order, key))

    def check_weights(self, state: TrainState) -> None:
        """Raises :class:`NonFiniteLoss` where a weight is not finite: before anything of the state is kept."""
        if not self.program.finite(state):
            raise self._error("a weight is not finite after a finite loss", int(state.step) - 1, [])

    def _error(self, reason: str, step: int, found: list[str]) -> NonFiniteLoss:
        message = f"{reason} at step {step} (epoch {step // self.program.steps_per_epoch + 1})"
        if found:
            return NonFiniteLoss("\n  ".join([message, *found]))
        return NonFiniteLoss(
            f"{message}: the checkpoint before it, if any, is whole in {self.checkpoints}. A lower `lr`, `clip_norm` or "
            "`precision` float32 may help, `on_nan` rollback goes back by itself, `debug_nans` names the layer"
        )

    def _layers(self, before: TrainState | None, split: Images | Feed, order: Order, key: jax.Array) -> list[str]:
        """Where in the step after ``before`` the first non-finite value is; nothing where nobody searches."""
        if before is None:
            return []
        program = self.program
        views = prepare(program.pipeline, program.steps_per_epoch, program.config.label_smoothing)
        step = int(before.step) % program.steps_per_epoch
        batch = split.again(step) if isinstance(split, Feed) else split
        found = jax.jit(views, static_argnums=4)(before.step, batch, order[step], key, len(program.data.classes))
        images, targets = (jnp.asarray(np.asarray(part)) for part in found)  # on one device
        model = nnx.merge(program.graph, *jax.tree.map(np.asarray, (before.params, before.batch_stats)))
        return find_non_finite(model, images, targets) or ["forward and backward pass are finite: the update is not"]


def next_rollback(error: NonFiniteLoss, on_nan: str, rollbacks: int) -> int:
    """The number of the rollback that ``error`` is answered with, from 1; raises it where the run is to stop.

    Args:
        error: why.
        on_nan: ``"stop"`` or ``"rollback"``.
        rollbacks: how often the run has gone back already.
    """
    if on_nan == "stop" or rollbacks == ROLLBACKS:
        raise error
    return rollbacks + 1
