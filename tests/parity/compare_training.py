"""One training run in both frameworks: the same first weights, the same batches, and how far the runs drift apart.

    python tests/parity/compare_training.py --data-dir DIR --steps 200 --out FOLDER

ResNet-20 with the recipe ``step`` on CIFAR-10 in float32. Rounding errors of 1e-7 grow in training, in any framework: the
distance of jresnet to PyTorch means something beside that of PyTorch to itself, with another number of threads or another
memory format. ``--exact`` adds PyTorch in float64, as the answer that all of them round.

Writes FOLDER/comparison.json and FOLDER/comparison.png, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networks
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

from convert import verify
from jresnet import ResNet, create, data, files
from jresnet.errors import InputError
from jresnet.models import params
from jresnet.pytorch import keymap, statedict
from jresnet.training import optim, recipes
from jresnet.training import step as train
from jresnet.training.augment import Pipeline
from jresnet.training.loop import epoch_order
from jresnet.weights.preprocessing import STATISTICS

ARCH = "resnet20_cifar"
RECIPE = recipes.RECIPES["step"]  # 200 steps end long before its first milestone
TABLE = (1, 10, 50, 100, 200)  # steps


class Run(NamedTuple):
    """What one run went through."""

    losses: np.ndarray  # [steps], each before its step is taken
    parameters: dict[int, np.ndarray]  # after so many steps, all of them as one vector


class Batch(NamedTuple):
    """What both frameworks are fed."""

    images: np.ndarray  # float32 [B, 32, 32, 3]: cropped, flipped, normalised
    labels: np.ndarray  # int64 [B]


class Unchanged(Pipeline):
    """A pipeline for images that are already augmented."""

    def __init__(self) -> None:
        super().__init__("pad", 32, "none", (), ())

    def train(self, key: jax.Array, images: jax.Array, turned: jax.Array | None = None) -> jax.Array:
        return images


def kept(steps: int) -> list[int]:
    """The steps after which the parameters are compared: each of the first ten, then every fifth, and the last."""
    return sorted({*range(1, min(steps, 10) + 1), *range(5, steps + 1, 5), steps})


def draw_batches(split: data.Split, steps: int, batch_size: int, seed: int) -> list[Batch]:
    """Epochs in random order, augmented by jresnet's pipeline: 1.6 MB a step of 128 images."""
    mean, std = STATISTICS["cifar10"]
    augment = jax.jit(Pipeline(RECIPE.crop, RECIPE.image_size, RECIPE.flip, mean, std).train)
    order_key, augment_key = jax.random.split(jax.random.key(seed))

    def indices() -> Iterator[np.ndarray]:
        for epoch in range(steps):
            yield from np.asarray(epoch_order(order_key, epoch, len(split.labels), batch_size))

    batches = []
    for step, chosen in zip(range(steps), indices(), strict=False):
        images = augment(jax.random.fold_in(augment_key, step), split.images[chosen])
        batches.append(Batch(np.array(images), split.labels[chosen].astype(np.int64)))
    return batches


def train_jresnet(model: ResNet, batches: list[Batch]) -> Run:
    """The run of jresnet's own training step, from the parameters of ``model``."""
    optimizer = optim.optimizer(
        "sgd", RECIPE.lr, momentum=RECIPE.momentum, nesterov=RECIPE.nesterov, weight_decay=RECIPE.weight_decay
    )
    step = jax.jit(train.train_step(nnx.graphdef(model), optimizer, Unchanged()))
    state = train.init(model, optimizer)
    everything = np.arange(len(batches[0].labels))
    run = Run(np.zeros(len(batches)), {})
    with jax.default_matmul_precision("highest"):  # no TF32 on a GPU
        for i, (images, labels) in enumerate(batches):
            split = train.Images(jnp.asarray(images), jnp.asarray(labels, jnp.int32))
            state, metrics = step(state, split, everything, jax.random.key(0))
            run.losses[i] = metrics.loss
            if i + 1 in kept(len(batches)):
                leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state.params)}
                run.parameters[i + 1] = np.concatenate([np.ravel(leaves[path]) for path in sorted(leaves)])
    return run


def train_pytorch(
    start: ResNet,
    batches: list[Batch],
    threads: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """The run of ``torch.optim.SGD`` in a plain loop, from the parameters of ``start``."""
    model = networks.build(ARCH)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in statedict.state_dict(start).items()})
    model = model.to(dtype).to(memory_format=memory_format).train()
    parameters = dict(model.named_parameters())
    paths = [path for path in sorted(params.arrays(start)) if keymap.torch_key(path) in parameters]
    sgd = torch.optim.SGD(
        model.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay, nesterov=RECIPE.nesterov
    )
    run = Run(np.zeros(len(batches)), {})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for i, (images, labels) in enumerate(batches):
        tensor = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(dtype).contiguous(memory_format=memory_format)
        loss = F.cross_entropy(model(tensor), torch.from_numpy(labels))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        run.losses[i] = loss.item()
        if i + 1 in kept(len(batches)):
            values = [parameters[keymap.torch_key(path)].detach().numpy() for path in paths]
            run.parameters[i + 1] = np.concatenate([np.ravel(keymap.to_flax(value)) for value in values])
    torch.set_num_threads(before)
    return run


