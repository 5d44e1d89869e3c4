"""Resolves a name, a path or a Hugging Face Hub address to weights. All of jresnet resolves weights here.

    find: string or path -> Source -> fetch: a local file with its digest checked -> read: Weights

:func:`load` does all three steps. None of them needs torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jresnet.errors import InputError, WeightsError
from jresnet.files import TORCH_SUFFIXES, few, printable, sha256_of
from jresnet.models import zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import keymap, statedict, torchfile
from jresnet.weights import hub, native, published, timm_config
from jresnet.weights.preprocessing import STATISTICS, Preprocessing


@dataclass(frozen=True)
class Source:
    """The place that weights come from. Creating it neither downloads nor reads anything."""

    spec: str  # how messages name it: "resnet50:IMAGENET1K_V2", a path, "hf:ORG/REPO@REVISION"
    label: str  # used in names of converted files: "imagenet1k_v2", the file's stem, the repository's name
    arch: str | None = None  # a name in the zoo; None: the file may tell
    path: Path | None = None  # the local file; None: not fetched yet
    sha256: str | None = None  # digest of that file; None: not known yet
    row: published.Row | None = None  # row of torchvision's table of published weights
    repository: hub.Published | None = None  # a repository on the Hub, or a folder of the same layout, once fetched


@dataclass(frozen=True, eq=False)
class Weights:
    """The arrays of a network with their metadata."""

    spec: str  # as in :class:`Source`; a revision on the Hub is given as its full commit hash
    arch: str | None  # a name in the zoo; None: the network is not in the zoo
    config: ResNetConfig  # configuration of the network in the file
    # parameters and statistics by dotted path; float32, or the native file's dtypes
    values: Mapping[str, np.ndarray] = field(repr=False)
    # entries of a native file: source, source_sha256, dialect, num_batches_tracked, scores, ...
    metadata: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()  # one sentence for each thing in the file that was ignored
    conversion: statedict.Conversion | None = field(default=None, repr=False)  # None: the file is a native one

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing of images; None if the weights do not specify it.

        Raises:
            WeightsError: the entry is invalid.
        """
        said = self.metadata.get("preprocessing")
        return None if said is None else Preprocessing.from_json(said)

    @property
    def categories(self) -> tuple[str, ...] | None:
        """The names of the classes, in the order of the logits; None if the weights do not specify them.

        Raises:
            WeightsError: the entry does not have one name per class.
        """
        if "categories" not in self.metadata:
            return None
        try:
            names = json.loads(self.metadata["categories"])
        except (ValueError, RecursionError):
            names = None
        count = self.config.num_classes
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != count:
            raise WeightsError(f"the categories that the weights file states are not {count} names")
        return tuple(names)


def load(
    spec: str | os.PathLike[str],
    arch: str | None = None,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    key: str | None = None,
    progress: bool = True,
    **chosen: Any,
) -> Weights:
    """Loads weights from any supported source.

    Args:
        spec: one of

            * ``"resnet50"`` (torchvision's default weights), ``"resnet50:IMAGENET1K_V1"``, or, if ``arch`` is given,
              ``"IMAGENET1K_V1"`` or ``"DEFAULT"``: published weights, downloaded into torch's cache folder;
            * ``"hf:ORG/REPO[@REVISION]"``: safetensors on the Hugging Face Hub (needs the extra ``hub``);
            * a path: a native file, a file of ``torch.save`` or ``torch.jit.save``, safetensors with PyTorch's names, the
              index (``*.index.json``) of a sharded checkpoint, or a folder as written by transformers, timm or
              :func:`jresnet.sharing.push`.
              A string that names published weights is never read as a path; write ``./resnet50`` for the file.
        arch: a name from :func:`jresnet.list_models`; ``None``: the architecture of the weights.
        dialect: naming scheme of a PyTorch file's tensors (:data:`jresnet.pytorch.keymap.DIALECTS`); ``None``: the one
            that fits the keys best.
        prefix, key: prefix of the network's keys, and key of the state dict in the file, as in
            :func:`jresnet.pytorch.statedict.match`.
        progress: show downloads on stderr.
        chosen: any of num_classes, in_channels, stem, shortcut, stride_in and output_stride, as in
            :func:`jresnet.pytorch.statedict.match`. The returned numbers of classes and channels are always the file's:
            :func:`jresnet.models.params.adapt` changes them.

    Raises:
        InputError: unknown architecture, unknown name of weights, or a value out of range.
        WeightsError: a file is damaged, or contains another network.
        DownloadError: the weights are not in the cache and cannot be downloaded.
    """
    return read(fetch(find(spec, arch), progress=progress), arch, dialect=dialect, prefix=prefix, key=key, **chosen)


