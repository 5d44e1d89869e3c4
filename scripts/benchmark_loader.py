"""Compare the speed of jresnet's image loader with torchvision's, and with the decoder alone.

``python scripts/benchmark_loader.py --json results/loader/NAME.json``

The script creates JPEGs of 500x375 pixels and measures three ways to read them. :class:`jresnet.data.stream.Stream` and
torch's ``DataLoader`` over torchvision's ``ImageFolder`` produce random resized crops of 224 pixels. torchvision's v2
transforms include the normalisation, which jresnet runs on the device. OpenCV's decoder only decodes whole images. Each
measurement runs in its own process with the same number of workers, and the three alternate for ``--rounds`` rounds.
``--step`` also trains ResNet-18, alternately on real batches and on one constant batch: if both take the same time, the
device does not wait for images.
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
    """Runs the command."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=512, help="number of JPEGs to create")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes per loader")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true", help="also time training on real and on constant batches")
    parser.add_argument("--json", type=Path, help="file for the results")
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
    """Writes smooth images with noise as JPEGs in class folders; returns their mean size in kB."""
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
    """One measurement in a new process."""
    given = [f"--{key}={getattr(args, key)}" for key in ("workers", "batch", "seconds")]
    line = [sys.executable, __file__, "--one", name, "--data", folder, *given]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def pace(args: argparse.Namespace, batch: Callable[[], object]) -> dict[str, Any]:
    """Images per second over ``args.seconds``, after a warm-up in which every worker delivers some batches."""
    for _ in range(2 * max(args.workers, 1) + 2):
        batch()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        batch()
        count += 1
    return {"images_per_second": count * args.batch / (time.perf_counter() - began)}


def jresnet(args: argparse.Namespace) -> dict[str, Any]:
    """jresnet's stream of augmented images."""
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
    """Decodes whole images in the same number of processes, and discards them."""
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
    """Seconds per step of ResNet-18, alternately on real batches and on one constant batch."""
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
        """The stream's batches; records the time spent waiting for each."""

        def batch(self, step: int) -> Any:
            began = time.perf_counter()
            images = super().batch(step)
            waited.append(time.perf_counter() - began)
            return images

    timed = Timed(source.stream, source.labels, source.devices, source.batch_size)
    number, ends = 0, time.monotonic() + 2 * args.seconds
    made.loop.compile(state, constant, order, key)
    while time.monotonic() < ends or len(seconds["real"]) < 4:
        # Both use the same step numbers, so that the stream delivers consecutive batches; a gap would restart it.
        for kind, split in (("real", timed), ("constant", constant)):
            began = time.perf_counter()
            state, _ = made.loop(state, split, order, number, number + 2, key)
            seconds[kind].append((time.perf_counter() - began) / 2)
        number += 2
    source.close()
    # The first call, of two steps, is left out, because the workers start during it.
    found = {f"{kind}_seconds": statistics.median(times[1:]) for kind, times in seconds.items()}
    return found | {"waited_seconds": statistics.median(waited[2:])}


CONTESTANTS = {"jresnet": jresnet, "torchvision": torchvision, "decoder": decoder, "step": step}


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], kilobytes: float) -> None:
    """Prints the medians and their ratios, and writes the file."""
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
        print(f"{name:12} {rate:8.0f} images/s, {rate / args.workers:7.0f} per worker")
    print(
        f"jresnet: {ratios['of_torchvision']:.2f} times torchvision's rate, {ratios['of_decoder']:.2f} times the decoder's"
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
