"""Code shared by the benchmark's two workers: timing, input data, and the error relative to float64."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jresnet.models.config import ResNetConfig

ROOT = Path(__file__).resolve().parents[2]

LR = 1e-3  # low, so that many steps on the same batch do not diverge
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
INPUTS, REFERENCE = "inputs.npz", "float64.npz"  # files in the job's folder
CHECKED_IMAGES = 8  # images per batch whose logits are compared with the reference
CHUNK = 0.1  # seconds of steps between two synchronisations with an accelerator


def pace(job: Mapping[str, Any], run: Callable[[int], object], images: int) -> dict[str, Any]:
    """Runs two warm-up steps, then at least three measurements, for at least the seconds given by the job.

    Args:
        job: the driver's job; with ``seconds`` 0 only the first step is run.
        run: runs the given number of steps and waits until they are finished.
        images: number of images per step.

    Returns:
        The median ``seconds`` per step, the number of ``steps``, ``images_per_second``; the time at which the first step
        finished, and its duration; ``host_bytes``, the peak memory of the process.
    """
    began = time.perf_counter()
    run(1)
    found: dict[str, Any] = {"first_step_at": time.time(), "first_step_seconds": time.perf_counter() - began}
    if job["seconds"]:
        began = time.perf_counter()
        run(1)
        # An accelerator would be idle if the host waited after every step. On a CPU the call returns when the step is done.
        count = 1 if job["device"] == "cpu" else max(1, int(CHUNK / (time.perf_counter() - began)))
        times: list[float] = []
        while len(times) < 3 or sum(times) * count < job["seconds"]:
            began = time.perf_counter()
            run(count)
            times.append((time.perf_counter() - began) / count)
        seconds = statistics.median(times)
        found |= {"seconds": seconds, "steps": len(times) * count, "images_per_second": images / seconds}
    unit = 1 if sys.platform == "darwin" else 1024
    return found | {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def fastest_product(prepare: Callable[[int], Callable[[], object]]) -> dict[str, float]:
    """Highest rate of a product of two square matrices, in 1e9 operations per second.

    Args:
        prepare: creates matrices of the given size; returns a function that multiplies them and waits for the result.
    """
    fastest, seconds = 0.0, 0.0
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        if 8 * seconds > 0.5:  # expected duration: twice the size takes about eight times as long
            break
        multiply, times = prepare(size), []
        for _ in range(4):
            began = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - began)
        seconds = min(times[1:])
        fastest = max(fastest, 2e-9 * size**3 / seconds)
    return {"gflops": fastest}


def configuration(job: Mapping[str, Any]) -> ResNetConfig:
    """The configuration of the row's network."""
    return ResNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["config"].items()})


def inputs(job: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The row's images ``[N, H, W, C]``, labels ``[N]``, and weights with torchvision's keys in PyTorch's layout."""
    import numpy as np

    with np.load(Path(job["folder"]) / INPUTS, allow_pickle=False) as file:
        found = dict(file)
    return found.pop("images"), found.pop("labels"), found


def relative_error(job: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """‖found - reference‖ / ‖reference‖ over all of the row's arrays together.

    Exits the process if the arrays have other names than the reference's, or if the error is not finite.
    """
    import numpy as np

    with np.load(Path(job["folder"]) / REFERENCE, allow_pickle=False) as file:
        wanted = dict(file)
    if found.keys() != wanted.keys():
        sys.exit(
            f"arrays that only one of network and reference has: {', '.join(sorted(found.keys() ^ wanted.keys()))}"
        )
    distance = sum(float(np.square(np.asarray(found[key], np.float64) - wanted[key]).sum()) for key in wanted)
    error = math.sqrt(distance / sum(float(np.square(value).sum()) for value in wanted.values()))
    if not math.isfinite(error):
        sys.exit("the network's output or gradient is not finite")
    return error
