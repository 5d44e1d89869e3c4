"""Statistics, tables and plots of the benchmark's measurements."""

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
images/s, seconds, ratio: median (minimum-maximum) of n rounds. seconds: per step, per epoch, or of the whole task. ratio:
jresnet's speed divided by this framework's in the same round. GEMM: rate of operations as a share of the fastest large
matrix product measured here; operations are counted from the shapes, a training step as three forward passes. compile s: in
the first round. memory MiB: peak of the process, and of the device. error: relative L2 distance to float64, of the logits
(inference) or the whole gradient (training)."""


def evaluate(name: str, found: Mapping[str, Any], gflop: float, fastest: float) -> dict[str, Any]:
    """Statistics of a contestant's rounds.

    Args:
        name: name of the contestant.
        found: result of :func:`measure`.
        gflop: operations per image, in 1e9.
        fastest: rate of the fastest matrix product, in 1e9 operations per second; 0: unknown.
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
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def head() -> str:
    """The first two lines of the printed table."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(what: str, name: str, result: Mapping[str, Any]) -> str:
    """A contestant's line of the printed table.

    Args:
        what: what was measured.
        name: name of the contestant.
        result: result of :func:`evaluate`.
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
    """Formats a figure, with minimum and maximum if it has them; a dash if it is missing."""
    value = result.get(key)
    if isinstance(value, Mapping):
        median, least, most = (f"{value[which] * scale:{form}}" for which in ("median", "min", "max"))
        return f"{median} ({least}-{most})"
    return "-" if value is None else f"{value * scale:{form}}"


def memory(result: Mapping[str, Any]) -> str:
    """Memory of the process and of the device, in MiB."""
    parts = [show(result, key, ".0f", 2**-20) for key in ("host_bytes", "device_bytes") if key in result]
    return ", ".join(parts) or "-"


def place(report: Mapping[str, Any]) -> str:
    """Describes the machine, the versions, and the rates of a matrix product."""
    machine = report["hardware"]
    software = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    ceilings = ", ".join(f"{name} {found:.4g}" for name, found in report["ceilings"].items())
    about = [machine["cpu"], f"{machine['cores']} cores", *machine.get("instructions", ())]
    about += ["huge pages"] if machine.get("huge_pages") else []
    where = f"{', '.join(about)}; {machine['device']}; {software}"
    return where + (f"; GEMM, 1e9 operations/s: {ceilings}" if ceilings else "")


def footer(report: Mapping[str, Any]) -> str:
    """The text below the printed table."""
    machine, parts = report["hardware"], [NOTES, place(report)]
    if machine["load"] > machine["cores"] / 4:
        parts.append(
            f"load {machine['load']:.1f}: measure again without other load, which slows PyTorch's threads most"
        )
    if report["left_out"]:
        parts.append("left out because of the time limit --minutes: " + "; ".join(report["left_out"]))
    return "\n".join(parts)


def summary(report: Mapping[str, Any]) -> str:
    """A report as README.md and docs/ show it: one line per row with jresnet's figures and the ratios to its peers."""
    peers = [name for name in PEERS if any("ratio" in row["results"].get(name, {}) for row in report["rows"])]
    columns = ["", "jresnet", "of GEMM", *(f"to {name}" for name in peers)]
    columns += [f"MiB, jresnet / {peers[0]}", f"error, jresnet / {peers[0]}"] if peers else ["MiB", "error"]
    table = [columns, ["---"] * len(columns)]
    for row in report["rows"]:
        ours, beside = row["results"]["jresnet"], row["results"].get(peers[0], {}) if peers else {}
        unit = ("images_per_second", ".4g", " images/s") if "images_per_second" in ours else ("seconds", ".3g", " s")
        speeds = []
        for name, found in row["results"].items():  # tasks in seconds may have a cached variant
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
    """Draws ``scaling-SERIES.png``: images per second over batch size, depth and number of devices."""
    from matplotlib.figure import Figure  # always draws with Agg; pyplot would choose a backend

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
