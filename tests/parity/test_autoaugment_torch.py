"""Operations of RandAugment and TrivialAugment beside torchvision's, LAMB and binary cross-entropy beside timm's."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from convert.installed import import_torchvision
from jresnet.training import autoaugment, optim, step

import_torchvision()

from timm.data import auto_augment as timm_augment  # noqa: E402
from timm.loss import BinaryCrossEntropy  # noqa: E402
from timm.optim import Lamb  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms import autoaugment as theirs  # noqa: E402

SIZE = (21, 26)
NAMES = {
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY", "rotate": "Rotate",
    "brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip
VALUES = {
    "shear_x": (0.4, -0.99), "shear_y": (0.4, -0.99), "translate_x": (5.0, -3.0), "translate_y": (5.0, -3.0),
    "rotate": (33.0, -120.0), "posterize": (2.0, 5.0), "solarize": (100.0, 0.0),
}  # fmt: skip
OPERATE = jax.jit(autoaugment.operate)
WHOLE = ("posterize", "equalize")  # torchvision takes uint8 alone


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Noise on a gradient, whose channels do not cover all grey levels."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    draws = np.random.default_rng(0)
    return np.stack([20 + 5 * x + 3 * y, 200 - 4 * y, 60 + x * y / 5], -1) + draws.integers(-9, 10, (*SIZE, 3))


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_torchvisions(name: str, pixels: np.ndarray) -> None:
    """To 1e-3 of 255 grey levels, 4e-6: float32 of sums of four products, and of 546 for a mean."""
    whole = pixels.clip(0, 255).astype(np.uint8)
    for value in VALUES.get(name, (0.3, 1.7)):
        image = torch.from_numpy(whole).permute(2, 0, 1)
        given = value - 1 if name in ("brightness", "color", "contrast", "sharpness") else value
        if name not in WHOLE:
            image, given = image.float() / 255, given / 255 if name == "solarize" else given
        expected = theirs._apply_op(image, NAMES[name], given, InterpolationMode.BILINEAR, None)
        expected = expected.permute(1, 2, 0).numpy() * (1 if name in WHOLE else 255)
        ops = jnp.array([autoaugment.NUMBER[name]])
        found = OPERATE(jnp.asarray(whole, jnp.float32)[None], ops, jnp.array([value]), jnp.zeros(3))[0]
        assert np.abs(np.asarray(found) - expected).max() < 1e-3


def test_what_comes_from_outside_has_the_fill_colour(pixels: np.ndarray) -> None:
    """Not compared: pixels half outside, where torchvision counts the share that is inside twice."""
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    expected = theirs._apply_op(image, "Rotate", 40.0, InterpolationMode.BILINEAR, [124.0, 116.0, 104.0])
    found = OPERATE(
        jnp.asarray(pixels, jnp.float32)[None], jnp.array([autoaugment.NUMBER["rotate"]]), jnp.array([40.0]),
        jnp.array([124.0, 116.0, 104.0]),
    )[0]  # fmt: skip
    ones = theirs._apply_op(torch.ones_like(image), "Rotate", 40.0, InterpolationMode.BILINEAR, None)[0].numpy()
    whole = (ones < 1e-6) | (ones > 1 - 1e-6)
    assert 0.1 < (ones < 1e-6).mean() < 0.6
    assert np.abs(np.asarray(found) - expected.permute(1, 2, 0).numpy())[whole].max() < 1e-3


def spied(monkeypatch: pytest.MonkeyPatch, draw: object, n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """The operations and values that are drawn for so many images."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def operate(images: jax.Array, ops: jax.Array, values: jax.Array, fill: jax.Array) -> jax.Array:
        seen.append((np.asarray(ops), np.asarray(values)))
        return images

    monkeypatch.setattr(autoaugment, "operate", operate)
    draw(jax.random.key(0), jnp.zeros((n, 4, 2, 1)))  # type: ignore[operator]
    return seen[0]


