"""Listing, decoding and preprocessing against torchvision's ImageFolder and transforms: not one grey level apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convert.installed import import_torchvision
from jresnet.data import images
from jresnet.training import augment
from jresnet.weights import published as pretrained
from jresnet.weights.preprocessing import Preprocessing

torchvision = import_torchvision()
datasets, transforms = torchvision.datasets, torchvision.transforms

# Of eight bits: torchvision cuts 16-bit and float pictures off at 255, jresnet scales them (tests/test_images.py).
MODES = ("RGB", "L", "CMYK", "RGBA", "P", "LA", "1", "YCbCr")
SUFFIXES = {"RGB": ".jpg", "L": ".jpeg", "CMYK": ".JPEG", "F": ".tiff", "YCbCr": ".jpg"}


def write(folder: Path, mode: str, width: int, height: int, seed: int) -> Path:
    """A file of random pixels of this mode, with an EXIF orientation where it can have one."""
    draw = np.random.default_rng(seed)
    path = folder / f"{mode.replace(';', '')}{SUFFIXES.get(mode, '.png')}"
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 65536, (height, width), np.uint16))
    elif mode == "CMYK":
        image = Image.fromarray(draw.integers(0, 256, (height, width, 4), np.uint8), mode)
    else:
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = int(draw.integers(1, 9))
    image.save(path, **({"exif": exif} if path.suffix.lower() in (".jpg", ".jpeg") else {}))
    return path


def theirs(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [crop, crop, C], as torchvision's users write it."""
    steps = [] if len(preprocessing.mean) == 3 else [transforms.Grayscale()]
    if preprocessing.resize is not None:
        mode = transforms.InterpolationMode(preprocessing.interpolation)
        steps.append(transforms.Resize(preprocessing.resize, mode))
    steps += [transforms.CenterCrop(preprocessing.crop), transforms.PILToTensor()]
    loaded = datasets.folder.default_loader(str(path))
    return transforms.Compose(steps)(loaded).numpy().transpose(1, 2, 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    resize=st.none() | st.integers(1, 90),
    crop=st.integers(1, 80),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_image_in_any_size(tmp_path, mode, width, height, resize, crop, interpolation, channels, seed) -> None:
    path = write(tmp_path, mode, width, height, seed)
    preprocessing = Preprocessing(resize, crop, (0.5,) * channels, (0.5,) * channels, interpolation)
    expected = theirs(path, preprocessing)
    assert np.array_equal(images.load(path, preprocessing), expected)


@pytest.mark.parametrize("resize", [256, 232])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (256, 256), (100, 90), (640, 225), (33, 1200)])
def test_the_recipes_of_published_weights(tmp_path: Path, size: tuple[int, int], resize: int) -> None:
    path = write(tmp_path, "RGB", *size, seed=0)
    preprocessing = Preprocessing(resize, 224)
    assert np.array_equal(images.load(path, preprocessing), theirs(path, preprocessing))


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_weights_own_transforms_to_the_networks_input(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "RGB", 333, 251, seed=1)
    row = pretrained.find("resnet50", name)
    transform = torchvision.models.get_weight(f"ResNet50_Weights.{name}").transforms()
    expected = transform(datasets.folder.default_loader(str(path))).numpy().transpose(1, 2, 0)
    pixels = images.load(path, row.preprocessing)[None].astype(np.float32)
    found = augment.normalise(pixels, row.preprocessing.mean, row.preprocessing.std)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # a grey level is 0.017


def test_listing_and_batches_are_image_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("n02/b", "n02/a", "n01/deep/er", "n01/z", "n10/1", "n10/10", "n10/2", "N/x")):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name, MODES[i], 40 + 7 * i, 50, i)
    (tmp_path / "n01" / "notes.txt").touch()
    dataset = datasets.ImageFolder(str(tmp_path), transforms.Compose([
        transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor(),
    ]))  # fmt: skip
    found = images.list_folder(tmp_path)
    assert list(found.classes) == dataset.classes
    assert [(str(path), label) for path, label in zip(found.paths, found.labels, strict=True)] == dataset.samples
    assert found.ignored == 1
    assert datasets.folder.IMG_EXTENSIONS == images.EXTENSIONS
    seen = 0
    for batch in images.batches(found.paths, Preprocessing(36, 32), 3):
        for image, position in zip(batch.images, batch.positions, strict=False):
            assert torch.equal(torch.from_numpy(image).permute(2, 0, 1), dataset[position][0])
            seen += 1
    assert seen == len(dataset) == 8
