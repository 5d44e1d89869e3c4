"""Time N seeds trained at once against one after the other: ``python scripts/measure_runs.py --arch resnet20_cifar``.

At once is ``jax.vmap`` of the training step over states, batches and keys. Kernels then differ by seed, so that JAX makes
one grouped convolution of N ordinary ones. One after the other is the step alone, each waiting for the one before it, as
in N runs; both are compiled, give the state's memory away, and take turns, so that both meet the same load. The vmapped
step traces as it is, the CPU's own gradient of a convolution (``jresnet.kernels.cpu.convolve_to_train``) included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Seconds that one step of all the seeds takes, by round."""

    sequential: list[float]
    vmapped: list[float]
    compile_seconds: tuple[float, float]  # of the plain step, of the vmapped one
    difference: float  # largest relative difference between the losses of the two ways, in two steps

    @property
    def ratios(self) -> list[float]:
        """How much faster at once is, by round."""
        return [one / other for one, other in zip(self.sequential, self.vmapped, strict=True)]


def measure(create: Callable[[int], Any], size: int, batch_size: int, runs: int, rounds: int) -> Measured:
    """Takes two steps of each seed both ways, compares the losses, and times ``rounds`` more.

    Args:
        create: makes the model of a seed.
        size: pixels, height and width of the images, which are random.
        batch_size: images a seed and step.
        runs: seeds.
        rounds: how often each way is timed.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jresnet import cache, compiler_options
    from jresnet.data.statistics import STATISTICS
    from jresnet.training import optim
    from jresnet.training import step as train
    from jresnet.training.augment import Pipeline

    models = [create(seed) for seed in range(runs)]
    optimizer = optim.optimizer("sgd", 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    pipeline = Pipeline("pad", size, "random", *STATISTICS["cifar10"])
    step = train.train_step(nnx.graphdef(models[0]), optimizer, pipeline)

    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (4 * batch_size, size, size, 3), np.uint8)
    split = train.Images(jnp.asarray(images), jnp.asarray(draw.integers(0, 10, len(images)), jnp.int32))
    order = jnp.asarray([draw.permutation(len(images))[:batch_size] for _ in range(runs)], jnp.int32)
    keys = jax.random.split(jax.random.key(0), runs)
    states = [train.init(model, optimizer) for model in models]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def compiled(function: Callable, *arguments: Any) -> tuple[Callable, float]:
        began = time.perf_counter()
        jitted = jax.jit(function, donate_argnums=0, compiler_options=compiler_options())
        return cache.compiled(jitted, *arguments), time.perf_counter() - began

    alone, alone_seconds = compiled(step, states[0], split, order[0], keys[0])
    together, together_seconds = compiled(jax.vmap(step, (0, None, 0, 0)), stacked, split, order, keys)
    batches = [(order[i], keys[i]) for i in range(runs)]

    def sequential() -> tuple[float, list[float]]:
        began, losses = time.perf_counter(), []
        for i, (indices, key) in enumerate(batches):
            states[i], metrics = alone(states[i], split, indices, key)
            losses.append(float(metrics.loss))
        return time.perf_counter() - began, losses

    def vmapped() -> tuple[float, list[float]]:
        nonlocal stacked
        began = time.perf_counter()
        stacked, metrics = together(stacked, split, order, keys)
        losses = np.asarray(metrics.loss).tolist()
        return time.perf_counter() - began, losses

    losses = np.array([(sequential()[1], vmapped()[1]) for _ in range(2)])  # the second step's depend on the gradients
    difference = float(np.abs(losses[:, 1] / losses[:, 0] - 1).max())
    seconds = [(sequential()[0], vmapped()[0]) for _ in range(rounds)]
    first, second = zip(*seconds, strict=True)
    return Measured(list(first), list(second), (alone_seconds, together_seconds), difference)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Time N seeds trained at once (jax.vmap) against one after the other, on images of 32x32 pixels.",
        epilog="A ratio above 1: at once is faster. Its range is that of the rounds.",
    )
    parser.add_argument("--arch", default="resnet20_cifar", help="of jresnet.list_models() (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images of a seed (128)")
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="seeds (3)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="timed steps of each kind (3)")
    args = parser.parse_args(argv)

    import jax

    import jresnet

    device = jax.devices()[0]
    dtype = None if device.platform == "cpu" else jax.numpy.bfloat16  # as in training

    def create(seed: int) -> jresnet.ResNet:
        return jresnet.create(args.arch, num_classes=10, in_channels=3, stem="cifar", dtype=dtype, seed=seed)

    try:
        found = measure(create, 32, args.batch_size, args.runs, args.rounds)
    except jresnet.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ratios = found.ratios
    one, all_ = (f"{seconds:.1f}" for seconds in found.compile_seconds)
    table = {
        "architecture": args.arch,
        "batch": str(args.batch_size),
        "n": str(args.runs),
        "sequential s": f"{statistics.median(found.sequential):.4g}",
        "vmapped s": f"{statistics.median(found.vmapped):.4g}",
        "ratio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        "compile s": f"{one}, {all_}",
        "losses differ by": f"{found.difference:.1e}",
        "jax": jax.__version__,
        "device": f"{device.device_kind} ({device.platform})",
    }
    widths = [max(len(name), len(value)) for name, value in table.items()]
    for row in (table.keys(), table.values()):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
