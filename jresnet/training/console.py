"""What a run prints to a person: its first lines, a progress bar or a line an epoch, durations and sizes."""

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
WIDTH = 80  # columns where there is no terminal to ask
FEW_STEPS = 100  # in fewer no recipe gets anywhere: the rate is made for thousands


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


def wrapped(text: str, width: int) -> str:
    """A line in several of at most ``width`` columns, broken between words, after a comma or semicolon if there is one.

    The lines that follow are indented as the text of the first, behind its title of eight letters. A longer word, such as a
    path, stays whole.
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
    """The width of a terminal; 80 of anything else."""
    try:
        return max(40, os.get_terminal_size(stream.fileno()).columns) if stream and stream.isatty() else WIDTH
    except (OSError, ValueError):
        return WIDTH


def introduction(config: RunConfig, program: Program, processes: int) -> list[str]:
    """What a run is about to do, in lines: devices, network, data, recipe."""
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
    """What there is to say of a run that is too short to show what its recipe can do."""
    if steps >= FEW_STEPS:
        return []
    more = "more epochs" if config.limit_train is None else "more epochs or training images"
    return [
        f"note     {steps:,} steps in all are too few for recipe {config.recipe}: the result will say little; {more} or a "
        "smaller batch make more steps"
    ]


def _recipe(config: RunConfig, steps_per_epoch: int) -> list[str]:
    """What a recipe comes to."""
    milestones = ", ".join(f"{milestone:g}" for milestone in config.milestones) or "no epoch"
    schedules = {
        "step": f"lr {config.lr:g} x{config.gamma:g} at {milestones}",
        "cosine": f"lr {config.lr:g} falling to 0 as a cosine",
        "onecycle": f"lr {config.lr:g} falling to 0 linearly",
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
        "last BN scale of each block from 0" if config.zero_init_residual else "",
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
    """How long the whole will take, in lines, once a step has been measured; ``left`` in seconds."""
    lines = [f"time     {pace.step_seconds:.3g} s a step: about {duration(left)} to go, evaluation not counted"]
    if left > 3600 and program.devices.platform == "cpu":
        ways = [  # what is not chosen already
            "a network of depth 20" if program.parameters > zoo.find("resnet20_cifar").parameters * 1.1 else "",
            "fewer epochs" if config.epochs > 1 else "",
            "" if config.limit_train else "fewer training images",
            f"the digits instead of {config.dataset}" if config.dataset != "digits" else "",
            "a GPU (pip install 'jax[cuda13]')",
        ]
        lines.append(f"         on a CPU that is long; shorter: {', '.join(filter(None, ways))}")
    return lines


def epoch_line(row: dict[str, Any], epochs: int, left: float) -> str:
    """A row of ``metrics.jsonl`` in one line, losses and accuracies; ``left``, the run's remaining seconds."""
    splits = "; ".join(
        f"{name} loss {row[f'{name}_loss']:.4f}, {100 * row[f'{name}_accuracy']:.2f} %"
        for name in ("train", "val", "test")
        if f"{name}_loss" in row
    )
    return f"epoch {row['epoch']}/{epochs}: {splits}; {duration(left)} left"


class Console:
    """A bar on a terminal; elsewhere a line an epoch, and one a minute where an epoch takes longer.

    Args:
        stream: where to; standard output by default.
        quiet: print nothing, as in all processes but the first.
        memory: what to call the memory shown; on a CPU it is "host memory".
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, memory: str = "device memory"):
        found = stream or sys.stdout
        self.quiet, self.memory = quiet or found is None, memory  # None: the process was started without it
        self.stream: TextIO = found
        self.tty = not self.quiet and self.stream.isatty()
        self.bars: list[Any] = []  # the steps, and below it the figures: one line of 80 columns is too short for both
        self.last = time.monotonic()

    def begin(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Starts an epoch (counted from 1) of which ``done`` steps are already taken."""
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
        else:
            self.minute(lambda: f"{self.title}: {figures}, {left_over}")

    def minute(self, text: Callable[[], str]) -> None:
        """A line, where none was printed for a minute."""
        if not self.quiet and time.monotonic() - self.last > 60:
            self.say(text())

    def end(self) -> None:
        """Removes the bar."""
        while self.bars:
            self.bars.pop().close()

    def say(self, text: str) -> None:
        """One line, broken between words where it is too long, above the bar where there is one."""
        if self.quiet:
            return
        width = columns(self.stream) - self.tty  # a full line makes some terminals begin another
        text = "\n".join(wrapped(line, width) for line in shown(text).split("\n"))
        try:
            if self.bars:
                self.bars[0].write(text, file=self.stream)
            else:
                print(text, file=self.stream, flush=True)
        except BrokenPipeError:  # as with "| head": nobody listens any more, and the run goes on
            self.quiet = True
        self.last = time.monotonic()
