"""The command ``python scripts/benchmark.py``: measures the speed of jresnet and of PyTorch.

Each measurement runs in its own process (``jresnet_worker.py``, ``torch_worker.py``), one at a time. The frameworks
alternate: A B A B. All use the same random weights and images, which a worker writes once per row, together with the
reference logits or gradient in float64. This file imports neither JAX nor PyTorch, so that it uses little memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.common import CHECKED_IMAGES, ROOT
from benchmark.suites import LEVELS, SMALL, SUITES, Row, choose
from benchmark.table import PEERS, PLOTS, evaluate, footer, head, line, plot
from jresnet.commands import failed, huge_pages
from jresnet.commands.flags import Parser, check_output, folder
from jresnet.errors import InputError
from jresnet.files import write_atomically
from jresnet.models import zoo

WORKERS = {name: ROOT / "scripts" / "benchmark" / f"{name}_worker.py" for name in ("jresnet", "torch")}
RUNS = {
    "jresnet": "scripts/train_cifar10.py",
    "torch": "tests/parity/train_torch.py",
}  # training scripts of the accuracy suite
PACKAGES = {"jresnet": ("jax", "jaxlib", "flax", "optax", "numpy"), "torch": ("torch", "torchvision", "timm")}

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # Linux's names; a CPU's model name may not imply them
SECONDS = 3.0  # minimum duration of a measurement
CHECKED_GFLOP = 2000  # limit for computing a row in float64 too, which takes minutes on two cores
EPOCH = 50_000  # images per epoch, as in CIFAR-10
BOUNDS = {"batch": (1, 1_000_000), "rounds": (1, 1000), "size": (32, 4096)}  # minimum and maximum of options
GPU_MINUTES = 7.0  # default of --minutes; a round that has started is finished


class Problem(Exception):
    """An error that stops the command; the text has one line per problem."""


class WorkerError(Exception):
    """A failed worker; the text is the reason."""


@dataclass(frozen=True)
class Workplace:
    """Settings shared by all measurements of one call."""

    folder: Path  # files exchanged between the workers, and compilation caches
    device: str
    rounds: int  # measurements per framework
    data_dir: Path | None = None
    no_torch: str = ""  # why the peers cannot be measured; empty if they can
    peer_python: str = sys.executable
    deadline: float = math.inf  # value of time.monotonic() after which no row or round starts

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def ask(self, worker: str, do: str, cache: str = "cache", **job: Any) -> dict[str, Any]:
        """Runs a job in a worker and returns the answer; ``cache`` is the compilation cache. Raises WorkerError."""
        job |= {"do": do, "device": self.device}
        command = [self.python(worker), str(WORKERS[worker]), json.dumps(job)]
        return answer(command, **self.environment(cache, job.get("devices", 1)))

    def python(self, worker: str) -> str:
        """The Python interpreter of a worker."""
        return self.peer_python if worker == "torch" else sys.executable

    def environment(self, cache: str = "cache", devices: int = 1) -> dict[str, str]:
        """Environment variables of a measuring process."""
        found = huge_pages.environment() | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / cache / "torch"),
        }
        if self.device == "cpu":
            found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "CUDA_VISIBLE_DEVICES": ""}
        return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Measure the speed of jresnet and of PyTorch's networks with the same weights and images. "
        "The frameworks alternate, and each measurement runs in its own process. Prints a Markdown table; progress goes to "
        "stderr.",
        epilog="Exit codes: 0 success, even if a peer failed; 1 unusable input, or jresnet failed; 2 wrong options; "
        "130 after Ctrl-C.",
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), help="what to measure (default: train and infer)")
    add("--peer", default=",".join(PEERS), metavar="NAMES", help="some of %(default)s (default: all), or none")
    add(
        "--peer-python", default=sys.executable, metavar="PATH",
        help="Python interpreter with the peers installed (default: this one)",
    )  # fmt: skip
    add("--arch", help="an architecture of jresnet.list_models() (default: those of the suite)")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="images per batch (default: the suite's; with --arch 128 small or 16 large)",
    )
    add(
        "--size", type=int, metavar="PIXELS",
        help=f"height and width; below {SMALL}: CIFAR stem and ten classes (default: the suite's; with --arch 32 or 224)",
    )  # fmt: skip
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="dtype of convolutions (default: float32 on cpu, bfloat16 on gpu)",
    )
    add("--device", choices=("cpu", "gpu"), default="cpu", help="device to measure on (default: %(default)s)")
    add("--rounds", type=int, metavar="N", help="measurements per framework (default: 5 on cpu, 2 on gpu)")
    add("--json", type=Path, metavar="FILE", help="file for the figures of every round, written after each row")
    add("--force", action="store_true", help="replace existing files of --json and --plots")
    add("--plots", type=folder, metavar="DIR", help="folder for PNG plots of the scaling suite")
    add(
        "--data-dir", type=folder, metavar="DIR", help="CIFAR-10 for the suites data and accuracy (default: the digits)"
    )
    add(
        "--minutes", type=float, metavar="M",
        help=f"start no row or round after M minutes; list the rest (default: no limit on cpu, {GPU_MINUTES:g} on gpu)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        with tempfile.TemporaryDirectory(prefix="jresnet-benchmark-") as folder:
            return run(args, command, Path(folder))
    except Problem as problem:
        for complaint in str(problem).splitlines():
            failed(complaint)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, command: str, folder: Path) -> int:
    """Measures all rows, prints the table and writes the report."""
    gpu, load = args.device == "gpu", os.getloadavg()[0]  # the load without the benchmark
    minutes = (GPU_MINUTES if gpu else math.inf) if args.minutes is None else args.minutes
    rows, peers = choose(args), [] if args.peer == "none" else args.peer.split(",")
    if problems := check(args, peers):
        raise Problem("\n".join(problems))
    packages = versions(args.peer_python)
    no_torch = "" if "torch" in packages else "torch is not installed: pip install 'jresnet[torch]'"
    deadline, rounds = time.monotonic() + 60 * minutes, args.rounds or (2 if gpu else 5)
    place = Workplace(folder, args.device, rounds, args.data_dir, no_torch, args.peer_python, deadline)
    try:
        known = place.ask("jresnet", "survey", rows=[dataclasses.asdict(row) | {"chosen": row.chosen} for row in rows])
    except WorkerError as error:
        raise Problem(f"jresnet does not start: {error}") from error
    problems = known["problems"]
    if gpu and known["platform"] != "gpu":
        print("would measure:", *rows, sep="\n  ")
        problems.append("--device gpu: JAX finds no GPU: install its driver and pip install 'jax[cuda13]'")
    if problems:
        raise Problem("\n".join(problems))

    report: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware() | {"load": load, "device": known["device"]},
        "versions": packages,
        "ceilings": ceilings(place, rows, bool(peers)),
        "rows": [],
        "left_out": [],
    }
    print(head(), flush=True)
    for row, about in zip(rows, known["rows"], strict=True):
        if place.late:
            report["left_out"].append(str(row))
        else:
            found = measure(place, row, row.contestants(peers), about)
            fastest = max((v for k, v in report["ceilings"].items() if k.endswith(row.precision)), default=0.0)
            results = {name: evaluate(name, found, about["gflop"], fastest) for name in found}
            report["rows"].append({"what": str(row)} | dataclasses.asdict(row) | about | {"results": results})
            print("\n".join(line(str(row), name, result) for name, result in results.items()), flush=True)
        if args.json:
            write(args.json, report)
    print(footer(report))
    if args.plots:
        plot(report["rows"], args.plots)
    if failed := [f"{row['task']} {row['arch']}" for row in report["rows"] if "failed" in row["results"]["jresnet"]]:
        raise Problem(f"jresnet failed: {', '.join(failed)}")
    return 0


def check(args: argparse.Namespace, peers: Sequence[str]) -> list[str]:
    """Problems with the options that can be found without JAX."""
    problems = [f"unknown peer {name!r}: expected {', '.join(PEERS)}, or none" for name in peers if name not in PEERS]
    for name, (least, most) in BOUNDS.items():
        given = getattr(args, name)
        if given is not None and not least <= given <= most:
            problems.append(f"--{name} must be from {least} to {most}, got {given}")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        problems.append(f"--minutes must be finite and above 0, got {args.minutes:g}")
    try:
        if args.arch is not None:
            zoo.find(args.arch)
    except InputError as error:
        problems.append(str(error))
    outputs = [(args.json, "--json")] if args.json else []
    outputs += [(args.plots / name, "--plots") for name in PLOTS] if args.plots and args.plots.is_dir() else []
    for path, flag in outputs:
        try:
            check_output(path, args.force, flag)
        except InputError as error:
            problems.append(str(error))
    if args.data_dir and not args.data_dir.exists():
        problems.append(f"--data-dir {args.data_dir} does not exist")
    if args.plots and args.suite not in ("scaling", "all"):
        problems.append("--plots needs the scaling suite: add --suite scaling")
    if args.plots and args.plots.exists() and not args.plots.is_dir():
        problems.append(f"--plots {args.plots} is a file: name a folder")
    if args.plots and not importlib.util.find_spec("matplotlib"):
        problems.append("--plots needs matplotlib: pip install 'jresnet[train]'")
    return problems


def ceilings(place: Workplace, rows: Sequence[Row], peers: bool) -> dict[str, float]:
    """Rates of a large matrix product by framework and precision, in 1e9 operations per second."""
    found = {}
    for precision in sorted({row.precision for row in rows if row.arch}):
        for worker in ("jresnet", "torch") if peers and not place.no_torch else ("jresnet",):
            with contextlib.suppress(WorkerError):  # the rows report the reason
                found[f"{worker} {precision}"] = place.ask(worker, "gemm", precision=precision)["gflops"]
    return found


def measure(place: Workplace, row: Row, contestants: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """For each contestant the answers of its rounds, or a text with the reason why it failed."""
    found: dict[str, Any] = {name: place.no_torch if name in PEERS and place.no_torch else [] for name in contestants}
    timed = row.task in ("train", "infer", "epoch")
    images = min(row.batch, CHECKED_IMAGES) if row.task == "infer" else row.batch
    checked = row.suite == row.task and about["gflop"] * images <= CHECKED_GFLOP  # suites "train" and "infer"
    with tempfile.TemporaryDirectory(dir=place.folder) as inputs:
        job = dataclasses.asdict(row) | {"config": about["config"], "folder": inputs, "epoch": EPOCH}
        job |= {"seconds": SECONDS if timed else 0, "data_dir": place.data_dir and str(place.data_dir)}
        if row.arch and not row.dataset:
            say(f"{row}: writing weights, images{', float64 reference' if checked else ''}")
            try:
                place.ask("jresnet", "make", **job, check=checked)
            except WorkerError as error:
                return dict.fromkeys(found, str(error))
        for number in range(place.rounds):
            if number and place.late:
                break
            cache = f"{inputs}/{number}" if row.task in ("first step", "compile") else "cache"  # a new one if it counts
            for name in [name for name in contestants if isinstance(found[name], list)]:
                try:
                    if row.dataset:
                        one = reach(place, row, name, number)
                    else:
                        one = once(place, row, name, cache, job | {"check": checked and number == 0})
                except WorkerError as error:
                    found[name] = str(error)
                    say(f"{row}: {name} failed: {error}")
                else:
                    found[name].append(one)
                    say(f"{row}: round {number + 1} of {place.rounds}, {name}, {one['seconds']:.4g} s")
    return found


def once(place: Workplace, row: Row, name: str, cache: str, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a new process. ``seconds`` of the answer is the quantity that the row measures."""
    worker = "torch" if name in PEERS else "jresnet"
    if row.task == "import":
        timed = f"import time; began = time.perf_counter(); import {worker}; print(time.perf_counter() - began)"
        return {"seconds": answer([place.python(worker), "-c", timed])}
    began = time.time()
    found = place.ask(worker, "measure", cache, contestant=name, **job)
    if row.task == "first step":
        found["seconds"] = found["first_step_at"] - began
    elif row.task == "compile":
        found["seconds"] = found["compile_seconds"]
    return found


