"""Both sides of a comparison train alike: ``train_torch`` beside jresnet's own step, optimizers and schedules, in float64.

What only one side draws (initialisation, order, crops, flips) is compared by its distribution or its rule.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import train_torch
from flax import nnx
from test_training import EXACT, Errors, Unchanged, by_path, nchw
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

import jresnet
from convert.reference import ResNet, randomise
from jresnet import data
from jresnet.data.cifar10 import CLASSES
from jresnet.errors import InputError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import keymap
from jresnet.training import augment, optim
from jresnet.training import step as train
from jresnet.training.config import RunConfig, default_config

TINY = ResNetConfig("basic", (1, 1, 1), (4, 8, 16), num_classes=10, stem="cifar", shortcut="pad")
BATCH, STEPS_PER_EPOCH, EPOCHS, PIXELS = 16, 2, 3, 8


def configure(recipe: str, **overrides: Any) -> RunConfig:
    """A short run's configuration, with a weight decay that a few steps show."""
    values = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.05, "weight_decay": 0.05, "precision": "float32"}
    return default_config(recipe=recipe, arch="resnet20_cifar", **values | overrides)


def schedule_of(config: RunConfig, steps_per_epoch: int) -> optax.Schedule:
    return optim.schedule(
        config.schedule, config.lr, config.epochs, steps_per_epoch, warmup_epochs=config.warmup_epochs,
        milestones=config.milestones, gamma=config.gamma,
    )  # fmt: skip


def optimizer_of(config: RunConfig, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    names = ("momentum", "nesterov", "weight_decay", "decoupled_decay", "decay_norms", "clip_norm")
    return optim.optimizer(config.optimizer, learning_rate, **{name: getattr(config, name) for name in names})


def tiny_reference() -> torch.nn.Module:
    """PyTorch's tiny network in float64, its statistics drawn at random."""
    torch.manual_seed(0)
    reference = ResNet(TINY).double()
    randomise(reference)
    return reference


def pair() -> tuple[jresnet.ResNet, torch.nn.Module]:
    """jresnet's and PyTorch's tiny network of the same float64 parameters. Call it where 64 bits are enabled."""
    reference = tiny_reference()
    tensors = reference.state_dict()
    values = {path: keymap.to_flax(tensors[keymap.torch_key(path)].numpy()) for path in params.shapes(TINY)}
    return params.fill(TINY, values), reference


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param("fast", {}, id="fast"),
        pytest.param("step", {}, id="step"),
        pytest.param("step", {"decoupled_decay": True, "schedule": "cosine", "warmup_epochs": 0.5}, id="decoupled"),
        pytest.param("fast", {"decoupled_decay": True, "nesterov": False, "ema": 0.3}, id="fast-decoupled"),
        pytest.param("fast", {"decay_norms": True, "ema": 0.0, "label_smoothing": 0.3}, id="fast-all-decay"),
    ],
)
def test_steps(recipe: str, overrides: dict[str, Any]) -> None:
    """Six steps: losses, smoothed or not, parameters, momenta, running statistics, and both their averages."""
    config = configure(recipe, **overrides)
    draw = np.random.default_rng(0)
    steps = EPOCHS * STEPS_PER_EPOCH
    images = draw.standard_normal((steps, BATCH, PIXELS, PIXELS, 3))
    labels = draw.integers(0, TINY.num_classes, (steps, BATCH))
    errors = Errors()
    with jax.enable_x64(True):
        model, reference = pair()
        schedule = schedule_of(config, STEPS_PER_EPOCH)
        # Steps as int32 would make the rate and the average's decay float32, even where 64 bits are enabled.
        optimizer = optimizer_of(config, lambda step: schedule(step.astype(jnp.float64)))
        step = jax.jit(
            train.train_step(
                nnx.graphdef(model), optimizer, Unchanged(), steps_per_epoch=STEPS_PER_EPOCH,
                label_smoothing=config.label_smoothing, ema=config.ema,
            )
        )  # fmt: skip
        state = train.init(model, optimizer, average=config.ema > 0)._replace(step=jnp.zeros((), jnp.int64))
        split = train.Images(jnp.asarray(np.concatenate(images)), jnp.asarray(np.concatenate(labels)))
        training = train_torch.Training(config, reference, STEPS_PER_EPOCH)
        for i, indices in enumerate(np.arange(labels.size).reshape(labels.shape)):
            state, metrics = step(state, split, jnp.asarray(indices), jax.random.key(0))
            loss, correct = training.step(nchw(images[i]), torch.from_numpy(labels[i]))
            errors.add("losses", f"step {i + 1}", metrics.loss, loss.item())
            assert metrics.correct == correct.item()

        parameters = training.model.named_parameters()
        momenta = {key: training.optimizer.state[parameter]["momentum_buffer"] for key, parameter in parameters}
        found = {
            "parameters": (state.params, training.model.state_dict()),
            "running statistics": (state.batch_stats, training.model.state_dict()),
            "momenta": (optax.tree_utils.tree_get(state.opt_state, "trace"), momenta),
        }
        assert (training.averaged is None) == (state.averaged is None) == (config.ema == 0)
        if training.averaged is not None:
            found["averaged parameters"] = state.averaged.params, training.averaged.state_dict()
            found["averaged statistics"] = state.averaged.batch_stats, training.averaged.state_dict()
        for kind, (values, tensors) in found.items():
            for path, value in by_path(values).items():
                errors.add(kind, path, value, keymap.to_flax(tensors[keymap.torch_key(path)].numpy()))
    assert len(errors["parameters"]) == len(errors["momenta"]) == len(momenta)
    assert len(errors["running statistics"]) == 2 * sum("running_mean" in key for key in reference.state_dict())
    assert errors.worst() < EXACT, str(errors)


