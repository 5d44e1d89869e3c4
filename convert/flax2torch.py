"""Convert a jresnet model to PyTorch weights, without torch: ``python -m convert.flax2torch FILE [--output model.pth]``.

The steps: read the native file and check its digest; rename the arrays for the dialect; transpose them to PyTorch's layout;
compare the logits with PyTorch's, if it is installed; write the .pth or .safetensors file atomically; read the file back,
convert it, and compare it with the original arrays.
"""

from __future__ import annotations

import sys

from jresnet.commands import greet

if __name__ == "__main__":  # before the imports below, which take seconds
    greet("export-torch", sys.argv[1:])

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from convert import verify
from convert.torch2flax import Say, check_other, report, with_common_options
from jresnet import sources
from jresnet.commands import flags, guarded
from jresnet.commands.flags import Parser, check_output
from jresnet.errors import InputError, WeightsError
from jresnet.files import TORCH_SUFFIXES, write_atomically
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import keymap, statedict, torchsave
from jresnet.weights import hub, native, published, transformers_config
from jresnet.weights.preprocessing import Preprocessing

PROG = "python -m convert.flax2torch"
SUFFIXES = (".pth", ".pt", ".safetensors")


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Returns the argument parser."""
    parser = Parser(
        prog=prog,
        description="Convert a native file to PyTorch weights, without torch; if torch and torchvision are installed, the "
        "logits are compared.",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="native file, written by training or by convert.torch2flax"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=flags.folder,
        help=f"output file; the suffix selects the format ({', '.join(SUFFIXES)}); a name without a suffix is a folder for "
        "transformers' from_pretrained (default: FILE with the suffix .pth)",
    )
    parser.add_argument(
        "--dialect",
        choices=tuple(keymap.DIALECTS),
        help="naming of the tensors in the output (default: the naming that FILE was converted from, else torchvision)",
    )
    return with_common_options(parser)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Runs the command, called ``prog``; returns its exit code."""
    return report(_run, parser(prog).parse_args(argv))


