"""The parts of a run that do not depend on the seed: images on the devices and compiled functions."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jresnet.data
from jresnet import cache
from jresnet.data.dataset import Dataset, Split
from jresnet.errors import InputError
from jresnet.kernels.compiler import compiler_options
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNet
from jresnet.training import devices, initial, loop, optim
from jresnet.training import step as train
from jresnet.training.augment import Pipeline
from jresnet.training.config import RunConfig
from jresnet.training.devices import Devices
from jresnet.training.feed import Feed
from jresnet.training.initial import Initial
from jresnet.training.loop import Evaluation, Order, StepsLoop
from jresnet.training.stop import Interrupted, StopRequest

# Pixels per evaluation batch on one accelerator: large enough for few kernel launches, while ResNet-50's largest activations
# in bfloat16 take 0.5 GB.
EVALUATED = 2**22


class Program:
    """The parts that runs with different seeds share: the images on the devices and the compiled functions.

    Args:
        config: the configuration.
        data: the data set, from :func:`load_data`.
        where: the devices; all devices of this process by default.
        initial: the weights of ``config.weights``, if they are already loaded.
        workers: number of processes that decode image files; 0: threads of this process.

    Raises:
        InputError: data, configuration and devices do not match.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        where: Devices | None = None,
        initial: Initial | None = None,
        workers: int = 0,
    ):
        self.config, self.data, self._initial, self.workers = config, data, initial, workers
        self.devices = where or devices.find()
        self.splits = split_dataset(config, data)
        images = len(self.splits["train"].labels)
        check_batch(config.batch_size, images, self.devices.count)
        devices.meet("data")
        digests = devices.together(np.frombuffer(bytes.fromhex(data.digest)[:8], np.uint8))
        if any((digest != digests[0]).any() for digest in digests):
            raise InputError("the processes read different images: give all of them the same `data_dir`")
        self.images = {name: len(split.labels) for name, split in self.splits.items()}
        self.steps_per_epoch = images // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        if self.total_steps > optim.LAST_STEP:
            raise InputError(
                f"`epochs` {config.epochs:,} are {self.total_steps:,} steps, but at most {optim.LAST_STEP:,} are possible"
            )
        self.schedule = optim.schedule(
            config.schedule, config.lr, config.epochs, self.steps_per_epoch, warmup_epochs=config.warmup_epochs,
            milestones=config.milestones, gamma=config.gamma,
        )  # fmt: skip
        self.optimizer = optim.optimizer(
            config.optimizer, self.schedule, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.weight_decay, decoupled_decay=config.decoupled_decay, decay_norms=config.decay_norms,
            clip_norm=config.clip_norm, rates=self.rates(), frozen=config.frozen,
        )  # fmt: skip
        self.pipeline = self.views()
        training = self.splits["train"]
        self.min_area = self.pipeline.min_area
        self.streams = not isinstance(training.images, np.ndarray)
        if self.streams:  # the host crops; the rest is done on the device
            self.pipeline = dataclasses.replace(self.pipeline, crop="done")
        else:
            self.train_images = train.Images(*self.devices.replicate((training.images, training.labels)))
        self._held: dict[str, list[tuple[train.Images, int]]] = {}
        self.eval_batch = config.batch_size if self._from_host("test") else self._large_batch()
        self.graph, params, *_ = nnx.split(self.model(None), nnx.Param, nnx.BatchStat)
        self.parameters = sum(value.size for value in jax.tree.leaves(params))
        self.compile_seconds = 0.0
        self.loop = StepsLoop(
            train.train_step(
                self.graph, self.optimizer, self.pipeline, steps_per_epoch=self.steps_per_epoch,
                label_smoothing=config.label_smoothing, ema=config.ema, devices=self.devices, bn=config.bn,
                frozen=config.frozen, loss=config.loss, target_threshold=config.target_threshold,
            ),
            self.devices,
            on_device=False if self.streams else None,
            compiler_options=compiler_options(config.remat),
        )  # fmt: skip
        self.eval_step: Any = jax.jit(
            train.eval_step(self.graph, self.pipeline),
            out_shardings=self.devices.whole,
            compiler_options=compiler_options(),
        )
        self.finite = jax.jit(train.all_finite, out_shardings=self.devices.whole)
        self.snapshot = jax.jit(train.snapshot, out_shardings=self.devices.whole)
        self._order = jax.jit(loop.epoch_order, static_argnums=(2, 3))

    def model(self, seed: int | None) -> ResNet:
        """The network with initial parameters from a seed; with ``seed=None``, only their shapes."""
        config = self.config
        return ResNet(
            zoo.configure(config.arch, num_classes=len(self.data.classes), in_channels=3, stem=config.stem),
            zero_init_residual=config.zero_init_residual,
            dtype=jnp.bfloat16 if config.precision == "bfloat16" else None,
            remat=config.remat,
            rngs=None if seed is None else nnx.Rngs(seed),
        )

    def views(self) -> Pipeline:
        """The augmentation and normalisation on the devices."""
        return self.config.pipeline()

    def rates(self) -> dict[str, float] | None:
        """Factors of the learning rate by part of the network; None: the same for all."""
        return None

    def network(self, model: Any) -> ResNet:
        """The network to save, from the trained model."""
        return model

    def shown(self, name: str) -> Any:
        """The images of a split, for figures."""
        return self.splits[name].images

    def provenance(self) -> dict[str, str]:
        """Further metadata for weights files."""
        return {}

    def more(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
        """Further fields of the summary, from the test images' labels and predictions (-1: no prediction)."""
        return {}

    def state(self, seed: int) -> train.TrainState:
        """The state before the first step, on the devices."""
        return self.devices.replicate(train.init(self.model(seed), self.optimizer, average=self.config.ema > 0))

    def source(self, seed: int, rollbacks: int = 0) -> train.Images | Feed:
        """The source of batches: the images on the devices, or a stream of images in an order given by the seed.

        Args:
            seed: seed of the run.
            rollbacks: number of rollbacks; each changes the order.
        """
        if not self.streams:
            return self.train_images
        from jresnet.data.stream import Stream

        config, training = self.config, self.splits["train"]
        files: Any = training.images  # not an array: decoded on access
        stream = Stream(
            files, batch_size=config.batch_size, epochs=config.epochs, seed=seed + (rollbacks << 32),
            size=config.image_size, min_area=self.min_area, workers=self.workers,
            rows=self.devices.rows(config.batch_size), repeats=config.repeats,
        )  # fmt: skip
        return Feed(stream, training.labels, self.devices, config.batch_size)

    def pretrained(self, seed: int) -> tuple[train.TrainState, list[str]]:
        """The state before the first step with the weights of ``config.weights``, and notes on them.

        Raises:
            WeightsError, InputError, DownloadError: the weights cannot be loaded, or belong to another network.
        """
        assert self.config.weights is not None
        self._initial = self._initial or initial.load(self.config.weights, self.config.arch)
        config = self.model(None).config
        values, notes = self._initial.fit(config, self.data.classes, seed)
        if self._initial.image_size not in (None, self.config.image_size):
            notes.append(
                f"the weights are for images of {self._initial.image_size} pixels, but these have {self.config.image_size}"
            )
        state = train.init(params.fill(config, values), self.optimizer, average=self.config.ema > 0)
        return self.devices.replicate(state), notes

    def compile(
        self,
        state: train.TrainState,
        split: train.Images | Feed,
        order: Order,
        key: jax.Array,
        stop: StopRequest,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Compiles the functions of training and evaluation, once for all seeds.

        It compiles in a thread, because compilation takes up to minutes, during which Python would not handle signals.

        Args:
            state, split, key: arguments of the shapes to compile for.
            order: the order of as many steps as one call will run.
            stop: ends the wait if a signal arrived.
            tick: called repeatedly during compilation.

        Raises:
            Interrupted: a signal arrived; the thread may still be compiling.
        """
        if self.compile_seconds:
            return
        began = time.perf_counter()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self.loop.compile(state, split, order, key)
                batch, _ = next(iter(self.batches("test")))
                self.eval_step = cache.compiled(self.eval_step, train.evaluated(state), batch)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            tick()
            if stop() and jax.process_count() == 1:
                raise Interrupted(stop.signal)
        if failures:
            raise failures[0]
        devices.meet("compiled")
        self.compile_seconds = time.perf_counter() - began

    def order(self, key: jax.Array, epoch: int) -> Order:
        """An epoch's batches, int32 ``[steps, B]``; on the devices if the loop runs there."""
        images, batch_size = self.images["train"], self.config.batch_size
        if not self.loop.on_device:
            return np.asarray(loop.epoch_order(key, epoch, images, batch_size))
        order = self._order(key, jax.device_put(np.int32(epoch)), images, batch_size)
        return self.devices.put(order, self.devices.cut(1))

    def batches(self, name: str) -> Iterable[tuple[train.Images, int]]:
        """The evaluation batches of a split, with the number of images that count; kept in memory on accelerators."""
        if self._from_host(name):
            return loop.batches(self.splits[name], self.eval_batch, self.devices)
        if name not in self._held:
            self._held[name] = list(loop.batches(self.splits[name], self.eval_batch, self.devices))
        return self._held[name]

    def _from_host(self, name: str) -> bool:
        """Whether evaluation batches are read again each time, from the host's memory (on a CPU) or from disk."""
        return self.devices.platform == "cpu" or not isinstance(self.splits[name].images, np.ndarray)

    def _large_batch(self) -> int:
        """The evaluation batch size on accelerators; one size for all splits, so that one program is compiled."""
        count, longest = self.devices.count, max(len(s.labels) for name, s in self.splits.items() if name != "train")
        most = max(self.config.batch_size, EVALUATED // self.pipeline.size**2 * count)
        return -(-longest // -(-longest // most) // count) * count

    def evaluate(
        self, state: train.TrainState, name: str, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluates a split; None if ``stop`` ended the evaluation."""
        weights = train.evaluated(state)
        return loop.evaluate(self.eval_step, weights, self.batches(name), self.splits[name].labels, stop)


def load_data(config: RunConfig, data_dir: Path | None) -> Dataset:
    """Loads the configured data set; errors as in :func:`jresnet.data.load`."""
    return jresnet.data.load(config.dataset, data_dir)


def check_batch(batch_size: int, images: int, devices: int) -> None:
    """Raises :class:`InputError` if a batch is larger than the data set or cannot be divided among the devices."""
    problems = []
    if images < batch_size:
        problems.append(f"a batch of {batch_size} is larger than the {images} training images")
    if batch_size % devices:
        problems.append(f"a batch of {batch_size} cannot be divided into {devices} equal parts")
    if problems:
        raise InputError("; ".join(problems) + ": change `batch_size`" + (" or `devices`" if problems[1:] else ""))


def split_dataset(config: RunConfig, data: Dataset) -> dict[str, Split]:
    """Splits a data set into ``train``, ``val`` if configured, and ``test``, in this order.

    The validation images are the last ``val_split`` training images (5,000 for CIFAR-10, as in He et al.). The limits select
    the first of the remaining images.
    """
    kept = len(data.train.labels) - config.val_split
    if kept < 1:
        raise InputError(f"`val_split` {config.val_split} leaves none of the {len(data.train.labels)} training images")

    def part(split: Split, which: slice) -> Split:
        return Split(split.images[which], split.labels[which])

    splits = {"train": part(data.train, slice(0, min(kept, config.limit_train or kept)))}
    if config.val_split:
        splits["val"] = part(data.train, slice(kept, None))
    splits["test"] = part(data.test, slice(0, config.limit_test))
    return splits
