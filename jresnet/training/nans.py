"""Finds where NaN or infinity first occurs in a training step, for a run's option ``debug_nans``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jresnet.models.resnet import ResNet

LINES = 10  # after one bad update every parameter is NaN, so that the first lines suffice


def find_non_finite(model: ResNet, images: Float[Array, "n h w c"], targets: Float[Array, "n classes"]) -> list[str]:
    """Finds the first place with NaN or infinity in a training step.

    Values are checked in the order of the computation: images and targets; parameters; the output of each layer and block;
    the mean cross-entropy; the updated running statistics; then, from the loss backwards, the gradients computed by each
    layer. The optimizer's update is not included. The step is compiled as in training, since XLA rounds differently when it
    fuses; compilation takes about twice as long.

    Args:
        model: the model, which is not changed, including its running statistics.
        images: normalised images, as for training.
        targets: probability of each class; 0 and 1 for plain labels.

    Returns:
        Lines such as ``"layer3.1.bn2: 12 of 8,192 values infinite; largest magnitudes: input 3.1e38, bias 0, scale 1
        (bfloat16 ends at 3.4e38)"``; empty if everything is finite. Consequences of an earlier finding are left out.
        Running statistics that were non-finite before the step do not affect it: they are listed, and the search continues.

    Raises:
        ValueError, TypeError: the model does not accept the images.
    """
    images, targets = jnp.asarray(images), jnp.asarray(targets)
    given = {"images": _measure(images), "targets": _measure(targets)}
    if lines := _lines(given, given, ""):
        return lines
    step = _run(model, images, targets)
    if lines := _lines(step.before, (name for name in step.before if name in step.gradients), " before the step"):
        return lines
    lines = _lines(step.before, (name for name in step.before if name in step.after), " before the step")
    return lines + (_forward(step) or _updates(step) + _backward(step))


@partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["size", "dtype"])
@dataclass(frozen=True)
class Values:
    """Statistics of an array."""

    # numbers of NaNs and infinities, largest finite magnitude; floats, because they are computed as a gradient (_probe)
    numbers: Float[Array, " 3"]
    size: int
    dtype: Any

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        return not self.numbers[:2].any()

    def __str__(self) -> str:
        nans, infinities = (int(n) for n in self.numbers[:2])
        if nans and infinities:
            return f"{nans:,} NaN and {infinities:,} infinite of {self.size:,} values"
        return f"{nans or infinities:,} of {self.size:,} values {'NaN' if nans else 'infinite'}"


@jax.jit
def _measure(x: jax.Array) -> Values:
    x = jax.lax.stop_gradient(x)
    numbers = jnp.isnan(x).sum(), jnp.isinf(x).sum(), jnp.abs(jnp.where(jnp.isfinite(x), x, 0)).max()
    return Values(jnp.stack([jnp.asarray(n, float) for n in numbers]), x.size, x.dtype)


@jax.custom_vjp
def _probe(x: jax.Array, probe: Float[Array, " 3"]) -> jax.Array:
    """Returns ``x``. The gradient of ``probe`` is defined as the statistics of ``x``'s gradient, which is not stored."""
    return x


_probe.defvjp(lambda x, probe: (x, None), lambda _, dy: (dy, _measure(dy).numbers))


class _Watched(nnx.Module):
    """A layer or block whose input and output pass through ``watch``, like PyTorch's forward hooks."""

    def __init__(self, layer: Callable[..., jax.Array], name: str, watch: Callable[[str, jax.Array], jax.Array]):
        self.layer, self.name, self.watch = layer, name, watch

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        x = self.watch(f"input of {self.name}", x)
        return self.watch(self.name, self.layer(x, *args, **kwargs))


