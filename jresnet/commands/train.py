"""``jresnet train --depth 34``: train a ResNet on CIFAR-10, CIFAR-100 or digits."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jresnet import cache
from jresnet.commands import check_devices, failed
from jresnet.commands.flags import (
    Parser,
    add_flag,
    add_flags,
    add_process_flags,
    folder,
    given_for,
    naming_flags,
    process_mistakes,
    wandb_mistakes,
)
from jresnet.training import devices, initial, outputs, program, recipes
from jresnet.training.config import RunConfig, default_config, read_config, read_runs
from jresnet.training.console import Console
from jresnet.training.seeds import fit_seeds
from jresnet.training.stop import Interrupted, StopRequest
from jresnet.training.trainer import Options, Trainer

# --depth to architecture: torchvision's family with the CIFAR stem, and the paper's own for CIFAR.
DEPTHS = {depth: f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    depth: f"resnet{depth}_cifar" for depth in (8, 20, 32, 44, 56, 110, 1202)
}

MAX_RUNS = 10_000  # more than anybody has


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options. What is not given is None: the recipe's value, or the resumed run's."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [OPTION ...]",  # all of them would fill a screen before the first line that says something
        description="Train a ResNet on CIFAR-10, CIFAR-100 or digits.",
        epilog="With neither --data-dir nor a prepared dataset, CIFAR-10 or CIFAR-100 (163 MiB) is downloaded.",
    )
    groups = {
        name: parser.add_argument_group(name, description)
        for name, description in {
            "network": None,
            "recipe": "what is not given is the recipe's own",
            "data": None,
            "results": None,
            "when something is wrong": None,
            "devices": None,
        }.items()
    }
    depth = groups["network"].add_mutually_exclusive_group()
    (standard,) = (depth for depth, arch in DEPTHS.items() if arch == recipes.ARCH)
    depth.add_argument(
        "--depth", type=int, metavar="N",
        help="layers: 18 or 34 (basic blocks), 50, 101 or 152 (Bottleneck blocks), all with 64 to 512 channels and a 3x3 "
        "stem; or the paper's CIFAR family with 16 to 64 channels: 8, 20, 32, 44, 56, 110, 1202 (basic blocks) "
        f"(default: {standard})",
    )  # fmt: skip
    add_flag(depth, RunConfig, "arch")
    add_flag(groups["recipe"], RunConfig, "recipe")
    add_flags(groups, RunConfig)
    groups["recipe"].add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="runs of N seeds, from --seed on, into OUT/seed-*, with mean and deviation",
    )
    groups["data"].add_argument(
        "--data-dir", type=folder, metavar="DIR",
        help="folder with a TFDS store, or CIFAR's archive or extracted folder, python or binary; the download goes "
        "there (default: TFDS_DATA_DIR, else ~/tensorflow_datasets, else ./data)",
    )  # fmt: skip
    groups["results"].add_argument(
        "--out", type=folder, metavar="DIR", help="folder for the results (default: runs/ARCH-DATASET-DATE-TIME)"
    )
    groups["results"].add_argument(
        "--resume", action="store_true",
        help="go on with the run in --out from its last whole checkpoint, or begin it; options not given are the run's",
    )  # fmt: skip
    add_flags(groups, Options)
    add_process_flags(groups["devices"])
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet train") -> int:
    """Runs the command; returns its exit code: 0, 1 for what cannot be used or NaN, 2 for bad options, 128 + signal."""
    options = parser(prog)
    args = options.parse_args(argv)
    if found := mistakes(args):
        options.error("; ".join(found))
    with naming_flags(options):
        return among_processes(lambda: _train(args))


def among_processes(run: Callable[[], int]) -> int:
    """What ``run`` returns; 1 where this process of several lost another one, which JAX tells by a RuntimeError."""
    try:
        return run()
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        return failed(f"the processes lost each other: start all again with --resume\n{error}")


def _train(args: argparse.Namespace) -> int:
    session = Options(**given_for(args, Options))
    session.check()
    start(args, session)
    given = given_for(args, RunConfig)
    if args.depth is not None:
        given["arch"] = DEPTHS[args.depth]
    before = read_config(args.out) if args.resume else None
    begin = None
    if "weights" in given and not before:  # they say which network it is
        default_config(**given)  # other values that are wrong are told before weights are downloaded
        begin = initial.load(given["weights"], given.get("arch"))
        given |= {"arch": begin.arch, "stem": begin.config.stem}
    config = dataclasses.replace(before, **given) if before else default_config(**given)
    config.check()
    runs = args.runs or (read_runs(args.out) if before else None)
    dataclasses.replace(config, seed=config.seed + (runs or 1) - 1).check()
    out = args.out or Path("runs") / f"{config.arch}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if devices.is_first():
        outputs.check(config, out, args.resume, runs)
    where = devices.find(args.devices)
    Console(quiet=not devices.is_first()).say(f"reading  the data set {config.dataset}")
    data = program.load_data(config, args.data_dir)  # before signals are only noted: it may take an hour
    try:
        with StopRequest() as stop:
            if runs:
                fit_seeds(config, data, out, runs, args.resume, stop, where, session, begin)
            else:
                made = program.Program(config, data, where, begin)
                Trainer(config, data, out, stop, made, session).fit(args.resume)
    except Interrupted as stopped:
        if devices.is_first():
            Console().say(f"         the same command with --out {shlex.quote(str(out))} --resume goes on")
        return 128 + stopped.args[0]
    return 0


def start(args: argparse.Namespace, session: Options) -> None:
    """Starts JAX as the options of a training command say, and joins the other processes of the run.

    Raises:
        InputError: there is no device, or the processes do not come together.
    """
    if session.deterministic:  # XLA reads it once, when its first device is asked for
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    cache.keep_compiled()
    if args.coordinator is not None or args.distributed:
        devices.connect(args.coordinator, args.num_processes, args.process_id)
    check_devices()


def mistakes(args: argparse.Namespace) -> list[str]:
    """What does not go together in the options."""
    found = []
    if args.resume and args.out is None:
        found.append("--resume needs --out, the folder of the run to go on with")
    if args.depth is not None and args.depth not in DEPTHS:
        found.append(f"unknown --depth {args.depth}: there are {', '.join(map(str, sorted(DEPTHS)))}")
    if args.runs is not None and not 1 <= args.runs <= MAX_RUNS:
        found.append(f"--runs must be from 1 to {MAX_RUNS}, got {args.runs}")
    return found + process_mistakes(args) + wandb_mistakes(args.wandb)
