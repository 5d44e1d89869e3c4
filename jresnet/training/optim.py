"""Optimizers and learning-rate schedules with PyTorch's arithmetic, in optax; parts of a network that learn apart.

Parts are named as in :mod:`jresnet.models.paths`: ``"head"``, ``"backbone"``, ``"layer1"``, ``"layer*.bn*"``. Where several
names mean a parameter, the last one counts.

>>> import jresnet, optax
>>> from flax import nnx
>>> model = jresnet.create("resnet20_cifar", num_classes=5)
>>> tx = jresnet.optim.optimizer("sgd", 0.01, weight_decay={"*": 1e-4, "head": 0.0}, rates={"head": 10.0}, frozen=("stem",))
>>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
>>> labels = jresnet.optim.labels({"fast": "head"})
>>> other = optax.multi_transform({"fast": optax.adam(1e-3), "rest": optax.sgd(1e-2)}, labels)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jresnet.errors import InputError
from jresnet.models import paths
from jresnet.models.resnet import ResNet
from jresnet.training.recipes import OPTIMIZERS, SCHEDULES

LAST_STEP = 2**31 - 1  # steps are counted in int32

Names = str | Sequence[str]  # of parts of a network


def step_decay(lr: float, milestones: Sequence[float], gamma: float, steps_per_epoch: int) -> optax.Schedule:
    """``lr`` times ``gamma`` for each milestone that has passed.

    Args:
        lr: the first learning rate.
        milestones: epochs, fractions of one allowed; the step that begins at a milestone has the lower rate.
        gamma: factor at each milestone.
        steps_per_epoch: steps.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        InputError: for a number out of range.
    """
    _in_range(lr=lr, gamma=gamma, steps_per_epoch=steps_per_epoch, milestone=min(milestones, default=0))
    if not steps_per_epoch:
        raise InputError("steps_per_epoch must be at least 1, got 0")
    scales: dict[int, float] = {}
    for milestone in milestones:  # two milestones may fall on one step
        step = min(round(milestone * steps_per_epoch), LAST_STEP)
        scales[step] = scales.get(step, 1.0) * gamma
    return optax.piecewise_constant_schedule(lr, scales)


def schedule(
    kind: str,
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    *,
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> optax.Schedule:
    """A function from the step, counted from 0, to the learning rate.

    With W steps of warm-up in a run of T, the first W rates are lr/W, 2 lr/W, ..., lr. Then:

    * ``"step"``: :func:`step_decay`, as ``torch.optim.lr_scheduler.MultiStepLR``; no milestone within the warm-up.
    * ``"cosine"``: lr (1 + cos(pi t / (T - W))) / 2 with t = 0 at the end of the warm-up, as ``CosineAnnealingLR`` to 0
      (arXiv:1608.03983).
    * ``"onecycle"``: lr (1 - t / (T - W)): with the warm-up a triangle (arXiv:1708.07120 without its momentum cycle).

    Raises:
        InputError: for another kind, or a number out of range.
    """
    if kind not in SCHEDULES:
        raise InputError(f"the schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    _in_range(lr=lr, epochs=epochs, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs)
    warmup = round(warmup_epochs * steps_per_epoch)
    rest = max(epochs * steps_per_epoch - warmup, 1)
    after = {
        "step": lambda: step_decay(lr, [m - warmup / steps_per_epoch for m in milestones], gamma, steps_per_epoch),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "onecycle": lambda: optax.linear_schedule(lr, 0.0, rest),
    }[kind]()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(lr / warmup, lr, warmup - 1) if warmup > 1 else optax.constant_schedule(lr)
    return optax.join_schedules([rise, after], [warmup])


def optimizer(
    kind: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | Mapping[str, float] = 0.0,
    decoupled_decay: bool = False,
    decay_norms: bool = True,
    clip_norm: float = 0.0,
    rates: Mapping[str, float] | None = None,
    frozen: Names = (),
) -> optax.GradientTransformation:
    """``torch.optim.SGD``, ``torch.optim.AdamW`` or timm's ``Lamb``, as a chain whose order tells where the decay acts.

    Args:
        kind: ``"sgd"`` (g += weight_decay * p; buf = momentum * buf + g; p -= lr * buf, or lr * (g + momentum * buf)
            with ``nesterov``), ``"adamw"`` with ``momentum`` as b1, b2 = 0.999, eps = 1e-8, or ``"lamb"``
            (arXiv:1904.00962) with ``momentum`` as b1, b2 = 0.999, eps = 1e-6: Adam's step and the decay, times each
            array's norm by that of its step; what does not decay takes Adam's step, as in timm.
        learning_rate: a number or a :func:`schedule`.
        momentum: 0 to below 1.
        nesterov: Nesterov's momentum, in AdamW too.
        weight_decay: times the learning rate: the share of each parameter that a step takes away. A mapping has one for
            each part by its name, and 0 for what it does not name.
        decoupled_decay: SGD's decay also after the momentum, p -= lr * weight_decay * p. Decay inside the momentum acts
            1 / (1 - momentum) times as strongly.
        decay_norms: whether parameters of one dimension (BN's scale and bias, fc's bias) decay too.
        clip_norm: gradients are scaled down to this length, over all parameters together, before all else, as
            ``torch.nn.utils.clip_grad_norm_``; 0: never. Frozen ones do not count.
        rates: factors of the learning rate by names of parts, as ``lr`` of PyTorch's parameter groups; 1 for what is not
            named. :func:`layer_rates` makes such a mapping.
        frozen: names of parts that stay bit by bit as they are, as with ``requires_grad_(False)``; they have no state.

    Raises:
        InputError: for another kind, or a number out of range; in ``init``, for a name of no part.
    """
    if kind not in OPTIMIZERS:
        raise InputError(f"the optimizer must be {' or '.join(OPTIMIZERS)}, got {kind!r}: optax has others")
    _in_range(clip_norm=clip_norm)
    _in_range(1.0, momentum=momentum)
    if not callable(learning_rate):
        _in_range(learning_rate=learning_rate)
    if kind == "lamb" and isinstance(weight_decay, Mapping):
        raise InputError("weight_decay by parts is for sgd and adamw; lamb takes one number")
    if not isinstance(weight_decay, Mapping):
        _in_range(weight_decay=weight_decay)
    if isinstance(weight_decay, Mapping):
        decay = _decay_parts(weight_decay)
        decay = decay if decay_norms else optax.masked(decay, _kernels)
    else:
        decay = optax.add_decayed_weights(weight_decay, None if decay_norms else _kernels)
    if kind == "adamw":
        links = [optax.scale_by_adam(b1=momentum, nesterov=nesterov), decay]
    elif kind == "lamb":
        trust = optax.scale_by_trust_ratio() if weight_decay else optax.identity()
        adam = optax.scale_by_adam(b1=momentum, eps=1e-6, nesterov=nesterov)
        links = [adam, decay, trust if decay_norms else optax.masked(trust, _kernels)]
    else:
        trace = optax.trace(momentum, nesterov)
        links = [trace, decay] if decoupled_decay else [decay, trace]
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    after = [scale_rates(rates)] if rates else []
    chain = optax.chain(*clip, *links, optax.scale_by_learning_rate(learning_rate), *after)
    return freeze(chain, *_listed(frozen)) if frozen else chain


def _kernels(params: Any) -> Any:
    """Which parameters are kernels."""
    return jax.tree.map(lambda value: value.ndim > 1, params)


def labels(groups: Mapping[str, Names], rest: str = "rest") -> Callable[[Any], Any]:
    """Parts of a network by label, for ``optax.multi_transform``.

    Args:
        groups: label to a name or names of parts.
        rest: the label of what no name means.

    Returns:
        A function from parameters, a ``flax.nnx.State`` or any tree of the same paths, to a tree of labels.

    Raises:
        InputError: in that function, for a name of no part; the message suggests the nearest.
    """
    named = [(name, label) for label, names in groups.items() for name in _listed(names)]
    return lambda params: _assigned(named, rest, params)


def mask(*names: str) -> Callable[[Any], Any]:
    """Whether a parameter is of one of the parts, for ``optax.masked`` and ``optax.add_decayed_weights``.

    Returns:
        A function from parameters to a tree of booleans; errors as :func:`labels`.
    """
    return lambda params: _assigned([(name, True) for name in names], False, params)


def freeze(optimizer: optax.GradientTransformation, *names: str) -> optax.GradientTransformation:
    """``optimizer`` for all but the parts named, which stay bit by bit as they are, whatever their gradients are.

    BatchNorm's running statistics are no parameters: ``model.freeze_statistics()`` holds those.
    """
    return optax.multi_transform(
        {"frozen": optax.stateless(_nothing), "trained": optimizer}, labels({"frozen": names}, rest="trained")
    )


def scale_rates(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """The updates times a factor by part, 1 for what is not named: behind an optimizer, factors of its learning rate.

    Raises:
        InputError: for a factor below 0; in ``init`` and ``update``, for a name of no part.
    """
    _check("rates", factors)

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, factor: u * factor, updates, _assigned(list(factors.items()), 1.0, updates))

    return _checked_early(factors, scale)


def layer_rates(model: ResNet, decay: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate: 1 for the head, ``decay`` for the last stage, its square for the one before.

    As in Howard & Ruder 2018 (arXiv:1801.06146, section 3.2) and BEiT's fine-tuning, by stage instead of by layer.

    Returns:
        Factors by name from the stem to the head, for ``optimizer(..., rates=...)``.

    Raises:
        InputError: ``decay`` is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay must be above 0 and at most 1, got {decay!r}")
    parts = ["stem", *(f"layer{i + 1}" for i in range(len(model.config.depths)))]
    factors = {part: decay ** (len(parts) - number) for number, part in enumerate(parts)}
    return factors if model.fc is None else factors | {"head": 1.0}


def _decay_parts(decays: Mapping[str, float]) -> optax.GradientTransformation:
    """``optax.add_decayed_weights`` with a weight decay by part."""
    _check("weight_decay", decays)

    def add(updates: Any, params: Any) -> Any:
        found = _assigned(list(decays.items()), 0.0, updates)
        return jax.tree.map(lambda u, decay, p: u + decay * p if decay else u, updates, found, params)

    return _checked_early(decays, add)


def _checked_early(names: Mapping[str, float], update: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    """A transformation without state, whose names are looked up in ``init`` as well: there an error is an early one."""
    stateless = optax.stateless(update)

    def init(params: Any) -> Any:
        _assigned(list(names.items()), None, params)
        return stateless.init(params)

    return optax.GradientTransformation(init, stateless.update)


def _in_range(below: float = math.inf, **numbers: Any) -> None:
    """Raises InputError for a number of Python's that is below 0, not finite, or not ``below``; arrays may be traced."""
    for name, number in numbers.items():
        if isinstance(number, int | float) and not 0 <= number < below:
            most = "" if below == math.inf else f" and below {below:g}"
            raise InputError(f"{name} must be a number of at least 0{most}, got {number!r}")


def _check(what: str, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise InputError(f"{what} must be numbers of at least 0, got {number!r} for {name!r}")


def _nothing(updates: Any, _: Any) -> Any:
    """Zeros below 0: a parameter of -0.0 plus 0.0 would be 0.0."""
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)


def _listed(names: Names) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _assigned(named: Sequence[tuple[str, Any]], rest: Any, params: Any) -> Any:
    """A tree like ``params`` with the value that belongs to each parameter's name; what is masked stays so."""
    leaves, tree = jax.tree.flatten_with_path(params, is_leaf=_is_masked)
    dotted = [_dotted(path) for path, _ in leaves]
    values = dict.fromkeys(dotted, rest)
    for name, value in named:
        values |= dict.fromkeys(paths.select(name, values), value)
    return jax.tree.unflatten(
        tree, [leaf if _is_masked(leaf) else values[path] for path, (_, leaf) in zip(dotted, leaves, strict=True)]
    )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _dotted(path: tuple[Any, ...]) -> str:
    """JAX's path of a leaf as ``layer1.0.conv1.kernel``; the last step into a ``flax.nnx.Variable`` is none."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")
