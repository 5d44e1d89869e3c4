"""Native weight files: safetensors with an architecture, provenance and a digest over the arrays.

safetensors finds truncation and bad headers; the digest finds the flipped bit that it does not. Files are written under
a temporary name and moved into place, so that one that exists is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from jresnet.errors import InputError, WeightsError
from jresnet.models import zoo
from jresnet.models.layers import Linear
from jresnet.models.resnet import ResNet, ResNetConfig

FORMAT = "jresnet-1"
FREE = ("num_classes", "in_channels", "stem", "shortcut")  # what may be chosen apart from an architecture's row
_KINDS = {"stem": ("imagenet", "cifar"), "shortcut": ("pad", "projection", "projection_first", "conv")}
_STATE = (nnx.Param, nnx.BatchStat)


def configure(arch: str, **chosen: Any) -> ResNetConfig:
    """The configuration of ``arch`` with those of num_classes, in_channels, stem and shortcut that are not None replaced.

    Raises:
        InputError: for an unknown architecture or a value out of range; all of them at once.
    """
    config = dataclasses.replace(zoo.find(arch).config, **{k: v for k, v in chosen.items() if v is not None})
    problems = [
        f"{name} must be a whole number of at least 1, got {value!r}"
        for name in ("num_classes", "in_channels")
        if not isinstance(value := getattr(config, name), int) or isinstance(value, bool) or value < 1
    ]
    problems += [
        f"{name} must be {' or '.join(map(repr, kinds))}, got {getattr(config, name)!r}"
        for name, kinds in _KINDS.items()
        if getattr(config, name) not in kinds
    ]
    if config.shortcut == "pad" and config.block != "basic":
        problems.append("shortcut 'pad' is defined for basic blocks (He et al. 2016, section 4.2), not for bottlenecks")
    if problems:
        raise InputError("; ".join(problems))
    return config


def arrays(model: ResNet) -> dict[str, Any]:
    """Every parameter and running statistic by its dotted path, such as ``layer1.0.bn2.mean``, sorted."""
    flat = nnx.to_flat_state(nnx.state(model, _STATE))
    return dict(sorted((".".join(map(str, path)), variable.get_value()) for path, variable in flat))


@functools.lru_cache(64)
def shapes(config: ResNetConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter and running statistic by its dotted path."""
    return MappingProxyType({path: leaf.shape for path, leaf in arrays(ResNet(config, rngs=None)).items()})


