"""PyTorch's side of a comparison: what a run of ``scripts/train_cifar10.py`` does, in plain PyTorch, with its files.

    python tests/parity/train_torch.py --recipe fast --depth 20 --epochs 10 --data-dir DIR --runs 3 --seed 0 --out OUT

Flags are the fields of ``jresnet.training.config.RunConfig``; network, initialisation, recipe and data are the same, only
the random draws differ. Images lie on the device in channels-last order; on CUDA the network is compiled. Writes
``OUT/seed-N/{config.json, metrics.jsonl, summary.json}`` and ``OUT/summary.json`` over the seeds. A run that was killed
goes on from its last epoch with ``--resume``, and finished seeds are left as they are.

Beside other programs set ``OMP_WAIT_POLICY=passive``: threads that spin at each other's barriers, as OpenMP's do by default,
took ten times as long on two busy cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert import reference
from jresnet import data, files
from jresnet.errors import InputError
from jresnet.models import zoo
from jresnet.reports import compare as report
from jresnet.training.config import RunConfig, default_config, differences, read_config

PADDING = 4  # black pixels around an image that is cropped at random
FILES = ("config.json", "metrics.jsonl", "summary.json", "state.pt")
# What of a configuration is done here. With one device, "bn" has no effect.
ONLY = {
    "optimizer": "sgd", "clip_norm": 0.0, "crop": "pad", "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0,
    "remat": False, "on_nan": "stop",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = vars(parser().parse_args(argv))
    data_dir, out, runs, resume, depth = (args.pop(name) for name in ("data_dir", "out", "runs", "resume", "depth"))
    if depth is not None:
        args["arch"] = f"resnet{depth}" if f"resnet{depth}" in zoo.ZOO else f"resnet{depth}_cifar"
    # Else default_config would ask JAX, which takes most of a GPU's memory as soon as it is asked.
    args["precision"] = args["precision"] or ("bfloat16" if torch.cuda.is_available() else "float32")
    try:
        config = default_config(**args)
        check(config)
        found = data.load_digits() if config.dataset == "digits" else data.load_cifar10(data_dir, download=False)
        check_folder(config, out, resume)
        out.mkdir(parents=True, exist_ok=True)
        write(out / "config.json", {"run": dataclasses.asdict(config), "runs": runs, "command": shlex.join(sys.argv)})
        summaries = []
        for seed in range(config.seed, config.seed + runs):
            summaries.append(run(dataclasses.replace(config, seed=seed), found, out / f"seed-{seed}", resume))
        write(out / "summary.json", report.summarise(summaries))
    except (InputError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """A flag for each field of RunConfig, with the recipe's value where it is not given, and a few of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="as for scripts/train_cifar10.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--runs", type=int, default=1, help="how many, with the seeds from --seed on (default: 1)")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out, or begin them")
    parser.add_argument("--depth", type=int, help="20 for resnet20_cifar, 18 for resnet18, and so on")
    kinds: dict[str, dict[str, Any]] = {
        "int": {"type": int},
        "int | None": {"type": int},
        "float": {"type": float},
        "bool": {"action": argparse.BooleanOptionalAction},
        "tuple[float, ...]": {"type": float, "nargs": "*"},
    }
    for field in dataclasses.fields(RunConfig):
        default = {"recipe": "step", "dataset": "cifar10"}.get(field.name)
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=default, **kinds.get(str(field.type), {}))
    return parser


def check(config: RunConfig) -> None:
    """Raises InputError with everything in a configuration that is not done here."""
    foreign = [f"{name} {getattr(config, name)}" for name, value in ONLY.items() if getattr(config, name) != value]
    if foreign:
        raise InputError(f"PyTorch's side does not do this: {', '.join(foreign)}")


