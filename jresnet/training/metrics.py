"""The numbers of a run as it goes: metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jresnet.errors import InputError
from jresnet.files import write_atomically
from jresnet.reports.metrics_file import finite, read_metrics

SPLITS = ("train", "val", "test")


class WandB:
    """A run in Weights & Biases, for :class:`Metrics`. It needs ``pip install wandb``; nothing else of jresnet does.

    ``WANDB_MODE=offline`` keeps the rows in ``folder/wandb``, a folder a session, for ``wandb sync``. A resumed run goes
    on in the run of the same id, which ``folder/wandb-id`` keeps; rows that it already has stay as they were, since W&B
    takes steps in ascending order only.

    Args:
        project: the project's name.
        name: the run's.
        config: JSON values by name.
        folder: the run's folder, which exists.

    Raises:
        InputError: where wandb is missing, ``wandb-id`` is damaged, or W&B refuses, as it does without a login.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any], folder: Path):
        try:
            from wandb import Error, init  # type: ignore[import-not-found]
        except ImportError as error:  # also where a run's own folder wandb/ is taken for the package
            raise InputError(
                f"Weights & Biases cannot be used ({error}): pip install --upgrade wandb, or leave `wandb` out"
            ) from error
        path = folder / "wandb-id"
        if not path.exists():  # before the run begins, so that one that is killed at once goes on as well
            write_atomically(path, uuid.uuid4().hex.encode())
        try:
            run_id = path.read_bytes().decode()
        except (OSError, ValueError):
            run_id = ""
        if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
            raise InputError(f"{path} is not the id of a run in Weights & Biases: delete it, and a new one begins")
        try:
            self.run = init(project=project, name=name, config=config, dir=str(folder), id=run_id, resume="allow")
        except Error as error:
            raise InputError(f"Weights & Biases: {error}. To keep its files here, set WANDB_MODE=offline") from error

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row of :class:`Metrics`, unless the run has it from a session before."""
        if row["step"] >= self.run.step:
            self.run.log(row, step=row["step"], commit=True)

    def close(self) -> None:
        """Waits until all rows are sent; where an exception is on its way, the run is marked as failed."""
        self.run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def tag(name: str) -> str:
    """What TensorBoard calls a figure of a row: ``test_loss`` is ``loss/test``, in the group of losses."""
    split, _, figure = name.partition("_")
    if split in SPLITS:
        return f"{figure}/{split}"
    return {"images_per_second": "speed/images_per_second", "seconds": "speed/seconds"}.get(name, name)


class Metrics:
    """``metrics.jsonl``, one line an epoch, and the same numbers for TensorBoard (float32 there) and W&B.

    A row is JSON values by name, with ``epoch`` and ``step``; NaN and infinities become null, and are left out of
    TensorBoard, which gets the losses of the steps, the configuration and the pictures too. Where tensorboardX is missing,
    ``note`` says so, and there is no TensorBoard. It is written to by a thread: the losses of an epoch's steps take it some
    10 ms, in which a GPU would wait.

    Args:
        folder: the run's folder, which exists.
        epochs: how many epochs a resumed run has behind it. Its file may hold more, written before the run was killed
            and in no checkpoint: they are trained again.
        wandb: takes the same rows.
        step: the run goes on after this one; after the last row's by default.

    Raises:
        InputError: where the file does not hold that many whole lines.
    """

    def __init__(self, folder: Path, epochs: int, wandb: WandB | None = None, step: int | None = None):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", wandb
        self.note: str | None = None
        self._begin(epochs, step)

    def _begin(self, epochs: int, step: int | None) -> None:
        self.rows = read_metrics(self.path, epochs)
        if len(self.rows) < epochs:
            raise InputError(
                f"{self.path} has {len(self.rows)} whole lines, but {epochs} epochs are behind the checkpoint to go on "
                "from: put the file back from a copy, or begin again in another folder"
            )
        write_atomically(self.path, "".join(json.dumps(finite(row)) + "\n" for row in self.rows).encode())
        if not step:
            step = self.rows[-1]["step"] if self.rows else -1
        self.writer: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._told: Future[None] | None = None  # the last that the thread was given
        try:
            from tensorboardX import SummaryWriter  # takes a second or two: it imports torch where there is one
        except ImportError as error:
            self.note = f"no TensorBoard files are written ({error}): pip install tensorboardX"
            return
        self.writer = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=step + 1,
            filename_suffix=f".{time.time_ns()}",  # without it, two sessions in one second share a file
        )

    def rewind(self, epochs: int, step: int | None = None) -> None:
        """Drops the rows after the first ``epochs``, for a run that goes back to a checkpoint; W&B keeps what it has."""
        self._close()
        self._begin(epochs, step)

    def add(self, row: dict[str, Any]) -> None:
        """Appends an epoch."""
        row = finite(row)
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")

        def tell() -> None:
            for name, value in row.items():
                if name not in ("epoch", "step") and isinstance(value, int | float):
                    self.writer.add_scalar(tag(name), value, row["step"])
            self.writer.flush()

        self._tell(tell)
        if self.wandb is not None:
            self.wandb.add(row)

    def steps(self, step: int, losses: np.ndarray) -> None:
        """Adds the losses of the steps up to and with ``step``, float ``[steps]``, to TensorBoard."""

        def tell() -> None:
            for number, loss in enumerate(losses.tolist(), step - len(losses) + 1):
                if math.isfinite(loss):
                    self.writer.add_scalar("loss/step", loss, number)

        self._tell(tell)

    def text(self, name: str, text: str) -> None:
        """Shows a text, as it stands, in TensorBoard."""
        self._tell(lambda: self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines())))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Shows a PNG file in TensorBoard."""

        def tell() -> None:
            from PIL import Image

            with Image.open(path, formats=["PNG"]) as image:
                self.writer.add_image(f"pictures/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

        self._tell(tell)

    def _tell(self, work: Callable[[], None]) -> None:
        """Has the thread tell TensorBoard; raises what went wrong before, if it is known by now."""
        if self.writer is not None:
            if self._told is not None and self._told.done():
                self._told.result()
            self._told = self._thread.submit(work)

    def _close(self) -> None:
        self._thread.shutdown()
        if self.writer is not None:
            self.writer.close()

    def close(self) -> None:
        """Closes TensorBoard's file and the run in W&B."""
        self._close()
        if self.wandb is not None:
            self.wandb.close()
