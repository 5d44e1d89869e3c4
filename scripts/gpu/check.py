"""Check jresnet on an accelerator: ``python scripts/gpu_check.py --out DIR``.

Checks the lowered program, parity with float64, a training run and its resumption. Each result is written to
``DIR/check.json`` as soon as it is known; checks not reached within the time limit are listed there. The CPU computes the
float64 references, which takes minutes for ResNet-50. ``--write-references FILE`` computes them beforehand, on a machine
with the same versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark.networks import randomise
from flax import nnx

import jresnet
from jresnet.commands.flags import Parser
from jresnet.models import params, zoo
from jresnet.training import optim
from jresnet.weights import native

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("resnet18", "resnet20_cifar", "resnet50", "resnext50_32x4d")
STEPS, LR, MOMENTUM, WEIGHT_DECAY = 3, 0.01, 0.9, 5e-4
# FLOAT32: allowed error, relative to that of the CPU's float32; the order of summation differs. BFLOAT16: allowed relative
# error of the logits; bfloat16 has 8 bits of precision, so that each layer adds an error of up to 2^-8.
FLOAT32, BFLOAT16 = 5.0, 0.1
SAMPLED = 128  # elements of each array that are compared
RUN = ("--dataset", "digits", "--depth", "20", "--epochs", "4", "--deterministic", "--limit-train", "512")


def outcome(
    values: dict[str, np.ndarray], config: Any, images: np.ndarray, labels: np.ndarray, dtype: Any
) -> dict[str, Any]:
    """Evaluation logits, first gradient, and parameters and statistics after a few SGD steps: float64 samples of each."""
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
    """Concatenates the elements of a tree's arrays: all of a small array, ``SAMPLED`` random ones of a large array."""
    draw, found = np.random.default_rng(0), []
    for leaf in jax.tree.leaves(tree):
        values = np.asarray(leaf, np.float64).ravel()
        found.append(values if len(values) <= SAMPLED else values[draw.integers(0, len(values), SAMPLED)])
    return np.concatenate(found)


def distances(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each quantity."""
    return {k: float(np.linalg.norm(found[k] - exact[k]) / np.linalg.norm(exact[k])) for k in exact}


class Case:
    """A network with random parameters and statistics, and images for it.

    Args:
        arch: the network.
        small: use few, small images.
    """

    def __init__(self, arch: str, small: bool):
        self.arch, self.config, self.host = arch, zoo.configure(arch), jax.local_devices(backend="cpu")[0]
        size, batch = (32, 16) if self.config.stem == "cifar" else (64, 8)
        if small:
            size, batch = 32, 4
        with jax.default_device(self.host):
            model = jresnet.ResNet(self.config, rngs=nnx.Rngs(0))
            randomise(model)
            self.values = {path: np.asarray(value) for path, value in params.arrays(model).items()}
        draw = np.random.default_rng(0)
        self.images = draw.standard_normal((batch, size, size, self.config.in_channels), np.float32)
        self.labels = draw.integers(0, self.config.num_classes, batch)

    def outcome(self, dtype: Any = None) -> dict[str, Any]:
        """The outcome on JAX's default device, in float32 or ``dtype``."""
        return outcome(self.values, self.config, self.images, self.labels, dtype)

    def digest(self) -> str:
        """SHA-256 of all inputs, since another version of JAX may draw other random numbers."""
        total = hashlib.sha256(self.images.tobytes() + self.labels.tobytes())
        for path in sorted(self.values):
            total.update(path.encode() + self.values[path].tobytes())
        return total.hexdigest()

    def references(self) -> dict[str, dict[str, Any]]:
        """The outcomes on the CPU in float64 and in float32."""
        wide = {path: value.astype(np.float64) for path, value in self.values.items()}
        with jax.default_device(self.host):
            with jax.enable_x64(True):
                exact = outcome(wide, self.config, self.images, self.labels, None)
            return {"float64": exact, "float32": self.outcome()}


def write_references(path: Path, archs: Sequence[str], small: bool) -> None:
    """Writes the references for :func:`parity`."""
    found: dict[str, Any] = {}
    for arch in archs:
        case = Case(arch, small)
        found[f"{arch}/digest"] = np.array(case.digest())
        for name, values in case.references().items():
            found |= {f"{arch}/{name}/{quantity}": value for quantity, value in values.items()}
        print(f"computed {arch}", flush=True)
    np.savez(path, **found)


def read_references(path: Path | None, case: Case) -> dict[str, dict[str, Any]] | None:
    """The references written for a network; None if there are none, or if they belong to other inputs."""
    if path is None or not path.exists():
        return None
    with np.load(path) as file:
        if f"{case.arch}/digest" not in file or str(file[f"{case.arch}/digest"]) != case.digest():
            return None
        found: dict[str, dict[str, Any]] = {"float64": {}, "float32": {}}
        for key in file:
            arch, _, name = key.partition("/")
            if arch == case.arch and name != "digest":
                kind, _, quantity = name.partition("/")
                found[kind][quantity] = file[key]
        return found


def parity(arch: str, small: bool, path: Path | None) -> dict[str, Any]:
    """Errors of this device in float32 and bfloat16, and of the CPU in float32, relative to the CPU in float64."""
    case = Case(arch, small)
    known = read_references(path, case)
    references = known or case.references()
    exact = references["float64"]
    yardstick = distances(references["float32"], exact)
    with jax.default_matmul_precision("highest"):  # no TF32
        float32 = distances(case.outcome(), exact)
    bfloat16 = distances(case.outcome(jnp.bfloat16), exact)
    right = all(float32[k] <= FLOAT32 * yardstick[k] for k in exact) and bfloat16["logits"] <= BFLOAT16
    found = {"right": bool(right), "float32": float32, "the CPU's float32": yardstick, "bfloat16": bfloat16}
    return found | {"references": "read" if known else "computed here"}


def program() -> dict[str, Any]:
    """Counts operations of ResNet-50 lowered for this device. On accelerators it must have no loops and no barriers."""
    model = jresnet.fuse(jresnet.create("resnet50"))
    lowered = jax.jit(model).lower(jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32))
    text = lowered.as_text()
    counts = {name: text.count(f"stablehlo.{name}") for name in ("convolution", "while", "optimization_barrier")}
    plain = counts == {"convolution": 53, "while": 0, "optimization_barrier": 0}
    return {"right": plain or jax.default_backend() == "cpu", "lowered": counts}


