"""``jresnet train --depth 34`` trains a ResNet on CIFAR-10, CIFAR-100 or digits."""

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

# Architectures by --depth: torchvision's family with the CIFAR stem, and the paper's CIFAR family.
DEPTHS = {depth: f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    depth: f"resnet{depth}_cifar" for depth in (8, 20, 32, 44, 56, 110, 1202)
}

MAX_RUNS = 10_000


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options. Omitted options are None: the recipe's value, or that of the resumed run."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [OPTION ...]",  # the full list would fill a screen
        description="Train a ResNet on CIFAR-10, CIFAR-100 or digits.",
        epilog="Without --data-dir and without a prepared data set, CIFAR-10 or CIFAR-100 (163 MiB) is downloaded.",
    )
    groups = {
        name: parser.add_argument_group(name, description)
        for name, description in {
            "network": None,
            "recipe": "options that are not given are those of the recipe",
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
        help="number of layers: 18 or 34 (basic blocks), 50, 101 or 152 (Bottleneck blocks), all with 64 to 512 channels "
        "and a 3x3 stem; or the paper's CIFAR family with 16 to 64 channels: 8, 20, 32, 44, 56, 110, 1202 (basic blocks) "
        f"(default: {standard})",
    )  # fmt: skip
    add_flag(depth, RunConfig, "arch")
    add_flag(groups["recipe"], RunConfig, "recipe")
    add_flags(groups, RunConfig)
    groups["recipe"].add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="train with N seeds, from --seed on, into OUT/seed-*, and report means and standard deviations",
    )
    groups["data"].add_argument(
        "--data-dir", type=folder, metavar="DIR",
        help="folder with a TFDS store, or with CIFAR's archive or extracted folder, python or binary version; also the "
        "destination of the download (default: TFDS_DATA_DIR, else ~/tensorflow_datasets, else ./data)",
    )  # fmt: skip
    groups["results"].add_argument(
        "--out", type=folder, metavar="DIR", help="folder for the results (default: runs/ARCH-DATASET-DATE-TIME)"
    )
    groups["results"].add_argument(
        "--resume", action="store_true",
        help="continue the run in --out from its last intact checkpoint, or start it if there is none; options that are not "
        "given are those of the run",
    )  # fmt: skip
    add_flags(groups, Options)
    add_process_flags(groups["devices"])
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet train") -> int:
    """Runs the command; returns its exit code: 0, 1 on an error or NaN, 2 for invalid options, 128 + N after signal N."""
    options = parser(prog)
    args = options.parse_args(argv)
    if found := mistakes(args):
        options.error("; ".join(found))
    with naming_flags(options):
        return among_processes(lambda: _train(args))


def among_processes(run: Callable[[], int]) -> int:
    """Calls ``run`` and returns its exit code; 1 if another process was lost, which JAX reports as a RuntimeError."""
    try:
        return run()
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        return failed(f"the connection between the processes was lost: start all of them again with --resume\n{error}")


def _train(args: argparse.Namespace) -> int:
    session = Options(**given_for(args, Options))
    session.check()
    start(args, session)
    given = given_for(args, RunConfig)
    if args.depth is not None:
        given["arch"] = DEPTHS[args.depth]
    before = read_config(args.out) if args.resume else None
    begin = None
    if "weights" in given and not before:  # the weights determine the architecture
        default_config(**given)  # reports other errors before weights are downloaded
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
    data = program.load_data(config, args.data_dir)  # before StopRequest, since a download may take an hour
    try:
        with StopRequest() as stop:
            if runs:
                fit_seeds(config, data, out, runs, args.resume, stop, where, session, begin)
            else:
                made = program.Program(config, data, where, begin)
                Trainer(config, data, out, stop, made, session).fit(args.resume)
    except Interrupted as stopped:
        if devices.is_first():
            Console().say(f"         to continue, run the same command with --out {shlex.quote(str(out))} --resume")
        return 128 + stopped.args[0]
    return 0


def start(args: argparse.Namespace, session: Options) -> None:
    """Starts JAX with the options of a training command, and connects to the other processes of the run.

    Raises:
        InputError: there is no device, or the processes cannot be connected.
    """
    if session.deterministic:  # XLA reads this once, when its first device is used
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    cache.keep_compiled()
    if args.coordinator is not None or args.distributed:
        devices.connect(args.coordinator, args.num_processes, args.process_id)
    check_devices()


def mistakes(args: argparse.Namespace) -> list[str]:
    """Contradictions among the options."""
    found = []
    if args.resume and args.out is None:
        found.append("--resume needs --out, the folder of the run to continue")
    if args.depth is not None and args.depth not in DEPTHS:
        found.append(f"unknown --depth {args.depth}: there are {', '.join(map(str, sorted(DEPTHS)))}")
    if args.runs is not None and not 1 <= args.runs <= MAX_RUNS:
        found.append(f"--runs must be from 1 to {MAX_RUNS}, got {args.runs}")
    return found + process_mistakes(args) + wandb_mistakes(args.wandb)
