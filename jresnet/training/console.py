"""Console output of a run: its first lines, a progress bar or one line per epoch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from jresnet.files import shown
from jresnet.models import zoo
from jresnet.reports.metrics_file import duration

if TYPE_CHECKING:
    from jresnet.training.config import RunConfig
    from jresnet.training.loop import Pace
    from jresnet.training.program import Program


INDENT = 9  # columns before the text of a line: a title of eight letters and a space
WIDTH = 80  # columns if the output is not a terminal
FEW_STEPS = 100  # with fewer steps no recipe works: learning rates are chosen for thousands


def size(count: int) -> str:
    """Formats a number of bytes as ``812 MiB`` or ``1.2 GiB``."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1023.5 else f"{mebibytes / 1024:.1f} GiB"


def device_memory(device: Any) -> int | None:
    """Bytes in use on a JAX device. For a CPU, which keeps no statistics, the resident memory of this process.

    None if neither is known: on a CPU outside Linux, or with a plugin without statistics.
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


def wrapped(text: str, width: int) -> str:
    """Wraps a line to at most ``width`` columns, between words and preferably after a comma, semicolon or colon.

    Continuation lines are indented like the text of the first line, after its title of eight letters. A word longer than a
    line, such as a path, is not broken.
    """
    lines = []
    while len(text) > width:
        spaces = [i for i in range(INDENT, width + 1) if text[i] == " " and text[:i].strip()]
        if not spaces:
            after = text.find(" ", width)
            if after < 0:
                break
            spaces = [after]
        marks = [i for i in spaces if text[i - 1] in ",;:" and i > width // 2]
        at = (marks or spaces)[-1]
        lines.append(text[:at])
        text = " " * INDENT + text[at + 1 :]
    return "\n".join([*lines, text])


def columns(stream: TextIO | None) -> int:
    """The width of a terminal in columns; 80 for anything else."""
    try:
        return max(40, os.get_terminal_size(stream.fileno()).columns) if stream and stream.isatty() else WIDTH
    except (OSError, ValueError):
        return WIDTH


def introduction(config: RunConfig, program: Program, processes: int) -> list[str]:
    """The first lines of a run: devices, network, data, recipe."""
    data, where = program.data, program.devices
    count = f"{where.count} x " if where.count > 1 else ""
    together = f" in {processes} processes" if processes > 1 else ""
    images = ", ".join(f"{count:,} {name}" for name, count in program.images.items())
    return [
        f"device   {count}{where.first.device_kind} ({where.platform}){together}, {config.precision}",
        f"network  {config.arch}, {config.stem} stem, {len(data.classes)} classes, {program.parameters:,} parameters",
        f"data     {data.name}: {images} images, from {data.source}",
        *(f"note     {note}" for note in data.notes),
        *_recipe(config, program.steps_per_epoch),
        *_few_steps(config, program.total_steps),
    ]


def _few_steps(config: RunConfig, steps: int) -> list[str]:
    """A warning if a run is too short for its recipe."""
    if steps >= FEW_STEPS:
        return []
    more = "more epochs" if config.limit_train is None else "more epochs or training images"
    return [
        f"note     {steps:,} steps in total are too few for recipe {config.recipe}, and the result will not be meaningful; "
        f"use {more} or a smaller batch"
    ]


def _recipe(config: RunConfig, steps_per_epoch: int) -> list[str]:
    """The lines that describe a recipe."""
    milestones = ", ".join(f"{milestone:g}" for milestone in config.milestones) or "no epoch"
    schedules = {
        "step": f"lr {config.lr:g} x{config.gamma:g} at {milestones}",
        "cosine": f"lr {config.lr:g} with cosine decay to 0",
        "onecycle": f"lr {config.lr:g} with linear decay to 0",
    }
    warmup = f" after {config.warmup_epochs:g} epochs of warm-up" if config.warmup_epochs else ""
    decay = "none" if config.weight_decay == 0 else (
        f"{config.weight_decay:g}{' decoupled' if config.decoupled_decay or config.optimizer == 'adamw' else ''} on "
        f"{'all parameters' if config.decay_norms else 'kernels only, not on BN and biases'}"
    )  # fmt: skip
    extras = [
        f"label smoothing {config.label_smoothing:g}" if config.label_smoothing else "",
        f"average of weights with decay {config.ema:g}" if config.ema else "",
        f"gradients clipped at norm {config.clip_norm:g}" if config.clip_norm else "",
        "last BN scale of each block initialised to 0" if config.zero_init_residual else "",
        {"none": "no flip", "random": "", "alternate": "alternating flip"}[config.flip],
        f"random erasing {config.random_erasing:g}" if config.random_erasing else "",
        f"mixup {config.mixup:g}" if config.mixup else "",
        f"cutmix {config.cutmix:g}" if config.cutmix else "",
        {
            "none": "",
            "trivial": "TrivialAugment",
            "rand": f"RandAugment {config.magnitude:g}",
            "jitter": f"colour jitter {config.magnitude / 10:g}",
        }[config.augment],
        f"{config.repeats} views of an image in a batch" if config.repeats > 1 else "",
        "binary cross-entropy" if config.loss == "sigmoid" else "",
        f"targets above {config.target_threshold:g} as 1" if config.target_threshold else "",
        "rematerialized" if config.remat else "",
        "BatchNorm on each device's part of the batch" if config.bn == "per-device" else "",
        *config.details,
    ]
    more = ", ".join(extra for extra in extras if extra)
    return [
        f"recipe   {config.recipe}: {config.epochs} epochs of {steps_per_epoch} steps, batch {config.batch_size}, "
        f"seed {config.seed}",
        f"         {config.optimizer}, {schedules[config.schedule]}{warmup}, momentum {config.momentum:g}"
        f"{' (Nesterov)' if config.nesterov else ''}, weight decay {decay}",
        *([f"         {more}"] if more else []),
    ]


def estimate(config: RunConfig, program: Program, pace: Pace, left: float) -> list[str]:
    """The lines that estimate the duration of a run, once a step has been measured; ``left`` is in seconds."""
    lines = [f"time     {pace.step_seconds:.3g} s per step: about {duration(left)} left, without evaluation"]
    if left > 3600 and program.devices.platform == "cpu":
        ways = [  # those that are not chosen yet
            "a network of depth 20" if program.parameters > zoo.find("resnet20_cifar").parameters * 1.1 else "",
            "fewer epochs" if config.epochs > 1 else "",
            "" if config.limit_train else "fewer training images",
            f"the digits instead of {config.dataset}" if config.dataset != "digits" else "",
            "a GPU (pip install 'jax[cuda13]')",
        ]
        lines.append(f"         this is long for a CPU; faster options: {', '.join(filter(None, ways))}")
    return lines


def epoch_line(row: dict[str, Any], epochs: int, left: float) -> str:
    """A row of ``metrics.jsonl`` as one line with losses and accuracies; ``left``: the run's remaining seconds."""
    splits = "; ".join(
        f"{name} loss {row[f'{name}_loss']:.4f}, {100 * row[f'{name}_accuracy']:.2f} %"
        for name in ("train", "val", "test")
        if f"{name}_loss" in row
    )
    return f"epoch {row['epoch']}/{epochs}: {splits}; {duration(left)} left"


