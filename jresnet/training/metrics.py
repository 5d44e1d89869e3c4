"""Writes the metrics of a run to metrics.jsonl, TensorBoard and Weights & Biases."""

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
    """A run in Weights & Biases (W&B), for :class:`Metrics`. It needs ``pip install wandb``.

    With ``WANDB_MODE=offline`` the rows are stored in ``folder/wandb``, one folder per session, for ``wandb sync``. A
    resumed run continues the W&B run whose id is in ``folder/wandb-id``. Rows that W&B already has are not changed, since
    W&B accepts steps only in ascending order.

    Args:
        project: name of the project.
        name: name of the run.
        config: JSON values by name.
        folder: folder of the run, which must exist.

    Raises:
        InputError: wandb is missing, ``wandb-id`` is damaged, or W&B refuses, for example without a login.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any], folder: Path):
        try:
            from wandb import Error, init  # type: ignore[import-not-found]
        except ImportError as error:  # also if Python imports a run's folder wandb/ instead of the package
            raise InputError(
                f"Weights & Biases cannot be used ({error}): pip install --upgrade wandb, or leave `wandb` out"
            ) from error
        path = folder / "wandb-id"
        if not path.exists():  # written before W&B's run begins, so that a run that is killed at once can be continued
            write_atomically(path, uuid.uuid4().hex.encode())
        try:
            run_id = path.read_bytes().decode()
        except (OSError, ValueError):
            run_id = ""
        if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
            raise InputError(f"{path} is not the id of a run in Weights & Biases: delete it to start a new one")
        try:
            self.run = init(project=project, name=name, config=config, dir=str(folder), id=run_id, resume="allow")
        except Error as error:
            raise InputError(
                f"Weights & Biases: {error}. To work without a connection, set WANDB_MODE=offline"
            ) from error

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row of :class:`Metrics`, unless the run has it from an earlier session."""
        if row["step"] >= self.run.step:
            self.run.log(row, step=row["step"], commit=True)

    def close(self) -> None:
        """Waits until all rows are sent; if an exception is being handled, the run is marked as failed."""
        self.run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def tag(name: str) -> str:
    """The TensorBoard tag of a figure: ``test_loss`` becomes ``loss/test``, in the group of losses."""
    split, _, figure = name.partition("_")
    if split in SPLITS:
        return f"{figure}/{split}"
    return {"images_per_second": "speed/images_per_second", "seconds": "speed/seconds"}.get(name, name)


def _summary_writer() -> Any:
    """tensorboardX's ``SummaryWriter``, imported as if torch were not installed.

    tensorboardX imports torch for an annotation alone, in one or two seconds.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python raises ModuleNotFoundError for it
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


class Metrics:
    """Writes ``metrics.jsonl``, one line per epoch, and the same numbers to TensorBoard (as float32) and W&B.

    A row contains JSON values by name, with ``epoch`` and ``step``. NaN and infinity become null and are left out of
    TensorBoard, which also gets the losses of the steps, the configuration and the figures. If tensorboardX is missing,
    ``note`` says so, and TensorBoard is skipped. A thread writes to TensorBoard, because the losses of an epoch take about
    10 ms, during which a GPU would be idle.

    Args:
        folder: folder of the run, which must exist.
        epochs: number of epochs that a resumed run has completed. The file may contain more rows, written after the last
            checkpoint; they are dropped, as these epochs are trained again.
        wandb: receives the same rows.
        step: the run continues after this step; by default that of the last row.

    Raises:
        InputError: the file has fewer complete lines than ``epochs``.
    """

    def __init__(self, folder: Path, epochs: int, wandb: WandB | None = None, step: int | None = None):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", wandb
        self.note: str | None = None
        self._begin(epochs, step)

    def _begin(self, epochs: int, step: int | None) -> None:
        self.rows = read_metrics(self.path, epochs)
        if len(self.rows) < epochs:
            raise InputError(
                f"{self.path} has {len(self.rows)} complete lines, but the checkpoint to resume from is after {epochs} "
                "epochs: restore the file from a copy, or start again in another folder"
            )
        write_atomically(self.path, "".join(json.dumps(finite(row)) + "\n" for row in self.rows).encode())
        if not step:
            step = self.rows[-1]["step"] if self.rows else -1
        self.writer: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._told: Future[None] | None = None  # the last task of the thread
        try:
            writer = _summary_writer()
        except ImportError as error:
            self.note = f"no TensorBoard files are written ({error}): pip install tensorboardX"
            return
        self.writer = writer(
            str(self.folder / "tensorboard"),
            purge_step=step + 1,
            filename_suffix=f".{time.time_ns()}",  # otherwise two sessions within a second would share a file
        )

    def rewind(self, epochs: int, step: int | None = None) -> None:
        """Drops the rows after the first ``epochs``, for a run that returns to a checkpoint; W&B keeps its rows."""
        self._close()
        self._begin(epochs, step)

    def add(self, row: dict[str, Any]) -> None:
        """Appends the row of an epoch."""
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
        """Adds the losses of the last steps up to and including ``step``, float ``[steps]``, to TensorBoard."""

        def tell() -> None:
            for number, loss in enumerate(losses.tolist(), step - len(losses) + 1):
                if math.isfinite(loss):
                    self.writer.add_scalar("loss/step", loss, number)

        self._tell(tell)

    def text(self, name: str, text: str) -> None:
        """Adds a verbatim text to TensorBoard."""
        self._tell(lambda: self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines())))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Adds a PNG file to TensorBoard."""

        def tell() -> None:
            from PIL import Image

            with Image.open(path, formats=["PNG"]) as image:
                self.writer.add_image(f"pictures/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

        self._tell(tell)

    def _tell(self, work: Callable[[], None]) -> None:
        """Submits a task to the TensorBoard thread; raises the error of an earlier task, if any."""
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
