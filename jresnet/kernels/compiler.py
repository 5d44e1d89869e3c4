"""The options with which XLA's CPU compiler makes the fastest programs of these networks, by jax's version.

Each row was faster than XLA's own choice in training and in inference, with AVX2 and with AVX-512
(docs/explanation/speed.md). A version
between two rows gets the older one's options, a version newer than all the newest one's. There a small computation is
compared with the default compiler's before the options are used, once a process. On the measured versions the test suite
compares whole networks instead; the check would take a twentieth of a network's first step.
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

# Which library XLA hands convolutions and matrix products to: YNN, Eigen (where YNN gets nothing), or oneDNN.
YNN = "xla_cpu_experimental_ynn_fusion_type"
ONEDNN = "xla_cpu_experimental_onednn_custom_call"
SOME_YNN: Options = {YNN: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"}
# XLA's CPU compiler drops optimization barriers and then merges what comes twice, so that it keeps what remat would compute
# again. Without this pass it keeps them. 0.10.1 drops those behind the blocks, too, and always has this; 0.12.0.1 does not.
BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}


class Row(NamedTuple):
    """Options, and the version of jax that they were measured with."""

    since: tuple[int, ...]
    options: Options


ROWS = (  # oldest first
    Row((0, 10, 1), SOME_YNN | BARRIERS),
    Row((0, 12, 0, 1), {YNN: "", ONEDNN: True}),
)


class Choice(NamedTuple):
    """Options, and why it is these."""

    options: Options
    reason: str


def compiler_options(remat: bool = False) -> Options:
    """The options with which XLA's CPU compiler makes the fastest programs of these networks, for ``jax.jit``.

    >>> import jax, jresnet
    >>> model = jresnet.fuse(jresnet.create("resnet20_cifar"))
    >>> predict = jax.jit(model, compiler_options=jresnet.compiler_options())

    (So the weights are constants of the program, which oneDNN need not pack in every call.)

    They choose among XLA's implementations of the same operations: results differ by rounding. Programs with oneDNN's, which
    are those of jax 0.12.0.1, do not outlive their process in JAX's compilation cache, which warns of each and goes on.
    ``JRESNET_COMPILER_OPTIONS=off`` switches them off, but for ``remat``'s, without which it saves nothing.

    Args:
        remat: for training a model that was created with ``remat=True``.

    Returns:
        What ``jax.jit`` takes. Nothing where JAX's default device is no CPU; those for ``remat`` alone where the CPU lacks
        AVX2 or the options failed their check. ``jresnet info`` prints what is in force, and why.

    Raises:
        InputError: for another value of ``JRESNET_COMPILER_OPTIONS`` than ``on`` and ``off``.
    """
    if jax.default_backend() != "cpu":
        _switched_on()
        return {}
    return _choice().options | (BARRIERS if remat else {})


def explain() -> list[str]:
    """The options in force and the reason, in lines for people."""
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
        return Choice({}, "XLA's own, since JRESNET_COMPILER_OPTIONS is off")
    return _chosen(jax.__version__)


@functools.lru_cache
def _chosen(version: str) -> Choice:
    if not _has_avx2():
        return Choice(
            {}, f"XLA's own, since this CPU ({platform.machine()}) has no AVX2, with which ours were measured"
        )
    number = tuple(map(int, re.findall(r"\d+", version)[:4]))
    row = max((row for row in ROWS if row.since <= number), default=None)
    if row is None:
        return Choice({}, f"XLA's own, since jax {version} is older than those that ours were measured with")
    measured = ".".join(map(str, row.since))
    if row.since == number:
        return Choice(row.options, f"those measured on jax {measured}")
    if failure := _check(row.options):
        choice = Choice({}, f"XLA's own, since with those measured on jax {measured} {failure}")
        _log.warning("jax %s: %s", version, choice.reason)
        return choice
    choice = Choice(row.options, f"those measured on jax {measured}, the nearest to {version}, after a check")
    _log.warning("jax %s: compiler options are %s", version, choice.reason)
    return choice


def _has_avx2() -> bool:
    """What Linux says of the CPU; elsewhere whether it is an x86-64."""
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text().replace("\n", " ")
    except OSError:
        return platform.machine().lower() in ("x86_64", "amd64")


def _check(options: Options) -> str | None:
    """Why the options are unfit: the layers of a small network with them are not what they are without; None if they are."""
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
    except Exception as error:  # an option that this version does not know, or a compiler that fails
        return f"a program cannot be compiled: {str(error).splitlines()[0][:200]}"
    distance = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    return None if distance < 1e-5 else f"a small network's result is off by {distance:.0e}"
