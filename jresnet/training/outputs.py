"""A run's folder: what may be begun in it, and what a run leaves there."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jresnet
from jresnet import files
from jresnet.errors import InputError
from jresnet.reports import plots
from jresnet.training import step as train
from jresnet.training.config import RunConfig, differences, read_config
from jresnet.training.program import Program
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

FILES = ("config.json", "metrics.jsonl", "summary.json", "last.safetensors", "best.safetensors", "checkpoints")


def make(out: Path) -> None:
    """Makes the folder for results; InputError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use --out {out}: {error.strerror or error}; choose another folder") from error


def write_config(out: Path, config: RunConfig, **more: Any) -> None:
    """Writes ``config.json``."""
    values = {"run": dataclasses.asdict(config), **more, "command": shlex.join(sys.argv)}
    files.write_atomically(out / "config.json", json.dumps(values, indent=1).encode())


def check(config: RunConfig, out: Path, resume: bool) -> None:
    """Checks that the folder is free or, where it is to be resumed, holds this very run.

    Raises:
        InputError: otherwise; a difference in the configuration is listed field by field.
    """
    before = read_config(out)
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not resume:
        raise InputError(
            f"--out {out} already holds a run ({', '.join(taken)}): add --resume, or choose another folder"
        )
    changed = differences(before, config) if before else []
    if changed:
        raise InputError(f"--resume goes on with the run in {out} as it was begun, but {'; '.join(changed)}")


def save_weights(path: Path, program: Program, state: train.TrainState, row: dict[str, Any]) -> None:
    """Writes the model of a state, with how to prepare images for it and the figures of ``row``."""
    config, pipeline = program.config, program.pipeline
    resize = round(config.image_size * 8 / 7) if config.crop == "resized" else None
    native.save(
        path,
        train.model_of(program.graph, state),
        config.arch,
        source=f"trained by jresnet on {program.data.name}",
        step=str(int(state.step)),
        preprocessing=Preprocessing(resize, config.image_size, pipeline.mean, pipeline.std).to_json(),
        categories=json.dumps(program.data.classes),
        metrics=json.dumps(row),
    )


def finish(
    out: Path,
    program: Program,
    rows: list[dict[str, Any]],
    test: train.Evaluation,
    judge: str,
    best: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Writes the plots and ``summary.json``, and returns its contents.

    Args:
        out: the run's folder.
        program: what was run.
        rows: of metrics.jsonl.
        test: the figures of the test images after the last epoch.
        judge: the split on which the best epoch was chosen, ``"val"`` or ``"test"``.
        best: the row of the best epoch.
        more: fields of the summary that only the run itself knows.
    """
    config, data, held = program.config, program.data, program.splits["test"]
    title = f"{config.arch} on {data.name}, recipe {config.recipe}"
    scored = f"{title}: {100 * test.accuracy:.2f} % of {len(held.labels):,} test images, last epoch"
    plots.plot_curves(rows, out / "curves.png", title)
    plots.plot_confusion(held.labels, test.predictions, data.classes, out / "confusion.png", scored)
    plots.plot_worst(held.images, held.labels, test.predictions, test.losses, data.classes, out / "worst.png", scored)
    chosen_on = {
        "val": f"the {config.val_split} training images held out for validation",
        "test": "the test images themselves, which flatters it: quote the final accuracy",
    }[judge]
    measured = ("train_", "val_", "test_")
    summary = {
        "arch": config.arch,
        "recipe": config.recipe,
        "parameters": program.parameters,
        "dataset": {
            "name": data.name,
            "source": data.source,
            "notes": data.notes,
            "verified": data.verified,
            "digest": data.digest,
            **{f"{name}_images": count for name, count in program.images.items()},
        },
        "final": {key: rows[-1][key] for key in rows[-1] if key == "epoch" or key.startswith(measured)}
        | {"test_loss": test.loss, "test_accuracy": test.accuracy},
        "best": {key: best[key] for key in best if key == "epoch" or key.startswith(measured[1:])},
        "best_chosen_on": chosen_on,
        "test_accuracy_by_class": plots.per_class_accuracy(held.labels, test.predictions, data.classes),
        "compile_seconds": program.compile_seconds,
        "images_per_second": rows[-1]["images_per_second"],
        "device": f"{program.devices.first.device_kind} ({program.devices.platform})",
        "devices": program.devices.count,
        "processes": jax.process_count(),
        "precision": config.precision,
        "versions": versions(),
        "command": shlex.join(sys.argv),
        **more,
    }
    files.write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def versions() -> dict[str, str]:
    """What a run was made with."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    ours = {"python": platform.python_version(), "jresnet": jresnet.__version__}  # a checkout need not be installed
    return ours | {name: version(name) for name in names}
