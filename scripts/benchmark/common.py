"""What the benchmark's two workers share: how to time, and how far from float64 a result is."""

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

LR = 1e-3  # so low that a batch seen many times does not diverge
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
INPUTS, REFERENCE = "inputs.npz", "float64.npz"  # in the job's folder
CHECKED_IMAGES = 8  # of a batch, whose logits are compared
CHUNK = 0.1  # seconds of steps between two waits for an accelerator


def pace(job: Mapping[str, Any], run: Callable[[int], object], images: int) -> dict[str, Any]:
    """Takes two steps to warm up, then times steps for the job's seconds, three at least.

    Args:
        job: of the driver; with ``seconds`` 0 only the first step is taken.
        run: takes that many steps, and waits until they are done.
        images: of a step.

    Returns:
        The median ``seconds`` a step, how many ``steps``, ``images_per_second``; when the first step was done and how long
        it took; ``host_bytes``, the process's peak memory.
    """
    began = time.perf_counter()
    run(1)
    found: dict[str, Any] = {"first_step_at": time.time(), "first_step_seconds": time.perf_counter() - began}
    if job["seconds"]:
        began = time.perf_counter()
        run(1)
        # Between waits an accelerator would be idle; a CPU has done its step when the call returns.
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
    """1e9 operations a second of the fastest product of two square matrices.

    Args:
        prepare: makes matrices of that size, and a function that multiplies them and waits.
    """
    fastest, seconds = 0.0, 0.0
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        if 8 * seconds > 0.5:  # this size would take so long
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
    """The row's network."""
    return ResNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["config"].items()})


def inputs(job: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The row's images ``[N, H, W, C]``, labels ``[N]``, and weights by torchvision's keys in PyTorch's layout."""
    import numpy as np

    with np.load(Path(job["folder"]) / INPUTS, allow_pickle=False) as file:
        found = dict(file)
    return found.pop("images"), found.pop("labels"), found


def relative_error(job: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """‖found - reference‖ / ‖reference‖ over all of the row's arrays together.

    Ends the process where other arrays were found, or something is not finite.
    """
    import numpy as np

    with np.load(Path(job["folder"]) / REFERENCE, allow_pickle=False) as file:
        wanted = dict(file)
    if found.keys() != wanted.keys():
        sys.exit(f"other arrays than the reference's: {', '.join(sorted(found.keys() ^ wanted.keys()))}")
    distance = sum(float(np.square(np.asarray(found[key], np.float64) - wanted[key]).sum()) for key in wanted)
    error = math.sqrt(distance / sum(float(np.square(value).sum()) for value in wanted.values()))
    if not math.isfinite(error):
        sys.exit("what the network computes is not finite")
    return error
