"""Profile a training step on an accelerator: ``python scripts/gpu_trace.py --arch resnet50 --out DIR``.

Traces a few steps with ``jax.profiler`` and sums the times of the device's kernels by kind. The trace is kept in
``DIR/trace``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jresnet
from gpu.bars import bars
from jresnet.commands.flags import Parser
from jresnet.errors import JresnetError
from jresnet.models import zoo
from jresnet.training import optim

STEPS = 5
KINDS = (  # a kernel has the kind of the first pattern that matches its name
    ("convolution", r"conv|cudnn|xmma|implicit|wgrad|dgrad|winograd|nhwc"),
    ("matrix product", r"gemm|dot|cublas|cutlass"),
    ("reduction", r"reduce"),
    ("transpose or copy", r"transpose|copy|memcpy|memset"),
    ("fusion", r"fusion|fused"),
    ("gather or scatter", r"gather|scatter|dynamic"),
)


def kind(name: str) -> str:
    """The kind of the kernel with this name."""
    return next((label for label, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def summed(folder: Path) -> dict[str, Any]:
    """Seconds per step by kind, and the twenty slowest kernels, from the last trace in ``folder``."""
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        return {"note": "the profiler wrote no trace"}
    events = json.loads(gzip.decompress(files[-1].read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    device = {pid for pid, name in processes.items() if "device" in name.lower() or "gpu" in name.lower()}
    device = device or set(processes)  # a CPU's threads
    # A GPU's kernels are on the lines of its streams, a TPU's on the line "XLA Ops". Other lines count them again.
    lines = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    wanted = {line for line, name in lines.items() if line[0] in device and name.startswith("Stream")}
    wanted = wanted or {line for line, name in lines.items() if line[0] in device and name == "XLA Ops"}
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        place = event.get("pid"), event.get("tid")
        counts = place in wanted if wanted else place[0] in device
        if event.get("ph") == "X" and counts and event.get("dur"):
            by_kind[kind(event["name"])] += event["dur"] * 1e-6 / STEPS
            by_name[event["name"]].append(event["dur"] * 1e-6 / STEPS)
    most = sorted(((sum(times), len(times) / STEPS, name) for name, times in by_name.items()), reverse=True)[:20]
    return {
        "seconds a step by kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "kernels with the most": [
            {"name": name[:160], "seconds a step": seconds, "calls a step": calls} for seconds, calls, name in most
        ],
    }


def trace(arch: str, size: int, batch: int, out: Path) -> dict[str, Any]:
    """Traces SGD steps in bfloat16 on a batch on the device."""
    small = {"stem": "cifar", "num_classes": 10} if size < 64 else {}
    config = zoo.configure(arch, **small)
    model = jresnet.ResNet(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    optimizer = optim.optimizer("sgd", 1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((batch, size, size, 3), np.float32))
    y = jnp.asarray(draw.integers(0, config.num_classes, batch))

    def loss(params: nnx.State, stats: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), nnx.state(model, nnx.BatchStat)

    def step(params: nnx.State, stats: nnx.State, momenta: Any) -> tuple[Any, ...]:
        gradient, stats = jax.grad(loss, has_aux=True)(params, stats)
        updates, momenta = optimizer.update(gradient, momenta, params)
        return optax.apply_updates(params, updates), stats, momenta

    jitted = jax.jit(step, donate_argnums=(0, 1, 2), compiler_options=jresnet.compiler_options())
    state = jitted(params, stats, optimizer.init(params))
    state = jax.block_until_ready(jitted(*state))
    with jax.profiler.trace(str(out / "trace")):
        for _ in range(STEPS):
            state = jitted(*state)
        jax.block_until_ready(state)
    device = jax.devices()[0]
    about = {
        "arch": arch,
        "size": size,
        "batch": batch,
        "steps": STEPS,
        "device": f"{device.device_kind} ({device.platform})",
    }
    return about | {"jax": jax.__version__} | summed(out / "trace")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Trace training steps with jax.profiler and sum the device's kernels by kind.",
        epilog="Exit codes: 0 success; 1 invalid network; 2 wrong options.",
    )
    add = parser.add_argument
    add("--arch", default="resnet50", help="an architecture of jresnet.list_models() (default: %(default)s)")
    add(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="height and width; below 64 with the CIFAR stem (default: %(default)s)",
    )
    add("--batch", type=int, default=64, metavar="N", help="images per batch (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for trace-ARCH.json and trace/")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        found = trace(args.arch, args.size, args.batch, args.out)
    except JresnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (args.out / f"trace-{args.arch}.json").write_text(json.dumps(found, indent=1) + "\n")
    kinds = {name: seconds * 1e3 for name, seconds in found.get("seconds a step by kind", {}).items()}
    title = f"{args.arch} at {args.size}, batch {args.batch}, {found['device']}"
    bars(kinds, args.out / f"trace-{args.arch}.png", "milliseconds per step", title)
    for name, seconds in found.get("seconds a step by kind", {}).items():
        print(f"{seconds * 1e3:9.3f} ms per step  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
