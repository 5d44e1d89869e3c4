"""Exports a model as a program that runs without jresnet (:func:`export`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jresnet import factory, sources
from jresnet.errors import InputError
from jresnet.files import TORCH_SUFFIXES, write_atomically
from jresnet.kernels.platforms import plainly
from jresnet.models import zoo
from jresnet.models.fuse import FusedResNet, fuse
from jresnet.models.resnet import ResNet
from jresnet.version import __version__
from jresnet.weights.preprocessing import Preprocessing, normalise

FORMATS = ("jax", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 16384  # largest height or width of an image, in pixels
_FILTERS = {"bilinear": "linear", "bicubic": "cubic"}  # the filters' names in jax.image


def export(
    model: ResNet | sources.Weights,
    path: str | os.PathLike[str],
    format: str = "jax",
    *,
    image_size: int | tuple[int, int] | None = None,
    preprocess: bool = False,
    preprocessing: Preprocessing | None = None,
    categories: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    force: bool = False,
) -> dict[str, Any]:
    """Exports a model to a file: a program that contains the weights and takes any number of images of one size.

    >>> jresnet.export(jresnet.get_weights("resnet50"), "resnet50.jaxexport", preprocess=True)      # doctest: +SKIP
    >>> program = jax.export.deserialize(open("resnet50.jaxexport", "rb").read())                  # doctest: +SKIP
    >>> logits = program.call(images)                        # uint8 [N, 256, 256, 3]              # doctest: +SKIP

    The file ``PATH.json`` beside it describes inputs and outputs: shapes, dtypes, class names and the preprocessing, and
    whether the program includes the preprocessing. The program computes the model in evaluation mode, with BatchNorm folded
    into the convolutions (:func:`jresnet.fuse`).

    Args:
        model: a model, or weights of :func:`jresnet.get_weights` with their preprocessing and categories.
        path: the file to write.
        format: ``"jax"``: StableHLO for ``jax.export.deserialize``; writing and reading it needs the extra ``export``. Later
            JAX versions can read it (JAX guarantees six months). ``"onnx"``: for ONNX runtimes, written by jax2onnx (the
            extra ``onnx``).
        image_size: height and width in pixels of the images that the program takes, or one number for both. ``None``: the
            size that the preprocessing yields, else the size that the architecture was designed for.
        preprocess: if true, the program takes uint8 pixels ``[N, H, W, C]`` and applies the preprocessing; otherwise it
            takes normalised float32 images.
        preprocessing: the preprocessing of images; ``None``: the one that the weights specify.
        categories: names of the classes; ``None``: those that the weights specify.
        platforms: platforms of a program for JAX: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"tpu"``.
        force: replace existing files.

    Returns:
        The content of ``PATH.json``.

    Raises:
        InputError: a value cannot be used, the file exists, or a library is missing.
        WeightsError: the preprocessing or the categories in the weights' metadata are invalid.
    """
    if format not in FORMATS:
        raise InputError(f"`format` must be {' or '.join(map(repr, FORMATS))}, got {format!r}")
    path = Path(path)
    if path.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        raise InputError(
            f"{path} would be a program, but {path.suffix} is a suffix of weights files: name it *.jaxexport or *.onnx "
            "(jresnet export-torch writes weights for PyTorch)"
        )
    beside = path.with_name(f"{path.name}.json")
    for file in (path, beside):
        _check_free(file, force)
    # Missing libraries are reported before anything is computed.
    if format == "onnx":
        _needed("jax2onnx", "ONNX", "onnx")
    else:
        _needed("flatbuffers", "jax.export's format", "export")
    if not isinstance(model, ResNet | sources.Weights):
        raise InputError(f"`model` must be a model or weights of jresnet.get_weights, got {model!r:.80}")
    write = _to_onnx if format == "onnx" else _to_jax
    if isinstance(model, sources.Weights):
        preprocessing, categories = preprocessing or model.preprocessing, categories or model.categories
        model = factory.create(weights=model)
    if preprocessing is not None:
        preprocessing.check()
    config = model.config
    height, width = _size(image_size, model, preprocessing, preprocess)
    program = _program(model)
    if preprocess:
        if preprocessing is None:
            raise InputError(
                "the weights do not specify their preprocessing: give `preprocessing`, or leave out `preprocess`"
            )
        if len(preprocessing.mean) not in (1, config.in_channels):
            raise InputError(
                f"the preprocessing yields {len(preprocessing.mean)} channels, but the network takes {config.in_channels}"
            )
        program = _with(program, preparation(height, width, preprocessing))
    dtype = np.uint8 if preprocess else np.float32
    classes = jax.eval_shape(program, jax.ShapeDtypeStruct((1, height, width, config.in_channels), dtype)).shape[-1]
    if categories is not None and len(categories) != classes:
        raise InputError(f"there are {len(categories):,} categories for {classes:,} classes")
    shape = (height, width, config.in_channels)
    content, said = write(program, shape, dtype, platforms)
    metadata = {
        "format": format,
        "jresnet": __version__,
        "jax": jax.__version__,
        **said,
        "arch": zoo.name_of(config),
        "input": {"name": "images", "shape": ["batch", *shape], "dtype": np.dtype(dtype).name},
        "output": {"name": "logits", "shape": ["batch", classes], "dtype": "float32"},
        "categories": list(categories) if categories is not None else None,
        "preprocessing": dataclasses.asdict(preprocessing) if preprocessing else None,
        "preprocessing_inside": preprocess,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(path, content)
    write_atomically(beside, (json.dumps(metadata, indent=1) + "\n").encode())
    return metadata


def _check_free(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path.name}: there is no folder {path.parent}; create it first")
    if path.is_dir() or (os.path.lexists(path) and not path.is_file()):
        raise InputError(f"{path} is a folder, a device or a broken link: choose another place")
    if path.exists() and not force:
        raise InputError(f"{path} exists: choose another place, or replace it with `force`")


def _size(
    wanted: int | tuple[int, int] | None, model: ResNet, preprocessing: Preprocessing | None, preprocess: bool
) -> tuple[int, int]:
    if wanted is None:
        arch = zoo.name_of(model.config)
        if preprocessing:
            wanted = (preprocessing.resize if preprocess else None) or preprocessing.crop
        elif arch:
            wanted = zoo.find(arch).image_size
        else:
            raise InputError("the architecture has no name, so its image size is unknown: give `image_size`")
    found = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if len(found) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= LARGEST for n in found):
        raise InputError(f"`image_size` must be 1 to {LARGEST} pixels, or two such numbers, got {wanted!r}")
    return found


def _program(model: ResNet) -> Callable[[jax.Array], jax.Array]:
    """A function that computes the logits (or features) in evaluation mode, in float32."""
    if not isinstance(model, FusedResNet):
        with contextlib.suppress(InputError):  # a BatchNorm that cannot be folded stays as it is
            model = fuse(model)
    return lambda images: model(images, train=False).astype(jnp.float32)


def _with(program: Callable[[Any], jax.Array], prepare: Callable[[Any], Any]) -> Callable[[jax.Array], jax.Array]:
    return lambda pixels: program(prepare(pixels))


def preparation(
    height: int, width: int, how: Preprocessing
) -> Callable[[UInt8[Array, "n h w c"]], Float[Array, "n s s c2"]]:
    """A JAX function that applies a preprocessing to uint8 images of one size.

    It follows Pillow, which :meth:`PretrainedWeights.preprocess` uses: each of the two resizing passes rounds to whole grey
    levels. Pillow computes with fixed-point weights, so that results may differ by one level.
    """
    size = height, width
    if how.resize is not None:
        longer = int(how.resize * max(size) / min(size))
        size = (longer, how.resize) if width <= height else (how.resize, longer)
    rows, columns = (
        _resized_and_cut(old, new, how.crop, how.interpolation) for old, new in zip((height, width), size, strict=True)
    )

    def levels(x: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(x + 0.5), 0, 255)

    def prepare(pixels: jax.Array) -> jax.Array:
        x = pixels.astype(jnp.float32)
        # Pillow's conversion to grey: ITU-R 601-2 luma in 16-bit fixed point
        if len(how.mean) == 1 and x.shape[-1] == 3:
            x = jnp.floor((x @ jnp.array([[19595.0], [38470.0], [7471.0]])) / 65536 + 0.5)
        exact = jax.lax.Precision.HIGHEST
        x = levels(jnp.einsum("nhwc,Ww->nhWc", x, columns, precision=exact))
        x = levels(jnp.einsum("nhwc,Hh->nHwc", x, rows, precision=exact))
        return normalise(x, how.mean, how.std)

    return prepare


def _resized_and_cut(old: int, new: int, crop: int, interpolation: str) -> np.ndarray:
    """The matrix ``[crop, old]`` that resizes and centre-crops along one axis; rows outside the image are 0."""
    whole = np.eye(old, dtype=np.float32)
    if new != old:
        whole = np.asarray(jax.image.resize(whole, (new, old), _FILTERS[interpolation], antialias=True))
    lacking = max(crop - new, 0)
    whole = np.pad(whole, ((lacking // 2, (lacking + 1) // 2), (0, 0)))
    first = round((len(whole) - crop) / 2)  # halves to even, as torchvision
    return whole[first : first + crop]


def _to_jax(
    program: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: Any, platforms: Sequence[str]
) -> tuple[bytes, dict[str, Any]]:
    platforms = [platforms] if isinstance(platforms, str) else list(platforms)
    known = (*PLATFORMS, "rocm")
    if not platforms or not set(platforms) <= set(known):
        raise InputError(f"`platforms` must be some of {', '.join(known)}, got {platforms!r}")
    exported = jax.export.export(jax.jit(program), platforms=platforms)(_any_number(shape, dtype))
    said = {"platforms": platforms, "calling_convention_version": exported.calling_convention_version}
    return bytes(exported.serialize()), said


def _to_onnx(
    program: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: Any, platforms: Sequence[str]
) -> tuple[bytes, dict[str, Any]]:
    jax2onnx, images = _needed("jax2onnx", "ONNX", "onnx"), _any_number(shape, dtype)
    with plainly():
        closed = jax.make_jaxpr(program)(
            images
        )  # before jax2onnx puts functions of its own in the place of jax.numpy's
    with tempfile.TemporaryDirectory() as folder:
        file = jax2onnx.to_onnx(
            lambda images: _run(closed.jaxpr, closed.consts, images)[0], [images], input_names=["images"],
            output_names=["logits"], model_name="jresnet", return_mode="file", output_path=Path(folder) / "model.onnx",
            export_mode="web",
        )  # fmt: skip
        return Path(file).read_bytes(), {}


def _run(jaxpr: Any, constants: Sequence[Any], *arguments: Any) -> list[Any]:
    """Evaluates a jaxpr with nested functions inlined and constants folded: jax2onnx mistranslates some of them."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def value(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else known[variable]

    for equation in jaxpr.eqns:
        values = [value(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            found = _run(inner.jaxpr, inner.consts, *values)
        else:
            constant = not any(isinstance(value, jax.core.Tracer) for value in values)
            with jax.ensure_compile_time_eval() if constant else contextlib.nullcontext():
                name = "constant" if constant else equation.primitive.name
                compute = {"pad": _padded, "reduce_window_max": _pooled}.get(name, equation.primitive.bind)
                found = compute(*values, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        known |= zip(equation.outvars, found, strict=True)
    return [value(variable) for variable in jaxpr.outvars]


def _padded(x: jax.Array, value: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> jax.Array:
    """``lax.pad`` of all axes but the first. jax2onnx's own ``pad`` needs to know the batch size."""
    for axis, (before, after, inside) in enumerate(padding_config):
        assert inside == 0 <= min(before, after), padding_config
        if axis == x.ndim - 1 and before + after:  # the channels of a shortcut, padded with zeros
            size = x.shape[axis]
            x = x @ np.eye(size, before + size + after, before, x.dtype)
            continue
        # The batch size is unknown, so a constant of this shape cannot be made: a row of x is clipped to the value.
        rows = [_filled(lax.slice_in_dim(x, 0, 1, axis=axis), value)] * int(max(before, after))
        if rows:
            x = lax.concatenate([*rows[:before], x, *rows[:after]], axis)
    return x


def _filled(x: jax.Array, value: Any) -> jax.Array:
    """An array of the shape of ``x`` with ``value`` everywhere."""
    return jnp.maximum(jnp.minimum(x, value), value)


def _pooled(x: jax.Array, *, window_dimensions: Any, window_strides: Any, padding: Any, **_: Any) -> jax.Array:
    """Max-pooling of NHWC, first rows, then columns: ONNX runtimes reject jax2onnx's pooling window over all four axes."""
    for axis in (1, 2):
        order = (0, axis, 3 - axis, 3)
        x = lax.transpose(x, order)
        n, length, width, channels = x.shape
        x = lax.reduce_window(
            lax.reshape(x, (n, length, width * channels)), -np.inf, lax.max, (1, window_dimensions[axis], 1),
            (1, window_strides[axis], 1), ((0, 0), padding[axis], (0, 0)),
        )  # fmt: skip
        x = lax.transpose(lax.reshape(x, (n, x.shape[1], width, channels)), order)
    return x


def _any_number(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The abstract shape of a batch of any size of images of this shape."""
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(["batch", *map(str, shape)])), dtype)


def _needed(library: str, of: str, extra: str) -> Any:
    """Imports an optional dependency; raises InputError if it is missing."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(
            f"{of} needs the library {library}, which cannot be imported ({error}): pip install 'jresnet[{extra}]'"
        ) from error
