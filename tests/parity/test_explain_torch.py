"""Grad-CAM is its formula in PyTorch, in float64, and that of the package ``grad-cam`` where it is installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import jresnet
from convert import reference
from convert.verify import relative
from jresnet.models import params
from jresnet.pytorch import statedict

CONFIG = jresnet.ResNetConfig("basic", (1, 2, 1), (4, 8, 16), num_classes=5, stem="cifar", shortcut="projection")
X = np.random.default_rng(0).standard_normal((4, 26, 19, 3))


def their_maps(model: nn.Module, module: nn.Module, images: torch.Tensor, classes: np.ndarray) -> np.ndarray:
    """As pytorch_grad_cam.base_cam of grad-cam 1.5.7, in float64 throughout."""
    kept = []
    hook = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = model(images)
    hook.remove()
    (slopes,) = torch.autograd.grad(logits[np.arange(len(classes)), classes].sum(), kept[0])
    maps = torch.relu((slopes.mean((2, 3), keepdim=True) * kept[0]).sum(1))

    def scaled(maps: torch.Tensor) -> torch.Tensor:
        maps = maps - maps.amin((1, 2), keepdim=True)
        return maps / (1e-7 + maps.amax((1, 2), keepdim=True))

    maps = F.interpolate(scaled(maps)[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return scaled(maps).detach().numpy()


@pytest.mark.parametrize(
    "layer", [pytest.param("stem", marks=pytest.mark.long), pytest.param("layer2.0", marks=pytest.mark.long), "layer3"]
)
def test_maps_are_the_formulas(layer: str) -> None:
    torch.manual_seed(0)
    theirs = reference.ResNet(CONFIG)
    networks.randomise(theirs)
    found = statedict.match(theirs.state_dict())
    theirs = theirs.double().eval()
    images = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
    modules = {"stem": theirs.maxpool, "layer2.0": theirs.layer2[0]}
    module = modules.get(layer) or getattr(theirs, layer)
    with jax.enable_x64(True):
        model = params.fill(found.config, found.values)
        nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
        predicted = np.asarray(jax.jit(model)(X)).argmax(-1)
        for classes in (None, np.array([0, 3, 1, 4])):
            ours = jresnet.explain.grad_cam(model, X, classes, layer)
            wanted = predicted if classes is None else classes
            assert relative(ours, their_maps(theirs, module, images, wanted)) < 1e-10
            if classes is not None:
                _beside_the_package(ours, theirs, module, images, classes)


def _beside_the_package(
    ours: jax.Array, theirs: nn.Module, module: nn.Module, images: torch.Tensor, classes: np.ndarray
):
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return  # tests/golden/grad_cam.npz has what it gave
    with GradCAM(model=theirs, target_layers=[module]) as cam:
        maps = cam(images, [ClassifierOutputTarget(int(c)) for c in classes])
    np.testing.assert_allclose(ours, maps, atol=1e-5)  # its resizing is in float32
