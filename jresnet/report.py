"""What a run leaves behind and what one sees of it: lines, progress bar, metrics, TensorBoard, plots."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jresnet.weights import write_atomically


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


class Metrics:
    """``metrics.jsonl``, one line an epoch, and the same numbers for TensorBoard.

    ``epochs`` is how many a resumed run has behind it. Its file may hold one more, written before the run was killed and
    in no checkpoint: it is trained again.
    """

    def __init__(self, folder: Path, epochs: int):
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []
        if epochs:
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()[:epochs]]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        last = self.rows[-1]["step"] if self.rows else 0
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1 if epochs else None)

    def add(self, row: dict[str, Any]) -> None:
        """Appends an epoch."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self.writer.close()


class Progress:
    """A bar on a terminal; elsewhere a line an epoch, and one a minute where an epoch takes longer."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.tty = self.stream.isatty()
        self.bar: Any = None
        self.last = time.monotonic()

    def begin(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Starts an epoch (counted from 1) of which ``done`` steps are already taken."""
        self.title = f"epoch {epoch}/{epochs}"
        if self.tty:
            from tqdm import tqdm

            self.bar = tqdm(
                total=steps,
                initial=done,
                desc=self.title,
                unit="step",
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
            )

    def step(self, count: int = 1) -> None:
        """``count`` more steps are done."""
        if self.bar is not None:
            self.bar.update(count)

    def show(self, loss: float, accuracy: float, images_per_second: float, left: float) -> None:
        """The epoch's figures so far; ``left`` is the run's remaining seconds."""
        figures = f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %, {images_per_second:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{figures}, run {duration(left)} left")
        elif time.monotonic() - self.last > 60:
            self.say(f"{self.title}: {figures}, {duration(left)} left")

    def end(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
        self.last = time.monotonic()


def plot_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch, for training and every split that was evaluated."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for split in ("train", "val", "test"):
        if rows and f"{split}_loss" in rows[-1]:
            loss_axes.plot(epochs, [row[f"{split}_loss"] for row in rows], marker=".", label=split)
            accuracy_axes.plot(epochs, [100 * row[f"{split}_accuracy"] for row in rows], marker=".", label=split)
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if epochs:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_confusion(
    labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...], path: Path, title: str
) -> None:
    """How often each class (row) was taken for each other one (column), as counts."""
    import matplotlib.figure

    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, predictions), 1)
    figure = matplotlib.figure.Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, dpi=120)
