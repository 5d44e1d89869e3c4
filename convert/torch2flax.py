"""PyTorch weights into a jresnet model: ``python -m convert.torch2flax ARCH [--weights NAME|FILE]``.

bytes, their digest checked -> arrays, without torch -> dialect -> every leaf filled exactly once, or one error that lists
all that is wrong -> logits against PyTorch, where it is installed -> native file, written atomically.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jresnet.errors import InputError, WeightsError

if TYPE_CHECKING:
    from jresnet.models.resnet import ResNet, ResNetConfig, Shortcut, Stem

Say = Callable[[str, str], None]  # a title of eight letters, and what there is to say


@dataclass(frozen=True)
class Conversion:
    """A file's network, as the file has it, and how it was read."""

    arch: str
    config: ResNetConfig  # of the file's network
    values: dict[str, np.ndarray]  # by dotted path, float32, in jresnet's layout
    dialect: str  # a name of keymap.DIALECTS
    counters: dict[str, int]  # num_batches_tracked by torchvision's key, which Flax's BatchNorm has no use for
    notes: tuple[str, ...]  # what was passed over on the way, a sentence each

    def torchvision(self) -> dict[str, np.ndarray]:
        """The tensors by torchvision's keys, in PyTorch's layout."""
        from jresnet.pytorch import keymap

        return {keymap.torch_key(path): to_torch(value) for path, value in self.values.items()}


def convert(
    state_dict: Mapping[str, Any],
    arch: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    stem: Stem | None = None,
    shortcut: Shortcut | None = None,
    dialect: str | None = None,
    dtype: Any = None,
    seed: int = 0,
) -> ResNet:
    """A jresnet model with the weights of a PyTorch ``state_dict``.

    Args:
        state_dict: PyTorch's keys to numpy arrays or torch tensors, of any floating-point dtype; wrappers' prefixes
            (``module.``, ``_orig_mod.``, ``model.``) and an enclosing ``{"state_dict": ...}`` are peeled off.
        arch: a name of :func:`jresnet.list_models`.
        num_classes: the head's. Another number than the state_dict's asks for a fresh head.
        in_channels: the stem's. Another number than the state_dict's 3 adapts it, as :func:`jresnet.weights.native.adapt` does.
        stem, shortcut, dtype: as in :func:`jresnet.create`.
        dialect: a name of :data:`jresnet.pytorch.keymap.DIALECTS`; ``None``: the one that the keys fit best.
        seed: of a fresh head.

    Raises:
        InputError: for an unknown architecture or dialect.
        WeightsError: unless every parameter and statistic is filled exactly once; one message lists all missing,
            unexpected and misshapen keys.
    """
    from jresnet.weights import native as weights

    chosen: dict[str, Any] = {
        "num_classes": num_classes, "in_channels": in_channels, "stem": stem, "shortcut": shortcut,
    }  # fmt: skip
    found = match(state_dict, arch, dialect=dialect, **chosen)
    values, _ = weights.adapt(found.values, found.config, wanted(found, chosen), seed)
    return weights.fill(wanted(found, chosen), values, dtype)


