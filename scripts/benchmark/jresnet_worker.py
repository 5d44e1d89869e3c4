"""The benchmark's jresnet worker. The first argument is a job as JSON; the last line of the output is the answer as JSON.

It also writes the weights and images of a row for all frameworks, and the reference in float64.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import jresnet
from benchmark import common
from benchmark.networks import macs, randomise
from jresnet import cache, data
from jresnet.models import params, zoo
from jresnet.pytorch import keymap, statedict
from jresnet.training import augment, devices, optim
from jresnet.training import step as train
from jresnet.training.loop import Order, StepsLoop, epoch_order
from jresnet.weights.preprocessing import STATISTICS

Job = Mapping[str, Any]


def survey(job: Job) -> dict[str, Any]:
    """The device, the configuration and operations per image of each row, and the problems found."""
    problems, rows = [], []
    for row in job["rows"]:
        rows.append({"config": None, "gflop": 0.0})
        if not row["arch"]:
            continue
        try:
            config = zoo.configure(row["arch"], **row["chosen"])
        except jresnet.JresnetError as error:
            problems.append(str(error))
            continue
        passes = 1 if row["task"] == "infer" else 3
        rows[-1] = {"config": dataclasses.asdict(config), "gflop": 2e-9 * passes * macs(config, row["size"])}
    device = jax.devices()[0]
    name = f"{device.device_kind} ({device.platform})"
    return {"problems": list(dict.fromkeys(problems)), "rows": rows, "platform": device.platform, "device": name}


def gemm(job: Job) -> dict[str, Any]:
    """Rate of a large matrix product."""
    # Accumulates in float32; otherwise a CPU's bfloat16 units are not used.
    product = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32))

    def prepare(size: int) -> Callable[[], object]:
        a, b = (jax.random.normal(jax.random.key(i), (size, size), job["precision"]) for i in range(2))
        return lambda: product(a, b).block_until_ready()

    return common.fastest_product(prepare)


def make(job: Job) -> dict[str, Any]:
    """Writes random weights, images and labels and, if ``check`` is set, the reference in float64."""
    folder, draw = Path(job["folder"]), np.random.default_rng(1)
    model = jresnet.ResNet(common.configuration(job), rngs=nnx.Rngs(0))
    randomise(model)
    images = draw.standard_normal((job["batch"], job["size"], job["size"], model.config.in_channels), np.float32)
    labels = draw.integers(0, model.config.num_classes, job["batch"]).astype(np.int32)
    np.savez(folder / common.INPUTS, images=images, labels=labels, **statedict.state_dict(model))
    if job["check"]:
        with jax.enable_x64(True):
            np.savez(folder / common.REFERENCE, **reference(*load(job, np.float64), job["task"]))
    return {}


def reference(model: jresnet.ResNet, images: jax.Array, labels: jax.Array, task: str) -> dict[str, Any]:
    """The logits of the first images, or the gradient, of a float64 model."""
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    if task == "infer":
        logits = jax.jit(lambda x: nnx.merge(graph, params, stats)(x))
        return {"logits": logits(images[: common.CHECKED_IMAGES])}
    gradient = jax.jit(jax.grad(partial(loss, graph), has_aux=True))
    return by_key(gradient(params, stats, images, labels)[0])


def load(job: Job, wide: Any = np.float32) -> tuple[jresnet.ResNet, jax.Array, jax.Array]:
    """The row's model with parameters of dtype ``wide``, its images and its labels."""
    images, labels, tensors = common.inputs(job)
    config, dtype = (
        common.configuration(job),
        jnp.bfloat16 if job["precision"] == "bfloat16" and wide == np.float32 else None,
    )
    values = {p: keymap.to_flax(tensors[keymap.torch_key(p)]).astype(wide) for p in params.shapes(config)}
    return params.fill(config, values, dtype), jnp.asarray(images, wide), jnp.asarray(labels)


def loss(graph: nnx.GraphDef, params: nnx.State, stats: nnx.State, images: jax.Array, labels: jax.Array):
    """Returns the mean cross-entropy and the new BatchNorm statistics."""
    model = nnx.merge(graph, params, stats, copy=True)
    logits = model(images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), nnx.state(model, nnx.BatchStat)


