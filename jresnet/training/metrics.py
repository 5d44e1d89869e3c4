"""What a run says while it goes: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar or lines."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

from jresnet.errors import InputError
from jresnet.files import write_atomically

LARGEST = 2**26  # bytes of a metrics.jsonl that is read; 200 epochs are some 60 kB


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``; two units at most, up to days."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = max(0, round(seconds))
    parts: list[str] = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count or (parts and len(parts) < 2) or (name == "s" and not parts):
            parts.append(f"{count} {name}")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 ")) or "0 s"


def size(count: int) -> str:
    """Bytes as ``812 MiB`` or ``1.2 GiB``."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1023.5 else f"{mebibytes / 1024:.1f} GiB"


def device_memory(device: Any) -> int | None:
    """Bytes in use on a jax device; of a CPU, which keeps no count, what this process holds in the host's memory.

    None where neither is known: a CPU outside Linux, or a plugin without statistics.
    """
    stats = device.memory_stats() or {}
    if "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    if device.platform != "cpu":
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def finite(value: Any) -> Any:
    """``value``, of JSON's types, with None for every NaN and infinity: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def read_metrics(path: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``: all, or the first ``epochs``; none where there is no file.

    A last line that ends before its end, as a killed process leaves it, is not among them.

    Raises:
        InputError: where the file cannot be read, or another line is no row.
    """
    try:
        if not path.exists():
            return []
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} has more than {LARGEST:,} bytes: it is no run's metrics.jsonl")
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate((*lines, tail)[:epochs], 1):
        try:
            row = json.loads(line)
            if not all(type(row[name]) is int for name in ("epoch", "step")):
                raise TypeError
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            if number > len(lines):
                break
            expected = "a JSON object with whole numbers for epoch and step"
            raise InputError(f"{path} is damaged: line {number} is not {expected}") from error
        rows.append(row)
    return rows


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
                f"Weights & Biases cannot be used ({error}): pip install --upgrade wandb, or leave out what asks for it"
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


class Metrics:
    """``metrics.jsonl``, one line an epoch, and the same numbers for TensorBoard (float32 there) and W&B.

    A row is JSON values by name, with ``epoch`` and ``step``; NaN and infinities become null, and are left out of
    TensorBoard.

    Args:
        folder: the run's folder, which exists.
        epochs: how many epochs a resumed run has behind it. Its file may hold more, written before the run was killed
            and in no checkpoint: they are trained again.
        wandb: takes the same rows.

    Raises:
        InputError: where the file does not hold that many whole lines.
    """

    def __init__(self, folder: Path, epochs: int, wandb: WandB | None = None):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", wandb
        self._begin(epochs)

    def _begin(self, epochs: int) -> None:
        from tensorboardX import SummaryWriter

        self.rows = read_metrics(self.path, epochs)
        if len(self.rows) < epochs:
            raise InputError(
                f"{self.path} has {len(self.rows)} whole lines, but {epochs} epochs are behind the checkpoint to go on "
                "from: put the file back from a copy, or begin again in another folder"
            )
        write_atomically(self.path, "".join(json.dumps(finite(row)) + "\n" for row in self.rows).encode())
        self.writer = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=self.rows[-1]["step"] + 1 if self.rows else 0,
            filename_suffix=f".{time.time_ns()}",  # without it, two sessions in one second share a file
        )

    def rewind(self, epochs: int) -> None:
        """Drops the rows after the first ``epochs``, for a run that goes back to a checkpoint; W&B keeps what it has."""
        self.writer.close()
        self._begin(epochs)

    def add(self, row: dict[str, Any]) -> None:
        """Appends an epoch."""
        row = finite(row)
        self.rows.append(row)
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        for name, value in row.items():
            if name not in ("epoch", "step") and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
        if self.wandb is not None:
            self.wandb.add(row)

    def close(self) -> None:
        """Closes TensorBoard's file and the run in W&B."""
        self.writer.close()
        if self.wandb is not None:
            self.wandb.close()


class Progress:
    """A bar on a terminal; elsewhere a line an epoch, and one a minute where an epoch takes longer.

    Args:
        stream: where to; standard output by default.
        quiet: print nothing, as in all processes but the first.
        memory: what to call the memory shown; on a CPU it is "host memory".
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, memory: str = "device memory"):
        self.stream, self.quiet, self.memory = stream or sys.stdout, quiet, memory
        self.tty = self.stream.isatty()
        self.bars: list[Any] = []  # the steps, and below it the figures: one line of 80 columns is too short for both
        self.last = time.monotonic()

    def begin(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Starts an epoch (counted from 1) of which ``done`` steps are already taken."""
        self.title = f"epoch {epoch}/{epochs}"
        if self.quiet or not self.tty:
            return
        from tqdm import tqdm

        common = {"file": self.stream, "leave": False, "dynamic_ncols": True}
        layout = "{desc}:{percentage:4.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bars = [
            tqdm(total=steps, initial=done, desc=self.title, bar_format=layout, position=0, **common),
            tqdm(total=0, bar_format="{desc}", position=1, **common),
        ]

    def step(self, count: int = 1) -> None:
        """``count`` more steps are done."""
        if self.bars:
            self.bars[0].update(count)

    def show(
        self,
        loss: float,
        accuracy: float,
        images_per_second: float,
        left: float,
        epochs_per_second: float | None = None,
        memory: int | None = None,
    ) -> None:
        """The epoch's figures so far.

        Args:
            loss: mean cross-entropy, in nats.
            accuracy: share of the images.
            images_per_second: of training.
            left: the run's remaining seconds.
            epochs_per_second: of training and evaluation.
            memory: bytes in use, of :func:`device_memory`.
        """
        figures = f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %, {images_per_second:.0f} images/s"
        if epochs_per_second is not None:
            figures += f", {epochs_per_second:.2g} epochs/s"
        left_over = f"{duration(left)} left"
        if memory is not None:
            left_over += f", {self.memory} {size(memory)}"
        if self.bars:
            self.bars[0].set_postfix_str(left_over)
            self.bars[1].set_description_str(figures)
        elif not self.quiet and time.monotonic() - self.last > 60:
            self.say(f"{self.title}: {figures}, {left_over}")

    def end(self) -> None:
        """Removes the bar."""
        while self.bars:
            self.bars.pop().close()

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self.quiet:
            return
        if self.bars:
            self.bars[0].write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
        self.last = time.monotonic()
