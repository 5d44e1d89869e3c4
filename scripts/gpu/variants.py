"""Compare variants of the training step with the default on an accelerator: ``python scripts/gpu_variants.py --out DIR``.

The default and a variant are measured alternately. Each row is written to ``DIR/variants.json`` as soon as it is known: the
seconds per step of both in jresnet's own loop, including augmentation and optimizer, and the relative difference of the
first loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jresnet
from gpu.bars import bars
from jresnet import kernels
from jresnet.commands.flags import Parser
from jresnet.data.dataset import Split
from jresnet.models import zoo
from jresnet.training import devices, loop, optim
from jresnet.training import step as train
from jresnet.training.augment import Pipeline
from jresnet.training.checkpoint import Checkpoints
from jresnet.training.loop import StepsLoop
from jresnet.weights.preprocessing import STATISTICS

STEPS, ROUNDS = 30, 3
NETWORKS = (("resnet18", 32, 512), ("resnet50", 224, 128), ("resnet20_cifar", 32, 1024))
SMALL = (("resnet8_cifar", 32, 4),)


class StemByDepth(nnx.Module):
    """A 7x7 convolution with stride 2 and padding 3 as a 4x4 convolution after space-to-depth, from 3 to 12 channels."""

    def __init__(self, conv: Any):
        self.kernel, self.dtype = conv.kernel, conv.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        x = jnp.pad(x.astype(dtype), ((0, 0), (3, 3), (3, 3), (0, 0)))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)
        kernel = jnp.pad(kernel.astype(dtype), ((0, 1), (0, 1), (0, 0), (0, 0)))
        kernel = kernel.reshape(4, 2, 4, 2, c, -1).transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * c, -1)
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def by_depth(model: jresnet.ResNet) -> None:
    """Replaces the ImageNet stem of a network by :class:`StemByDepth`."""
    if model.config.stem != "imagenet":
        raise NotFitting("the stem has no stride")
    model.conv1 = StemByDepth(model.conv1)


class NotFitting(Exception):
    """The variant does not apply to the network."""


def in_two_passes(
    x: jax.Array, scale: jax.Array, bias: jax.Array, about: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """:func:`jresnet.kernels.normalise` in two passes: the mean, then the variance of the centred values."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    centred = wide - mean[None, None, None]
    var = jnp.square(centred).mean((0, 1, 2))
    y = centred * (lax.rsqrt(var + eps) * scale)[None, None, None] + bias[None, None, None]
    return y.astype(x.dtype), mean, var


@contextlib.contextmanager
def two_passes() -> Iterator[None]:
    """Computes BatchNorm by :func:`in_two_passes`."""
    before = kernels.normalise
    kernels.normalise = in_two_passes  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.normalise = before


