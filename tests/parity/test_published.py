"""The table of published weights against torchvision's own metadata."""

import pytest

from convert.installed import import_torchvision
from jresnet.weights import published

ARCHS = list(dict.fromkeys(row.arch for row in published._TABLE))


@pytest.fixture(scope="module")
def models():
    return import_torchvision().models


@pytest.mark.parametrize("arch", ARCHS)
def test_table_is_torchvisions(models, arch):
    theirs = models.get_model_weights(arch)
    assert list(published.names(arch)) == [weights.name for weights in theirs]
    for weights in theirs:
        row, transform = published.find(arch, weights.name), weights.transforms()
        scores = weights.meta["_metrics"]["ImageNet-1K"]
        assert (row.arch, row.name, row.url) == (arch, weights.name, weights.url)
        assert (row.top1, row.top5) == (scores["acc@1"], scores["acc@5"])
        assert row.default == (weights is theirs.DEFAULT)
        assert [row.preprocessing.resize] == transform.resize_size
        assert [row.preprocessing.crop] == transform.crop_size
        assert list(row.preprocessing.mean) == transform.mean
        assert list(row.preprocessing.std) == transform.std
        assert row.preprocessing.interpolation == transform.interpolation.value
        assert transform.antialias is True
        assert published.categories() == tuple(weights.meta["categories"])