def run(out: Path, small: bool) -> dict[str, Any]:
    """Trains on the digits twice, the second time with SIGTERM and a resumption. Both must give bit-identical weights."""
    whole, cut = out / "digits", out / "digits-resumed"
    shorter = ("--depth", "8", "--limit-train", "64") if small else ()
    first = train(whole, *shorter)
    interrupted = train(cut, *shorter, stop_after="epoch 2/")
    resumed = train(cut, *shorter, "--resume")
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
    """Runs the training command; sends SIGTERM after a printed line that begins with ``stop_after``."""
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
    parser = Parser(
        description="Check jresnet on this machine's accelerator: logits, gradients and three SGD steps against the CPU's "
        "float64, the lowered program, a training run on the digits, and its bit-identical resumption.",
        epilog="Exit codes: 0 success; 1 a check failed or was not reached; 2 wrong options.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder for check.json")
    where.add_argument(
        "--write-references", type=Path, metavar="FILE", help="write the CPU's results for --references, and exit"
    )
    parser.add_argument(
        "--references", type=Path, metavar="FILE", help="file of --write-references (default: compute them)"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, metavar="M", help="start no check after M minutes (default: 3)"
    )
    parser.add_argument(
        "--small", action="store_true", help="a small network and few images, to test the script on a CPU"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    archs = ("resnet8_cifar",) if args.small else ARCHS
    if args.write_references:
        write_references(args.write_references, archs, args.small)
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": f"{device.device_kind} ({device.platform})",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jresnet": jresnet.__version__},
        "checks": {},
        "not reached": [],
    }
    checks: dict[str, Callable[[], dict[str, Any]]] = {"program": program}
    checks |= {f"parity {arch}": lambda arch=arch: parity(arch, args.small, args.references) for arch in archs}
    checks["run"] = lambda: run(args.out, args.small)
    for name, check in checks.items():
        if time.monotonic() > deadline:
            report["not reached"].append(name)
            continue
        began = time.monotonic()
        try:
            found = check()
        except Exception as error:  # the other checks still run
            found = {"right": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        report["checks"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
        (args.out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
        print(
            f"{'ok' if found['right'] else 'FAILED':6} {name}, {time.monotonic() - began:.0f} s: {found}"[:400],
            flush=True,
        )
    (args.out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
    right = all(found["right"] for found in report["checks"].values()) and not report["not reached"]
    print(
        f"{report['device']}: {'all passed' if right else 'NOT all passed'}; not reached: {report['not reached'] or 'none'}"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
