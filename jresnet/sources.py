"""Where weights come from: a name, a path or the Hugging Face Hub, into a configuration and arrays. The only resolver.

    find: text or path -> Source -> fetch: a file on this machine, its digest checked -> read: Weights

:func:`load` does the three. No torch is needed, whatever wrote the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
    """A place that weights come from, told by what the user wrote; nothing is fetched or read yet."""

    spec: str  # as it is said in messages: "resnet50:IMAGENET1K_V2", a path, "hf:ORG/REPO@REVISION"
    label: str  # for the name of a file made of it: "imagenet1k_v2", the file's stem, the repository's name
    arch: str | None = None  # a name of the zoo; None: the file may tell
    path: Path | None = None  # of the file on this machine; None: not fetched yet
    sha256: str | None = None  # of that file; None: not known yet
    row: published.Row | None = None  # of torchvision's table
    repository: hub.Published | None = None  # on the Hub, or a folder like one there, once it is fetched


@dataclass(frozen=True, eq=False)
class Weights:
    """The arrays of a network, with what is known of them."""

    spec: str  # as :class:`Source`, a revision on the Hub as its commit in full
    arch: str | None  # a name of the zoo; None: the network is none of its rows
    config: ResNetConfig  # of the network that the file holds
    values: Mapping[str, np.ndarray]  # parameters and statistics by dotted path, float32 or as a native file has them
    metadata: Mapping[
        str, str
    ]  # as a native file has it: source, source_sha256, dialect, num_batches_tracked, scores, ...
    notes: tuple[str, ...] = ()  # what was passed over on the way, a sentence each
    conversion: statedict.Conversion | None = None  # None: the file is a native one

    @property
    def preprocessing(self) -> Preprocessing | None:
        """From an image to the network's input; None where the weights do not say.

        Raises:
            WeightsError: what they say cannot be used.
        """
        said = self.metadata.get("preprocessing")
        return None if said is None else Preprocessing.from_json(said)

    @property
    def categories(self) -> tuple[str, ...] | None:
        """The names of the classes, in the order of the logits; None where the weights do not say.

        Raises:
            WeightsError: what they say is not one name a class.
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
    """Weights from wherever they are.

    Args:
        spec: one of

            * ``"resnet50"`` (torchvision's default weights), ``"resnet50:IMAGENET1K_V1"``, or with ``arch`` given
              ``"IMAGENET1K_V1"`` or ``"DEFAULT"``: published weights, downloaded into torch's own cache;
            * ``"hf:ORG/REPO[@REVISION]"``: safetensors on the Hugging Face Hub (with the extra ``hub``);
            * a path: a native file, a file of ``torch.save`` or ``torch.jit.save``, safetensors with PyTorch's names, the
              index (``*.index.json``) of a checkpoint in several files, or a folder such as transformers, timm and
              :func:`jresnet.sharing.push` write.
              What is called like published weights is never taken for a path; ``./resnet50`` is one.
        arch: a name of :func:`jresnet.list_models`; ``None``: as the weights say.
        dialect: how a file from PyTorch names its tensors (:data:`jresnet.pytorch.keymap.DIALECTS`); ``None``: the one
            that fits its keys best.
        prefix, key: of its network's keys and of its dict of tensors, as in :func:`jresnet.pytorch.statedict.match`.
        progress: show downloads on stderr.
        chosen: those of num_classes, in_channels, stem, shortcut, stride_in and output_stride that are asked for, as in
            :func:`jresnet.pytorch.statedict.match`. Numbers of classes and channels are the file's, whatever is chosen:
            :func:`jresnet.models.params.adapt` makes them others.

    Raises:
        InputError: for an unknown architecture or name of weights, or a value out of range.
        WeightsError: for a file that is damaged, or holds another network.
        DownloadError: the weights are neither in the cache nor to be had.
    """
    return read(fetch(find(spec, arch), progress=progress), arch, dialect=dialect, prefix=prefix, key=key, **chosen)


