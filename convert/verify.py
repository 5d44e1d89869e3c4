"""Compare the logits of converted models with PyTorch's: ``python -m convert.verify --all``.

Logits can have any magnitude, so an absolute tolerance is not useful. jresnet's distance is compared with PyTorch's own: the
relative L2 distance of PyTorch's float32 logits to its float64 logits, which is 2e-7 to 7e-7 for torchvision's ResNets.
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

# Relative distance of float32 logits above which rounding is not the cause, for every network and image. PyTorch's own
# distance is 2e-7 to 7e-7 for all random weights; a wrong weight gives 0.1 or more. Where PyTorch's own distance is larger,
# because its logits nearly cancel, the limit is a multiple of that.
DIFFERENT, MULTIPLE = 1e-4, 10.0

# Largest ratio of jresnet's float32 distance to PyTorch's float32 distance, both from PyTorch's float64. It allows for a
# different order of summation and for the randomness of rounding errors.
ALLOWED = 3.0

# The same for the root mean square over several networks. PyTorch's float32 distances in its two memory layouts, which
# differ only in the order of summation, differ by a factor of up to 2.9 (docs/log/2026-11-parity.md).
ALLOWED_OVERALL = 2.5

TOGETHER = 100  # networks with at most this many blocks are compiled as one program

EXACT = 1e-10  # relative distance in float64: a few thousand rounding errors of 1e-16, amplified by BN's divisions


@dataclass(frozen=True)
class Check:
    """The result of a comparison, or the reason why there was none."""

    done: bool
    reason: str = ""  # why there was no comparison
    jresnet: float = float("nan")  # relative L2 distance of jresnet's float32 logits to PyTorch's float64 logits
    torch: float = float("nan")  # the same for PyTorch's float32 logits

    @property
    def label(self) -> str:
        """First word of the line that reports it."""
        return "verified" if self.done else "skipped"

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains jresnet's distance, given PyTorch's."""
        return self.jresnet <= ALLOWED * self.torch

    def as_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON, without NaN."""
        return asdict(self) if self.done else {"done": False, "reason": self.reason}

    def __str__(self) -> str:
        if not self.done:
            return f"comparison with PyTorch: {self.reason}"
        return (
            f"relative distance to PyTorch's float64 logits: {self.jresnet:.1e} "
            f"(PyTorch's float32 logits: {self.torch:.1e})"
        )


def check(model: ResNet, arch: str | None, state_dict: Mapping[str, np.ndarray], mode: str = "auto") -> Check:
    """Compares ``model`` with PyTorch's network with the same weights, on two random images.

    Args:
        model: the model, in float32.
        arch: the name of its architecture, if it has one.
        state_dict: the weights by torchvision's keys, in PyTorch's layout.
        mode: if torch or the reference network is missing, ``"auto"`` skips the comparison and ``"always"`` raises an error;
            ``"never"`` always skips it.

    Raises:
        InputError: torch or the reference network is missing and ``mode`` is ``"always"``.
        WeightsError: the logits differ by more than rounding, or are not finite although PyTorch's are.
    """
    if mode == "never":
        return Check(False, "--verify never")
    try:
        reference = torch_model(arch, model.config, state_dict)
    except LookupError as error:
        if mode == "always":
            raise InputError(f"--verify always: {error}") from error
        return Check(False, str(error))
    result = compare(model, reference)
    limit = max(DIFFERENT, MULTIPLE * result.torch)
    if not result.jresnet <= limit and math.isfinite(result.torch):  # written so that a NaN from jresnet also fails
        raise WeightsError(f"the converted {arch or 'ResNet'} is not the network PyTorch computes: {result}")
    return result


def compare(model: ResNet, reference: Any, size: int | None = None, batch: int = 2) -> Check:
    """Returns the distances of both float32 logits to the float64 logits of ``reference``, a torch module.

    ``size`` is the height and width of the random images; the default is 224, or 32 for the CIFAR stem.
    """
    images = _images(model.config, size, batch)
    exact, theirs = torch_logits(reference, images)
    return Check(True, jresnet=relative(_logits(model, images), exact), torch=relative(theirs, exact))


def _images(config: ResNetConfig, size: int | None, batch: int) -> np.ndarray:
    """Returns random images ``[batch, H, W, C]``, the same in every call."""
    size = size or (32 if config.stem == "cifar" else 224)
    draw = np.random.default_rng(0)
    return draw.standard_normal((batch, config.in_channels, size, size), np.float32).transpose(0, 2, 3, 1)


def torch_logits(reference: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a float32 torch module's logits in float64 and in float32."""
    import copy

    import torch

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        exact = copy.deepcopy(reference).double().eval()(x.double())
        return exact.numpy(), reference.eval()(x).numpy()


_forward = nnx.jit(lambda model, x: model(x))  # one function, so that modules with equal shapes are compiled once


