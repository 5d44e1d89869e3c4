"""A network trained elsewhere, on real images: the converted one classifies every image as PyTorch's does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx

from convert import reference, verify
from jresnet import data, sources
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.training.augment import normalise
from jresnet.weights.preprocessing import STATISTICS


@pytest.fixture(scope="module")
def images(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> data.Split:
    """The 10,000 test images: 1,000 as they are, 9,000 recompressed."""
    out = tmp_path_factory.mktemp("cifar10")
    script = str(shared / "cifar10" / "make_cifar10.py")
    subprocess.run([sys.executable, script, str(out), "--train", "5"], check=True, stdout=subprocess.DEVNULL)
    return data.load_cifar10(out, download=False).test


@pytest.mark.parametrize(("count", "right"), [(1_000, 915), pytest.param(10_000, 8210, marks=pytest.mark.long)])
def test_akamasters_resnet20(shared: Path, images: data.Split, count: int, right: int) -> None:
    found = statedict.match(sources.open_file(shared / "weights" / "resnet20-12fca82f.th")[0], "resnet20_cifar")
    network = reference.network("resnet20_cifar", found.config)
    network.load_state_dict({key: torch.tensor(value) for key, value in found.torchvision().items()}, strict=False)
    x = np.asarray(normalise(images.images[:count].astype(np.float32), *STATISTICS["imagenet"]))
    tensors = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).split(500)
    with torch.no_grad():
        theirs = torch.cat([network.eval()(part) for part in tensors]).numpy()
        exact = torch.cat([network.double()(part.double()) for part in tensors[:2]]).numpy()
    forward = nnx.jit(lambda model, x: model(x))
    ours, narrow = (
        np.concatenate([np.asarray(forward(model, part)) for part in np.split(x, count // 500)])
        for model in (params.fill(found.config, found.values, dtype) for dtype in (None, "bfloat16"))
    )
    predicted, agreeing = ours.argmax(1), int((narrow.argmax(1) == ours.argmax(1)).sum())
    errors = [verify.relative(logits[:1000], exact) for logits in (ours, theirs, narrow)]
    print(
        "relative error of the logits, 1,000 clean images: jresnet {:.1e}, PyTorch {:.1e}, bfloat16 {:.1e}".format(
            *errors
        )
    )
    print(f"bfloat16 predicts {agreeing:,} of {count:,} as float32 does")
    assert int((predicted == images.labels[:count]).sum()) == right
    np.testing.assert_array_equal(predicted, theirs.argmax(1))
    assert errors[0] <= verify.ALLOWED * errors[1]
    assert agreeing >= 0.98 * count