def match(
    state_dict: Any, arch: str, *, dialect: str | None = None, source: str = "the state_dict", **chosen: Any
) -> Conversion:
    """The network of ``arch`` in a ``state_dict``; arguments and errors as :func:`convert`.

    ``source`` names the weights in errors. Where the head or the stem is of another size than asked for, this is the
    state_dict's own; :func:`jresnet.weights.native.adapt` makes it the one that was asked for.
    """
    from jresnet.pytorch import keymap
    from jresnet.weights import native as weights

    tensors, notes = _peel(state_dict, source)
    dialect, config = _find_dialect(arch, tensors.keys(), dialect, chosen)
    paths = {keymap.torch_key(path, dialect): path for path in weights.shapes(config)}
    counters = {
        keymap.counter_key(path, dialect): keymap.counter_key(path) for path in paths.values() if path.endswith(".var")
    }
    config = _sized(config, {paths[key]: value for key, value in tensors.items() if key in paths}, chosen)
    shapes = {key: torch_shape(weights.shapes(config)[path]) for key, path in paths.items()}
    tensors, problems = _without_aliases(tensors, dialect, {**paths, **counters})
    kept = {key: value for key, value in tensors.items() if key not in counters}
    different = weights.differences(shapes, {key: tuple(value.shape) for key, value in kept.items()})
    problems += different
    values, counts = {}, {}
    for key, value in tensors.items():
        try:
            if key in paths:
                values[paths[key]] = to_flax(_float32(value))
            elif key in counters:
                counts[counters[key]] = _count(value)
        except TypeError as error:
            problems.append(f"{key} {error}")
    if problems:
        if different and (others := _architectures(arch, kept)):
            raise WeightsError(f"{source} holds a {' or a '.join(others)}, not a {arch}: name that architecture")
        advice = _advice(shapes, kept, paths)
        raise WeightsError(f"{source} does not hold a {arch} ({dialect} naming): {'; '.join(problems)}{advice}")
    return Conversion(arch, config, values, dialect, counts, tuple(notes))


def wanted(found: Conversion, chosen: Mapping[str, Any]) -> ResNetConfig:
    """The configuration that was asked for: the file's, with what was chosen in its place."""
    return dataclasses.replace(found.config, **{name: value for name, value in chosen.items() if value is not None})


def read(path: str | Path) -> Any:
    """What a ``.safetensors`` file or a file of ``torch.save`` holds, as numpy arrays, without torch.

    Raises:
        WeightsError: where it cannot be read, or holds anything but plain data.
    """
    if Path(path).suffix == ".safetensors":
        from jresnet.weights.native import read_safetensors

        return read_safetensors(path)[0]
    from jresnet.pytorch import torchfile

    return torchfile.read(path)


def _peel(found: Any, source: str) -> tuple[dict[str, Any], list[str]]:
    """The state_dict inside a checkpoint, without wrappers' prefixes, and what was passed over."""
    from jresnet.pytorch.keymap import CONTAINERS, IGNORED, strip_wrappers
    from jresnet.weights import native as weights

    notes = []
    for _ in range(8):  # deeper than any script nests them, and an end for one that holds itself
        inner = [name for name in CONTAINERS if isinstance(found, Mapping) and isinstance(found.get(name), Mapping)]
        if not inner:
            break
        if len(inner) > 1:
            notes.append(f"taken from {inner[0]!r}, not from {', '.join(map(repr, inner[1:]))} beside it")
        found = found[inner[0]]
    tensors = dict(found) if isinstance(found, Mapping) else {}
    odd = [
        weights.printable(str(key))
        for key, value in tensors.items()
        if not (isinstance(key, str) and hasattr(value, "shape"))
    ]
    if odd or not tensors:
        what = f"entries that are no tensors: {', '.join(odd[:5])}" if odd else f"{type(found).__name__}"
        raise WeightsError(f"{source} should hold a state_dict, names to tensors, but holds {what}")
    tensors = {key: value for key, value in tensors.items() if key not in IGNORED}
    prefix = len(strip_wrappers(tensors.keys()))
    return {key[prefix:]: value for key, value in tensors.items()}, notes


