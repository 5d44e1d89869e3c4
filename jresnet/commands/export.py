"""``jresnet export resnet50 --output resnet50.onnx`` exports a model as a program that runs without jresnet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jresnet import exporting, pretrained
from jresnet.commands.flags import Parser, check_output, naming_flags

_FORMATS = {".onnx": "onnx"}  # format by suffix; "jax" for all others


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        prog=prog,
        description="Export a model as a program that contains the weights and takes any number of images of one size: "
        "StableHLO for jax.export.deserialize, or ONNX. FILE.json beside it describes inputs and outputs.",
        epilog="Exit code: 0 on success; 1 on an error; 2 for invalid options.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="weights: a file, resnet50 (torchvision's default), resnet50:IMAGENET1K_V1, hf:...",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format", choices=exporting.FORMATS, help="format of the file (default: onnx if FILE ends in .onnx, else jax)"
    )
    parser.add_argument(
        "--image-size", type=_pixels, nargs="+", metavar="N",
        help="image size in pixels, one number or height and width (default: that of the weights)",
    )  # fmt: skip
    parser.add_argument(
        "--preprocess", action="store_true",
        help="include the preprocessing, so that the program takes uint8 pixels (default: it takes normalised images)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser


def _pixels(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= exporting.LARGEST):
        raise argparse.ArgumentTypeError(f"expected 1 to {exporting.LARGEST} pixels, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None, prog: str = "jresnet export") -> int:
    """Runs the command; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    if args.image_size and len(args.image_size) > 2:
        options.error("--image-size takes one number or two, height and width")
    size = (
        None if args.image_size is None else args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)
    )
    for file in (args.output, args.output.with_name(f"{args.output.name}.json") if args.output.name else args.output):
        check_output(file, args.force)  # before weights are downloaded
    with naming_flags(options):
        said = exporting.export(
            pretrained.get_weights(args.model), args.output, args.format or _FORMATS.get(args.output.suffix, "jax"),
            image_size=size, preprocess=args.preprocess, force=args.force,
        )  # fmt: skip
    for name in ("input", "output"):
        print(f"{name:<8} {said[name]['name']} {said[name]['dtype']} [{', '.join(map(str, said[name]['shape']))}]")
    print(
        f"wrote    {args.output} ({args.output.stat().st_size / 1e6:.1f} MB, {said['format']}) and {args.output}.json"
    )
    return 0