def test_trivial_augment_draws_torchvisions_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation as often as any, and of each the very values that its table has, with both signs."""
    ops, values = spied(monkeypatch, autoaugment.trivial_augment, 20_000)
    space = theirs.TrivialAugmentWide()._augmentation_space(31)
    assert (np.bincount(ops, minlength=14) > 20_000 / 14 * 0.9).all()
    assert ops.max() == 13
    for name, operation in {"identity": "Identity", **NAMES}.items():
        if operation == "Invert":
            continue
        table, signed = space[operation]
        table = np.atleast_1d(table.numpy().astype(float))
        table = np.concatenate([table, -table]) if signed else table
        if name.startswith("translate"):
            table = np.trunc(table)
        if name in ("brightness", "color", "contrast", "sharpness"):
            table = 1 + table
        found = values[ops == autoaugment.NUMBER[name]]
        # Half of 32 pixels is 16; torch's linspace lies a little below it, and is cut off to 15.
        tolerance = 1.0 if name.startswith("translate") else 2e-3
        found, table = (np.unique(np.round(numbers, 3)) for numbers in (found, table))
        np.testing.assert_allclose(found, table, atol=tolerance, err_msg=name)


def test_rand_augment_draws_timms_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean and spread of each operation's argument, beside 3,000 draws of timm's own functions."""
    ops, values = spied(
        monkeypatch, lambda key, images: autoaugment.rand_augment(key, images, 6.0, jnp.zeros(1)), 20_000
    )
    assert 0.47 < (ops == 0).mean() < 0.53
    random.seed(0)
    others = {
        "rotate": "Rotate", "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "color": "ColorIncreasing",
        "solarize_add": "SolarizeAdd", "shear_x": "ShearX", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
    }  # fmt: skip
    for name, operation in others.items():
        level = timm_augment.LEVEL_TO_ARG[operation]
        drawn = [level(max(0.0, min(random.gauss(6, 0.5), 10)), {})[0] for _ in range(3000)]
        expected = np.array(drawn, float) * {"translate_x": 2, "translate_y": 4}.get(name, 1)
        found = values[ops == autoaugment.NUMBER[name]]
        assert len(found) > 20_000 / 30 * 0.8, name
        scale = np.abs(expected).mean()
        assert abs(found.mean() - expected.mean()) < 0.2 * scale, name
        assert np.abs(found).mean() == pytest.approx(scale, rel=0.03), name
        assert found.std() == pytest.approx(expected.std(), rel=0.2), name


def test_color_jitter_blends_in_every_order() -> None:
    image = jnp.asarray(np.random.default_rng(0).uniform(40, 200, (1, 6, 5, 3)), jnp.float32)
    images = jnp.broadcast_to(image, (500, 6, 5, 3))
    found = np.asarray(autoaugment.color_jitter(jax.random.key(1), images, 0.4))
    assert found.min() >= 0
    assert found.max() <= 255
    brightness = found.mean((1, 2, 3)) / float(image.mean())
    assert 0.6 <= brightness.min() < 0.65
    assert 1.3 < brightness.max() <= 1.41
    assert np.abs(autoaugment.color_jitter(jax.random.key(1), images, 0.0) - images).max() < 1e-3


@pytest.mark.parametrize("weight_decay", [0.02, 0.0])
def test_lamb_is_timms(weight_decay: float) -> None:
    """Twelve steps with clipping; relative distance of float64: sums of squares in another order."""
    draws = np.random.default_rng(0)
    start = {"kernel": draws.normal(size=(4, 3)), "zeros": np.zeros((2, 2)), "bias": draws.normal(size=3)}
    gradients = [{name: 3 * draws.normal(size=value.shape) for name, value in start.items()} for _ in range(12)]
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [tensors["kernel"], tensors["zeros"]], "weight_decay": weight_decay},
        {"params": [tensors["bias"]], "weight_decay": 0.0},
    ]
    lamb = Lamb(groups, lr=8e-3, max_grad_norm=1.0)
    with jax.enable_x64(True):
        ours = optim.optimizer("lamb", 8e-3, weight_decay=weight_decay, decay_norms=False, clip_norm=1.0)
        params = {name: jnp.asarray(value) for name, value in start.items()}
        state = ours.init(params)
        for gradient in gradients:
            for name, tensor in tensors.items():
                tensor.grad = torch.from_numpy(gradient[name].copy())
            lamb.step()
            updates, state = ours.update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(np.asarray(params[name]), tensor.detach().numpy(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_binary_cross_entropy_is_timms(threshold: float) -> None:
    draws = np.random.default_rng(0)
    logits, targets = draws.normal(size=(5, 7)).astype(np.float32), draws.dirichlet([0.3] * 7, 5).astype(np.float32)
    expected = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold or None)(
        *map(torch.from_numpy, (logits, targets))
    )
    assert step.mean_loss("sigmoid", threshold, jnp.asarray(logits), jnp.asarray(targets)) == pytest.approx(
        expected.item(), rel=1e-6
    )
