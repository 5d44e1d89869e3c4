"""Training is PyTorch's: ten steps of jresnet's own ``train_step`` beside ten of ``torch.optim.SGD``, in float64.

In float32 two right programs drift apart within tens of steps; in float64 only a difference in what is computed shows.
``python -m pytest tests/parity/test_training.py -s`` prints the largest relative error of each kind and its tensor.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch.optim.lr_scheduler import MultiStepLR

from convert import torch2flax
from jresnet.kernels import global_average_pool
from jresnet.models import zoo
from jresnet.pytorch import keymap
from jresnet.training import optim
from jresnet.training import step as train
from jresnet.training.augment import Pipeline

EXACT = 1e-10  # relative L2 error of a tensor; rounding alone gives 1e-16 to 5e-13
STEPS, MILESTONE, GAMMA = 10, 6, 0.1
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
# 40 pixels leave the last BN of a whole ImageNet network 2 x 2 x 4 = 16 values a channel, where 32 would leave 4, and give
# strided layers inputs of even size and of odd, 36 a shallow one's. convolve_to_train cuts 20 CIFAR images into pieces of 8,
# 8 and 4.
SIZES = {"imagenet": (4, 40), "cifar": (20, 32)}  # images a batch, pixels
SHALLOW_SIZE = 36

SHALLOW = ("resnet18", "resnet50", "resnext50_32x4d", "resnet34_projection", "resnet18_d2l")
WHOLE = (*SHALLOW, "wide_resnet50_2", "resnet20_cifar")  # pytest -m long
TRAINED = ("resnet8_cifar", *WHOLE)
# What timm alone has is in test_timm.py.
OTHERS = tuple(arch for arch in zoo.ZOO if arch not in TRAINED and arch not in zoo.IN_TIMM - {*networks.TORCHVISION})
FEW = ("resnet32_cifar", "resnet34")  # the others have more blocks, or more channels


def cases() -> list[Any]:
    """Architecture, whether shallow, whether with Nesterov's momentum."""
    short = [pytest.param("resnet8_cifar", False, nesterov) for nesterov in (True, False)]
    few = ("resnet50", "resnet18_d2l")  # both blocks; the other shortcuts are timm's and resnet8_cifar's
    shallow = [pytest.param(arch, True, True, marks=[] if arch in few else [pytest.mark.long]) for arch in SHALLOW]
    long = [pytest.param(arch, False, True, marks=[pytest.mark.long]) for arch in WHOLE]
    return [*short, *shallow, *long, pytest.param("resnet20_cifar", False, False, marks=[pytest.mark.long])]


class Unchanged(Pipeline):
    """A pipeline that hands the images on: both frameworks see the same ones, in float64."""

    def __init__(self) -> None:
        super().__init__("pad", 32, "none", (), ())

    def train(self, key: jax.Array, images: jax.Array, turned: jax.Array | None = None) -> jax.Array:
        return images


class Errors(dict[str, dict[str, float]]):
    """Relative L2 errors by kind and tensor."""

    def add(self, kind: str, name: str, value: Any, reference: Any, scale: Any = None) -> None:
        """``scale`` is what the error is relative to, where not to the reference."""
        value, reference = np.asarray(value), np.asarray(reference)
        assert value.dtype == reference.dtype == np.float64, f"{kind} of {name}: {value.dtype}, {reference.dtype}"
        assert value.shape == reference.shape, f"{kind} of {name}: {value.shape}, {reference.shape}"
        norm = np.linalg.norm(reference if scale is None else scale)
        self.setdefault(kind, {})[name] = float(np.linalg.norm(value - reference) / norm)

    def worst(self) -> float:
        """The largest of all; NaN where there is one."""
        return float(np.max([error for found in self.values() for error in found.values()]))

    def __str__(self) -> str:
        names = {kind: max(found, key=found.__getitem__) for kind, found in self.items()}
        return ", ".join(f"{kind} {self[kind][name]:.1e} ({name})" for kind, name in names.items())


