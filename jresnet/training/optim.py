"""Optimizers and learning-rate schedules with PyTorch's arithmetic, in optax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

LAST_STEP = 2**31 - 1  # steps are counted in int32


def step_decay(lr: float, milestones: Sequence[float], gamma: float, steps_per_epoch: int) -> optax.Schedule:
    """``lr`` times ``gamma`` for each milestone that has passed.

    Args:
        lr: the first learning rate.
        milestones: epochs, fractions of one allowed; the step that begins at a milestone has the lower rate.
        gamma: factor at each milestone.
        steps_per_epoch: steps.

    Returns:
        A function from the step, counted from 0, to the learning rate.
    """
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
    """
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
    weight_decay: float = 0.0,
    decoupled_decay: bool = False,
    decay_norms: bool = True,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """``torch.optim.SGD`` or ``torch.optim.AdamW``, as a chain whose order tells where the weight decay acts.

    Args:
        kind: ``"sgd"`` (g += weight_decay * p; buf = momentum * buf + g; p -= lr * buf, or lr * (g + momentum * buf)
            with ``nesterov``), or ``"adamw"`` with ``momentum`` as b1, b2 = 0.999, eps = 1e-8.
        learning_rate: a number or a :func:`schedule`.
        momentum: 0 to below 1.
        nesterov: Nesterov's momentum, in AdamW too.
        weight_decay: times the learning rate: the share of each parameter that a step takes away.
        decoupled_decay: SGD's decay also after the momentum, p -= lr * weight_decay * p. Decay inside the momentum acts
            1 / (1 - momentum) times as strongly.
        decay_norms: whether parameters of one dimension (BN's scale and bias, fc's bias) decay too.
        clip_norm: gradients are scaled down to this length, over all parameters together, before all else, as
            ``torch.nn.utils.clip_grad_norm_``; 0: never.
    """
    decay = optax.add_decayed_weights(weight_decay, None if decay_norms else _kernels)
    if kind == "adamw":
        links = [optax.scale_by_adam(b1=momentum, nesterov=nesterov), decay]
    else:
        trace = optax.trace(momentum, nesterov)
        links = [trace, decay] if decoupled_decay else [decay, trace]
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, *links, optax.scale_by_learning_rate(learning_rate))


def _kernels(params: Any) -> Any:
    """Which parameters are kernels."""
    return jax.tree.map(lambda value: value.ndim > 1, params)
