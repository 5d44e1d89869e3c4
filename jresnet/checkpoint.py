"""Resumable training state: Orbax's checkpoints, plus a digest over the arrays, since Orbax restores flipped bits silently.

The state's leaves are joined into one array of bytes, beside a JSON object that names them by their path in
:class:`jresnet.train.TrainState`: so no checkpoint depends on how Flax or optax lay out their containers, and Orbax has one
write to make, whose failure (a full disk, a damaged file) is one error and not hundreds of its threads' tracebacks.
"""

from __future__ import annotations

import math
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
        packed = np.concatenate([np.frombuffer(value.tobytes(), np.uint8) for value in values.values()])
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        # Orbax reports a full disk, but behind tracebacks of its threads: look first.
        needed, free = packed.nbytes + 2**20, shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"cannot write a checkpoint into {self.folder}: it takes {needed:,} bytes and the disk has {free:,} free. "
                "The checkpoint before it is whole: free some space and go on with --resume"
            )
        layout = {name: [value.dtype.name, list(value.shape)] for name, value in values.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"bytes": packed}),
            progress=ocp.args.JsonSave({"progress": progress, "layout": layout, "digest": digest({"bytes": packed})}),
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
        expected = {name: [value.dtype.name, list(value.shape)] for name, value in _flat(like).items()}
        advice = "delete that folder to go on from the one before"
        try:
            about = self.manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
            layout, progress, wanted = about["layout"], about["progress"], about["digest"]
            sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in expected.values()]
            abstract = {"bytes": jax.ShapeDtypeStruct((sum(sizes),), np.uint8)}
            if layout == expected:
                items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                packed = np.asarray(self.manager.restore(step, args=items).state["bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"the checkpoint {where} cannot be restored ({error}): {advice}") from error
        if layout != expected:
            raise WeightsError(f"the checkpoint {where} is of another network or optimizer: choose another folder")
        if digest({"bytes": packed}) != wanted:
            raise WeightsError(f"the checkpoint {where} was altered after it was written: {advice}")
        parts = np.split(packed, np.cumsum(sizes)[:-1])
        leaves = [
            jax.numpy.asarray(part.view(dtype).reshape(shape))
            for part, (dtype, shape) in zip(parts, expected.values(), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), progress


def _flat(state: TrainState) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in paths}
