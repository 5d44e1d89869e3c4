"""The loop over the steps of an epoch, the evaluation of a split, and the measurement of their speed."""

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
    from jresnet.data.stream import Files

Order = np.ndarray | jax.Array  # int32 [steps, B], the indices of the images in each step of an epoch
STRETCH = 2.0  # seconds of training between two checks of metrics, signals and the clock
LOOP = 500  # most steps on an accelerator between two checks; an epoch of CIFAR-10 in batches of 128 has 390


class Evaluation(NamedTuple):
    """The result of an evaluation, with each image counted once."""

    loss: float  # mean cross-entropy, in nats
    accuracy: float  # fraction of the images, 0 to 1
    predictions: np.ndarray  # int32 [N]; -1 if a logit is not finite
    losses: np.ndarray  # float32 [N]


def epoch_order(key: jax.Array, epoch: int, images: int, batch_size: int) -> Int[Array, "steps b"]:
    """The indices of the images in each step of an epoch; images that do not fill a whole batch are left out."""
    steps = images // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), images)
    return order[: steps * batch_size].reshape(steps, batch_size)


class StepsLoop:
    """Runs steps of an epoch: ``loop(state, split, order [steps, B], start, end, key) -> (state, metrics)``.

    ``split`` contains the images, replicated on the devices, or is a :class:`Feed` of batches. ``order`` is a numpy array,
    or an array on the devices, which saves its transfer if an accelerator runs a whole epoch.

    The metrics are numpy arrays with one entry per step. The state passed in is donated and cannot be used afterwards.

    Args:
        step: the result of :func:`train_step`.
        devices: the devices to run on.
        on_device: run the loop inside one compiled function, for accelerators: there are no transfers between steps, and
            the host waits only once. The trip count is static, so that each number of steps per call is compiled
            separately. On the CPU, XLA compiles the backward convolutions of a loop body as naive loops, ten times slower
            (jax#12868), so that Python calls the compiled step instead.
        compiler_options: options of ``jax.jit``; :func:`jresnet.compiler_options` returns those for the CPU.
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
        # Results are replicated explicitly; otherwise XLA might shard them.
        function = jax.jit(
            partial(_many_steps, step) if self.on_device else step,
            donate_argnums=0,
            out_shardings=devices.whole,
            compiler_options=compiler_options,
        )
        self._jitted: Any = function
        self._compiled: dict[int, Callable] = {}  # by the number of steps per call

    def stretch(self, steps_per_epoch: int) -> int | None:
        """The number of steps per call; the last call of an epoch may have fewer. None: any number, chosen by the clock.

        On an accelerator, a call runs a whole epoch of up to ``LOOP`` steps; longer epochs are divided into equal parts.
        """
        return -(-steps_per_epoch // -(-steps_per_epoch // LOOP)) if self.on_device else None

    def compile(self, state: TrainState, split: Images | Feed, order: Order, key: jax.Array) -> None:
        """Compiles for arguments of these shapes and this number of steps, so that the first call is not slower."""
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
        """Runs steps ``start`` to ``end`` (exclusive) and calls ``after_steps`` with the number of completed steps.

        If the loop runs on the host, ``after_steps`` is called after each step, and ``stop`` before each step; the loop
        ends early if it returns true. The loop also ends early if a batch is unavailable after at least one step.

        Raises:
            DataError: the first of these batches is unavailable; the state was not donated.
        """
        taken: list[Metrics] = []
        if self.on_device:
            assert not isinstance(split, Feed), "a feed provides batches one by one, on the host"
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
                break  # keep the completed steps, since the state was donated; the next call raises the error
            state, metrics = call(state, images, self._taken(order, i, i + 1), key)
            if taken:
                # stay one step ahead of the device: no idle time, quick response to stop
                taken[-1].loss.block_until_ready()
            taken.append(metrics)
            after_steps(1)
        rows = [np.array(row) for row in zip(*jax.device_get(taken), strict=True)] or [np.zeros(0), np.zeros(0, int)]
        return state, Metrics(*rows)  # type: ignore[arg-type]  # numpy now, fetched

    def _taken(self, order: Order, start: int, end: int) -> jax.Array:
        """The image indices of steps ``start`` to ``end``, as an argument of the compiled function."""
        if not self.on_device:
            return self.devices.put(np.asarray(order[start], np.int32), self.devices.cut())
        if isinstance(order, jax.Array) and (start, end) == (0, len(order)):
            return order
        return self.devices.put(np.asarray(order, np.int32)[start:end], self.devices.cut(1))


def _many_steps(
    step: TrainStep, state: TrainState, split: Images, order: jax.Array, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """Runs one step per row of ``order [steps, B]``; the metrics have shape ``[steps]``."""
    return lax.scan(lambda state, indices: step(state, split, indices, key), state, order)


def batches(split: Split, batch_size: int, devices: Devices) -> Iterator[tuple[Images, int]]:
    """Yields each batch and the number of its images that count; the last batch is padded with copies of the last image.

    Each process provides the rows of a batch that belong to its own devices.
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
    """Yields the given rows of the images of each batch of a split."""
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
    """Computes loss and accuracy over every image of a split exactly once.

    Args:
        step: a jitted :func:`eval_step`.
        weights: the weights to evaluate.
        batches: the batches of the split, from :func:`batches`.
        labels: the labels of its images, int ``[N]``.
        stop: called before each batch; the evaluation ends if it returns true.

    Returns:
        The result, or None if ``stop`` ended the evaluation.
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
    """Measures the duration of a step and of an evaluation in this process.

    Args:
        step_seconds: duration of a step in the previous session, used until this one has measured it; 0: unknown.
    """

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.eval_seconds = 0.0
        self._looks, self._steps, self._seconds = 0, 0, 0.0

    def stretch(self, steps_per_epoch: int) -> int:
        """The number of steps before the next check: at first one, then a tenth of an epoch or ``STRETCH`` seconds."""
        if self._looks == 0:
            return 1
        return max(1, min(-(-steps_per_epoch // 10), int(STRETCH / max(self.step_seconds, 1e-6))))

    def count(self, steps: int, seconds: float) -> None:
        """Records that ``steps`` took ``seconds``."""
        self._looks += 1
        if self._looks == 2:  # discard the first step, which is slower because it allocates memory
            self._steps, self._seconds = 0, 0.0
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        self.step_seconds = self._seconds / max(self._steps, 1)

    def is_first_measured(self) -> bool:
        """Whether a step has just been measured for the first time, so that the run's duration can be estimated."""
        return self._looks == 2

    def epoch_seconds(self, steps_per_epoch: int) -> float:
        """The duration of an epoch, including evaluation, in seconds."""
        return self.step_seconds * steps_per_epoch + self.eval_seconds

    def left(self, steps: int, steps_per_epoch: int) -> float:
        """The duration of ``steps`` further steps, including evaluations, in seconds."""
        return steps * self.step_seconds + steps / steps_per_epoch * self.eval_seconds
