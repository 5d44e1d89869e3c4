"""Is a converted model the same function? Its logits against PyTorch's: ``python -m convert.verify --all``.

An absolute tolerance says nothing where logits may have any size. The yardstick is PyTorch itself: the relative L2
distance of its own float32 logits to its float64 ones, which is 2e-7 to 7e-7 for torchvision's ResNets.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx

from convert.installed import import_torchvision
from jresnet.commands import guarded
from jresnet.commands.flags import Parser
from jresnet.errors import InputError, WeightsError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.pytorch import statedict

PROG = "python -m convert.verify"

# A relative distance of float32 logits that no rounding explains, of any network and images: PyTorch's own is 2e-7 to 7e-7,
# whatever the draw, and a wrong weight gives a tenth and more.
DIFFERENT = 1e-4

# jresnet's float32 distance to PyTorch's float64 over PyTorch's own float32 distance: this allows for another order of
# summation and for the difference between two draws of rounding errors.
ALLOWED = 3.0

# The same over several networks, root mean square. PyTorch's own float32 distances in its two memory layouts, which differ
# in the order of summation alone, are up to 2.3 times apart (docs/log/2026-11-parity.md).
ALLOWED_OVERALL = 2.5

TOGETHER = 100  # blocks, up to which a network is compiled as one program

EXACT = 1e-10  # relative, in float64: a few thousand roundings of 1e-16, enlarged by BN's divisions


@dataclass(frozen=True)
class Check:
    """What the comparison found, or why it was left out."""

    done: bool
    reason: str = ""  # why it was left out
    jresnet: float = float("nan")  # relative L2 distance of our float32 logits to PyTorch's float64
    torch: float = float("nan")  # the same of PyTorch's float32 logits

    @property
    def is_rounding(self) -> bool:
        """Whether jresnet's distance is what rounding explains, beside PyTorch's."""
        return self.jresnet <= ALLOWED * self.torch

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without NaN."""
        return asdict(self) if self.done else {"done": False, "reason": self.reason}

    def __str__(self) -> str:
        if not self.done:
            return f"not against PyTorch: {self.reason}"
        return (
            f"relative distance of the logits to PyTorch's in float64: {self.jresnet:.1e} "
            f"(PyTorch's own in float32: {self.torch:.1e})"
        )


def check(model: ResNet, arch: str | None, state_dict: Mapping[str, np.ndarray], mode: str = "auto") -> Check:
    """Compares ``model`` with PyTorch's network of the same weights on two random images.

    Args:
        model: in float32.
        arch: the row of the zoo that it is of, if any.
        state_dict: the weights by torchvision's keys, in PyTorch's layout.
        mode: ``"auto"`` leaves the comparison out where there is nothing to compare with, ``"always"`` raises there,
            ``"never"`` leaves it out.

    Raises:
        InputError: with ``"always"``, where torch or a reference network is missing.
        WeightsError: where the logits are those of another function, or not finite where PyTorch's are.
    """
    if mode == "never":
        return Check(False, "left out, as --verify never asks")
    try:
        reference = torch_model(arch, model.config, state_dict)
    except LookupError as error:
        if mode == "always":
            raise InputError(f"--verify always, but {error}") from error
        return Check(False, f"left out, since {error}")
    result = compare(model, reference)
    if not result.jresnet <= DIFFERENT and math.isfinite(result.torch):  # NaN of jresnet's fails too
        raise WeightsError(f"the converted {arch or 'ResNet'} is not the network PyTorch computes: {result}")
    return result


def compare(model: ResNet, reference: Any, size: int | None = None, batch: int = 2) -> Check:
    """The distances of both float32 logits to those of ``reference``, a torch module, in float64.

    ``size`` is the random images' height and width, by default 224, or 32 for the CIFAR stem.
    """
    images = _images(model.config, size, batch)
    exact, theirs = torch_logits(reference, images)
    return Check(True, jresnet=relative(_logits(model, images), exact), torch=relative(theirs, exact))


