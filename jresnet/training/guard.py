"""Detects non-finite losses and weights, finds the layer that causes them, and decides about rollbacks."""

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

ROLLBACKS = 3  # largest number of rollbacks of a run to its last checkpoint


class NonFiniteLoss(JresnetError, ArithmeticError):
    """A loss or a weight is NaN or infinite; the message names the step."""


class Guard:
    """Checks losses and weights in training.

    Args:
        program: the program that trains.
        checkpoints: folder of the run's checkpoints, for messages.
        search: find the layer that causes a non-finite value; this needs a copy of the state before each check.
    """

    def __init__(self, program: Program, checkpoints: Path, search: bool):
        self.program, self.checkpoints, self.search = program, checkpoints, search

    def copy(self, state: TrainState) -> TrainState | None:
        """A copy of the state, to search in if the next step fails; None if ``search`` is off."""
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
        """Checks the losses of the last steps, and with ``search`` also the weights.

        Args:
            state: state after these steps.
            losses: float32 ``[steps]``.
            before: result of :meth:`copy` before these steps.
            split: source of the epoch's batches.
            order: the epoch's batches, int ``[steps per epoch, batch]``.
            key: random key of the augmentation.

        Raises:
            NonFiniteLoss: a loss or a weight is NaN or infinite.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            step = int(state.step) - len(losses) + int(bad[0])
            raise self._error(f"the loss is {losses[bad[0]]}", step, self._layers(before, split, order, key))
        if before is not None and not self.program.finite(state):
            raise self._error("a weight is not finite", int(state.step) - 1, self._layers(before, split, order, key))

    def check_weights(self, state: TrainState) -> None:
        """Raises :class:`NonFiniteLoss` if a weight is not finite; called before the state is saved."""
        if not self.program.finite(state):
            raise self._error("a weight is not finite after a finite loss", int(state.step) - 1, [])

    def _error(self, reason: str, step: int, found: list[str]) -> NonFiniteLoss:
        message = f"{reason} at step {step} (epoch {step // self.program.steps_per_epoch + 1})"
        if found:
            return NonFiniteLoss("\n  ".join([message, *found]))
        return NonFiniteLoss(
            f"{message}: earlier checkpoints, if any, are intact in {self.checkpoints}. Try a lower `lr`, `clip_norm` or "
            "`precision` float32; `on_nan` rollback returns to a checkpoint automatically, `debug_nans` names the layer"
        )

    def _layers(self, before: TrainState | None, split: Images | Feed, order: Order, key: jax.Array) -> list[str]:
        """Finds the first non-finite value in the step after ``before``; empty if ``search`` is off."""
        if before is None:
            return []
        program = self.program
        views = prepare(program.pipeline, program.steps_per_epoch, program.config.label_smoothing)
        step = int(before.step) % program.steps_per_epoch
        batch = split.again(step) if isinstance(split, Feed) else split
        found = jax.jit(views, static_argnums=4)(before.step, batch, order[step], key, len(program.data.classes))
        images, targets = (jnp.asarray(np.asarray(part)) for part in found)  # on one device
        model = nnx.merge(program.graph, *jax.tree.map(np.asarray, (before.params, before.batch_stats)))
        return find_non_finite(model, images, targets) or [
            "forward and backward pass are finite, but the update is not"
        ]


def next_rollback(error: NonFiniteLoss, on_nan: str, rollbacks: int) -> int:
    """The number of the next rollback, from 1; raises ``error`` if the run has to stop.

    Args:
        error: the reason.
        on_nan: ``"stop"`` or ``"rollback"``.
        rollbacks: number of previous rollbacks.
    """
    if on_nan == "stop" or rollbacks == ROLLBACKS:
        raise error
    return rollbacks + 1
