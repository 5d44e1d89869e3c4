"""Optimizers and learning-rate schedules with PyTorch's arithmetic, in optax, with settings for parts of a network.

Parts are named as in :mod:`jresnet.models.paths`: ``"head"``, ``"backbone"``, ``"layer1"``, ``"layer*.bn*"``. If several
names match a parameter, the last one applies.

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

Names = str | Sequence[str]  # names of parts of a network


def step_decay(lr: float, milestones: Sequence[float], gamma: float, steps_per_epoch: int) -> optax.Schedule:
    """Schedule that multiplies the learning rate by ``gamma`` at each milestone.

    Args:
        lr: initial learning rate.
        milestones: epochs, which may be fractional; the step that begins at a milestone has the new rate.
        gamma: factor at each milestone.
        steps_per_epoch: number of steps per epoch.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        InputError: a number is out of range.
    """
    _in_range(lr=lr, gamma=gamma, steps_per_epoch=steps_per_epoch, milestone=min(milestones, default=0))
    if not steps_per_epoch:
        raise InputError("steps_per_epoch must be at least 1, got 0")
    scales: dict[int, float] = {}
    for milestone in milestones:  # two milestones may be at the same step
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
    """Builds a learning-rate schedule with optional linear warm-up.

    With W warm-up steps in a run of T steps, the first W rates are lr/W, 2 lr/W, ..., lr. After that:

    * ``"step"``: :func:`step_decay`, as ``torch.optim.lr_scheduler.MultiStepLR``; no milestone within the warm-up.
    * ``"cosine"``: lr (1 + cos(pi t / (T - W))) / 2 with t = 0 at the end of the warm-up, as ``CosineAnnealingLR`` to 0
      (arXiv:1608.03983).
    * ``"onecycle"``: lr (1 - t / (T - W)), a triangle together with the warm-up (arXiv:1708.07120, without its momentum
      cycle).

    Args:
        kind: ``"step"``, ``"cosine"`` or ``"onecycle"``.
        lr: peak learning rate.
        epochs: length of the run in epochs.
        steps_per_epoch: number of steps per epoch.
        warmup_epochs: length of the warm-up in epochs, which may be fractional.
        milestones, gamma: as in :func:`step_decay`, for ``"step"``.

    Returns:
        A function from the step, counted from 0, to the learning rate.

    Raises:
        InputError: unknown kind, or a number is out of range.
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
    """Builds an optimizer with the arithmetic of ``torch.optim.SGD``, ``torch.optim.AdamW`` or timm's ``Lamb``.

    Args:
        kind: one of

            * ``"sgd"``: g += weight_decay * p; buf = momentum * buf + g; p -= lr * buf, or with ``nesterov``
              p -= lr * (g + momentum * buf);
            * ``"adamw"``: b1 = ``momentum``, b2 = 0.999, eps = 1e-8;
            * ``"lamb"`` (arXiv:1904.00962): b1 = ``momentum``, b2 = 0.999, eps = 1e-6. The sum of Adam's update and the
              weight decay is scaled by the ratio of the parameter's norm to that sum's norm; parameters without weight
              decay take Adam's update, as in timm.
        learning_rate: a number or a :func:`schedule`.
        momentum: at least 0 and below 1.
        nesterov: use Nesterov momentum, also in AdamW.
        weight_decay: coefficient, multiplied by the learning rate. A mapping gives one for each part by name, and 0 for
            all other parts.
        decoupled_decay: apply SGD's weight decay after the momentum, p -= lr * weight_decay * p. Decay before the momentum
            is stronger by 1 / (1 - momentum).
        decay_norms: whether one-dimensional parameters (BN's scale and bias, fc's bias) have weight decay, too.
        clip_norm: gradients are clipped to this global norm before everything else, as in
            ``torch.nn.utils.clip_grad_norm_``; 0: no clipping. Gradients of frozen parameters do not count.
        rates: factors of the learning rate by names of parts, like ``lr`` of PyTorch's parameter groups; 1 for all other
            parts. :func:`layer_rates` returns such a mapping.
        frozen: names of parts that are not changed, as with ``requires_grad_(False)``; they have no optimizer state.

    Returns:
        An optax transformation.

    Raises:
        InputError: unknown kind, or a number is out of range; in ``init``, unknown name of a part.
    """
    if kind not in OPTIMIZERS:
        raise InputError(f"the optimizer must be {' or '.join(OPTIMIZERS)}, got {kind!r}: optax has others")
    _in_range(clip_norm=clip_norm)
    _in_range(1.0, momentum=momentum)
    if not callable(learning_rate):
        _in_range(learning_rate=learning_rate)
    if kind == "lamb" and isinstance(weight_decay, Mapping):
        raise InputError("weight_decay must be one number for lamb; only sgd and adamw accept one for each part")
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
    """A mask of the kernels among the parameters."""
    return jax.tree.map(lambda value: value.ndim > 1, params)


