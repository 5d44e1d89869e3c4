"""Platform-specific implementations of the layers, chosen when a program is lowered.

Every function here equals a simple ``jax.lax`` expression in its result and derivatives, to rounding. On a CPU it is lowered
to an implementation that XLA's compiler runs faster; on other platforms to the expression itself. This is transparent to
eager calls, ``jit``, ``grad``, ``jvp`` of any order, ``vmap``, ``remat`` and ``jax.export``. Code outside this folder does
not depend on the platform or the compiler.

``conv`` contains convolutions and a table of their gradients, ``dilated`` the dilated ones, ``norm`` batch normalisation,
``pool`` max-pooling and averages, ``scheduling`` controls the order of computation, ``compiler`` chooses compiler options
for ``jax.jit``.
"""

from jresnet.kernels.conv import convolve
from jresnet.kernels.dilated import convolve_dilated
from jresnet.kernels.norm import inverse_sqrt, normalise
from jresnet.kernels.pool import (
    average_halves,
    average_pairs,
    average_same,
    blur,
    blur_dense,
    every_second,
    global_average_pool,
    max_pool,
    max_pool_dense,
)
from jresnet.kernels.scheduling import add_relu, in_pieces, relu

__all__ = [
    "add_relu",
    "average_halves",
    "average_pairs",
    "average_same",
    "blur",
    "blur_dense",
    "convolve",
    "convolve_dilated",
    "every_second",
    "global_average_pool",
    "in_pieces",
    "inverse_sqrt",
    "max_pool",
    "max_pool_dense",
    "normalise",
    "relu",
]
