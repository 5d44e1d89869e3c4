"""Resumable training state: Orbax's checkpoints, plus a digest over the arrays, since Orbax restores flipped bits silently.

The state is kept as a flat dict of arrays named by their path in :class:`jresnet.train.TrainState`, and a small JSON
object beside it, so that no checkpoint depends on how Flax or optax lay out their containers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jresnet.errors import InputError, WeightsError
from jresnet.train import TrainState
from jresnet.weights import digest

KEPT = 2  # the newest ones


class Checkpoints:
    """The checkpoints in one folder; a context manager, closed at the end of a run."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Writes ``state`` and ``progress`` (JSON values) under the state's step; both or nothing.

        Raises:
            InputError: where the disk is full or the folder cannot be written.
        """
        values = {name: np.asarray(value) for name, value in _flat(state).items()}
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        # Orbax reports a full disk, but behind hundreds of tracebacks of its threads: look first.
        needed, free = sum(value.nbytes for value in values.values()) + 2**20, shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"cannot write a checkpoint into {self.folder}: it takes {needed:,} bytes and the disk has {free:,} free. "
                "The checkpoint before it is whole: free some space and go on with --resume"
            )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(values), progress=ocp.args.JsonSave({**progress, "digest": digest(values)})
        )
        try:
            self.manager.save(step, args=items)
        except (OSError, ValueError) as error:  # Orbax reports a full disk as ValueError: RESOURCE_EXHAUSTED
            raise InputError(
                f"cannot write a checkpoint into {self.folder}: {error}. The checkpoint before it is whole"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint in the shape of ``like``, or None where there is none yet.

        Raises:
            WeightsError: where it was altered, or is of another network or optimizer.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        where = self.folder / str(step)
        expected = _flat(like)
        abstract = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in expected.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        try:
            restored = self.manager.restore(step, args=items)
            values, progress = dict(restored.state), dict(restored.progress)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"the checkpoint {where} cannot be restored ({error}): delete that folder to go on from the one before"
            ) from error
        if digest({name: np.asarray(value) for name, value in values.items()}) != progress.pop("digest", None):
            raise WeightsError(
                f"the checkpoint {where} was altered after it was written: delete that folder to go on from the one before"
            )
        leaves = [jax.numpy.asarray(values[name]) for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), progress


def _flat(state: TrainState) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in paths}
