"""PyTorch's names for the leaves of a jresnet model: a rename of the leaf, then one table a dialect.

Every dialect is a bijection on the keys of a model, made from the model's own paths, so that whatever is missing or
unexpected in a file shows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

# jresnet's leaf -> PyTorch's. A kernel and a BN's scale are both "weight"; no module has both.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Counted by PyTorch's BatchNorm and used only with momentum=None, which no ResNet has: dropped on purpose.
DROPPED = "num_batches_tracked"

# Dialect -> replacements that turn torchvision's key into that dialect's.
DIALECTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "torchvision": (),  # timm too
    "akamaster": ((r"^fc\.", "linear."),),  # akamaster/pytorch_resnet_cifar10
}

# Prefixes that wrappers put before every key: DataParallel and DDP, torch.compile, Lightning and hand-made classes.
WRAPPERS = ("module.", "_orig_mod.", "model.")


def torch_key(path: str, dialect: str = "torchvision") -> str:
    """``layer1.0.bn1.scale`` -> ``layer1.0.bn1.weight``, in the naming of ``dialect``."""
    module, _, leaf = path.rpartition(".")
    key = f"{module}.{LEAVES[leaf]}"
    for pattern, replacement in DIALECTS[dialect]:
        key = re.sub(pattern, replacement, key)
    return key


def find_dialect(paths: Collection[str], keys: Iterable[str]) -> str:
    """The dialect in which most of ``keys`` are keys of the model with these ``paths``; torchvision's where none is."""
    found = set(keys)
    return max(DIALECTS, key=lambda dialect: len(found & {torch_key(path, dialect) for path in paths}))


def strip_wrappers(keys: Collection[str]) -> str:
    """The prefix, such as ``module._orig_mod.``, that wrappers put before every one of ``keys``; often empty."""
    prefix = ""
    while True:
        for wrapper in WRAPPERS:
            if keys and all(key.startswith(prefix + wrapper) for key in keys):
                prefix += wrapper
                break
        else:
            return prefix
