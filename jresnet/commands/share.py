"""``jresnet push run/last.safetensors hf:ME/flowers`` and ``jresnet pull hf:ME/flowers flowers.safetensors``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jresnet import sharing
from jresnet.commands import run
from jresnet.commands.flags import Parser, naming_flags


def push_parser(prog: str) -> argparse.ArgumentParser:
    """The options of ``push``."""
    parser = Parser(
        prog=prog,
        description="Write weights, their configuration and a model card to a repository on the Hugging Face Hub, or to a "
        "folder of the same layout, from which jresnet and timm can load them.",
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a file such as run/last.safetensors, or any weights that evaluate accepts"
    )
    parser.add_argument("target", metavar="hf:ORG/REPO|FOLDER", help="a repository, created if missing, or a folder")
    parser.add_argument("--title", help="title of the model card (default: the architecture)")
    parser.add_argument("--license", metavar="ID", help="licence identifier of the Hub, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--force", action="store_true", help="overwrite a model in the folder")
    return parser


def push(argv: Sequence[str] | None = None, prog: str = "jresnet push") -> int:
    """Runs ``push``; returns its exit code."""
    options = push_parser(prog)
    args = options.parse_args(argv)
    with naming_flags(options):
        where = sharing.push(
            args.weights, args.target, title=args.title, license=args.license, private=args.private, force=args.force
        )
    print(f"pushed   {where}")
    return 0


def pull_parser(prog: str) -> argparse.ArgumentParser:
    """The options of ``pull``."""
    parser = Parser(
        prog=prog,
        description="Fetch weights from the Hugging Face Hub, or a folder of jresnet push, into a native file.",
    )
    parser.add_argument("source", metavar="hf:ORG/REPO[@REVISION]|FOLDER", help="location of the weights")
    parser.add_argument("out", metavar="FILE", type=Path, help="file to write, *.safetensors")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    return parser


def pull(argv: Sequence[str] | None = None, prog: str = "jresnet pull") -> int:
    """Runs ``pull``; returns its exit code."""
    options = pull_parser(prog)
    args = options.parse_args(argv)
    with naming_flags(options):
        found = sharing.pull(args.source, args.out, force=args.force)
    classes = f"{found.config.num_classes:,} classes{', named' if found.categories else ''}"
    print(f"pulled   {args.out}: {found.arch or 'a network without a name'}, {classes}")
    print(f"images   {found.preprocessing or 'the weights do not specify their preprocessing'}")
    return 0


def main(arguments: Sequence[str], prog: str = "python -m jresnet.hub") -> int:
    """Runs ``push`` or ``pull``, the first argument; returns its exit code."""
    if arguments[:1] not in (["push"], ["pull"]):
        print(f"usage: {prog} {{push,pull}} ...; see push --help and pull --help", file=sys.stderr)
        return 0 if list(arguments) in (["-h"], ["--help"]) else 2
    return run(arguments[0], arguments[1:], f"{prog} {arguments[0]}")
