from __future__ import annotations

import dataclasses
import math

import pytest
from benchmark.networks import macs

from jresnet.errors import InputError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNetConfig

PUBLISHED = {  # torchvision's documentation
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808, "resnext50_32x4d": 25_028_904, "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272, "wide_resnet50_2": 68_883_240, "wide_resnet101_2": 126_886_696,
}  # fmt: skip
ROUNDED = {  # He et al. 2016, table 6, in millions
    "resnet20_cifar": 0.27, "resnet32_cifar": 0.46, "resnet44_cifar": 0.66, "resnet56_cifar": 0.85,
    "resnet110_cifar": 1.7, "resnet1202_cifar": 19.4,
}  # fmt: skip


def parameters(config: ResNetConfig) -> int:
    return sum(
        math.prod(shape) for path, shape in params.shapes(config).items() if not path.endswith((".mean", ".var"))
    )


@pytest.mark.parametrize("row", zoo.ZOO.values(), ids=lambda row: row.name)
def test_every_row_has_its_parameters(row: zoo.Row) -> None:
    counted = parameters(row.config)
    assert counted == row.parameters
    assert counted == PUBLISHED.get(row.name, counted)
    if row.name in ROUNDED:
        digits = 1 if ROUNDED[row.name] > 1 else 2
        assert round(counted / 1e6, digits) == ROUNDED[row.name]


def test_all_published_rows_are_there() -> None:
    own = ROUNDED.keys() | {"resnet8_cifar", "resnet34_projection", "resnet18_d2l"}
    assert PUBLISHED.keys() | own == zoo.ZOO.keys() - zoo.IN_TIMM | PUBLISHED.keys()
    assert PUBLISHED.keys() < zoo.IN_TIMM
    assert len(zoo.IN_TIMM) == 81


def deep(row: zoo.Row) -> bool:
    """Whether it takes seconds to trace."""
    return sum(row.config.depths) > 20 and row.name not in PUBLISHED


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=[pytest.mark.long] * deep(row)) for name, row in zoo.ZOO.items()]
)
def test_every_row_has_its_gmacs(row: zoo.Row) -> None:
    assert macs(row.config, row.image_size) / 1e9 == pytest.approx(row.gmacs, rel=5e-3)


def test_the_cifar_stem_keeps_the_image() -> None:
    row = zoo.find("resnet50")
    # 7x7 to 3x3: 3 * 64 * 40 fewer
    assert parameters(dataclasses.replace(row.config, stem="cifar")) == row.parameters - 3 * 64 * (49 - 9)


@pytest.mark.parametrize(
    ("wrong", "near"), [("resnet51", "resnet50"), ("ResNet-50", "resnet50"), ("resnet20", "resnet20_cifar")]
)
def test_unknown_names_suggest_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"unknown architecture '{wrong}': did you mean .*\b{near}\b"):
        zoo.find(wrong)


def test_an_absurd_name_lists_a_few() -> None:
    with pytest.raises(InputError, match=r"there are resnet18, .* and \d+ more \(jresnet\.list_models\)"):
        zoo.find("vgg")