@dataclass(frozen=True)
class Variant:
    """The differences of a variant from the default."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  # compiler options of XLA
    remat: bool = False
    change: Callable[[jresnet.ResNet], None] = lambda model: None
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    generator: str | None = None  # JAX's implementation of random numbers; None: the default
    on_device: bool = True


VARIANTS = (  # in order of the expected gain
    Variant("BatchNorm in two passes", within=two_passes),
    Variant("the stem by depth", change=by_depth),
    Variant("a call for each step", on_device=False),
    Variant("no command buffers", {"xla_gpu_enable_command_buffer": ""}),
    Variant("no autotuning", {"xla_gpu_autotune_level": 0}),
    Variant("random numbers by rbg", generator="rbg"),
    Variant("convolutions forced to NHWC", {"xla_gpu_force_conv_nhwc": True}),
    Variant("no Triton matrix products", {"xla_gpu_enable_triton_gemm": False}),
    Variant("remat", remat=True),
)


USUAL = Variant("as it is")


class Training:
    """Compiled training steps of a network, on images on the device."""

    def __init__(self, arch: str, size: int, batch: int, steps: int, variant: Variant = USUAL):
        small = {"stem": "cifar", "num_classes": 10} if size < 64 else {}
        config, where = zoo.configure(arch, **small), devices.find(1)
        self.batch, self.steps = batch, steps
        with variant.within():
            model = jresnet.ResNet(config, dtype=jnp.bfloat16, remat=variant.remat, rngs=nnx.Rngs(0))
            variant.change(model)
            optimizer = optim.optimizer("sgd", 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
            statistics_of = STATISTICS["cifar10" if small else "imagenet"]
            pipeline = Pipeline("pad" if small else "done", size, "random", *statistics_of)
            step = train.train_step(nnx.graphdef(model), optimizer, pipeline, devices=where)
            options = jresnet.compiler_options(variant.remat) | variant.options
            self.loop = StepsLoop(step, where, variant.on_device, options)
            draw, kept = np.random.default_rng(0), min(steps * batch, 4096)
            images = draw.integers(0, 256, (kept, size, size, config.in_channels), np.uint8)
            labels = draw.integers(0, config.num_classes, kept).astype(np.int32)
            self.split = train.Images(*where.replicate((images, labels)))
            self.order = where.put(
                (np.arange(steps * batch) % kept).astype(np.int32).reshape(steps, batch), where.cut(1)
            )
            self.key = where.replicate(jax.random.key(0, impl=variant.generator))
            self.state = where.replicate(train.init(model, optimizer))
            began = time.perf_counter()
            self.loop.compile(self.state, self.split, self.order, self.key)
            self.compile_seconds = time.perf_counter() - began
            self.first_loss = float(self.run()[1])  # the first run also allocates memory

    def run(self) -> tuple[float, float]:
        """Runs all steps; returns the seconds per step and the loss of the first one."""
        began = time.perf_counter()
        self.state, metrics = self.loop(self.state, self.split, self.order, 0, self.steps, self.key)
        return (time.perf_counter() - began) / self.steps, float(metrics.loss[0])


def compared(usual: Training, arch: str, size: int, batch: int, steps: int, variant: Variant) -> dict[str, Any]:
    """Measures a variant and the default alternately."""
    changed = Training(arch, size, batch, steps, variant)
    pairs = [(usual.run()[0], changed.run()[0]) for _ in range(ROUNDS)]
    before, after = (statistics.median(part) for part in zip(*pairs, strict=True))
    return {
        "seconds as it is": before, "seconds": after, "rounds": pairs, "gain": before / after - 1,
        "images a second": batch / after, "compile seconds": changed.compile_seconds,
        "first loss, relative": abs(changed.first_loss / usual.first_loss - 1),
    }  # fmt: skip


def evaluation(small: bool) -> dict[str, Any]:
    """Seconds to evaluate 10,000 images, in batches of 128 from the host's memory and in large batches on the device."""
    where, count = devices.find(1), 96 if small else 10_000
    arch = "resnet8_cifar" if small else "resnet18"
    model = jresnet.ResNet(zoo.configure(arch, stem="cifar", num_classes=10), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, *weights = nnx.split(model, nnx.Param, nnx.BatchStat)
    averaged = where.replicate(train.Averaged(*weights))
    step = jax.jit(
        train.eval_step(graph, Pipeline("pad", 32, "none", *STATISTICS["cifar10"])), out_shardings=where.whole
    )
    draw = np.random.default_rng(0)
    split = Split(draw.integers(0, 256, (count, 32, 32, 3), np.uint8), draw.integers(0, 10, count).astype(np.int32))
    large = list(loop.batches(split, -(-count // 3), where))
    ways: dict[str, Callable[[], Any]] = {
        "from the host, 128 at a time": lambda: loop.batches(split, min(count, 128), where),
        "on the device, a third at a time": lambda: large,
    }
    found: dict[str, Any] = {}
    for name, batches in ways.items():
        times = []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            loop.evaluate(step, averaged, batches(), split.labels)
            times.append(time.perf_counter() - began)
        found[name] = {"seconds": statistics.median(times[1:])}
    return found


def saving(small: bool) -> dict[str, Any]:
    """Seconds that training waits for a checkpoint and for the best weights, and until the checkpoint is on disk."""
    where, arch = devices.find(1), "resnet8_cifar" if small else "resnet18"
    model = jresnet.ResNet(zoo.configure(arch, stem="cifar", num_classes=10), rngs=nnx.Rngs(0))
    state = where.replicate(train.init(model, optim.optimizer("sgd", 0.1)))
    snapshot = jax.jit(train.snapshot)
    waits, written, weights, copies = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        for step in range(1 + ROUNDS):
            began = time.perf_counter()
            checkpoints.save(state._replace(step=jnp.int32(step)), {})
            waits.append(time.perf_counter() - began)
            checkpoints.wait()
            written.append(time.perf_counter() - began)
            began = time.perf_counter()
            jresnet.save(Path(folder) / "best.safetensors", train.model_of(nnx.graphdef(model), state))
            weights.append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(snapshot(state))
            copies.append(time.perf_counter() - began)
    names = ("training waits for a checkpoint", "a checkpoint is written", "weights written", "weights copied")
    return {
        name: {"seconds": statistics.median(times[1:])}
        for name, times in zip(names, (waits, written, weights, copies), strict=True)
    }


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Compare the seconds per step of variants of training with the default on an accelerator.",
        epilog="Exit codes: 0 success; 1 a variant failed or was not reached; 2 wrong options.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for variants.json")
    add(
        "--minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="start no variant after M minutes (default: %(default)s)",
    )
    add("--small", action="store_true", help="one small network and two steps, to test the script on a CPU")
    add(
        "--only",
        nargs="+",
        metavar="WORD",
        help="only variants whose names contain a WORD, and evaluation or saving if named (default: all)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    until, steps = time.monotonic() + 60 * args.minutes, 2 if args.small else STEPS
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.device_kind} ({device.platform})", "jax": jax.__version__, "jresnet": jresnet.__version__,
        "steps": steps, "rows": {}, "not reached": [],
    }  # fmt: skip

    def note(name: str, found: dict[str, Any], text: str) -> None:
        report["rows"][name] = found
        (args.out / "variants.json").write_text(json.dumps(report, indent=1) + "\n")
        gains = {title: 100 * row["gain"] for title, row in report["rows"].items() if "gain" in row}
        bars(gains, args.out / "variants.png", "% faster than the default", report["device"])
        print(f"| {name} | {text} |", flush=True)

    def attempt(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if time.monotonic() > until:
            report["not reached"].append(name)
            return {}
        try:
            return work()
        except NotFitting:
            return {}
        except Exception as error:  # such as an option that XLA does not know; the other variants still run
            note(name, {"error": f"{type(error).__name__}: {error}"[:1000]}, f"failed: {str(error)[:80]}")
            return {}

    chosen = [v for v in VARIANTS if not args.only or any(word in v.name for word in args.only)]
    print("| what | default, variant |\n|---|---|")
    for work in (evaluation, saving):
        if args.only and work.__name__ not in args.only:
            continue
        for name, found in attempt(work.__name__, lambda work=work: work(args.small)).items():  # type: ignore[misc]
            note(name, found, f"{found['seconds'] * 1e3:.2f} ms")
    for network in SMALL if args.small else NETWORKS:
        title, usual = " ".join(map(str, network)), None
        for variant in chosen:
            name = f"{title}: {variant.name}"
            if usual is None and time.monotonic() <= until:
                usual = Training(*network, steps)
            found = attempt(name, lambda v=variant, n=network, u=usual: compared(u, *n, steps, v))  # type: ignore[misc]
            if found:
                before, after = found["seconds as it is"] * 1e3, found["seconds"] * 1e3
                note(name, found, f"{before:.3f} ms, {after:.3f} ms, {found['gain']:+.1%}")
    (args.out / "variants.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"not reached: {', '.join(report['not reached']) or 'none'}")
    return 1 if report["not reached"] or any("error" in row for row in report["rows"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