def reach(place: Workplace, row: Row, name: str, seed: int) -> dict[str, Any]:
    """Seconds of training and evaluation, without compilation, until a run reaches the test accuracies.

    Raises:
        WorkerError: the run does not reach the highest one.
    """
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        out = Path(folder) / "run"
        command = [place.python(name), str(ROOT / RUNS[name]), "--recipe", "fast", "--arch", row.arch]
        command += ["--seed", str(seed), "--batch-size", str(row.batch)]
        command += ["--precision", row.precision, "--dataset", row.dataset]
        command += ["--data-dir", str(place.data_dir)] if place.data_dir else []
        execute([*command, "--out", str(out)], **place.environment())
        metrics = (out / ("metrics.jsonl" if name == "jresnet" else f"seed-{seed}/metrics.jsonl")).read_text()
    epochs = [json.loads(text) for text in metrics.splitlines()]
    levels = LEVELS[row.dataset]
    reached = [next((e["seconds"] for e in epochs if e["test_accuracy"] >= level), None) for level in levels]
    said = ", ".join(
        f"{level:.0%} {'never' if when is None else f'after {when:.3g} s'}"
        for level, when in zip(levels, reached, strict=True)
    )
    said += f"; {epochs[-1]['test_accuracy']:.2%} after {len(epochs)} epochs"
    if reached[-1] is None:
        raise WorkerError(f"seed {seed}: {said}")
    return {"seconds": reached[-1], "reached": reached, "final": epochs[-1]["test_accuracy"], "note": said}


