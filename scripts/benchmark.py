"""Measure jresnet's speed, and PyTorch's beside it: ``python scripts/benchmark.py``.

Every measurement is a process of its own (``benchmark_jresnet.py``, ``benchmark_torch.py``), one at a time, and the
frameworks take turns: A B A B. All get the same random weights and images, which a worker writes once a row, with the
logits or the gradient in float64 to compare theirs with. This file imports neither JAX nor PyTorch, so that it has no part
in their memory; its last section is what the two workers share.
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
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKERS = {name: ROOT / "scripts" / f"benchmark_{name}.py" for name in ("jresnet", "torch")}
PEERS = ("torch", "torch-compile", "timm")
SUITES = ("train", "infer", "startup", "data", "scaling")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision", "timm")

SECONDS = 3.0  # of steps a measurement, at least
SMALL = 64  # pixels below which networks have the CIFAR stem and ten classes
CHECKED_GFLOP = 2000  # up to which a row is computed in float64 too: that takes minutes on two cores
EPOCH = 50_000  # images, CIFAR-10's
GPU_MINUTES = 7.0  # budget; a round that has begun is finished

# Suite, device ("": both), task, architecture, pixels, batches. For a GPU the order is what the budget shall reach first.
DEFAULTS = (
    ("train", "cpu", "train", "resnet20_cifar", 32, (128,)),
    ("train", "cpu", "train", "resnet18", 32, (128,)),
    ("train", "cpu", "train", "resnet18", 224, (16,)),
    ("train", "cpu", "train", "resnet50", 224, (16,)),
    ("infer", "cpu", "infer", "resnet18", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet50", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet152", 224, (1, 8, 32)),
    ("infer", "cpu", "infer", "resnet20_cifar", 32, (1, 256)),
    ("train", "gpu", "train", "resnet18", 32, (512,)),
    ("train", "gpu", "train", "resnet50", 224, (64, 256)),
    ("infer", "gpu", "infer", "resnet50", 224, (256, 1)),
    ("train", "gpu", "epoch", "resnet18", 32, (512,)),
    ("train", "gpu", "train", "resnet34", 32, (512, 128, 1024)),
    ("train", "gpu", "train", "resnet20_cifar", 32, (512, 128, 1024)),
    ("train", "gpu", "train", "resnet18", 32, (128, 1024)),
    ("startup", "", "import", "", 0, (0,)),
    ("startup", "", "first step", "resnet50", 224, (16,)),
    *(("startup", "", "compile", f"resnet{depth}", 224, (16,)) for depth in (18, 34, 50, 101, 152)),
    ("data", "", "data", "", 32, (128,)),
)
COLUMNS = "what", "framework", "images/s", "seconds", "ratio", "GEMM", "compile s", "memory MiB", "error", "n", "note"
NOTES = """
images/s, seconds (of a step, of an epoch, or until what was named was done), ratio (jresnet's speed over this one's, round
by round): median (least-most) of n rounds. GEMM: share of the fastest large matrix product measured here, operations counted
from the shapes, training as three forward passes. compile: in the first round. memory: peak of the process, and of the
device. error: relative L2 distance to float64, of the logits (inference) or the whole gradient (training)."""


class Problem(Exception):
    """What stops the command; a line for each thing that is wrong."""


class WorkerError(Exception):
    """Why a worker has no figures."""


@dataclass(frozen=True)
class Row:
    """One thing to measure, of every framework."""

    suite: str
    task: str  # "train", "infer", "epoch": images a second; "import", "first step", "compile", "data": seconds
    arch: str = ""
    size: int = 0  # pixels, height and width
    batch: int = 0  # images
    precision: str = "float32"
    series: str = ""  # in "scaling": what is varied, "batch", "depth" or "devices"
    devices: int = 1  # simulated ones

    def __str__(self) -> str:
        network = f" {self.arch} at {self.size}, batch {self.batch}, {self.precision}" if self.arch else ""
        return self.task + network + (f", devices {self.devices}" if self.series == "devices" else "")

    @property
    def chosen(self) -> dict[str, Any]:
        """Stem and classes, as ``jresnet.create`` takes them; None: the architecture's own."""
        small = self.size < SMALL
        return {"stem": "cifar" if small else None, "num_classes": 10 if small else None}

    def contestants(self, peers: Sequence[str]) -> list[str]:
        """Who is measured, in turn."""
        both = ("torch", "torch-compile")
        able = {"data": (), "import": ("torch",), "compile": ("torch-compile",), "first step": both, "epoch": both}
        able |= {"train": {"": PEERS, "devices": ()}.get(self.series, ("torch",))}
        cached = ["jresnet, cached"] if self.task == "first step" else []
        return ["jresnet", *cached, *(name for name in able.get(self.task, PEERS) if name in peers)]


