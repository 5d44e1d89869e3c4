from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jresnet.training import augment
from jresnet.weights.preprocessing import normalise


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), np.uint8)


def test_random_crop_cuts_windows_of_the_padded_image(pixels: np.ndarray) -> None:
    views = np.asarray(augment.random_crop(jax.random.key(1), pixels.astype(np.float32), 32, padding=4))
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    offsets = []
    for image, view in zip(padded, views, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32), (0, 1)).transpose(0, 1, 3, 4, 2)
        found = np.argwhere((windows == view).all((2, 3, 4)))
        assert len(found) == 1
        offsets.append(found[0])
    counts = np.stack([np.bincount([o[axis] for o in offsets], minlength=9) for axis in (0, 1)])
    assert counts.shape == (2, 9)  # every offset from 0 to 8
    assert counts.min() > 512 / 9 / 2
    assert counts.max() < 512 / 9 * 2


def mirrored(pixels: np.ndarray, views: np.ndarray) -> np.ndarray:
    kept = (views == pixels).all((1, 2, 3))
    turned = (views == pixels[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ turned).all()
    return turned


def test_a_random_flip_mirrors_half(pixels: np.ndarray) -> None:
    pipeline = augment.Pipeline("pad", 40, "random", (0.0,) * 3, (1.0,) * 3)  # the whole padded image: no random crop
    views = np.asarray(pipeline.train(jax.random.key(2), pixels))[:, 4:-4, 4:-4] * 255
    assert 0.4 < mirrored(pixels, np.round(views)).mean() < 0.6


def test_an_alternating_flip_shows_both_sides_in_two_epochs(pixels: np.ndarray) -> None:
    indices, key = jnp.arange(512) + 7000, jax.random.key(5)
    epochs = [np.asarray(augment.alternate(key, indices, epoch)) for epoch in range(3)]
    assert 0.4 < epochs[0].mean() < 0.6
    np.testing.assert_array_equal(epochs[0], ~epochs[1])
    np.testing.assert_array_equal(epochs[0], epochs[2])
    np.testing.assert_array_equal(augment.alternate(key, indices[::-1], 0), epochs[0][::-1])  # the image's own coin
    np.testing.assert_array_equal(mirrored(pixels, np.asarray(augment.mirror(pixels, epochs[0]))), epochs[0])


def test_random_erasing_is_torchvisions() -> None:
    """Areas of 2 to 33 %, ratios of 0.3 to 3.3, anywhere; as torchvision.transforms.RandomErasing draws them."""
    images = jnp.ones((4096, 64, 64, 2))
    erased = np.asarray(augment.random_erasing(jax.random.key(0), images, 0.75)) == 0
    assert (erased[..., 0] == erased[..., 1]).all()
    hit = erased.any((1, 2, 3))
    assert 0.72 < hit.mean() < 0.78
    boxes = erased[hit][..., 0]
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    area = boxes.sum((1, 2))
    np.testing.assert_array_equal(area, heights * widths)
    assert 0.015 < area.min() / 4096 < 0.03
    assert 0.30 < area.max() / 4096 < 0.35
    assert 0.16 < area.mean() / 4096 < 0.19  # uniform
    assert 0.25 < (heights / widths).min() < 0.4
    assert 2.5 < (heights / widths).max() < 4.2
    assert boxes[:, 0].any()
    assert boxes[:, -1].any()
    assert boxes[:, :, 0].any()
    assert boxes[:, :, -1].any()


TARGETS = jax.nn.one_hot(jnp.arange(6), 6)
SHADES = jnp.broadcast_to(jnp.arange(6.0)[:, None, None, None], (6, 32, 32, 3))  # image i is i everywhere


def test_mixup_mixes_images_as_targets() -> None:
    shares = []
    for seed in range(50):
        images, targets = augment.mixup(jax.random.key(seed), SHADES, TARGETS, 0.4)
        share = float(targets[0, 0])
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(targets[1, 4], 1 - share, atol=1e-6)
        np.testing.assert_allclose(images[1], share * 1 + (1 - share) * 4, rtol=1e-5)
        shares.append(share)
    assert np.mean(np.abs(np.array(shares) - 0.5) > 0.4) > 0.3  # Beta(0.4, 0.4) lies at the ends


def test_cutmix_mixes_targets_by_area() -> None:
    areas = []
    for seed in range(50):
        images, targets = augment.cutmix(jax.random.key(seed), SHADES, TARGETS, 1.0)
        pasted = np.asarray(images[0, :, :, 0] == 5)
        assert (np.asarray(images[0, :, :, 0])[~pasted] == 0).all()
        assert pasted.sum() == pasted.any(1).sum() * pasted.any(0).sum()  # one rectangle
        np.testing.assert_allclose(targets[0, 5], pasted.mean(), atol=1e-6)
        np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
        areas.append(pasted.mean())
    assert min(areas) < 0.1
    assert max(areas) > 0.6


def test_mixup_and_cutmix_take_turns() -> None:
    pipeline = augment.Pipeline("pad", 32, "none", (0.5,) * 3, (0.2,) * 3, mixup=1.0, cutmix=1.0)
    mix = jax.jit(lambda key: pipeline.mix(key, SHADES, TARGETS)[0][0])
    mixed = [np.asarray(mix(jax.random.key(seed))) for seed in range(40)]
    cut = sum(np.isin(image, (0, 5)).all() for image in mixed)
    assert 10 < cut < 30
    plain = augment.Pipeline("pad", 32, "none", (0.5,) * 3, (0.2,) * 3)
    assert plain.mix(jax.random.key(0), SHADES, TARGETS) == (SHADES, TARGETS)


def test_normalise() -> None:
    result = normalise(jnp.full((1, 1, 1, 2), 51.0), (0.1, 0.2), (0.5, 0.1))
    np.testing.assert_allclose(result[0, 0, 0], [0.2, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(0, 0, 32, 32), (3, 5, 20, 17), (30, 0, 2, 31), (7, 7, 1, 1)]
)
def test_interpolation_is_pils(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> None:
    rows = augment.interpolation(jnp.float32(top), jnp.float32(height), 32, 224)
    columns = augment.interpolation(jnp.float32(left), jnp.float32(width), 32, 224)
    for image in pixels[:3]:
        ours = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float32), columns)
        window = Image.fromarray(image).crop((left, top, left + width, top + height))
        theirs = np.asarray(window.resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(ours - theirs).max() <= 1.01  # PIL rounds to whole grey levels, after each direction


def test_the_centre_is_torchvisions(pixels: np.ndarray) -> None:
    ours = np.asarray(augment.resize_and_center_crop(jnp.asarray(pixels[:3], jnp.float32), 256, 224))
    for image, view in zip(pixels, ours, strict=False):
        large = Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(large.crop((16, 16, 240, 240)), np.float32) - view).max() <= 1.01


