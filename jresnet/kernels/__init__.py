"""How a platform computes the layers: the one place that asks for the platform, and it asks when a program is lowered.

Every function here is one of arrays whose result and derivatives are those of a line of ``jax.lax``, to rounding. On a CPU
they are computed in another way, which XLA's compiler runs faster; every other platform gets the line itself. Eager calls,
``jit``, ``grad``, ``jvp`` of any order, ``vmap``, ``remat`` and ``jax.export`` know nothing of it. Outside this folder
nothing names a platform or a compiler.

``conv`` has the convolutions and a table of their gradients, ``dilated`` the dilated ones, ``norm`` batch normalisation,
``pool`` the max-pool and the global average, ``scheduling`` the order in which things are computed, ``compiler`` the options
that ``jax.jit`` is given.
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
