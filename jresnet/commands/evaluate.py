"""``jresnet evaluate --weights resnet50 --data imagenet/val`` computes accuracy and loss on labelled images."""

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
        description="Evaluate weights on every image once: top-1 and top-5 accuracy, loss, and images per second.",
        epilog="Exit code: 0 on success; 1 on an error, also for a single bad image unless --skip-bad; 2 for invalid "
        "options.",
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE_OR_NAME",
        help="a native or PyTorch file, hf:ORG/REPO, or published weights: resnet50 (torchvision's default), "
        "resnet50:IMAGENET1K_V1",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, metavar=f"{'|'.join(DATASETS)}|FOLDER",
        help="test images of a data set, or a folder of images FOLDER/CLASS/*.JPEG such as ImageNet's val (write ./cifar10 "
        "for a folder of that name). CLASS is a category of the weights, a WordNet id or a number; if the weights name no "
        "categories, any other names are matched to the logits in sorted order",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=folder, metavar="DIR",
        help="location of CIFAR, as for training (default: TFDS_DATA_DIR, else ~/tensorflow_datasets, else ./data)",
    )  # fmt: skip
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE",
        help="names of the class folders, one per line in the order of the logits, if the weights do not name them",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N",
        help="evaluate only N images: the first N of CIFAR-10; of a folder the first of every class, then the second of "
        "every class, and so on (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per batch (default: 32; 256 for a data set)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="compute dtype of the convolutions (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--mean", type=numbers, metavar="R,G,B",
        help="mean for normalisation, of pixels in 0 to 1; one number for grey (default: that of the weights)",
    )  # fmt: skip
    parser.add_argument(
        "--std", type=numbers, metavar="R,G,B",
        help="standard deviation for normalisation (default: that of the weights)",
    )  # fmt: skip
    parser.add_argument(
        "--as-stored", action="store_true",
        help="read images as torchvision's ImageFolder does: ignore the EXIF orientation and transparency (default: "
        "upright, with transparency over white, as finetune and predict do)",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="exit with code 0 even if bad images were skipped")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser


def positive(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """Parses one or three numbers from 0 to 1, such as ``0.5,0.5,0.5``."""
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
        options.error("--data-dir is the location of CIFAR, but --data is a folder: leave out --data-dir")
    if args.as_stored and args.data in DATASETS:
        options.error("--as-stored is for image files, but --data is a data set: leave out --as-stored")
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
        print(count if args.skip_bad else f"error: {count}; use --skip-bad to accept this", file=sys.stderr)
    return 1 if report["bad"] and not args.skip_bad else 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints the results unless ``--json`` is given, and returns the object that ``--json`` prints."""

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
        f"{args.weights}: {resolved.arch or 'a network without a name'}, {config.stem} stem, {config.num_classes:,} classes",
    )
    if found:
        data = evaluation.folder(resolved, found, args.limit, names)
    else:
        data = evaluation.dataset(resolved, args.data, args.data_dir, args.limit, names)
    say("data", data.description)
    for note in data.notes:
        say("note", note)
    stored = "; read as stored" if args.as_stored else ""
    say("images", f"{preprocessing}; {origin}{stored}")
    batch_size = min(args.batch_size or (256 if name else 32), len(data.labels))
    device = jax.devices()[0]
    device_name = f"{device.device_kind} ({device.platform})"
    say("device", f"{device_name}, {args.dtype}, batch {batch_size}")

    say("compile", "compiling the network (some seconds to a minute; less if it is cached)")

    def progress(done: int) -> None:
        if not sys.stderr.isatty():  # on a terminal there is a bar
            console.minute(lambda: f"images   {done:,} of {len(data.labels):,} evaluated")

    reader = images.read if args.as_stored else images.photo
    scores = evaluation.score(resolved.model, preprocessing, data, batch_size, progress, reader)
    n, pace = scores.images, scores.images / scores.seconds
    say("top-1", f"{100 * scores.top1 / n:.2f} % ({scores.top1:,} of {n:,})")
    say(f"top-{scores.k}", f"{100 * scores.topk / n:.2f} % ({scores.topk:,} of {n:,})")
    say("loss", f"{scores.loss:.4f} (mean cross-entropy, nats)")
    say("speed", f"{pace:.1f} images/s with decoding, without {scores.compile_seconds:.1f} s of compilation")
    return {
        "weights": args.weights,
        "arch": resolved.arch,
        "data": data.description,
        "notes": data.notes,
        "preprocessing": dataclasses.asdict(preprocessing),
        "preprocessing_origin": origin,
        "as_stored": args.as_stored,
        "images": n,
        "top1": scores.top1 / n,
        "top1_correct": scores.top1,
        "top5": scores.topk / n,  # with fewer than 5 classes, top-k of all classes
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
