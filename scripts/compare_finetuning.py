"""Compare fine-tuning, a linear probe and training from scratch at equal steps, in jresnet and in PyTorch.

    python scripts/compare_finetuning.py --data cifar-png --weights resnet20.th --out results/finetune

``--data`` is a folder of small images with ``train/`` and ``val/``. The seed determines the images of each class, which are
the same for both libraries. Each library draws its own order, crops and flips, so the means agree only within the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from convert import reference
from jresnet import cache
from jresnet.commands.flags import Parser
from jresnet.data import folder
from jresnet.data.dataset import Dataset
from jresnet.files import write_atomically
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.training import devices, finetune
from jresnet.training.finetune import Finetune, FinetuneConfig, Probe, Start
from jresnet.training.trainer import Trainer

METHODS = ("scratch", "finetune", "probe")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--weights", required=True, help="weights of a network for images of at most 64 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder for comparison.json")
    parser.add_argument(
        "--per-class", type=int, nargs="+", default=[10, 100], metavar="N", help="training images per class"
    )
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[10, 3], metavar="N", help="epochs, one number for each of --per-class"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--from-scratch-only",
        action="store_true",
        help="leave out the probe and fine-tuning, for more seeds of the other",
    )
    return parser


def main() -> int:
    """Runs the comparison; prints a table and writes comparison.json."""
    options = parser()
    args = options.parse_args()
    cache.keep_compiled()  # all seeds run the same programs
    trained = finetune.resolve(args.weights)
    random = finetune.Start("random", trained.arch, trained.config, None, trained.preprocessing, "as the trained ones")
    if len(args.epochs) != len(args.per_class):
        options.error("--epochs takes one number for each of --per-class")
    before = args.out / "comparison.json"
    rows: list[dict[str, Any]] = json.loads(before.read_text())["runs"] if before.exists() else []  # resumes
    for count, epochs in zip(args.per_class, args.epochs, strict=True):
        for seed in range(args.seeds):
            if any((row["images_per_class"], row["seed"]) == (count, seed) for row in rows):
                continue
            loaded = folder.load(folder.find(args.data), trained.preprocessing, seed=seed, limit=count)
            rows += compare(loaded.dataset, trained, random, count, seed, epochs, args.from_scratch_only)
            write(args, trained, loaded.dataset, rows)
    print(table(rows))
    return 0


def compare(
    data: Dataset, trained: Start, random: Start, count: int, seed: int, epochs: int, only_random: bool = False
) -> list[dict[str, Any]]:
    """The accuracies of the three methods in both libraries, for one random choice of the images."""
    where = devices.find(1)
    rows = []

    def note(method: str, config: FinetuneConfig, ours: float, theirs: float, began: float) -> None:
        steps = len(data.train.labels) // config.batch_size * config.epochs
        rows.append({"images_per_class": count, "seed": seed, "method": method, "steps": steps, "batch": config.batch_size,
                     "jresnet": ours, "pytorch": theirs, "seconds": time.perf_counter() - began})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as out:
        starts: list[tuple[str, Start, Any, Any]] = [("scratch", random, None, None)]
        if not only_random:
            began = time.perf_counter()
            config, _ = finetune.choose(trained, data, probe=True, seed=seed)
            vectors = finetune.embed(trained, data, where, "float32")
            probe = Probe(config, data, trained, vectors, where)
            ours = Trainer(config, data, Path(out, "probe"), None, probe).fit()["final"]["test_accuracy"]
            head = finetune.head_of(Path(out, "probe", "last.safetensors"))
            theirs, their_head = torch_probe(config, probe, data, trained, seed)
            note("probe", config, ours, theirs, began)
            starts.insert(0, ("finetune", trained, head, their_head))
        for method, begin, first, second in starts:
            began = time.perf_counter()
            config, _ = finetune.choose(
                begin, data, probe=False, seed=seed, epochs=epochs, batch_size=8 if count < 50 else 32
            )
            program = Finetune(config, data, begin, first, where)
            ours = Trainer(config, data, Path(out, method), None, program).fit()["final"]["test_accuracy"]
            note(method, config, ours, torch_finetune(config, program, data, begin, second, seed), began)
    return rows


# The same methods in PyTorch.


def torch_network(begin: Start, classes: int, head: Mapping[str, np.ndarray] | None, seed: int) -> Any:
    """PyTorch's network with the same weights; random ones if ``begin`` has none."""
    torch.manual_seed(seed)
    import dataclasses

    config = dataclasses.replace(begin.config, num_classes=classes)
    assert begin.arch is not None
    network: Any = reference.network(begin.arch, config)
    if begin.values is not None:
        body = params.body(begin.values)
        filled = params.fill(config, body | dict(head or {"fc.kernel": np.zeros((config.num_features, classes), np.float32),
                                                          "fc.bias": np.zeros(classes, np.float32)}))  # fmt: skip
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in statedict.state_dict(filled).items()}
        network.load_state_dict(tensors, strict=False)
    return network