def find(spec: str | os.PathLike[str], arch: str | None = None) -> Source:
    """Finds out what ``spec`` refers to, as described in :func:`load`. No file is opened.

    Raises:
        InputError: unknown architecture or name of weights.
    """
    if arch is not None:
        zoo.find(arch)
    if not isinstance(spec, str):
        return _file(Path(spec))
    if not spec:
        raise InputError("weights are an empty string: expected a name such as IMAGENET1K_V2, a path or hf:ORG/REPO")
    if hub.is_spec(spec):
        return Source(spec, spec.partition("/")[2].partition("@")[0])
    head, _, name = spec.partition(":")
    if head.lower() in zoo.ZOO:
        if arch not in (None, head.lower()):
            raise InputError(f"the weights {spec} belong to {head.lower()}, not to {arch}: name weights of {arch}")
        return _published(published.find(head, name or None))
    if published.is_name(spec):
        if arch is None:
            raise InputError(f"the name {spec!r} needs an architecture: write resnet50:{spec}, for example")
        return _published(published.find(arch, spec))
    if os.path.exists(spec) or Path(spec).suffix or os.sep in spec:
        return _file(Path(spec))
    # Neither a name nor a path: `published.find` raises an error that lists the published names.
    return _published(published.find(arch, spec) if arch else published.find(head, name or None))


def _published(row: published.Row) -> Source:
    return Source(f"{row.arch}:{row.name}", row.name.lower(), row.arch, row=row)


def _file(path: Path) -> Source:
    return Source(str(path), path.stem, path=path)


def fetch(source: Source, *, progress: bool = True) -> Source:
    """Downloads the file of a source if it is not in the cache, and checks its digest.

    Returns:
        The source with the path of the local file.

    Raises:
        InputError: the library for the Hub is missing, or the repository holds a network that is not in the zoo.
        DownloadError: the file is not in the cache and cannot be downloaded.
        WeightsError: the file in the cache is damaged, or the repository's configuration is invalid.
    """
    if source.row:
        # The table has either the full digest or only its first digits.
        digest = source.row.sha256 if len(source.row.sha256) == 64 else None
        return dataclasses.replace(source, path=published.fetch(source.row, progress=progress), sha256=digest)
    if source.path is None:
        found = hub.fetch(source.spec, progress=progress)
    elif source.path.is_dir():
        found = hub.local(source.path)
    elif source.path.name in hub.LOCAL and _is_transformers(source.path.with_name(hub.CONFIG)):
        found = hub.beside(source.path)
    else:
        return source
    return dataclasses.replace(
        source, spec=found.spec, arch=found.arch, path=found.path, sha256=found.sha256, repository=found
    )


def _is_transformers(path: Path) -> bool:
    """Whether a file is the configuration of a transformers ResNet. Its tensors cannot be interpreted without it."""
    try:
        return timm_config.load(path).get("model_type") == "resnet"
    except WeightsError:
        return False


