"""A whole training run: configuration in, a folder of results out. ``scripts/train_cifar10.py`` is its command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet import files
from jresnet.data.dataset import Dataset
from jresnet.reports import compare as report
from jresnet.training import devices
from jresnet.training import metrics as logs
from jresnet.training import nans as debug
from jresnet.training import outputs as folder
from jresnet.training import step as train
from jresnet.training.checkpoint import Checkpoints, Lock
from jresnet.training.config import RunConfig
from jresnet.training.devices import Devices
from jresnet.training.program import Program, describe
from jresnet.training.stop import Interrupted, StopRequest

ROLLBACKS = 3  # how often a run goes back to its last checkpoint
STRETCH = 2.0  # seconds of training between two looks: at metrics, signals and the clock


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite; the message names the step."""


@dataclass(frozen=True)
class Options:
    """What a run's outcome does not depend on."""

    checkpoint_minutes: float | None = 10.0  # between checkpoints within an epoch; None: only at its end
    debug_nans: bool = False  # look for the layer where a non-finite loss comes from; slower
    deterministic: bool = False  # for config.json: the flags are set before JAX starts
    wandb: str | None = None  # project at Weights & Biases


class Trainer:
    """One run. Made without touching the disk; :meth:`fit` does the work.

    Args:
        config: what to do.
        data: the dataset, of :func:`load_data`.
        out: the folder for the results.
        stop: asked between steps; when it says yes the state is saved and the run ends.
        program: of the same configuration but for the seed; a new one by default.
        options: of the session.
        whole: where this is one run of several, the folder of them all, with which ``--resume`` goes on.

    Raises:
        InputError: where data and configuration do not go together.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        out: Path,
        stop: StopRequest | None = None,
        program: Program | None = None,
        options: Options | None = None,
        whole: Path | None = None,
    ):
        self.config, self.data, self.out, self.whole = config, data, out, whole or out
        self.stop, self.options = stop or StopRequest(), options or Options()
        self.program = program or Program(config, data)
        self.steps_per_epoch, self.total_steps = self.program.steps_per_epoch, self.program.total_steps
        self.first = devices.is_first()
        memory = "host memory" if self.program.devices.platform == "cpu" else "device memory"
        self.progress = logs.Progress(quiet=not self.first, memory=memory)
        self.state = self.program.state(config.seed)
        self.order_key, self.image_key = jax.random.split(jax.random.key(config.seed))
        self.done = Done()

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and writes the results.

        Args:
            resume: go on from the newest checkpoint in the folder, or begin where there is none.

        Returns:
            The contents of ``summary.json``.

        Raises:
            InputError: where the folder cannot be used, is in use, or holds another run.
            WeightsError: where no checkpoint to go on from is whole.
            NonFiniteLoss: the last good checkpoint is left alone.
            Interrupted: after a signal; the state is saved.
        """
        with contextlib.ExitStack() as stack:
            if self.first:
                folder.check(self.config, self.out, resume)  # before anything is written
                folder.make(self.out)
                lock = stack.enter_context(Lock(self.out))
                if lock.note:
                    self.progress.say(f"note     {lock.note}")
                folder.check(self.config, self.out, resume)  # another run may just have ended
                checkpoints = stack.enter_context(Checkpoints(self.out / "checkpoints"))
                folder.write_config(self.out, self.config, options=dataclasses.asdict(self.options))
            else:
                checkpoints = None
            self._introduce()
            if resume:
                self._restore(checkpoints)
            self.progress.say(self._compile())
            wandb = self._wandb() if self.first and self.options.wandb else None
            metrics = logs.Metrics(self.out, self.done.epochs, wandb) if self.first else None
            stack.callback(lambda: metrics.close() if metrics else None)
            stack.callback(self.progress.end)
            self.session = Session(self.done.step_seconds)
            self.saved_at = time.monotonic()
            while self.done.epochs < self.config.epochs:
                try:
                    self._train_epoch(checkpoints)
                    self._end_epoch(checkpoints, metrics)
                except NonFiniteLoss as error:
                    if self.config.on_nan == "stop" or self.done.rollbacks == ROLLBACKS:
                        raise
                    self._roll_back(checkpoints, error)
                    if metrics:
                        metrics.rewind(self.done.epochs)
            if checkpoints:
                checkpoints.wait()
            return self._finish(metrics.rows if metrics else [])

    def _introduce(self) -> None:
        config, program, say = self.config, self.program, self.progress.say
        where = program.devices
        count = f"{where.count} x " if where.count > 1 else ""
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(f"device   {count}{where.first.device_kind} ({where.platform}){processes}, {config.precision}")
        say(
            f"network  {config.arch}, {config.stem} stem, {len(self.data.classes)} classes, "
            f"{program.parameters:,} parameters"
        )
        counts = ", ".join(f"{count:,} {name}" for name, count in program.images.items())
        say(f"data     {self.data.name}: {counts} images, from {self.data.source}")
        for note in self.data.notes:
            say(f"note     {note}")
        for line in describe(config, program):
            say(line)

    def _compile(self) -> str:
        program = self.program
        compiled = program.compile_seconds > 0
        try:
            program.compile(self.state, self._order(0), self._keys()[1], self.stop)
        except Interrupted:
            self.progress.say("stopped  while compiling: nothing is lost, --resume goes on")
            raise
        return "compiled already" if compiled else f"compiled in {program.compile_seconds:.1f} s"

    def _keys(self) -> tuple[jax.Array, jax.Array]:
        """The keys of order and augmentation: others after each rollback."""
        keys = self.order_key, self.image_key
        if self.done.rollbacks:
            keys = tuple(jax.random.fold_in(key, self.done.rollbacks) for key in keys)  # type: ignore[assignment]
        return keys[0], self.program.devices.replicate(keys[1])

    def _order(self, epoch: int) -> np.ndarray:
        return np.asarray(
            train.epoch_order(self._keys()[0], epoch, self.program.images["train"], self.config.batch_size)
        )

    def _train_epoch(self, checkpoints: Checkpoints | None) -> None:
        """Takes the rest of the epoch that the state is in."""
        config, done, session, program = self.config, self.done, self.session, self.program
        epoch = done.epochs
        start = int(self.state.step) - epoch * self.steps_per_epoch
        order, (_, image_key) = self._order(epoch), self._keys()
        self.progress.begin(epoch + 1, config.epochs, self.steps_per_epoch, start)
        alone = jax.process_count() == 1
        while start < self.steps_per_epoch:
            end = min(
                self.steps_per_epoch, start + (1 if self.options.debug_nans else session.stretch(self.steps_per_epoch))
            )
            before = jax.tree.map(jnp.copy, self.state) if self.options.debug_nans else None
            began = time.perf_counter()
            self.state, rows = program.loop(
                self.state, program.train_images, order, start, end, image_key,
                stop=self.stop if alone else lambda: False, after_step=self.progress.step,
            )  # fmt: skip
            taken = len(rows.loss)
            if program.loop.on_device:
                self.progress.step(taken)
            bad = np.flatnonzero(~np.isfinite(rows.loss))
            if len(bad):
                reason = f"the loss is {rows.loss[bad[0]]}"
                self._not_finite(reason, epoch * self.steps_per_epoch + start + int(bad[0]), before, order)
            if before is not None and not self.program.finite(self.state):
                self._not_finite("a weight is not finite", int(self.state.step) - 1, before, order)
            session.count(taken, time.perf_counter() - began)
            done.step_seconds = session.step_seconds
            done.seconds += time.perf_counter() - began
            done.loss_sum += float(rows.loss.astype(np.float64).sum())
            done.correct += int(rows.correct.sum())
            start += taken
            if session.estimates():
                self._estimate()
            stops, due = self._agreed()
            if stops:
                self._save_and_stop(checkpoints)
            if due and start < self.steps_per_epoch:
                self._save(checkpoints)
            if session.step_seconds:
                self.progress.show(
                    done.loss_sum / start,
                    done.correct / (start * config.batch_size),
                    config.batch_size / session.step_seconds,
                    self._left(),
                    1 / (session.step_seconds * self.steps_per_epoch + session.eval_seconds),
                    logs.device_memory(program.devices.first),
                )

    def _not_finite(self, reason: str, step: int, before: train.TrainState | None, order: np.ndarray) -> None:
        """Raises :class:`NonFiniteLoss`, with the layer where the state before the step is at hand."""
        message = f"{reason} at step {step} (epoch {step // self.steps_per_epoch + 1})"
        if before is None:
            message += (
                f": the checkpoint before it, if any, is whole in {self.out / 'checkpoints'}. A lower --lr, --clip-norm or "
                "--precision float32 may help, --on-nan rollback goes back by itself, --debug-nans names the layer"
            )
        else:
            program, config = self.program, self.config
            images, targets = jax.jit(
                train.prepare(program.pipeline, program.steps_per_epoch, config.label_smoothing), static_argnums=4
            )(
                before.step,
                program.train_images,
                order[step % self.steps_per_epoch],
                self._keys()[1],
                len(self.data.classes),
            )
            model = nnx.merge(program.graph, *jax.tree.map(np.asarray, (before.params, before.batch_stats)))
            found = debug.find_non_finite(model, *(jnp.asarray(np.asarray(part)) for part in (images, targets)))
            message += "".join(
                f"\n  {line}" for line in found or ["forward and backward pass are finite: the update is not"]
            )
        raise NonFiniteLoss(message)

    def _agreed(self) -> tuple[bool, bool]:
        """Whether a signal ends the run here, and whether a checkpoint is due: in all processes at the same step.

        Any process may have heard the signal; the clock is the first one's.
        """
        minutes = self.options.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        if jax.process_count() == 1:
            return self.stop(), due
        heard = devices.together(np.array([self.stop.signal or 0, due, self.session.step_seconds]))
        _, due, self.session.step_seconds = heard[0].tolist()  # the next stretch must be as long for all
        signals = [int(number) for number, *_ in heard if number]
        self.stop.signal = self.stop.signal or (signals[0] if signals else None)
        return bool(signals), bool(due)

    def _left(self) -> float:
        return self.session.left(self.total_steps - int(self.state.step), self.steps_per_epoch)

    def _estimate(self) -> None:
        """Says how long the whole will take, once a step has been measured."""
        left = self._left()
        self.progress.say(
            f"time     {self.session.step_seconds:.3g} s a step: about {logs.duration(left)} to go, evaluation not counted"
        )
        if left > 3600 and self.program.devices.platform == "cpu":
            self.progress.say(
                "         on a CPU that is long; shorter: --depth 20, --epochs N, --limit-train N, --dataset digits, or a "
                "GPU (pip install 'jax[cuda13]')"
            )

    def _save(self, checkpoints: Checkpoints | None, score: float | None = None) -> None:
        """Begins a checkpoint."""
        if not self.program.finite(self.state):
            step = int(self.state.step) - 1
            self._not_finite("a weight is not finite after a finite loss", step, None, np.zeros(0))
        if checkpoints:
            checkpoints.save(self.state, dataclasses.asdict(self.done), score)
        self.saved_at = time.monotonic()

    def _save_and_stop(self, checkpoints: Checkpoints | None) -> None:
        self.progress.end()
        self._save(checkpoints)
        if checkpoints:
            checkpoints.wait()
        self._save_weights("last.safetensors", {})
        self.progress.say(
            f"stopped  at step {int(self.state.step):,} of {self.total_steps:,}, saved; the same command with "
            f"--out {shlex.quote(str(self.whole))} --resume goes on from there"
        )
        raise Interrupted(self.stop.signal)

    def _restore(self, checkpoints: Checkpoints | None) -> None:
        """Goes on from the newest whole checkpoint, or begins."""
        found = checkpoints.restore(self.state) if checkpoints else None
        for note in found.notes if found else ():
            self.progress.say(f"note     {note}")
        if devices.together(np.array([found is not None]))[0][0]:
            if jax.process_count() > 1:  # process 0 has read it for all
                text = json.dumps(found.progress).encode() if found else b""
                values = (found.state if found else self.state), np.frombuffer(text.ljust(4096), np.uint8)
                state, text = devices.from_first(values)
                self.state, progress = self.program.devices.replicate(state), json.loads(bytes(text))
            else:
                assert found is not None
                self.state, progress = found.state, found.progress
            self.done = Done(**progress)
            self.progress.say(f"resumed  at step {int(self.state.step):,} of {self.total_steps:,}")
        else:
            self.progress.say("resumed  nothing: no checkpoint yet, so the run begins")

    def _roll_back(self, checkpoints: Checkpoints | None, error: NonFiniteLoss) -> None:
        """Goes back to the last checkpoint, or to the beginning, and on in another order."""
        self.progress.end()
        rollbacks = self.done.rollbacks + 1
        self.progress.say(f"rollback {rollbacks} of {ROLLBACKS}: {str(error).partition(':')[0]}")
        if checkpoints:
            checkpoints.wait()
        self.state, self.done = self.program.state(self.config.seed), Done()
        self._restore(checkpoints)
        self.done.rollbacks = rollbacks

    def _end_epoch(self, checkpoints: Checkpoints | None, metrics: logs.Metrics | None) -> None:
        """Evaluates, reports, and keeps the best weights."""
        config, done, program = self.config, self.done, self.program
        self.progress.end()
        began = time.perf_counter()
        step = int(self.state.step)
        epoch = step // self.steps_per_epoch
        stop = self.stop if jax.process_count() == 1 else (lambda: False)
        results = {name: program.evaluate(self.state, name, stop) for name in program.splits if name != "train"}
        if None in results.values():
            self._save_and_stop(checkpoints)
        found = {name: result for name, result in results.items() if result}
        self.session.eval_seconds = time.perf_counter() - began
        done.seconds += self.session.eval_seconds
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "lr": float(program.schedule(step - 1)),
            "train_loss": done.loss_sum / self.steps_per_epoch,
            "train_accuracy": done.correct / (self.steps_per_epoch * config.batch_size),
        }
        for name, result in found.items():
            row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        row |= {"images_per_second": config.batch_size / self.session.step_seconds, "seconds": done.seconds}
        if metrics:
            metrics.add(row)
        splits = "; ".join(
            f"{name} loss {result.loss:.4f}, accuracy {100 * result.accuracy:.2f} %" for name, result in found.items()
        )
        self.progress.say(
            f"epoch {epoch}/{config.epochs}: train loss {row['train_loss']:.4f}, accuracy "
            f"{100 * row['train_accuracy']:.2f} %; {splits}; {row['images_per_second']:.0f} images/s, "
            f"{logs.duration(self._left())} left"
        )
        accuracy = found[self._judge].accuracy
        if accuracy > done.best_accuracy:
            done.best_accuracy, done.best_epoch = accuracy, epoch
            self._save_weights("best.safetensors", row)
        done.epochs, done.loss_sum, done.correct = epoch, 0.0, 0
        self._save(checkpoints, accuracy)

    @property
    def _judge(self) -> str:
        """The split on which the best epoch is chosen."""
        return "val" if "val" in self.program.splits else "test"

    def _save_weights(self, name: str, row: dict[str, Any]) -> None:
        if self.first:
            folder.save_weights(self.out / name, self.program, self.state, row)

    def _finish(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the last weights, the plots and the summary."""
        test = self.program.evaluate(self.state, "test")
        assert test is not None
        if not self.first:
            return {}
        done = self.done
        self._save_weights("last.safetensors", rows[-1])
        more = {"rollbacks": done.rollbacks, "seconds": done.seconds, "seed": self.config.seed}
        summary = folder.finish(self.out, self.program, rows, test, self._judge, rows[done.best_epoch - 1], more)
        self.progress.say(
            f"done     {100 * test.accuracy:.2f} % of {len(test.predictions):,} test images after the last epoch; best "
            f"{100 * done.best_accuracy:.2f} % in epoch {done.best_epoch}, chosen on {summary['best_chosen_on']}"
        )
        self.progress.say(f"results  {self.out}")
        return summary

    def _wandb(self) -> logs.WandB:
        assert self.options.wandb is not None
        name = f"{self.out.parent.name}/{self.out.name}"  # a seed's folder alone is seed-0 in every run
        return logs.WandB(self.options.wandb, name, dataclasses.asdict(self.config), self.out)


@dataclass
class Done:
    """What a checkpoint keeps of a run beside its state; JSON values."""

    # trained, evaluated and in metrics.jsonl; a signal may fall between the last step and the evaluation
    epochs: int = 0
    loss_sum: float = 0.0  # of the steps taken in the current epoch
    correct: int = 0  # images of those steps that were classified rightly
    best_accuracy: float = -1.0  # share, on the split that judges
    best_epoch: int = 0
    step_seconds: float = 0.0  # what a step took lately
    seconds: float = 0.0  # training and evaluation, over all sessions, compilation not included
    rollbacks: int = 0


class Session:
    """The pace of this process: what a step and an evaluation take."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds  # as the session before measured it, until this one has
        self.eval_seconds = 0.0
        self._looks, self._steps, self._seconds = 0, 0, 0.0

    def stretch(self, steps_per_epoch: int) -> int:
        """How many steps to take before the next look: one to measure, then a tenth of an epoch or ``STRETCH`` seconds."""
        if self._looks == 0:
            return 1
        return max(1, min(-(-steps_per_epoch // 10), int(STRETCH / max(self.step_seconds, 1e-6))))

    def count(self, steps: int, seconds: float) -> None:
        """``steps`` were taken in ``seconds``."""
        self._looks += 1
        if self._looks == 2:  # the first step is slower: memory is allocated
            self._steps, self._seconds = 0, 0.0
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self.step_seconds = self._seconds / max(self._steps, 1)

    def estimates(self) -> bool:
        """Whether this is the moment to say how long the run will take."""
        return self._looks == 2

    def left(self, steps: int, steps_per_epoch: int) -> float:
        """Seconds that ``steps`` more will take, with their evaluations."""
        return steps * self.step_seconds + steps / steps_per_epoch * self.eval_seconds


def fit_seeds(
    config: RunConfig,
    data: Dataset,
    out: Path,
    runs: int,
    resume: bool = False,
    stop: StopRequest | None = None,
    where: Devices | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Runs of the seeds ``config.seed``, ``config.seed + 1``, ..., one after the other, compiled once.

    Each is a run of its own in ``out/seed-N``; ``out/summary.json`` holds mean and standard deviation. One after the other
    since at once, under ``jax.vmap``, kernels that differ by seed become grouped convolutions, which are slower on a CPU
    (docs/log/2026-11-seeds-at-once.md).

    Args:
        config: of the first.
        data: the dataset, of :func:`load_data`.
        out: the folder for the folders.
        runs: how many.
        resume: go on with those that are not finished.
        stop: as for :class:`Trainer`.
        where: as for :class:`Program`.
        options: as for :class:`Trainer`.

    Returns:
        The contents of ``summary.json``.

    Raises:
        InputError: see :meth:`Trainer.fit`, as for the other exceptions.
    """
    first = devices.is_first()
    with contextlib.ExitStack() as stack:
        if first:
            folder.check(config, out, resume)
            folder.make(out)
            stack.enter_context(Lock(out))
            folder.write_config(out, config, runs=runs)
        program = Program(config, data, where)
        summaries = []
        for seed in range(config.seed, config.seed + runs):
            seed_out = out / f"seed-{seed}"
            finished = (seed_out / "summary.json").exists() if first else False
            if resume and devices.together(np.array([finished]))[0][0]:
                summaries.append(json.loads((seed_out / "summary.json").read_text()) if first else {})
                continue
            again = dataclasses.replace(config, seed=seed)
            trainer = Trainer(again, data, seed_out, stop, program, options, out)
            trainer.progress.say(f"run      seed {seed}, {len(summaries) + 1} of {runs}")
            summaries.append(trainer.fit(resume=resume))
        if not first:
            return {}
        summary = report.summarise(summaries)
        files.write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
        accuracy = summary["final"]["test_accuracy"]
        spread = f" ± {100 * accuracy['std']:.2f}" if runs > 1 else ""
        logs.Progress().say(
            f"all      {100 * accuracy['mean']:.2f}{spread} % of the test images, mean"
            f"{' ± standard deviation' * (runs > 1)} of {runs} seeds; {out}"
        )
        return summary
