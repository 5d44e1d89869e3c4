"""Runs training from a configuration and writes a folder of results; :mod:`jresnet.commands.train` is its command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jresnet.data.dataset import Dataset
from jresnet.errors import DataError, InputError
from jresnet.reports.metrics_file import duration
from jresnet.training import console, devices, fields
from jresnet.training.config import RunConfig
from jresnet.training.console import Console
from jresnet.training.feed import Feed, every_image
from jresnet.training.fields import option
from jresnet.training.guard import ROLLBACKS, Guard, NonFiniteLoss, next_rollback
from jresnet.training.loop import Evaluation, Order, Pace
from jresnet.training.outputs import Outputs
from jresnet.training.program import Program
from jresnet.training.step import Images, Metrics, TrainState
from jresnet.training.stop import Interrupted, StopRequest

TROUBLE = "when something is wrong"
PAUSE = 10.0  # least seconds between checkpoints on an accelerator, where an epoch may take half a second


@dataclass(frozen=True)
class Options:
    """Settings that do not affect the result of a run."""

    checkpoint_minutes: float | None = option(  # None: only at an epoch's end
        "a checkpoint every N minutes within an epoch, besides the one at its end",
        "results",
        10.0,
        metavar="N",
        least=0,
    )
    checkpoint_seconds: float | None = option(
        "no checkpoint at the end of an epoch within N seconds of the previous one, except after the last epoch; the best "
        "weights are written with a checkpoint",
        "results", None, metavar="N", none=f"0 on a CPU, {PAUSE:g} elsewhere", least=0,
    )  # fmt: skip
    wandb: str | None = option(
        "also report to Weights & Biases (pip install wandb)", "results", None, metavar="PROJECT"
    )
    debug_nans: bool = option("name the layer that causes a non-finite loss; slower", TROUBLE, False, switch=True)
    deterministic: bool = option(  # recorded here for config.json; the command sets XLA's flags before XLA starts
        "bitwise reproducible results on a GPU, slower; results on CPU and TPU are always reproducible",
        TROUBLE,
        False,
        switch=True,
    )

    def check(self) -> None:
        """Raises :class:`InputError` that lists all values out of range."""
        if found := fields.problems(self):
            raise InputError("; ".join(found))


@dataclass
class Done:
    """The progress of a run that a checkpoint stores in addition to the state; JSON values."""

    # epochs that are trained, evaluated and in metrics.jsonl; a signal may arrive after the last step, before the evaluation
    epochs: int = 0
    loss_sum: float = 0.0  # sum of losses over the steps of the current epoch
    correct: int = 0  # number of correctly classified images in these steps
    best_accuracy: float = -1.0  # fraction of the images of the split that chooses the best epoch
    best_epoch: int = 0
    step_seconds: float = 0.0  # recent duration of a step
    seconds: float = 0.0  # training and evaluation over all sessions, without compilation
    rollbacks: int = 0

    def count(self, rows: Metrics) -> None:
        """Adds the metrics of some steps."""
        self.loss_sum += float(np.asarray(rows.loss, np.float64).sum())
        self.correct += int(rows.correct.sum())


class Trainer:
    """A training run. Creating it does not write to disk; :meth:`fit` does the work.

    Args:
        config: the configuration.
        data: the data set, from :func:`jresnet.training.program.load_data`.
        out: folder for the results.
        stop: called between steps; if it returns true, the state is saved and the run ends.
        program: a program of the same configuration, possibly with another seed; a new one by default.
        options: settings of the session.

    Raises:
        InputError: data and configuration do not match.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        out: Path,
        stop: StopRequest | None = None,
        program: Program | None = None,
        options: Options | None = None,
    ):
        self.config, self.stop, self.options = config, stop or StopRequest(), options or Options()
        self.program = program or Program(config, data)
        memory = "host memory" if self.program.devices.platform == "cpu" else "device memory"
        self.console = Console(quiet=not devices.is_first(), memory=memory)
        self.outputs = Outputs(out, config, self.program, self.console.say)
        self.guard = Guard(self.program, out / "checkpoints", self.options.debug_nans)
        self.judge = "val" if "val" in self.program.splits else "test"  # the split that chooses the best epoch
        self.state, self.done, self.pace = self.program.state(config.seed), Done(), Pace()
        self._draw_keys()
        self.source = self.program.source(config.seed)
        self.saved_at = time.monotonic()
        self.best: tuple[TrainState, dict[str, Any]] | None = None  # with its row; written with the next checkpoint
        usual = 0.0 if self.program.devices.platform == "cpu" else PAUSE
        self.pause = usual if self.options.checkpoint_seconds is None else self.options.checkpoint_seconds

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and writes the results.

        Args:
            resume: continue from the newest checkpoint in the folder, or start if there is none.

        Returns:
            The contents of ``summary.json``; an empty dict in all processes but the first.

        Raises:
            InputError: the folder cannot be used, is in use, or contains another run.
            WeightsError: all checkpoints are damaged.
            NonFiniteLoss: a loss or weight is NaN or infinite; the last good checkpoint is kept.
            Interrupted: a signal arrived; the state is saved.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.outputs.opened(resume, options=dataclasses.asdict(self.options)))
            stack.callback(self.console.end)
            stack.callback(self._close)
            stack.callback(self._write_best)  # also if an error ends the run
            for line in console.introduction(self.config, self.program, jax.process_count()):
                self.console.say(line)
            if not (resume and self._restore()):
                self._begin_from_weights()
            self._compile()
            self.outputs.begin_rows(self.done.epochs, int(self.state.step), self.options.wandb)
            self.pace, self.saved_at = Pace(self.done.step_seconds), time.monotonic()
            while self.done.epochs < self.config.epochs:
                try:
                    self._epoch()
                except NonFiniteLoss as error:
                    self._roll_back(error)
                except DataError as error:
                    self._save_what_is(error)
            self.outputs.wait()
            return self._finish()

    def _epoch(self) -> None:
        """Trains the rest of the current epoch, evaluates, and records the results."""
        program, done, pace, steps = self.program, self.done, self.pace, self.program.steps_per_epoch
        split, order, key = self._split(done.epochs), self._order(done.epochs), self.image_key
        taken = int(self.state.step) - done.epochs * steps
        self.console.begin(done.epochs + 1, self.config.epochs, steps, taken)
        while taken < steps:
            end = self._end(taken)
            before, began = self.guard.copy(self.state), time.perf_counter()
            self.state, rows = program.loop(
                self.state, split, order, taken, end, key, self._stop_at_once, self.console.step
            )
            self.guard.check(self.state, np.asarray(rows.loss), before, split, order, key)
            pace.count(len(rows.loss), time.perf_counter() - began)
            done.count(rows)
            self.outputs.steps(int(self.state.step), np.asarray(rows.loss))
            done.seconds, done.step_seconds = done.seconds + time.perf_counter() - began, pace.step_seconds
            taken += len(rows.loss)
            stops, due = self._agree()
            if stops:
                self._save_and_stop()
            if due and taken < steps:
                self.guard.check_weights(self.state)
                self._save()
            self._show(taken)

        self.console.end()
        self.guard.check_weights(self.state)
        results = self._evaluate()
        row = self._row(results)
        self.outputs.row(row)
        done.epochs, done.loss_sum, done.correct = row["epoch"], 0.0, 0
        self.console.say(console.epoch_line(row, self.config.epochs, self._left()))
        judged = results[self.judge]
        # an epoch with non-finite logits is never the best
        score = judged.accuracy if math.isfinite(judged.loss) else None
        due = done.epochs == self.config.epochs or time.monotonic() - self.saved_at >= self.pause
        if score is not None and score > done.best_accuracy:
            done.best_accuracy, done.best_epoch = score, done.epochs
            # All processes must call the same programs, so this does not depend on a clock.
            self.best = program.snapshot(self.state) if self.pause else self.state, row
        if due:
            self._save(score)

    def _evaluate(self) -> dict[str, Evaluation]:
        """Evaluates every split except the training images; saves and stops if a signal arrives."""
        began = time.perf_counter()
        results: dict[str, Evaluation] = {}
        for name in (name for name in self.program.splits if name != "train"):
            result = self.program.evaluate(self.state, name, self._watched(name))
            if result is None:
                self._save_and_stop()
            results[name] = result
        self.pace.eval_seconds = time.perf_counter() - began
        self.done.seconds += self.pace.eval_seconds
        return results

    def _row(self, results: dict[str, Evaluation]) -> dict[str, Any]:
        """The row of metrics.jsonl for the current epoch."""
        step, steps, batch = int(self.state.step), self.program.steps_per_epoch, self.config.batch_size
        scores = {
            f"{name}_{figure}": getattr(results[name], figure)
            for name in self.program.splits
            if name in results
            for figure in ("loss", "accuracy")
        }
        return {
            "epoch": step // steps,
            "step": step,
            "lr": float(self.program.schedule(step - 1)),
            "train_loss": self.done.loss_sum / steps,
            "train_accuracy": self.done.correct / (steps * batch),
            **scores,
            "images_per_second": batch / self.pace.step_seconds,
            "seconds": self.done.seconds,
        }

    def _finish(self) -> dict[str, Any]:
        """Writes the last weights, the figures and the summary."""
        test = self.program.evaluate(self.state, "test", self._watched("test", stops=False))
        assert test is not None  # it was not asked to stop
        done, rows = self.done, self.outputs.rows
        self.outputs.weights("last.safetensors", self.state, rows[-1] if rows else {})
        summary = self.outputs.finish(test, self.judge, done.best_epoch, rollbacks=done.rollbacks, seconds=done.seconds)
        best = "no epoch's logits were all finite"
        if done.best_epoch:
            chosen_on = summary.get("best_chosen_on")
            best = f"best {100 * done.best_accuracy:.2f} % in epoch {done.best_epoch}, chosen on {chosen_on}"
        self.console.say(
            f"done     {100 * test.accuracy:.2f} % of {len(test.predictions):,} test images after the last epoch; {best}"
        )
        self.console.say(f"results  {self.outputs.out}")
        return summary

    # Starting, stopping and rolling back.

    def _compile(self) -> None:
        known, began = self.program.compile_seconds > 0, time.monotonic()
        if not known:
            self.console.say(
                "compiling the steps of training and evaluation (about a minute; seconds if they are cached)"
            )

        def tick() -> None:
            self.console.minute(lambda: f"compiling, {duration(time.monotonic() - began)} so far")

        try:
            order = self._order(0)[: self._end(0)]
            self.program.compile(self.state, self._split(0), order, self.image_key, self.stop, tick)
        except Interrupted:
            self.console.say("stopped  during compilation: nothing is lost")
            raise
        self.console.say("compiled already" if known else f"compiled in {self.program.compile_seconds:.1f} s")

    def _begin_from_weights(self) -> None:
        """Loads the initial weights, if any, into the state."""
        if self.config.weights is not None:
            self.state, notes = self.program.pretrained(self.config.seed)
            self.console.say(f"weights  the run starts from {self.config.weights}")
            for note in notes:
                self.console.say(f"note     {note}")

    def _restore(self) -> bool:
        """Restores the newest undamaged checkpoint; returns whether there is one."""
        found = self.outputs.restore(self.state)
        if found is None:
            self.console.say("resumed  nothing: there is no checkpoint yet, so the run starts from the beginning")
            return False
        self.state, self.done = found[0], Done(**found[1])
        if self.done.rollbacks:
            self.source = self.program.source(self.config.seed, self.done.rollbacks)
            self._draw_keys()
        self.console.say(f"resumed  at step {int(self.state.step):,} of {self.program.total_steps:,}")
        return True

    def _save(self, score: float | None = None) -> None:
        """Writes the best weights, if they are new, and starts writing a checkpoint."""
        self._write_best()
        self.outputs.checkpoint(self.state, dataclasses.asdict(self.done), score)
        self.saved_at = time.monotonic()

    def _write_best(self) -> None:
        if self.best is not None:
            (state, row), self.best = self.best, None
            self.outputs.weights("best.safetensors", state, row)

    def _save_and_stop(self) -> NoReturn:
        self.console.end()
        self.guard.check_weights(self.state)
        self._save()
        self.outputs.wait()
        self.outputs.weights("last.safetensors", self.state, {})
        self.console.say(
            f"stopped  at step {int(self.state.step):,} of {self.program.total_steps:,}: the state is saved"
        )
        raise Interrupted(self.stop.signal)

    def _save_what_is(self, error: DataError) -> NoReturn:
        """Saves the current state after images became unavailable, and raises the error.

        Processes other than the first save nothing: their exit ends the other processes, and the last checkpoint is kept.
        """
        self.console.end()
        self.guard.check_weights(self.state)
        self._save()
        self.outputs.wait()
        saved = (
            f"the state at step {int(self.state.step):,} is saved"
            if devices.is_first()
            else "the last checkpoint is kept"
        )
        raise DataError(f"{error}\n{saved}: fix the data and resume") from error

    def _roll_back(self, error: NonFiniteLoss) -> None:
        """Returns to the last checkpoint, or to the beginning, and continues in another order; or raises the error."""
        number = next_rollback(error, self.config.on_nan, self.done.rollbacks)
        self.console.end()
        self.console.say(f"rollback {number} of {ROLLBACKS}: {str(error).partition(':')[0]}")
        self.outputs.wait()
        self.state, self.done, self.best = self.program.state(self.config.seed), Done(), None
        if not self._restore():
            self._begin_from_weights()
        self.done.rollbacks = number
        self._draw_keys()
        self._close()
        self.source = self.program.source(self.config.seed, number)
        self.outputs.rewind_rows(self.done.epochs, int(self.state.step))

    # Used by the loop.

    def _split(self, epoch: int) -> Images | Feed:
        """The source of the epoch's batches."""
        return self.source.epoch(epoch, self.program.steps_per_epoch) if isinstance(self.source, Feed) else self.source

    def _close(self) -> None:
        if isinstance(self.source, Feed):
            self.source.close()

    def _order(self, epoch: int) -> Order:
        """The epoch's batches."""
        if isinstance(self.source, Feed):  # the stream determines the order
            return every_image(self.config.batch_size, self.program.steps_per_epoch)
        return self.program.order(self.order_key, epoch)

    def _draw_keys(self) -> None:
        """Sets the random keys of order and augmentation, which change with each rollback."""
        keys = jax.random.split(jax.random.key(self.config.seed))
        order_key, image_key = (
            jax.random.fold_in(key, self.done.rollbacks) if self.done.rollbacks else key for key in keys
        )
        self.order_key, self.image_key = order_key, self.program.devices.replicate(image_key)

    def _end(self, taken: int) -> int:
        """The end of the stretch of steps that begins after ``taken`` steps of the epoch."""
        steps = self.program.steps_per_epoch
        if self.guard.search:
            return taken + 1
        if stretch := self.program.loop.stretch(steps):
            return min(steps, (taken // stretch + 1) * stretch)
        return min(steps, taken + self.pace.stretch(steps))

    def _stop_at_once(self) -> bool:
        """Whether a signal ends the run before the next step or batch; never with several processes, which must agree."""
        return jax.process_count() == 1 and self.stop()

    def _watched(self, name: str, stops: bool = True) -> Callable[[], bool]:
        """A callback before each batch of an evaluation: prints a line per minute and returns whether to stop."""
        done = 0

        def ask() -> bool:
            nonlocal done
            batches = -(-self.program.images[name] // self.program.eval_batch)
            self.console.minute(lambda: f"evaluating {name}: {done:,} of {batches:,} batches")
            done += 1
            return stops and self._stop_at_once()

        return ask

    def _agree(self) -> tuple[bool, bool]:
        """Whether to stop because of a signal, and whether a checkpoint is due; the same in all processes.

        The signal may have arrived in any process; the clock is that of the first.
        """
        minutes = self.options.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        if jax.process_count() == 1:
            return self.stop(), due
        heard = devices.together(np.array([self.stop.signal or 0, due, self.pace.step_seconds]))
        _, due, self.pace.step_seconds = heard[0].tolist()  # so that all processes run the same number of steps next
        signals = [int(number) for number, *_ in heard if number]
        self.stop.signal = self.stop.signal or (signals[0] if signals else None)
        return bool(signals), bool(due)

    def _left(self) -> float:
        """The estimated time until the run ends, in seconds."""
        return self.pace.left(self.program.total_steps - int(self.state.step), self.program.steps_per_epoch)

    def _show(self, taken: int) -> None:
        """Shows the epoch's figures after ``taken`` steps."""
        pace, batch, steps = self.pace, self.config.batch_size, self.program.steps_per_epoch
        if pace.is_first_measured():
            for line in console.estimate(self.config, self.program, pace, self._left()):
                self.console.say(line)
        if pace.step_seconds and taken:
            self.console.show(
                self.done.loss_sum / taken,
                self.done.correct / (taken * batch),
                batch / pace.step_seconds,
                self._left(),
                1 / pace.epoch_seconds(steps),
                console.device_memory(self.program.devices.first),
            )
