"""``jresnet finetune --weights resnet18:IMAGENET1K_V1 --data photos --out run`` fine-tunes weights on your own images."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jresnet import cache, data
from jresnet.commands import check_devices
from jresnet.commands.flags import Parser, add_flags, given_for, naming_flags, wandb_mistakes
from jresnet.commands.flags import folder as a_folder
from jresnet.data import folder
from jresnet.data.dataset import Dataset
from jresnet.errors import InputError
from jresnet.files import printable
from jresnet.training import devices, finetune, outputs
from jresnet.training.config import read_config
from jresnet.training.console import Console
from jresnet.training.devices import Devices
from jresnet.training.finetune import FinetuneConfig, Start
from jresnet.training.program import Program
from jresnet.training.stop import Interrupted, StopRequest
from jresnet.training.trainer import Options, Trainer

IN_MEMORY = ("cifar10", "digits")
SHOWN = 40  # largest number of classes in the table at the end
NOT_IN_PROBE = (  # options that concern other layers or the augmentation of images
    "freeze", "freeze_bn", "layer_decay", "head_stage", "zero_init_residual", "flip", "random_erasing", "mixup", "cutmix",
    "augment", "magnitude", "min_area", "bn", "remat",
)  # fmt: skip
CHOSEN = {  # descriptions of the defaults
    "epochs": "chosen from the number of images", "batch_size": "chosen from the number of images",
    "lr": "chosen from the batch size", "warmup_epochs": "a tenth of the run, at most 5", "weight_decay": "1e-4",
    "optimizer": "sgd; adamw for the head", "momentum": "0.9", "nesterov": "with sgd", "decay_norms": "no",
    "decoupled_decay": "no", "clip_norm": "0", "schedule": "cosine", "gamma": "0.1", "label_smoothing": "0.1",
    "ema": "0", "zero_init_residual": "no", "flip": "random", "random_erasing": "0", "mixup": "0", "cutmix": "0",
    "milestones": "none", "precision": "auto", "freeze": "none",
}  # fmt: skip


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options. Omitted options are None: chosen from the images, or those of the resumed run."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --weights W --data DATA --out RUN [OPTION ...]",
        description="Fine-tune pretrained weights on your own images: first the head, on embeddings that are computed once, "
        "then all layers, with lower learning rates for earlier ones. Options that are not given are chosen from the number "
        "of images and printed.",
        epilog="jresnet predict classifies images with the result, OUT/last.safetensors; jresnet export-torch converts it "
        "to a PyTorch file.",
    )
    names = ("network", "data", "recipe", "results", "when something is wrong", "devices")
    groups = {name: parser.add_argument_group(name) for name in names}
    groups["network"].add_argument(
        "--weights", metavar="W",
        help="resnet18:IMAGENET1K_V1 (torchvision's), a native or PyTorch file, hf:ORG/REPO, or none for random weights",
    )  # fmt: skip
    groups["network"].add_argument(
        "--arch", metavar="NAME", help="with --weights none: an architecture of jresnet.list_models()"
    )
    groups["network"].add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="height and width of the images in pixels (default: those that the weights were trained for)",
    )
    groups["network"].add_argument(
        "--linear-probe",
        action="store_true",
        help="train only the head, on embeddings; takes seconds once these are computed",
    )
    groups["network"].add_argument(
        "--head-stage",
        action=argparse.BooleanOptionalAction,
        help="train only the head before training all layers (default: yes)",
    )
    groups["data"].add_argument(
        "--data", metavar="DATA",
        help="a folder with CLASS/*.jpg, or with train/CLASS/*.jpg and val/CLASS/*.jpg; a table *.csv of lines path,label; "
        "cifar10; digits; or tfds:NAME, a prepared TFDS store",
    )  # fmt: skip
    groups["data"].add_argument(
        "--data-dir", type=a_folder, metavar="DIR", help="location of CIFAR-10 or of the TFDS stores"
    )
    groups["data"].add_argument(
        "--workers", type=int, metavar="N",
        help="processes that decode images from disk; 0: threads (default: 0 on a CPU, else half of the cores, at most 8)",
    )  # fmt: skip
    groups["results"].add_argument("--out", type=a_folder, metavar="RUN", help="folder for the results (required)")
    groups["results"].add_argument(
        "--resume", action="store_true",
        help="continue the run in --out, or start it if there is none; options that are not given are those of the run",
    )  # fmt: skip
    add_flags(groups, FinetuneConfig, CHOSEN)
    add_flags(groups, Options)
    groups["devices"].add_argument(
        "--devices", type=int, metavar="N", help="number of devices of this machine (default: all)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet finetune") -> int:
    """Runs the command; returns its exit code: 0, 1 on an error or NaN, 2 for invalid options, 128 + N after signal N."""
    options = parser(prog)
    args = options.parse_args(argv)
    if found := mistakes(args):
        options.error("; ".join(found))
    with naming_flags(options, images="data"):
        return _finetune(args)


def mistakes(args: argparse.Namespace) -> list[str]:
    """Contradictions among the options."""
    found = []
    if args.out is None:
        found.append("--out is required: the folder for the results")
    if not args.resume:
        found += [
            f"{flag} is required" for flag, value in (("--weights", args.weights), ("--data", args.data)) if not value
        ]
    if args.weights == "none":
        found += ["--weights none needs --arch"] if not args.arch else []
        found += ["--linear-probe needs trained --weights"] if args.linear_probe else []
    elif args.arch is not None:
        found.append("--arch is only for --weights none: other weights determine the architecture")
    if args.linear_probe and (given := [name for name in NOT_IN_PROBE if getattr(args, name) is not None]):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        found.append(f"{flags} cannot be combined with --linear-probe, which trains only the head, on fixed embeddings")
    if args.data_dir and args.data and args.data not in IN_MEMORY and not args.data.startswith("tfds:"):
        found.append("--data-dir is the location of CIFAR-10 or TFDS stores, but --data is a folder or a table")
    found += wandb_mistakes(args.wandb)
    if args.workers is not None and not 0 <= args.workers <= 256:
        found.append(f"--workers must be from 0 to 256, got {args.workers}")
    return found


def _finetune(args: argparse.Namespace) -> int:
    session = Options(**given_for(args, Options))
    session.check()
    cache.keep_compiled()
    check_devices()
    given = given_for(args, FinetuneConfig)
    given.pop("weights", None)
    before = read_config(args.out, FinetuneConfig) if args.resume else None
    if before:  # the options that determine images and weights are those of the run
        given = {"weights": before.weights, "images": before.images, "share": before.share, "split_seed": before.split_seed,
                 "per_class": before.per_class, "image_size": before.image_size} | given  # fmt: skip
    if args.weights:
        given["weights"] = None if args.weights == "none" else args.weights
    if args.data:
        given["images"] = args.data
    if "weights" not in given or "images" not in given:
        if (args.out / "head").is_dir():  # the options of the second stage are not stored yet
            raise InputError(
                f"the run in {args.out} ended in its first stage: to continue it, give all its options again, with --resume"
            )
        raise InputError(f"there is no run in {args.out} to resume: give --weights and --data to start one")
    # As many errors as possible are reported before weights are downloaded and images are read.
    finetune.check_given({name: value for name, value in given.items() if value is not None})
    if why := outputs.unusable(args.out):
        raise InputError(f"cannot use `out` {args.out}: {why}; choose another folder")
    where = devices.find(args.devices)
    listing = None if given["images"] in IN_MEMORY else folder.find(given["images"], args.data_dir)
    arch = args.arch or (before.arch if before else None)
    begin = finetune.resolve(given["weights"], None if given["weights"] else arch, given.get("image_size"))
    finetune.check_parts(given.get("freeze", ""), begin)
    found = _images(listing, begin, given, args.data_dir)
    probe = before.recipe == "probe" if before else args.linear_probe
    own = {name: value for name, value in given.items() if name != "arch"}
    config, reasons = finetune.choose(begin, found, probe=probe, devices=where.count, **own)
    if before:
        chosen = {name: getattr(config, name) for name in (*given, "data_digest", "weights_digest")}
        for name, digest in (("images", "data_digest"), ("weights", "weights_digest")):
            if chosen[digest] == getattr(before, digest):  # the same content, perhaps under another path
                chosen[name] = getattr(before, name)
        config = dataclasses.replace(before, **chosen)
        config.check()
        reasons = []
    outputs.check(config, args.out, args.resume)
    workers = args.workers
    if workers is None:
        workers = 0 if where.platform == "cpu" else min(8, (os.cpu_count() or 2) // 2)
    try:
        with StopRequest() as stop:
            summary = _stages(args, config, reasons, found, begin, where, workers, session, stop)
    except Interrupted as stopped:
        Console().say(f"         to continue, run the same command with --out {shlex.quote(str(args.out))} --resume")
        return 128 + stopped.args[0]
    for line in table(summary["test_by_class"]):
        Console().say(line)
    if skipped := summary["skipped_images"]:
        Console().say(f"skipped  {skipped:,} damaged image{'s' if skipped > 1 else ''}; summary.json lists them")
    Console().say(f"next     jresnet predict --weights {shlex.quote(str(args.out / 'last.safetensors'))} IMAGE")
    return 0


def _images(listing: folder.Listing | None, begin: Start, given: dict[str, Any], data_dir: Path | None) -> Dataset:
    """Loads the images as two splits; ``listing`` is None for data sets in memory."""
    if listing is None:
        found = data.load(given["images"], data_dir)
        return folder.fewer(found, given.get("per_class"), given.get("split_seed", 0))
    chosen = {flag: given[flag] for flag in ("share",) if flag in given}
    loaded = folder.load(
        listing,
        begin.preprocessing,
        seed=given.get("split_seed", 0),
        limit=given.get("per_class"),
        **chosen,
    )
    Console().say(f"validate on {loaded.validation}")
    return loaded.dataset


def _stages(
    args: argparse.Namespace,
    config: FinetuneConfig,
    reasons: list[str],
    found: Dataset,
    begin: Start,
    where: Devices,
    workers: int,
    session: Options,
    stop: StopRequest,
) -> dict[str, Any]:
    """Trains the head, then all layers; returns the summary of the last stage."""
    out: Path = args.out
    Console().say(f"weights  {begin.spec}; images {begin.preprocessing}; {begin.origin}")

    def run(program: Program, config: FinetuneConfig, out: Path, reasons: list[str], resume: bool) -> dict[str, Any]:
        for reason in reasons:
            Console().say(f"chosen   {reason}")
        return Trainer(config, found, out, stop, program, session).fit(resume)

    def probed(config: FinetuneConfig, out: Path, reasons: list[str], resume: bool) -> dict[str, Any]:
        Console().say("computing the embeddings of all images")
        vectors = finetune.embed(begin, found, where, config.precision)
        return run(finetune.Probe(config, found, begin, vectors, where), config, out, reasons, resume)

    if config.recipe == "probe":
        return probed(config, out, reasons, args.resume)
    head = None
    begun = any((out / "checkpoints").glob("*.safetensors"))
    if begin.values is not None and args.head_stage is not False and not begun:
        path = out / "head"
        if not (args.resume and (path / "summary.json").exists()):
            first, why = finetune.choose(
                begin, found, probe=True, devices=where.count, seed=config.seed, precision=config.precision,
                weights=config.weights, images=config.images,
            )  # fmt: skip
            Console().say("stage    1 of 2: only the head, on embeddings")
            probed(first, path, why, args.resume)
        head = finetune.head_of(path / "last.safetensors")
        Console().say("stage    2 of 2: all layers")
    program = finetune.Finetune(config, found, begin, head, where, workers)
    return run(program, config, out, reasons, args.resume)


def table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table with precision and recall by class; with many classes only those with the lowest recall."""
    rows = list(scores.items())
    more = ""
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: (row[1]["recall"] is None, row[1]["recall"] or 0.0))[:SHOWN]
        more = f"these are the {SHOWN} of {len(scores):,} classes with the lowest recall; summary.json has all classes"
    names = [printable(name)[:40] for name, _ in rows]
    width = max(len("class"), *map(len, names))

    def share(value: float | None) -> str:
        return f"{100 * value:7.1f} %" if value is not None else "        -"

    lines = [f"{'class':{width}}  images  precision     recall"]
    for name, (_, row) in zip(names, rows, strict=True):
        lines.append(f"{name:{width}}  {row['images']:6,}  {share(row['precision'])}  {share(row['recall'])}")
    return [*lines, more] if more else lines
