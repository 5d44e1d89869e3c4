"""Resumable training state: Orbax's asynchronous checkpoints with digests of their own, and the lock on a run's folder.

The state's leaves are joined into one array of bytes. Beside it lies a JSON text that names them by their path in
:class:`jresnet.training.step.TrainState`: so no checkpoint depends on how Flax or optax lay out their containers, and Orbax has one
write to make, whose failure (a full disk, a damaged file) is one error and not hundreds of its threads' tracebacks. Orbax
restores flipped bits silently and does not wait for the disk (fsync), so the text holds the SHA-256 of the bytes, and its
own lies beside it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

from jresnet.errors import InputError, WeightsError
from jresnet.files import printable
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
        # Orbax logs a traceback in each of its threads that a failed write ends, and advice of its own; errors are raised.
        self._quiet = lambda record: "orbax" not in Path(record.pathname).parts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise InputError(
                f"cannot keep checkpoints in {folder}: {error.strerror or error}; choose another folder"
            ) from error
        logging.getLogger("absl").addFilter(self._quiet)

    def _open(self) -> None:
        """(Re)reads what is in the folder."""
        # Not left to Orbax (cleanup_tmp_directories): its thread may still be at it when the folder is opened once more.
        for path in self.folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
        policies = ocp.checkpoint_managers
        self._best = _Best()
        options = ocp.CheckpointManagerOptions(
            create=False,  # not to be had together with active_processes
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(KEPT), self._best]),
            lightweight_initialize=True,  # else a damaged file in any checkpoint makes the constructor raise
            # Else a folder that cannot be made leaves threads behind that wait 300 s for it, and the process with them.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
        )
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(Exception):  # what is damaged is never the best; restore() says what is wrong
                self._best.note(step, self._about(step)["score"])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._quiet)

    def save(self, state: TrainState, progress: dict[str, Any], score: float | None = None) -> None:
        """Begins to write ``state`` and ``progress`` under the state's step, all or nothing; a step that exists stays.

        Returns once the state is on the host, so that its arrays may be donated. The save before it is waited for.

        Args:
            state: on one device, or replicated on several, of which one is read.
            progress: JSON values.
            score: the higher the better; of equal ones the earlier counts. None or NaN: never the best.

        Raises:
            InputError: where the disk is full or the folder cannot be written, now or in the save before.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        values = jax.device_get(jax.tree.leaves(state))
        packed = np.concatenate([np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in values])
        score = None if score is None or math.isnan(score) else float(score)
        about = {
            "step": step,
            "score": score,
            "layout": _layout(state),
            "digest": _digest(packed.data),
            "progress": progress,
        }
        text = json.dumps(about)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"bytes": packed}),
            about=ocp.args.JsonSave({"text": text, "digest": _digest(text.encode())}),
        )
        with self._writing():
            # Orbax would report it too, but after it has filled the disk.
            needed, free = packed.nbytes + 2**20, shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(f"it takes {needed:,} bytes and the disk has {free:,} free")
            self._best.note(step, score)
            self._manager.save(step, args=items, force=True)  # whenever asked, not when Orbax's policies find it due

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            InputError: where the save under way failed; said once.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # OSError, ValueError, RuntimeError: whatever ended one of Orbax's threads
            with contextlib.suppress(Exception):
                self._manager.close()
            _wait_for_writers()
            with contextlib.suppress(OSError):  # else what was known before the failure has to do
                self._open()  # removes what is half-written, and knows again of those that were to make room for it
            steps = self._manager.all_steps()
            advice = "There is none before it: mend the cause and begin again"
            if steps:
                advice = f"The one of step {max(steps)} is whole: mend the cause and go on with --resume"
            raise InputError(f"cannot write a checkpoint into {self.folder}: {error}. {advice}") from error

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that is undamaged, or None where there is none at all.

        Damaged ones that are newer are renamed to ``damaged-STEP``, so that their steps can be saved again.

        Args:
            like: a state of the same network and optimizer; each leaf is put where that of ``like`` is.

        Raises:
            InputError: where a damaged one cannot be renamed.
            WeightsError: where all are damaged, or the newest undamaged one is of another network or optimizer.
        """
        self.wait()
        layout = _layout(like)
        sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in layout]
        problems: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                about = self._about(step)
                packed = self._packed(step, sum(sizes), about["digest"]) if about["layout"] == layout else None
            except MemoryError:
                raise
            except Exception as error:  # Orbax, TensorStore and JSON raise all kinds on damaged files
                kind = "" if isinstance(error, WeightsError) else f"{type(error).__name__}: "
                problems[step] = printable(" ".join(f"{kind}{error}".split()))
                continue
            if packed is None:
                where = self.folder / str(step)
                raise WeightsError(f"the checkpoint {where} is of another network or optimizer: choose another folder")
            parts = np.split(packed, np.cumsum(sizes)[:-1])
            leaves = [
                _place(part.view(dtype).reshape(shape), leaf.sharding)
                for part, (_, dtype, shape), leaf in zip(parts, layout, jax.tree.leaves(like), strict=True)
            ]
            state = jax.tree.unflatten(jax.tree.structure(like), leaves)
            return Restored(state, about["progress"], step, self._put_aside(problems))
        if problems:
            found = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise WeightsError(f"no checkpoint in {self.folder} is whole ({found}): delete that folder to begin anew")
        return None

    def _about(self, step: int) -> dict[str, Any]:
        """The JSON text of a checkpoint, checked."""
        item = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if _digest(item["text"].encode()) != item["digest"]:
            raise WeightsError("its description was altered after it was written")
        about = json.loads(item["text"])
        if about["step"] != step:
            raise WeightsError(f"it holds step {about['step']}")
        return about

    def _packed(self, step: int, size: int, wanted: str) -> np.ndarray:
        """The bytes of a checkpoint's state, checked."""
        like = {"bytes": np.broadcast_to(np.uint8(0), size)}
        items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        packed = items["state"]["bytes"]
        if _digest(packed.data) != wanted:
            raise WeightsError("its arrays were altered after they were written")
        return packed

    def _put_aside(self, problems: dict[int, str]) -> list[str]:
        notes = []
        for step, problem in problems.items():
            where, aside = self.folder / str(step), self.folder / f"damaged-{step}"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                where.rename(aside)
            except OSError as error:
                raise InputError(f"cannot rename the damaged checkpoint {where} ({error}): delete it") from error
            notes.append(f"checkpoint {where} is damaged and passed over, now {aside.name}: {problem}")
        if notes:
            self._manager.close()
            self._open()
        return notes