def _run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    path = args.file
    if path.suffix in TORCH_SUFFIXES:
        raise InputError(
            f"{path} is already a PyTorch file: expected a native file (*.safetensors), as training writes it"
        )
    if args.output and args.output.suffix not in ("", *SUFFIXES):
        raise InputError(f"--output {args.output} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.name:
        raise InputError(f"cannot read {path}: expected a file, found a folder or a device")
    output = args.output or path.with_suffix(".pth")
    folder = output if not output.suffix else None  # a folder for transformers' from_pretrained
    if folder:
        output = folder / hub.WEIGHTS
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(
                f"--output {folder} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or be a folder"
            )
    written = (output.name, hub.CONFIG, hub.PREPROCESSOR) if folder else (output.name,)
    for name in written if folder is None or folder.exists() else ():  # a missing folder is created below
        check_other(output.with_name(name), path)
        check_output(output.with_name(name), args.force)
    arch, config, values, metadata = native.read(path)
    say("source", f"{path}, a {arch or 'ResNet without a name'}, digest {metadata['digest']}")
    if other := {value.dtype.name for value in values.values()} - {"float32"}:
        say(
            "note",
            f"parameters in {' and '.join(sorted(other))} are written as float32, the dtype of PyTorch's networks",
        )
        values = {name: value.astype(np.float32) for name, value in values.items()}
    # An architecture without a torchvision equivalent has a dialect with its own name.
    dialect: str = (
        args.dialect or metadata.get("dialect") or (arch if arch and arch in keymap.DIALECTS else "torchvision")
    )
    if folder:
        dialect = args.dialect or "transformers"
        if dialect != "transformers":
            raise InputError(f"--output {folder} is a folder, which needs --dialect transformers, got {dialect}")
    model = params.fill(config, values)
    counts = _counts(metadata, path)
    tensors = statedict.state_dict(model, dialect, counts)
    counters = sum(key.endswith(keymap.COUNTER) for key in tensors)
    say("mapped", f"{len(tensors) - counters} tensors and {counters} {keymap.COUNTER} ({dialect} naming)")
    if args.verify != "never":
        say("verify", "comparing the logits of two images with PyTorch, if it is installed (some seconds)")
    check = verify.check(model, arch, statedict.state_dict(model), args.verify)
    say(check.label, str(check))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in _beside(config, metadata).items():
            write_atomically(folder / name, text.encode())
    if output.suffix == ".safetensors":
        write_atomically(output, safetensors.numpy.save(tensors, _torch_metadata(config)))
        tensors_of = f"safetensors.torch.load_file({str(output)!r})"
    else:
        torchsave.write(output, tensors)
        tensors_of = f"torch.load({str(output)!r}, weights_only=True)"
    try:
        _check_written(output, arch, config, dialect, tensors, native.digest(values))
    except WeightsError:
        output.unlink(missing_ok=True)
        raise
    size = output.stat().st_size
    load = [*_build(arch, config, dialect), f"model.load_state_dict({tensors_of})"]
    if folder:
        kind = "AutoModelForImageClassification" if config.num_classes else "AutoModel"
        load = [f"model = transformers.{kind}.from_pretrained({str(folder)!r})"]
    if config.output_stride:
        say("note", _DILATED.format(config=config, replaced=_replaced(config)))
    say("wrote", f"{output} ({size / 1e6:.1f} MB), read back and identical; load it with")
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


def _beside(config: ResNetConfig, metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the contents of transformers' configuration files, by file name."""
    categories, chosen = metadata.get("categories"), metadata.get("preprocessing")
    return transformers_config.write(
        config, json.loads(categories) if categories else None, Preprocessing.from_json(chosen) if chosen else None
    )


def _counts(metadata: Mapping[str, str], path: Path) -> int | dict[str, int]:
    """Returns a native file's ``num_batches_tracked``: one number for all layers, or numbers by torchvision's keys."""

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    try:
        found = json.loads(metadata.get("num_batches_tracked", "0"))
    except (ValueError, RecursionError):
        found = None
    if is_count(found) or (isinstance(found, dict) and all(map(is_count, found.values()))):
        return found
    raise WeightsError(
        f"{path}: num_batches_tracked is not a number or a dict of numbers: convert the file again from its source"
    )


def _check_written(
    output: Path, arch: str | None, config: ResNetConfig, dialect: str, tensors: Mapping[str, np.ndarray], digest: str
) -> None:
    """Checks that ``output`` contains the tensors, and that converting it back gives the native file's arrays."""
    found = sources.open_file(output)[0]
    chosen = {name: getattr(config, name) for name in zoo.FREE}
    back = statedict.match(found, arch, dialect=dialect, source=str(output), **chosen)
    if native.digest(found) != native.digest(tensors) or native.digest(back.values) != digest:
        raise WeightsError(f"{output} differs from what was written: check the disk, and convert again")


def _build(arch: str | None, config: ResNetConfig, dialect: str) -> list[str]:
    """Returns the line that builds the PyTorch network, if one call of torchvision builds it."""
    if arch is None or (config.output_stride and config.block == "basic"):  # torchvision dilates only bottlenecks
        return []
    plain = zoo.configure(arch, num_classes=config.num_classes, output_stride=config.output_stride)
    if dialect == "torchvision" and config == plain and published.names(arch):
        how = f", replace_stride_with_dilation={_replaced(config)}" if config.output_stride else ""
        return [f"model = torchvision.models.{arch}(num_classes={config.num_classes}{how})"]
    return []


# Dilation does not change the weights, so the file itself cannot record it.
_DILATED = (
    "this network is dilated to output stride {config.output_stride}, which PyTorch's weights do not record: build it with "
    "replace_stride_with_dilation={replaced} (torchvision, bottlenecks) or output_stride={config.output_stride} (timm)"
)


def _replaced(config: ResNetConfig) -> list[bool]:
    """Returns the value of torchvision's ``replace_stride_with_dilation``."""
    return [stride == 1 for stride, _ in config.strides[1:]]


def _torch_metadata(config: ResNetConfig) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    dilated = {
        "output_stride": str(config.output_stride),
        "replace_stride_with_dilation": json.dumps(_replaced(config)),
    }
    return {"format": "pt"} | (dilated if config.output_stride else {})


if __name__ == "__main__":
    sys.exit(guarded(main, "export-torch"))
