"""The folder of a run: its checks, its lock against concurrent runs, and the files that a run writes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from jresnet.errors import InputError
from jresnet.files import printable, read_ordinary, write_atomically
from jresnet.models import zoo
from jresnet.reports import plots
from jresnet.reports.metrics_file import finite, no_figures, read_metrics
from jresnet.training import devices
from jresnet.training import step as train
from jresnet.training.checkpoint import Checkpoints
from jresnet.training.config import RunConfig, differences, read_config, read_runs, why_not_longer
from jresnet.training.loop import Evaluation
from jresnet.training.metrics import Metrics, WandB
from jresnet.training.program import Program
from jresnet.version import __version__, installed
from jresnet.weights import native as weights

FILES = (
    "config.json", "metrics.jsonl", "summary.json", "last.safetensors", "best.safetensors", "checkpoints", "curves.png",
    "confusion.png", "worst.png",
)  # fmt: skip
MAX_SUMMARY = 2**24  # largest summary.json that is read, in bytes; usual ones have about 3,000
PROGRESS = 4096  # bytes reserved for sending a checkpoint's progress to the other processes


class Outputs:
    """Writes and reads the files of a run. In all processes but the first, methods do nothing.

    Args:
        out: folder of the run.
        config: configuration of the run; the program's may have another seed.
        program: the program.
        say: prints a line.
    """

    def __init__(self, out: Path, config: RunConfig, program: Program, say: Callable[[str], None]):
        self.out, self.config, self.program, self.say = out, config, program, say
        self._checkpoints: Checkpoints | None = None
        self._metrics: Metrics | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl`` so far."""
        return self._metrics.rows if self._metrics else []

    @contextlib.contextmanager
    def opened(self, resume: bool, **more: Any) -> Iterator[None]:
        """Creates the folder, or checks that it contains this run; locks it and writes ``config.json``.

        Args:
            resume: continue an existing run.
            more: further entries of ``config.json``.

        Raises:
            InputError: the folder cannot be used, is in use, or contains another run.
        """
        if not devices.is_first():
            yield
            return
        with (
            claimed(self.config, self.out, resume, self.say),
            Checkpoints(self.out / "checkpoints") as self._checkpoints,
        ):
            write_config(self.out, self.config, **more)
            try:
                yield
            finally:
                if self._metrics:
                    self._metrics.close()

    def restore(self, like: train.TrainState) -> tuple[train.TrainState, dict[str, Any]] | None:
        """Restores the state and the progress of the newest undamaged checkpoint, in every process; None if there is none.

        Raises:
            WeightsError: all checkpoints are damaged, or belong to another network.
        """
        found = self._checkpoints.restore(like) if self._checkpoints else None
        for note in found.notes if found else ():
            self.say(f"note     {note}")
        if not devices.together(np.array([found is not None]))[0][0]:
            return None
        if jax.process_count() == 1:
            assert found is not None
            return found.state, found.progress
        text = json.dumps(found.progress).encode() if found else b""
        values = (found.state if found else like), np.frombuffer(text.ljust(PROGRESS), np.uint8)
        state, text = devices.from_first(values)
        return self.program.devices.replicate(state), json.loads(bytes(text))

    def checkpoint(self, state: train.TrainState, progress: dict[str, Any], score: float | None = None) -> None:
        """Starts writing a checkpoint, as :meth:`Checkpoints.save`."""
        if self._checkpoints:
            self._checkpoints.save(state, progress, score)

    def wait(self) -> None:
        """Waits for the current checkpoint."""
        if self._checkpoints:
            self._checkpoints.wait()

    def begin_rows(self, epochs: int, step: int, project: str | None) -> None:
        """Opens ``metrics.jsonl``, keeping its first ``epochs`` rows, TensorBoard, and a project of W&B.

        ``step`` is the last completed step.
        """
        if devices.is_first():
            name = f"{self.out.parent.name}/{self.out.name}"  # the last part alone may be seed-0, which is not unique
            wandb = WandB(project, name, dataclasses.asdict(self.config), self.out) if project else None
            self._metrics = Metrics(self.out, epochs, wandb, step)
            if self._metrics.note:
                self.say(f"note     {self._metrics.note}")
            self._metrics.text("configuration", json.dumps(dataclasses.asdict(self.config), indent=1))

    def rewind_rows(self, epochs: int, step: int) -> None:
        """Drops the rows after the first ``epochs``, and the steps after ``step``."""
        if self._metrics:
            self._metrics.rewind(epochs, step)

    def steps(self, step: int, losses: np.ndarray) -> None:
        """Adds the losses of the last steps up to ``step``."""
        if self._metrics:
            self._metrics.steps(step, losses)

    def row(self, row: dict[str, Any]) -> None:
        """Appends an epoch's row."""
        if self._metrics:
            self._metrics.add(row)

    def weights(self, name: str, state: train.TrainState, row: dict[str, Any]) -> None:
        """Writes the model of a state to a native file, with its preprocessing and the figures of ``row``."""
        if not devices.is_first():
            return
        data, start = self.program.data.name, self.config.weights
        if start is not None and not start.startswith("hf:"):
            start = Path(start).name  # without the folders of this machine, since weights are shared
        weights.save(
            self.out / name,
            self.program.network(train.model_of(self.program.graph, state)),
            self.config.arch if self.config.arch in zoo.ZOO else None,
            source=f"trained by jresnet on {'a folder of images' if data == 'folder' else data}",
            step=str(int(state.step)),
            preprocessing=self.config.preprocessing().to_json(),
            categories=json.dumps(self.program.data.classes),
            metrics=json.dumps(finite(row)),
            started_from=start,
            **self.program.provenance(),
        )

    def finish(self, test: Evaluation, judge: str, best_epoch: int, **more: Any) -> dict[str, Any]:
        """Writes the figures and ``summary.json``.

        Args:
            test: evaluation of the test images after the last epoch.
            judge: the split on which the best epoch was chosen, ``"val"`` or ``"test"``.
            best_epoch: the best epoch, counted from 1; 0 if no epoch's logits were all finite.
            more: further fields of the summary.

        Returns:
            The contents of ``summary.json``; an empty dict in all processes but the first.
        """
        if not devices.is_first():
            return {}
        program, config, data, rows = self.program, self.config, self.program.data, self.rows
        self._plot(test)
        last, best = rows[-1], rows[best_epoch - 1] if best_epoch else {}
        labels = program.splits["test"].labels
        # An image without a prediction counts as misclassified: it is assigned some class other than its own.
        predictions = np.where(test.predictions < 0, (labels + 1) % len(data.classes), test.predictions)
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
            "final": {key: last[key] for key in last if key == "epoch" or key.startswith(measured)}
            | {"test_loss": test.loss, "test_accuracy": test.accuracy},
            "best": {key: best[key] for key in best if key == "epoch" or key.startswith(measured[1:])},
            "best_chosen_on": chosen_on,
            "test_accuracy_by_class": plots.per_class_accuracy(labels, predictions, data.classes),
            **program.more(labels, test.predictions),
            "compile_seconds": program.compile_seconds,
            "images_per_second": last["images_per_second"],
            "device": f"{program.devices.first.device_kind} ({program.devices.platform})",
            "devices": program.devices.count,
            "processes": jax.process_count(),
            "precision": config.precision,
            "seed": config.seed,
            "versions": versions(),
            "command": shlex.join(sys.argv),
            **more,
        }
        return write_json(self.out / "summary.json", summary)

    def _plot(self, test: Evaluation) -> None:
        """Plots the curves, the confusion matrix and the worst mistakes; the last two only of images with a prediction."""
        config, data, held = self.config, self.program.data, self.program.splits["test"]
        title = f"{config.arch} on {data.name}, recipe {config.recipe}"
        scored = f"{title}: {100 * test.accuracy:.2f} % of {len(held.labels):,} test images, last epoch"
        known = test.predictions >= 0
        labels, predictions, classes = held.labels[known], test.predictions[known], data.classes
        plots.plot_curves(self.rows, self.out / "curves.png", title)
        plots.plot_confusion(labels, predictions, classes, self.out / "confusion.png", scored)
        plots.plot_worst(
            self.program.shown("test")[known],
            labels,
            predictions,
            test.losses[known],
            classes,
            self.out / "worst.png",
            scored,
        )
        for name in ("curves", "confusion", "worst"):
            if self._metrics:
                self._metrics.picture(name, self.out / f"{name}.png", self.rows[-1]["step"])