class _Best:
    """Orbax's policy that keeps the checkpoint with the highest score, of equal ones the earliest.

    Orbax's own BestN reads the scores from files without a digest, whose damage makes the manager's constructor raise; of
    equal ones it keeps the latest.
    """

    def __init__(self) -> None:
        self._scores: dict[int, float] = {}

    def note(self, step: int, score: float | None) -> None:
        if score is not None:
            self._scores[step] = score

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """One answer for each of ``checkpoints``, of which each has a ``step``."""
        scored = [info.step for info in checkpoints if info.step in self._scores]
        best = max(scored, key=lambda step: (self._scores[step], -step), default=None)
        return [info.step == best for info in checkpoints]


class Lock:
    """Keeps other processes out of a run's folder; a context manager.

    The kernel releases it however the process ends, by SIGKILL too; child processes do not inherit it.

    Args:
        folder: of the run; the file ``lock`` is made in it, and stays.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.note: str | None = None  # why nothing is locked: a filesystem without locks
        self._lock = filelock.FileLock(folder / "lock", timeout=0, thread_local=False, on_acquired=_sign)

    def __enter__(self) -> Lock:
        """Takes the lock.

        Raises:
            InputError: where another run holds it, or the folder cannot be written.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            try:
                holder = printable((self.folder / "lock").read_text(errors="replace"))
            except OSError:  # Windows keeps a locked file from being read
                holder = ""
            raise InputError(
                f"another run is using {self.folder} ({holder or 'of an unknown process'}): wait for it, stop it, or "
                "choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise InputError(
                    f"cannot use --out {self.folder}: {error.strerror or error}; choose another folder"
                ) from error
            self.note = f"the filesystem of {self.folder} has no locks, so nothing keeps a second run out of it"
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _sign(descriptor: int) -> None:
    """Says in the locked file who holds it."""
    os.ftruncate(descriptor, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())


def _layout(state: TrainState) -> list[list[Any]]:
    """Path, dtype and shape of every leaf, in the form in which JSON gives them back."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        [jax.tree_util.keystr(path, simple=True, separator="."), leaf.dtype.name, list(leaf.shape)]
        for path, leaf in paths
    ]


def _place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    # Not jax.device_put: where the sharding spans processes, that waits for all of them.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _wait_for_writers() -> None:
    """Orbax reports the first part of a checkpoint that fails while others are still written, to where the next one goes."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "_SignalingThread":  # Orbax's own name
            with contextlib.suppress(Exception):  # what ended that one
                thread.join()


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
