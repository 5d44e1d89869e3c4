"""Is it right on this accelerator? ``python scripts/gpu_check.py --out DIR``: parity, the program, a run, its resumption.

Each result is written to ``DIR/check.json`` as soon as it is known; what the minutes do not reach is named there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark.networks import randomise
from flax import nnx

import jresnet
from jresnet.models import params, zoo
from jresnet.training import optim
from jresnet.weights import native

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("resnet18", "resnet20_cifar", "resnet50", "resnext50_32x4d")
STEPS, LR, MOMENTUM, WEIGHT_DECAY = 3, 0.01, 0.9, 5e-4
# Over the distance of the CPU's float32 to float64: another order of summation. bfloat16 keeps 8 bits: 2^-8 a layer.
FLOAT32, BFLOAT16 = 5.0, 0.1
RUN = ("--dataset", "digits", "--depth", "20", "--epochs", "4", "--deterministic", "--limit-train", "512")


def outcome(
    values: dict[str, np.ndarray], config: Any, images: np.ndarray, labels: np.ndarray, dtype: Any
) -> dict[str, Any]:
    """Logits in evaluation, the first gradient and the parameters after a few steps of SGD, as flat float64 arrays."""
    model = params.fill(config, values, dtype)
    graph, weights, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    optimizer = optim.optimizer("sgd", LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    x, y = jnp.asarray(images, next(iter(values.values())).dtype), jnp.asarray(labels)

    def loss(weights: nnx.State, stats: nnx.State) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graph, weights, stats, copy=True)
        logits = model(x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), nnx.state(model, nnx.BatchStat)

    @jax.jit
    def step(weights: nnx.State, stats: nnx.State, momenta: Any) -> tuple[Any, ...]:
        gradient, stats = jax.grad(loss, has_aux=True)(weights, stats)
        updates, momenta = optimizer.update(gradient, momenta, weights)
        return optax.apply_updates(weights, updates), stats, momenta, gradient

    found = {"logits": flat(jax.jit(lambda w, s: nnx.merge(graph, w, s)(x))(weights, stats))}
    state = (weights, stats, optimizer.init(weights))
    for number in range(STEPS):
        *state, gradient = step(*state)
        if number == 0:
            found["gradient"] = flat(gradient)
    return found | {f"parameters after {STEPS} steps": flat(state[0]), "running statistics": flat(state[1])}


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree, one after the other."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distances(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Relative L2 errors."""
    return {k: float(np.linalg.norm(found[k] - exact[k]) / np.linalg.norm(exact[k])) for k in exact}


def parity(arch: str, small: bool) -> dict[str, Any]:
    """This device's float32 and bfloat16, and the CPU's float32, against the CPU's float64."""
    config, host = zoo.configure(arch), jax.local_devices(backend="cpu")[0]
    size, batch = (32, 16) if config.stem == "cifar" else (64, 8)
    if small:
        size, batch = 32, 4
    with jax.default_device(host):
        model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
        randomise(model)
        values = params.arrays(model)
    draw = np.random.default_rng(0)
    images = draw.standard_normal((batch, size, size, config.in_channels), np.float32)
    labels = draw.integers(0, config.num_classes, batch)
    with jax.default_device(host), jax.enable_x64(True):
        wide = {path: value.astype(np.float64) for path, value in values.items()}
        exact = outcome(wide, config, images, labels, None)
    with jax.default_device(host):
        yardstick = distances(outcome(values, config, images, labels, None), exact)
    with jax.default_matmul_precision("highest"):  # no TF32
        float32 = distances(outcome(values, config, images, labels, None), exact)
    bfloat16 = distances(outcome(values, config, images, labels, jnp.bfloat16), exact)
    right = all(float32[k] <= FLOAT32 * yardstick[k] for k in exact) and bfloat16["logits"] <= BFLOAT16
    return {"right": bool(right), "float32": float32, "the CPU's float32": yardstick, "bfloat16": bfloat16}


