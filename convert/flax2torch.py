"""A jresnet model into PyTorch weights, without torch: ``python -m convert.flax2torch FILE [--output model.pth]``.

native file, its digest checked -> arrays by the dialect's names, in PyTorch's layout -> logits against PyTorch, where it
is installed -> .pth or .safetensors, written atomically -> read back and converted to the arrays it came from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.torch2flax import Say, report, to_torch, with_common_options
from jresnet.errors import InputError, WeightsError

if TYPE_CHECKING:
    from jresnet.models.resnet import ResNet, ResNetConfig

SUFFIXES = (".pth", ".pt", ".safetensors")

# In the order in which torchvision registers them, which is that of PyTorch's own state_dicts.
_ORDER = (
    "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample", "layer1", "layer2", "layer3", "layer4", "fc",
    "kernel", "scale", "bias", "mean", "var",
)  # fmt: skip


def state_dict(
    model: ResNet, dialect: str = "torchvision", counters: int | Mapping[str, int] = 0
) -> dict[str, np.ndarray]:
    """The weights of ``model`` as PyTorch's ``load_state_dict(strict=True)`` takes them, after ``torch.from_numpy``.

    ``{key: torch.from_numpy(value) for key, value in state_dict(model).items()}`` is a state_dict of torch's;
    :func:`jresnet.pytorch.torchsave.write` makes a ``.pth`` of it without torch.

    Args:
        model: its parameters and running statistics are taken as they are, bit by bit.
        dialect: whose names, of :data:`jresnet.pytorch.keymap.DIALECTS`.
        counters: what each BN's ``num_batches_tracked`` is to be: one number, or numbers by torchvision's key, 0 where
            it has none. Only ``BatchNorm2d(momentum=None)`` reads it.

    Returns:
        The dialect's keys to new arrays in PyTorch's layout (OIHW, OI), in PyTorch's order; a tensor that the dialect
        registers twice is one array under two names.

    Raises:
        InputError: for an unknown dialect, or one that has no network like ``model``.
    """
    from jresnet.pytorch import keymap
    from jresnet.weights import native as weights

    check_dialect(model.config, dialect)
    values = weights.arrays(model)
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(values, key=_rank):
        tensors[keymap.torch_key(path, dialect)] = to_torch(np.array(values[path]))
        if path.endswith(".var"):
            count = counters if isinstance(counters, int) else counters.get(keymap.counter_key(path), 0)
            tensors[keymap.counter_key(path, dialect)] = np.array(count, np.int64)
    aliases = {second: tensors[key] for key in tensors if (second := keymap.alias(key, dialect)) is not None}
    return tensors | aliases


def check_dialect(config: ResNetConfig, dialect: str) -> None:
    """Raises :class:`InputError` for an unknown dialect, or one whose networks differ from ``config``."""
    from jresnet.pytorch.keymap import DIALECTS

    if dialect not in DIALECTS:
        raise InputError(f"unknown dialect {dialect!r}: there are {', '.join(DIALECTS)}")
    if different := _differences(config, dialect):
        fitting = [name for name in DIALECTS if not _differences(config, name)]
        raise InputError(
            f"{dialect} has no such network: {'; '.join(different)}. The names that fit are those of {', '.join(fitting)}"
        )


def _differences(config: ResNetConfig, dialect: str) -> list[str]:
    """In what the networks of ``dialect`` are not like ``config``."""
    from jresnet.pytorch.keymap import DIALECTS

    return [
        f"{field} is {value!r} there, {getattr(config, field)!r} here"
        for field, value in DIALECTS[dialect].config.items()
        if getattr(config, field) != value
    ]


def _rank(path: str) -> list[int]:
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in path.split(".")]


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from jresnet.pytorch.keymap import DIALECTS

    parser = argparse.ArgumentParser(
        prog="python -m convert.flax2torch",
        description="Convert a native jresnet file into PyTorch weights. Needs no torch; where torch and torchvision "
        "are installed, the logits of PyTorch's network with these weights are compared with jresnet's.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="native file, of training or of convert.torch2flax")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=f"file to write, its format by its ending, {', '.join(SUFFIXES)} (default: FILE with the ending .pth)",
    )
    parser.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        help="whose network shall load it (default: the one that FILE's weights came from, else torchvision)",
    )
    return with_common_options(parser)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return report(_run, parser().parse_args(argv))


def _run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    import safetensors.numpy

    from convert import verify
    from jresnet.pytorch import keymap, torchsave
    from jresnet.weights import native as weights

    path, output = args.file, args.output or args.file.with_suffix(".pth")
    if path.suffix in (".pth", ".pt", ".th"):
        raise InputError(f"{path} is PyTorch's already: give a native file, such as training writes (*.safetensors)")
    if output.suffix not in SUFFIXES:
        raise InputError(f"--output {output} should end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if output.exists() and path.exists() and output.samefile(path):
        raise InputError(f"--output {output} is the file to convert: name another one")

    arch, config, values, metadata = weights.read(path)
    say("source", f"{path}, a {arch}, digest {metadata['digest']}")
    # A row of the zoo that no torchvision network is like has a dialect of its own name.
    dialect = args.dialect or metadata.get("dialect") or (arch if arch in keymap.DIALECTS else "torchvision")
    model = weights.fill(config, values)
    counts = _counts(metadata, path)
    tensors = state_dict(model, dialect, counts)
    counters = sum(key.endswith(keymap.COUNTER) for key in tensors)
    say("mapped", f"{len(tensors) - counters} tensors and {counters} {keymap.COUNTER} ({dialect} naming)")
    check = verify.check(model, arch, state_dict(model), args.verify)
    say("verified", str(check))
    if output.suffix == ".safetensors":
        weights.write_atomically(output, safetensors.numpy.save(tensors, {"format": "pt"}))
        tensors_of = f"safetensors.torch.load_file({str(output)!r})"
    else:
        torchsave.write(output, tensors)
        tensors_of = f"torch.load({str(output)!r}, weights_only=True)"
    try:
        _check_written(output, arch, config, dialect, tensors, metadata["digest"])
    except WeightsError:
        output.unlink(missing_ok=True)
        raise
    size = output.stat().st_size
    load = [*_build(arch, config, dialect), f"model.load_state_dict({tensors_of})"]
    say("wrote", f"{output} ({size / 1e6:.1f} MB), read back bit by bit; load it with")
    for line in load:
        say("", line)
    return {
        "arch": arch,
        "source": str(path),
        "digest": metadata["digest"],
        "dialect": dialect,
        "tensors": len(tensors) - counters,
        "counters": counters,
        "output": str(output),
        "bytes": size,
        "load": "\n".join(load),
        "verify": check.as_dict(),
    }


def _counts(metadata: Mapping[str, str], path: Path) -> int | dict[str, int]:
    """What a native file knows of its counters: one number for all, or numbers by torchvision's key."""

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    try:
        found = json.loads(metadata.get("num_batches_tracked", "0"))
    except (ValueError, RecursionError):
        found = None
    if is_count(found) or (isinstance(found, dict) and all(map(is_count, found.values()))):
        return found
    raise WeightsError(f"{path} should say whole numbers for num_batches_tracked: convert it again from its source")


def _check_written(
    output: Path, arch: str, config: ResNetConfig, dialect: str, tensors: Mapping[str, np.ndarray], digest: str
) -> None:
    """Reads ``output`` without torch: the same tensors, and on the way back the arrays of the native file."""
    from convert import torch2flax
    from jresnet.weights import native as weights

    found = torch2flax.read(output)
    chosen = {name: getattr(config, name) for name in weights.FREE}
    back = torch2flax.match(found, arch, dialect=dialect, source=str(output), **chosen)
    if weights.digest(found) != weights.digest(tensors) or weights.digest(back.values) != digest:
        raise WeightsError(f"{output} does not hold what was written: look after the disk, and convert again")


def _build(arch: str, config: ResNetConfig, dialect: str) -> list[str]:
    """The line that builds the PyTorch network, where that is one call of torchvision's."""
    from jresnet.weights import native as weights
    from jresnet.weights import published as pretrained

    plain = weights.configure(arch, num_classes=config.num_classes)
    if dialect == "torchvision" and config == plain and pretrained.names(arch):
        return [f"model = torchvision.models.{arch}(num_classes={config.num_classes})"]
    return []


if __name__ == "__main__":
    sys.exit(main())
