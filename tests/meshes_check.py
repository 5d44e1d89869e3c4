"""Run by test_devices.py with two simulated devices: one training step in every way JAX has of sharing it out."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jresnet


def main() -> dict[str, float]:
    """The relative distance of each way's gradients to those of one device."""
    whole, cut = PartitionSpec(), PartitionSpec("data")
    config = jresnet.ResNetConfig(("basic", "bottleneck"), (1, 1), (16, 32), 10)  # every kind of convolution
    graph, *state = nnx.split(jresnet.ResNet(config, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    # In float32 another order of sums may turn a ReLU whose input is near 0, and with it a gradient, by a thousandth.
    params, stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    x = jax.random.normal(jax.random.key(0), (8, 32, 32, 3), jnp.float64)

    def gradients(params: nnx.State, x: jax.Array) -> nnx.State:
        def loss(params: nnx.State) -> jax.Array:
            return jnp.square(nnx.merge(graph, params, stats, copy=True)(x, train=True)).mean()

        return jax.grad(loss)(params)

    def meaned(params: nnx.State, x: jax.Array) -> nnx.State:
        return jax.tree.map(lambda v: jax.lax.pmean(v, "data"), gradients(params, x))

    def distance(found: nnx.State, wanted: nnx.State) -> float:
        pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
        return float(
            jnp.sqrt(sum(jnp.square(a - b).sum() for a, b in pairs) / sum(jnp.square(b).sum() for _, b in pairs))
        )

    one = jax.jit(gradients)(params, x)
    # Where each device sees its own images alone, so does BatchNorm.
    halves = [jax.jit(gradients)(params, part) for part in jnp.split(x, 2)]
    each = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    found = {}
    for name, kind in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit)):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
        shared = jax.device_put(x, NamedSharding(mesh, cut))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, NamedSharding(mesh, whole))
            found[f"jit, {name} axes"] = distance(jax.device_get(jax.jit(gradients)(placed, shared)), one)
    auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    # By default JAX itself adds the gradients of what all devices share, and leaves their mean as it is.
    both = jax.tree.map(lambda a, b: a + b, *halves)
    for name, options, wanted in (("default", {}, both), ("check_vma=False", {"check_vma": False}, each)):
        function = jax.shard_map(meaned, mesh=auto, in_specs=(whole, cut), out_specs=whole, **options)
        found[f"shard_map, {name}"] = distance(jax.device_get(jax.jit(function)(params, x)), wanted)
    mapped = jax.pmap(meaned, "data", in_axes=(None, 0))(params, x.reshape(2, 4, *x.shape[1:]))
    found["pmap"] = distance(jax.tree.map(lambda v: v[0], jax.device_get(mapped)), each)
    return found


if __name__ == "__main__":
    with jax.enable_x64(True):
        print(json.dumps(main()))
