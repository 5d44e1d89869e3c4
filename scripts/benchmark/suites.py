"""The rows that each suite measures, and the frameworks measured in each row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.table import PEERS

SUITES = ("train", "infer", "accuracy", "startup", "data", "scaling")
SMALL = 64  # pixels below which networks have the CIFAR stem and ten classes

ABLE = {  # the peers that support a task
    "train": PEERS, "infer": PEERS, "epoch": ("torch", "torch-compile"), "first step": ("torch", "torch-compile"),
    "compile": ("torch-compile",), "import": ("torch",), "accuracy": ("torch",), "data": (),
}  # fmt: skip
ACCURACY_BATCH = {"digits": 32, "cifar10": 512}  # batch sizes of the recipe
LEVELS = {"digits": (0.90, 0.95), "cifar10": (0.90, 0.94)}  # test accuracies; the time to reach them is measured
# Suite, device ("": both), task, architecture, pixels, batches. The rows of a GPU are in order of priority, as its time is
# limited.
DEFAULTS = (
    ("train", "cpu", "train", "resnet20_cifar", 32, (128,)),
    ("train", "cpu", "train", "resnet18", 32, (128,)),
    ("train", "cpu", "train", "resnet18", 224, (16,)),
    ("train", "cpu", "train", "resnet50", 224, (16,)),
    ("infer", "cpu", "infer", "resnet18", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet50", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet152", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet20_cifar", 32, (1, 256)),
    ("train", "gpu", "train", "resnet18", 32, (512,)),
    ("train", "gpu", "train", "resnet50", 224, (64, 256)),
    ("infer", "gpu", "infer", "resnet50", 224, (256, 1)),
    ("train", "gpu", "epoch", "resnet18", 32, (512,)),
    ("train", "gpu", "train", "resnet34", 32, (512, 128, 1024)),
    ("train", "gpu", "train", "resnet20_cifar", 32, (512, 128, 1024)),
    ("train", "gpu", "train", "resnet18", 32, (128, 1024)),
    ("accuracy", "cpu", "accuracy", "resnet20_cifar", 32, (0,)),
    ("accuracy", "gpu", "accuracy", "resnet18", 32, (0,)),
    ("startup", "", "import", "", 0, (0,)),
    ("startup", "", "first step", "resnet50", 224, (2,)),
    *(("startup", "", "compile", f"resnet{depth}", 224, (16,)) for depth in (18, 34, 50, 101, 152)),
    ("data", "", "data", "", 32, (128,)),
)


@dataclass(frozen=True)
class Row:
    """One task and network to measure in every framework."""

    suite: str
    # "train", "infer", "epoch" in images per second; "accuracy", "import", "first step", "compile", "data" in seconds
    task: str
    arch: str = ""
    size: int = 0  # pixels, height and width
    batch: int = 0  # images
    precision: str = "float32"
    series: str = ""  # in suite "scaling" the quantity that varies: "batch", "depth" or "devices"
    devices: int = 1  # number of simulated devices
    dataset: str = ""  # in suite "accuracy" the name of the data set

    def __str__(self) -> str:
        network = f" {self.arch} at {self.size}, batch {self.batch}, {self.precision}" if self.arch else ""
        task = self.task
        if self.dataset:
            task += " of {:.0%}, then {:.0%} of the {}, recipe fast,".format(*LEVELS[self.dataset], self.dataset)
        return task + network + (f", devices {self.devices}" if self.series == "devices" else "")

    @property
    def chosen(self) -> dict[str, Any]:
        """Stem and number of classes, as arguments of ``jresnet.create``; None: the architecture's default."""
        small = self.size < SMALL
        return {"stem": "cifar" if small else None, "num_classes": 10 if small else None}

    def contestants(self, peers: Sequence[str]) -> list[str]:
        """What is measured, in this order: jresnet, and those of ``peers`` that support the task."""
        able = ABLE[self.task]
        if self.series:
            able = () if self.series == "devices" else ("torch",)
        cached = ["jresnet, cached"] if self.task == "first step" else []
        return ["jresnet", *cached, *(name for name in able if name in peers)]


def choose(args: argparse.Namespace) -> list[Row]:
    """The rows selected by the options, without duplicates."""
    suites = SUITES if args.suite == "all" else (args.suite,) if args.suite else ("train", "infer")
    precision = args.precision or ("bfloat16" if args.device == "gpu" else "float32")
    usual = args.size or (32 if (args.arch or "_cifar").endswith("_cifar") else 224)
    rows = []
    for suite, device, task, arch, size, batches in DEFAULTS:
        if suite not in suites or device not in ("", args.device):
            continue
        if arch and args.arch:
            arch, size, batches = args.arch, usual, (128 if usual < SMALL else 16,)
        for batch in [args.batch] if args.batch else batches:
            if task == "import":
                row = Row(suite, task, precision=precision)
            elif task == "accuracy":
                dataset = "cifar10" if args.data_dir else "digits"
                row = Row(suite, task, arch, 32, args.batch or ACCURACY_BATCH[dataset], precision, dataset=dataset)
            else:
                row = Row(suite, task, arch, args.size or size, batch, precision)
            rows.append(row)
    if "scaling" in suites:
        rows += _scaling(args, usual, precision)
    return list(dict.fromkeys(rows))


def _scaling(args: argparse.Namespace, size: int, precision: str) -> list[Row]:
    """Training rows that vary the batch size, the depth or the number of simulated devices, one at a time."""
    arch, batch = args.arch or "resnet20_cifar", args.batch or 128
    batches = [args.batch] if args.batch else [1, 4, 16, 64, 256, 1024]
    depths = [] if args.arch else [20, 32, 44, 56, 110]
    devices = [count for count in (1, 2, 4, 8) if batch % count == 0] if args.device == "cpu" else []
    return [
        *(Row("scaling", "train", arch, size, count, series="batch", precision=precision) for count in batches),
        *(
            Row("scaling", "train", f"resnet{depth}_cifar", size, batch, series="depth", precision=precision)
            for depth in depths
        ),
        *(
            Row("scaling", "train", arch, size, batch, series="devices", devices=n, precision=precision)
            for n in devices
        ),
    ]
