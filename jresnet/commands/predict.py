"""``jresnet predict --weights W photo.jpg`` classifies images and prints or draws the most probable classes."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet import cache, evaluation
from jresnet.commands import check_devices
from jresnet.commands.evaluate import positive
from jresnet.commands.flags import Parser, check_output, naming_flags
from jresnet.data import images
from jresnet.errors import DataError, InputError
from jresnet.files import printable
from jresnet.kernels.compiler import compiler_options
from jresnet.models.resnet import ResNet
from jresnet.reports import gallery
from jresnet.weights.preprocessing import Preprocessing, normalise

STDIN = "-"
MAX_STDIN = 2**28  # bytes
SHOWN = 24  # largest number of images in a gallery
PIXELS = 300  # least height and width of an image in a gallery


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for an image."""

    file: str
    source: Path | bytes
    classes: list[tuple[int, str, float]]  # index, name and probability, the most probable first


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        prog=prog,
        description="Classify images and print the most probable classes, with the names that the weights give.",
        epilog="Photos are read as viewers display them: upright, with transparency over white. Exit code: 0 on success; 1 "
        "on an error, also for a single bad image unless --skip-bad; 2 for invalid options.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|-",
        help="files, folders (searched recursively), or - for an image on stdin",
    )
    parser.add_argument(
        "--weights", required=True, metavar="W",
        help="as for evaluate: a file, a folder of jresnet push, resnet50, resnet50:IMAGENET1K_V1, or hf:ORG/REPO",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes per image (default: 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    form.add_argument("--csv", action="store_true", help="print lines file,rank,class,index,probability")
    parser.add_argument("--gallery", type=Path, metavar="PNG", help=f"draw the first {SHOWN} images with their classes")
    parser.add_argument("--force", action="store_true", help="replace the file of --gallery")
    parser.add_argument(
        "--cam", action="store_true", help="with --gallery: add heat maps of the most probable class (Grad-CAM)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per batch (default: 32)")
    parser.add_argument("--skip-bad", action="store_true", help="exit with code 0 even if bad images were skipped")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet predict") -> int:
    """Runs the command; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    if args.cam and not args.gallery:
        options.error("--cam needs --gallery, into which it draws heat maps")
    if args.gallery and args.gallery.suffix.lower() != ".png":
        options.error(f"--gallery must be a file name that ends in .png, got {str(args.gallery)!r}")
    with naming_flags(options):
        if args.gallery:
            check_output(args.gallery, args.force, "--gallery")
        return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    cache.keep_compiled()
    check_devices()
    named = sources(args.images)  # before weights are downloaded
    resolved = evaluation.resolve(args.weights)
    preprocessing, origin = evaluation.choose_preprocessing(resolved)
    if resolved.preprocessing is not None and preprocessing.resize is None:  # photos may have any size
        preprocessing = replace(preprocessing, resize=preprocessing.crop)
    model, top = resolved.model, min(args.top, resolved.model.config.num_classes)
    if not top:
        raise InputError(f"the weights {args.weights} have no head: use weights with classes")
    names = resolved.categories or tuple(f"class {i}" for i in range(model.config.num_classes))

    def say(text: str) -> None:
        if not args.json and not args.csv:
            print(text, flush=True)

    if resolved.preprocessing is None:
        print(f"note: images {preprocessing}; {origin}", file=sys.stderr)
    writer = csv.writer(sys.stdout, lineterminator="\n") if args.csv else None
    if writer:
        writer.writerow(["file", "rank", "class", "index", "probability"])
    done: list[Prediction] = []
    bad: list[tuple[str, str]] = []
    kept: list[Prediction] = []
    for found in predict(model, preprocessing, named, names, top, args.batch_size, bad):
        shown = ", ".join(f"{printable(name)} {100 * share:.1f} %" for _, name, share in found.classes)
        say(f"{printable(found.file)}: {shown}")
        if writer:
            ranked = enumerate(found.classes, 1)
            writer.writerows([found.file, rank, name, index, f"{share:.6g}"] for rank, (index, name, share) in ranked)
        if args.json:
            done.append(found)
        if args.gallery and len(kept) < SHOWN:
            kept.append(found)
    if args.json:
        print(json.dumps(_report(args, preprocessing, origin, done, bad)))
    if args.gallery and kept:
        draw(
            kept,
            model,
            preprocessing,
            args.gallery,
            f"{resolved.arch or 'ResNet'}, weights {Path(args.weights).name}",
            args.cam,
        )
        say(f"gallery  {args.gallery}" + (f", the first {len(kept)} images" if len(kept) == SHOWN < len(named) else ""))
    for file, reason in bad:
        print(f"bad image {printable(file)}: {printable(reason)}", file=sys.stderr)
    if bad:
        count = f"{len(bad):,} of {len(named):,} images are bad and were skipped"
        print(count if args.skip_bad else f"error: {count}; use --skip-bad to accept this", file=sys.stderr)
    return 1 if bad and not args.skip_bad else 0


def _report(
    args: argparse.Namespace,
    preprocessing: Preprocessing,
    origin: str,
    done: list[Prediction],
    bad: list[tuple[str, str]],
) -> dict[str, Any]:
    return {
        "weights": args.weights,
        "preprocessing": json.loads(preprocessing.to_json()),
        "preprocessing_origin": origin,
        "images": [
            {
                "file": found.file,
                "classes": [
                    {"class": name, "index": index, "probability": share} for index, name, share in found.classes
                ],
            }
            for found in done
        ],
        "bad": [{"file": file, "reason": reason} for file, reason in bad],
    }


def sources(named: Sequence[str]) -> list[tuple[str, Path | bytes]]:
    """The images of a command line with the names to print: files, images in folders (recursively), and stdin.

    Raises:
        DataError: a file does not exist, or a folder contains no image.
    """
    found: list[tuple[str, Path | bytes]] = []
    for name in named:
        path = Path(name).expanduser()
        if name == STDIN:
            content = sys.stdin.buffer.read(MAX_STDIN + 1)
            if len(content) > MAX_STDIN:
                raise DataError(f"the image on stdin must have at most {MAX_STDIN:,} bytes")
            found.append(("stdin", content))
        elif path.is_dir():
            seen = [p for p in path.rglob("*") if not any(map(images.is_aside, p.relative_to(path).parts))]
            inside = sorted(p for p in seen if p.suffix.lower() in images.EXTENSIONS)
            if not inside:
                raise DataError(f"{path} contains no image; images end in {', '.join(images.EXTENSIONS)}")
            found += [(str(p), p) for p in inside]
            if others := sum(p.suffix.lower() not in images.EXTENSIONS and p.is_file() for p in seen):
                print(
                    f"note: {others:,} other files in {printable(str(path))} are ignored; images end in "
                    f"{', '.join(images.EXTENSIONS)}",
                    file=sys.stderr,
                )
        elif not path.exists():
            raise DataError(f"there is no image {path}: give files, folders, or - for an image on stdin")
        elif not path.is_file():
            raise DataError(f"{path} is a device or a pipe: give files, folders, or - for an image on stdin")
        else:
            found.append((name, path))
    return found


def predict(
    model: ResNet,
    preprocessing: Preprocessing,
    named: Sequence[tuple[str, Path | bytes]],
    names: Sequence[str],
    top: int,
    batch_size: int,
    bad: list[tuple[str, str]],
) -> Iterator[Prediction]:
    """Yields the predictions of all images in order; images that cannot be decoded are added to ``bad``."""
    graph, state = nnx.split(model)

    def classify(state: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = normalise(pixels.astype(jnp.float32), preprocessing.mean, preprocessing.std)
        shares = jax.nn.softmax(nnx.merge(graph, state)(inputs, train=False).astype(jnp.float32))
        return jax.lax.top_k(shares, top)

    compute = jax.jit(classify, compiler_options=compiler_options())
    batch_size = min(batch_size, len(named))
    with jax.default_matmul_precision("highest"):  # avoids TF32
        for batch in images.batches([source for _, source in named], preprocessing, batch_size, images.photo):
            bad += [(named[position][0], reason) for position, reason in batch.bad]
            shares, indices = map(np.asarray, compute(state, batch.images))
            for row, position in enumerate(batch.positions):
                if not np.isfinite(shares[row]).all():
                    raise InputError(f"the probabilities of {named[position][0]} are NaN: the weights are unusable")
                classes = [(int(i), names[i], float(p)) for i, p in zip(indices[row], shares[row], strict=True)]
                yield Prediction(named[position][0], named[position][1], classes)


def titles(files: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share: ``cat/1.png``, ``dog/1.png``."""
    try:
        common = os.path.commonpath([os.path.dirname(file) for file in files])
    except ValueError:  # absolute and relative paths
        return list(files)
    return [os.path.relpath(file, common) if common else file for file in files]


def draw(
    kept: Sequence[Prediction], model: ResNet, preprocessing: Preprocessing, path: Path, title: str, cam: bool
) -> None:
    """Draws the gallery with the part of each image that the network sees, in higher resolution if that is low."""
    # The same part of the image with more pixels.
    factor = -(-PIXELS // preprocessing.crop)
    resize = preprocessing.resize * factor if preprocessing.resize else None
    larger = replace(preprocessing, crop=min(preprocessing.crop * factor, 4096), resize=resize)
    shown = []
    for found, label in zip(kept, titles([found.file for found in kept]), strict=True):
        picture = images.photo(found.source)
        pixels = images.preprocess(picture, larger)
        heat = None
        if cam:
            from jresnet.explain import grad_cam

            inputs = jnp.asarray(images.preprocess(picture, preprocessing)[None], jnp.float32)
            maps = grad_cam(model, normalise(inputs, preprocessing.mean, preprocessing.std), found.classes[0][0])
            heat = np.asarray(maps[0])
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        shown.append(gallery.Shown(label, pixels, [(name, p) for _, name, p in found.classes], heat))
    note = "right: heat map of the most probable class (Grad-CAM)" if cam else ""
    gallery.draw(shown, path, title, note)