def network(config: RunConfig, classes: int) -> nn.Module:
    """The configured network with fresh parameters, drawn as jresnet draws them, from torch's generator."""
    model = reference.network(
        config.arch, zoo.configure(config.arch, num_classes=classes, in_channels=3, stem=config.stem)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # also the CIFAR stem that replaces torchvision's
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if config.zero_init_residual and hasattr(module, "bn2"):
            nn.init.zeros_(getattr(module, "bn3", module.bn2).weight)
    return model


def factor(config: RunConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate at a step, counted from 0, as a share of ``config.lr``: :func:`jresnet.training.optim.schedule`."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rest = max(config.epochs * steps_per_epoch - warmup, 1)
    milestones = [round((m - warmup / steps_per_epoch) * steps_per_epoch) for m in config.milestones]

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        step = min(step - warmup, rest)
        if config.schedule == "step":
            return config.gamma ** sum(milestone <= step for milestone in milestones)
        return (1 + math.cos(math.pi * step / rest)) / 2 if config.schedule == "cosine" else 1 - step / rest

    return share


def pad(images: Tensor) -> Tensor:
    """Images ``[N, H, W, 3]`` with black pixels around."""
    return F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))


def views(padded: Tensor, indices: Tensor, corners: Tensor, turned: Tensor, size: int) -> Tensor:
    """Windows of ``size`` pixels of the images ``indices`` at ``corners [B, 2]``, mirrored where ``turned``, NCHW.

    One gather from uint8 ``[N, H, W, 3]``; the result is in channels-last order.
    """
    along = torch.arange(size, device=padded.device)
    rows = corners[:, :1] + along
    columns = corners[:, 1:] + torch.where(turned[:, None], along.flip(0), along)
    return padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Training:
    """A network in training: the part of a run that knows no files and no images.

    Args:
        config: the recipe.
        model: the network, on its device.
        steps_per_epoch: steps.
    """

    def __init__(self, config: RunConfig, model: nn.Module, steps_per_epoch: int):
        self.config, self.model = config, model.to(memory_format=torch.channels_last).train()
        self.averaged = copy.deepcopy(model).eval() if config.ema else None
        self.device = next(model.parameters()).device
        parameters = list(model.parameters())
        self.decaying = [p for p in parameters if config.decay_norms or p.ndim > 1]
        others = [p for p in parameters if not (config.decay_norms or p.ndim > 1)]
        decay = 0.0 if config.decoupled_decay else config.weight_decay
        groups = [{"params": self.decaying, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            config.lr,
            config.momentum,
            nesterov=config.nesterov,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor(config, steps_per_epoch))
        self.steps = 0  # taken
        self.pace = Pace()
        if self.device.type == "cuda":
            for network in (self.model, self.averaged):
                if network is not None:
                    network.compile(mode="reduce-overhead")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on normalised images: -> (loss, how many were classified rightly)."""
        config = self.config
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        loss.backward()
        if config.decoupled_decay and config.weight_decay:
            with torch.no_grad():
                torch._foreach_mul_(self.decaying, 1 - self.scheduler.get_last_lr()[0] * config.weight_decay)
        self.optimizer.step()
        self.scheduler.step()
        if self.averaged is not None:
            self._average(min(config.ema, (1 + self.steps) / (10 + self.steps)))
        self.steps += 1
        return loss.detach(), (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        """As torch's AveragedModel with buffers, whose first update would drop the initial weights."""
        averages, values = (
            [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.is_floating_point())]
            for network in (self.averaged, self.model)
            if network is not None
        )
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """-> (sum of the losses, how many were classified rightly), by the average where there is one."""
        network = self.averaged if self.averaged is not None else self.model.eval()
        with self.autocast():
            logits = network(images)
        self.model.train()
        return F.cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(1) == labels).sum()

    def warm_up(self, batch: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> None:
        """Takes steps and evaluates, so that all is compiled and captured, and leaves everything as it was."""
        before = copy.deepcopy(self.state_dict())
        for _ in range(3):
            self.step(*batch)
            self.evaluate(*held)
        self.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]


