"""Torchvision's ImageNet weights: address, digest, preprocessing, published scores, and torch's cache folder.

The table is a copy of torchvision 0.28.0's metadata (``torchvision/models/resnet.py``), so that torchvision is not needed;
``tests/test_pretrained.py`` compares the two. torchvision publishes only the first 8 digits of a SHA-256, in the file's
name. The full digests below were found in public repositories and begin with those 8 digits. No full digest was found for
the other files.

    a   nampluskr/roi-corner-detection-ver2, docs/references/backbones.md
    b   isarandi/tensorflow-resnetv1.5-like-pytorch, convert_weights.py
    c   splicer3/inspectrt, inspectrt/portability.py
    d   umynameislove/aletheia-lab, the checkpoint of its verify_large_development
    e   rajeshgangireddy/anomalib, src/anomalib/models/image/mh_patchcore/README.md
"""

import difflib
import functools
import importlib.resources
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jresnet import download
from jresnet.errors import DownloadError, InputError, WeightsError
from jresnet.files import sha256_of
from jresnet.weights.preprocessing import Preprocessing


@dataclass(frozen=True)
class Row:
    """One published weights file."""

    arch: str
    name: str  # torchvision's name, such as "IMAGENET1K_V2"
    url: str
    sha256: str  # 64 hex digits where known, else the 8 in the file's name
    preprocessing: Preprocessing
    top1: float  # published accuracy on ImageNet-1K's validation set with a single crop, in per cent
    top5: float
    default: bool  # whether this is torchvision's DEFAULT

    @property
    def filename(self) -> str:
        """The name of the file, also in torch's cache."""
        return self.url.rpartition("/")[2]


# The letters name the sources listed above.
_DIGESTS = {
    digest[:8]: digest
    for digest in (
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",  # a: resnet18 V1
        "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",  # a: resnet34 V1
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",  # a, b: resnet50 V1
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",  # c: resnet50 V2
        "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a",  # b: resnet101 V1
        "cd907fc2a0de2292b2ba2b27d2216bc672d84632d1cf20058d01c0c03b5e020e",  # d: resnet101 V2
        "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58",  # b: resnet152 V1
        "95faca4d11227dddf8633dbb5ff6c8a9003c1aa5b8945c73834b8007b10950b8",  # a: wide_resnet50_2 V1
        "9ba9bcbebc349d733a72eb7608143fd754e4689ac8d8ce2916ca0bdff6443950",  # e: wide_resnet50_2 V2
        "32ee11565f95f2f07223b243ada444a6457c4b90a88e6e293922813faf6dfd06",  # a: wide_resnet101_2 V1
    )
}


def _row(arch: str, name: str, digits: str, resize: int, top1: float, top5: float, default: bool = False) -> Row:
    url = f"https://download.pytorch.org/models/{arch}-{digits}.pth"
    return Row(arch, name, url, _DIGESTS.get(digits, digits), Preprocessing(resize, 224), top1, top5, default)


_TABLE = (
    # arch, name, first digits of the SHA-256, shorter side resized to, top-1, top-5
    _row("resnet18", "IMAGENET1K_V1", "f37072fd", 256, 69.758, 89.078, default=True),
    _row("resnet34", "IMAGENET1K_V1", "b627a593", 256, 73.314, 91.420, default=True),
    _row("resnet50", "IMAGENET1K_V1", "0676ba61", 256, 76.130, 92.862),
    _row("resnet50", "IMAGENET1K_V2", "11ad3fa6", 232, 80.858, 95.434, default=True),
    _row("resnet101", "IMAGENET1K_V1", "63fe2227", 256, 77.374, 93.546),
    _row("resnet101", "IMAGENET1K_V2", "cd907fc2", 232, 81.886, 95.780, default=True),
    _row("resnet152", "IMAGENET1K_V1", "394f9c45", 256, 78.312, 94.046),
    _row("resnet152", "IMAGENET1K_V2", "f82ba261", 232, 82.284, 96.002, default=True),
    _row("resnext50_32x4d", "IMAGENET1K_V1", "7cdf4587", 256, 77.618, 93.698),
    _row("resnext50_32x4d", "IMAGENET1K_V2", "1a0047aa", 232, 81.198, 95.340, default=True),
    _row("resnext101_32x8d", "IMAGENET1K_V1", "8ba56ff5", 256, 79.312, 94.526),
    _row("resnext101_32x8d", "IMAGENET1K_V2", "110c445d", 232, 82.834, 96.228, default=True),
    _row("resnext101_64x4d", "IMAGENET1K_V1", "173b62eb", 232, 83.246, 96.454, default=True),
    _row("wide_resnet50_2", "IMAGENET1K_V1", "95faca4d", 256, 78.468, 94.086),
    _row("wide_resnet50_2", "IMAGENET1K_V2", "9ba9bcbe", 232, 81.602, 95.758, default=True),
    _row("wide_resnet101_2", "IMAGENET1K_V1", "32ee1156", 256, 78.848, 94.284),
    _row("wide_resnet101_2", "IMAGENET1K_V2", "d733dc28", 232, 82.510, 96.020, default=True),
)


