"""PyTorch weights into a jresnet model: ``python -m convert.torch2flax ARCH [--weights NAME|FILE]``.

bytes, their digest checked -> arrays, without torch -> dialect -> every leaf filled exactly once, or one error that lists
all that is wrong -> logits against PyTorch, where it is installed -> native file, written atomically.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jresnet.errors import InputError, WeightsError

if TYPE_CHECKING:
    from jresnet.resnet import ResNet, Stem


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about."""

    model: ResNet
    arrays: dict[str, np.ndarray]  # the file's tensors by torchvision's keys, float32, PyTorch's layout
    dialect: str  # a name of keymap.DIALECTS
    dropped: int  # num_batches_tracked entries, which Flax's BatchNorm has no use for


def convert(
    state_dict: Mapping[str, Any],
    arch: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    stem: Stem | None = None,
    dtype: Any = None,
) -> ResNet:
    """A jresnet model with the weights of a PyTorch ``state_dict``.

    Args:
        state_dict: PyTorch's keys to numpy arrays or torch tensors, of any floating-point dtype; wrappers' prefixes
            (``module.``, ``_orig_mod.``, ``model.``) and an enclosing ``{"state_dict": ...}`` are peeled off.
        arch: a name of :func:`jresnet.list_models`.
        num_classes, in_channels, stem, dtype: as in :func:`jresnet.create`.

    Raises:
        InputError: for an unknown architecture.
        WeightsError: unless every parameter and statistic is filled exactly once; one message lists all missing,
            unexpected and misshapen keys.
    """
    return convert_verbosely(
        state_dict, arch, num_classes=num_classes, in_channels=in_channels, stem=stem, dtype=dtype
    ).model


def convert_verbosely(
    state_dict: Any, arch: str, *, dtype: Any = None, source: str = "the state_dict", **chosen: Any
) -> Conversion:
    """As :func:`convert`, and says how; ``source`` names the weights in errors."""
    from convert import keymap
    from jresnet import weights

    config = weights.configure(arch, **chosen)
    shapes = weights.shapes(config)
    tensors = _peel(state_dict, source)
    kept = {key: value for key, value in tensors.items() if key.rpartition(".")[2] != keymap.DROPPED}
    dialect = keymap.find_dialect(shapes.keys(), kept)
    paths = {keymap.torch_key(path, dialect): path for path in shapes}

    expected = {key: torch_shape(shapes[path]) for key, path in paths.items()}
    problems = weights.differences(expected, {key: tuple(value.shape) for key, value in kept.items()})
    arrays: dict[str, np.ndarray] = {}
    for key in paths.keys() & kept.keys():
        try:
            arrays[key] = _float32(kept[key])
        except TypeError as error:
            problems.append(f"{key} {error}")
    if problems:
        advice = _advice(expected, kept)
        raise WeightsError(f"{source} does not hold a {arch} ({dialect} naming): {'; '.join(problems)}{advice}")
    model = weights.fill(config, {path: to_flax(arrays[key]) for key, path in paths.items()}, dtype)
    torchvision = {keymap.torch_key(path): arrays[key] for key, path in paths.items()}
    return Conversion(model, torchvision, dialect, len(tensors) - len(kept))


def read(path: str | Path) -> Any:
    """What a ``.safetensors`` file or a file of ``torch.save`` holds, as numpy arrays, without torch.

    Raises:
        WeightsError: where it cannot be read, or holds anything but plain data.
    """
    if Path(path).suffix == ".safetensors":
        from jresnet.weights import read_safetensors

        return read_safetensors(path)[0]
    from convert import torchfile

    return torchfile.read(path)


def _peel(found: Any, source: str) -> dict[str, Any]:
    """The state_dict inside a checkpoint, without wrappers' prefixes."""
    from convert.keymap import strip_wrappers

    if isinstance(found, Mapping):
        for name in ("state_dict", "model", "model_state_dict", "net"):
            if isinstance(found.get(name), Mapping):
                return _peel(found[name], source)
    tensors = dict(found) if isinstance(found, Mapping) else {}
    odd = [str(key) for key, value in tensors.items() if not (isinstance(key, str) and hasattr(value, "shape"))]
    if odd or not tensors:
        what = f"entries that are no tensors: {', '.join(odd[:5])}" if odd else f"{type(found).__name__}"
        raise WeightsError(f"{source} should hold a state_dict, names to tensors, but holds {what}")
    prefix = len(strip_wrappers(tensors.keys()))
    return {key[prefix:]: value for key, value in tensors.items()}


