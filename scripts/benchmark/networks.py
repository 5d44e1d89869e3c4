"""Functions on networks that the benchmark and the tests share: counting operations, random BatchNorm statistics."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jresnet.models.resnet import ResNet, ResNetConfig


def macs(config: ResNetConfig, size: int) -> int:
    """Multiply-accumulates of the convolutions and the head for an image of ``size`` pixels, counted from the shapes."""
    graph, state = nnx.split(ResNet(config, rngs=None))

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            shapes = [variable.aval.shape for variable in equation.invars]
            if equation.primitive.name == "jresnet_convolution":  # HWIO; I is the input channels per group
                total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1][:3])
            elif equation.primitive.name == "dot_general":
                total += math.prod(shapes[0]) * shapes[1][-1]
            total += sum(count(inner.jaxpr) for inner in equation.params.values() if hasattr(inner, "jaxpr"))
        return total

    image = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    return count(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, image).jaxpr)


def randomise(model: ResNet, seed: int = 0) -> None:
    """Draws random BatchNorm parameters and statistics, and random biases. Default values would hide swapped arrays."""
    draw = np.random.default_rng(seed)
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] != "kernel":
            low, high = (0.5, 1.5) if path[-1] in ("scale", "var") else (-0.3, 0.3)
            leaf[...] = jnp.asarray(draw.uniform(low, high, leaf.shape), jnp.float32)
    nnx.update(model, state)
