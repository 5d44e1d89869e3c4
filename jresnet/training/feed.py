"""Feeds batches of a streamed training split to the devices, one by one.

If several processes train together, each decodes the rows of every batch that belong to its own devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jresnet.training.devices import Devices
from jresnet.training.step import Images

if TYPE_CHECKING:
    from jresnet.data.stream import Stream


class Feed:
    """The batches of one epoch of a stream, on the devices.

    Args:
        stream: stream of this process's views; its batches are numbered over all epochs.
        labels: int32 ``[n]``, the labels of all images.
        devices: the devices that a batch is sharded over.
        batch_size: number of images per batch, over all processes.
        first: number of the epoch's first batch.
    """

    def __init__(self, stream: Stream, labels: np.ndarray, devices: Devices, batch_size: int, first: int = 0):
        self.stream, self.labels, self.devices = stream, labels, devices
        self.batch_size, self.first = batch_size, first

    def epoch(self, epoch: int, steps: int) -> Feed:
        """The feed of another epoch, counted from 0; ``steps`` is the number of steps per epoch."""
        return Feed(self.stream, self.labels, self.devices, self.batch_size, epoch * steps)

    def batch(self, step: int) -> Images:
        """The batch of a step of the epoch. Requesting consecutive steps is fastest.

        Raises:
            DataError: an image can no longer be decoded, or a worker process died.
        """
        return self._put(*self.stream.batch(self.first + step))

    def again(self, step: int) -> Images:
        """As :meth:`batch`, without affecting the batches that are decoded in advance."""
        return self._put(*self.stream.again(self.first + step))

    def like(self) -> Images:
        """A batch of zeros of the same shape, to compile for."""
        size, count = self.stream.size, self.stream.batch_size
        images = np.zeros((count, size, size, self.stream.files.shape[-1]), np.uint8)
        return self._put(images, np.zeros(count, int))

    def close(self) -> None:
        """Stops the stream's workers."""
        self.stream.close()

    def _put(self, images: np.ndarray, positions: np.ndarray) -> Images:
        return Images(*(self.devices.assemble(part, self.batch_size) for part in (images, self.labels[positions])))


def every_image(batch_size: int, steps: int) -> np.ndarray:
    """The order ``[steps, B]`` of an epoch whose steps use all images of their batch."""
    return np.broadcast_to(np.arange(batch_size, dtype=np.int32), (steps, batch_size))
