"""Train a ResNet on CIFAR-10: ``python scripts/train_cifar10.py --depth 34``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

# --depth to architecture: torchvision's family with the CIFAR stem, and the paper's own for CIFAR.
DEPTHS = {depth: f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    depth: f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110, 1202)
}


def parser() -> argparse.ArgumentParser:
    """The command line's options. Those that belong to a recipe default to None: its value, or the resumed run's."""
    parser = argparse.ArgumentParser(
        description="Train a ResNet on CIFAR-10 with SGD, momentum and step decay.",
        epilog="With neither --data-dir nor a prepared dataset, CIFAR-10 (163 MiB) is downloaded.",
    )
    network = parser.add_argument_group("network")
    depth = network.add_mutually_exclusive_group()
    depth.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help="layers: 18 or 34 (basic blocks), 50, 101 or 152 (Bottleneck blocks), all with 64 to 512 channels and a "
        "3x3 stem; or the paper's CIFAR family with 16 to 64 channels: 20, 32, 44, 56, 110, 1202 (basic blocks) "
        "(default: 34)",
    )
    depth.add_argument("--arch", metavar="NAME", help="any architecture of jresnet.list_models() instead of --depth")
    network.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="what convolutions compute in; auto is bfloat16 on GPU and TPU, float32 on the CPU (default: auto)",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        help="step: 200 epochs at 32 pixels, batch 128, lr 0.1; blog: 100 epochs of resnet34_projection at 224 pixels, "
        "batch 64, lr 0.001, x0.1 every 10 epochs (default: step)",
    )
    recipe.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training images (step: 200; digits: 12)"
    )
    recipe.add_argument("--batch-size", type=int, metavar="N", help="images a step (step: 128, blog: 64)")
    recipe.add_argument("--lr", type=float, help="learning rate of the first epochs (step: 0.1, blog: 0.001)")
    recipe.add_argument("--momentum", type=float, help="SGD's momentum, 0 to below 1 (default: 0.9)")
    recipe.add_argument(
        "--weight-decay", type=float, metavar="F", help="L2 factor, on all parameters (step: 5e-4, blog: 0)"
    )
    recipe.add_argument(
        "--milestones", type=float, nargs="*", metavar="EPOCH",
        help="epochs at which the learning rate falls (step: at 50 %% and 75 %% of the run; blog: every 10)",
    )  # fmt: skip
    recipe.add_argument("--gamma", type=float, help="factor of the learning rate at a milestone (default: 0.1)")
    recipe.add_argument(
        "--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum (step: yes, blog: no)"
    )
    recipe.add_argument("--seed", type=int, metavar="N", help="seed of parameters, order and augmentation (default: 0)")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", choices=("cifar10", "digits"),
        help="digits: 1,797 handwritten digits that come with scikit-learn (default: cifar10)",
    )  # fmt: skip
    data.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="folder with a TFDS store, or CIFAR-10's archive or extracted folder, python or binary; the download goes "
        "there (default: TFDS_DATA_DIR, else ~/tensorflow_datasets, else ./data)",
    )  # fmt: skip
    data.add_argument("--limit-train", type=int, metavar="N", help="only the first N training images (default: all)")
    data.add_argument("--limit-test", type=int, metavar="N", help="only the first N test images (default: all)")
    data.add_argument(
        "--val-split", type=int, metavar="N",
        help="hold out the last N training images and choose the best epoch on them (default: 0)",
    )  # fmt: skip

    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: runs/ARCH-DATASET-DATE-TIME)"
    )
    results.add_argument(
        "--resume", action="store_true",
        help="go on with the run in --out from its last checkpoint, or begin it; options not given are the run's",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for what cannot be used or NaN, 2 for bad options, 128 + signal."""
    options = parser()
    args = options.parse_args(argv)
    if args.resume and args.out is None:
        options.error("--resume needs --out, the folder of the run to go on with")
    if args.depth is not None and args.depth not in DEPTHS:
        options.error(f"unknown --depth {args.depth}: there are {', '.join(map(str, sorted(DEPTHS)))}")
    # After the options: --help and mistakes in them answer at once.
    try:
        from jresnet import run
        from jresnet.errors import InputError
    except ImportError as error:
        print(f"error: {error}: install what training needs with pip install -e '.[train]'", file=sys.stderr)
        return 1

    flags = {name: value for name, value in vars(args).items() if name not in ("depth", "out", "resume", "data_dir")}
    flags["arch"] = args.arch or (DEPTHS[args.depth] if args.depth else None)
    given = {name: value for name, value in flags.items() if value is not None and value != "auto"}
    try:
        before = run.read_config(args.out) if args.resume else None
        config = dataclasses.replace(before, **_tuples(given)) if before else run.default_config(**given)
        out = args.out or Path("runs") / f"{config.arch}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run.check_out(config, out, args.resume)
        with run.StopRequest() as stop:
            run.Trainer(config, run.load_data(config, args.data_dir), out, stop).fit(args.resume)
    except run.Interrupted as stopped:
        return 128 + stopped.args[0]
    except (InputError, run.NonFiniteLoss, OSError) as error:  # OSError: a disk that fills up during the run
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _tuples(values: dict) -> dict:
    """Lists, as argparse gives them, as the tuples of a configuration."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
