"""Several runs that differ only in their seed, with one compilation."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jresnet.data.dataset import Dataset
from jresnet.errors import InputError
from jresnet.reports import compare
from jresnet.training import devices
from jresnet.training.config import RunConfig, read_config
from jresnet.training.console import Console
from jresnet.training.devices import Devices
from jresnet.training.initial import Initial
from jresnet.training.outputs import claimed, read_summary, write_config, write_json
from jresnet.training.program import Program
from jresnet.training.stop import StopRequest
from jresnet.training.trainer import Options, Trainer


def fit_seeds(
    config: RunConfig,
    data: Dataset,
    out: Path,
    runs: int,
    resume: bool = False,
    stop: StopRequest | None = None,
    where: Devices | None = None,
    options: Options | None = None,
    initial: Initial | None = None,
) -> dict[str, Any]:
    """Trains with the seeds ``config.seed``, ``config.seed + 1``, ... one after the other, with one compilation.

    Each seed is a separate run in ``out/seed-N``; ``out/summary.json`` contains means and standard deviations. Training all
    seeds at once with ``jax.vmap`` would turn convolutions into grouped ones, which are slower on a CPU
    (docs/log/2026-11-seeds-at-once.md).

    Args:
        config: configuration of the first run.
        data: the data set, from :func:`jresnet.training.program.load_data`.
        out: the folder that contains the folders of the runs.
        runs: number of runs.
        resume: continue runs that are not finished.
        stop: as for :class:`Trainer`.
        where: as for :class:`Program`.
        options: as for :class:`Trainer`.
        initial: as for :class:`Program`.

    Returns:
        The contents of ``summary.json``; an empty dict in all processes but the first.

    Raises:
        InputError: a seed would be too large; or as :meth:`Trainer.fit`, also for other exceptions.
    """
    dataclasses.replace(config, seed=config.seed + runs - 1).check()
    console, first = Console(quiet=not devices.is_first()), devices.is_first()
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(claimed(config, out, resume, console.say, runs))
            write_config(out, config, runs=runs)
        program = Program(config, data, where, initial)
        summaries = []
        for seed in range(config.seed, config.seed + runs):
            summary, again = out / f"seed-{seed}" / "summary.json", dataclasses.replace(config, seed=seed)
            # else it has to be prolonged
            finished = first and summary.exists() and read_config(summary.parent) == again
            if resume and devices.together(np.array([finished]))[0][0]:
                summaries.append(read_summary(summary) if first else {})
                continue
            console.say(f"run      seed {seed}, {len(summaries) + 1} of {runs}")
            summaries.append(Trainer(again, data, summary.parent, stop, program, options).fit(resume=resume))
        if not first:
            return {}
        try:
            result = compare.summarise(summaries)
            accuracy = result["final"]["test_accuracy"]
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise InputError(f"a summary.json in {out} is damaged ({error!r}): delete it and resume") from error
        write_json(out / "summary.json", result)
    spread = f" ± {100 * accuracy['std']:.2f}" if runs > 1 else ""
    console.say(
        f"all      {100 * accuracy['mean']:.2f}{spread} % of the test images, mean"
        f"{' ± standard deviation' * (runs > 1)} of {runs} seeds; {out}"
    )
    return result