class Pace:
    """The speed of training in this process, without its first step, which is slower: jresnet's is told so too."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.first = 0, 0.0, 0.0

    def count(self, steps: int, seconds: float) -> None:
        """``steps`` were taken in ``seconds``."""
        if self.first == 0:
            self.first = seconds / steps
        else:
            self.steps, self.seconds = self.steps + steps, self.seconds + seconds

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.steps else 1 / self.first


class Images:
    """The splits on the device, and an epoch's random views of the training images.

    Args:
        config: says which images, and what happens to them.
        found: the dataset.
        device: where to.
    """

    def __init__(self, config: RunConfig, found: data.Dataset, device: torch.device):
        kept = len(found.train.labels) - config.val_split
        if kept < 1:
            raise InputError(
                f"--val-split {config.val_split} leaves none of the {len(found.train.labels)} training images"
            )

        def on_device(split: data.Split, part: slice) -> tuple[Tensor, Tensor]:
            arrays = split.images[part], split.labels[part].astype(np.int64)
            return tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)  # type: ignore[return-value]

        train = on_device(found.train, slice(0, min(kept, config.limit_train or kept)))
        self.held = {"val": on_device(found.train, slice(kept, None))} if config.val_split else {}
        self.held["test"] = on_device(found.test, slice(0, config.limit_test))
        self.config, self.padded, self.labels = config, pad(train[0]), train[1]
        self.count = {"train": len(train[1])} | {name: len(labels) for name, (_, labels) in self.held.items()}
        self.steps_per_epoch = self.count["train"] // config.batch_size
        if self.steps_per_epoch == 0:
            raise InputError(f"a batch of {config.batch_size} is larger than the {self.count['train']} training images")
        pipeline = config.pipeline()
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (pipeline.mean, pipeline.std))
        self.coins = torch.rand(self.count["train"]) < 0.5  # which begin mirrored, with flip "alternate"

    def normalise(self, images: Tensor) -> Tensor:
        """Grey levels 0 to 255, NCHW -> (x / 255 - mean) / std."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def turned(self, order: Tensor, epoch: int) -> Tensor:
        """Which images of ``order`` are mirrored in ``epoch``."""
        if self.config.flip == "random":
            return torch.rand(order.shape) < 0.5
        if self.config.flip == "none":
            return torch.zeros(order.shape, dtype=torch.bool)
        return self.coins[order] ^ bool(epoch % 2)

    def epoch(self, epoch: int):
        """Batches of normalised views and labels; all draws come first, from the CPU's generator."""
        config, device = self.config, self.padded.device
        shape = (self.steps_per_epoch, config.batch_size)
        order = torch.randperm(self.count["train"])[: math.prod(shape)].view(shape)
        places = self.padded.shape[1] - config.image_size + 1
        draws = order, torch.randint(0, places, (*shape, 2)), self.turned(order, epoch)
        for indices, corners, turned in zip(*(draw.to(device) for draw in draws), strict=True):
            yield self.normalise(views(self.padded, indices, corners, turned, config.image_size)), self.labels[indices]

    def first(self) -> tuple[Tensor, Tensor]:
        """The first images as a batch, as they are, and their labels: no draw is made."""
        count, size = self.config.batch_size, self.config.image_size
        indices = torch.arange(count, device=self.padded.device)
        corners, turned = torch.full((count, 2), PADDING, device=indices.device), torch.zeros_like(indices).bool()
        return self.normalise(views(self.padded, indices, corners, turned, size)), self.labels[:count]

    def batches(self, name: str):
        """Batches of normalised images and labels of a split that is held out, every image once."""
        for images, labels in zip(*(part.split(500) for part in self.held[name]), strict=True):
            yield self.normalise(images.permute(0, 3, 1, 2)), labels