def program() -> dict[str, Any]:
    """What the compiled ResNet-50 of this device holds, beside what was lowered for it."""
    model = jresnet.fuse(jresnet.create("resnet50"))
    lowered = jax.jit(model).lower(jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32))
    text = lowered.as_text()
    counts = {name: text.count(f"stablehlo.{name}") for name in ("convolution", "while", "optimization_barrier")}
    plain = counts == {"convolution": 53, "while": 0, "optimization_barrier": 0}
    return {"right": plain or jax.default_backend() == "cpu", "lowered": counts}


def run(out: Path) -> dict[str, Any]:
    """A run of the digits, and the same stopped by SIGTERM and resumed: the same bits."""
    whole, cut = out / "digits", out / "digits-resumed"
    first = train(whole)
    interrupted = train(cut, stop_after="epoch 2/")
    resumed = train(cut, "--resume")
    same = False
    if resumed["code"] == 0:
        arrays = [native.read(folder / "last.safetensors")[2] for folder in (whole, cut)]
        same = all(value.tobytes() == arrays[1][path].tobytes() for path, value in arrays[0].items())
    summary = json.loads((whole / "summary.json").read_text()) if first["code"] == 0 else {}
    accuracy = summary.get("final", {}).get("test_accuracy")
    for folder in (whole, cut):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".json", ".jsonl", ".png"):
                path.unlink()
    return {
        "right": bool(first["code"] == 0 and interrupted["code"] == 143 and same),
        "accuracy": accuracy, "the same bits when resumed": same,
        "codes": [part["code"] for part in (first, interrupted, resumed)],
        "said": [part["said"] for part in (first, interrupted, resumed) if part["code"] not in (0, 143)],
    }  # fmt: skip


def train(out: Path, *more: str, stop_after: str = "") -> dict[str, Any]:
    """The training command; with ``stop_after`` it gets SIGTERM once it prints a line that begins so."""
    command = [sys.executable, "-u", str(ROOT / "scripts" / "train_cifar10.py"), *RUN, "--out", str(out), *more]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        for line in process.stdout or []:
            lines.append(line.rstrip())
            if stop_after and line.startswith(stop_after):
                process.send_signal(signal.SIGTERM)
    return {"code": process.returncode, "said": lines[-8:]}


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Check jresnet on this machine's accelerator: logits, gradients and three SGD steps against the CPU's "
        "float64, the lowered program, a run of the digits, and its resumption bit by bit.",
        epilog="Exit code: 0; 1 where something is not right or was not reached; 2 for bad options.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where check.json goes")
    parser.add_argument(
        "--minutes", type=float, default=3.0, metavar="M", help="a check begins while these last (default: 3)"
    )
    parser.add_argument("--small", action="store_true", help="two small networks and sizes, to rehearse on a CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.device_kind} ({device.platform})",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jresnet": jresnet.__version__},
        "checks": {},
        "not reached": [],
    }
    archs = ("resnet20_cifar",) if args.small else ARCHS
    checks: dict[str, Callable[[], dict[str, Any]]] = {"program": program}
    checks |= {f"parity {arch}": lambda arch=arch: parity(arch, args.small) for arch in archs}
    checks["run"] = lambda: run(args.out)
    for name, check in checks.items():
        if time.monotonic() > deadline:
            report["not reached"].append(name)
            continue
        began = time.monotonic()
        try:
            found = check()
        except Exception as error:  # one check that fails says nothing of the others
            found = {"right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        report["checks"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
        (args.out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
        print(
            f"{'right' if found['right'] else 'WRONG':6} {name}, {time.monotonic() - began:.0f} s: {found}"[:400],
            flush=True,
        )
    (args.out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    right = all(found["right"] for found in report["checks"].values()) and not report["not reached"]
    print(
        f"{report['device']}: {'all right' if right else 'NOT all right'}; not reached: {report['not reached'] or 'none'}"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
