"""Run by test_devices.py with simulated devices: trains a few steps on some of them, and prints what came of it as JSON."""

from __future__ import annotations

import json
import re
import sys

import jax
import numpy as np
from flax import nnx

from jresnet import data
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.training import augment, devices, optim
from jresnet.training import step as train
from jresnet.training.loop import StepsLoop, batches, epoch_order, evaluate

TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")


class Exact(augment.Pipeline):
    """Only scales, in float64: the other pipeline computes in float32, which rounds by how XLA cuts and fuses it."""

    def train(self, key: jax.Array, images: jax.Array, turned: jax.Array | None = None) -> jax.Array:
        return images / jax.numpy.float64(255)

    def evaluate(self, images: jax.Array) -> jax.Array:
        return images / jax.numpy.float64(255)


def check(settings: dict) -> dict:
    where = devices.find(settings.get("devices"))
    draw = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.int32) % 10
    images = (draw.uniform(0, 200, (10, 1, 1, 3))[labels] + draw.uniform(0, 50, (64, 8, 8, 3))).astype(np.uint8)
    pipeline = augment.Pipeline(
        "pad", 8, "alternate", (0.5,) * 3, (0.25,) * 3, random_erasing=0.5, mixup=0.5, cutmix=1.0
    )
    model = ResNet(TINY, rngs=nnx.Rngs(0))
    if settings.get("x64"):
        pipeline = Exact("pad", 8, "none", (), ())
        nnx.update(model, jax.tree.map(lambda value: value.astype("float64"), nnx.state(model)))
    optimizer = optim.optimizer("sgd", 0.05, nesterov=True, weight_decay=5e-4, clip_norm=1.0)
    graph = nnx.graphdef(model)
    step = train.train_step(
        graph, optimizer, pipeline, steps_per_epoch=4, label_smoothing=0.1, ema=0.9, devices=where,
        bn=settings.get("bn", "global"),
    )  # fmt: skip
    loop = StepsLoop(step, where, on_device=settings.get("on_device"))
    state = where.replicate(train.init(model, optimizer, average=True))
    split = train.Images(*where.replicate((images, labels)))
    key = where.replicate(jax.random.key(1))
    loop.compile(state, split, np.zeros((4, 16), np.int32), key)
    (compiled,) = loop._compiled.values()
    text = compiled.as_text()  # type: ignore[attr-defined]
    exchanged = re.findall(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    devices.meet(f"compiled {settings}")
    losses: list[float] = []
    for epoch in range(2):
        order = np.asarray(epoch_order(jax.random.key(0), epoch, 64, 16))
        state, metrics = loop(state, split, order, 0, 4, key)
        losses += metrics.loss.tolist()
    found = evaluate(
        jax.jit(train.eval_step(graph, pipeline), out_shardings=where.whole), train.evaluated(state),
        batches(data.Split(images[:50], labels[:50]), 16, where), labels[:50],
    )  # fmt: skip
    assert found is not None
    return {
        "devices": where.count,
        "losses": losses,
        "state": [np.asarray(leaf).astype(np.float64).ravel().tolist() for leaf in jax.tree.leaves(state)],
        "exchanges": len(exchanged),  # between the devices
        "kernels": sum("f32[3,3," in types for types in exchanged),  # those with gradients of kernels in them
        "channels": sum(
            set(re.findall(r"\[([\d,]*)\]", types)) <= {"4", "8"} for types in exchanged
        ),  # of BN's sums alone
        "parts": f"[{16 // where.count},8,8,4]" in text,  # activations of a device's part of the batch
        "eval_loss": found.loss,
        "predictions": found.predictions.tolist(),
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "connect" in given:
        devices.connect(*given["connect"])
    for settings in given["settings"]:
        with jax.enable_x64(settings.get("x64", False)):
            print("\n" + json.dumps(check(settings)), flush=True)