def _images(config: ResNetConfig, size: int | None, batch: int) -> np.ndarray:
    """Random images ``[batch, H, W, C]``, always the same."""
    size = size or (32 if config.stem == "cifar" else 224)
    draw = np.random.default_rng(0)
    return draw.standard_normal((batch, config.in_channels, size, size), np.float32).transpose(0, 2, 3, 1)


def torch_logits(reference: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 torch module's logits in float64 and in float32."""
    import copy

    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        exact = copy.deepcopy(reference).double().eval()(x.double())
        return exact.numpy(), reference.eval()(x).numpy()


_forward = nnx.jit(lambda model, x: model(x))  # one function, so that modules of one shape are compiled once


class _Compiled(nnx.Module):
    """A block that is compiled by itself."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        assert not train
        return _forward(self.block, x)


def _logits(model: ResNet, images: np.ndarray) -> np.ndarray:
    forward: Any = _forward
    if sum(model.config.depths) > TOGETHER:
        # XLA takes more than five minutes to compile the 1,202 layers as one, and seconds for the few blocks that differ.
        model, forward = nnx.clone(model), ResNet.__call__
        for i in range(len(model.config.depths)):
            name = f"layer{i + 1}"
            setattr(model, name, nnx.List([_Compiled(block) for block in getattr(model, name)]))
    with jax.default_matmul_precision("highest"):  # no TF32 on a GPU
        return np.asarray(forward(model, jax.numpy.asarray(images)))


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value - reference‖ / ‖reference‖ in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference))


def torch_model(arch: str | None, config: ResNetConfig, state_dict: Mapping[str, np.ndarray]) -> Any:
    """PyTorch's float32 network of this configuration and these weights, by torchvision's keys.

    Raises:
        LookupError: where torch or torchvision is missing.
    """
    import_torchvision()
    import torch

    from convert import reference

    model = reference.network(arch, config)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(tensors | counters, strict=True)
    return model


@dataclass(frozen=True)
class Row:
    """How far an architecture's logits lie from PyTorch's in float64: relative L2 distances, root mean square."""

    arch: str
    options: str  # what is not the architecture's own, such as "stem=cifar"
    size: int  # pixels, height and width of the images
    networks: int  # with random weights and BN statistics
    float64: float  # jresnet's in float64
    float32: float  # jresnet's in float32
    torch: float  # PyTorch's own in float32, channels-last: the layout of jresnet's arrays
    torch_planar: float  # PyTorch's own in float32 in its default layout, NCHW
    bfloat16: float  # jresnet's with bfloat16 convolutions
    torch_bfloat16: float  # PyTorch's under autocast

    @property
    def ratio(self) -> float:
        """jresnet's float32 distance over PyTorch's own."""
        return self.float32 / self.torch

    def failures(self) -> list[str]:
        """What is further off than rounding explains; NaN is."""
        found = []
        if not self.ratio <= ALLOWED_OVERALL:
            found.append(
                f"{self.arch}: float32 is {self.ratio:.2f} times as far off as PyTorch's, over {ALLOWED_OVERALL}"
            )
        if not self.float64 <= EXACT:
            found.append(f"{self.arch}: float64 is {self.float64:.1e} off, over {EXACT}")
        if not self.bfloat16 <= ALLOWED * self.torch_bfloat16:
            found.append(f"{self.arch}: bfloat16 is {self.bfloat16:.1e} off, PyTorch's {self.torch_bfloat16:.1e}")
        return found


# What else the rows of the zoo are used as: the ImageNet types on small images, the paper's other shortcut and stride.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("resnet18", {"stem": "cifar", "num_classes": 10}),
    ("resnet50", {"stem": "cifar", "num_classes": 10}),
    ("resnet20_cifar", {"shortcut": "projection"}),
    ("resnet18", {"stem": "cifar_pool"}),
    ("resnet50", {"stride_in": "1x1"}),
)


def survey(arch: str, networks: int = 3, size: int = 64, batch: int = 2, **chosen: Any) -> Row:
    """Compares random networks of ``arch`` with PyTorch's of the same weights; 32 pixels for the CIFAR stem.

    Raises:
        LookupError: where torch or torchvision is missing.
    """
    import_torchvision()
    import torch

    from convert import reference

    config = zoo.configure(arch, **chosen)
    size = 32 if config.stem == "cifar" else size
    distances = []
    for seed in range(networks):
        torch.manual_seed(seed)
        network = reference.network(arch, config)
        reference.randomise(network)
        found = statedict.match(network.state_dict(), arch, **chosen)
        images = _images(config, size, batch)
        exact, planar = torch_logits(network, images)
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            narrow = network(x).float().numpy()
        with torch.no_grad():
            x = x.contiguous(memory_format=torch.channels_last)
            theirs = network.to(memory_format=torch.channels_last)(x).numpy()  # type: ignore[call-overload]
        del network  # one network at a time: the largest has 469 million parameters, 3.8 GB in float64
        ours = _logits(params.fill(found.config, found.values), images)
        ours_narrow = _logits(params.fill(found.config, found.values, "bfloat16"), images)
        with jax.enable_x64(True):
            double = {path: found.values.pop(path).astype(np.float64) for path in list(found.values)}
            ours_exact = _logits(params.fill(found.config, double), images.astype(np.float64))
        values = (ours_exact, ours, theirs, planar, ours_narrow, narrow)
        distances.append([relative(value, exact) for value in values])
    means = np.sqrt(np.square(distances).mean(0))
    return Row(arch, ", ".join(f"{k}={v}" for k, v in chosen.items()), size, networks, *map(float, means))


HEADER = (
    "| architecture | float64 | float32 | PyTorch's, channels-last | ratio | PyTorch's, NCHW | bfloat16 | autocast |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """The row in Markdown, below HEADER."""
    return (
        f"| {row.arch}{f' ({row.options})' if row.options else ''} | {row.float64:.0e} | {row.float32:.1e} "
        f"| {row.torch:.1e} | {row.ratio:.2f} | {row.torch_planar:.1e} | {row.bfloat16:.1e} | {row.torch_bfloat16:.1e} |"
    )


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        prog=prog,
        description="Compare the logits of random networks with PyTorch's of the same weights: relative L2 distances to "
        "PyTorch's float64, root mean square over several networks. Exit code 1 where jresnet's float32 is more than "
        f"{ALLOWED_OVERALL} times as far off as PyTorch's own in the same memory layout, or its float64 more than {EXACT}.",
        epilog="A converted file of your own is compared by python -m convert.torch2flax ARCH --weights FILE.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every architecture, and variants of stem and shortcut")
    which.add_argument("--arch", nargs="+", choices=tuple(zoo.ZOO), metavar="ARCH", help="these architectures")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="of the ImageNet stem (default: 64)")
    parser.add_argument("--networks", type=int, default=3, metavar="N", help="random networks a row (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a Markdown table")
    return parser


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Runs the command, called ``prog``; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    if not 1 <= args.networks <= 1000 or not 32 <= args.size <= 4096:
        options.error(
            f"--networks must be from 1 to 1000 and --size from 32 to 4096, got {args.networks} and {args.size}"
        )
    wanted = [*((arch, {}) for arch in zoo.ZOO), *VARIANTS] if args.all else [(arch, {}) for arch in args.arch]
    rows = []
    try:
        for arch, chosen in wanted:
            rows.append(survey(arch, args.networks, args.size, **chosen))
            if not args.json:  # a row may take minutes
                print(line(rows[-1]) if rows[1:] else f"{HEADER}\n{line(rows[-1])}", flush=True)
    except LookupError as error:
        print(f"error: there is nothing to compare with: {error}", file=sys.stderr)
        return 1
    failures = [failure for row in rows for failure in row.failures()]
    versions = _versions()
    if args.json:
        print(json.dumps({"versions": versions, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}))
    else:
        print(f"\n{args.networks} networks a row, 2 images each; {', '.join(f'{k} {v}' for k, v in versions.items())}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _versions() -> dict[str, str]:
    import torch

    device = jax.devices()[0]
    versions = {"Python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return versions | {"torch": torch.__version__, "on": f"{device.platform} ({device.device_kind})"}


if __name__ == "__main__":
    sys.exit(guarded(main, "verify"))
