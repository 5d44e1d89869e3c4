"""Convert PyTorch weights to a jresnet model: ``python -m convert.torch2flax FILE``, or ``ARCH [--weights NAME|FILE]``.

The steps: read the file and check its digest; read its arrays, without torch; infer the architecture; fill every parameter
exactly once, or report all problems in one error; compare the logits with PyTorch's, if it is installed; write the native
file atomically.
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
from jresnet.models.config import KINDS, Block, ResNetConfig, Shortcut, Stem, StrideIn
from jresnet.models.resnet import ResNet
from jresnet.pytorch import infer, statedict
from jresnet.pytorch.keymap import DIALECTS
from jresnet.weights import native, published

PROG = "python -m convert.torch2flax"

Say = Callable[[str, str], None]  # a title of up to eight letters, and the text


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
    """Returns a jresnet model with the weights of a PyTorch ``state_dict``.

    Args:
        state_dict: a dict from PyTorch's keys to numpy arrays or torch tensors of any floating-point dtype, or a checkpoint
            that contains such a dict.
        arch: the architecture that the weights must have, a name of :func:`jresnet.list_models`; ``None`` infers it.
        num_classes: number of classes. If it differs from the state_dict's, a new head is initialised.
        in_channels: number of input channels. If it differs from the state_dict's 3, the stem is adapted
            (:func:`jresnet.models.params.adapt`).
        stem: see :func:`jresnet.create`.
        shortcut: see :func:`jresnet.create`.
        stride_in: see :func:`jresnet.create`.
        output_stride: see :func:`jresnet.create`.
        dtype: see :func:`jresnet.create`.
        dialect: see :func:`jresnet.pytorch.statedict.match`, which also documents the errors.
        prefix: see :func:`jresnet.pytorch.statedict.match`.
        key: see :func:`jresnet.pytorch.statedict.match`.
        seed: seed of a new head.
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
    """Returns the argument parser."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s FILE|ARCH [OPTION ...]",
        description="Convert PyTorch weights to a native file, without torch; if torch and torchvision are installed, the "
        "logits are compared.",
        epilog=f"Architectures: {', '.join(zoo.ZOO)}.",
    )
    parser.add_argument(
        "what",
        metavar="FILE|ARCH",
        help="a file, whose architecture is detected; or the architecture that the weights must have, such as resnet50",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE|hf:REPO",
        help="weights for ARCH: published weights (IMAGENET1K_V1, IMAGENET1K_V2), a .pth, .pt, .th, .npz or .safetensors "
        "file, or hf:ORG/REPO[@REVISION], a safetensors file on the Hugging Face Hub (default: torchvision's default for "
        "ARCH, downloaded into torch's cache)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="output file (default: ARCH-NAME.safetensors)")
    place = parser.add_argument_group("location of the network in the file", "By default, all three are detected.")
    network = parser.add_argument_group("architecture")
    place.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        help="naming of the tensors in the file (default: detected)",
    )
    place.add_argument(
        "--prefix",
        help="prefix of the network's names, such as backbone (default: the prefix with the most keys of a network)",
    )
    place.add_argument(
        "--key",
        type=named,
        help="key of the dict of tensors in a checkpoint, such as state_dict_ema or model.teacher; . is the file itself "
        "(default: the key with the largest network; averaged weights are preferred)",
    )
    network.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="number of classes; a new head is initialised if the file has none or another number (default: the file's)",
    )
    network.add_argument(
        "--in-channels",
        type=int,
        metavar="N",
        help="number of input channels; a stem for 3 channels is adapted, as in timm (default: the file's)",
    )
    network.add_argument(
        "--stem",
        choices=KINDS["stem"],
        help="stem: imagenet (7x7, max-pool), imagenet_no_pool, cifar (3x3), cifar_pool (3x3, max-pool); the tensors do not "
        "show whether there is a max-pool; a file with another kernel size is an error (default: inferred)",
    )
    network.add_argument(
        "--shortcut",
        choices=KINDS["shortcut"],
        help="shortcuts that the network must have (default: inferred)",
    )
    network.add_argument(
        "--stride-in",
        choices=KINDS["stride_in"],
        help="convolution of a Bottleneck that has the stride: 3x3 (torchvision) or 1x1 (the paper, Caffe, detectron2); the "
        "tensors do not show it (default: read from the checkpoint's settings, else 3x3)",
    )
    network.add_argument(
        "--output-stride",
        type=int,
        metavar="N",
        help="image size divided by the size of the last stage's output: 8 or 16 for a network with dilated convolutions, "
        "as used for segmentation (default: read from the checkpoint's settings, else 32, no dilation)",
    )
    return with_common_options(parser)


def named(text: str) -> str:
    """Parses an argument that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return text