def pair(arch: str, shallow: bool = False) -> tuple[Any, Any]:
    """jresnet's and PyTorch's network of the same float64 parameters. Call it where 64 bits are enabled."""
    reference = networks.build(arch, shallow)
    calm(reference)
    model = torch2flax.convert(reference.state_dict(), None if shallow else arch)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
    return model, reference.double()


def calm(reference: torch.nn.Module) -> None:
    """Weakens every block against its shortcut, as training does.

    At full strength the steps of an untrained network are chaotic: resnet50's error of 1e-15 grew fiftyfold with each, at
    learning rates of 1e-3 and of 1e-2. At a fifth of it ten steps leave 5e-14 in the parameters.
    """
    with torch.no_grad():
        for name, block in reference.named_modules():
            if name.startswith("layer") and name.count(".") == 1:
                getattr(block, "bn3" if hasattr(block, "bn3") else "bn2").weight.mul_(0.2)


def draw_batches(arch: str, steps: int, shallow: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal images ``[steps, B, H, W, C]`` and labels ``[steps, B]``."""
    config = zoo.find(arch).config
    batch, size = SIZES[config.stem]
    size = SHALLOW_SIZE if shallow else size
    draw = np.random.default_rng(0)
    images = draw.standard_normal((steps, batch, size, size, config.in_channels))
    return images, draw.integers(0, config.num_classes, (steps, batch))


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def jax_outputs(model: Any, images: jax.Array, training: bool) -> dict[str, jax.Array]:
    """Every stage's output and the logits; running statistics stay as they are."""
    # Not jitted: the few different layers compile in a fifth of the time of the whole.
    outputs = nnx.clone(model).features(images, training)
    return outputs | {"logits": model.fc(global_average_pool(list(outputs.values())[-1]))}


def torch_outputs(reference: Any, images: np.ndarray, training: bool) -> dict[str, np.ndarray]:
    """The same of PyTorch's network, NHWC."""
    outputs = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        outputs[name] = tensor.numpy().transpose(0, 2, 3, 1).copy()

    named = {name: stage for name, stage in reference.named_children() if name.startswith("layer")}
    stages = {name: stage for name, stage in named.items() if not isinstance(stage, torch.nn.Identity)}
    hooks = [stages["layer1"].register_forward_pre_hook(lambda module, inputs: keep("stem", inputs[0]))]
    for name, stage in stages.items():
        hooks.append(stage.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output)))
    statistics = {name: value.clone() for name, value in reference.named_buffers()}
    with torch.no_grad():
        logits = reference.train(training)(nchw(images)).numpy()
    reference.load_state_dict(statistics, strict=False)
    for hook in hooks:
        hook.remove()
    return outputs | {"logits": logits}


def add_outputs(errors: Errors, model: Any, reference: Any, images: np.ndarray, training: bool) -> None:
    wanted = torch_outputs(reference, images, training)
    found = jax_outputs(model, jnp.asarray(images), training)
    assert wanted.keys() == found.keys()
    for name, value in found.items():
        mode = "training" if training else "evaluation"
        errors.add("logits" if name == "logits" else "stages", f"{name} in {mode}", value, wanted[name])


