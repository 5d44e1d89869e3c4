"""``jresnet train-imagenet --data imagenet --recipe a3 --out run`` trains from scratch on a folder of any size."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence

from jresnet.commands.flags import (
    Parser,
    add_flags,
    add_process_flags,
    given_for,
    naming_flags,
    process_mistakes,
    wandb_mistakes,
)
from jresnet.commands.flags import folder as a_folder
from jresnet.commands.train import among_processes, start
from jresnet.data import folder
from jresnet.errors import InputError
from jresnet.training import devices, imagenet, initial, outputs
from jresnet.training.config import read_config
from jresnet.training.console import Console
from jresnet.training.imagenet import RECIPES, ImageNetConfig
from jresnet.training.program import Program
from jresnet.training.recipes import value_in_words
from jresnet.training.stop import Interrupted, StopRequest
from jresnet.training.trainer import Options, Trainer

MAX_WORKERS = 256


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options. Omitted options are None: the recipe's value, or that of the resumed run."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --data DATA --out RUN [OPTION ...]",
        description="Train a ResNet from scratch on ImageNet or any images sorted by class, which are streamed from disk.",
        epilog="docs/howto/imagenet.md has command lines for one and several hosts, and estimates the cost of a run.",
    )
    names = ("network", "recipe", "data", "results", "when something is wrong", "devices")
    groups = {name: parser.add_argument_group(name) for name in names}
    groups["data"].add_argument(
        "--data", metavar="DATA",
        help="a folder with train/CLASS/*.jpg and val/CLASS/*.jpg; a folder of tar files with KEY.jpg and KEY.cls, and "
        "train or val in their names; or tfds:imagenet2012, a prepared TFDS store",
    )  # fmt: skip
    groups["data"].add_argument("--data-dir", type=a_folder, metavar="DIR", help="location of the TFDS stores")
    groups["data"].add_argument(
        "--workers", type=int, metavar="N",
        help="processes that decode images; 0: threads (default: 0 on a CPU, else the number of cores, at most 32)",
    )  # fmt: skip
    groups["results"].add_argument("--out", type=a_folder, metavar="RUN", help="folder for the results (required)")
    groups["results"].add_argument(
        "--resume", action="store_true",
        help="continue the run in --out from its last intact checkpoint, on any number of hosts, or start it if there is "
        "none; options that are not given are those of the run",
    )  # fmt: skip
    add_flags(groups, ImageNetConfig, defaults())
    add_flags(groups, Options)
    add_process_flags(groups["devices"])
    return parser


def defaults() -> dict[str, str]:
    """Descriptions of the defaults by recipe."""
    found = {"recipe": next(iter(RECIPES)), "arch": imagenet.ARCH}
    fields = {field.name for field in dataclasses.fields(next(iter(RECIPES.values())))}
    for name in (
        "warmup_epochs",
        *(field.name for field in dataclasses.fields(ImageNetConfig) if field.name in fields),
    ):
        words = {recipe: value_in_words(row, name) for recipe, row in RECIPES.items()}
        same = len(set(words.values())) == 1
        found[name] = next(iter(words.values())) if same else ", ".join(map(": ".join, words.items()))
    return found


def main(argv: Sequence[str] | None = None, prog: str = "jresnet train-imagenet") -> int:
    """Runs the command; returns its exit code: 0, 1 on an error or NaN, 2 for invalid options, 128 + N after signal N."""
    options = parser(prog)
    args = options.parse_args(argv)
    if found := mistakes(args):
        options.error("; ".join(found))
    with naming_flags(options, images="data"):
        return among_processes(lambda: _train(args))


def mistakes(args: argparse.Namespace) -> list[str]:
    """Contradictions among the options."""
    found = []
    if args.out is None:
        found.append("--out is required: the folder for the results")
    if not args.data and not args.resume:
        found.append("--data is required: the images")
    if args.data_dir and args.data and not args.data.startswith("tfds:"):
        found.append("--data-dir is the location of TFDS stores, but --data is a folder: leave out --data-dir")
    if args.workers is not None and not 0 <= args.workers <= MAX_WORKERS:
        found.append(f"--workers must be from 0 to {MAX_WORKERS}, got {args.workers}")
    return found + process_mistakes(args) + wandb_mistakes(args.wandb)


def _train(args: argparse.Namespace) -> int:
    session = Options(**given_for(args, Options))
    session.check()
    given = given_for(args, ImageNetConfig)
    if args.data:
        given["images"] = args.data
    imagenet.choose(**{"precision": "float32"} | given)  # reports errors before JAX starts; "auto" would start it
    start(args, session)
    before = read_config(args.out, ImageNetConfig) if args.resume else None
    notes: list[str] = []
    begin = None
    if "weights" in given and not before:  # the weights determine the architecture
        begin = initial.load(given["weights"], given.get("arch"))
        given |= {"arch": begin.arch, "stem": begin.config.stem}
    if before:
        config = dataclasses.replace(before, **given)
    elif "images" in given:
        config, notes = imagenet.choose(**given)
    else:
        raise InputError(f"there is no run in {args.out} to resume: give --data to start one")
    config.check()
    if why := outputs.unusable(args.out):
        raise InputError(f"cannot use `out` {args.out}: {why}; choose another folder")
    where, console = devices.find(args.devices), Console(quiet=not devices.is_first())
    console.say(f"listing  the images of {config.images}")
    data = imagenet.dataset(folder.find(config.images, args.data_dir), config)
    config = dataclasses.replace(config, data_digest=data.digest)
    if before and data.digest == before.data_digest:  # the same images, perhaps under another path
        config = dataclasses.replace(config, images=before.images)
    if devices.is_first():
        outputs.check(config, args.out, args.resume)
    for note in notes:
        console.say(f"chosen   {note}")
    workers = args.workers
    if workers is None:
        workers = 0 if where.platform == "cpu" else min(32, os.cpu_count() or 1)
    try:
        with StopRequest() as stop:
            program = Program(config, data, where, begin, workers)
            Trainer(config, data, args.out, stop, program, session).fit(args.resume)
    except Interrupted as stopped:
        console.say(f"         to continue, run the same command with --out {shlex.quote(str(args.out))} --resume")
        return 128 + stopped.args[0]
    return 0
