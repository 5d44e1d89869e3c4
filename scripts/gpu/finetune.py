"""Measure fine-tuning on a folder of photos: ``python scripts/gpu_finetune.py --out DIR``.

Creates photos and measures three rates in images per second: the whole run, decoding alone, and training steps on images
that are already on the device. If the run is as fast as its steps, the device does not wait for images. The results are
written to ``DIR/finetune.json`` one by one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

import jresnet
from gpu.bars import bars
from gpu.variants import Training
from jresnet.commands.flags import Parser
from jresnet.data import folder
from jresnet.data.stream import Files, Stream
from jresnet.models import zoo
from jresnet.weights import native
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("blue", "green", "red", "white")
KEPT = (".json", ".jsonl", ".png", ".log")


def photos(root: Path, count: int) -> None:
    """Writes ``count`` JPEGs of 500x375 pixels and about 60 kB to ``CLASS/N.jpg``, similar in size to ImageNet's."""

    def make(number: int) -> None:
        draw, kind = np.random.default_rng(number), number % len(CLASSES)
        coarse = draw.integers(0, 160, (12, 16, 3), np.uint8)
        coarse[..., kind % 3 if kind < 3 else slice(None)] += 90
        picture = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + draw.integers(-20, 21, picture.shape, np.int16), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        (root / CLASSES[kind] / f"{number}.jpg").write_bytes(file.getvalue())

    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))


def decoding(root: Path, size: int, batch: int, workers: int, seconds: float) -> float:
    """Augmented images per second that ``workers`` processes decode, without training."""
    how = Preprocessing(None, size, *STATISTICS["imagenet"])
    files = Files(folder.find(root).train.sources, how)
    stream = Stream(files, batch_size=batch, epochs=1000, seed=0, size=size, workers=workers)
    try:
        stream.batch(0)  # wait until the workers have started
        began, number = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            number += 1
            stream.batch(number)
        return number * batch / (time.perf_counter() - began)
    finally:
        stream.close()


def command(out: Path, start: Path, root: Path, batch: int, epochs: int, workers: int, left: float) -> dict[str, Any]:
    """Fine-tunes all layers with the command; returns figures of its summary."""
    line = [
        sys.executable, "-u", str(ROOT / "scripts" / "finetune.py"), "--weights", str(start), "--data", str(root),
        "--out", str(out), "--no-head-stage", "--epochs", str(epochs), "--batch-size", str(batch), "--workers", str(workers),
    ]  # fmt: skip
    log, began = out.with_suffix(".log"), time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            line, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PYTHONPATH": _path()}
        )
        try:
            code = process.wait(timeout=max(1.0, left))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait(timeout=30)
    found: dict[str, Any] = {"code": code, "wall seconds": round(time.monotonic() - began, 1)}
    summary = out / "summary.json"
    if summary.exists():
        told = json.loads(summary.read_text())
        found |= {"images a second": told["images_per_second"], "final": told["final"], "device": told["device"]}
    else:
        found["said"] = log.read_text()[-2000:]
    for path in out.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()
    return found


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Fine-tune ResNet-50 on generated photos, and measure how long the device waits for images.",
        epilog="Exit codes: 0 success; 1 a part failed or was not reached; 2 wrong options.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for finetune.json and the photos")
    add(
        "--minutes",
        type=float,
        default=5.0,
        metavar="M",
        help="start no part after M minutes (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of decoding processes to measure (default: 8 and the number of cores)",
    )
    add("--small", action="store_true", help="a few photos and a small network, to test the script on a CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    until, small = time.monotonic() + 60 * args.minutes, args.small
    args.out.mkdir(parents=True, exist_ok=True)
    arch, size, batch, count, epochs = ("resnet18", 72, 4, 32, 1) if small else ("resnet50", 224, 128, 8192, 2)
    workers = args.workers or ([0] if small else sorted({8, os.cpu_count() or 8}))
    root, start = args.out / "photos", args.out / "start.safetensors"
    report: dict[str, Any] = {"arch": arch, "size": size, "batch": batch, "photos": count, "cores": os.cpu_count()}
    try:
        import grain  # noqa: F401
    except ImportError as error:
        print(f"error: cannot import grain, which decodes the photos: {error}: pip install grain", file=sys.stderr)
        return 1

    began = time.monotonic()
    photos(root, count)
    report["seconds for the photos"] = round(time.monotonic() - began, 1)
    config = zoo.configure(arch, num_classes=len(CLASSES))
    model = jresnet.ResNet(config, rngs=nnx.Rngs(0))
    preprocessing = Preprocessing(round(size * 8 / 7), size, *STATISTICS["imagenet"])
    native.save(start, model, arch, preprocessing=preprocessing.to_json(), categories=json.dumps(CLASSES))
    parts: dict[str, Callable[[], Any]] = {}
    for number in workers:
        parts[f"decoding, {number} workers"] = lambda n=number: decoding(root, size, batch, n, 1.0 if small else 5.0)
    for number in workers:
        parts[f"run, {number} workers"] = lambda n=number: command(
            args.out / f"run-{n}", start, root, batch, epochs, n, until - time.monotonic()
        )
    # Last, because it makes this process occupy memory of the device.
    parts["steps alone"] = lambda: (
        batch / min(Training(arch, size, batch, 2 if small else 30).run()[0] for _ in range(1))
    )
    right = True
    for name, work in parts.items():
        if time.monotonic() > until:
            report[name], right = "not reached", False
        else:
            try:
                report[name] = work()
            except Exception as error:  # the other parts still run
                report[name], right = {"error": f"{type(error).__name__}: {error}"[:1000]}, False
        (args.out / "finetune.json").write_text(json.dumps(report, indent=1) + "\n")
        shown = report[name] if isinstance(report[name], float) else (report[name] or {})
        if isinstance(shown, dict):
            right = right and shown.get("code", 0) == 0
            shown = shown.get("images a second") or shown.get("error") or shown.get("said", "")[-200:]
        print(f"| {name} | {shown if isinstance(shown, str) else f'{shown:,.0f} images/s'} |", flush=True)
    for path in [*root.rglob("*.jpg"), start]:
        path.unlink()
    device = jax.devices()[0]
    report["device"] = f"{device.device_kind} ({device.platform})"
    alone = report.get("steps alone")
    for number in workers:
        found = report.get(f"run, {number} workers")
        if isinstance(alone, float) and isinstance(found, dict) and "images a second" in found:
            waits = report[f"the device waits, {number} workers"] = max(0.0, 1 - found["images a second"] / alone)
            print(f"with {number} workers the device waits {waits:.0%} of the time")
    (args.out / "finetune.json").write_text(json.dumps(report, indent=1) + "\n")
    rates = {
        name: report[name] if isinstance(report[name], float) else report[name]["images a second"]
        for name in parts
        if isinstance(report[name], float) or "images a second" in report[name]
    }
    bars(rates, args.out / "finetune.png", "images per second", f"{arch} at {size}, batch {batch}, {report['device']}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