class Console:
    """A progress bar on a terminal; otherwise one line per epoch, and one per minute within longer epochs.

    Args:
        stream: output stream; standard output by default.
        quiet: print nothing; used in all processes but the first.
        memory: label of the displayed memory; "host memory" on a CPU.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, memory: str = "device memory"):
        found = stream or sys.stdout
        self.quiet, self.memory = quiet or found is None, memory  # None: the process has no standard output
        self.stream: TextIO = found
        self.tty = not self.quiet and self.stream.isatty()
        self.bars: list[Any] = []  # one for steps and one below for figures: 80 columns are too few for both
        self.last = time.monotonic()

    def begin(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Starts an epoch (counted from 1), of which ``done`` steps are already complete."""
        self.title = f"epoch {epoch}/{epochs}"
        if self.quiet or not self.tty:
            return
        common = {"file": self.stream, "leave": False, "dynamic_ncols": True}
        layout = "{desc}:{percentage:4.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bars = [
            tqdm(total=steps, initial=done, desc=self.title, bar_format=layout, position=0, **common),
            tqdm(total=0, bar_format="{desc}", position=1, **common),
        ]

    def step(self, count: int = 1) -> None:
        """Advances the bar by ``count`` steps."""
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
        """Shows the epoch's figures so far.

        Args:
            loss: mean cross-entropy, in nats.
            accuracy: fraction of the images, 0 to 1.
            images_per_second: training throughput.
            left: remaining seconds of the run.
            epochs_per_second: epochs per second, including evaluation.
            memory: bytes in use, as given by :func:`device_memory`.
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
        else:
            self.minute(lambda: f"{self.title}: {figures}, {left_over}")

    def minute(self, text: Callable[[], str]) -> None:
        """Prints a line if none was printed for a minute."""
        if not self.quiet and time.monotonic() - self.last > 60:
            self.say(text())

    def end(self) -> None:
        """Removes the bar."""
        while self.bars:
            self.bars.pop().close()

    def say(self, text: str) -> None:
        """Prints a line above the bar, wrapped between words if it is too long."""
        if self.quiet:
            return
        width = columns(self.stream) - self.tty  # some terminals break after a full line
        text = "\n".join(wrapped(line, width) for line in shown(text).split("\n"))
        try:
            if self.bars:
                self.bars[0].write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)
        except BrokenPipeError:  # for example with "| head": the run continues without output
            self.quiet = True
        self.last = time.monotonic()