@dataclass(frozen=True)
class Workplace:
    """What the measurements of one call have in common."""

    folder: Path  # for what passes between the workers
    device: str
    rounds: int  # measurements of each framework
    data_dir: Path | None = None
    no_torch: str = ""  # why there are no peers
    deadline: float = math.inf  # of time.monotonic(), after which neither a row nor a round begins

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def ask(self, worker: str, do: str, cache: str = "cache", **job: Any) -> dict[str, Any]:
        """A worker's answer; ``cache`` is the folder of what it compiles. Raises WorkerError."""
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / cache / "torch"),
        }
        if self.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(job.get("devices", 1))}
        job |= {"do": do, "device": self.device}
        return answer([sys.executable, str(WORKERS[worker]), json.dumps(job)], **environment)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Measure jresnet's speed and that of PyTorch's networks with the same weights and images, in turn, each "
        "in a process of its own. Prints a Markdown table; progress goes to stderr.",
        epilog="Exit code: 0; 1 where something cannot be used or jresnet has no figures (a peer may have none); 2 for bad "
        "options; 130 when interrupted.",
    )
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), help="what to measure (default: train and infer)")
    add("--peer", default=",".join(PEERS), metavar="NAMES", help="some of %(default)s (default: all), or none")
    add("--arch", help="of jresnet.list_models(), instead of the suite's own (default: those)")
    add(
        "--batch", type=positive, metavar="N", help="images (default: the row's own; with --arch 128 small or 16 large)"
    )
    add(
        "--size", type=positive, metavar="PIXELS",
        help=f"height and width, below {SMALL} with the CIFAR stem and ten classes (the row's own; with --arch 32 or 224)",
    )  # fmt: skip
    add("--precision", choices=("float32", "bfloat16"), help="of convolutions (cpu: float32, gpu: bfloat16)")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="(default: %(default)s)")
    add("--rounds", type=positive, metavar="N", help="measurements of each framework (cpu: 5, gpu: 2)")
    add("--json", type=Path, metavar="FILE", help="every round's figures, written after each row (default: none)")
    add("--plots", type=Path, metavar="DIR", help="folder for the scaling suite's plots, PNG (default: none)")
    add("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies, for the data suite (scikit-learn's digits)")
    add(
        "--minutes", type=float, metavar="M",
        help=f"rows and rounds begin while these last; the rest is named (cpu: no limit, gpu: {GPU_MINUTES:g})",
    )  # fmt: skip
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        with tempfile.TemporaryDirectory(prefix="jresnet-benchmark-") as folder:
            return run(args, command, Path(folder))
    except Problem as problem:
        for complaint in str(problem).splitlines():
            print(f"error: {complaint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, command: str, folder: Path) -> int:
    """Measures, prints and writes all rows."""
    gpu, load = args.device == "gpu", os.getloadavg()[0]  # before anything runs here
    minutes = (GPU_MINUTES if gpu else math.inf) if args.minutes is None else args.minutes
    no_torch = "" if importlib.util.find_spec("torch") else "torch is not installed: pip install 'jresnet[torch]'"
    deadline = time.monotonic() + 60 * minutes
    place = Workplace(folder, args.device, args.rounds or (2 if gpu else 5), args.data_dir, no_torch, deadline)
    rows, peers = choose(args), [] if args.peer == "none" else args.peer.split(",")
    try:
        known = place.ask("jresnet", "survey", rows=[dataclasses.asdict(row) | {"chosen": row.chosen} for row in rows])
    except WorkerError as error:
        raise Problem(f"jresnet does not start: {error}") from error
    problems = check(args, peers) + known["problems"]
    if gpu and known["platform"] != "gpu":
        print("would measure:", *rows, sep="\n  ")
        problems.append("--device gpu: JAX finds none; it needs the driver and pip install 'jax[cuda12]'")
    if problems:
        raise Problem("\n".join(problems))

    report: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware() | {"load": load, "device": known["device"]},
        "versions": {"python": platform.python_version(), **versions()},
        "ceilings": ceilings(place, rows, bool(peers)),
        "rows": [],
        "left_out": [],
    }
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for row, about in zip(rows, known["rows"], strict=True):
        if place.late:
            report["left_out"].append(str(row))
        else:
            found = measure(place, row, row.contestants(peers), about)
            fastest = max((v for k, v in report["ceilings"].items() if k.endswith(row.precision)), default=0.0)
            results = {name: evaluate(name, found, about["gflop"], fastest) for name in found}
            report["rows"].append(dataclasses.asdict(row) | about | {"results": results})
            print("\n".join(line(row, name, result) for name, result in results.items()), flush=True)
        if args.json:
            write(args.json, report)
    print(footer(report))
    if args.plots:
        plot(report["rows"], args.plots)
    if failed := [f"{row['task']} {row['arch']}" for row in report["rows"] if "failed" in row["results"]["jresnet"]]:
        raise Problem(f"jresnet has no figures: {', '.join(failed)}")
    return 0


