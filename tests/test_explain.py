"""``jresnet.explain``; tests/parity/test_explain_torch.py compares Grad-CAM with its formula in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomise
from flax import nnx

import jresnet
from jresnet import explain
from jresnet.errors import InputError
from jresnet.models import params

TINY = jresnet.ResNetConfig("basic", (1, 2, 1), (4, 8, 16), num_classes=5, stem="cifar", shortcut="projection")
# RandomState, since it promises the same stream for ever: the golden file has what the package gave for these numbers.
X = np.random.RandomState(0).standard_normal((4, 24, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> jresnet.ResNet:
    model = jresnet.ResNet(TINY, rngs=nnx.Rngs(0))
    randomise(model)
    return model


def drawn() -> dict[str, np.ndarray]:
    """The weights of tests/golden/make_grad_cam.py."""
    draw = np.random.RandomState(0)
    return {
        path: (draw.uniform(0.5, 1.5, shape) if path.endswith(("scale", "var")) else draw.normal(0, 0.3, shape)).astype(
            "f4"
        )
        for path, shape in params.shapes(TINY).items()
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer", ["layer3", "layer2.0"])
def test_maps_are_those_of_the_package_grad_cam(layer: str, fused: bool) -> None:
    with np.load(Path(__file__).parent / "golden" / "grad_cam.npz") as golden:
        network = params.fill(TINY, drawn())
        network = jresnet.fuse(network) if fused else network
        np.testing.assert_allclose(network(X), golden["logits"], rtol=1e-4, atol=1e-5)
        for classes, name in ((golden["classes"], "chosen"), (None, "predicted")):
            found = explain.grad_cam(network, X, classes, layer)
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, golden[f"{layer}.{name}"], atol=2e-5)


def test_a_map_is_from_0_to_1_and_of_the_images_size(model: jresnet.ResNet) -> None:
    maps = np.asarray(explain.grad_cam(model, X))
    assert maps.shape == X.shape[:3]
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps.max() > 0.99
    np.testing.assert_array_equal(maps, explain.grad_cam(model, X, layer="layer3"))  # the last stage
    np.testing.assert_allclose(maps, explain.grad_cam(model, X, model(X).argmax(-1)), rtol=1e-6)
    one = explain.grad_cam(model, X, 2)
    np.testing.assert_array_equal(one, explain.grad_cam(model, X, [2, 2, 2, 2]))
    np.testing.assert_allclose(one[1:2], explain.grad_cam(model, X[1:2], 2), rtol=1e-3, atol=1e-5)
    assert not np.allclose(one, explain.grad_cam(model, X, 3))


def test_explanations_evaluate_whatever_the_mode_and_change_nothing(model: jresnet.ResNet) -> None:
    other = nnx.clone(model)
    other.train()
    before = {path: np.array(value) for path, value in params.arrays(other).items()}
    np.testing.assert_array_equal(explain.grad_cam(other, X), explain.grad_cam(model, X))
    np.testing.assert_array_equal(
        explain.integrated_gradients(other, X, 1, steps=2), explain.integrated_gradients(model, X, 1, steps=2)
    )
    for path, value in params.arrays(other).items():
        np.testing.assert_array_equal(value, before[path])


def test_inside_jit(model: jresnet.ResNet) -> None:
    for function in (explain.grad_cam, lambda m, x: explain.integrated_gradients(m, x, steps=2)):
        found = jax.jit(lambda x, function=function: function(model, x))(X)
        np.testing.assert_allclose(found, function(model, X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda x, c: explain.grad_cam(model, x, c))(X, jnp.arange(4)),
        explain.grad_cam(model, X, jnp.arange(4)), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("fused", "baseline"), [(False, 0.3), (True, 0.0)])
def test_integrated_gradients_are_complete(model: jresnet.ResNet, fused: bool, baseline: float) -> None:
    """Shares sum to the logit's distance from the baseline's, the better the more steps there are."""
    with jax.enable_x64(True):
        wide = params.fill(TINY, params.arrays(model))
        nnx.update(wide, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.state(wide)))
        wide = jresnet.fuse(wide) if fused else wide
        x, classes = np.float64(X[:2, :10, :8]), np.array([0, 3])
        logits = jax.jit(wide)
        moved = np.asarray(logits(x) - logits(np.full_like(x, baseline)))[np.arange(2), classes]
        errors = []
        for steps in (4, 128):
            shares = explain.integrated_gradients(wide, x, classes, steps, baseline)
            assert shares.shape == x.shape
            errors.append(np.abs(shares.sum((1, 2, 3)) - moved).max())
    assert errors[1] < 0.02 * np.abs(moved).max()
    assert errors[1] < errors[0]


def test_integrated_gradients_of_a_linear_function_are_its_terms() -> None:
    """A network whose ReLUs all pass is linear: one step is exact, and each share is the pixel times its slope."""
    model = jresnet.ResNet(jresnet.ResNetConfig("basic", (1,), (4,), 3, stem="cifar"), rngs=nnx.Rngs(0))
    for norm in (model.bn1, model.layer1[0].bn1, model.layer1[0].bn2):
        norm.bias[...] = jnp.full_like(norm.bias[...], 1e3)
    x = X[:, :8, :8]
    slopes = jax.grad(lambda x: model(x)[:, 2].sum())(jnp.asarray(x))
    np.testing.assert_allclose(explain.integrated_gradients(model, x, 2, 1), x * slopes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"classes": 5}, "classes must be from 0 to 4, got 5"),
        ({"classes": -1}, "classes must be from 0 to 4, got -1"),
        ({"classes": [1, 2]}, r"one for each of 4 images, got \[1, 2\]"),
        ({"classes": 1.5}, "a whole number or one for each of 4 images, got 1.5"),
        ({"layer": "layer4"}, "'layer4' is no stage or block of this network: did you mean 'layer"),
    ],
)
def test_mistakes(model: jresnet.ResNet, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        explain.grad_cam(model, X, **given)
    if "classes" in given:
        with pytest.raises(InputError, match=words):
            explain.integrated_gradients(model, X, **given)


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_steps_are_counted(model: jresnet.ResNet, steps: Any) -> None:
    with pytest.raises(InputError, match="steps must be a whole number of at least 1"):
        explain.integrated_gradients(model, X, 0, steps)


def test_what_cannot_be_explained(model: jresnet.ResNet) -> None:
    with pytest.raises(InputError, match=r"baseline must be a number or have the images' shape \(4, 24, 20, 3\)"):
        explain.integrated_gradients(model, X, 0, 2, np.zeros((5, 4, 24, 20, 3), np.float32))
    headless = jresnet.create("resnet20_cifar", num_classes=0)
    for function in (explain.grad_cam, explain.integrated_gradients):
        with pytest.raises(InputError, match="no head and therefore no classes"):
            function(headless, X)
        with pytest.raises(TypeError, match="normalised floating-point images"):
            function(model, np.zeros((1, 8, 8, 3), np.uint8))
