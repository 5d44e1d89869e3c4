"""PyTorch weights into a jresnet model: ``python -m convert.torch2flax FILE``, or ``ARCH [--weights NAME|FILE]``.

bytes, their digest checked -> arrays, without torch -> which ResNet they are -> every leaf filled exactly once, or one
error that lists all that is wrong -> logits against PyTorch, where it is installed -> native file, written atomically.
"""

from __future__ import annotations

import sys

from jresnet.commands import greet

if __name__ == "__main__":  # before the imports below, which take seconds
    greet("convert", sys.argv[1:])

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from convert import verify
from jresnet import sources
from jresnet.commands import failed, guarded
from jresnet.commands.flags import Parser, check_output
from jresnet.errors import InputError, JresnetError, WeightsError
from jresnet.files import TORCH_SUFFIXES, sha256_of, shown
from jresnet.models import params, zoo
from jresnet.models.config import KINDS, ResNetConfig, Shortcut, Stem, StrideIn
from jresnet.models.resnet import ResNet
from jresnet.pytorch import infer, statedict
from jresnet.pytorch.keymap import DIALECTS
from jresnet.weights import native, published

PROG = "python -m convert.torch2flax"

Say = Callable[[str, str], None]  # a title of up to eight letters, and what there is to say


def convert(
    state_dict: Any,
    arch: str | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    stem: Stem | None = None,
    shortcut: Shortcut | None = None,
    stride_in: StrideIn | None = None,
    output_stride: int | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
    key: str | None = None,
    dtype: Any = None,
    seed: int = 0,
) -> ResNet:
    """A jresnet model with the weights of a PyTorch ``state_dict``.

    Args:
        state_dict: PyTorch's keys to numpy arrays or torch tensors, of any floating-point dtype, or a checkpoint with such
            a dict inside.
        arch: a name of :func:`jresnet.list_models` that it must be; ``None``: whatever ResNet it is.
        num_classes: the head's. Another number than the state_dict's asks for a fresh head.
        in_channels: the stem's. Another number than the state_dict's 3 adapts it (:func:`jresnet.models.params.adapt`).
        stem: as in :func:`jresnet.create`, like the next four.
        shortcut: likewise.
        stride_in: likewise.
        output_stride: likewise.
        dtype: likewise.
        dialect: as in :func:`jresnet.pytorch.statedict.match`, with its errors, like the next two.
        prefix: likewise.
        key: likewise.
        seed: of a fresh head.
    """
    chosen: dict[str, Any] = {
        "num_classes": num_classes, "in_channels": in_channels, "stem": stem, "shortcut": shortcut,
        "stride_in": stride_in, "output_stride": output_stride,
    }  # fmt: skip
    found = statedict.match(state_dict, arch, dialect=dialect, prefix=prefix, key=key, **chosen)
    config = zoo.replaced(found.config, **chosen)
    values, _ = params.adapt(found.values, found.config, config, nnx.Rngs(seed))
    return params.fill(config, values, dtype)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s FILE|ARCH [OPTION ...]",
        description="Convert PyTorch weights into a native jresnet file. Needs no torch; where torch and torchvision "
        "are installed, the converted model's logits are compared with theirs.",
        epilog=f"Architectures: {', '.join(zoo.ZOO)}.",
    )
    parser.add_argument(
        "what",
        metavar="FILE|ARCH",
        help="a file, which says itself which ResNet it holds; or an architecture, for example resnet50, that the weights "
        "must be",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE|hf:REPO",
        help="with ARCH: published weights (IMAGENET1K_V1, IMAGENET1K_V2), a .pth, .pt, .th, .npz or .safetensors file, or "
        "hf:ORG/REPO[@REVISION], safetensors on the Hugging Face Hub (default: torchvision's default for ARCH, "
        "downloaded into torch's own cache)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: ARCH-NAME.safetensors)")
    place = parser.add_argument_group("where the network lies in the file", "found by itself, as a rule")
    network = parser.add_argument_group("which network it is, or shall be")
    place.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        help="how the file names its tensors (default: the one that fits its keys best)",
    )
    place.add_argument(
        "--prefix",
        help="of the network's names in the file, for example backbone (default: that under which most of a network lies)",
    )
    place.add_argument(
        "--key",
        type=named,
        help="of the dict of tensors in a checkpoint, for example state_dict_ema or model.teacher (default: the one with "
        "the largest network, averaged weights first)",
    )
    network.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="classes; where the file's head has another number, or it has none, a fresh one is drawn (default: the file's)",
    )
    network.add_argument(
        "--in-channels",
        type=int,
        metavar="N",
        help="channels of the images; a file's stem for 3 is adapted, as timm does (default: the file's)",
    )
    network.add_argument(
        "--stem",
        choices=KINDS["stem"],
        help="with a max-pool or without one, which tensors do not tell: imagenet (7x7, max-pool), imagenet_no_pool, cifar "
        "(3x3), cifar_pool (3x3, max-pool); a file whose network has another kernel is refused",
    )
    network.add_argument(
        "--shortcut",
        choices=KINDS["shortcut"],
        help="refuse a file whose network has other shortcuts",
    )
    network.add_argument(
        "--stride-in",
        choices=KINDS["stride_in"],
        help="which convolution of a Bottleneck has the stride, which tensors do not tell: 3x3 (torchvision), or 1x1 (the "
        "paper, Caffe, detectron2) (default: as the checkpoint says, else 3x3)",
    )
    network.add_argument(
        "--output-stride",
        type=int,
        metavar="N",
        help="pixels of an image for one of the last stage, for a network with dilated convolutions, as of segmentation: "
        "8 or 16 (default: as the checkpoint says, else 32, no dilation)",
    )
    return with_common_options(parser)