def check(args: argparse.Namespace, peers: Sequence[str]) -> list[str]:
    """What is wrong with the options, as far as can be told without JAX."""
    problems = [f"unknown peer {name!r}: there are {', '.join(PEERS)}, or none" for name in peers if name not in PEERS]
    if args.size and args.size < 32:
        problems.append(f"--size must be at least 32 pixels, got {args.size}")
    if args.minutes is not None and not args.minutes > 0:
        problems.append(f"--minutes must be more than 0, got {args.minutes:g}")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        problems.append(f"--json {args.json} must name a file in a folder that exists")
    if args.data_dir and not args.data_dir.exists():
        problems.append(f"--data-dir {args.data_dir} is not there")
    if args.plots and args.suite not in ("scaling", "all"):
        problems.append("--plots draws the scaling suite: add --suite scaling")
    if args.plots and args.plots.exists() and not args.plots.is_dir():
        problems.append(f"--plots {args.plots} is a file: name a folder")
    if args.plots and not importlib.util.find_spec("matplotlib"):
        problems.append("--plots needs matplotlib: pip install 'jresnet[train]'")
    return problems


def choose(args: argparse.Namespace) -> list[Row]:
    """The rows that the options name, each once."""
    suites = SUITES if args.suite == "all" else (args.suite,) if args.suite else ("train", "infer")
    precision = args.precision or ("bfloat16" if args.device == "gpu" else "float32")
    usual = args.size or (32 if (args.arch or "_cifar").endswith("_cifar") else 224)
    rows = []
    for suite, device, task, arch, size, batches in DEFAULTS:
        if suite not in suites or device not in ("", args.device):
            continue
        if arch and args.arch:
            arch, size, batches = args.arch, usual, (128 if usual < SMALL else 16,)
        for batch in batches:
            chosen = (0, 0) if task == "import" else (args.size or size, args.batch or batch)
            rows.append(Row(suite, task, arch, *chosen, precision))
    if "scaling" in suites:
        arch, batch = args.arch or "resnet20_cifar", args.batch or 128
        varied = [("batch", arch, n, 1) for n in ([args.batch] if args.batch else [1, 4, 16, 64, 256, 1024])]
        if not args.arch:
            varied += [("depth", f"resnet{depth}_cifar", batch, 1) for depth in (20, 32, 44, 56, 110)]
        if args.device == "cpu":
            varied += [("devices", arch, batch, count) for count in (1, 2, 4, 8) if batch % count == 0]
        rows += [Row("scaling", "train", name, usual, n, precision, series, k) for series, name, n, k in varied]
    return list(dict.fromkeys(rows))


