"""A whole training run: configuration in, a folder of results out. ``scripts/train_cifar10.py`` is its command line."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jresnet.data
from jresnet import factory, optim, recipes, report, train, weights, zoo
from jresnet.augment import Pipeline
from jresnet.checkpoint import Checkpoints
from jresnet.data import Dataset, Split
from jresnet.errors import InputError
from jresnet.pretrained import Preprocessing
from jresnet.resnet import Stem

FILES = ("config.json", "metrics.jsonl", "summary.json", "last.safetensors", "best.safetensors", "checkpoints")
FETCHES = 10  # how often an epoch's metrics are brought to the host


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite; the message names the step."""


class Interrupted(Exception):
    """A signal ended the run early, after its state was saved; the first argument is the signal's number."""


@dataclass(frozen=True)
class RunConfig:
    """All that decides a run's outcome; ``config.json`` holds it."""

    arch: str
    dataset: str  # "cifar10" | "digits"
    recipe: str  # the name of the row of recipes.RECIPES that the other fields come from, unless overridden
    epochs: int
    batch_size: int  # images
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    milestones: tuple[float, ...]  # epochs
    gamma: float
    crop: str  # of augment.Pipeline
    image_size: int  # pixels
    flip: bool
    imagenet_statistics: bool
    stem: Stem  # of an ImageNet-type architecture
    precision: str  # "float32" | "bfloat16"
    limit_train: int | None  # first images only
    limit_test: int | None
    val_split: int  # last training images held out
    seed: int

    def pipeline(self) -> Pipeline:
        """What happens to the images."""
        mean, std = recipes.STATISTICS["imagenet" if self.imagenet_statistics else self.dataset]
        return Pipeline(self.crop, self.image_size, self.flip, mean, std)

    def check(self) -> None:
        """Raises :class:`InputError` with everything that is out of range."""
        zoo.find(self.arch)
        least = {"epochs": 1, "batch_size": 1, "val_split": 0, "seed": 0, "limit_train": 1, "limit_test": 1}
        least |= {"momentum": 0, "weight_decay": 0}
        problems = [
            f"{name} must be at least {bound}, got {value}"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and value < bound
        ]
        problems += [
            f"{name} must be above 0, got {getattr(self, name)}" for name in ("lr", "gamma") if getattr(self, name) <= 0
        ]
        problems += [f"momentum must be below 1, got {self.momentum}"] if self.momentum >= 1 else []
        problems += ["nesterov needs a momentum above 0"] if self.nesterov and self.momentum == 0 else []
        problems += [f"milestone {m:g} is not above 0" for m in self.milestones if m <= 0]
        problems += ["seed must be below 2**32"] if self.seed >= 2**32 else []
        problems += [f"unknown precision {self.precision!r}"] if self.precision not in ("float32", "bfloat16") else []
        if problems:
            raise InputError("; ".join(problems))


