"""Options of XLA's CPU compiler that make these networks fastest, by version of jax.

The options in each row were faster than XLA's defaults in training and inference, with AVX2 and AVX-512
(docs/explanation/speed.md). A version between two rows uses the options of the older row, and a version newer than all rows
those of the newest. On such versions, the result of a small computation is compared with that of the default compiler, once
per process, before the options are used. On the measured versions the test suite compares whole networks instead; the check
would take a twentieth of the time of a network's first step.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from jresnet.errors import InputError

Options = dict[str, str | bool]
_log = logging.getLogger(__name__)

# Options that choose XLA's library for convolutions and matrix products: YNN, Eigen (if YNN is off), or oneDNN.
YNN = "xla_cpu_experimental_ynn_fusion_type"
ONEDNN = "xla_cpu_experimental_onednn_custom_call"
SOME_YNN: Options = {YNN: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"}
# XLA's CPU compiler removes optimization barriers and then merges duplicate computations, which undoes remat. Disabling this
# pass keeps the barriers. jax 0.10.1 would also remove the barriers after blocks, so it is always disabled there; 0.12.0.1
# does not.
BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}


class Row(NamedTuple):
    """Options, and the version of jax with which they were measured."""

    since: tuple[int, ...]
    options: Options


ROWS = (  # oldest first
    Row((0, 10, 1), SOME_YNN | BARRIERS),
    Row((0, 12, 0, 1), {YNN: "", ONEDNN: True}),
)


class Choice(NamedTuple):
    """Options, and the reason for them."""

    options: Options
    reason: str


def compiler_options(remat: bool = False) -> Options:
    """Returns options for ``jax.jit`` with which XLA's CPU compiler makes these networks fastest.

    >>> import jax, jresnet
    >>> model = jresnet.fuse(jresnet.create("resnet20_cifar"))
    >>> predict = jax.jit(model, compiler_options=jresnet.compiler_options())

    (In this example the weights are constants of the program, so that oneDNN does not pack them in every call.)

    The options choose among XLA's implementations of the same operations, so that results differ by rounding. With jax
    0.12.0.1 programs contain oneDNN calls, which JAX's compilation cache cannot store; it warns about each and continues.
    ``JRESNET_COMPILER_OPTIONS=off`` turns them off, except the one for ``remat``, which would save nothing without it.

    Args:
        remat: whether to train a model that was created with ``remat=True``.

    Returns:
        Options for ``jax.jit``: empty if JAX's default device is not a CPU; only those for ``remat`` if the CPU lacks AVX2
        or the options failed their check. ``jresnet info`` prints the active options and the reason.

    Raises:
        InputError: ``JRESNET_COMPILER_OPTIONS`` is neither ``on`` nor ``off``.
    """
    if jax.default_backend() != "cpu":
        _switched_on()
        return {}
    return _choice().options | (BARRIERS if remat else {})


def explain() -> list[str]:
    """The lines that ``jresnet info`` prints on the active options and the reason for them."""
    if jax.default_backend() != "cpu":
        return [f"compiler none: the options are for a CPU, and JAX's default device is a {jax.default_backend()}"]
    choice = _choice()
    return [
        f"compiler {choice.reason}",
        *(
            f"  {name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in choice.options.items()
        ),
    ]


def _switched_on() -> bool:
    switch = os.environ.get("JRESNET_COMPILER_OPTIONS", "on")
    if switch not in ("on", "off"):
        raise InputError(f"JRESNET_COMPILER_OPTIONS must be on or off, got {switch!r}")
    return switch == "on"


def _choice() -> Choice:
    if not _switched_on():
        return Choice({}, "XLA's defaults, because JRESNET_COMPILER_OPTIONS is off")
    return _chosen(jax.__version__)


@functools.lru_cache
def _chosen(version: str) -> Choice:
    if not _has_avx2():
        return Choice(
            {},
            f"XLA's defaults, because this CPU ({platform.machine()}) lacks AVX2, with which jresnet's were measured",
        )
    number = tuple(map(int, re.findall(r"\d+", version)[:4]))
    row = max((row for row in ROWS if row.since <= number), default=None)
    if row is None:
        return Choice(
            {}, f"XLA's defaults, because jax {version} is older than the versions jresnet's were measured with"
        )
    measured = ".".join(map(str, row.since))
    if row.since == number:
        return Choice(row.options, f"those measured on jax {measured}")
    if failure := _check(row.options):
        choice = Choice({}, f"XLA's defaults, because with those measured on jax {measured} {failure}")
        _log.warning("jax %s: %s", version, choice.reason)
        return choice
    choice = Choice(row.options, f"those measured on jax {measured}, the nearest to {version}, after a check")
    _log.warning("jax %s: compiler options are %s", version, choice.reason)
    return choice


def _has_avx2() -> bool:
    """Whether the CPU has AVX2, according to Linux; on other systems, whether it is an x86-64."""
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text().replace("\n", " ")
    except OSError:
        return platform.machine().lower() in ("x86_64", "amd64")


def _check(options: Options) -> str | None:
    """Compares a small network with and without the options; returns the problem, or None if the results agree."""
    draw = np.random.default_rng(0)
    x, kernel, head = (draw.standard_normal(s, np.float32) for s in ((2, 8, 8, 16), (3, 3, 16, 16), (16, 10)))

    def network(x: jax.Array, kernel: jax.Array, head: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.relu(y - y.mean((0, 1, 2))) + x
        return y.sum(1).sum(1) @ head

    try:
        ours, plain = (
            np.asarray(jax.jit(network, compiler_options=chosen)(x, kernel, head)) for chosen in (options, None)
        )
    except Exception as error:  # an option that this version does not know, or a failure of the compiler
        return f"a program cannot be compiled: {str(error).splitlines()[0][:200]}"
    distance = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    return None if distance < 1e-5 else f"a small network's result is off by {distance:.0e}"