def by_key(state: nnx.State) -> dict[str, np.ndarray]:
    """Parameters or gradients with torchvision's keys, in PyTorch's layout."""
    flat = ((".".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(state))
    return {keymap.torch_key(path): keymap.to_torch(np.asarray(value)) for path, value in flat}


def measure(job: Job) -> dict[str, Any]:
    """Measures a row."""
    found = {"infer": infer, "epoch": epoch, "data": first_batch}.get(job["task"], training)(job)
    memory = jax.devices()[0].memory_stats() or {}
    return found | ({"device_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {})


def compiled(function: Callable, *arguments: Any, **options: Any) -> tuple[Callable, float]:
    """A function compiled for the given arguments, and the compile time in seconds."""
    began = time.perf_counter()
    return cache.compiled(jax.jit(function, **options), *arguments), time.perf_counter() - began


def infer(job: Job) -> dict[str, Any]:
    """Inference on a batch on the device. The weights are constants of the program, as in PyTorch's frozen network."""
    model, images, _ = load(job)
    forward, seconds = compiled(jresnet.fuse(model), images, compiler_options=jresnet.compiler_options())

    def run(steps: int) -> jax.Array:
        for _ in range(steps):
            logits = forward(images)
        return logits.block_until_ready()

    found = common.pace(job, run, len(images)) | {"compile_seconds": seconds}
    if job["check"]:
        found["error"] = common.relative_error(job, {"logits": run(1)[: common.CHECKED_IMAGES]})
    return found | {"note": "BN folded"}


def training(job: Job) -> dict[str, Any]:
    """SGD steps on a batch on the device. On an accelerator one call runs many steps, as in jresnet's own loop."""
    where, optimizer = devices.find(job["devices"]), optim.optimizer("sgd", common.LR, **common.SGD)
    on_device = where.platform != "cpu"

    def start() -> tuple[train.TrainState, nnx.State, tuple[jax.Array, jax.Array]]:
        model, *batch = load(job)
        return (
            where.replicate(train.init(model, optimizer)),
            nnx.graphdef(model),
            [where.put(a, where.cut()) for a in batch],
        )

    state, graph, batch = start()

    def step(state: train.TrainState, images: jax.Array, labels: jax.Array) -> train.TrainState:
        gradient = jax.grad(partial(loss, graph), has_aux=True)
        grads, stats = gradient(state.params, state.batch_stats, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return train.TrainState(state.step + 1, optax.apply_updates(state.params, updates), stats, opt_state, None)

    def many(state: train.TrainState, images: jax.Array, labels: jax.Array, steps: jax.Array) -> train.TrainState:
        return lax.fori_loop(0, steps, lambda _, state: step(state, images, labels), state)

    arguments = (state, *batch, np.int32(1)) if on_device else (state, *batch)
    options = {"donate_argnums": 0, "out_shardings": where.whole, "compiler_options": jresnet.compiler_options()}
    loaded: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: loaded.append(event))
    function, seconds = compiled(many if on_device else step, *arguments, **options)
    kept = "/jax/compilation_cache/cache_hits" in loaded

    def run(steps: int) -> None:
        nonlocal state
        if on_device:
            state = function(state, *batch, np.int32(steps))
        else:
            for _ in range(steps):
                state = function(state, *batch)
        jax.block_until_ready(state)

    found = common.pace(job, run, job["batch"]) | {"compile_seconds": seconds}
    if job["task"] == "first step":  # some programs cannot be cached (docs/explanation/jax-versions.md)
        found["note"] = "step loaded" if kept else "step compiled"
    if job["check"]:
        # Gradient of the timed function: after one step, the momentum is the gradient plus the weight decay.
        state, *_ = start()
        before = by_key(state.params)
        run(1)
        momentum, decay = by_key(optax.tree_utils.tree_get(state.opt_state, "trace")), common.SGD["weight_decay"]
        gradient = {key: momentum[key] - decay * before[key].astype(np.float64) for key in momentum}
        found["error"] = common.relative_error(job, gradient)
    return found


def epoch(job: Job) -> dict[str, Any]:
    """Epochs of random uint8 images on the device, with augmentation, in the library's own step and loop."""
    (model, *_), where, draw = load(job), devices.find(1), np.random.default_rng(0)
    optimizer = optim.optimizer("sgd", common.LR, **common.SGD)
    images = draw.integers(0, 256, (job["epoch"], job["size"], job["size"], 3), np.uint8)
    labels = draw.integers(0, model.config.num_classes, len(images)).astype(np.int32)
    split = train.Images(*where.replicate((images, labels)))
    step = train.train_step(nnx.graphdef(model), optimizer, pipeline(job["size"]))
    loop = StepsLoop(step, where, compiler_options=jresnet.compiler_options())
    state, key, number = where.replicate(train.init(model, optimizer)), jax.random.key(0), 0
    ordered = jax.jit(epoch_order, static_argnums=(2, 3))

    def batches(number: int) -> Order:
        order = ordered(key, number, len(images), job["batch"])
        return where.put(order, where.cut(1)) if loop.on_device else np.asarray(order)

    order = batches(0)
    began = time.perf_counter()
    loop.compile(state, split, order, key)
    seconds = time.perf_counter() - began

    def run(epochs: int) -> None:
        nonlocal state, number
        for _ in range(epochs):
            order, number = batches(number), number + 1
            state, _ = loop(state, split, order, 0, len(order), key)

    return common.pace(job, run, order.size) | {"compile_seconds": seconds}


def pipeline(size: int) -> augment.Pipeline:
    return augment.Pipeline("pad", size, "random", *STATISTICS["cifar10"])


def first_batch(job: Job) -> dict[str, Any]:
    """Seconds from opening the files to a batch of augmented images on the device, without import and compilation."""
    key, some = jax.random.key(0), jax.ShapeDtypeStruct((job["batch"], 32, 32, 3), jnp.uint8)
    views, compile_seconds = compiled(pipeline(32).train, key, some)
    began = time.perf_counter()
    found = data.load_cifar10(job["data_dir"], download=False) if job["data_dir"] else data.load_digits()
    images = jnp.asarray(found.train.images)
    views(key, images[: job["batch"]]).block_until_ready()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "compile_seconds": compile_seconds, "note": f"{found.name}, {found.source}"}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        answer = {"survey": survey, "gemm": gemm, "make": make, "measure": measure}[asked["do"]](asked)
    except jresnet.JresnetError as error:
        sys.exit(str(error))
    assert "torch" not in sys.modules
    print(json.dumps(answer))
