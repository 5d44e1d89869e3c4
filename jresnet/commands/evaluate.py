"""``jresnet evaluate --weights resnet50 --data imagenet/val``: accuracy and loss of weights on labelled images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jresnet
from jresnet import cache, evaluation
from jresnet.commands import check_devices
from jresnet.commands.flags import Parser, folder, naming_flags
from jresnet.data import DATASETS, images
from jresnet.files import printable
from jresnet.training.console import Console
from jresnet.version import installed


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        prog=prog,
        description="Evaluate weights: top-1, top-5, loss and images per second, every image once.",
        epilog="Exit code: 0; 1 for what cannot be used, also for a single bad image unless --skip-bad; 2 for bad options.",
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE_OR_NAME",
        help="weights file, native or PyTorch's, hf:ORG/REPO, or published weights: resnet50 (torchvision's default), "
        "resnet50:IMAGENET1K_V1",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, metavar=f"{'|'.join(DATASETS)}|FOLDER",
        help="a data set's test images, or a folder of images, FOLDER/CLASS/*.JPEG (ImageNet's val; ./cifar10 for one of "
        "that name), where CLASS is a category that the weights name, a WordNet id or a number; other names stand for the "
        "logits in sorted order, where the weights name no categories",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=folder, metavar="DIR",
        help="where CIFAR lies, as for training (default: TFDS_DATA_DIR, else ~/tensorflow_datasets, else ./data)",
    )  # fmt: skip
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE",
        help="a name a line, in the order of the logits: what the folders are called, where the weights do not say it",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N",
        help="only N images: the first N of CIFAR-10; of a folder the first of every class, then the second of every "
        "class, and so on (default: all)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images (default: 32; 256 for a data set)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what convolutions compute in (float32)"
    )
    parser.add_argument(
        "--mean", type=numbers, metavar="R,G,B", help="of pixels in 0 to 1, or one number for grey (the weights' own)"
    )
    parser.add_argument("--std", type=numbers, metavar="R,G,B", help="likewise (the weights' own)")
    parser.add_argument("--skip-bad", action="store_true", help="exit with 0 although bad images were skipped")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5``, shares of the brightest value."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected R,G,B, got {text!r}") from error
    if len(found) not in (1, 3) or not all(0 <= number <= 1 for number in found):
        raise argparse.ArgumentTypeError(f"expected one or three numbers from 0 to 1, got {text!r}")
    return found


def main(argv: Sequence[str] | None = None, prog: str = "jresnet evaluate") -> int:
    """Runs the command; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    if args.data_dir and args.data not in DATASETS:
        options.error("--data-dir says where CIFAR lies, but --data names a folder")
    if args.std and 0 in args.std:
        options.error("--std must be above 0: pixels are divided by it")
    with naming_flags(options):
        report = evaluate(args)
    if args.json:
        print(json.dumps(report))
    for bad in report["bad"]:
        print(f"bad image {printable(bad['file'])}: {printable(bad['reason'])}", file=sys.stderr)
    if report["bad"]:
        count = f"{len(report['bad']):,} of {len(report['bad']) + report['images']:,} images are bad and were skipped"
        print(count if args.skip_bad else f"error: {count}; --skip-bad accepts that", file=sys.stderr)
    return 1 if report["bad"] and not args.skip_bad else 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints unless ``--json``, and returns what ``--json`` prints."""

    def say(title: str, text: str) -> None:
        console.say(f"{title:<8} {text}")

    console = Console(quiet=args.json)
    cache.keep_compiled()
    check_devices()
    name = args.data if args.data in DATASETS else None
    found = None if name else images.list_folder(args.data)  # before weights are downloaded
    names = None if args.class_names is None else evaluation.read_names(args.class_names)
    resolved = evaluation.resolve(args.weights, jnp.bfloat16 if args.dtype == "bfloat16" else None)
    preprocessing, origin = evaluation.choose_preprocessing(resolved, dataset=name, mean=args.mean, std=args.std)
    config = resolved.model.config
    say(
        "weights",
        f"{args.weights}: {resolved.arch or 'a network of no name'}, {config.stem} stem, {config.num_classes:,} classes",
    )
    if found:
        data = evaluation.folder(resolved, found, args.limit, names)
    else:
        data = evaluation.dataset(resolved, args.data, args.data_dir, args.limit, names)
    say("data", data.description)
    for note in data.notes:
        say("note", note)
    say("images", f"{preprocessing}; {origin}")
    batch_size = min(args.batch_size or (256 if name else 32), len(data.labels))
    device = jax.devices()[0]
    device_name = f"{device.device_kind} ({device.platform})"
    say("device", f"{device_name}, {args.dtype}, batch {batch_size}")

    say("compile", "compiling the network (some seconds to a minute; less where it is kept)")

    def progress(done: int) -> None:
        if not sys.stderr.isatty():  # else there is a bar
            console.minute(lambda: f"images   {done:,} of {len(data.labels):,} evaluated")

    scores = evaluation.score(resolved.model, preprocessing, data, batch_size, progress)
    n, pace = scores.images, scores.images / scores.seconds
    say("top-1", f"{100 * scores.top1 / n:.2f} % ({scores.top1:,} of {n:,})")
    say(f"top-{scores.k}", f"{100 * scores.topk / n:.2f} % ({scores.topk:,} of {n:,})")
    say("loss", f"{scores.loss:.4f} (mean cross-entropy, nats)")
    say("speed", f"{pace:.1f} images/s, decoding included; {scores.compile_seconds:.1f} s of compilation are not")
    return {
        "weights": args.weights,
        "arch": resolved.arch,
        "data": data.description,
        "notes": data.notes,
        "preprocessing": dataclasses.asdict(preprocessing),
        "preprocessing_origin": origin,
        "images": n,
        "top1": scores.top1 / n,
        "top1_correct": scores.top1,
        "top5": scores.topk / n,  # of all where there are fewer classes
        "top5_correct": scores.topk,
        "loss": scores.loss,
        "images_per_second": pace,
        "seconds": scores.seconds,
        "compile_seconds": scores.compile_seconds,
        "bad": [{"file": file, "reason": reason} for file, reason in scores.bad],
        "device": device_name,
        "dtype": args.dtype,
        "batch_size": batch_size,
        "versions": {"python": platform.python_version(), "jresnet": jresnet.__version__}
        | installed("jax", "jaxlib", "flax", "numpy", "pillow"),
        "command": shlex.join(sys.argv),
    }