def with_common_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the options that both converters have."""
    parser.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare the logits with PyTorch's on random images: if torch is installed (auto), always, with an error if it "
        "is not installed (always), or never (never) (default: auto)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def check_other(output: Path, source: Path | None) -> None:
    """Raises :class:`InputError` if the output file and the input file are the same file."""
    if source and output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"--output {output} is the file to convert: choose another file")


def report(run: Callable[[argparse.Namespace, Say], dict[str, Any]], args: argparse.Namespace) -> int:
    """Calls ``run(args, say)``; prints the lines passed to ``say``, or with ``--json`` the result; returns the exit code."""

    def say(title: str, text: str) -> None:
        if not args.json:
            print(f"{title:<8} {shown(text)}", flush=True)

    try:
        found = run(args, say)
    except BrokenPipeError:  # no message: the reader has closed the pipe
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
    # Wrong values are reported before anything is downloaded.
    block: Block = "basic" if args.shortcut == "pad" else "bottleneck"
    zoo.replaced(zoo.find(arch).config if arch else ResNetConfig(block, (1, 1, 1, 1)), **chosen)
    source = sources.find(spec, arch)
    if row := source.row:
        why = "torchvision's default" if spec == "DEFAULT" else "as requested"
        say("weights", f"{row.name} ({why}): {row.top1:.3f} % top-1, {row.top5:.3f} % top-5 on ImageNet, published")
    elif source.path:
        say("weights", str(source.path))
    output = args.output or (Path(f"{arch}-{source.label}.safetensors") if arch else None)
    if output and output.suffix in TORCH_SUFFIXES:
        raise InputError(f"--output {output} has the suffix of a PyTorch file: name the native file *.safetensors")
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
        raise WeightsError(f"{found.spec} is already a native jresnet file: load it with jresnet.load")
    conversion = found.conversion
    say("found", f"{found.arch or 'an unnamed ResNet'}: {infer.describe(found.config)}")
    say("assumed", _with_options(conversion.assumed))
    for note in found.notes:
        say("note", note)
    arch = found.arch
    if output is None:
        output = Path(f"{arch or 'resnet'}-{source.label}.safetensors")
        check_other(output, source.path)
        check_output(output, args.force)
    dropped = len(conversion.counters)
    counters = (
        f"; {dropped} num_batches_tracked not used: PyTorch reads them only with momentum=None" if dropped else ""
    )
    say("mapped", f"{len(found.values)} tensors, each used once ({conversion.dialect} naming){counters}")
    config = zoo.replaced(found.config, **chosen)
    values, adapted = params.adapt(found.values, found.config, config)
    if conversion.headless:  # PyTorch's network needs a head; its values do not matter
        full = zoo.replaced(found.config, num_classes=config.num_classes or 1000)
        with_head, _ = params.adapt(found.values, found.config, full)
        conversion = dataclasses.replace(conversion, config=full, values=with_head)
    model = params.fill(conversion.config, conversion.values)
    if args.verify != "never":
        say("verify", "comparing the logits of two images with PyTorch, if it is installed (some seconds)")
    check = verify.check(model, arch, conversion.torchvision(), args.verify)
    what = arch or "network of this configuration"
    say(check.label, f"against PyTorch's {what} under these assumptions: {check}" if check.done else str(check))
    for note in adapted:
        say("adapted", note)
    if config != conversion.config:
        model = params.fill(config, values)
    provenance = dict(found.metadata)
    if config.num_classes != found.config.num_classes:  # categories and scores belong to the old head
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
    """Lists the assumptions, each with the option that changes it."""
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
    """Returns the architecture that the weights must have, if one is given, and the source of the weights."""
    if weights is not None:
        return zoo.find(what).name, weights
    if what in zoo.ZOO:
        return what, "DEFAULT"
    if os.path.exists(what) or Path(what).suffix or os.sep in what or ":" in what:
        return None, what
    try:
        return zoo.find(what).name, "DEFAULT"  # raises an error that suggests similar names
    except InputError as error:
        raise InputError(f"there is no file {what!r}: {error}") from None


if __name__ == "__main__":
    sys.exit(guarded(main, "convert"))