def test_evaluation_takes_the_average() -> None:
    """Its weights and its statistics, without smoothing."""
    config = configure("fast")
    reference = tiny_reference()
    training = train_torch.Training(config, reference, STEPS_PER_EPOCH)
    images, labels = torch.randn(BATCH, 3, PIXELS, PIXELS, dtype=torch.float64), torch.arange(BATCH) % 10
    for _ in range(3):
        training.step(images, labels)
    assert training.averaged is not None
    logits = training.averaged(images)
    loss, correct = training.evaluate(images, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
    assert correct == (logits.argmax(1) == labels).sum()
    assert training.model.training
    assert not torch.allclose(logits, training.model.eval()(images))


RATES = [
    ("step", {}),
    ("step", {"warmup_epochs": 0.43, "milestones": (1.3, 2.5, 2.5), "gamma": 0.3}),
    ("step", {"milestones": (0.01, 1.5)}),  # the first step already has the lower rate
    ("step", {"schedule": "cosine"}),
    ("step", {"schedule": "cosine", "warmup_epochs": 1.0}),
    ("fast", {}),
    ("fast", {"warmup_epochs": 0.0}),
    ("fast", {"warmup_epochs": 1 / 7}),  # one step
    ("fast", {"warmup_epochs": 3.0}),  # all of the run
]


@pytest.mark.parametrize(("recipe", "overrides"), RATES)
def test_rates(recipe: str, overrides: dict[str, Any]) -> None:
    """Both sides' learning rate at every step of a run."""
    config, steps_per_epoch = configure(recipe, **overrides), 7
    share = train_torch.factor(config, steps_per_epoch)
    steps = np.arange(EPOCHS * steps_per_epoch)
    with jax.enable_x64(True):
        rates = jax.vmap(schedule_of(config, steps_per_epoch))(jnp.asarray(steps))
    np.testing.assert_allclose([config.lr * share(int(step)) for step in steps], rates, rtol=1e-12)


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_rates_are_those_of_pytorch(kind: str) -> None:
    """jresnet's, without warm-up."""
    config = configure("step", schedule=kind, milestones=(1.0, 2.0) if kind == "step" else ())
    steps = EPOCHS * STEPS_PER_EPOCH
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.lr)
    scheduler: Any = MultiStepLR(optimizer, [2, 4], 0.1) if kind == "step" else CosineAnnealingLR(optimizer, steps)
    wanted = []
    for _ in range(steps):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    with jax.enable_x64(True):
        rates = jax.vmap(schedule_of(config, STEPS_PER_EPOCH))(jnp.arange(steps))
    np.testing.assert_allclose(rates, wanted, rtol=1e-12)