def find(spec: str | os.PathLike[str], arch: str | None = None) -> Source:
    """The place that ``spec`` means, as :func:`load` says; nothing is opened.

    Raises:
        InputError: for an unknown architecture or name of weights.
    """
    if arch is not None:
        zoo.find(arch)
    if not isinstance(spec, str):
        return _file(Path(spec))
    if not spec:
        raise InputError("weights are an empty text: expected a name such as IMAGENET1K_V2, a path or hf:ORG/REPO")
    if hub.is_spec(spec):
        return Source(spec, spec.partition("/")[2].partition("@")[0])
    head, _, name = spec.partition(":")
    if head.lower() in zoo.ZOO:
        if arch not in (None, head.lower()):
            raise InputError(f"the weights {spec} are those of {head.lower()}, not of {arch}: name weights of {arch}")
        return _published(published.find(head, name or None))
    if published.is_name(spec):
        if arch is None:
            raise InputError(f"the name {spec!r} does not say of which architecture: write it as resnet50:{spec}, say")
        return _published(published.find(arch, spec))
    if os.path.exists(spec) or Path(spec).suffix or os.sep in spec:
        return _file(Path(spec))
    # Neither: the error says what is published.
    return _published(published.find(arch, spec) if arch else published.find(head, name or None))


def _published(row: published.Row) -> Source:
    return Source(f"{row.arch}:{row.name}", row.name.lower(), row.arch, row=row)


def _file(path: Path) -> Source:
    return Source(str(path), path.stem, path=path)


def fetch(source: Source, *, progress: bool = True) -> Source:
    """The same with its file on this machine, downloaded where it is not in its cache; its digest is compared.

    Raises:
        InputError: the library for the Hub is missing, or the repository holds a network that the zoo has not.
        DownloadError: it is neither in the cache nor to be had.
        WeightsError: the file in the cache is damaged, or the repository says what cannot be used.
    """
    if source.row:
        # The table has all of the digest, or its beginning alone.
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
    """Whether a file is the configuration of transformers' ResNet, without which its tensors are not understood."""
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
    """The weights in a file that was fetched; arguments and errors as :func:`load`."""
    assert source.path is not None, "fetch comes first"
    path = source.path
    if source.repository and arch:
        hub.check(source.repository, arch)
    tensors, metadata = open_file(path)
    if metadata.get("format", "").startswith("jresnet"):
        found, config, values, metadata = native.parse(path, tensors, metadata)
        if arch not in (None, found):
            own = found or f"none of the zoo but {config}"
            raise WeightsError(f"the weights {path} are of another network: its architecture is {own}, not {arch}")
        return Weights(source.spec, found, config, values, metadata)
    arch = arch or source.arch
    if chosen.get("num_classes") == 0:  # a network without a head is made of one with: the file's own
        chosen["num_classes"] = None
    notes: tuple[str, ...] = ()
    if chosen.get("output_stride") is None and metadata.get("output_stride", "").isdecimal():
        chosen["output_stride"] = int(metadata["output_stride"][:9])  # as convert.flax2torch writes it into safetensors
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
    """What a ``.safetensors`` file or a file of ``torch.save`` holds, as numpy arrays, and the metadata of the former.

    Raises:
        WeightsError: where it cannot be read, or holds anything but plain data.
    """
    if path.name.endswith(".index.json"):
        return _open_shards(path), {}
    if path.suffix == ".distcp":
        raise WeightsError(
            f"{path} is a part of a checkpoint of torch.distributed: make one file of its folder with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path.parent} model.pth"
        )
    safetensors = path.suffix == ".safetensors"
    if not safetensors and path.suffix not in TORCH_SUFFIXES and path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as file:  # torchfile says what is wrong
            safetensors = file.read(9)[8:] == b"{"  # behind the length of the header
    return native.read_safetensors(path) if safetensors else (torchfile.read(path), {})


def _open_shards(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint in several files, by its index: ``{"weight_map": {key: file}}``."""
    index = timm_config.load(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(f"{path} should be the index of a checkpoint, with the file of each tensor under weight_map")
    tensors: dict[str, Any] = {}
    for name in sorted(set(index.values())):
        shard = path.with_name(name) if name and Path(name).name == name else None
        if shard is None or not shard.is_file() or shard.name.endswith(".index.json"):
            raise WeightsError(f"{path} names the file {printable(name)}, which is not beside it: get that too")
        found, _ = open_file(shard)
        if not isinstance(found, Mapping):
            raise WeightsError(f"{shard} holds no tensors by their names, as a part of a checkpoint should")
        tensors |= {key: value for key, value in found.items() if index.get(key) == name}
    if missing := index.keys() - tensors.keys():
        raise WeightsError(f"{path} names tensors that its files do not hold: {few(sorted(missing))}")
    return tensors


def _preprocessing(conversion: statedict.Conversion) -> dict[str, str]:
    """That of the dialect's data set, where the network is one for its classes."""
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
        known = {"source": os.fsencode(path.name).decode(errors="replace")}  # a name need not be UTF-8
    return known | {"source_sha256": source.sha256 or sha256_of(path)}
