"""Measure jresnet's loader of photos beside torchvision's, and beside the decoder alone.

``python scripts/benchmark_loader.py --json results/loader/NAME.json``

JPEGs of 500x375 are made, random resized crops of 224 pixels asked for: by :class:`jresnet.data.stream.Stream`; by torch's
``DataLoader`` over torchvision's ``ImageFolder`` with its v2 transforms (the crop, the flip, and the normalisation that
jresnet leaves to the device); by OpenCV's decoder alone, whole images and nothing else. All three in processes of their
own, as many workers each, in turn, as often as ``--rounds`` says. ``--step`` then trains ResNet-18 on real and on one
constant batch in turn: where both take the same, the device does not wait for images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jresnet.commands.flags import Parser

SIZE, VIEW, CLASSES = (500, 375), 224, 4


def main() -> None:
    """The command."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=512, help="JPEGs to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode, of each contestant")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true", help="time training with real and with constant batches, too")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(CONTESTANTS[args.one](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = make(Path(folder), args.images)
        names = ["decoder", "jresnet", "torchvision"] + (["step"] if args.step else [])
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(args.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                rows[name].append(measured(name, folder, args))
                print(number, name, rows[name][-1], flush=True)
    report(args, rows, kilobytes)


def make(root: Path, count: int) -> float:
    """Smooth images with noise in classes, as files; returns their mean size in kB."""
    draws, total = np.random.default_rng(0), 0
    for number in range(count):
        path = root / f"class{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(draws.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), int) + draws.integers(
            -14, 15, (*SIZE[::-1], 3)
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total / count / 1000


def measured(name: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    given = [f"--{key}={getattr(args, key)}" for key in ("workers", "batch", "seconds")]
    line = [sys.executable, __file__, "--one", name, "--data", folder, *given]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def pace(args: argparse.Namespace, batch: Callable[[], object]) -> dict[str, Any]:
    """Images a second over the seconds that are asked for, from when every worker has given some batches."""
    for _ in range(2 * max(args.workers, 1) + 2):
        batch()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        batch()
        count += 1
    return {"images_per_second": count * args.batch / (time.perf_counter() - began)}


def jresnet(args: argparse.Namespace) -> dict[str, Any]:
    """The stream of training views."""
    from jresnet.data import folder
    from jresnet.data.stream import Files, Stream
    from jresnet.weights.preprocessing import Preprocessing

    files = Files(folder.find(args.data).train.sources, Preprocessing(256, VIEW))
    stream = Stream(files, batch_size=args.batch, epochs=10**6, seed=0, size=VIEW, min_area=0.08, workers=args.workers)
    numbers = iter(range(10**9))
    found = pace(args, lambda: stream.batch(next(numbers)))
    stream.close()
    return found


def torchvision(args: argparse.Namespace) -> dict[str, Any]:
    """torch's DataLoader with torchvision's transforms."""
    from benchmark import torch_loader

    return pace(args, torch_loader.batches(args.data, VIEW, args.batch, args.workers))


def decoder(args: argparse.Namespace) -> dict[str, Any]:
    """Whole images decoded and forgotten, by as many processes."""
    with multiprocessing.get_context("spawn").Pool(args.workers, _one_thread) as pool:
        contents = [path.read_bytes() for path in sorted(args.data.rglob("*.jpg"))]
        pool.map(_decode, [contents] * args.workers)
        began, counts = time.perf_counter(), 0
        while time.perf_counter() - began < args.seconds:
            counts += sum(pool.map(_decode, [contents] * args.workers, chunksize=1))
        return {"images_per_second": counts / (time.perf_counter() - began)}


def _one_thread() -> None:
    from jresnet.data import crops

    crops.one_thread()


def _decode(contents: list[bytes]) -> int:
    import cv2

    for content in contents:
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return len(contents)


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of ResNet-18, with real batches and with one constant batch, in turn."""
    import jax

    from jresnet.data import folder
    from jresnet.training import devices, feed, imagenet, program

    config, _ = imagenet.choose("classic", arch="resnet18", batch_size=args.batch, epochs=10**4)
    listing = folder.find(args.data)
    train, held, _ = folder.split(listing)
    listing = folder.Listing(listing.name, listing.classes, train, held)
    made = program.Program(config, imagenet.dataset(listing, config), devices.find(1), workers=args.workers)
    state, source = made.state(0), made.source(0)
    assert isinstance(source, feed.Feed)
    constant = source.again(0)
    order, key = feed.every_image(args.batch, 10**6), made.devices.replicate(jax.random.key(0))
    seconds: dict[str, list[float]] = {"real": [], "constant": []}
    waited: list[float] = []

    class Timed(feed.Feed):
        """The stream's batches, with the time that each took to come."""

        def batch(self, step: int) -> Any:
            began = time.perf_counter()
            images = super().batch(step)
            waited.append(time.perf_counter() - began)
            return images

    timed = Timed(source.stream, source.labels, source.devices, source.batch_size)
    number, ends = 0, time.monotonic() + 2 * args.seconds
    made.loop.compile(state, constant, order, key)
    while time.monotonic() < ends or len(seconds["real"]) < 4:
        # The same numbers for both, so that the stream is asked for one batch after the other: another would begin it anew.
        for kind, split in (("real", timed), ("constant", constant)):
            began = time.perf_counter()
            state, _ = made.loop(state, split, order, number, number + 2, key)
            seconds[kind].append((time.perf_counter() - began) / 2)
        number += 2
    source.close()
    # The first two are left out: the workers start.
    found = {f"{kind}_seconds": statistics.median(times[1:]) for kind, times in seconds.items()}
    return found | {"waited_seconds": statistics.median(waited[2:])}


CONTESTANTS = {"jresnet": jresnet, "torchvision": torchvision, "decoder": decoder, "step": step}


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], kilobytes: float) -> None:
    """Prints the medians and their relations, and writes the file."""
    from importlib.metadata import version

    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    rates = {name: found["images_per_second"] for name, found in medians.items() if name != "step"}
    ratios = {
        f"of_{peer}": statistics.median(
            ours["images_per_second"] / theirs["images_per_second"]
            for ours, theirs in zip(rows["jresnet"], rows[peer], strict=True)
        )
        for peer in ("torchvision", "decoder")
    }
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.0f} images/s, {rate / args.workers:7.0f} a worker")
    print(
        f"jresnet has {ratios['of_torchvision']:.2f} of torchvision's and {ratios['of_decoder']:.2f} of the decoder's"
    )
    found = {
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in
           ("jax", "grain", "numpy", "pillow", "opencv-python-headless", "torch", "torchvision")},
        "images": {"count": args.images, "width": SIZE[0], "height": SIZE[1], "mean_kilobytes": kilobytes, "view": VIEW},
        "workers": args.workers, "batch": args.batch, "n": args.rounds, "seconds": args.seconds,
        "medians": medians, "ratios": ratios, "rows": rows, "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