def labels(groups: Mapping[str, Names], rest: str = "rest") -> Callable[[Any], Any]:
    """Labels the parameters of a network by parts, for ``optax.multi_transform``.

    Args:
        groups: maps a label to a name or names of parts.
        rest: label of all other parameters.

    Returns:
        A function from parameters, a ``flax.nnx.State`` or any tree of the same paths, to a tree of labels.

    Raises:
        InputError: in that function, unknown name of a part; the message suggests similar names.
    """
    named = [(name, label) for label, names in groups.items() for name in _listed(names)]
    return lambda params: _assigned(named, rest, params)


def mask(*names: str) -> Callable[[Any], Any]:
    """Selects the parameters of the named parts, for ``optax.masked`` and ``optax.add_decayed_weights``.

    Returns:
        A function from parameters to a tree of booleans; errors as in :func:`labels`.
    """
    return lambda params: _assigned([(name, True) for name in names], False, params)


def freeze(optimizer: optax.GradientTransformation, *names: str) -> optax.GradientTransformation:
    """Wraps an optimizer so that the named parts are never changed, whatever their gradients are.

    BatchNorm's running statistics are not parameters: ``model.freeze_statistics()`` freezes those.
    """
    return optax.multi_transform(
        {"frozen": optax.stateless(_nothing), "trained": optimizer}, labels({"frozen": names}, rest="trained")
    )


def scale_rates(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Scales updates by a factor for each part, 1 for all other parts; used after an optimizer, it scales learning rates.

    Raises:
        InputError: a factor is negative; in ``init`` and ``update``, unknown name of a part.
    """
    _check("rates", factors)

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, factor: u * factor, updates, _assigned(list(factors.items()), 1.0, updates))

    return _checked_early(factors, scale)


def layer_rates(model: ResNet, decay: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate: 1 for the head, ``decay`` for the last stage, ``decay**2`` for the one before.

    As in Howard & Ruder 2018 (arXiv:1801.06146, section 3.2) and BEiT's fine-tuning, but by stage instead of by layer.

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
    """A transformation without state that also looks up its names in ``init``, to report errors early."""
    stateless = optax.stateless(update)

    def init(params: Any) -> Any:
        _assigned(list(names.items()), None, params)
        return stateless.init(params)

    return optax.GradientTransformation(init, stateless.update)


def _in_range(below: float = math.inf, **numbers: Any) -> None:
    """Raises InputError for Python numbers that are negative, not finite, or not ``below``; arrays are not checked."""
    for name, number in numbers.items():
        if isinstance(number, int | float) and not 0 <= number < below:
            most = "" if below == math.inf else f" and below {below:g}"
            raise InputError(f"{name} must be a number of at least 0{most}, got {number!r}")


def _check(what: str, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise InputError(f"{what} must be numbers of at least 0, got {number!r} for {name!r}")


def _nothing(updates: Any, _: Any) -> Any:
    """Updates of -0.0, which change no parameter: adding 0.0 would turn -0.0 into 0.0."""
    return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)


def _listed(names: Names) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _assigned(named: Sequence[tuple[str, Any]], rest: Any, params: Any) -> Any:
    """A tree like ``params`` with the value for each parameter's name; masked leaves stay masked."""
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
    """Converts JAX's path of a leaf to ``layer1.0.conv1.kernel``; the value inside a ``flax.nnx.Variable`` is left out."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")