def _find_dialect(
    arch: str, keys: Collection[str], asked: str | None, chosen: Mapping[str, Any]
) -> tuple[str, ResNetConfig]:
    """The dialect in which the fewest keys are missing or unexpected, and the network's configuration in it."""
    from jresnet.pytorch import keymap
    from jresnet.weights import native as weights

    own = weights.configure(arch, **chosen)
    if asked is not None and asked not in keymap.DIALECTS:
        raise InputError(f"unknown dialect {asked!r}: there are {', '.join(keymap.DIALECTS)}")
    best: tuple[int, str, ResNetConfig] | None = None
    for name in [asked] if asked else keymap.DIALECTS:
        dialect = keymap.DIALECTS[name]
        shared = {field: value for field, value in dialect.config.items() if chosen.get(field) is None}
        config = dataclasses.replace(own, **shared)
        foreign = [field for field in shared if field not in weights.FREE and getattr(own, field) != shared[field]]
        if foreign or (config.shortcut == "pad" and config.block != "basic"):
            continue  # this dialect has no such network
        if dialect.num_classes and chosen.get("num_classes") is None:
            config = dataclasses.replace(config, num_classes=dialect.num_classes)
        expected = {keymap.torch_key(path, name) for path in weights.shapes(config)}
        found = {key for key in keys if key.rpartition(".")[2] != keymap.COUNTER}
        aliases = {keymap.alias(key, name) for key in expected}
        distance = len(expected ^ (found - aliases))
        if best is None or distance < best[0]:
            best = distance, name, config
    if best is None:
        raise InputError(f"{asked} has no {arch}: leave --dialect out, or choose another architecture")
    return best[1:]


def _sized(config: ResNetConfig, tensors: Mapping[str, Any], chosen: Mapping[str, Any]) -> ResNetConfig:
    """``config`` with the number of classes and channels of the file where others were asked for: both can be adapted."""
    head, kernel = (tuple(tensors[path].shape) if path in tensors else () for path in ("fc.kernel", "conv1.kernel"))
    if chosen.get("num_classes") is not None and len(head) == 2 and head[0] > 0:
        config = dataclasses.replace(config, num_classes=head[0])
    if chosen.get("in_channels") is not None and len(kernel) == 4 and kernel[1] == 3:
        config = dataclasses.replace(config, in_channels=kernel[1])
    return config


def _without_aliases(
    tensors: Mapping[str, Any], dialect: str, known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The tensors without second names; what is wrong where a second name's tensor is not that of the first."""
    from jresnet.pytorch import keymap

    tensors, differ = dict(tensors), []
    for key in known:
        second = keymap.alias(key, dialect)
        if second in tensors:
            twin = tensors.pop(second)
            if key in tensors and not np.array_equal(_numpy(tensors[key]), _numpy(twin), equal_nan=True):
                differ.append(f"{second} is not {key}")
    return tensors, [f"{len(differ)} different under two names: {', '.join(differ)}"] if differ else []


def _numpy(value: Any) -> np.ndarray:
    """float32 for a torch tensor, known by its method, since torch is not imported here and numpy knows no bfloat16."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _float32(value: Any) -> np.ndarray:
    dtype = getattr(value, "dtype", type(value).__name__)
    if not (str(dtype).removeprefix("torch.").startswith(("float", "bfloat"))):
        raise TypeError(f"is {dtype}, not a floating-point tensor")
    return np.ascontiguousarray(_numpy(value), dtype=np.float32)


def _count(value: Any) -> int:
    if tuple(value.shape) not in ((), (1,)) or "int" not in str(value.dtype):
        raise TypeError(f"should be one whole number, not {value.dtype} {list(value.shape)}")
    return int(value.reshape(()))


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO -> OIHW, IO -> OI."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def to_flax(value: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, OI -> IO, contiguous: safetensors scrambles arrays that are not."""
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)