def answer(command: list[str], **environment: str) -> Any:
    """The JSON on the last line of a command's output. Raises WorkerError."""
    return json.loads(execute(command, **environment)[-1])


def execute(command: list[str], **environment: str) -> list[str]:
    """Runs a command; returns the lines of its stdout.

    Raises:
        WorkerError: the command failed; the text has the last lines of stderr.
    """
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # With OMP_WAIT_POLICY=passive, threads sleep between operations, which costs PyTorch up to a third of its speed.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = {**inherited, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # In a new session the worker does not receive Ctrl-C. This process does, and kills the worker with its children.
        worker = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        try:
            code = worker.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append([text.strip() for text in file.read().splitlines() if text.strip()])
    if code == 0:
        return texts[0]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise WorkerError(" / ".join([*texts[1][-3:], *([ended] if code < 0 or not texts[1] else [])])[-500:])


def hardware() -> dict[str, Any]:
    """Describes the machine."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [
            known for known in INSTRUCTIONS if re.search(rf"^flags\s*:.*\b{known}\b", described, re.MULTILINE)
        ],
        "system": platform.platform(),
        "huge_pages": huge_pages.there(),
    }


def versions(peer_python: str) -> dict[str, str]:
    """Versions of Python and of jresnet's packages here, and of the peers' packages in ``peer_python``.

    Raises:
        Problem: ``peer_python`` is not a working Python interpreter.
    """
    code = (
        "import importlib.metadata, json, platform, sys\n"
        "there = {name for found in importlib.metadata.distributions() if (name := found.metadata['Name'])}\n"
        "found = {name: importlib.metadata.version(name) for name in sys.argv[1:] if name in there}\n"
        "print(json.dumps({'python': platform.python_version()} | found))"
    )
    try:
        ours = answer([sys.executable, "-c", code, *PACKAGES["jresnet"]])
        theirs = answer([peer_python, "-c", code, *PACKAGES["torch"]])
    except (OSError, ValueError, LookupError, WorkerError) as error:
        raise Problem(f"--peer-python {peer_python} is not a working Python interpreter: {error}") from error
    python = theirs.pop("python")
    return ours | ({"the peers' python": python} if python != ours["python"] else {}) | theirs


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report atomically."""
    try:
        write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    except InputError as error:
        raise Problem(str(error)) from error


def handle_signals() -> None:
    """Makes SIGTERM exit by an exception, so that the worker is killed too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    handle_signals()
    sys.exit(main())