def normalised(pixels: np.ndarray, config: FinetuneConfig) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w]."""
    x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (x - mean) / std


@torch.no_grad()
def accuracy(network: Any, config: FinetuneConfig, data: Dataset) -> float:
    """Accuracy on the validation images."""
    network.eval()
    x = normalised(data.test.images, config)
    found = torch.cat([network(part).argmax(1) for part in x.split(250)])
    return float((found.numpy() == data.test.labels).mean())


def torch_probe(
    config: FinetuneConfig, probe: Probe, data: Dataset, begin: Start, seed: int
) -> tuple[float, dict[str, np.ndarray]]:
    """Trains only the head, on PyTorch's own embeddings; returns its accuracy and the head."""
    network = torch_network(begin, len(data.classes), None, seed).eval()
    last = network.fc
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        z, held = (
            torch.cat([network(part) for part in normalised(split.images, config).split(250)])
            for split in (data.train, data.test)
        )
    center, spread = z.mean(0), z.std(0, unbiased=False) + 1e-6
    z, held = (z - center) / spread, (held - center) / spread
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    groups = [
        {"params": [last.weight], "weight_decay": config.weight_decay},
        {"params": [last.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    labels, step = torch.from_numpy(data.train.labels.astype(np.int64)), 0
    for _ in range(config.epochs):
        order = torch.randperm(len(labels))
        for batch in order.split(config.batch_size):
            if len(batch) < config.batch_size:
                continue
            for group in optimizer.param_groups:
                group["lr"] = float(probe.schedule(step))
            optimizer.zero_grad()
            F.cross_entropy(last(z[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        right = float((last(held).argmax(1).numpy() == data.test.labels).mean())
        kernel = (last.weight / spread).T.contiguous()
        bias = last.bias - center @ kernel
    return right, {"fc.kernel": kernel.numpy(), "fc.bias": bias.numpy()}


def torch_finetune(
    config: FinetuneConfig,
    program: Finetune,
    data: Dataset,
    begin: Start,
    head: Mapping[str, np.ndarray] | None,
    seed: int,
) -> float:
    """Trains all layers; returns the accuracy after the last epoch."""
    network = torch_network(begin, len(data.classes), head, seed)
    factors = program.rates() or {}
    stages = [f"layer{i + 1}" for i in range(len(begin.config.depths))]
    groups = []
    for name, value in network.named_parameters():
        part = name.partition(".")[0]
        part = part if part in stages else "head" if part == "fc" else "stem"
        decay = config.weight_decay if value.ndim > 1 else 0.0
        groups.append({"params": [value], "weight_decay": decay, "factor": factors.get(part, 1.0)})
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    labels, step = torch.from_numpy(data.train.labels.astype(np.int64)), 0
    for _ in range(config.epochs):
        network.train()
        if config.freeze_bn != "none":
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        order = torch.randperm(len(labels))
        for batch in order.split(config.batch_size):
            if len(batch) < config.batch_size:
                continue
            for group in optimizer.param_groups:
                group["lr"] = float(program.schedule(step)) * group["factor"]
            x = normalised(views(data.train.images[batch.numpy()]), config)
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), labels[batch], label_smoothing=config.label_smoothing)
            loss.backward()
            optimizer.step()
            step += 1
    return accuracy(network, config, data)


def views(pixels: np.ndarray) -> np.ndarray:
    """A random crop of each image padded with 4 black pixels, mirrored with probability 1/2."""
    n, size = pixels.shape[:2]
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    found = np.empty_like(pixels)
    offsets, turned = torch.randint(0, 9, (n, 2)).tolist(), torch.rand(n).lt(0.5).tolist()
    for i, (top, left) in enumerate(offsets):
        crop = padded[i, top : top + size, left : left + size]
        found[i] = crop[:, ::-1] if turned[i] else crop
    return found


# Results.


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, by method and number of images."""
    found = []
    for count in sorted({row["images_per_class"] for row in rows}):
        for method in METHODS:
            own = [row for row in rows if (row["images_per_class"], row["method"]) == (count, method)]
            if own:
                entry: dict[str, Any] = {
                    "images_per_class": count,
                    "method": method,
                    "n": len(own),
                    "steps": own[0]["steps"],
                }
                for library in ("jresnet", "pytorch"):
                    values = np.array([row[library] for row in own])
                    spread = float(values.std(ddof=1)) if len(values) > 1 else None
                    entry[library] = {"mean": float(values.mean()), "std": spread}
                found.append(entry)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of accuracies in per cent, mean ± standard deviation."""
    lines = ["| images per class | method | steps | jresnet | PyTorch | n |", "|---|---|---|---|---|---|"]

    def said(value: dict[str, Any]) -> str:
        spread = f" ± {100 * value['std']:.2f}" if value["std"] is not None else ""
        return f"{100 * value['mean']:.2f}{spread}"

    for row in summary(rows):
        lines.append(
            f"| {row['images_per_class']} | {row['method']} | {row['steps']:,} | {said(row['jresnet'])} | "
            f"{said(row['pytorch'])} | {row['n']} |"
        )
    return "\n".join(lines)


def write(args: argparse.Namespace, begin: Start, data: Dataset, rows: list[dict[str, Any]]) -> None:
    """Writes the results so far."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "grain", "pillow")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    told = [Path(part).name if os.sep in part else part for part in sys.argv[1:]]  # without folders of this machine
    content = {
        "start": {"arch": begin.arch, "weights": Path(args.weights).name, "digest": begin.digest},
        "judged_on": f"{len(data.test.labels):,} validation images of {len(data.classes)} classes",
        "epochs": dict(zip(map(str, args.per_class), args.epochs, strict=True)),
        "hardware": {"cpu": cpu or platform.processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "command": shlex.join(["python", "scripts/compare_finetuning.py", *told]),
        "summary": summary(rows),
        "runs": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "comparison.json", json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