def to_torch(value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, IO -> OI, contiguous: the inverse of :func:`to_flax`."""
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)


def _advice(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Any], paths: Mapping[str, str]) -> str:
    """The options that would make stem and head fit, where the file tells."""
    hints = []
    for key, path in paths.items():
        shape, want = tuple(getattr(got.get(key), "shape", ())), expected[key]
        if path == "conv1.kernel" and len(shape) == 4 and shape != want:
            if shape[2] != want[2]:
                hints.append("--stem cifar" if shape[2] == 3 else "--stem imagenet")
            if shape[1] != want[1]:
                hints.append(f"--in-channels {shape[1]}")
        if path == "fc.kernel" and len(shape) == 2 and shape[0] != want[0]:
            hints.append(f"--num-classes {shape[0]}")
    return f". It may be meant for {' '.join(hints)}" if hints else ""


def _architectures(arch: str, tensors: Mapping[str, Any]) -> list[str]:
    """The other architectures of which the file has every tensor; stem and head may be of any size."""
    from jresnet.models.zoo import ZOO
    from jresnet.pytorch import keymap
    from jresnet.weights import native as weights

    got = {k: tuple(v.shape) for k, v in tensors.items() if k.rpartition(".")[2] != keymap.COUNTER}
    size = sum(math.prod(shape) for shape in got.values())
    found = []
    for name, row in ZOO.items():
        # Building a network takes a tenth of a second and more. Second names may double the size, a large head may too.
        if name == arch or not 0.75 * row.parameters < size < 2.5 * row.parameters:
            continue
        dialect, config = _find_dialect(name, got.keys(), None, {})
        shapes = {keymap.torch_key(path, dialect): torch_shape(s) for path, s in weights.shapes(config).items()}
        aliases = {keymap.alias(key, dialect) for key in shapes}
        same = sum(got.get(key) == shape for key, shape in shapes.items())
        if shapes.keys() == got.keys() - aliases and same >= len(shapes) - 3:  # the head has two tensors, the stem one
            found.append(name)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    from jresnet.models.zoo import ZOO
    from jresnet.pytorch.keymap import DIALECTS

    parser = argparse.ArgumentParser(
        prog="python -m convert.torch2flax",
        description="Convert PyTorch weights into a native jresnet file. Needs no torch; where torch and torchvision "
        "are installed, the converted model's logits are compared with theirs.",
        epilog=f"Architectures: {', '.join(ZOO)}.",
    )
    parser.add_argument("arch", metavar="ARCH", help="architecture of the weights, for example resnet50")
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE|hf:REPO",
        help="published weights (IMAGENET1K_V1, IMAGENET1K_V2), a .pth, .pt, .th or .safetensors file, or "
        "hf:ORG/REPO[@REVISION], safetensors on the Hugging Face Hub (default: torchvision's default for ARCH, "
        "downloaded into torch's own cache)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: ARCH-NAME.safetensors)")
    parser.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        help="how the file names its tensors (default: the one that fits its keys best)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes; where the file's head has another number, a fresh head is drawn (default: the dialect's or ARCH's)",
    )
    parser.add_argument(
        "--in-channels",
        type=int,
        metavar="N",
        help="channels of the images; a file's stem for 3 is adapted, as timm does (default: ARCH's own)",
    )
    parser.add_argument(
        "--stem", choices=("imagenet", "cifar"), help="stem of the file's network (default: the dialect's or ARCH's)"
    )
    parser.add_argument(
        "--shortcut",
        choices=("pad", "projection", "projection_first", "conv"),
        help="shortcuts of the file's network (default: the dialect's or ARCH's)",
    )
    return with_common_options(parser)


def with_common_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what converting in both directions has in common."""
    parser.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare logits with PyTorch's on random images: where torch is installed (auto), or fail without "
        "it (always), or not at all (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def report(run: Callable[[argparse.Namespace, Say], dict[str, Any]], args: argparse.Namespace) -> int:
    """Calls ``run(args, say)`` and prints what it says, or with ``--json`` what it returns; returns the exit code."""

    def say(title: str, text: str) -> None:
        if not args.json:
            print(f"{title:<8} {text}", flush=True)

    try:
        found = run(args, say)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return report(_run, parser().parse_args(argv))


def _run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from convert import verify
    from jresnet import download
    from jresnet.factory import is_path
    from jresnet.weights import hub
    from jresnet.weights import native as weights
    from jresnet.weights import published as pretrained

    chosen = {name: getattr(args, name) for name in weights.FREE}
    weights.configure(args.arch, **chosen)  # an unknown architecture is told before anything is downloaded
    provenance: dict[str, str] = {}
    published = None
    if args.weights is not None and hub.is_spec(args.weights):
        published = hub.fetch(args.weights, progress=not args.json)
        hub.check(published, args.arch)
        path, name = published.path, args.weights.partition("/")[2].partition("@")[0]
        provenance |= hub.metadata(published)
        say("weights", published.spec)
    elif args.weights is not None and is_path(args.weights):
        path, name = Path(args.weights), Path(args.weights).stem
        provenance["source"] = path.name
        say("weights", str(path))
    else:
        row = pretrained.find(args.arch, args.weights)
        why = "as asked for" if args.weights else "torchvision's default"
        say("weights", f"{row.name} ({why}): {row.top1:.3f} % top-1, {row.top5:.3f} % top-5 on ImageNet, published")
        path, name = pretrained.fetch(row, progress=not args.json), row.name.lower()
        provenance |= {"source": row.url, "weights": row.name, **pretrained.metadata(row)}
        provenance["categories"] = json.dumps(pretrained.categories())
    output = args.output or Path(f"{args.arch}-{name}.safetensors")
    if output.exists() and path.exists() and output.samefile(path):
        raise InputError(f"--output {output} is the file to convert: name another one")

    state_dict = read(path)
    provenance["source_sha256"] = download.sha256_of(path)
    say("source", f"{path}, sha256 {provenance['source_sha256']}")
    if warning := pretrained.name_mismatch(path.name, provenance["source_sha256"]):
        print(f"warning: {warning}", file=sys.stderr)
    options = chosen | ({"num_classes": args.num_classes or published.num_classes} if published else {})
    found = match(state_dict, args.arch, dialect=args.dialect, source=str(path), **options)
    if published:
        hub.check(published, args.arch, found.config)
    for note in found.notes:
        say("note", note)
    dropped = len(found.counters)
    counters = f"; {dropped} num_batches_tracked kept aside: only PyTorch's momentum=None reads them" if dropped else ""
    say("mapped", f"{len(found.values)} tensors, each used once ({found.dialect} naming){counters}")
    model = weights.fill(found.config, found.values)
    check = verify.check(model, args.arch, found.torchvision(), args.verify)
    say("verified", str(check))
    values, adapted = weights.adapt(found.values, found.config, wanted(found, chosen))
    for note in adapted:
        say("adapted", note)
    if adapted:
        model = weights.fill(wanted(found, chosen), values)
    provenance = _metadata(found) | provenance
    if model.config.num_classes != found.config.num_classes:  # these are the old head's
        provenance = {name: text for name, text in provenance.items() if name not in ("categories", "scores")}
    if model.config.in_channels != found.config.in_channels:
        provenance.pop("preprocessing", None)
    weights.save(output, model, args.arch, **provenance)
    size = output.stat().st_size
    say("wrote", f"{output} ({size / 1e6:.1f} MB); load it with jresnet.create({args.arch!r}, weights={str(output)!r})")
    return {
        "arch": args.arch,
        "output": str(output),
        "bytes": size,
        "tensors": len(found.values),
        "dropped": dropped,
        "notes": list(found.notes),
        "adapted": adapted,
        **{name: text for name, text in provenance.items() if name != "categories"},
        "verify": check.as_dict(),
    }


def _metadata(found: Conversion) -> dict[str, str]:
    """What a native file keeps of a conversion: the dialect, the counters, and the dialect's preprocessing."""
    from jresnet.pytorch.keymap import DIALECTS
    from jresnet.weights.published import Preprocessing

    kept = {"dialect": found.dialect}
    if found.counters:
        counts = set(found.counters.values())
        alike = len(counts) == 1 and len(found.counters) == sum(path.endswith(".var") for path in found.values)
        kept["num_batches_tracked"] = json.dumps(counts.pop() if alike else found.counters)
    dialect = DIALECTS[found.dialect]
    if dialect.statistics and found.config.num_classes == dialect.num_classes:
        kept["preprocessing"] = Preprocessing(None, 32, *dialect.statistics).to_json()
    return kept


if __name__ == "__main__":
    sys.exit(main())
