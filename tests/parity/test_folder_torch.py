"""Random crops of photos beside torchvision's: the same distribution, and the same pixels of the same box."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from convert.installed import import_torchvision
from jresnet.data import crops

import_torchvision()

from torchvision.transforms import RandomResizedCrop, functional  # noqa: E402


@pytest.mark.parametrize(
    ("size", "scale"), [((500, 375), (0.08, 1.0)), ((300, 900), (0.25, 1.0)), ((2000, 100), (0.08, 1.0))]
)
def test_boxes_have_torchvisions_distribution(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Kolmogorov and Smirnov's distance of 4,000 draws each stays below the one that chance exceeds once in 10,000."""
    n = 4000
    torch.manual_seed(0)
    image = torch.zeros(1, size[1], size[0])
    theirs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)]
    draws = Random(0)
    ours = [crops.crop_box(*size, draws, scale[0]) for _ in range(n)]
    reference = np.array([(left, top, w, h) for top, left, h, w in theirs], float)
    found = np.array(ours, float)
    limit = 2.23 * np.sqrt(2 / n)  # sqrt(-ln(0.0001 / 2) / 2)
    for column in range(4):
        grid = np.unique(np.concatenate([reference[:, column], found[:, column]]))
        shares = [np.searchsorted(np.sort(x[:, column]), grid, side="right") / n for x in (reference, found)]
        assert abs(shares[0] - shares[1]).max() < limit, column
    areas = [(x[:, 2] * x[:, 3]).mean() / (size[0] * size[1]) for x in (reference, found)]
    assert areas[0] == pytest.approx(areas[1], abs=0.02)


def test_a_box_is_cut_out_as_torchvision_does(tmp_path: Path) -> None:
    """To one grey level: torchvision cuts before it resizes, so that the filter sees no pixel outside."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
    image.save(tmp_path / "x.png")
    for seed in range(5):
        left, top, w, h = crops.crop_box(160, 120, Random(seed), 0.08)
        theirs = functional.resized_crop(image, top, left, h, w, [64, 64])
        ours = crops.random_resized_crop(str(tmp_path / "x.png"), 64, Random(seed), 0.08)
        assert abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1