def random_gradients(steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Parameters of two shapes, and gradients for each step."""
    draw = np.random.default_rng(0)
    trees = [{"kernel": draw.standard_normal((5, 3)), "bias": draw.standard_normal(3)} for _ in range(steps + 1)]
    return trees[0], trees[1:]


def optax_steps(optimizer: optax.GradientTransformation, params: Any, gradients: list[Any]) -> Any:
    """The parameters after a step for each of ``gradients``."""
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("decay_norms", [True, False])
def test_adamw_is_that_of_pytorch(decay_norms: bool) -> None:
    """``jresnet.training.optim``'s, over twenty steps of random gradients."""
    start, gradients = random_gradients(20)
    options: dict[str, Any] = {"weight_decay": 0.1}
    with jax.enable_x64(True):
        adamw = optim.optimizer("adamw", 0.01, momentum=0.8, decay_norms=decay_norms, **options)
        found = optax_steps(adamw, jax.tree.map(jnp.asarray, start), gradients)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [parameters["kernel"]], **options},
        {"params": [parameters["bias"]], "weight_decay": 0.1 if decay_norms else 0.0},
    ]
    reference = torch.optim.AdamW(groups, 0.01, (0.8, 0.999))
    for gradient in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradient[name])
        reference.step()
    for name, parameter in parameters.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=EXACT)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_that_of_pytorch(limit: float) -> None:
    """``clip_grad_norm_`` adds 1e-6 to the norm before it divides."""
    start, gradients = random_gradients(1)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients[0].values()))
    assert 1 < norm < 100
    with jax.enable_x64(True):
        sgd = optim.optimizer("sgd", 1.0, momentum=0.0, clip_norm=limit)
        found = optax_steps(sgd, jax.tree.map(jnp.asarray, start), gradients)
    parameters = [torch.nn.Parameter(torch.from_numpy(value)) for value in start.values()]
    for parameter, gradient in zip(parameters, gradients[0].values(), strict=True):
        parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for name, parameter in zip(start, parameters, strict=True):
        step = start[name] - np.asarray(found[name])
        np.testing.assert_allclose(step, parameter.grad.numpy(), rtol=2e-6 / norm, atol=1e-15)


