"""Something non-finite is planted in a finite network, and must be named where it was planted."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx

from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.training.nans import LINES, find_non_finite

# As small as they can be, since each is compiled.
BASIC = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")
BOTTLENECK = ResNetConfig("bottleneck", (1,), (4,), num_classes=10, stem="imagenet", groups=2)
BIASED = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="conv", conv_bias=True)
PROJECTED = ResNetConfig("basic", (1,), (4,), num_classes=10, stem="cifar", shortcut="projection_first")
PLAIN = ResNetConfig("basic", (1,), (4,), num_classes=10, stem="cifar")


def network(config: ResNetConfig = BASIC, dtype: Any = None) -> ResNet:
    model = ResNet(config, dtype=dtype, rngs=nnx.Rngs(0))
    randomise(model)
    return model


def batch(n: int = 4, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).standard_normal((n, size, size, 3), np.float32)
    return images, np.eye(10, dtype=np.float32)[np.arange(n)]


def layer_of(model: ResNet, path: str) -> Any:
    for key in path.split("."):
        model = model[int(key)] if key.isdecimal() else getattr(model, key)
    return model


def only_line(model: ResNet, images: Any = None, targets: Any = None) -> str:
    default = batch()
    lines = find_non_finite(model, default[0] if images is None else images, default[1] if targets is None else targets)
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("config", "dtype"), [(BASIC, None), (BOTTLENECK, jnp.bfloat16)])
def test_nothing_is_found_in_a_healthy_network_and_nothing_changed(config: ResNetConfig, dtype: Any) -> None:
    model = network(config, dtype)
    before = jax.tree.map(np.array, nnx.state(model))
    assert find_non_finite(model, *batch()) == []
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert type(model.layer1[0].conv1) is type(network().conv1)


def test_inputs_come_first() -> None:
    model = network()
    model.conv1.kernel[...] = model.conv1.kernel[...].at[0].set(np.nan)
    images, targets = batch()
    images[1, 2, 3:5] = np.inf
    images[0, 0, 0] = np.nan
    targets[3, 9] = np.nan
    assert find_non_finite(model, images, targets) == [
        "images: 3 NaN and 6 infinite of 3,072 values", "targets: 1 of 40 values NaN",
    ]  # fmt: skip


def test_parameters_in_the_order_of_the_computation() -> None:
    model = network(BOTTLENECK, jnp.bfloat16)
    model.fc.bias[...] = model.fc.bias[...].at[:2].set(-np.inf)
    model.layer1[0].downsample[1].scale[...] = np.full(16, np.nan, np.float32)
    model.layer1[0].conv1.kernel[...] = model.layer1[0].conv1.kernel[...].at[0, 0, 0, 0].set(np.inf)
    assert find_non_finite(model, *batch()) == [
        "layer1.0.conv1.kernel before the step: 1 of 32 values infinite",
        "layer1.0.downsample.1.scale before the step: 16 of 16 values NaN",
        "fc.bias before the step: 2 of 10 values infinite",
    ]


def test_of_many_parameters_the_first_are_named() -> None:
    model = network()
    nnx.update(model, jax.tree.map(lambda leaf: leaf * np.float32(np.nan), nnx.state(model, nnx.Param)))
    lines = find_non_finite(model, *batch())
    assert lines[0] == "conv1.kernel before the step: 108 of 108 values NaN"
    assert lines[LINES:] == [f"and {len(jax.tree.leaves(nnx.state(model, nnx.Param))) - LINES} more"]


def test_running_statistics_do_not_hide_what_comes_after() -> None:
    model = network()
    model.layer1[0].bn2.var[...] = model.layer1[0].bn2.var[...].at[1].set(np.inf)
    first = "layer1.0.bn2.var before the step: 1 of 4 values infinite"
    assert find_non_finite(model, *batch()) == [first]
    model.layer2[0].conv2.kernel[...] = model.layer2[0].conv2.kernel[...] * 1e38
    lines = find_non_finite(model, *batch())
    assert lines[0] == first
    assert [line.partition(":")[0] for line in lines[1:]] == ["layer2.0.conv2"]


@pytest.mark.parametrize("path", ["conv1", "bn1", "layer1.0.conv2", "layer1.0.bn3", "layer1.0.downsample.0", "fc"])
def test_the_layer_that_overflows(path: str) -> None:
    model = network(BOTTLENECK, jnp.bfloat16)
    layer = layer_of(model, path)
    name = "scale" if hasattr(layer, "scale") else "kernel"
    leaf = getattr(layer, name)
    leaf[...] = np.where(np.asarray(leaf[...]) < 0, np.float32(-3e38), np.float32(3e38))
    line = only_line(model)
    wide = "bfloat16" if path != "fc" else "float32"
    own = rf"bias \d\.\d+, {name} 3e38" if path == "fc" or name == "scale" else f"{name} 3e38"
    pattern = rf"{path}: .* of [\d,]+ values.*; largest magnitudes: input \d\S*, {own} \({wide} ends at 3\.4e38\)"
    assert re.fullmatch(pattern, line), line


def test_float16_ends_early() -> None:
    model = network(PLAIN, jnp.float16)
    model.layer1[0].bn1.scale[...] = np.full(4, 60000, np.float32)
    line = only_line(model)
    assert re.match(
        r"layer1\.0\.bn1: [\d,]+ of 4,096 values infinite; .*, scale 6e4 \(float16 ends at 6\.6e4\)", line
    ), line


def test_no_variance_and_no_eps() -> None:
    model = network(PLAIN)
    model.layer1[0].conv2.kernel[...] = model.layer1[0].conv2.kernel[...] * 0
    assert find_non_finite(model, *batch()) == []
    model.layer1[0].bn2.eps = 0.0
    assert only_line(model).startswith("layer1.0.bn2: 4,096 of 4,096 values NaN; largest magnitudes: input 0, bias 0.")


def test_the_sum_of_a_block() -> None:
    model = network(PROJECTED)
    for norm in (model.layer1[0].bn2, model.layer1[0].downsample[1]):
        norm.bias[...] = np.full(4, 2e38, np.float32)
    line = only_line(model)
    assert line.startswith("layer1.0: 4,096 of 4,096 values infinite; largest magnitudes: input ")
    assert re.search(r", bn2 2e38, downsample\.0 \S+, downsample\.1 2e38 \(float32 ends at 3\.4e38\)$", line), line


def test_the_pool_before_the_head() -> None:
    """Its sum over the pixels overflows where no layer did."""
    model = network(PROJECTED)
    model.layer1[0].bn2.bias[...] = np.full(4, 2e38, np.float32)
    line = only_line(model)
    assert line == "input of fc: 16 of 16 values infinite; largest magnitudes: layer1.0 2e38 (float32 ends at 3.4e38)"


def test_the_loss() -> None:
    model = network()
    model.fc.bias[...] = np.array([-3e38] * 5 + [3e38] * 5, np.float32)
    line = only_line(model)
    assert line == "loss: 1 of 1 values NaN; largest magnitudes: fc 3e38 (float32 ends at 3.4e38)"


def test_a_gradient_with_respect_to_a_layers_input() -> None:
    model = network()
    block = model.layer1[0]
    for leaf in (block.bn1.scale, block.bn1.bias):  # tiny activations by a huge kernel: the forward pass is harmless
        leaf[...] = leaf[...] * 1e-36
    block.conv2.kernel[...] = block.conv2.kernel[...] * 1e37
    block.bn2.scale[...] = block.bn2.scale[...] * 1e6
    line = only_line(model)
    assert re.match(
        r"layer1\.0\.conv2, gradient of its input: [\d,]+ .*of 4,096 values.*; largest magnitudes: gradient of its output "
        r"\S+, input \S+e-36, kernel \S+e3[67] ",
        line,
    ), line


def test_the_images_gradient_is_nobodys() -> None:
    """Training does not compute it."""
    model = network(PLAIN)
    images, targets = batch()
    model.conv1.kernel[...] = model.conv1.kernel[...] * 1e37
    model.bn1.scale[...] = model.bn1.scale[...] * 1e6
    assert find_non_finite(model, images * np.float32(1e-36), targets) == []


def test_a_gradient_with_respect_to_a_parameter() -> None:
    model = network()
    block = model.layer1[0]
    block.bn1.scale[...] = block.bn1.scale[...] * 1e36
    block.conv2.kernel[...] = block.conv2.kernel[...] * 1e-36
    block.bn2.scale[...] = block.bn2.scale[...] * 1e6
    line = only_line(model)
    assert line.startswith("layer1.0.conv2, gradient of its kernel: "), line


def test_the_sum_of_a_blocks_gradients() -> None:
    """A kernel for both branches, and scales for which their gradients end 7 % below float32 and the sum 8 % above."""
    model = network(PROJECTED)
    block = model.layer1[0]
    for leaf in (model.bn1.scale, model.bn1.bias):
        leaf[...] = leaf[...] * 1e-36
    kernel = block.downsample[0].kernel[...] * 1e36
    block.downsample[0].kernel[...] = kernel
    block.conv1.kernel[...] = jnp.zeros_like(block.conv1.kernel[...]).at[1, 1].set(kernel[0, 0])
    for norm in (block.bn2, block.downsample[1]):
        norm.scale[...] = norm.scale[...] * 1.566e5
    line = only_line(model)
    assert re.match(
        r"layer1\.0, gradient of its input: \d of 4,096 values infinite; largest magnitudes: gradient of its output \S+, "
        r"input \S+, gradient of conv1's input 3\.\de38, .*, gradient of downsample\.0's input 2\.\de38, ",
        line,
    ), line


def test_a_gradient_at_the_head() -> None:
    model = network(PLAIN)
    images, targets = batch(1)
    model.fc.kernel[...] = np.tile(np.where(targets == 1, np.float32(-3e38), np.float32(3e38)), (4, 1))
    for norm in (model.bn1, model.layer1[0].bn2):  # features of 0 exactly
        norm.scale[...], norm.bias[...] = norm.scale[...] * 0, norm.bias[...] * 0
    line = only_line(model, images, targets)
    assert line.startswith("fc, gradient of its input: 4 of 4 values infinite; largest magnitudes: gradient of its "), (
        line
    )


def test_running_statistics_that_only_their_update_spoils() -> None:
    model = network(PLAIN)
    model.layer1[0].bn2.momentum = np.inf
    lines = find_non_finite(model, *batch())
    assert [line.partition(";")[0] for line in lines] == [
        "layer1.0.bn2.mean after the step: 4 of 4 values NaN", "layer1.0.bn2.var after the step: 4 of 4 values NaN",
    ]  # fmt: skip


def test_images_that_the_model_does_not_take() -> None:
    with pytest.raises(TypeError, match="normalised floating-point images"):
        find_non_finite(network(), np.zeros((4, 16, 16, 3), np.uint8), batch()[1])


def test_a_rematerialized_network_is_listened_to_as_well() -> None:
    model = ResNet(BASIC, remat=True, rngs=nnx.Rngs(0))
    randomise(model)
    layer_of(model, "layer2.0.bn1").scale[...] = jnp.full(8, jnp.nan)
    assert "layer2.0.bn1" in only_line(model)
    assert model.remat