def names(arch: str) -> tuple[str, ...]:
    """The names of the weights published for an architecture, oldest first; empty if there are none."""
    return tuple(row.name for row in _TABLE if row.arch == arch.lower())


def is_name(text: str) -> bool:
    """Whether ``text`` is ``DEFAULT`` or a name of published weights of any architecture; case is ignored."""
    return text.upper() in ("DEFAULT", *(row.name for row in _TABLE))


def find(arch: str, name: str | None = None) -> Row:
    """Finds published weights by architecture and name; case is ignored.

    Args:
        arch: one of torchvision's ten, such as ``"resnet50"``.
        name: such as ``"IMAGENET1K_V1"``; ``None`` or ``"DEFAULT"`` means torchvision's default, its most accurate weights.

    Raises:
        InputError: no such weights are published; the message lists those that are.
    """
    rows = [row for row in _TABLE if row.arch == arch.lower()]
    if not rows:
        known = list(dict.fromkeys(row.arch for row in _TABLE))
        raise InputError(
            f"no weights are published for {arch!r}{_nearest(arch.lower(), known)}. There are weights for "
            f"{', '.join(known)}. For any other architecture give the path of a weights file."
        )
    wanted = ("DEFAULT" if name is None else name).upper()
    for row in rows:
        if row.name == wanted or (row.default and wanted == "DEFAULT"):
            return row
    known = [row.name for row in rows]
    raise InputError(
        f"{rows[0].arch} has no weights {name!r}{_nearest(wanted, known)}. There are {', '.join(known)} and DEFAULT; "
        f"a path must name a file that exists."
    )


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.75)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def cache_dir() -> Path:
    """The folder of torch.hub for downloaded weights, so that torch and jresnet share files."""
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def cached(weights: Row) -> Path | None:
    """The path of the file in the cache, unchecked; None if it is not cached."""
    path = cache_dir() / weights.filename
    return path if path.exists() else None


def fetch(weights: Row, *, progress: bool = True) -> Path:
    """Downloads a weights file into the cache unless it is there, and checks its digest at every call.

    Args:
        weights: a row of the table, from ``find``.
        progress: show the download on stderr.

    Returns:
        The path of the file.

    Raises:
        WeightsError: the file in the cache is not the published one; it is not deleted.
        DownloadError: the download failed; the message says where to put the file by hand.
    """
    if (path := cached(weights)) is None:
        path = cache_dir() / weights.filename
        try:
            return download.fetch([weights.url], path, sha256=weights.sha256, progress=progress)
        except DownloadError as error:
            raise DownloadError(f"{error}\nThis folder is torch's cache; set TORCH_HOME to use another.") from error
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    if not actual.startswith(weights.sha256):
        raise WeightsError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, but that of {weights.arch} {weights.name} is "
            f"{weights.sha256}{'' if len(weights.sha256) == 64 else '...'}. Delete the file and run this again."
        )
    return path


def name_mismatch(filename: str, sha256: str) -> str | None:
    """Compares a file's SHA-256 with the digits that torch.hub appends to file names, as in ``resnet20-12fca82f.th``.

    For a file that is not in the table these digits (8 or more before ``.pth``, ``.pt`` or ``.th``) are all there is to
    compare with. A mismatch is only a warning, because the digits may be a date, as in ``resnet18-20240131.pth``.

    Returns:
        The text of a warning, or None if the digits match or there are none.
    """
    found = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt|th)$", filename)
    if found is None or sha256.startswith(found[1]):
        return None
    return (
        f"the name {filename} suggests a SHA-256 that begins with {found[1]} (as torch.hub names files), but the SHA-256 is "
        f"{sha256}: the file may be damaged or another one."
    )


@functools.cache
def categories() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes in torchvision's spelling, in the order of the logits."""
    text = importlib.resources.files("jresnet.weights").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@functools.cache
def wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes in the order of the logits, in which they are sorted."""
    text = importlib.resources.files("jresnet.weights").joinpath("imagenet_wnids.txt").read_text(encoding="ascii")
    return tuple(text.splitlines())


def metadata(weights: Row) -> dict[str, str]:
    """The metadata entries of a native file for published weights; preprocessing, scores and categories are JSON."""
    scores = {"top1": weights.top1, "top5": weights.top5, "of": "ImageNet-1K validation, single crop, published"}
    return {
        "source": weights.url,
        "weights": weights.name,
        "preprocessing": weights.preprocessing.to_json(),
        "scores": json.dumps(scores),
        "categories": json.dumps(categories()),
    }