@pytest.mark.parametrize(
    ("arch", "last"), [("resnet20_cifar", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3"), ("resnet18_d2l", "bn2")]
)
def test_network(arch: str, last: str) -> None:
    """jresnet's tensors, drawn as jresnet draws them: convolutions from one normal distribution by fan-out."""
    config = default_config(arch=arch, zero_init_residual=True, precision="float32")
    torch.manual_seed(0)
    tensors = train_torch.network(config, 10).state_dict()
    shapes = params.shapes(zoo.configure(arch, num_classes=10, in_channels=3, stem=config.stem))
    paths = {keymap.torch_key(path): shape for path, shape in shapes.items()}
    assert {
        key: tuple(keymap.to_flax(value.numpy()).shape) for key, value in tensors.items() if "num_batches" not in key
    } == paths
    for key, value in tensors.items():
        if value.ndim == 4:
            expected = (2 / (value.shape[0] * value.shape[2] * value.shape[3])) ** 0.5
            assert abs(value.std() / expected - 1) < 5 / (2 * value.numel()) ** 0.5, key
            assert value.abs().max() > 2 * expected, f"{key} is uniform"
        elif key.endswith(f"{last}.weight"):
            assert not value.any()
        elif value.ndim == 1 and key.endswith((".weight", "running_var")):
            assert (value == 1).all()
        elif "bn" in key or key.endswith("downsample.1.bias"):
            assert not value.any()
        elif key.startswith("fc"):
            bound = tensors["fc.weight"].shape[1] ** -0.5
            assert 0.5 * bound < value.abs().max() <= bound


def test_network_begins_as_jresnet_s() -> None:
    """Which tensors are constant, and what the others' standard deviations are."""
    config = default_config(arch="resnet20_cifar", zero_init_residual=True, precision="float32")
    torch.manual_seed(0)
    tensors = train_torch.network(config, 10).state_dict()
    model = jresnet.create("resnet20_cifar", zero_init_residual=True)
    for path, array in params.arrays(model).items():
        value, tensor = np.asarray(array), tensors[keymap.torch_key(path)].numpy()
        if value.std() == 0 or tensor.std() == 0:
            assert np.unique(value) == np.unique(tensor), path
        else:
            assert abs(value.std() / tensor.std() - 1) < 7 / (2 * value.size) ** 0.5, path


def dataset(train_images: int = 40, test_images: int = 20) -> data.Dataset:
    """Random images."""
    draw = np.random.default_rng(0)

    def split(count: int) -> data.Split:
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return data.Split(images, draw.integers(0, 10, count).astype(np.int32))

    return data.Dataset("cifar10", CLASSES, split(train_images), split(test_images), "drawn", (), {}, "")


def test_views() -> None:
    """One gather crops and mirrors as slices do."""
    images = torch.from_numpy(dataset().train.images)
    padded = train_torch.pad(images)
    assert padded.shape == (40, 40, 40, 3)
    indices, turned = torch.tensor([3, 3, 17]), torch.tensor([False, True, True])
    corners = torch.tensor([[0, 8], [8, 0], [3, 5]])
    found = train_torch.views(padded, indices, corners, turned, 32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for view, index, (top, left), turn in zip(found, indices, corners, turned, strict=True):
        window = np.pad(images[index].numpy(), ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(view.permute(1, 2, 0), window[:, ::-1] if turn else window)


def test_draws() -> None:
    """An epoch takes every image once but for the remainder; every corner comes up; pixels are normalised as jresnet's."""
    torch.manual_seed(0)
    config = configure("step", batch_size=16, val_split=5)
    found = dataset(train_images=400)
    images = train_torch.Images(config, found, torch.device("cpu"))
    assert images.count == {"train": 395, "val": 5, "test": 20}
    assert images.steps_per_epoch == 24
    images.labels = torch.arange(395)
    seen = torch.cat([labels for _, labels in images.epoch(0)])
    assert len(seen) == len(seen.unique()) == 24 * 16
    assert not torch.equal(seen, torch.cat([labels for _, labels in images.epoch(1)]))

    (batch, labels), *_ = images.batches("val")
    np.testing.assert_array_equal(labels, found.train.labels[-5:])
    wanted = config.pipeline().evaluate(jnp.asarray(found.train.images[-5:]))
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1), wanted, atol=1e-6)

    white = images.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0, 0, 0]
    images.padded = train_torch.pad(torch.full((395, 32, 32, 3), 255, dtype=torch.uint8))
    white_rows = [(view[0] == white).any(1).int() for views, _ in images.epoch(0) for view in views]
    offsets = [4 - rows.argmax() + rows.flip(0).argmax() for rows in white_rows]  # black rows above and below
    counts = np.bincount(offsets, minlength=9)
    assert len(counts) == 9
    assert (abs(counts / len(offsets) - 1 / 9) < 0.07).all()


def test_alternating_flip() -> None:
    """Two epochs show each image both ways, the third is the first again; half of the images begin mirrored."""
    torch.manual_seed(0)
    images = train_torch.Images(configure("fast"), dataset(train_images=400), torch.device("cpu"))
    order = torch.randperm(400)
    epochs = [images.turned(order, epoch) for epoch in range(3)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert 150 < epochs[0].sum() < 250
    images.labels = torch.arange(400)
    halves = torch.arange(32)[:, None].expand(32, 32) // 16 * 255  # dark on the left, bright on the right
    images.padded = train_torch.pad(halves.T.to(torch.uint8)[None, :, :, None].expand(400, 32, 32, 3))
    ways: list[set[bool]] = [set() for _ in range(400)]
    for epoch in range(2):
        for views, labels in images.epoch(epoch):
            for view, label in zip(views, labels, strict=True):
                ways[label].add(bool(view[0, 10:20, 8].mean() > view[0, 10:20, 24].mean()))
    assert all(way == {True, False} for way in ways)

    turned = [augment.alternate(jax.random.key(0), jnp.arange(400), epoch) for epoch in range(3)]
    assert (turned[0] != turned[1]).all()
    assert (turned[0] == turned[2]).all()
    assert 150 < turned[0].sum() < 250


def test_warming_up_leaves_no_trace() -> None:
    """Neither at the beginning nor in the middle: the next steps are those of a run that was not warmed up."""
    config = configure("fast", ema=0.5)
    images = train_torch.Images(config, dataset(), torch.device("cpu"))
    losses = []
    for warm in (False, True):
        torch.manual_seed(0)
        training = train_torch.Training(config, train_torch.network(config, 10), images.steps_per_epoch)
        found = []
        for batch in images.epoch(0):
            if warm:
                training.warm_up(images.first(), next(images.batches("test")))
            found.append(training.step(*batch)[0])
        losses.append((torch.stack(found), *training.evaluate(*images.first())))
    assert len(losses[0][0]) > 1
    for left, right in zip(*losses, strict=True):
        assert torch.equal(left, right)


class Killed(Exception):
    """Stands for the end of the process."""


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was killed ends as an undisturbed one, to the last bit; a finished one is left alone."""
    config = configure("fast", batch_size=8, limit_train=16, limit_test=8, val_split=8, seed=3)
    found, whole, cut = dataset(), tmp_path / "whole", tmp_path / "cut"
    wanted = train_torch.run(config, found, whole, resume=False)
    assert sorted(path.name for path in whole.iterdir()) == ["config.json", "metrics.jsonl", "summary.json"]
    assert json.loads((whole / "summary.json").read_text()) == json.loads(json.dumps(wanted))

    train_epoch = train_torch.train_epoch

    def killed(training: Any, images: Any, epoch: int, seconds: float) -> Any:
        if epoch == 1:
            raise Killed
        return train_epoch(training, images, epoch, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(train_torch, "train_epoch", killed)
        with pytest.raises(Killed):
            train_torch.run(config, found, cut, resume=True)
    assert (cut / "state.pt").exists()
    with pytest.raises(InputError, match="already contains a run"):
        train_torch.run(config, found, cut, resume=False)
    with pytest.raises(InputError, match=r"`lr` was 0\.05, now 0\.1"):
        train_torch.run(dataclasses.replace(config, lr=0.1), found, cut, resume=True)
    (cut / "metrics.jsonl").write_text("cut off")
    got = train_torch.run(config, found, cut, resume=True)
    assert got["final"] == wanted["final"]
    assert got["best"] == wanted["best"]
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, cut)]
    for row in rows[0] + rows[1]:
        del row["images_per_second"], row["seconds"]
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == [1, 2, 3]
    assert not (cut / "state.pt").exists()

    capsys.readouterr()
    assert train_torch.run(config, found, cut, resume=True)["seconds"] == got["seconds"]
    assert capsys.readouterr().out == f"seed 3 is finished: {cut}\n"


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds, and a configuration whose every field is jresnet's."""
    monkeypatch.setattr(data, "load_cifar10", lambda folder, download: dataset())
    flags = "--recipe fast --depth 20 --epochs 1 --batch-size 16 --limit-train 16 --limit-test 5 --no-nesterov --runs 2"
    assert train_torch.main([*flags.split(), "--out", str(tmp_path), "--seed", "5"]) == 0
    wanted = default_config(
        recipe="fast", arch="resnet20_cifar", epochs=1, batch_size=16, limit_train=16, limit_test=5, nesterov=False,
        precision="float32", seed=6,
    )  # fmt: skip
    assert json.loads((tmp_path / "seed-6" / "config.json").read_text())["run"] == json.loads(
        json.dumps(dataclasses.asdict(wanted))
    )
    summary = json.loads((tmp_path / "seed-5" / "summary.json").read_text())
    assert summary["device"] == f"cpu, {torch.get_num_threads()} threads"
    assert summary["final"].keys() == {"epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    assert (tmp_path / "summary.json").exists()

    capsys.readouterr()
    foreign = "--optimizer adamw --clip-norm 1 --mixup 0.2 --random-erasing 0.5 --remat --on-nan rollback"
    assert train_torch.main([*foreign.split(), "--out", str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    listed = "optimizer adamw, clip_norm 1.0, random_erasing 0.5, mixup 0.2, remat True, on_nan rollback"
    assert error == f"error: PyTorch's side does not do this: {listed}\n"
    assert not (tmp_path / "other").exists()