def default_config(
    *, recipe: str = "step", dataset: str = "cifar10", arch: str | None = None, **overrides: Any
) -> RunConfig:
    """The configuration of ``recipe`` on ``dataset``; an override of None means the recipe's own value.

    Raises:
        InputError: for an unknown recipe, dataset or architecture, or values out of range.
    """
    if recipe not in recipes.RECIPES:
        raise InputError(f"unknown recipe {recipe!r}: there are {', '.join(recipes.RECIPES)}")
    if dataset not in recipes.DATASETS:
        raise InputError(f"unknown dataset {dataset!r}: there are {', '.join(recipes.DATASETS)}")
    row = recipes.RECIPES[recipe]
    row = dataclasses.replace(row, **recipes.DATASETS[dataset])
    values = {**dataclasses.asdict(row), **{k: v for k, v in overrides.items() if v is not None}}
    arch = arch or row.arch or "resnet34"
    if zoo.find(arch).config.stem == "cifar":
        values["stem"] = "cifar"
    if overrides.get("milestones") is None:
        values["milestones"] = recipes.milestones_in_epochs(row.milestones, values["epochs"])
    values["milestones"] = tuple(float(m) for m in values["milestones"])
    if values.get("precision") in (None, "auto"):
        values["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    defaults = {"limit_train": None, "limit_test": None, "val_split": 0, "seed": 0}
    chosen = {**defaults, **{k: v for k, v in values.items() if k in fields}}
    config = RunConfig(**{**chosen, "arch": arch, "dataset": dataset, "recipe": recipe})
    config.check()
    return config


def read_config(out: Path) -> RunConfig | None:
    """The configuration of the run in ``out``; None where there is none.

    Raises:
        InputError: where its ``config.json`` is damaged.
    """
    path = out / "config.json"
    try:
        if not path.exists():
            return None
        values = json.loads(path.read_text())["run"]
        return RunConfig(**{**values, "milestones": tuple(values["milestones"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no run's configuration ({error}): choose another --out") from error


class StopRequest:
    """Ctrl-C and SIGTERM as a question that the training loop asks; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __call__(self) -> bool:
        return self.signal is not None


class Trainer:
    """One run. Made without touching the disk; :meth:`fit` does the work.

    Args:
        config: what to do.
        data: the dataset, of :func:`load_data`.
        out: the folder for the results.
        stop: asked between steps; when it says yes the state is saved and the run ends.

    Raises:
        InputError: where data and configuration do not go together.
    """

    def __init__(self, config: RunConfig, data: Dataset, out: Path, stop: StopRequest | None = None):
        self.config, self.data, self.out = config, data, out
        self.stop = stop or StopRequest()
        self.progress = report.Progress()
        self.device = jax.devices()[0]
        self.splits = split_dataset(config, data)
        images = len(self.splits["train"].labels)
        if images < config.batch_size:
            raise InputError(
                f"a batch of {config.batch_size} is larger than the {images} training images: lower --batch-size"
            )
        self.steps_per_epoch = images // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs

        dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
        model = factory.create(
            config.arch, num_classes=len(data.classes), in_channels=3, stem=config.stem, dtype=dtype, seed=config.seed
        )
        self.schedule = optim.step_decay(config.lr, config.milestones, config.gamma, self.steps_per_epoch)
        self.optimizer = optim.sgd(self.schedule, config.momentum, config.nesterov, config.weight_decay)
        self.pipeline = config.pipeline()
        self.graph, params, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
        self.parameters = sum(value.size for value in jax.tree.leaves(params))
        self.state = train.init(model, self.optimizer)
        self.loop = train.steps_loop(
            train.train_step(self.graph, self.optimizer, self.pipeline),
            on_device=self.device.platform != "cpu",
            stop=self.stop,
            after_step=self.progress.step,
        )
        self.eval_step = jax.jit(train.eval_step(self.graph, self.pipeline))
        self.order_key, self.image_key = jax.random.split(jax.random.key(config.seed))
        self.done = Done()

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and writes the results.

        Args:
            resume: go on from the newest checkpoint in the folder, or begin where there is none.

        Returns:
            The contents of ``summary.json``.

        Raises:
            InputError: where the folder cannot be used, or holds another run.
            WeightsError: where the checkpoint to go on from is damaged.
            NonFiniteLoss: the last good checkpoint is left alone.
            Interrupted: after a signal; the state is saved.
        """
        check_out(self.config, self.out, resume)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot use --out {self.out}: {error.strerror or error}; choose another folder"
            ) from error
        self._introduce()
        with Checkpoints(self.out / "checkpoints") as checkpoints:
            weights.write_atomically(self.out / "config.json", self._config_file())
            found = checkpoints.restore(self.state) if resume else None
            if found is not None:
                self.state, progress = found
                self.done = Done(**progress)
                self.progress.say(f"resumed  at step {int(self.state.step):,} of {self.total_steps:,}")
            elif resume:
                self.progress.say("resumed  nothing: no checkpoint yet, so the run begins")
            metrics = report.Metrics(self.out, self.done.epochs)
            self.session = Session(self.done.step_seconds)
            try:
                while self.done.epochs < self.config.epochs:
                    self._train_epoch(checkpoints)
                    self._end_epoch(metrics)
                    checkpoints.save(self.state, dataclasses.asdict(self.done))
            finally:
                self.progress.end()
                metrics.close()
        return self._finish(metrics.rows)

    def _introduce(self) -> None:
        config, say = self.config, self.progress.say
        say(f"device   {self.device.device_kind} ({self.device.platform}), {config.precision}")
        say(
            f"network  {config.arch}, {config.stem} stem, {len(self.data.classes)} classes, {self.parameters:,} parameters"
        )
        counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in self.splits.items())
        say(f"data     {self.data.name}: {counts} images, from {self.data.source}")
        for note in self.data.notes:
            say(f"note     {note}")
        milestones = ", ".join(f"{milestone:g}" for milestone in config.milestones) or "no epoch"
        say(
            f"recipe   {config.recipe}: {config.epochs} epochs of {self.steps_per_epoch} steps, batch {config.batch_size}, "
            f"lr {config.lr:g} x{config.gamma:g} at {milestones}, momentum {config.momentum:g}"
            f"{' (Nesterov)' if config.nesterov else ''}, weight decay {config.weight_decay:g} on all parameters, "
            f"seed {config.seed}"
        )

    def _train_epoch(self, checkpoints: Checkpoints) -> None:
        """Takes the rest of the epoch that the state is in."""
        config, done, session = self.config, self.done, self.session
        epoch = done.epochs
        first = int(self.state.step) - epoch * self.steps_per_epoch
        order = train.epoch_order(self.order_key, epoch, len(self.splits["train"].labels), config.batch_size)
        self.progress.begin(epoch + 1, config.epochs, self.steps_per_epoch, first)
        start = first
        while start < self.steps_per_epoch:
            end = min(self.steps_per_epoch, start + session.stretch(self.steps_per_epoch))
            began = time.perf_counter()
            self.state, rows = self.loop(self.state, self.splits["train"], order, start, end, self.image_key)
            taken = len(rows.loss)
            seconds = time.perf_counter() - began
            bad = np.flatnonzero(~np.isfinite(rows.loss))
            if len(bad):
                step = epoch * self.steps_per_epoch + start + int(bad[0])
                raise NonFiniteLoss(
                    f"the loss is {rows.loss[bad[0]]} at step {step} (epoch {epoch + 1}): the checkpoint before it, if "
                    f"any, is whole in {self.out / 'checkpoints'}. A lower --lr or --precision float32 may help"
                )
            if self.device.platform != "cpu":
                self.progress.step(taken)
            session.count(taken, seconds)
            done.step_seconds = session.step_seconds
            done.seconds += seconds
            done.loss_sum += float(rows.loss.astype(np.float64).sum())
            done.correct += int(rows.correct.sum())
            start += taken
            if session.steps == 3:
                self._estimate()
            if self.stop():
                self._save_and_stop(checkpoints)
            left = session.left(self.total_steps - int(self.state.step), self.steps_per_epoch)
            accuracy = done.correct / (start * config.batch_size)
            if session.steps > 1:  # the first one's time is mostly compilation
                self.progress.show(done.loss_sum / start, accuracy, config.batch_size / session.step_seconds, left)

    def _estimate(self) -> None:
        """Says how long the whole will take, once a step has been measured."""
        session = self.session
        left = session.left(self.total_steps - int(self.state.step), self.steps_per_epoch)
        self.progress.say(
            f"time     {session.step_seconds:.3g} s a step after {session.compile_seconds:.1f} s of compilation: about "
            f"{report.duration(left)} to go, evaluation not counted"
        )
        if left > 3600 and self.device.platform == "cpu":
            self.progress.say(
                "         on a CPU that is long; shorter: --depth 20, --epochs N, --limit-train N, --dataset digits, or a "
                "GPU (pip install 'jax[cuda13]')"
            )

    def _save_and_stop(self, checkpoints: Checkpoints) -> None:
        self.progress.end()
        checkpoints.save(self.state, dataclasses.asdict(self.done))
        self._save_weights("last.safetensors", {})
        self.progress.say(
            f"stopped  at step {int(self.state.step):,} of {self.total_steps:,}, saved; the same command with "
            f"--out {shlex.quote(str(self.out))} --resume goes on from there"
        )
        raise Interrupted(self.stop.signal)

    def _end_epoch(self, metrics: report.Metrics) -> None:
        """Evaluates, reports, and keeps the best weights."""
        config, done = self.config, self.done
        self.progress.end()
        began = time.perf_counter()
        step = int(self.state.step)
        epoch = step // self.steps_per_epoch
        results = {name: self._evaluate(name) for name in self.splits if name != "train"}
        self.session.eval_seconds = time.perf_counter() - began
        done.seconds += self.session.eval_seconds
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "lr": float(self.schedule(step - 1)),
            "train_loss": done.loss_sum / self.steps_per_epoch,
            "train_accuracy": done.correct / (self.steps_per_epoch * config.batch_size),
        }
        for name, result in results.items():
            row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        row |= {"images_per_second": config.batch_size / self.session.step_seconds, "seconds": done.seconds}
        metrics.add(row)
        found = {
            name: f"{name} loss {result.loss:.4f}, accuracy {100 * result.accuracy:.2f} %"
            for name, result in results.items()
        }
        self.progress.say(
            f"epoch {epoch}/{config.epochs}: train loss {row['train_loss']:.4f}, accuracy "
            f"{100 * row['train_accuracy']:.2f} %; {'; '.join(found.values())}; {row['images_per_second']:.0f} images/s, "
            f"{report.duration(self.session.left(self.total_steps - step, self.steps_per_epoch))} left"
        )
        accuracy = results[self._judge].accuracy
        if accuracy > done.best_accuracy:
            done.best_accuracy, done.best_epoch = accuracy, epoch
            self._save_weights("best.safetensors", row)
        done.epochs, done.loss_sum, done.correct = epoch, 0.0, 0

    @property
    def _judge(self) -> str:
        """The split on which the best epoch is chosen."""
        return "val" if "val" in self.splits else "test"

    def _evaluate(self, name: str) -> train.Evaluation:
        return train.evaluate(self.eval_step, self.state, self.splits[name], self.config.batch_size)

    def _save_weights(self, name: str, row: dict[str, Any]) -> None:
        config = self.config
        resize = round(config.image_size * 8 / 7) if config.crop == "resized" else None
        preprocessing = Preprocessing(resize, config.image_size, self.pipeline.mean, self.pipeline.std)
        weights.save(
            self.out / name,
            train.model_of(self.graph, self.state),
            config.arch,
            source=f"trained by jresnet on {self.data.name}",
            step=str(int(self.state.step)),
            preprocessing=preprocessing.to_json(),
            categories=json.dumps(self.data.classes),
            metrics=json.dumps(row),
        )

    def _finish(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the last weights, the plots and the summary."""
        config, done = self.config, self.done
        test = self._evaluate("test")
        self._save_weights("last.safetensors", rows[-1])
        title = f"{config.arch} on {self.data.name}, recipe {config.recipe}"
        report.plot_curves(rows, self.out / "curves.png", title)
        report.plot_confusion(
            np.asarray(self.splits["test"].labels), test.predictions, self.data.classes, self.out / "confusion.png",
            f"{title}: {100 * test.accuracy:.2f} % of {len(test.predictions):,} test images, last epoch",
        )  # fmt: skip
        best = rows[done.best_epoch - 1]
        chosen_on = {
            "val": f"the {config.val_split} training images held out for validation",
            "test": "the test images themselves, which flatters it: quote the final accuracy",
        }[self._judge]
        summary = {
            "arch": config.arch,
            "parameters": self.parameters,
            "dataset": {
                "name": self.data.name,
                "source": self.data.source,
                "notes": self.data.notes,
                "verified": self.data.verified,
                "digest": self.data.digest,
                **{f"{name}_images": len(split.labels) for name, split in self.splits.items()},
            },
            "final": {"epoch": config.epochs, "test_loss": test.loss, "test_accuracy": test.accuracy},
            "best": {key: best[key] for key in best if key == "epoch" or key.startswith(("val_", "test_"))},
            "best_chosen_on": chosen_on,
            "seconds": done.seconds,
            "compile_seconds": self.session.compile_seconds,
            "images_per_second": rows[-1]["images_per_second"],
            "device": f"{self.device.device_kind} ({self.device.platform})",
            "precision": config.precision,
            "seed": config.seed,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("jresnet", "jax", "jaxlib", "flax", "optax", "numpy")},
            "command": shlex.join(sys.argv),
        }
        weights.write_atomically(self.out / "summary.json", json.dumps(summary, indent=1).encode())
        self.progress.say(
            f"done     {100 * test.accuracy:.2f} % of {len(test.predictions):,} test images after the last epoch; best "
            f"{100 * done.best_accuracy:.2f} % in epoch {done.best_epoch}, chosen on {chosen_on}"
        )
        self.progress.say(f"results  {self.out}")
        return summary

    def _config_file(self) -> bytes:
        values = {"run": dataclasses.asdict(self.config), "command": shlex.join(sys.argv)}
        return json.dumps(values, indent=1).encode()


@dataclass
class Done:
    """What a checkpoint keeps of a run beside its state; JSON values."""

    epochs: int = (
        0  # trained, evaluated and in metrics.jsonl; a signal may fall between the last step and the evaluation
    )
    loss_sum: float = 0.0  # of the steps taken in the current epoch
    correct: int = 0  # images of those steps that were classified rightly
    best_accuracy: float = -1.0  # share, on the split that judges
    best_epoch: int = 0
    step_seconds: float = 0.0  # what a step took lately
    seconds: float = 0.0  # training and evaluation, over all sessions, compilation included


class Session:
    """The pace of this process: what compilation, a step and an evaluation take."""

    def __init__(self, step_seconds: float) -> None:
        self.steps = 0  # taken in this session
        self.compile_seconds = 0.0
        self.step_seconds = step_seconds  # as the session before measured it, until this one has
        self.eval_seconds = 0.0
        self._timed_steps, self._timed_seconds = 0, 0.0

    def stretch(self, steps_per_epoch: int) -> int:
        """How many steps to take before the next look: one that compiles, two to measure, then a tenth of an epoch."""
        return {0: 1, 1: 2}.get(self.steps, -(-steps_per_epoch // FETCHES))

    def count(self, steps: int, seconds: float) -> None:
        """``steps`` were taken in ``seconds``."""
        if self.steps == 0:
            self.compile_seconds = self.step_seconds = seconds
        else:
            self._timed_steps, self._timed_seconds = self._timed_steps + steps, self._timed_seconds + seconds
            if self.steps == 1:
                self.compile_seconds -= seconds / max(steps, 1)
            self.step_seconds = self._timed_seconds / max(self._timed_steps, 1)
        self.steps += steps

    def left(self, steps: int, steps_per_epoch: int) -> float:
        """Seconds that ``steps`` more will take, with their evaluations."""
        return steps * self.step_seconds + steps / steps_per_epoch * self.eval_seconds


def load_data(config: RunConfig, data_dir: Path | None) -> Dataset:
    """The configured dataset; raises DataError and DownloadError as :mod:`jresnet.data` says."""
    if config.dataset == "digits":
        return jresnet.data.load_digits()
    return jresnet.data.load_cifar10(data_dir)


def split_dataset(config: RunConfig, data: Dataset) -> dict[str, train.Images]:
    """``train``, ``test`` and, with a validation split, ``val`` on the device; the test images are last.

    The validation images are the last ``val_split`` training images (for 5,000 of CIFAR-10 the sizes of He et al.);
    the limits take the first images of what is then left.
    """
    kept = len(data.train.labels) - config.val_split
    if kept < 1:
        raise InputError(f"--val-split {config.val_split} leaves none of the {len(data.train.labels)} training images")

    def on_device(split: Split, part: slice) -> train.Images:
        return train.Images(jnp.asarray(split.images[part]), jnp.asarray(split.labels[part], jnp.int32))

    splits = {"train": on_device(data.train, slice(0, min(kept, config.limit_train or kept)))}
    if config.val_split:
        splits["val"] = on_device(data.train, slice(kept, None))
    splits["test"] = on_device(data.test, slice(0, config.limit_test))
    return splits


def check_out(config: RunConfig, out: Path, resume: bool) -> None:
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
    changed = [
        f"{field.name} was {getattr(before, field.name)!r}, now {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if before is not None and getattr(before, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise InputError(f"--resume goes on with the run in {out} as it was begun, but {'; '.join(changed)}")