def compare(split: data.Split, steps: int, batch_size: int, seed: int, exact: bool) -> dict[str, Any]:
    """All the runs, one after the other, and the distances between them."""
    batches = draw_batches(split, steps, batch_size, seed)
    start = create(ARCH, seed=seed)
    threads = torch.get_num_threads()
    others = 1 if threads > 1 else 2
    relatives = {
        f"PyTorch, {others} thread{'s' * (others > 1)}": {"threads": others},
        "PyTorch, channels last": {"threads": threads, "memory_format": torch.channels_last},
    }
    answer = {"PyTorch, float64": {"threads": threads, "dtype": torch.float64}} if exact else {}
    print("jresnet ...", flush=True)
    runs = {"jresnet": train_jresnet(start, batches)}
    for name, options in ({"PyTorch": {"threads": threads}} | relatives | answer).items():
        print(f"{name} ...", flush=True)
        runs[name] = train_pytorch(start, batches, **options)
    pairs = [(name, "PyTorch") for name in ("jresnet", *relatives)]
    pairs += [(name, exactly) for exactly in answer for name in ("jresnet", "PyTorch", *relatives)]
    return {
        "what": f"{steps} steps of {ARCH} in float32 from the same weights with the same {batch_size} images a step",
        "command": f"python tests/parity/compare_training.py --data-dir DIR --out FOLDER --steps {steps} "
        f"--batch-size {batch_size} --seed {seed}{' --exact' * exact}",
        "seed": seed,
        "threads": threads,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jresnet", "jax", "jaxlib", "flax", "optax", "numpy", "torch")},
        "sgd": {name: getattr(RECIPE, name) for name in ("lr", "momentum", "nesterov", "weight_decay")},
        "losses": {name: run.losses.tolist() for name, run in runs.items()},
        "loss_differences": {
            f"{name} to {to}": np.abs(runs[name].losses - runs[to].losses).tolist() for name, to in pairs
        },
        "distance_steps": kept(steps),
        "distances": {  # relative L2 distance of all parameters
            f"{name} to {to}": [
                verify.relative(runs[name].parameters[step], runs[to].parameters[step]) for step in kept(steps)
            ]
            for name, to in pairs
        },
    }


def hardware() -> str:
    """The processor and the device that JAX computes on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    return f"{processor}, {os.cpu_count()} processors; JAX on {jax.devices()[0].device_kind}"


def table(report: dict[str, Any]) -> str:
    """The losses of jresnet and PyTorch and all distances, at a few steps."""
    steps = report["distance_steps"]
    lines = [["step", "loss of jresnet", "of PyTorch", *(f"distance of {pair}" for pair in report["distances"])]]
    for step in [step for step in steps if step in TABLE or step == steps[-1]]:
        losses = [f"{report['losses'][name][step - 1]:.4f}" for name in ("jresnet", "PyTorch")]
        distances = [f"{values[steps.index(step)]:.1e}" for values in report["distances"].values()]
        lines.append([str(step), *losses, *distances])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def plot(report: dict[str, Any], path: Path) -> None:
    """The losses, the distances of the parameters, and those of the losses."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 9), layout="constrained")
    losses, parameters, differences = figure.subplots(3, 1)
    steps = report["distance_steps"]
    every = range(1, steps[-1] + 1)
    # Drawn over each other: the first lines are the widest.
    for (name, values), width in zip(report["losses"].items(), (4, 3, 2.2, 1.5, 0.8), strict=False):
        losses.plot(every, values, label=name, linewidth=width)
    # A distance of 0, of runs that are equal bit for bit, has no place on a logarithmic axis.
    for pair, values in report["distances"].items():
        style = "--" if pair.endswith("float64") else "-"
        width = 2.5 if pair.startswith("jresnet") else 1.2
        parameters.plot(steps, [value or np.nan for value in values], style, label=pair, linewidth=width)
    for pair, values in report["loss_differences"].items():
        if not pair.endswith("float64"):  # four more curves of the same noise would hide these
            width = 2.5 if pair.startswith("jresnet") else 1.2
            differences.plot(every, [value or np.nan for value in values], label=pair, linewidth=width)
    figure.suptitle(report["what"], fontsize="medium")
    losses.set(xlabel="optimizer steps", ylabel="cross-entropy of the batch (nats)")
    ticks = [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step <= steps[-1]]
    for axes in (parameters, differences):
        axes.set(xlabel="optimizer steps", xscale="log", yscale="log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    parameters.set_ylabel("relative L2 distance of the parameters")
    differences.set_ylabel("difference of the losses (nats)")
    for axes in (losses, parameters, differences):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)


def rounded(value: Any) -> Any:
    """The same with numbers of 6 digits, all the way down."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="as for scripts/train_cifar10.py")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--out", type=Path, required=True, help="folder of comparison.json and comparison.png")
    parser.add_argument("--batch-size", type=int, default=RECIPE.batch_size, help="images a step (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--exact", action="store_true", help="add PyTorch in float64")
    args = parser.parse_args(argv)
    try:
        dataset = data.load_cifar10(args.data_dir, download=False)
        split = dataset.train
        if args.steps < 1 or not 1 <= args.batch_size <= len(split.labels):
            raise InputError(
                f"expected at least one step and 1 to {len(split.labels):,} images a step, got --steps {args.steps} "
                f"--batch-size {args.batch_size}"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        report = compare(split, args.steps, args.batch_size, args.seed, args.exact)
        report["data"] = {"digest": dataset.digest, "official": dataset.verified}
        files.write_atomically(args.out / "comparison.json", json.dumps(rounded(report), indent=1).encode())
        plot(report, args.out / "comparison.png")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
