"""Many steps and whole splits: the loop over an epoch's batches, evaluation, and the pace of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jresnet import cache
from jresnet.data.dataset import Split
from jresnet.errors import DataError
from jresnet.training.devices import Devices
from jresnet.training.feed import Feed
from jresnet.training.step import Averaged, Images, Metrics, TrainState, TrainStep

if TYPE_CHECKING:
    from jresnet.data.stream import Files  # needs grain only where it is used

STRETCH = 2.0  # seconds of training between two looks: at metrics, signals and the clock


class Evaluation(NamedTuple):
    """What evaluation found, each image counted once."""

    loss: float  # mean cross-entropy with the labels, in nats
    accuracy: float  # share of the images, 0 to 1
    predictions: np.ndarray  # int32 [N]; -1 where a logit is not finite
    losses: np.ndarray  # float32 [N]


def epoch_order(key: jax.Array, epoch: int, images: int, batch_size: int) -> Int[Array, "steps b"]:
    """Which images each step of an epoch takes; the remainder of less than a batch sits this epoch out."""
    steps = images // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), images)
    return order[: steps * batch_size].reshape(steps, batch_size)


class StepsLoop:
    """Runs steps of an epoch: ``loop(state, split, order [steps, B], start, end, key) -> (state, metrics)``.

    ``split`` is what a data source gives: the images themselves, whole on the devices, or a :class:`Feed` of batches.

    The metrics are numpy arrays, one row for each step that was taken. The state that is given is gone afterwards: its
    memory is used again.

    Args:
        step: of :func:`train_step`.
        devices: where it runs.
        on_device: loop inside one compiled function, for accelerators: the host then waits once for all the steps. Not
            on the CPU, where XLA leaves the backward convolutions of a loop body as naive loops, ten times slower
            (jax#12868): there Python calls the compiled step.
        compiler_options: of ``jax.jit``; :func:`jresnet.compiler_options` has the CPU's.
    """

    def __init__(
        self,
        step: TrainStep,
        devices: Devices,
        on_device: bool | None = None,
        compiler_options: dict[str, str | bool] | None = None,
    ):
        self.devices = devices
        self.on_device = devices.platform != "cpu" if on_device is None else on_device
        # Every device holds the results whole: XLA would be free to cut them.
        function = jax.jit(
            partial(_many_steps, step) if self.on_device else step,
            donate_argnums=0,
            out_shardings=devices.whole,
            compiler_options=compiler_options,
        )
        self._jitted, self._compiled = function, cast(Callable, function)

    def compile(self, state: TrainState, split: Images | Feed, order: np.ndarray, key: jax.Array) -> None:
        """Compiles for arguments like these, all at once: the first call is then as quick as any."""
        if self._compiled is self._jitted:
            images = split.like() if isinstance(split, Feed) else split
            self._compiled = cache.compiled(self._jitted, state, images, *self._bounds(order, 0, 1), key)

    def __call__(
        self,
        state: TrainState,
        split: Images | Feed,
        order: np.ndarray,
        start: int,
        end: int,
        key: jax.Array,
        stop: Callable[[], bool] = lambda: False,
        after_steps: Callable[[int], None] = lambda count: None,
    ) -> tuple[TrainState, Metrics]:
        """Takes steps ``start`` to ``end`` and tells ``after_steps`` how many were taken; on the host after each one.

        On the host ``stop`` is asked before each step, and ends the loop where it says yes. So does a batch that cannot be
        had, where steps were taken before it.

        Raises:
            DataError: the first batch of these cannot be had; the state is as it was given.
        """
        taken: list[Metrics] = []
        if self.on_device:
            assert not isinstance(split, Feed), "a feed gives its batches one by one, on the host"
            state, rows = self._compiled(state, split, *self._bounds(order, start, end), key)
            loss, correct = (np.asarray(row)[start:end] for row in rows)
            after_steps(end - start)
            return state, Metrics(loss, correct)  # type: ignore[arg-type]  # numpy now, fetched
        for i in range(start, end):
            if stop():
                break
            try:
                images = split.batch(i) if isinstance(split, Feed) else split
            except DataError:
                if not taken:
                    raise
                break  # the steps taken count, as the state that was given is gone; asked again, it fails again
            state, metrics = self._compiled(state, images, *self._bounds(order, i, i + 1), key)
            if taken:
                taken[-1].loss.block_until_ready()  # one step ahead of the device: no gap, and a signal is soon seen
            taken.append(metrics)
            after_steps(1)
        rows = [np.array(row) for row in zip(*jax.device_get(taken), strict=True)] or [np.zeros(0), np.zeros(0, int)]
        return state, Metrics(*rows)  # type: ignore[arg-type]  # numpy now, fetched

    def _bounds(self, order: np.ndarray, start: int, end: int) -> tuple[Any, ...]:
        """What tells the compiled function its batches."""
        order = np.asarray(order, np.int32)
        if self.on_device:
            # Bounds that are values, not constants: one compilation serves every stretch of an epoch.
            return self.devices.put(order, self.devices.cut(1)), np.int32(start), np.int32(end)
        return (self.devices.put(order[start], self.devices.cut()),)


def _many_steps(
    step: TrainStep,
    state: TrainState,
    split: Images,
    order: jax.Array,
    start: jax.Array,
    end: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Steps ``start`` to ``end`` of ``order [steps, B]``, and metrics of which rows ``[start:end]`` are filled."""

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, all_metrics = carry
        state, metrics = step(state, split, order[i], key)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), all_metrics, metrics)

    rows = jax.eval_shape(step, state, split, order[0], key)[1]
    empty = jax.tree.map(lambda row: jnp.zeros((len(order),), row.dtype), rows)
    return lax.fori_loop(start, end, body, (state, empty))