class _Compiled(nnx.Module):
    """A block that is compiled separately."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        assert not train
        return _forward(self.block, x)


def _logits(model: ResNet, images: np.ndarray) -> np.ndarray:
    forward: Any = _forward
    if sum(model.config.depths) > TOGETHER:
        # XLA takes more than five minutes to compile 1,202 layers as one program, and seconds for the few distinct blocks.
        model, forward = nnx.clone(model), ResNet.__call__
        for i in range(len(model.config.depths)):
            name = f"layer{i + 1}"
            setattr(model, name, nnx.List([_Compiled(block) for block in getattr(model, name)]))
    with jax.default_matmul_precision("highest"):  # no TF32 on a GPU
        return np.asarray(forward(model, jax.numpy.asarray(images)))


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Returns ‖value - reference‖ / ‖reference‖ in float64; 0 if they are equal, also if both are zero."""
    reference = np.asarray(reference, np.float64)
    distance = float(np.linalg.norm(np.asarray(value, np.float64) - reference))
    norm = float(np.linalg.norm(reference))
    return distance / norm if norm else distance and math.inf


def torch_model(arch: str | None, config: ResNetConfig, state_dict: Mapping[str, np.ndarray]) -> Any:
    """Builds PyTorch's float32 network with this configuration and these weights, given by torchvision's keys.

    Raises:
        LookupError: torch or torchvision is missing.
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
    """Relative L2 distances of an architecture's logits to PyTorch's float64 logits, as root mean squares."""

    arch: str
    options: str  # that differ from the architecture's, such as "stem=cifar"
    size: int  # pixels, height and width of the images
    networks: int  # number of networks with random weights and BN statistics
    float64: float  # jresnet in float64
    float32: float  # jresnet in float32
    torch: float  # PyTorch in float32, channels-last, which is the layout of jresnet's arrays
    torch_planar: float  # PyTorch in float32 in its default layout, NCHW
    bfloat16: float  # jresnet with bfloat16 convolutions
    torch_bfloat16: float  # PyTorch under autocast

    @property
    def ratio(self) -> float:
        """jresnet's float32 distance divided by PyTorch's."""
        return self.float32 / self.torch

    def failures(self) -> list[str]:
        """Returns a line for each distance that is NaN or larger than rounding explains."""
        found = []
        if not self.ratio <= ALLOWED_OVERALL:
            found.append(
                f"{self.arch}: the float32 distance is {self.ratio:.2f} times PyTorch's, the limit is {ALLOWED_OVERALL}"
            )
        if not self.float64 <= EXACT:
            found.append(f"{self.arch}: the float64 distance is {self.float64:.1e}, the limit is {EXACT}")
        if not self.bfloat16 <= ALLOWED * self.torch_bfloat16:
            found.append(
                f"{self.arch}: the bfloat16 distance is {self.bfloat16:.1e}, PyTorch's is {self.torch_bfloat16:.1e}"
            )
        return found


# Variants of the zoo's architectures: ImageNet networks for small images, and the paper's other shortcut and stride.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("resnet18", {"stem": "cifar", "num_classes": 10}),
    ("resnet50", {"stem": "cifar", "num_classes": 10}),
    ("resnet20_cifar", {"shortcut": "projection"}),
    ("resnet18", {"stem": "cifar_pool"}),
    ("resnet50", {"stride_in": "1x1"}),
)


def survey(arch: str, networks: int = 3, size: int = 64, batch: int = 2, **chosen: Any) -> Row:
    """Compares random networks of ``arch`` with PyTorch's with the same weights; images for the CIFAR stem have 32 pixels.

    Raises:
        LookupError: torch or torchvision is missing.
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
    """Returns the row as a line of the Markdown table that starts with HEADER."""
    return (
        f"| {row.arch}{f' ({row.options})' if row.options else ''} | {row.float64:.0e} | {row.float32:.1e} "
        f"| {row.torch:.1e} | {row.ratio:.2f} | {row.torch_planar:.1e} | {row.bfloat16:.1e} | {row.torch_bfloat16:.1e} |"
    )


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Returns the argument parser."""
    parser = Parser(
        prog=prog,
        description="Compare the logits of random networks with PyTorch's for the same weights. Prints relative L2 "
        "distances to PyTorch's float64 logits, as root mean squares over several networks. The exit code is 1 if "
        f"jresnet's float32 distance is more than {ALLOWED_OVERALL} times PyTorch's in the same memory layout, or its "
        f"float64 distance is more than {EXACT}.",
        epilog="To compare your own file, use python -m convert.torch2flax ARCH --weights FILE.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every architecture, and variants of stem and shortcut")
    which.add_argument("--arch", nargs="+", choices=tuple(zoo.ZOO), metavar="ARCH", help="these architectures")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="image size for the ImageNet stem (default: 64)"
    )
    parser.add_argument("--networks", type=int, default=3, metavar="N", help="random networks per row (default: 3)")
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
        print(f"error: no network to compare with: {error}", file=sys.stderr)
        return 1
    failures = [failure for row in rows for failure in row.failures()]
    versions = _versions()
    if args.json:
        print(json.dumps({"versions": versions, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}))
    else:
        print(
            f"\n{args.networks} networks per row, 2 images each; {', '.join(f'{k} {v}' for k, v in versions.items())}"
        )
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
