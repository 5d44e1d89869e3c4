"""Many steps and whole splits: the loop over an epoch's batches, evaluation, and the pace of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
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

Order = np.ndarray | jax.Array  # int32 [steps, B], which images each step of an epoch takes
STRETCH = 2.0  # seconds of training between two looks: at metrics, signals and the clock
LOOP = 500  # steps that an accelerator takes between two looks, at most: an epoch of CIFAR-10 in batches of 128 has 390


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
    ``order`` is numpy's, or on the devices already, from where a whole epoch on an accelerator need not fetch it.

    The metrics are numpy arrays, one row for each step that was taken. The state that is given is gone afterwards: its
    memory is used again.

    Args:
        step: of :func:`train_step`.
        devices: where it runs.
        on_device: loop inside one compiled function, for accelerators: the host then waits once for all the steps, and
            sends and fetches nothing between them. XLA knows how often the loop turns, so each number of steps in a call
            is a program of its own. Not on the CPU, where XLA leaves the backward convolutions of a loop body as naive
            loops, ten times slower (jax#12868): there Python calls the compiled step.
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
        self._jitted: Any = function
        self._compiled: dict[int, Callable] = {}  # by the steps that a call takes

    def stretch(self, steps_per_epoch: int) -> int | None:
        """How many steps of an epoch a call shall take, the last one of the epoch fewer; None: any number, by the clock.

        An accelerator's are whole epochs up to ``LOOP`` steps, else equal parts, as far as they can be: one program.
        """
        return -(-steps_per_epoch // -(-steps_per_epoch // LOOP)) if self.on_device else None

    def compile(self, state: TrainState, split: Images | Feed, order: Order, key: jax.Array) -> None:
        """Compiles for arguments like these and as many steps, all at once: the first call is then as quick as any."""
        steps = len(order) if self.on_device else 1
        if steps not in self._compiled:
            images = split.like() if isinstance(split, Feed) else split
            taken = self._taken(order, 0, steps)
            self._compiled[steps] = cache.compiled(self._jitted, state, images, taken, key)

    def __call__(
        self,
        state: TrainState,
        split: Images | Feed,
        order: Order,
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
            call = self._compiled.get(end - start, self._jitted)
            state, metrics = call(state, split, self._taken(order, start, end), key)
            metrics = jax.device_get(metrics)
            after_steps(end - start)
            return state, metrics
        call = self._compiled.get(1, self._jitted)
        for i in range(start, end):
            if stop():
                break
            try:
                images = split.batch(i) if isinstance(split, Feed) else split
            except DataError:
                if not taken:
                    raise
                break  # the steps taken count, as the state that was given is gone; asked again, it fails again
            state, metrics = call(state, images, self._taken(order, i, i + 1), key)
            if taken:
                taken[-1].loss.block_until_ready()  # one step ahead of the device: no gap, and a signal is soon seen
            taken.append(metrics)
            after_steps(1)
        rows = [np.array(row) for row in zip(*jax.device_get(taken), strict=True)] or [np.zeros(0), np.zeros(0, int)]
        return state, Metrics(*rows)  # type: ignore[arg-type]  # numpy now, fetched

    def _taken(self, order: Order, start: int, end: int) -> jax.Array:
        """The images of the steps from ``start`` to ``end``, as the compiled function takes them."""
        if not self.on_device:
            return self.devices.put(np.asarray(order[start], np.int32), self.devices.cut())
        if isinstance(order, jax.Array) and (start, end) == (0, len(order)):
            return order
        return self.devices.put(np.asarray(order, np.int32)[start:end], self.devices.cut(1))


def _many_steps(
    step: TrainStep, state: TrainState, split: Images, order: jax.Array, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """A step for each row of ``order [steps, B]``; metrics ``[steps]``."""
    return lax.scan(lambda state, indices: step(state, split, indices, key), state, order)


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
    batches: Iterable[tuple[Images, int]],
    labels: np.ndarray,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss and accuracy over every image of a split exactly once; None where ``stop`` said so.

    Args:
        step: a jitted :func:`eval_step`.
        weights: what is evaluated.
        batches: of the split, as :func:`batches` gives them.
        labels: of its images, int ``[N]``.
        stop: asked before each batch.
    """
    found, counts = [], []
    for batch, count in batches:
        if stop():
            return None
        found.append(step(weights, batch))
        counts.append(count)
        if len(found) > 1:
            found[-2][0].block_until_ready()
    parts = [
        (losses[:n], predictions[:n]) for (losses, predictions), n in zip(jax.device_get(found), counts, strict=True)
    ]
    losses, predicted = (np.concatenate(part) for part in zip(*parts, strict=True))
    accuracy = float((predicted == labels).mean())
    return Evaluation(float(losses.astype(np.float64).mean()), accuracy, predicted, losses)


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
