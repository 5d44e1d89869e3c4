"""SGD with momentum and step decay, as PyTorch's ``torch.optim.SGD`` with ``MultiStepLR``, in optax."""

from __future__ import annotations

from collections.abc import Sequence

import optax


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
        step = round(milestone * steps_per_epoch)
        scales[step] = scales.get(step, 1.0) * gamma
    return optax.piecewise_constant_schedule(lr, scales)


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """``torch.optim.SGD``: g += weight_decay * p; buf = momentum * buf + g; p -= lr * (g + momentum * buf or buf)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)
    )
