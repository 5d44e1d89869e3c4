"""A computation that one platform does in another way than the others, chosen when a program is lowered.

``jax.default_backend()`` at trace time would be the wrong question: a function may be traced on a host with a CPU and be
lowered for a GPU (``jax.export``, ``jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))``). A primitive of its own has
one lowering for the CPU and one for all other platforms.
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
    """Within it a program is traced without primitives of jresnet's: for translators that know JAX's own alone."""
    before = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(before)


class Kernel:
    """A function of arrays and static keywords with one way to compute it for the CPU and one for the rest.

    Called on arrays whose axes are sharded explicitly (``jax.make_mesh``'s default) or vary over a mesh
    (``jax.shard_map``'s), it is ``plain``: a primitive would need rules of its own for those types. So it is within
    :func:`plainly`.

    Args:
        name: of the primitive, as it shows in a jaxpr.
        plain: ``plain(*arrays, **static) -> array``, what it computes, in operations of ``lax``.
        on_cpu: the same by other means, with one more keyword, ``devices``: over how many the program is shared out.
            ``None``: the same on every platform, for the sake of :meth:`multilinear`.
        images: positions of the arguments whose leading axis is the batch, each image of which is computed by itself, as
            the result's is. ``vmap`` over these alone then makes a larger batch; other ones are those of ``plain``.
        resized: the static keywords for a batch that is larger by a factor.

    Its derivative is that of ``plain``, unless :meth:`multilinear` says another.
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
            # Not inline: layers of the same shapes share a function of the program.
            mlir.register_lowering(self.primitive, partial(_lower, on_cpu), platform="cpu", inline=False)
        batching.primitive_batchers[self.primitive] = self._batch
        ad.primitive_jvps[self.primitive] = self._differentiate

    def __call__(self, *arrays: jax.Array, **static: Any) -> jax.Array:
        """``plain(*arrays, **static)``, as each platform does it."""
        if _plainly.get() or any(map(_has_mesh, arrays)):
            return self.plain(*arrays, **static)
        return self.primitive.bind(*arrays, **static)

    def shape(self, *avals: Any, **static: Any) -> jax.core.ShapedArray:
        """What comes of arguments like these."""
        found = _evaluated(self.plain, tuple((a.shape, a.dtype) for a in avals), tuple(sorted(static.items())))
        return jax.core.ShapedArray(found.shape, found.dtype)

    def _run(self, *arrays: jax.Array, **static: Any) -> jax.Array:
        with jax.disable_jit(False):  # else this function would be called by itself
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
        """Says that it is linear in its first arguments, one by one, and what it is transposed in each.

        Args:
            transposes: for these arguments: ``(cotangent, *others, argument=its shape, **static) -> its cotangent``.
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
    """Lowers for the CPU; :class:`jax.export` and ``jax.jit`` say in the context over how many devices."""
    context = ctx.module_context.axis_context
    devices = getattr(context, "num_devices", None) or math.prod(context.mesh.shape.values())
    return mlir.lower_fun(partial(on_cpu, devices=devices), multiple_results=False)(ctx, *values, **static)


def known(*sizes: Any) -> bool:
    """Whether sizes are numbers, as they are but in a program that is exported for any size."""
    return all(isinstance(size, int) for size in sizes)


@functools.lru_cache(1024)
def _jitted(primitive: Primitive, static: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    return jax.jit(partial(primitive.bind, **dict(static)))


@functools.lru_cache(4096)  # JAX asks in every trace, for each of a network's layers
def _evaluated(plain: Callable, avals: tuple[Any, ...], static: tuple[tuple[str, Any], ...]) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(partial(plain, **dict(static)), *(jax.ShapeDtypeStruct(*aval) for aval in avals))


def _has_mesh(array: Any) -> bool:
    aval = jax.typeof(array)
    spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    manual = getattr(aval, "mat", aval)  # jax 0.10.1 has it there
    return any(axis is not None for axis in spec) or bool(getattr(manual, "varying", getattr(manual, "vma", None)))