def check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Raises InputError where the folder holds another run, or this one and it is not to be resumed."""
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not resume:
        raise InputError(f"{out} already contains a run ({', '.join(taken)}): add --resume, or choose another folder")
    before = read_config(out)
    if before is not None and (changed := differences(before, config)):
        raise InputError(f"--resume needs the options of the run in {out}, but {'; '.join(changed)}")


def run(config: RunConfig, found: data.Dataset, out: Path, resume: bool) -> dict[str, Any]:
    """One seed's run, or the rest of it: -> the contents of its ``summary.json``."""
    check_folder(config, out, resume)
    if (out / "summary.json").exists():
        print(f"seed {config.seed} is finished: {out}", flush=True)
        return json.loads((out / "summary.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(sys.argv)
    write(out / "config.json", {"run": dataclasses.asdict(config), "command": command})

    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    images = Images(config, found, device)
    training = Training(config, network(config, len(found.classes)).to(device), images.steps_per_epoch)
    rows: list[dict[str, Any]] = []
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        rows = state["rows"]
        training.load_state_dict(state["training"])
        torch.set_rng_state(state["generator"].cpu())
    if device.type == "cuda":  # where torch.compile is at work: jresnet's seconds are without compilation, too
        training.warm_up(images.first(), next(images.batches("test")))
    while len(rows) < config.epochs:
        rows.append(train_epoch(training, images, len(rows), rows[-1]["seconds"] if rows else 0.0))
        state = {"training": training.state_dict(), "rows": rows, "generator": torch.get_rng_state()}
        save(state_file, state)
        content = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_atomically(out / "metrics.jsonl", content.encode())

    judge = "val" if "val" in images.held else "test"
    best = max(rows, key=lambda row: row[f"{judge}_accuracy"])  # the first of equal ones
    scores = [f"{name}_{kind}" for name in images.count for kind in ("loss", "accuracy")]
    summary = {
        "arch": config.arch,
        "recipe": config.recipe,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "dataset": {
            "name": found.name,
            "source": found.source,
            "notes": found.notes,
            "verified": found.verified,
            "digest": found.digest,
            **{f"{name}_images": count for name, count in images.count.items()},
        },
        "final": {key: rows[-1][key] for key in ("epoch", *scores)},
        "best": {key: best[key] for key in ("epoch", *scores) if not key.startswith("train")},
        "best_chosen_on": {
            "val": f"the {config.val_split} training images held out for validation",
            "test": "the test images themselves, which flatters it: quote the final accuracy",
        }[judge],
        "seconds": rows[-1]["seconds"],  # training and evaluation, without compilation
        "images_per_second": rows[-1]["images_per_second"],
        "device": (
            f"{torch.cuda.get_device_name()} (cuda)"
            if device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        ),
        "devices": 1,
        "precision": config.precision,
        "seed": config.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "command": command,
    }
    write(out / "summary.json", summary)
    state_file.unlink()
    return summary


def train_epoch(training: Training, images: Images, epoch: int, seconds: float) -> dict[str, Any]:
    """Trains and evaluates: -> the row of ``metrics.jsonl``. ``seconds`` were spent before."""
    config, steps = training.config, images.steps_per_epoch
    began = mark = time.perf_counter()
    found = []
    for batch in images.epoch(epoch):
        found.append(training.step(*batch))
        if training.pace.first == 0:
            found[0][0].item()  # waits for the device
            training.pace.count(1, time.perf_counter() - mark)
            mark = time.perf_counter()
    losses, correct = (torch.stack(column).double() for column in zip(*found, strict=True))
    loss = losses.mean().item()
    training.pace.count(steps - (mark != began), time.perf_counter() - mark)
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss} in epoch {epoch + 1} of seed {config.seed}: a lower --lr may help")
    row = {
        "epoch": epoch + 1,
        "step": training.steps,
        "lr": config.lr * factor(config, steps)(training.steps - 1),
        "train_loss": loss,
        "train_accuracy": correct.mean().item() / config.batch_size,
    }
    for name in images.held:
        found = [training.evaluate(*batch) for batch in images.batches(name)]
        totals = (torch.stack(column).double().sum().item() for column in zip(*found, strict=True))
        row[f"{name}_loss"], row[f"{name}_accuracy"] = (total / images.count[name] for total in totals)
    row["images_per_second"] = config.batch_size * training.pace.steps_per_second
    row["seconds"] = seconds + time.perf_counter() - began
    results = "; ".join(
        f"{name} loss {row[f'{name}_loss']:.4f}, accuracy {100 * row[f'{name}_accuracy']:.2f} %"
        for name in images.count
    )
    print(
        f"seed {config.seed}, epoch {epoch + 1}/{config.epochs}: {results}; {row['images_per_second']:.0f} images/s",
        flush=True,
    )
    return row


def save(path: Path, state: dict[str, Any]) -> None:
    """``torch.save`` so that the path holds the old state or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def write(path: Path, values: dict[str, Any]) -> None:
    files.write_atomically(path, json.dumps(values, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
