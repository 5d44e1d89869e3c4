"""Accuracy and time to accuracy on an accelerator: ``python scripts/gpu_accuracy.py --data-dir DIR --out OUT``.

Runs the training command for each row of ``RUNS`` until the time limit, and collects summaries, metrics, curves and
ResNet-20's weights. PyTorch's row trains with the same recipe by ``tests/parity/train_torch.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jresnet.commands.flags import Parser

ROOT = Path(__file__).resolve().parents[2]
JRESNET, TORCH = "scripts/train_cifar10.py", "tests/parity/train_torch.py"
KEPT = ("config.json", "metrics.jsonl", "summary.json", "curves.png", "confusion.png")  # files of a run that are kept
LARGEST = 2**20  # bytes; larger weights are deleted


@dataclass(frozen=True)
class Run:
    """One training command, and the accuracy that it must reach."""

    name: str
    script: str
    options: tuple[str, ...]
    seeds: int
    asked: float | None  # required mean test accuracy after the last epoch
    usual: bool = True  # whether it is run by default


_STEP = ("--recipe", "step", "--epochs", "200")
_VALIDATED = (*_STEP, "--val-split", "5000")
RUNS = (  # in order of priority, as the time is limited
    Run("resnet18-fast", JRESNET, ("--depth", "18", "--recipe", "fast", "--epochs", "20"), 5, 0.94),
    Run("resnet20-step", JRESNET, ("--depth", "20", *_STEP), 2, 0.92),
    Run("resnet18-fast-torch", TORCH, ("--depth", "18", "--recipe", "fast", "--epochs", "20"), 2, None),
    Run("resnet18-step", JRESNET, ("--depth", "18", *_STEP), 1, 0.955),
    Run("resnet20-step-val", JRESNET, ("--depth", "20", *_VALIDATED), 1, None, usual=False),
    Run("resnet56-step", JRESNET, ("--depth", "56", *_STEP), 1, 0.939, usual=False),
    Run("resnet18-step-val", JRESNET, ("--depth", "18", *_VALIDATED), 1, None, usual=False),
    Run("resnet34-step", JRESNET, ("--depth", "34", *_STEP), 1, 0.957, usual=False),
    Run(  # techniques of airbench (arXiv:2404.00498) that apply to a plain ResNet, with more epochs
        "resnet18-long", JRESNET,
        ("--depth", "18", "--recipe", "fast", "--epochs", "100", "--label-smoothing", "0.2",
         "--ema", "0.999", "--zero-init-residual"), 1, 0.96, usual=False,
    ),
    Run("resnet50-step", JRESNET, ("--depth", "50", *_STEP), 1, None, usual=False),
)  # fmt: skip


def command(run: Run, args: argparse.Namespace, out: Path) -> list[str]:
    """The command line of a run."""
    found = [sys.executable, "-u", str(ROOT / run.script), *run.options, "--runs", str(run.seeds), "--out", str(out)]
    found += ["--data-dir", str(args.data_dir)] if args.data_dir else ["--dataset", "digits"]
    if args.small:
        found += ["--epochs", "1", "--limit-train", "32", "--limit-test", "40", "--batch-size", "16", "--runs", "1"]
        found += ["--depth", "8", *(["--val-split", "16"] if "--val-split" in run.options else [])]
        found += ["--milestones"] if "step" in run.options else []
    return [*found, "--precision", args.precision]


def execute(run: Run, args: argparse.Namespace, out: Path, until: float) -> dict[str, Any]:
    """Runs a command, terminates it at the time limit, and collects its results."""
    began, line = time.monotonic(), command(run, args, out)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "parity")])}
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            code = process.wait(timeout=max(1.0, until - began))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait(timeout=30)
    found: dict[str, Any] = {
        "command": " ".join(["python", *(str(part) for part in line[2:])]).replace(f"{ROOT}/", ""), "code": code,
        "seconds": round(time.monotonic() - began, 1), "asked": run.asked,
    }  # fmt: skip
    summaries = [json.loads(path.read_text()) for path in sorted(out.glob("seed-*/summary.json"))]
    summaries = summaries or [json.loads(path.read_text()) for path in out.glob("summary.json")]
    accuracies = [s["final"]["test_accuracy"] for s in summaries if s.get("final")]
    if accuracies:
        found |= {
            "n": len(accuracies), "test accuracies": accuracies, "mean": statistics.fmean(accuracies),
            "standard deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seconds of training and evaluation": [s.get("seconds") for s in summaries],
            "seconds of compilation": [s.get("compile_seconds") for s in summaries],
            "images a second": [s.get("images_per_second") for s in summaries],
            "device": summaries[0].get("device"), "versions": summaries[0].get("versions"),
        }  # fmt: skip
    else:
        found["said"] = log.read_text()[-2000:]
    keep(out)
    return found


def keep(out: Path) -> None:
    """Deletes large files from a run's folder, such as checkpoints and large weights."""
    for folder in [*out.rglob("checkpoints"), *out.rglob("tensorboard")]:
        shutil.rmtree(folder, ignore_errors=True)
    for path in [path for path in out.rglob("*") if path.is_file()]:
        small = path.name == "last.safetensors" and path.stat().st_size <= LARGEST
        if path.name not in KEPT and not small:
            path.unlink()


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Train networks on CIFAR-10, check the required accuracies, and collect accuracies and times.",
        epilog="Exit codes: 0 success; 1 a run failed, missed its accuracy or was not reached; 2 wrong options.",
    )
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="CIFAR-10 (default: the digits, to test the script)")
    add("--out", type=Path, required=True, metavar="OUT", help="folder for accuracy.json and the runs")
    add(
        "--runs", nargs="+", choices=[run.name for run in RUNS], metavar="NAME",
        help=f"some of: %(choices)s (default: the first {sum(run.usual for run in RUNS)})",
    )  # fmt: skip
    add(
        "--minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="time limit in minutes for all runs (default: %(default)s)",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of convolutions (default: %(default)s)",
    )
    add("--small", action="store_true", help="ResNet-8 for one epoch of 32 images, to test the script on a CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"runs": {}, "not reached": []}
    right = True
    for run in RUNS:
        if run.name not in args.runs if args.runs else not run.usual:
            continue
        if run.script == TORCH and importlib.util.find_spec("torch") is None:
            print(f"left out {run.name}: torch is not installed")
            continue
        if time.monotonic() > until:
            report["not reached"].append(run.name)
            continue
        found = execute(run, args, args.out / run.name, until)
        report["runs"][run.name] = found
        (args.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
        short = run.asked is not None and not args.small and found.get("mean", 0.0) < run.asked
        right = right and found["code"] == 0 and not short
        said = f"{found['mean']:.2%} (n={found['n']})" if "mean" in found else found.get("said", "")[-200:]
        print(f"{'TOO LOW' if short else 'ok' if found['code'] == 0 else 'FAILED'} {run.name}: {said}", flush=True)
    (args.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"not reached: {', '.join(report['not reached']) or 'none'}")
    return 0 if right and not report["not reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
