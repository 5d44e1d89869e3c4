"""BatchNorm over many devices is PyTorch's: ``train.train_step`` on two simulated ones, in float64.

``bn="per-device"`` beside ``DistributedDataParallel`` in two processes, and ``bn="global"`` beside one process with the
whole batch: ``SyncBatchNorm``, which does the same in many, needs CUDA.

Devices are simulated and processes joined before a framework starts: this file, run as a program, does one of the two.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jresnet.models.resnet import ResNetConfig

TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")
EXACT = 1e-10  # relative L2 error of a tensor; rounding alone gives 1e-16 to 1e-15
DEVICES, STEPS, BATCH = 2, 4, 16
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


def in_jax(folder: Path) -> None:
    """Writes ``per-device.npz`` and ``global.npz``: losses, rightly classified images, and the state by path."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    from flax import nnx

    from jresnet.models import params
    from jresnet.pytorch import keymap
    from jresnet.training import devices, optim
    from jresnet.training import step as train
    from jresnet.training.loop import StepsLoop

    tensors = np.load(folder / "start.npz")
    batches = np.load(folder / "batches.npz")
    where = devices.find()
    assert where.count == DEVICES
    values = {path: keymap.to_flax(tensors[keymap.torch_key(path)]) for path in params.shapes(TINY)}
    optimizer = optim.optimizer("sgd", LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    unchanged: Any = SimpleNamespace(
        flip="none", train=lambda key, images, turned: images, mix=lambda key, images, targets: (images, targets)
    )
    split = train.Images(*where.replicate((np.concatenate(batches["images"]), np.concatenate(batches["labels"]))))
    order = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    for bn in ("per-device", "global"):
        model = params.fill(TINY, values)  # its arrays are overwritten in training
        step = train.train_step(nnx.graphdef(model), optimizer, unchanged, devices=where, bn=bn)
        state = where.replicate(train.init(model, optimizer))
        state, metrics = StepsLoop(step, where)(state, split, order, 0, STEPS, where.replicate(jax.random.key(0)))
        leaves = nnx.to_flat_state(nnx.merge_state(state.params, state.batch_stats))
        found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}
        np.savez(folder / f"{bn}.npz", losses=metrics.loss, correct=metrics.correct, **found)


def in_torch(folder: Path) -> None:
    """Writes ``ddp.npz``: losses, rightly classified images, and the state dict of rank 0."""
    import torch.multiprocessing

    # Forked: a spawned process would import everything again.
    torch.multiprocessing.start_processes(one_rank, (folder,), DEVICES, start_method="fork")


def one_rank(rank: int, folder: Path) -> None:
    """A process of :func:`in_torch`: its own part of each batch."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # loopback
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=DEVICES, timeout=timedelta(seconds=120)
    )
    batches = np.load(folder / "batches.npz")
    own = np.array_split(np.arange(BATCH), DEVICES)[rank]
    model = network(folder)
    found = torch_steps(DistributedDataParallel(model), batches["images"][:, own], batches["labels"][:, own])
    for values in found.values():
        distributed.all_reduce(values)
    found["losses"] /= DEVICES
    if rank == 0:
        np.savez(folder / "ddp.npz", **found, **model.state_dict())
    distributed.destroy_process_group()


def network(folder: Path) -> Any:
    """PyTorch's network with the first weights."""
    import torch

    from convert.reference import ResNet

    model = ResNet(TINY).double()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in np.load(folder / "start.npz").items()})
    return model


def torch_steps(model: Any, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Steps of SGD on ``images [steps, B, H, W, C]``: losses, and how many were classified rightly in each."""
    import torch
    import torch.nn.functional as F

    sgd = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    losses, correct = [], []
    for x, y in zip(torch.from_numpy(images).permute(0, 1, 4, 2, 3), torch.from_numpy(labels), strict=True):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
        correct.append((logits.argmax(1) == y).sum())
    return {"losses": torch.stack(losses), "correct": torch.stack(correct)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first weights and the batches, and what both programs made of them."""
    import torch
    from conftest import command

    from convert.reference import ResNet, randomise

    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(0)
    model = ResNet(TINY).double()
    randomise(model)
    np.savez(folder / "start.npz", **model.state_dict())
    draw = np.random.default_rng(0)
    images = draw.standard_normal((STEPS, BATCH, 8, 8, 3))
    images[:, : BATCH // 2] *= 3  # the parts' statistics differ
    np.savez(folder / "batches.npz", images=images, labels=draw.integers(0, TINY.num_classes, (STEPS, BATCH)))
    for program in ("jax", "torch"):
        done = command(__file__, program, folder, env=os.environ | {"PYTHONPATH": "."})
        assert done.returncode == 0, done.stderr
    return folder


def errors(found: Any, wanted: Any) -> dict[str, float]:
    """Relative L2 errors by name, of jresnet's results beside PyTorch's."""
    from jresnet.pytorch import keymap

    keys = {name: name if name in ("losses", "correct") else keymap.torch_key(name) for name in found}
    assert set(keys.values()) == {key for key in wanted if not key.endswith("num_batches_tracked")}
    result = {}
    for name, key in keys.items():
        value, reference = found[name], keymap.to_flax(np.asarray(wanted[key]))
        assert value.dtype == reference.dtype, name
        result[name] = float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
    return result


def whole_batches(folder: Path) -> dict[str, Any]:
    """What one PyTorch process makes of the whole batches."""
    model, batches = network(folder), np.load(folder / "batches.npz")
    return torch_steps(model, batches["images"], batches["labels"]) | model.state_dict()


def test_per_device_is_ddp(folder: Path) -> None:
    """Losses, parameters, and the running statistics of rank 0, which it hands to all."""
    found = errors(np.load(folder / "per-device.npz"), np.load(folder / "ddp.npz"))
    assert max(found.values()) < EXACT, found


def test_global_is_the_whole_batch(folder: Path) -> None:
    """Losses, parameters and running statistics."""
    found = errors(np.load(folder / "global.npz"), whole_batches(folder))
    assert max(found.values()) < EXACT, found


def test_the_two_differ(folder: Path) -> None:
    """Else the tests above could not tell one from the other."""
    found = errors(np.load(folder / "per-device.npz"), whole_batches(folder))
    assert min(error for name, error in found.items() if name != "correct") > 1e-3, found


if __name__ == "__main__":
    {"jax": in_jax, "torch": in_torch}[sys.argv[1]](Path(sys.argv[2]))