@contextlib.contextmanager
def claimed(
    config: RunConfig, out: Path, resume: bool, say: Callable[[str], None], runs: int | None = None
) -> Iterator[None]:
    """Creates the folder of a run, or checks that it contains this run, and locks it.

    Raises:
        InputError: the folder cannot be used, is in use, or contains another run.
    """
    check(config, out, resume, runs)  # before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use `out` {out}: {error.strerror or error}; choose another folder") from error
    with Lock(out) as lock:
        if lock.note:
            say(f"note     {lock.note}")
        check(config, out, resume, runs)  # again, since another run may have ended while waiting for the lock
        if (before := read_config(out, type(config))) and (changed := differences(before, config)):
            say(f"note     the run continues with another configuration: {'; '.join(changed)}")
            (out / "summary.json").unlink(missing_ok=True)  # that of the shorter run is outdated
        for name in FILES:  # temporary files of a run that was killed
            for path in out.glob(f".{name}.*"):
                path.unlink(missing_ok=True)
        yield


def check(config: RunConfig, out: Path, resume: bool, runs: int | None = None) -> None:
    """Checks that the folder is free, or contains this run if it is to be resumed.

    More ``epochs`` are allowed if the learning rates of the started epochs do not change.

    Args:
        config: configuration of the run.
        out: the folder.
        resume: whether to continue the run in the folder.
        runs: number of seeds; None for a single run.

    Raises:
        InputError: the folder contains another run, or none that can be resumed; the message lists all fields that differ.
    """
    if why := unusable(out):
        raise InputError(f"cannot use `out` {out}: {why}; choose another folder")
    before = read_config(out, type(config))
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not resume:
        raise InputError(
            f"`out` {out} already contains a run ({', '.join(taken)}): `resume` it, or choose another folder"
        )
    changed = differences(before, config) if before else []
    begun = read_runs(out, type(config)) if before else None
    if before and runs != begun:
        changed.append(f"`runs` was {begun or 'not given'}, now {runs or 'not given'}")
    if before and changed:
        why = ""
        if dataclasses.replace(config, epochs=before.epochs, milestones=before.milestones) == before and (
            runs == begun
        ):
            if not (reason := why_not_longer(before, config, _begun(out))):
                return
            why = f" ({reason})"
        way = ""
        if last := next((path for path in _seed_folders(out) if (path / "last.safetensors").exists()), None):
            way = f". To start a new run from its weights, give `weights` {last / 'last.safetensors'} and another `out`"
        raise InputError(
            f"`resume` cannot change the configuration of the run in {out}: {'; '.join(changed)}{why}{way}"
        )


