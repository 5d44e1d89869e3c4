"""Train a segmentation network on jresnet's features: ``python examples/segmentation.py``.

The backbone is dilated to output stride 2 and returns the outputs of two stages. The head, similar to that of DeepLab v3+
(arXiv:1802.02611), combines them and resizes its logits to the size of the image. The network learns to segment circles,
squares and crosses in noise. For a real task, use ``jresnet.create("resnet50", weights="DEFAULT", output_stride=16)`` and
your own images.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jresnet

CLASSES = ("background", "circle", "square", "cross")


class Segmenter(nnx.Module):
    """A network from images ``[N, H, W, C]`` to logits ``[N, H, W, classes]`` for every pixel."""

    def __init__(self, backbone: jresnet.ResNet, classes: int, width: int = 32, *, rngs: nnx.Rngs):
        config = backbone.config
        channels = backbone.layer1[0].expansion * config.widths[0]
        self.backbone = backbone
        self.deep = nnx.Conv(config.num_features, width, (3, 3), kernel_dilation=2, rngs=rngs)
        self.fine = nnx.Conv(channels, width, (1, 1), rngs=rngs)
        self.joined = nnx.Conv(2 * width, width, (3, 3), rngs=rngs)
        self.logits = nnx.Conv(width, classes, (1, 1), rngs=rngs)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        last = f"layer{len(self.backbone.config.depths)}"
        found = self.backbone.features(images, train, ("layer1", last))
        deep, fine = nnx.relu(self.deep(found[last])), nnx.relu(self.fine(found["layer1"]))
        deep = jax.image.resize(deep, (*fine.shape[:3], deep.shape[-1]), "linear")
        logits = self.logits(nnx.relu(self.joined(jnp.concatenate([deep, fine], -1))))
        return jax.image.resize(logits, (*images.shape[:3], logits.shape[-1]), "linear")


def shapes(draw: np.random.Generator, count: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Draws images ``[N, size, size, 3]`` with two shapes each in noise, and the class of each pixel ``[N, size, size]``."""
    rows, columns = np.mgrid[:size, :size]
    images, masks = draw.normal(0, 0.2, (count, size, size, 3)), np.zeros((count, size, size), np.int32)
    for image, mask in zip(images, masks, strict=True):
        for label in draw.permutation([1, 2, 3])[:2]:
            radius = draw.integers(size // 6, size // 3)
            y, x = np.abs(np.stack([rows, columns]) - draw.integers(radius, size - radius, 2)[:, None, None])
            inside = {1: x**2 + y**2 <= radius**2, 2: np.maximum(x, y) <= 0.8 * radius}.get(
                label, (np.minimum(x, y) <= radius / 4) & (np.maximum(x, y) <= radius)
            )
            image[inside], mask[inside] = image[inside] + draw.uniform(0.4, 1.0, 3), label
    return images.astype(np.float32), masks


def mean_iou(model: Segmenter, images: np.ndarray, masks: np.ndarray) -> float:
    """Intersection over union, averaged over the classes."""
    found = np.asarray(nnx.jit(lambda model, images: model(images).argmax(-1))(model, images))
    return float(
        np.mean(
            [((found == k) & (masks == k)).sum() / ((found == k) | (masks == k)).sum() for k in range(len(CLASSES))]
        )
    )


def train(steps: int, batch: int = 16, seed: int = 0) -> tuple[float, float]:
    """Trains a small network; returns the mean IoU on separate test images before and after."""
    draw = np.random.default_rng(seed)
    config = jresnet.ResNetConfig("basic", (1, 1, 1), (16, 32, 64), num_classes=0, stem="cifar", output_stride=2)
    model = Segmenter(jresnet.ResNet(config, rngs=nnx.Rngs(seed)), len(CLASSES), rngs=nnx.Rngs(seed + 1))
    # Both parts start from random weights, so they share one learning rate; a pretrained backbone would get a smaller one.
    tx = jresnet.optim.optimizer("adamw", optax.cosine_decay_schedule(1e-2, steps), weight_decay={"backbone": 1e-4})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Segmenter, optimizer: nnx.Optimizer, images: jax.Array, masks: jax.Array) -> jax.Array:
        def loss_of(model: Segmenter) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images, train=True), masks).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    test = shapes(np.random.default_rng(seed + 1000), 64)
    before = mean_iou(model, *test)
    for number in range(steps):
        loss = step(model, optimizer, *shapes(draw, batch))
        if (number + 1) % 20 == 0:
            print(f"step {number + 1}: loss {float(loss):.3f}")
    return before, mean_iou(model, *test)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Train a segmentation head on synthetic shapes.")
    parser.add_argument("--steps", type=int, default=100, help="training steps of 16 images each (default: 100)")
    before, after = train(parser.parse_args(argv).steps)
    print(f"mean IoU of {len(CLASSES)} classes on 64 test images: {before:.3f} before, {after:.3f} after")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
