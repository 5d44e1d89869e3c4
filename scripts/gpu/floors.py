"""Lower bounds on the time of a step on an accelerator: ``python scripts/gpu_floors.py --arch resnet50 --size 224``.

Two bounds are computed from the shapes: the operations of the convolutions and the head divided by the rate of the matrix
units, and the bytes moved to and from the device's memory divided by its bandwidth. No program is faster than the larger
bound. All bounds are computed, not measured. The rates of the devices come from datasheets, or were measured if DEVICES
says so.

Bytes are counted in passes over the activations. With ``unfused`` BatchNorm, the output of a convolution is written, read
for the statistics, read for the normalisation and written again. With ``fused``, the convolution computes the sums while
it writes, and the next convolution normalises while it reads. In the backward pass, a convolution reads the gradient of its
output twice and its input once, and writes the input's gradient. An unfused BatchNorm reads gradient and input twice more
and writes once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jresnet.commands.flags import Parser
from jresnet.errors import JresnetError
from jresnet.models import zoo
from jresnet.models.resnet import ResNet, ResNetConfig


@dataclass(frozen=True)
class Device:
    """Rates of a device, in 1e12 operations and 1e12 bytes per second."""

    name: str
    tflops: float  # bfloat16, dense
    terabytes: float
    source: str


DEVICES = (
    Device("H100", 798.0, 3.0, "measured with a large matrix product and a copy"),
    Device("H200", 790.0, 4.3, "measured with a large matrix product and a copy"),
    Device("A100", 312.0, 2.04, "NVIDIA's datasheet, SXM 80 GB"),
    Device("TPU v5e", 197.0, 0.82, "Google Cloud's documentation"),
)
WIDTH = {"bfloat16": 2, "float32": 4}  # bytes per element


@dataclass(frozen=True)
class Layer:
    """A convolution, or the head, for one image."""

    name: str  # kind and shapes
    macs: int  # multiply-accumulates
    reads: int  # elements of the input
    writes: int  # elements of the output
    weights: int  # elements of the kernel
    normalised: bool  # whether a BatchNorm follows


def layers(config: ResNetConfig, size: int) -> list[Layer]:
    """The convolutions and the head in the order of the forward pass, from the traced program."""
    graph, state = nnx.split(ResNet(config, rngs=None))
    found: list[Layer] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "jresnet_convolution":
                (x, kernel), y = (variable.aval for variable in equation.invars), equation.outvars[0].aval
                taps, stride = "x".join(map(str, kernel.shape[:2])), equation.params["stride"]
                groups = equation.params["groups"]
                name = f"conv {taps}{f'/{stride}' if stride > 1 else ''}{f' in {groups} groups' if groups > 1 else ''}"
                name += f", {x.shape[1]}x{x.shape[2]}x{x.shape[3]} -> {y.shape[1]}x{y.shape[2]}x{y.shape[3]}"
                macs = math.prod(y.shape) * math.prod(kernel.shape[:3])
                normalised = True
                found.append(Layer(name, macs, math.prod(x.shape), math.prod(y.shape), kernel.size, normalised))
            elif equation.primitive.name == "dot_general":
                x, kernel = (variable.aval for variable in equation.invars)
                y = equation.outvars[0].aval
                name = f"linear, {x.shape[-1]} -> {y.shape[-1]}"
                found.append(Layer(name, kernel.size, x.size, y.size, kernel.size, False))
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    walk(inner.jaxpr)

    image = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    walk(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image).jaxpr)
    return found


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a step."""

    flops: float
    fused: float  # bytes, with BatchNorm and ReLU fused into the convolutions
    unfused: float  # bytes, with BatchNorm and ReLU in separate passes
    kept: float  # bytes of activations stored for the backward pass


def work(found: list[Layer], batch: int, task: str, precision: str, remat: bool = False) -> Work:
    """Operations and bytes of a step of ``task``, ``"train"`` or ``"infer"``, on ``batch`` images.

    Parameters and momenta are float32. A training step reads and writes both, and reads the gradients.
    """
    width, macs = WIDTH[precision], sum(layer.macs for layer in found)
    reads, writes = sum(layer.reads for layer in found), sum(layer.writes for layer in found)
    normalised = sum(layer.writes for layer in found if layer.normalised)
    weights = sum(layer.weights for layer in found)
    if task == "infer":  # BatchNorm is folded into the convolutions
        moved = batch * width * (reads + writes) + width * weights
        return Work(2.0 * batch * macs, moved, moved, 0.0)
    forward = 1 + (1 if remat else 0)
    passes = forward * (reads + writes) + (2 * writes + 2 * reads)
    norm = (3 * forward + 5) * normalised
    parameters = 4 * weights * 5 + width * weights * (2 * forward + 2)
    kept = batch * width * (reads if not remat else reads / 3)
    return Work(
        2.0 * batch * macs * (2 + forward), batch * width * passes + parameters,
        batch * width * (passes + norm) + parameters, kept,
    )  # fmt: skip


def floors(amount: Work, device: Device) -> dict[str, float]:
    """Lower bounds in seconds."""
    return {
        "arithmetic": amount.flops / device.tflops / 1e12,
        "bytes, fused": amount.fused / device.terabytes / 1e12,
        "bytes, unfused": amount.unfused / device.terabytes / 1e12,
    }


