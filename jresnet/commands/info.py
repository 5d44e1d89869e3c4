"""``jresnet info`` prints what every bug report and measurement should state."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import jax

import jresnet
from jresnet import cache
from jresnet.commands import check_devices
from jresnet.commands.flags import Parser
from jresnet.kernels import compiler
from jresnet.version import installed


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line's options: only --help."""
    return Parser(
        prog=prog, description="Print versions, devices, the compilation cache and the active compiler options."
    )


def main(argv: Sequence[str] | None = None, prog: str = "jresnet info") -> int:
    """Prints versions, devices, the compilation cache and the active compiler options; returns the exit code."""
    parser(prog).parse_args(argv)
    print(f"versions python {platform.python_version()}, jresnet {jresnet.__version__}", end="")
    print("".join(f", {name} {found}" for name, found in installed("jax", "jaxlib", "flax", "numpy").items()))
    check_devices()
    for device in jax.devices():
        print(f"device   {device.device_kind} ({device.platform})")
    print(f"cache    {cache.keep_compiled() or 'none: compiled programs are not cached'}")
    for line in compiler.explain():
        print(line)
    return 0
