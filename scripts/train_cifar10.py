"""Train a ResNet on CIFAR-10: ``python scripts/train_cifar10.py --depth 34``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

import huge_pages

# --depth to architecture: torchvision's family with the CIFAR stem, and the paper's own for CIFAR.
DEPTHS = {depth: f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    depth: f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110, 1202)
}


def parser() -> argparse.ArgumentParser:
    """The command line's options. Those that belong to a recipe default to None: its value, or the resumed run's."""
    parser = argparse.ArgumentParser(
        description="Train a ResNet on CIFAR-10.",
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

    recipe = parser.add_argument_group("recipe", "what is not given is the recipe's own")
    flag = recipe.add_argument
    flag(
        "--recipe", choices=("step", "fast", "blog"),
        help="step: 200 epochs, batch 128, lr 0.1 falling at half and three quarters; fast: 20 epochs, batch 512, one "
        "cycle; blog: 100 epochs of resnet34_projection at 224 pixels (default: step)",
    )  # fmt: skip
    flag("--epochs", type=int, metavar="N", help="passes over the training images (step: 200, fast: 20; digits: 4)")
    flag("--batch-size", type=int, metavar="N", help="images a step, over all devices (step: 128, fast: 512, blog: 64)")
    flag("--optimizer", choices=("sgd", "adamw"), help="adamw brings lr 0.001 and weight decay 0.01 (default: sgd)")
    flag("--lr", type=float, help="highest learning rate (step: 0.1, fast: 0.4, blog: 0.001)")
    flag("--momentum", type=float, help="SGD's momentum or AdamW's b1, 0 to below 1 (default: 0.9)")
    flag("--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum (step, fast: yes; blog: no)")
    flag("--weight-decay", type=float, metavar="F", help="weight decay (step, fast: 5e-4; blog: 0)")
    flag(
        "--decay-norms", action=argparse.BooleanOptionalAction,
        help="weight decay on BN's parameters and biases too, as PyTorch's optimizers do (fast: no; others: yes)",
    )  # fmt: skip
    flag(
        "--decoupled-decay", action=argparse.BooleanOptionalAction,
        help="SGD's weight decay outside the momentum, where it acts 1 / (1 - momentum) times less (default: no)",
    )  # fmt: skip
    flag("--clip-norm", type=float, metavar="L", help="longest gradient, over all parameters (default: 0, no limit)")
    flag(
        "--schedule", choices=("step", "cosine", "onecycle"),
        help="of the learning rate after the warm-up: falls at milestones, as half a cosine to 0, or linearly to 0; "
        "onecycle brings a warm-up of a fifth of the run (fast: onecycle; others: step)",
    )  # fmt: skip
    flag(
        "--warmup-epochs",
        type=float,
        metavar="N",
        help="epochs in which the rate rises linearly (fast: a fifth; else 0)",
    )
    flag(
        "--milestones", type=float, nargs="*", metavar="EPOCH",
        help="of --schedule step: epochs at which the rate falls (step: at 50 %% and 75 %% of the run; blog: every 10)",
    )  # fmt: skip
    flag("--gamma", type=float, help="factor of the learning rate at a milestone (default: 0.1)")
    flag("--label-smoothing", type=float, metavar="F", help="share of the target spread over all classes (fast: 0.1)")
    flag("--ema", type=float, metavar="F", help="decay a step of an average of the weights, which is then evaluated and "
         "kept; 0: none (fast: 0.99)")  # fmt: skip
    flag(
        "--zero-init-residual", action=argparse.BooleanOptionalAction,
        help="start the last BN scale of each block at 0 (default: no)",
    )  # fmt: skip
    flag(
        "--remat", action=argparse.BooleanOptionalAction,
        help="keep only the blocks' inputs for the backward pass and compute the rest again: less memory, slower "
        "(default: no)",
    )  # fmt: skip
    flag("--flip", choices=("none", "random", "alternate"), help="mirror training images at random, or every second epoch "
         "(fast: alternate; others: random; digits: none)")  # fmt: skip
    flag("--random-erasing", type=float, metavar="P", help="probability of an erased rectangle (default: 0)")
    flag(
        "--mixup",
        type=float,
        metavar="ALPHA",
        help="mix images and targets, shares from Beta(ALPHA, ALPHA) (default: 0)",
    )
    flag(
        "--cutmix", type=float, metavar="ALPHA",
        help="paste a rectangle of another image; with --mixup too, each batch has one of the two (default: 0)",
    )  # fmt: skip
    flag("--seed", type=int, metavar="N", help="seed of parameters, order and augmentation (default: 0)")
    flag(
        "--runs",
        type=int,
        metavar="N",
        help="runs of N seeds, from --seed on, into OUT/seed-*, with mean and deviation",
    )

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
        help="go on with the run in --out from its last whole checkpoint, or begin it; options not given are the run's",
    )  # fmt: skip
    results.add_argument(
        "--checkpoint-minutes", type=float, default=10.0, metavar="N",
        help="a checkpoint every N minutes within an epoch, beside the one at its end (default: 10)",
    )  # fmt: skip
    results.add_argument("--wandb", metavar="PROJECT", help="report to Weights & Biases too (pip install wandb)")

    trouble = parser.add_argument_group("when something is wrong")
    trouble.add_argument(
        "--on-nan", choices=("stop", "rollback"),
        help="where the loss is not finite: stop, or go back to the last checkpoint and on in another order, three times "
        "at most (default: stop)",
    )  # fmt: skip
    trouble.add_argument(
        "--debug-nans", action="store_true", help="name the layer that a non-finite loss comes from; slower"
    )
    trouble.add_argument(
        "--deterministic", action="store_true",
        help="the same bits in every run on a GPU too, slower there; CPU and TPU always give them (see the README)",
    )  # fmt: skip

    many = parser.add_argument_group("devices")
    many.add_argument(
        "--devices", type=int, metavar="N", help="how many of this machine's (each process's) (default: all)"
    )
    many.add_argument(
        "--bn", choices=("global", "per-device"),
        help="BatchNorm over the whole batch, or over each device's part as PyTorch's DDP (default: global)",
    )  # fmt: skip
    many.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 listens; trusted "
                      "networks only")  # fmt: skip
    many.add_argument("--num-processes", type=int, metavar="N", help="several processes: how many")
    many.add_argument("--process-id", type=int, metavar="N", help="several processes: which this one is, from 0")
    many.add_argument(
        "--distributed",
        choices=("auto",),
        help="several processes, found by JAX: SLURM, Open MPI, Kubernetes, Cloud TPU",
    )
    return parser


SESSION = (  # flags that are no part of a run's configuration
    "depth", "out", "resume", "data_dir", "runs", "checkpoint_minutes", "wandb", "debug_nans", "deterministic", "devices",
    "coordinator", "num_processes", "process_id", "distributed",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for what cannot be used or NaN, 2 for bad options, 128 + signal."""
    options = parser()
    args = options.parse_args(argv)
    problems = mistakes(args)
    if problems:
        options.error("; ".join(problems))
    if args.deterministic:  # XLA reads it once, when JAX starts
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    # After the options: --help and mistakes in them answer at once.
    try:
        from jresnet import cache
        from jresnet.errors import JresnetError
        from jresnet.training import config, devices, program
        from jresnet.training import outputs as folder
        from jresnet.training import trainer as run
        from jresnet.training.stop import Interrupted, StopRequest
    except ImportError as error:
        print(f"error: {error}: install what training needs with pip install -e '.[train]'", file=sys.stderr)
        return 1

    cache.keep_compiled()
    flags = {name: value for name, value in vars(args).items() if name not in SESSION}
    flags["arch"] = args.arch or (DEPTHS[args.depth] if args.depth else None)
    given = {name: value for name, value in flags.items() if value is not None and value != "auto"}
    try:
        if args.coordinator or args.distributed:
            devices.connect(args.coordinator, args.num_processes, args.process_id)
        before = config.read_config(args.out) if args.resume else None
        chosen = dataclasses.replace(before, **_tuples(given)) if before else config.default_config(**given)
        chosen.check()
        runs = args.runs or (config.read_runs(args.out) if before else None)
        out = args.out or Path("runs") / f"{chosen.arch}-{chosen.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
        if devices.is_first():
            folder.check(chosen, out, args.resume)
        session = run.Options(args.checkpoint_minutes, args.debug_nans, args.deterministic, args.wandb)
        where = devices.find(args.devices)
        with StopRequest() as stop:
            data = program.load_data(chosen, args.data_dir)
            if runs:
                run.fit_seeds(chosen, data, out, runs, args.resume, stop, where, session)
            else:
                run.Trainer(chosen, data, out, stop, program.Program(chosen, data, where), session).fit(args.resume)
    except Interrupted as stopped:
        return 128 + stopped.args[0]
    except (JresnetError, run.NonFiniteLoss, OSError) as error:  # OSError: a disk that fills up during the run
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        import jax

        if jax.process_count() == 1:
            raise
        print(f"error: the processes lost each other: start all again with --resume\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def mistakes(args: argparse.Namespace) -> list[str]:
    """What does not go together in the options."""
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    found = []
    if args.resume and args.out is None:
        found.append("--resume needs --out, the folder of the run to go on with")
    if args.depth is not None and args.depth not in DEPTHS:
        found.append(f"unknown --depth {args.depth}: there are {', '.join(map(str, sorted(DEPTHS)))}")
    if args.runs is not None and args.runs < 1:
        found.append(f"--runs must be at least 1, got {args.runs}")
    if args.checkpoint_minutes < 0:
        found.append(f"--checkpoint-minutes must be at least 0, got {args.checkpoint_minutes:g}")
    if args.distributed and any(value is not None for value in by_hand):
        found.append("--distributed auto finds --coordinator, --num-processes and --process-id by itself")
    elif any(value is not None for value in by_hand) and any(value is None for value in by_hand):
        found.append("--coordinator, --num-processes and --process-id belong together")
    if (args.distributed or args.coordinator) and args.out is None:
        found.append("several processes need --out: each would name a folder of its own")
    return found


def _tuples(values: dict) -> dict:
    """Lists, as argparse gives them, as the tuples of a configuration."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


if __name__ == "__main__":
    huge_pages.ask()
    code = main()
    if code > 128:  # a compiler may still be at work in a thread, and Python would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