def batches(split: Split, batch_size: int, devices: Devices) -> Iterator[tuple[Images, int]]:
    """(a batch, how many of its images count): every image once, the last batch filled with the last image.

    Each process gives the rows of a batch that lie on its own devices.
    """
    rows = devices.rows(batch_size)
    starts = range(0, len(split.labels), batch_size)
    for start, images in zip(starts, _pixels(split.images, batch_size, rows), strict=True):
        labels = split.labels.take(np.arange(start, start + batch_size)[rows], mode="clip")
        yield (
            Images(*(devices.assemble(part, batch_size) for part in (images, labels))),
            min(batch_size, len(split.labels) - start),
        )


def _pixels(images: np.ndarray | Files, batch_size: int, rows: slice) -> Iterator[np.ndarray]:
    """Those rows of the images of a split in batches of one size."""
    if not isinstance(images, np.ndarray):
        yield from images.batches(batch_size, rows)
        return
    for start in range(0, len(images), batch_size):
        yield images.take(np.arange(start, start + batch_size)[rows], axis=0, mode="clip")


def evaluate(
    step: Callable[..., tuple[jax.Array, jax.Array]],
    weights: Averaged,
    split: Split,
    batch_size: int,
    devices: Devices,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss and accuracy over every image of ``split`` exactly once; None where ``stop`` said so.

    ``step`` is a jitted :func:`eval_step`.
    """
    found = []
    for batch, count in batches(split, batch_size, devices):
        if stop():
            return None
        losses, predictions = step(weights, batch)
        found.append((losses, predictions, count))
        if len(found) > 1:
            found[-2][0].block_until_ready()
    all_losses = np.concatenate([np.asarray(losses)[:count] for losses, _, count in found])
    predicted = np.concatenate([np.asarray(predictions)[:count] for _, predictions, count in found])
    accuracy = float((predicted == split.labels).mean())
    return Evaluation(float(all_losses.astype(np.float64).mean()), accuracy, predicted, all_losses)


class Pace:
    """What a step and an evaluation take in this process.

    Args:
        step_seconds: as the session before measured it, until this one has; 0 where nobody did.
    """

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
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

    def is_first_measured(self) -> bool:
        """Whether this is the moment to say how long the run will take: a step has just been measured."""
        return self._looks == 2

    def epoch_seconds(self, steps_per_epoch: int) -> float:
        """Seconds of an epoch's training and evaluation."""
        return self.step_seconds * steps_per_epoch + self.eval_seconds

    def left(self, steps: int, steps_per_epoch: int) -> float:
        """Seconds that ``steps`` more will take, with their evaluations."""
        return steps * self.step_seconds + steps / steps_per_epoch * self.eval_seconds
