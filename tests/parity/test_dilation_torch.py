"""``output_stride`` is torchvision's ``replace_stride_with_dilation`` and timm's ``output_stride``, gradients included."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import jresnet
from convert import reference
from convert.verify import relative
from jresnet.kernels import convolve_dilated
from jresnet.models import params, zoo
from jresnet.pytorch import keymap, statedict

EXACT = 1e-10  # relative, in float64


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("dilation", "size", "groups"), [(2, (9, 6), 1), (4, (7, 7), 1), (8, (5, 19), 1), (2, (8, 5), 2)]
)
def test_a_convolution_is_pytorchs(dilation: int, size: tuple[int, int], groups: int) -> None:
    draw = np.random.default_rng(0)
    x, k = draw.standard_normal((2, *size, 4)), draw.standard_normal((3, 3, 4 // groups, 6))
    tensors = nchw(x).requires_grad_(), torch.from_numpy(k.transpose(3, 2, 0, 1).copy()).requires_grad_()
    expected = F.conv2d(*tensors, padding=dilation, dilation=dilation, groups=groups)
    dy = draw.standard_normal(nhwc(expected).shape)
    expected.backward(nchw(dy))
    with jax.enable_x64(True):
        found, pull = jax.vjp(
            jax.jit(lambda x, k: convolve_dilated(x, k, dilation, dilation, groups)), jnp.asarray(x), jnp.asarray(k)
        )
        dx, dk = pull(jnp.asarray(dy))
    assert relative(found, nhwc(expected)) < EXACT
    assert relative(dx, nhwc(tensors[0].grad)) < EXACT
    assert relative(dk, tensors[1].grad.numpy().transpose(2, 3, 1, 0)) < EXACT


def torchvisions(output_stride: int) -> tuple[torch.nn.Module, int]:
    from torchvision.models import resnet

    replaced = {8: [False, True, True], 16: [False, False, True], 4: [True, True, True]}[output_stride]
    return resnet.ResNet(
        resnet.Bottleneck, [1, 1, 2, 1], 5, groups=2, width_per_group=8, replace_stride_with_dilation=replaced
    ), 41


def timms(output_stride: int) -> tuple[torch.nn.Module, int]:
    from timm.models import resnet

    return resnet.ResNet(
        resnet.BasicBlock, (1, 1, 2, 1), 5, output_stride=output_stride, channels=(64, 24, 32, 40), zero_init_last=False
    ), 41


@pytest.mark.parametrize(
    ("build", "output_stride"), [pytest.param(torchvisions, 8, marks=pytest.mark.long), (timms, 16)]
)
def test_outputs_and_gradients_are_pytorchs(build: Any, output_stride: int) -> None:
    torch.manual_seed(0)
    theirs, size = build(output_stride)
    networks.randomise(theirs)
    found = statedict.match(theirs.state_dict())
    config = zoo.replaced(found.config, output_stride=output_stride)
    theirs = theirs.double()
    draw = np.random.default_rng(0)
    images, labels = draw.standard_normal((3, size, size - 8, 3)), draw.integers(0, 5, 3)
    with jax.enable_x64(True):
        model = params.fill(config, found.values)
        nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(model)))
        x = jnp.asarray(images)
        stages = {}
        hooks = [
            getattr(theirs, f"layer{i}").register_forward_hook(
                lambda module, inputs, output, name=f"layer{i}": stages.update({name: nhwc(output).copy()})
            )
            for i in range(1, 5)
        ]
        expected = theirs.eval()(nchw(images))
        features = model.features(x)
        worst = max(relative(features[name], value) for name, value in stages.items())
        worst = max(
            worst, relative(model(x), expected.detach().numpy()), relative(jresnet.fuse(model)(x), expected.detach())
        )
        assert stages["layer4"].shape[1] == -(-size // output_stride)
        for hook in hooks:
            hook.remove()

        graph, weights, rest = nnx.split(model, nnx.Param, ...)
        theirs.train()
        loss = F.cross_entropy(theirs(nchw(images)), torch.from_numpy(labels))
        loss.backward()

        @jax.jit
        @jax.grad
        def slopes(weights: nnx.State) -> jax.Array:
            logits = nnx.merge(graph, weights, rest, copy=True)(x, train=True)
            return -jax.nn.log_softmax(logits)[jnp.arange(3), labels].mean()

        gradients = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(slopes(weights))}
        named = dict(theirs.named_parameters())
        errors = {
            path: relative(value, keymap.to_flax(named[keymap.torch_key(path)].grad.numpy()))
            for path, value in gradients.items()
        }
    print(f"{build.__name__}, output stride {output_stride}: outputs {worst:.1e}, gradients {max(errors.values()):.1e}")
    assert worst < EXACT
    assert max(errors.values()) < EXACT


@pytest.mark.parametrize(("arch", "name"), [("resnet50", "conv2"), ("resnet18", "conv1")])
def test_the_reference_network_is_dilated(arch: str, name: str) -> None:
    model = reference.network(arch, zoo.configure(arch, num_classes=3, output_stride=8))
    found = [getattr(block, name).dilation for block in (model.layer3[0], model.layer4[0], model.layer4[1])]
    assert found == [(1, 1), (2, 2), (4, 4)]