# Maximum number of devices, bytes per second that each sends while all exchange gradients, and latency in seconds.
LINKS = {
    "NVLink, 8 GPUs of one machine": (8, 450e9, 5e-6),
    "InfiniBand NDR, one port per GPU": (1024, 50e9, 15e-6),
    "TPU v5e's interconnect": (256, 100e9, 5e-6),
}


def exchange(weights: int, devices: int, rate: float, latency: float) -> float:
    """Seconds to sum ``weights`` float32 gradients over ``devices``, with two trees (Sanders et al. 2009)."""
    if devices == 1:
        return 0.0
    return 2 * (devices - 1) / devices * 4 * weights / rate + 2 * math.ceil(math.log2(devices)) * latency


def scaling(found: list[Layer], batch: int, precision: str, device: Device, counts: list[int]) -> list[dict[str, Any]]:
    """Lower bounds for training with ``batch`` images per device, with the exchange overlapped with the step or after it."""
    weights, step = (
        sum(layer.weights for layer in found),
        max(floors(work(found, batch, "train", precision), device).values()),
    )
    rows = []
    for count in counts:
        usual = [link for link in LINKS.items() if device.name.startswith("TPU") == link[0].startswith("TPU")]
        fitting = [link for link in usual if count <= link[1][0]]
        if fitting:
            name, (_, rate, latency) = fitting[0] if count > 1 else ("none", fitting[0][1])
            waits = exchange(weights, count, rate, latency)
            rows.append(
                {"devices": count, "link": name, "exchange": waits, "step, exchange hidden": max(step, waits),
                 "step, exchange after it": step + waits, "images a second": count * batch / max(step, waits)}
            )  # fmt: skip
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Compute lower bounds on the time of a step on an accelerator from the shapes of the layers. Measures "
        "nothing, and needs no accelerator.",
        epilog="Exit codes: 0 success; 1 invalid network; 2 wrong options.",
    )
    add = parser.add_argument
    add("--arch", default="resnet50", help="an architecture of jresnet.list_models() (default: %(default)s)")
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height and width; below 64 with the CIFAR stem (default: 224, for CIFAR networks 32)",
    )
    add("--batch", type=int, default=256, metavar="N", help="images per batch (default: %(default)s)")
    add("--task", choices=("train", "infer"), default="train", help="(default: %(default)s)")
    add(
        "--precision", choices=tuple(WIDTH), default="bfloat16", help="dtype of the convolutions (default: %(default)s)"
    )
    add("--layers", action="store_true", help="also print a line for each layer")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    size = args.size or (32 if args.arch.endswith("_cifar") else 224)
    if size < 8 or args.batch < 1:
        print(f"error: --size must be at least 8 and --batch at least 1, got {size} and {args.batch}", file=sys.stderr)
        return 2
    try:
        small = {"stem": "cifar", "num_classes": 10} if size < 64 else {}
        found = layers(zoo.configure(args.arch, **small), size)
    except JresnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options = {"as it is": {}} | ({"with remat": {"remat": True}} if args.task == "train" else {})
    amounts = {name: work(found, args.batch, args.task, args.precision, **more) for name, more in options.items()}
    times = {name: {d.name: floors(amount, d) for d in DEVICES} for name, amount in amounts.items()}
    many = [1, 8, 64, 256, 1024]
    scaled = (
        {d.name: scaling(found, args.batch, args.precision, d, many) for d in DEVICES} if args.task == "train" else {}
    )
    if args.json:
        print(json.dumps({
            "arch": args.arch, "size": size, "batch": args.batch, "task": args.task, "precision": args.precision,
            "layers": [asdict(layer) for layer in found], "work": {k: asdict(v) for k, v in amounts.items()},
            "seconds": times, "devices": [asdict(d) for d in DEVICES], "scaling": scaled,
        }))  # fmt: skip
        return 0
    print(f"{args.task} {args.arch} at {size}, batch {args.batch}, {args.precision}: computed, not measured\n")
    if args.layers:
        print("| layer | GMAC per image | elements read | written | kernel |\n|---|---|---|---|---|")
        for layer in found:
            print(f"| {layer.name} | {layer.macs / 1e9:.4f} | {layer.reads:,} | {layer.writes:,} | {layer.weights:,} |")
        print()
    print(
        "| device | variant | TFLOP | GB, BN fused | GB, BN unfused | ms arithmetic | ms fused | ms unfused | images/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, amount in amounts.items():
        for device in DEVICES:
            least = times[name][device.name]
            rate = args.batch / max(least["arithmetic"], least["bytes, unfused"])
            print(
                f"| {device.name} | {name} | {amount.flops / 1e12:.2f} | {amount.fused / 1e9:.2f} "
                f"| {amount.unfused / 1e9:.2f} "
                f"| {least['arithmetic'] * 1e3:.2f} | {least['bytes, fused'] * 1e3:.2f} "
                f"| {least['bytes, unfused'] * 1e3:.2f} | {rate:,.0f} |"
            )
    for name, rows in scaled.items():
        print(f"\n{name}, {args.batch} images per device; BatchNorm's exchanges are not included\n")
        print(
            "| devices | link | ms exchange | ms step, overlapped | ms step, not overlapped | images/s |\n"
            "|---|---|---|---|---|---|"
        )
        for row in rows:
            times = [row[key] * 1e3 for key in ("exchange", "step, exchange hidden", "step, exchange after it")]
            shown = " | ".join(f"{value:.2f}" for value in times)
            print(f"| {row['devices']} | {row['link']} | {shown} | {row['images a second']:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