def keep_gradients() -> optax.GradientTransformation:
    """Hands the gradients on, and keeps the newest as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


def by_path(state: nnx.State) -> dict[str, np.ndarray]:
    """``{"layer1.0.conv1.kernel": array}``"""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def scale_of_gradient(arch: str, path: str, gradients: dict[str, np.ndarray]) -> np.ndarray | None:
    """What a gradient's error is relative to, where its true value is zero; None elsewhere.

    A BN takes out the mean that the bias before it adds, so that this bias has no effect. Its gradient, the sum of the
    gradients of the convolution's outputs, cancels to rounding errors, and no two programs make the same. They must be
    small against that sum's terms, and so against the same convolution's kernel gradient: those terms times inputs of
    order 1. The bias itself and its momentum are compared as all others are, since weight decay acts on them.
    """
    convolution, _, leaf = path.rpartition(".")
    cancels = arch == "resnet18_d2l" and leaf == "bias" and convolution.rpartition(".")[2] in ("conv1", "conv2")
    return gradients[f"{convolution}.kernel"] if cancels else None


@pytest.mark.parametrize(("arch", "shallow", "nesterov"), cases())
def test_ten_training_steps(arch: str, shallow: bool, nesterov: bool) -> None:
    """Logits and stages in both modes, ten losses, gradients, SGD with step decay, momenta, running statistics."""
    images, labels = draw_batches(arch, STEPS, shallow)
    errors = Errors()
    with jax.enable_x64(True):
        model, reference = pair(arch, shallow)
        for training in (False, True):
            add_outputs(errors, model, reference, images[0], training)

        schedule = optim.step_decay(LR, (MILESTONE,), GAMMA, steps_per_epoch=1)
        sgd = optim.optimizer("sgd", schedule, momentum=MOMENTUM, nesterov=nesterov, weight_decay=WEIGHT_DECAY)
        optimizer = optax.chain(keep_gradients(), sgd)
        step = jax.jit(train.train_step(nnx.graphdef(model), optimizer, Unchanged()), donate_argnums=0)
        state = train.init(model, optimizer)
        split = train.Images(jnp.asarray(np.concatenate(images)), jnp.asarray(np.concatenate(labels)))

        reference.train()
        torch_sgd = torch.optim.SGD(reference.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=nesterov)
        scheduler = MultiStepLR(torch_sgd, [MILESTONE], GAMMA)
        parameters = dict(reference.named_parameters())

        def wanted(path: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
            return keymap.to_flax(tensors[keymap.torch_key(path)].numpy())

        for i, indices in enumerate(np.arange(labels.size).reshape(labels.shape)):
            state, metrics = step(state, split, jnp.asarray(indices), jax.random.key(0))
            loss = F.cross_entropy(reference(nchw(images[i])), torch.from_numpy(labels[i]))
            torch_sgd.zero_grad()
            loss.backward()
            torch_sgd.step()
            scheduler.step()
            errors.add("losses", f"step {i + 1}", metrics.loss, loss.item())
            if i == 0:
                expected = {
                    path: wanted(path, {k: p.grad for k, p in parameters.items()}) for path in by_path(state.params)
                }
                for path, value in by_path(state.opt_state[0]).items():
                    errors.add("gradients", path, value, expected[path], scale_of_gradient(arch, path, expected))

        momenta = {key: torch_sgd.state[parameter]["momentum_buffer"] for key, parameter in parameters.items()}
        for path, value in by_path(optax.tree_utils.tree_get(state.opt_state, "trace")).items():
            errors.add("momenta", path, value, wanted(path, momenta))
        for path, value in by_path(state.params).items():
            errors.add("parameters", path, value, wanted(path, reference.state_dict()))
        for path, value in by_path(state.batch_stats).items():
            errors.add("running statistics", path, value, wanted(path, reference.state_dict()))
    print(f"\n{arch}{', shallow' if shallow else ''}{'' if nesterov else ' without Nesterov'}: {errors}")
    assert len(errors["gradients"]) == len(errors["momenta"]) == len(errors["parameters"]) == len(parameters)
    assert len(errors["running statistics"]) == 2 * sum("running_mean" in key for key in reference.state_dict())
    assert errors.worst() < EXACT, str(errors)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch in FEW else [pytest.mark.long]) for arch in OTHERS]
)
def test_logits(arch: str) -> None:
    """Those of all the other rows."""
    images, _ = draw_batches(arch, 1)
    errors = Errors()
    with jax.enable_x64(True):
        model, reference = pair(arch)
        add_outputs(errors, model, reference, images[0, :2], training=False)
    print(f"\n{arch}: {errors}")
    assert errors.worst() < EXACT, str(errors)