def _seed_folders(out: Path) -> list[Path]:
    """The folder of a run and those of its seeds."""
    return [out, *sorted(out.glob("seed-*"))]


def _begun(out: Path) -> int:
    """The number of epochs that a run has started; with several seeds, the largest number."""
    most = 0
    for folder in _seed_folders(out):
        rows = read_metrics(folder / "metrics.jsonl")
        steps = [int(path.stem) for path in (folder / "checkpoints").glob("*.safetensors") if path.stem.isdecimal()]
        within = max(steps, default=0) > (rows[-1]["step"] if rows else 0)
        most = max(most, len(rows) + within)
    return most


def unusable(out: Path) -> str | None:
    """The reason why a folder cannot be created or written to, as far as can be known without trying; None if it can."""
    try:
        out.stat()
    except FileNotFoundError:
        return f"{out} is a broken link" if out.is_symlink() else unusable(out.parent)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if not out.is_dir():
        return f"{out} is not a folder"
    return None if os.access(out, os.W_OK | os.X_OK) else f"{out} is not writable"


def write_config(out: Path, config: RunConfig, **more: Any) -> None:
    """Writes ``config.json``."""
    write_json(out / "config.json", {"run": dataclasses.asdict(config), **more, "command": shlex.join(sys.argv)})


def write_json(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Writes a JSON file and returns its contents; NaN and infinity become null."""
    contents = finite(values)
    write_atomically(path, json.dumps(contents, indent=1).encode())
    return contents


def read_summary(path: Path) -> dict[str, Any]:
    """Reads the ``summary.json`` of a run.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    try:
        summary = json.loads(read_ordinary(path, MAX_SUMMARY))
        if not isinstance(summary, dict) or not all(isinstance(summary.get(part), dict) for part in ("final", "best")):
            raise TypeError("it is not a JSON object with the objects final and best")
        bad = [name for part in (summary, summary["final"], summary["best"]) for name in no_figures(part)]
        bad += ["seed"] if type(summary.get("seed")) is not int else []
        if bad:
            raise TypeError(f"invalid value of {', '.join(bad)}")
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be used ({error}): delete it and resume the run, which writes it again"
        ) from error
    return summary


def versions() -> dict[str, str]:
    """The versions of Python, jresnet and the main packages."""
    ours = {"python": platform.python_version(), "jresnet": __version__}
    return ours | installed("jax", "jaxlib", "flax", "optax", "numpy")


class Lock:
    """A lock that keeps other processes from using a run's folder; a context manager.

    The kernel releases the lock when the process ends, even by SIGKILL; child processes do not inherit it.

    Args:
        folder: folder of the run; the file ``lock`` is created in it and not deleted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.note: str | None = None  # the reason why nothing is locked, if the file system has no locks
        self._lock = filelock.FileLock(folder / "lock", timeout=0, thread_local=False, on_acquired=_sign)

    def __enter__(self) -> Lock:
        """Acquires the lock.

        Raises:
            InputError: another run holds the lock, or the folder is not writable.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            try:
                holder = printable((self.folder / "lock").read_text(errors="replace"))
            except OSError:  # on Windows a locked file cannot be read
                holder = ""
            raise InputError(
                f"another run is using {self.folder} ({holder or 'of an unknown process'}): wait for it, stop it, or "
                "choose another `out`"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise InputError(
                    f"cannot use `out` {self.folder}: {error.strerror or error}; choose another folder"
                ) from error
            self.note = f"the file system of {self.folder} has no locks: do not start a second run in this folder"
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _sign(descriptor: int) -> None:
    """Writes the owner of the lock to the locked file."""
    os.ftruncate(descriptor, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