def ceilings(place: Workplace, rows: Sequence[Row], peers: bool) -> dict[str, float]:
    """1e9 operations a second in a large matrix product, by framework and precision."""
    found = {}
    for precision in sorted({row.precision for row in rows if row.arch}):
        for worker in ("jresnet", "torch") if peers and not place.no_torch else ("jresnet",):
            with contextlib.suppress(WorkerError):  # why, the rows will tell
                found[f"{worker} {precision}"] = place.ask(worker, "gemm", precision=precision)["gflops"]
    return found


def measure(place: Workplace, row: Row, contestants: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Of each contestant a list of its rounds' answers or, as text, why it has none."""
    found: dict[str, Any] = {name: place.no_torch if name in PEERS and place.no_torch else [] for name in contestants}
    timed = row.task in ("train", "infer", "epoch")
    images = min(row.batch, CHECKED_IMAGES) if row.task == "infer" else row.batch
    checked = row.suite == row.task and about["gflop"] * images <= CHECKED_GFLOP  # in "train" and "infer"
    with tempfile.TemporaryDirectory(dir=place.folder) as inputs:
        job = dataclasses.asdict(row) | {"config": about["config"], "folder": inputs, "epoch": EPOCH}
        job |= {"seconds": SECONDS if timed else 0, "data_dir": place.data_dir and str(place.data_dir.absolute())}
        if row.arch:
            say(f"{row}: weights, images{', float64' if checked else ''}")
            try:
                place.ask("jresnet", "make", **job, check=checked)
            except WorkerError as error:
                return dict.fromkeys(found, str(error))
        for number in range(place.rounds):
            if number and place.late:
                break
            cache = f"{inputs}/{number}" if row.task in ("first step", "compile") else "cache"  # else an old one helps
            for name in [name for name in contestants if isinstance(found[name], list)]:
                try:
                    one = once(place, row, name, cache, job | {"check": checked and number == 0})
                except WorkerError as error:
                    found[name] = str(error)
                    say(f"{row}: {name} failed: {error}")
                else:
                    found[name].append(one)
                    say(f"{row}: round {number + 1} of {place.rounds}, {name}, {one['seconds']:.4g} s")
    return found


def once(place: Workplace, row: Row, name: str, cache: str, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in a fresh process; ``seconds`` of the answer is what the row is about."""
    worker = "torch" if name in PEERS else "jresnet"
    if row.task == "import":
        timed = f"import time; began = time.perf_counter(); import {worker}; print(time.perf_counter() - began)"
        return {"seconds": answer([sys.executable, "-c", timed])}
    began = time.time()
    found = place.ask(worker, "measure", cache, contestant=name, **job)
    if row.task == "first step":
        found["seconds"] = found["first_step_at"] - began
    elif row.task == "compile":
        found["seconds"] = found["compile_seconds"]
    return found


def answer(command: list[str], **environment: str) -> Any:
    """The JSON on the last line of a command's output.

    Raises:
        WorkerError: with the last lines of what it complained about.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the worker and its children.
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
        return json.loads(texts[0][-1])
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise WorkerError(" / ".join([*texts[1][-3:], *([ended] if code < 0 or not texts[1] else [])])[-500:])


def evaluate(name: str, found: Mapping[str, Any], gflop: float, fastest: float) -> dict[str, Any]:
    """What a contestant's rounds come to.

    Args:
        name: whose.
        found: of :func:`measure`.
        gflop: 1e9 operations an image takes.
        fastest: 1e9 operations a second in a matrix product; 0: unknown.
    """
    rounds, ours = found[name], found["jresnet"]
    if isinstance(rounds, str):
        return {"failed": rounds}
    result: dict[str, Any] = {"rounds": rounds, "seconds": spread([each["seconds"] for each in rounds])}
    if "images_per_second" in rounds[0]:
        result["images_per_second"] = spread([each["images_per_second"] for each in rounds])
        if fastest:
            result["share_of_ceiling"] = result["images_per_second"]["median"] * gflop / fastest
    if name in PEERS and isinstance(ours, list):
        result["ratios"] = [its["seconds"] / our["seconds"] for our, its in zip(ours, rounds, strict=False)]
        result["ratio"] = spread(result["ratios"])
    result |= {key: rounds[0][key] for key in ("compile_seconds", "error", "note") if key in rounds[0]}
    for key in ("host_bytes", "device_bytes"):
        if key in rounds[0]:
            result[key] = statistics.median(each[key] for each in rounds)
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def line(row: Row, name: str, result: Mapping[str, Any]) -> str:
    """The Markdown table's line of a contestant."""
    if "failed" in result:
        return f"| {row} | {name} |{' - |' * (len(COLUMNS) - 4)} 0 | {result['failed'].replace('|', '/')} |"

    def of(key: str, form: str, scale: float = 1.0) -> str:
        value = result.get(key)
        if isinstance(value, Mapping):
            median, least, most = (f"{value[which] * scale:{form}}" for which in ("median", "min", "max"))
            return f"{median} ({least}-{most})"
        return "-" if value is None else f"{value * scale:{form}}"

    memory = of("host_bytes", ".0f", 2**-20) + (
        f", {of('device_bytes', '.0f', 2**-20)}" if "device_bytes" in result else ""
    )
    cells = [
        str(row), name, of("images_per_second", ".4g"), of("seconds", ".4g"), of("ratio", ".2f"),
        of("share_of_ceiling", ".0%"), of("compile_seconds", ".1f"), memory, of("error", ".1e"),
        str(len(result["rounds"])), result.get("note", ""),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def footer(report: Mapping[str, Any]) -> str:
    """What the table's columns mean, and where it was measured."""
    machine = report["hardware"]
    software = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    parts = [NOTES, f"{machine['cpu']}, {machine['cores']} cores; {machine['device']}; {software}"]
    if report["ceilings"]:
        parts.append("GEMM, 1e9 operations/s: " + ", ".join(f"{k} {v:.4g}" for k, v in report["ceilings"].items()))
    if machine["load"] > machine["cores"] / 4:
        parts.append(f"the machine was busy, load {machine['load']:.1f}: repeat this; PyTorch's threads suffer most")
    if report["left_out"]:
        parts.append("left out, as --minutes were over: " + "; ".join(report["left_out"]))
    return "\n".join(parts)


def hardware() -> dict[str, Any]:
    """The machine."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of the installed packages."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(path: Path, report: Mapping[str, Any]) -> None:
    """The old file or the new one, whole; ``jresnet.weights.write_atomically`` would bring JAX into this process."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def plot(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``scaling-SERIES.png``: images a second over batch, depth and devices."""
    from matplotlib.figure import Figure  # which draws with Agg, where pyplot chooses

    folder.mkdir(parents=True, exist_ok=True)
    for series in ("batch", "depth", "devices"):
        figure = Figure((6, 4), layout="constrained")
        axes = figure.subplots()
        for name in ("jresnet", "torch"):
            points = []
            for row in rows:
                if row["series"] == series and "rounds" in row["results"].get(name, {}):
                    x = int(re.sub(r"\D", "", row["arch"])) if series == "depth" else row[series]
                    points.append((x, *row["results"][name]["images_per_second"].values()))
                    title = f"{row['arch'] if series != 'depth' else ''} {row['size']} pixels, {row['precision']}"
            if points:
                x, median, least, most = zip(*points, strict=True)
                axes.plot(x, median, marker="o", label=name)
                axes.fill_between(x, least, most, alpha=0.2)
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, map(str, x))
        if axes.lines:
            axes.set(
                xlabel=series, ylabel="training, images/s", ylim=(0, 1.05 * axes.dataLim.ymax), title=title.strip()
            )
            axes.legend()
            figure.savefig(folder / f"scaling-{series}.png", dpi=120)


def handle_signals() -> None:
    """SIGTERM, too, ends the worker first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# What the two workers share.

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


if __name__ == "__main__":
    handle_signals()
    sys.exit(main())