def fill(
    config: ResNetConfig, values: Mapping[str, np.ndarray], dtype: DTypeLike | None = None, remat: bool = False
) -> ResNet:
    """A model whose leaves are exactly ``values``, by their dotted paths; ``dtype``, ``remat`` as in :class:`ResNet`."""
    graph, state = nnx.split(ResNet(config, dtype=dtype, remat=remat, rngs=None), _STATE)
    flat = {
        path: variable.replace(jax.numpy.asarray(values[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def adapt(
    values: Mapping[str, np.ndarray], found: ResNetConfig, wanted: ResNetConfig, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Weights of ``found`` for a network that has another number of classes or of input channels, as timm adapts them.

    A head for other classes is drawn anew, as PyTorch's ``nn.Linear``. A stem kernel for three channels is summed over
    them for one; for any other number C its channels are repeated in turn and scaled by 3 / C, so that the activations
    keep their size.

    Returns:
        The values by dotted path, and a sentence on each thing that was adapted.

    Raises:
        WeightsError: where the networks differ in anything else, or a stem for other than three channels would have to
            be adapted.
    """
    values, notes = dict(values), []
    problems = [
        f"its {field.name} is {getattr(found, field.name)!r}, not {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(ResNetConfig)
        if field.name not in ("num_classes", "in_channels")
        and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if found.in_channels != wanted.in_channels:
        if found.in_channels == 3:
            kernel, channels = np.asarray(values["conv1.kernel"]), wanted.in_channels
            if channels == 1:
                values["conv1.kernel"], how = kernel.sum(2, keepdims=True), "summed over the channels"
            else:
                repeated = np.take(kernel, np.arange(channels) % 3, axis=2)
                values["conv1.kernel"] = repeated * np.float32(3 / channels)
                how = f"its channels repeated in turn and scaled by 3/{channels}"
            notes.append(f"stem for {channels} input channel{'s' * (channels > 1)}: the kernel for 3, {how}")
        else:
            problems.append(
                f"its in_channels is {found.in_channels}, not {wanted.in_channels}: only a stem for 3 can be adapted"
            )
    if problems:
        raise WeightsError(f"the weights are of another network: {'; '.join(problems)}")
    if found.num_classes != wanted.num_classes:
        head = Linear(values["fc.kernel"].shape[0], wanted.num_classes, rngs=nnx.Rngs(seed))
        values |= {"fc.kernel": np.asarray(head.kernel[...]), "fc.bias": np.asarray(head.bias[...])}
        notes.append(
            f"fresh head for {wanted.num_classes} classes, to be trained: the weights' own has {found.num_classes}"
        )
    return values, notes


def differences(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each kind of disagreement between two tables of names and shapes; empty where they agree."""
    missing, unexpected = expected.keys() - got.keys(), [printable(k) for k in got.keys() - expected.keys()]
    misshapen = [
        f"{k} is {list(got[k])}, not {list(expected[k])}"
        for k in sorted(expected.keys() & got.keys())
        if tuple(got[k]) != tuple(expected[k])
    ]
    lines = []
    for title, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("misshapen", misshapen)):
        if names:
            lines.append(f"{len(names)} {title}: {', '.join(names)}")
    return lines


def printable(name: str) -> str:
    """A name from a stranger's file as it may be shown on a terminal: without control codes, and not for pages."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 200 else f"{name[:200]}..."


def digest(values: Mapping[str, np.ndarray]) -> str:
    """SHA-256 in hex over name, dtype, shape and bytes of every array, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        total.update(f"{name} {value.dtype.str} {list(values[name].shape)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return total.hexdigest()


def save(path: str | Path, model: ResNet, arch: str, **provenance: str) -> None:
    """Writes ``model`` to a native file, atomically.

    Args:
        path: the file; by custom ``*.safetensors``.
        model: a model of ``arch``.
        arch: its row of the zoo.
        provenance: more metadata as text, for example ``source`` and ``source_sha256``.

    Raises:
        InputError: where ``model`` is not an ``arch`` or was fused, or the file cannot be written.
    """
    chosen = {name: getattr(model.config, name) for name in FREE}
    if configure(arch, **chosen) != model.config:
        raise InputError(f"this model is not a {arch}: its configuration is {model.config}")
    # safetensors scrambles arrays that are not contiguous, without a word.
    values = {name: np.ascontiguousarray(value) for name, value in arrays(model).items()}
    if "bn1.scale" not in values:
        raise InputError(
            "this model is fused and has no BatchNorm to write: save the model that was given to jresnet.fuse"
        )
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    metadata = {
        "format": FORMAT,
        "arch": arch,
        "config": json.dumps(chosen),
        "digest": digest(values),
        "versions": json.dumps(versions),
        **provenance,
    }
    write_atomically(path, safetensors.numpy.save(values, metadata))


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that, whenever it is interrupted, the path holds the old content or the new one, whole.

    Raises:
        InputError: where it cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)  # mkstemp makes files private; give this one the permissions of an ordinary file
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    except BaseException:  # Ctrl-C: leave nothing half-written
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of any safetensors file, bfloat16 included.

    Raises:
        WeightsError: where the file is not there, is damaged, or holds a dtype that numpy has not (float8, float4).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            raise OSError("it is a folder or a device; name the file itself")
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}): fetch or convert it again") from error


def read(path: str | Path) -> tuple[str, ResNetConfig, dict[str, np.ndarray], dict[str, str]]:
    """Reads a native file and checks it whole.

    Returns:
        (arch, config, arrays by path, metadata).

    Raises:
        WeightsError: where the file is missing, truncated, altered, not jresnet's, or does not hold what its
            architecture needs; one message lists everything that is wrong.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".th"):
        raise WeightsError(
            f"{path} is a PyTorch file: convert it first, with python -m convert.torch2flax ARCH --weights {path}"
        )
    values, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} is not a {FORMAT} file (its metadata says {metadata.get('format')!r}): a PyTorch or timm file "
            f"is converted with python -m convert.torch2flax ARCH --weights {path}"
        )
    if digest(values) != metadata.get("digest"):
        raise WeightsError(f"{path} was altered after it was written, its digest differs: fetch or convert it again")
    try:
        arch, chosen = metadata["arch"], json.loads(metadata["config"])
        # The shortcut came later than the first files.
        config = configure(arch, **{name: chosen[name] for name in FREE if name != "shortcut" or name in chosen})
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} does not say which network it holds ({str(error)[:500]})") from error
    problems = differences(shapes(config), {name: value.shape for name, value in values.items()})
    problems += [f"{name} is {value.dtype}, not float32" for name, value in values.items() if value.dtype != np.float32]
    if problems:
        raise WeightsError(f"{path} does not hold a {arch}: {'; '.join(problems)}")
    return arch, config, values, metadata


def load(path: str | Path, dtype: DTypeLike | None = None) -> ResNet:
    """The model that a native file holds; errors as :func:`read`, ``dtype`` as in :class:`ResNet`."""
    _, config, values, _ = read(path)
    return fill(config, values, dtype)