def named(text: str) -> str:
    """An argument that names something."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return text


def with_common_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what converting in both directions has in common."""
    parser.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare logits with PyTorch's on random images: where torch is installed (auto), or fail without "
        "it (always), or not at all (default: auto)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file to write where it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def check_other(output: Path, source: Path | None) -> None:
    """Raises :class:`InputError` where the file to write is the one to convert, by whatever name."""
    if source and output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output {output} is the file to convert: name another one")


def report(run: Callable[[argparse.Namespace, Say], dict[str, Any]], args: argparse.Namespace) -> int:
    """Calls ``run(args, say)`` and prints what it says, or with ``--json`` what it returns; returns the exit code."""

    def say(title: str, text: str) -> None:
        if not args.json:
            print(f"{title:<8} {shown(text)}", flush=True)

    try:
        found = run(args, say)
    except BrokenPipeError:  # told by no one, since nobody listens
        raise
    except (JresnetError, OSError) as error:
        return failed(str(error))
    if args.json:
        print(json.dumps(found))
    return 0


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Runs the command, called ``prog``; returns its exit code."""
    return report(_run, parser(prog).parse_args(argv))


def _run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    chosen = {name: getattr(args, name) for name in zoo.FREE if hasattr(args, name)}
    arch, spec = _arch_and_spec(args.what, args.weights)
    # A wrong value is told before anything is downloaded.
    zoo.replaced(zoo.find(arch).config if arch else ResNetConfig("bottleneck", (1, 1, 1, 1)), **chosen)
    source = sources.find(spec, arch)
    if row := source.row:
        why = "torchvision's default" if spec == "DEFAULT" else "as asked for"
        say("weights", f"{row.name} ({why}): {row.top1:.3f} % top-1, {row.top5:.3f} % top-5 on ImageNet, published")
    elif source.path:
        say("weights", str(source.path))
    output = args.output or (Path(f"{arch}-{source.label}.safetensors") if arch else None)
    if output and output.suffix in TORCH_SUFFIXES:
        raise InputError(f"--output {output} has the ending of a PyTorch file: name the native file *.safetensors")
    if output:
        check_other(output, source.path)
        check_output(output, args.force)

    source = sources.fetch(source, progress=not args.json)
    if source.repository:
        say("weights", source.spec)
    if source.path and source.path.is_file():
        digest = source.sha256 or sha256_of(source.path)
        say("source", f"{source.path}, sha256 {digest}")
        if warning := published.name_mismatch(source.path.name, digest):
            print(f"warning: {warning}", file=sys.stderr)
        source = dataclasses.replace(source, sha256=digest)
    found = sources.read(source, arch, dialect=args.dialect, prefix=args.prefix, key=args.key, **chosen)
    if found.conversion is None:
        raise WeightsError(f"{found.spec} is a native jresnet file already: jresnet.load reads it")
    conversion = found.conversion
    say("found", f"{found.arch or 'a ResNet without a name'}: {infer.describe(found.config)}")
    say("assumed", _with_options(conversion.assumed))
    for note in found.notes:
        say("note", note)
    arch = found.arch
    if output is None:
        output = Path(f"{arch or 'resnet'}-{source.label}.safetensors")
        check_other(output, source.path)
        check_output(output, args.force)
    dropped = len(conversion.counters)
    counters = f"; {dropped} num_batches_tracked kept aside: only PyTorch's momentum=None reads them" if dropped else ""
    say("mapped", f"{len(found.values)} tensors, each used once ({conversion.dialect} naming){counters}")
    config = zoo.replaced(found.config, **chosen)
    values, adapted = params.adapt(found.values, found.config, config)
    if conversion.headless:  # PyTorch's network has a head: any will do
        full = zoo.replaced(found.config, num_classes=config.num_classes or 1000)
        with_head, _ = params.adapt(found.values, found.config, full)
        conversion = dataclasses.replace(conversion, config=full, values=with_head)
    model = params.fill(conversion.config, conversion.values)
    if args.verify != "never":
        say("verify", "computing two images with PyTorch too, where it is installed (some seconds)")
    check = verify.check(model, arch, conversion.torchvision(), args.verify)
    what = arch or "network of this configuration"
    say("verified", f"as PyTorch's {what}, with what is assumed: {check}" if check.done else str(check))
    for note in adapted:
        say("adapted", note)
    if config != conversion.config:
        model = params.fill(config, values)
    provenance = dict(found.metadata)
    if config.num_classes != found.config.num_classes:  # these are the old head's
        provenance = {name: text for name, text in provenance.items() if name not in ("categories", "scores")}
    if config.in_channels != found.config.in_channels:
        provenance.pop("preprocessing", None)
    native.save(output, model, **provenance)
    size = output.stat().st_size
    say("wrote", f"{output} ({size / 1e6:.1f} MB); load it with jresnet.load({str(output)!r})")
    return {
        "arch": arch,
        "config": dataclasses.asdict(config),
        "assumed": list(conversion.assumed),
        "output": str(output),
        "bytes": size,
        "tensors": len(found.values),
        "dropped": dropped,
        "notes": list(found.notes),
        "adapted": adapted,
        **{name: text for name, text in provenance.items() if name != "categories"},
        "verify": check.as_dict(),
    }


def _with_options(assumed: Sequence[str]) -> str:
    """What is assumed, each with the option that says otherwise."""
    options = {
        "stride on the 3x3": "--stride-in 1x1",
        "stride on the 1x1": "--stride-in 3x3",
        "stem at stride 1 without": "--stem cifar_pool",
        "stem at stride 1 with ": "--stem cifar",
        "no dilation": "--output-stride",
    }
    found = []
    for phrase in assumed:
        option = next((option for begin, option in options.items() if phrase.startswith(begin)), None)
        found.append(f"{phrase} (else {option})" if option else phrase)
    return ", ".join(found)


def _arch_and_spec(what: str, weights: str | None) -> tuple[str | None, str]:
    """The architecture that the weights must be, if one is named, and where they come from."""
    if weights is not None:
        return zoo.find(what).name, weights
    if what in zoo.ZOO:
        return what, "DEFAULT"
    if os.path.exists(what) or Path(what).suffix or os.sep in what or ":" in what:
        return None, what
    return zoo.find(what).name, "DEFAULT"  # which raises, and names the nearest


if __name__ == "__main__":
    sys.exit(guarded(main, "convert"))