def read(
    source: Source,
    arch: str | None = None,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    key: str | None = None,
    **chosen: Any,
) -> Weights:
    """Reads the weights of a fetched source; arguments and errors as in :func:`load`."""
    assert source.path is not None, "fetch comes first"
    path = source.path
    if source.repository and arch:
        hub.check(source.repository, arch)
    tensors, metadata = open_file(path)
    if metadata.get("format", "").startswith("jresnet"):
        found, config, values, metadata = native.parse(path, tensors, metadata)
        if arch not in (None, found):
            own = found or f"not in the zoo ({config})"
            raise WeightsError(f"the weights {path} are of another network: its architecture is {own}, not {arch}")
        return Weights(source.spec, found, config, values, metadata)
    arch = arch or source.arch
    if chosen.get("num_classes") == 0:  # a headless network is requested: read the file's head here, `adapt` drops it
        chosen["num_classes"] = None
    notes: tuple[str, ...] = ()
    if chosen.get("output_stride") is None and metadata.get("output_stride", "").isdecimal():
        chosen["output_stride"] = int(metadata["output_stride"][:9])  # convert.flax2torch writes it into safetensors
    if source.repository:
        if chosen.get("num_classes") is None:
            chosen["num_classes"] = source.repository.num_classes
        if chosen.get("stride_in") is None:
            chosen["stride_in"] = (source.repository.network or {}).get("stride_in")
        notes = source.repository.notes
    conversion = statedict.match(tensors, arch, dialect=dialect, prefix=prefix, key=key, source=str(path), **chosen)
    if source.repository:
        hub.check(source.repository, conversion.arch or "ResNet", conversion.config)
    kept = conversion.metadata() | _preprocessing(conversion) | _provenance(source, path)
    return Weights(
        source.spec, conversion.arch, conversion.config, conversion.values, kept, notes + conversion.notes, conversion
    )


def open_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Opens a ``.safetensors`` file or a file of ``torch.save``.

    Returns:
        The content with tensors as numpy arrays, and the metadata of a safetensors file.

    Raises:
        WeightsError: the file cannot be read, or contains anything but plain data.
    """
    if path.name.endswith(".index.json"):
        return _open_shards(path), {}
    if path.suffix == ".distcp":
        raise WeightsError(
            f"{path} is one part of a torch.distributed checkpoint: merge its folder into one file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path.parent} model.pth"
        )
    if path.suffix == ".index" or path.suffix.startswith(".data-"):
        raise WeightsError(
            f"{path} is part of a TensorFlow checkpoint, whose layers have other names and layouts; only PyTorch weights "
            "can be converted: save them with torch.save(model.state_dict(), path)"
        )
    safetensors = path.suffix == ".safetensors"
    if not safetensors and path.suffix not in TORCH_SUFFIXES and path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as file:  # torchfile reports the error
            safetensors = file.read(9)[8:] == b"{"  # the JSON header follows its length, 8 bytes
    return native.read_safetensors(path) if safetensors else (torchfile.read(path), {})


def _open_shards(path: Path) -> dict[str, Any]:
    """The tensors of a sharded checkpoint, from its index ``{"weight_map": {key: file}}``."""
    index = timm_config.load(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(
            f"{path} is not the index of a checkpoint: expected an object with the file of each tensor under weight_map"
        )
    tensors: dict[str, Any] = {}
    for name in sorted(set(index.values())):
        shard = path.with_name(name) if name and Path(name).name == name else None
        if shard is None or not shard.is_file() or shard.name.endswith(".index.json"):
            raise WeightsError(
                f"{path} names the file {printable(name)}, which is missing: put it into the same folder"
            )
        found, _ = open_file(shard)
        if not isinstance(found, Mapping):
            raise WeightsError(f"{shard} is not a part of a checkpoint: expected a dict of tensors")
        tensors |= {key: value for key, value in found.items() if index.get(key) == name}
    if missing := index.keys() - tensors.keys():
        raise WeightsError(f"{path} names tensors that are missing from its files: {few(sorted(missing))}")
    return tensors


def _preprocessing(conversion: statedict.Conversion) -> dict[str, str]:
    """The preprocessing of the dialect's data set, if the network has that data set's classes."""
    dialect = keymap.DIALECTS[conversion.dialect]
    if dialect.statistics is None or conversion.config.num_classes != dialect.num_classes or conversion.headless:
        return {}
    return {"preprocessing": Preprocessing(None, 32, *STATISTICS[dialect.statistics]).to_json()}


def _provenance(source: Source, path: Path) -> dict[str, str]:
    if source.row:
        known = published.metadata(source.row)
    elif source.repository:
        known = hub.metadata(source.repository)
    else:
        known = {"source": os.fsencode(path.name).decode(errors="replace")}  # file names need not be valid UTF-8
    return known | {"source_sha256": source.sha256 or sha256_of(path)}
