"""Computations with a special implementation for one platform, chosen when a program is lowered.

Checking ``jax.default_backend()`` at trace time would be wrong: a function may be traced on a CPU host and lowered for
a GPU (``jax.export``, ``jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))``). Instead, each computation is a JAX
primitive with one lowering rule for the CPU and one for all other platforms.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_plainly = contextvars.ContextVar("plainly", default=False)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """A context in which programs are traced without jresnet's primitives, for translators that only know JAX's."""
    before = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(before)


class Kernel:
    """A function of arrays and static keywords with one implementation for the CPU and one for other platforms.

    For arrays with explicitly sharded axes (``jax.make_mesh``'s default) or varying over a mesh (in ``jax.shard_map``), and
    within :func:`plainly`, it calls ``plain`` directly: a primitive would need special rules for these types.

    Args:
        name: name of the primitive in a jaxpr.
        plain: ``plain(*arrays, **static) -> array``, the definition in operations of ``lax``.
        on_cpu: the CPU implementation, with an additional keyword ``devices``, the number of devices of the program.
            ``None``: ``plain`` on every platform; the kernel then only serves :meth:`multilinear`.
        images: indices of the arguments whose leading axis is the batch; images are computed independently, and the
            result's leading axis is the batch, too. ``vmap`` over exactly these arguments uses a larger batch; otherwise
            it is that of ``plain``.
        resized: returns the static keywords for a batch that is larger by a factor.

    Its derivative is that of ``plain``, unless :meth:`multilinear` defines another.
    """

    def __init__(
        self,
        name: str,
        plain: Callable[..., jax.Array],
        on_cpu: Callable[..., jax.Array] | None = None,
        *,
        images: Sequence[int] = (),
        resized: Callable[[dict[str, Any], int], dict[str, Any]] = lambda static, _: static,
    ):
        self.plain, self.images, self.resized = plain, tuple(images), resized
        self.primitive = Primitive(f"jresnet_{name}")
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self.shape)
        mlir.register_lowering(self.primitive, mlir.lower_fun(plain, multiple_results=False))
        if on_cpu:
            # Not inlined, so that layers of the same shapes share one function of the program.
            mlir.register_lowering(self.primitive, partial(_lower, on_cpu), platform="cpu", inline=False)
        batching.primitive_batchers[self.primitive] = self._batch
        ad.primitive_jvps[self.primitive] = self._differentiate

    def __call__(self, *arrays: jax.Array, **static: Any) -> jax.Array:
        """Computes ``plain(*arrays, **static)`` with the platform's implementation."""
        if _plainly.get() or any(map(_has_mesh, arrays)):
            return self.plain(*arrays, **static)
        return self.primitive.bind(*arrays, **static)

    def shape(self, *avals: Any, **static: Any) -> jax.core.ShapedArray:
        """The abstract result for arguments of these shapes and dtypes."""
        found = _evaluated(self.plain, tuple((a.shape, a.dtype) for a in avals), tuple(sorted(static.items())))
        return jax.core.ShapedArray(found.shape, found.dtype)

    def _run(self, *arrays: jax.Array, **static: Any) -> jax.Array:
        with jax.disable_jit(False):  # otherwise this function would call itself
            return _jitted(self.primitive, tuple(sorted(static.items())))(*arrays)

    def _batch(self, arrays: Sequence[Any], axes: Sequence[Any], **static: Any) -> tuple[jax.Array, int]:
        mapped = [i for i, axis in enumerate(axes) if axis is not None]
        if not self.images or mapped != list(self.images):
            return jax.vmap(partial(self.plain, **static), axes)(*arrays), 0
        moved = [
            jnp.moveaxis(a, axis, 0) if i in mapped else a for i, (a, axis) in enumerate(zip(arrays, axes, strict=True))
        ]
        size = len(moved[mapped[0]])
        folded = [a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) if i in mapped else a for i, a in enumerate(moved)]
        y = self(*folded, **self.resized(static, size))
        return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0

    def _differentiate(self, primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> tuple[Any, Any]:
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        return self(*primals, **static), jax.jvp(partial(self.plain, **static), tuple(primals), tuple(tangents))[1]

    def multilinear(self, *transposes: Callable[..., jax.Array]) -> None:
        """Declares that the function is linear in each of its first arguments, and defines its transposes.

        Args:
            transposes: one for each of these arguments:
                ``(cotangent, *others, argument=its shape, **static) -> its cotangent``.
        """

        def differentiate(primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> tuple[Any, Any]:
            y = self(*primals, **static)
            parts = [
                self(*primals[:i], tangent, *primals[i + 1 :], **static)
                for i, tangent in enumerate(tangents[: len(transposes)])
                if type(tangent) is not ad.Zero
            ]
            return y, sum(parts[1:], parts[0])

        def transpose(cotangent: Any, *arguments: Any, **static: Any) -> list[Any]:
            found: list[Any] = [None] * len(arguments)
            (i,) = (i for i, a in enumerate(arguments) if ad.is_undefined_primal(a))
            if type(cotangent) is ad.Zero:
                found[i] = ad.Zero(arguments[i].aval)
            else:
                others = [a for j, a in enumerate(arguments) if j != i]
                found[i] = transposes[i](cotangent, *others, argument=tuple(arguments[i].aval.shape), **static)
            return found

        ad.primitive_jvps[self.primitive], ad.primitive_transposes[self.primitive] = differentiate, transpose


def _lower(on_cpu: Callable[..., jax.Array], ctx: Any, *values: Any, **static: Any) -> Any:
    """The lowering rule for the CPU; the context of ``jax.export`` and ``jax.jit`` contains the number of devices."""
    context = ctx.module_context.axis_context
    devices = getattr(context, "num_devices", None) or math.prod(context.mesh.shape.values())
    return mlir.lower_fun(partial(on_cpu, devices=devices), multiple_results=False)(ctx, *values, **static)


def known(*sizes: Any) -> bool:
    """Whether sizes are integers; in programs that are exported for any size they are symbolic."""
    return all(isinstance(size, int) for size in sizes)


@functools.lru_cache(1024)
def _jitted(primitive: Primitive, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    return jax.jit(partial(primitive.bind, **dict(static)))


@functools.lru_cache(4096)  # JAX calls it in every trace for each layer of a network
def _evaluated(plain: Callable, avals: tuple[Any, ...], static: tuple[tuple[str, Any], ...]) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(partial(plain, **dict(static)), *(jax.ShapeDtypeStruct(*aval) for aval in avals))


def _has_mesh(array: Any) -> bool:
    aval = jax.typeof(array)
    spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    manual = getattr(aval, "mat", aval)  # the attribute's place in jax 0.10.1
    return any(axis is not None for axis in spec) or bool(getattr(manual, "varying", getattr(manual, "vma", None)))