def _name(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _layers(model: ResNet) -> dict[tuple[Any, ...], Any]:
    """All layers and blocks by path."""
    return {path: module for path, module in nnx.iter_modules(model) if path and callable(module)}


def _watch_layers(model: ResNet, watch: Callable[[str, jax.Array], jax.Array]) -> None:
    modules = dict(nnx.iter_modules(model))
    for path, layer in _layers(model).items():
        parent, watched = modules[path[:-1]], _Watched(layer, _name(path), watch)
        if isinstance(parent, nnx.List):
            parent[path[-1]] = watched
        else:
            setattr(parent, path[-1], watched)


@dataclass(frozen=True)
class _Step:
    """Statistics of all arrays of a training step. A place is the output of a layer, ``layer1.0.conv1``, or its input."""

    order: list[str]  # places in the order of the forward pass
    before: dict[str, Values]  # parameters and running statistics, in the same order
    outputs: dict[str, Values]  # by place
    after: dict[str, Values]  # updated running statistics
    gradients: dict[str, Values]  # by place, and by parameter


def _run(model: ResNet, images: jax.Array, targets: jax.Array) -> _Step:
    graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    probes = {place: jnp.zeros(3) for path in _layers(model) for place in (f"input of {_name(path)}", _name(path))}
    order: list[str] = []  # recorded here, because jax sorts the keys of returned dicts

    def loss_of(params: nnx.State, probes: dict[str, jax.Array], batch_stats: nnx.State, images, targets):
        copy = nnx.merge(graph, params, batch_stats, copy=True)
        copy.remat = False  # values cannot leave a rematerialised block
        running = {_name(path): leaf for path, leaf in nnx.iter_graph(copy) if isinstance(leaf, nnx.BatchStat)}
        outputs = {}

        def watch(place: str, x: jax.Array) -> jax.Array:
            order.append(place)
            outputs[place] = _measure(x)
            return _probe(x, probes[place])

        _watch_layers(copy, watch)
        loss = optax.softmax_cross_entropy(copy(images, train=True), targets).mean()
        outputs["loss"] = _measure(loss)
        return loss, (outputs, {name: _measure(leaf[...]) for name, leaf in running.items()})

    def measured(state: nnx.State) -> dict[str, Values]:
        return {_name(path): _measure(leaf[...]) for path, leaf in nnx.to_flat_state(state)}

    @jax.jit
    def run(params: nnx.State, *rest):
        (of_params, of_places), (outputs, after) = jax.grad(loss_of, (0, 1), has_aux=True)(params, probes, *rest)
        return measured(params) | measured(rest[0]), outputs, after, measured(of_params), of_places

    before, outputs, after, of_params, of_places = jax.device_get(run(params, batch_stats, images, targets))
    gradients = of_params | {p: dataclasses.replace(outputs[p], numbers=numbers) for p, numbers in of_places.items()}
    before = {name: before[name] for name in sorted(before, key=lambda name: order.index(name.rpartition(".")[0]))}
    return _Step([*order, "loss"], before, outputs, after, gradients)


def _forward(step: _Step) -> list[str]:
    """The first place whose value is non-finite."""
    for i, place in enumerate(step.order):
        if step.outputs[place].finite:
            continue
        if f"input of {place}" in step.order:  # the output of a layer or block
            inside = step.order[step.order.index(f"input of {place}") : i]
            sources = {p.removeprefix(f"{place}."): step.outputs[p] for p in inside if not p.startswith("input of ")}
            sources = {"input": step.outputs[inside[0]]} | sources | _parameters(step, place)
        else:  # a value between two layers, or after the last
            sources = {step.order[i - 1]: step.outputs[step.order[i - 1]]}
        return [_line(place, step.outputs[place], sources)]
    return []


def _updates(step: _Step) -> list[str]:
    """Running statistics that became non-finite in the step."""
    return [
        _line(f"{name} after the step", values, {"input": step.outputs[f"input of {name.rpartition('.')[0]}"]})
        for name, values in step.after.items()
        if not values.finite and step.before[name].finite
    ]


def _backward(step: _Step) -> list[str]:
    """The non-finite gradients at the place closest to the loss that has any."""
    for place in reversed(step.order[:-1]):
        layer = place.removeprefix("input of ")
        found = {"output": step.gradients[place]}
        sources = {}
        if place != layer:
            found = _parameters(step, layer, step.gradients)
            if place != step.order[0]:  # the images' gradient is not computed in training
                found = {"input": step.gradients[place]} | found
            # a block's input gradient sums these
            inside = [p for p in step.order if p.startswith(f"input of {layer}.")]
            sources = {f"gradient of {p.removeprefix(f'input of {layer}.')}'s input": step.gradients[p] for p in inside}
            sources = {"gradient of its output": step.gradients[layer], "input": step.outputs[place]} | sources
            sources |= _parameters(step, layer)
        if bad := [name for name, values in found.items() if not values.finite]:
            return [_line(f"{layer}, gradient of its {name}", found[name], sources) for name in bad]
    return []


def _parameters(step: _Step, layer: str, values: dict[str, Values] | None = None) -> dict[str, Values]:
    """Statistics of a layer's own parameters by name, such as ``kernel``; taken from ``values`` if given."""
    names = [name for name in step.before if name in step.gradients and name.rpartition(".")[0] == layer]
    return {name.rpartition(".")[2]: (values or step.before)[name] for name in names}


def _lines(values: dict[str, Values], names: Iterable[str], when: str) -> list[str]:
    bad = [f"{name}{when}: {values[name]}" for name in names if not values[name].finite]
    return bad[:LINES] + ([f"and {len(bad) - LINES} more"] if len(bad) > LINES else [])


def _line(what: str, values: Values, sources: dict[str, Values]) -> str:
    reached = ", ".join(f"{name} {_short(source.numbers[2])}" for name, source in sources.items())
    end = f"{values.dtype} ends at {_short(jnp.finfo(values.dtype).max)}"
    return f"{what}: {values}" + (f"; largest magnitudes: {reached} ({end})" if sources else "")


def _short(number: Any) -> str:
    """Formats a number briefly: 3.4028235e+38 as ``3.4e38``."""
    return f"{float(number):.2g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