def test_random_resized_crop_draws_areas_and_ratios() -> None:
    """An image whose channels are its coordinates tells which window was cut."""
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)
    image = np.broadcast_to(np.stack([y, x], -1), (4096, 32, 32, 2))
    views = np.asarray(augment.random_resized_crop(jax.random.key(3), jnp.asarray(image), 16))
    height = views[:, -1, 0, 0] - views[:, 0, 0, 0] + 1  # edge pixels repeat, so the ends are the window's own...
    width = views[:, 0, -1, 1] - views[:, 0, 0, 1] + 1  # ...but for up to half a source pixel when it is shrunk
    assert views.min() >= 0
    assert views.max() <= 31
    area, ratio = height * width / 1024, width / height
    assert area.min() < 0.1
    assert area.max() > 0.9
    assert 0.45 < area.mean() < 0.60  # uniform from 0.08 to 1, less what does not fit
    assert 0.70 < np.quantile(ratio, 0.01) < 0.80
    assert 1.25 < np.quantile(ratio, 0.99) < 1.45
    assert abs(np.log(ratio).mean()) < 0.01


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_pipelines_are_functions_of_the_key(pixels: np.ndarray, crop: str) -> None:
    pipeline = augment.Pipeline(crop, 32 if crop == "pad" else 48, "random", (0.5,) * 3, (0.2,) * 3)
    one, same, other = (jax.jit(pipeline.train)(jax.random.key(k), pixels[:8]) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.shape == (8, pipeline.size, pipeline.size, 3)
    assert pipeline.evaluate(pixels[:8]).shape == one.shape