def _float32(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, known by its method, since torch is not imported here
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, np.ndarray) or not (
        np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"
    ):
        raise TypeError(f"is {getattr(value, 'dtype', type(value).__name__)}, not a floating-point tensor")
    return np.ascontiguousarray(value, dtype=np.float32)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO -> OIHW, IO -> OI."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def to_flax(value: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, OI -> IO, contiguous: safetensors scrambles arrays that are not."""
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)


def _advice(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Any]) -> str:
    """The options that would make stem and head fit, where the file tells."""
    hints = []
    stem, want = getattr(got.get("conv1.weight"), "shape", None), expected["conv1.weight"]
    if stem is not None and len(stem) == 4 and tuple(stem) != want:
        if stem[2] != want[2]:
            hints.append("--stem cifar" if stem[2] == 3 else "--stem imagenet")
        if stem[1] != want[1]:
            hints.append(f"--in-channels {stem[1]}")
    for head in ("fc.weight", "linear.weight"):
        shape = getattr(got.get(head), "shape", None)
        if head in expected and shape is not None and len(shape) == 2 and shape[0] != expected[head][0]:
            hints.append(f"--num-classes {shape[0]}")
    return f". It may be meant for {' '.join(hints)}" if hints else ""


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from jresnet.zoo import ZOO

    parser = argparse.ArgumentParser(
        prog="python -m convert.torch2flax",
        description="Convert PyTorch weights into a native jresnet file. Needs no torch; where torch and torchvision "
        "are installed, the converted model's logits are compared with theirs.",
        epilog=f"Architectures: {', '.join(ZOO)}.",
    )
    parser.add_argument("arch", metavar="ARCH", help="architecture of the weights, for example resnet50")
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="published weights (IMAGENET1K_V1, IMAGENET1K_V2) or a .pth, .pt, .th or .safetensors file "
        "(default: torchvision's default for ARCH, downloaded into torch's own cache)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: ARCH-NAME.safetensors)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes of the file's head (default: ARCH's own)")
    parser.add_argument("--in-channels", type=int, metavar="N", help="channels of the images (default: ARCH's own)")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), help="stem of the file's network (default: ARCH's)")
    parser.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare logits with torchvision's on random images: where torch is installed (auto), or fail without "
        "it (always), or not at all (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        report = _run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from convert import verify
    from jresnet import download, pretrained, weights
    from jresnet.factory import is_path

    def say(title: str, text: str) -> None:
        if not args.json:
            print(f"{title:<8} {text}", flush=True)

    chosen = {"num_classes": args.num_classes, "in_channels": args.in_channels, "stem": args.stem}
    weights.configure(args.arch, **chosen)  # an unknown architecture is told before anything is downloaded
    provenance: dict[str, str] = {}
    if args.weights is not None and is_path(args.weights):
        path, name = Path(args.weights), Path(args.weights).stem
        provenance["source"] = path.name
        say("weights", str(path))
    else:
        row = pretrained.find(args.arch, args.weights)
        why = "as asked for" if args.weights else "torchvision's default"
        say("weights", f"{row.name} ({why}): {row.top1:.3f} % top-1, {row.top5:.3f} % top-5 on ImageNet, published")
        path, name = pretrained.fetch(row, progress=not args.json), row.name.lower()
        provenance |= {"source": row.url, "weights": row.name, **pretrained.metadata(row)}
    output = args.output or Path(f"{args.arch}-{name}.safetensors")
    if output.exists() and path.exists() and output.samefile(path):
        raise InputError(f"--output {output} is the file to convert: name another one")

    state_dict = read(path)
    provenance["source_sha256"] = download.sha256_of(path)
    say("source", f"{path}, sha256 {provenance['source_sha256']}")
    conversion = convert_verbosely(state_dict, args.arch, source=str(path), **chosen)
    provenance["dialect"] = conversion.dialect
    counters = f"; {conversion.dropped} num_batches_tracked dropped: only PyTorch's momentum=None reads them"
    say(
        "mapped",
        f"{len(conversion.arrays)} tensors, each used once ({conversion.dialect} naming)"
        f"{counters if conversion.dropped else ''}",
    )
    check = verify.check(conversion.model, args.arch, conversion.arrays, args.verify)
    say("verified", str(check))
    weights.save(output, conversion.model, args.arch, **provenance)
    size = output.stat().st_size
    say("wrote", f"{output} ({size / 1e6:.1f} MB); load it with jresnet.create({args.arch!r}, weights={str(output)!r})")
    return {
        "arch": args.arch,
        "output": str(output),
        "bytes": size,
        "tensors": len(conversion.arrays),
        "dropped": conversion.dropped,
        **provenance,
        "verify": check.as_dict(),
    }


if __name__ == "__main__":
    sys.exit(main())
