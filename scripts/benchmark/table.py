"""What the benchmark makes of its measurements: statistics, tables and plots."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = ("torch", "torch-compile", "timm")
SERIES = ("batch", "depth", "devices")  # of the scaling suite
PLOTS = tuple(f"scaling-{series}.png" for series in SERIES)
COLUMNS = "what", "framework", "images/s", "seconds", "ratio", "GEMM", "compile s", "memory MiB", "error", "n", "note"
NOTES = """
images/s, seconds (of a step, of an epoch, or until what was named was done), ratio (jresnet's speed over this one's, round
by round): median (least-most) of n rounds. GEMM: share of the fastest large matrix product measured here, operations counted
from the shapes, training as three forward passes. compile: in the first round. memory: peak of the process, and of the
device. error: relative L2 distance to float64, of the logits (inference) or the whole gradient (training)."""


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
    result: dict[str, Any] = {"rounds": rounds, "seconds": middle([each["seconds"] for each in rounds])}
    if "images_per_second" in rounds[0]:
        result["images_per_second"] = middle([each["images_per_second"] for each in rounds])
        if fastest:
            result["share_of_ceiling"] = result["images_per_second"]["median"] * gflop / fastest
    if name in PEERS and isinstance(ours, list):
        result["ratios"] = [its["seconds"] / our["seconds"] for our, its in zip(ours, rounds, strict=False)]
        result["ratio"] = middle(result["ratios"])
    result |= {key: rounds[0][key] for key in ("compile_seconds", "error", "note") if key in rounds[0]}
    for key in ("host_bytes", "device_bytes"):
        if key in rounds[0]:
            result[key] = statistics.median(each[key] for each in rounds)
    return result


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def head() -> str:
    """The first two lines of the table that the command prints."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(what: str, name: str, result: Mapping[str, Any]) -> str:
    """The line of a contestant in the table that the command prints.

    Args:
        what: was measured.
        name: of whom.
        result: of :func:`evaluate`.
    """
    if "failed" in result:
        return f"| {what} | {name} |{' - |' * (len(COLUMNS) - 4)} 0 | {result['failed'].replace('|', '/')} |"

    cells = [
        what, name, show(result, "images_per_second", ".4g"), show(result, "seconds", ".4g"), show(result, "ratio", ".2f"),
        show(result, "share_of_ceiling", ".0%"), show(result, "compile_seconds", ".1f"), memory(result),
        show(result, "error", ".1e"), str(len(result["rounds"])), result.get("note", ""),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def show(result: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    """A figure, with least and most where it has them; a dash where there is none."""
    value = result.get(key)
    if isinstance(value, Mapping):
        median, least, most = (f"{value[which] * scale:{form}}" for which in ("median", "min", "max"))
        return f"{median} ({least}-{most})"
    return "-" if value is None else f"{value * scale:{form}}"


def memory(result: Mapping[str, Any]) -> str:
    """MiB of the process, and of the device."""
    parts = [show(result, key, ".0f", 2**-20) for key in ("host_bytes", "device_bytes") if key in result]
    return ", ".join(parts) or "-"


def place(report: Mapping[str, Any]) -> str:
    """Where it was measured, with what, and how fast a matrix product is there."""
    machine = report["hardware"]
    software = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    ceilings = ", ".join(f"{name} {found:.4g}" for name, found in report["ceilings"].items())
    about = [machine["cpu"], f"{machine['cores']} cores", *machine.get("instructions", ())]
    about += ["huge pages"] if machine.get("huge_pages") else []
    where = f"{', '.join(about)}; {machine['device']}; {software}"
    return where + (f"; GEMM, 1e9 operations/s: {ceilings}" if ceilings else "")


def footer(report: Mapping[str, Any]) -> str:
    """What stands below the table that the command prints."""
    machine, parts = report["hardware"], [NOTES, place(report)]
    if machine["load"] > machine["cores"] / 4:
        parts.append(f"the machine was busy, load {machine['load']:.1f}: repeat this; PyTorch's threads suffer most")
    if report["left_out"]:
        parts.append("left out, as --minutes were over: " + "; ".join(report["left_out"]))
    return "\n".join(parts)


def summary(report: Mapping[str, Any]) -> str:
    """A report as the README shows it: of each thing measured a line with jresnet's figures and the ratios to its peers."""
    peers = [name for name in PEERS if any("ratio" in row["results"].get(name, {}) for row in report["rows"])]
    columns = ["", "jresnet", "of GEMM", *(f"to {name}" for name in peers)]
    columns += [f"MiB, beside {peers[0]}", f"error, beside {peers[0]}"] if peers else ["MiB", "error"]
    table = [columns, ["---"] * len(columns)]
    for row in report["rows"]:
        ours, beside = row["results"]["jresnet"], row["results"].get(peers[0], {}) if peers else {}
        unit = ("images_per_second", ".4g", " images/s") if "images_per_second" in ours else ("seconds", ".3g", " s")
        speeds = []
        for name, found in row["results"].items():  # what takes seconds can be had warm, too
            if name.startswith("jresnet") and "failed" not in found:
                note = f" ({found['note']})" if unit[0] == "seconds" and "note" in found else ""
                who = "" if name == "jresnet" else name.removeprefix("jresnet, ") + ": "
                speeds.append(who + show(found, *unit[:2]) + unit[2] + note)
        pairs = [[memory(found), show(found, "error", ".1e")] for found in ([ours, beside] if peers else [ours])]
        table.append([
            row["what"], "; ".join(speeds) if "failed" not in ours else "-", show(ours, "share_of_ceiling", ".0%"),
            *(show(row["results"].get(name, {}), "ratio", ".2f") for name in peers),
            *(" / ".join(figures) for figures in zip(*pairs, strict=True)),
        ])  # fmt: skip
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*lines, "", f"`{report['command']}`, {report['date'][:10]}: {place(report)}."])


def plot(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``scaling-SERIES.png``: images a second over batch, depth and devices."""
    from matplotlib.figure import Figure  # which draws with Agg, where pyplot chooses

    folder.mkdir(parents=True, exist_ok=True)
    for series, file in zip(SERIES, PLOTS, strict=True):
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
            figure.savefig(folder / file, dpi=120)
