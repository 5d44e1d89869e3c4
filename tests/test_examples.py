"""The examples run and learn."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def segmentation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("segmentation", REPOSITORY / "examples" / "segmentation.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_are_those_of_their_masks(segmentation: ModuleType) -> None:
    images, masks = segmentation.shapes(np.random.default_rng(0), 20)
    assert (images.shape, images.dtype, masks.shape) == ((20, 32, 32, 3), np.float32, (20, 32, 32))
    assert set(np.unique(masks)) == {0, 1, 2, 3}
    assert images[masks > 0].mean() > images[masks == 0].mean() + 0.4


def test_segmentation_learns(segmentation: ModuleType) -> None:
    before, after = segmentation.train(steps=50)
    assert before < 0.2
    assert after > before + 0.1
