"""The documents' tables from the files under ``results/``: ``python scripts/results.py``, ``--check``, ``add RUN NAME``.

A published row is a folder ``results/NAME`` with ``row.json``, ``summary.json`` and a folder ``seed-N`` a seed with its
``config.json``, ``metrics.jsonl`` and ``summary.json``. Every figure is computed anew from the seeds' files, and nothing
is written where they contradict each other. Speeds are those of the files ``results/speed/NAME.json`` that
``scripts/benchmark.py --json`` has written; each has its place in README.md or in docs/ between ``<!-- speed/NAME -->`` and
``<!-- /speed/NAME -->``, the accuracies have theirs in README.md between ``<!-- results -->`` and ``<!-- /results -->``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_table

from jresnet.errors import InputError
from jresnet.files import write_atomically
from jresnet.reports.compare import Entry, percent, plus_minus, read_entry, read_json, spread, summarise

ROOT = Path(__file__).resolve().parent.parent
SEED_FILES = ("config.json", "metrics.jsonl", "summary.json")
EXTRAS = (".png", ".md")  # what else may lie in a row's folder
VERSIONS = {"jresnet": ("jax", "flax"), "PyTorch": ("torch",)}  # what decides a framework's figures
METRICS = ("val_accuracy", "test_accuracy")


class Claim(NamedTuple):
    """What a row is about: an accuracy after the last epoch, and of which images."""

    metric: str
    images: str


class Row(NamedTuple):
    """A published row, checked."""

    name: str  # of its folder
    title: str
    framework: str
    hardware: str
    command: str
    peer: str | None  # the name of the row it is compared with
    claims: tuple[Claim, ...]
    entry: Entry
    summary: dict[str, Any]  # of report.summarise, computed anew

    def over_seeds(self, metric: str) -> dict[str, Any]:
        """Mean, sample standard deviation and values of a metric after the last epoch."""
        return spread([run.rows[-1][metric] for run in self.entry.runs])


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Write the tables of accuracies and of speeds between their marks in README.md and docs/ from results/.",
        epilog="Exit code: 0; 1 where a folder contradicts itself or a document differs; 2 for bad options.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; print how the documents differ, if they do"
    )
    add = parser.add_subparsers(dest="verb", metavar="add").add_parser(
        "add", help="copy the small files of a finished run into results/ (add --help)"
    )
    add.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or of a run's finished seeds")
    add.add_argument("name", metavar="NAME", help="of the folder in results/")
    add.add_argument("--title", required=True, help='such as "ResNet-20, fast, 10 epochs"')
    add.add_argument("--framework", required=True, choices=VERSIONS)
    add.add_argument(
        "--metric", required=True, action="append", choices=METRICS, help="what the row shows; may be given again"
    )
    add.add_argument(
        "--images", required=True, action="append", metavar="WORDS",
        help='which images that is of, exactly, such as "CIFAR-10, 45k/5k, validation"; once for each --metric',
    )  # fmt: skip
    add.add_argument("--hardware", required=True, help='such as "2-core AMD EPYC (AVX2)"')
    add.add_argument("--command", help="what made it (default: the one in the run's files)")
    add.add_argument("--peer", metavar="NAME", help="the row it is compared with")
    add.add_argument("--force", action="store_true", help="replace results/NAME")
    return parser


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command on ``root``, the folder of README.md, docs/ and results/; returns its exit code."""
    options = parser()
    args = options.parse_args(argv)
    try:
        if args.verb == "add":
            if args.check:
                options.error("--check goes with no add")
            if len(args.metric) != len(args.images):
                options.error(f"every --metric needs its --images: got {len(args.metric)} and {len(args.images)}")
            add(args, root / "results")
            return 0
        return update(root, args.check)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1


def update(root: Path, check: bool) -> int:
    """Writes the documents' tables, or with ``check`` prints the differences; returns the exit code."""
    rows, speeds = read_rows(root / "results"), read_speeds(root / "results" / "speed")
    tables = {"results": block(rows).strip()} | speeds
    before = {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        try:
            before[path] = path.read_text()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    after, problems = dict(before), []
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        places = [path for path, text in before.items() for _ in range(max(text.count(begin), text.count(end)))]
        parts = re.split(f"{re.escape(begin)}|{re.escape(end)}", after[places[0]]) if len(places) == 1 else []
        if len(parts) != 3 or after[places[0]].index(begin) > after[places[0]].index(end):
            problems.append(
                f"README.md or a file in docs/ needs one line {begin} and after it one line {end} for a table"
            )
            continue
        after[places[0]] = f"{parts[0]}{begin}\n{table}{chr(10) * bool(table)}{end}{parts[2]}"
    for path, text in before.items():
        for mark in dict.fromkeys(re.findall(r"^<!-- /?(speed/.*) -->$", text, re.MULTILINE)):
            if mark not in tables:
                problems.append(f"{path.name} has a place for results/{mark}.json, which is not there")
    if problems:
        raise InputError("\n".join(problems))
    differing = [path for path in before if after[path] != before[path]]
    for path in differing:
        if check:
            old, new = (texts[path].splitlines(keepends=True) for texts in (before, after))
            sys.stdout.writelines(difflib.unified_diff(old, new, path.name, f"{path.name} from results/"))
        else:
            write_atomically(path, after[path].encode())
    names = ", ".join(path.name for path in differing)
    if check and differing:
        print(f"error: {names}: not what results/ says: run python scripts/results.py", file=sys.stderr)
        return 1
    said = f"wrote {names}, to say" if differing else "README.md and docs/ say"
    print(f"{said} what results/ says: {len(rows)} rows, {len(speeds)} benchmarks")
    return 0


def read_speeds(folder: Path) -> dict[str, str]:
    """The benchmarks' tables by ``speed/NAME``, in the order of their names.

    Raises:
        InputError: a line for each file that is no whole report.
    """
    found, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            found[f"speed/{path.stem}"] = benchmark_table.summary(read_json(path))
        except (InputError, LookupError, TypeError, AttributeError) as error:
            problems.append(f"results/speed/{path.name} is no report of scripts/benchmark.py --json: {error!r}")
    if problems:
        raise InputError("\n".join(problems))
    return found


def read_rows(results: Path) -> list[Row]:
    """The rows under ``results``, in the order of their folders' names.

    Raises:
        InputError: a line for everything that is wrong.
    """
    rows, problems = [], []
    folders = [folder for folder in sorted(results.glob("*")) if folder.is_dir() and not folder.name.startswith(".")]
    for folder in folders:
        if (folder / "row.json").exists() or any(folder.glob("seed-*")):
            try:
                rows.append(read_row(folder))
            except InputError as error:
                problems.append(str(error))
    by_name, names = {row.name: row for row in rows}, [folder.name for folder in folders]
    for row in rows:
        if row.peer is None:
            continue
        peer = by_name.get(row.peer)
        if peer is None:
            if row.peer not in names:  # else what is wrong with it is said already
                problems.append(f"results/{row.name}: its peer {row.peer!r} is no row")
        elif peer is row or not set(row.claims) & set(peer.claims):
            problems.append(f"results/{row.name} and its peer {row.peer!r} share no metric of the same images")
        elif _digest(row) != _digest(peer):
            problems.append(f"results/{row.name} and its peer {row.peer!r} are of different data: their digests differ")
    if problems:
        raise InputError("\n".join(problems))
    return rows


def _digest(row: Row) -> Any:
    return next(run.summary["dataset"]["digest"] for run in row.entry.runs if run.summary)


def read_row(folder: Path) -> Row:
    """A row's folder.

    Raises:
        InputError: a line for everything in it that is missing or contradicts the rest.
    """
    where = f"results/{folder.name}"
    seeds = sorted(path for path in folder.glob("seed-*") if path.is_dir())
    needed = [folder / "row.json", folder / "summary.json", *(seed / name for seed in seeds for name in SEED_FILES)]
    problems = [f"{where} has no {path.relative_to(folder)}" for path in needed if not path.is_file()]
    problems += [f"{where} has no seed-N"] if not seeds else []
    strays = sorted(path for path in folder.rglob("*") if path.is_file() and path not in needed)
    problems += [
        f"{where}: {path.relative_to(folder)} does not belong there" for path in strays if path.suffix not in EXTRAS
    ]
    if problems:
        raise InputError("\n".join(problems))

    values = read_json(folder / "row.json")
    claims = _claims(values, where)
    entry = read_entry(folder)
    unfinished = [f"{where}/seed-{run.config['seed']} is not finished" for run in entry.runs if run.summary is None]
    if unfinished:
        raise InputError("\n".join(unfinished))
    for run in entry.runs:
        problems += [f"{where}/{run.folder.name}: {problem}" for problem in _contradictions(run, claims)]
    if problems:
        raise InputError("\n".join(problems))
    summaries = [run.summary for run in entry.runs if run.summary is not None]
    summary = summarise(summaries)
    said = read_json(folder / "summary.json")
    expected = {name: summary[name] for name in ("n", "seeds", "runs", "final", "best")}
    problems += [
        f"{where}/summary.json: {problem}"
        for problem in _differences(expected, {name: said.get(name) for name in expected})
    ]
    if values.get("n", summary["n"]) != summary["n"]:
        problems.append(f"{where}/row.json says n = {values['n']}, and there are {summary['n']} seeds")
    versions = summary.get("versions")
    framework = values["framework"]
    if not isinstance(versions, dict):
        problems.append(f"{where}: the seeds' versions differ or are missing")
    elif missing := [name for name in VERSIONS[framework] if name not in versions]:
        problems.append(f"{where}/row.json says {framework}, and the seeds' versions have no {', '.join(missing)}")
    if len({str(single["dataset"]["digest"]) for single in summaries}) > 1:
        problems.append(f"{where}: the seeds' data differ: their digests do")
    if problems:
        raise InputError("\n".join(problems))
    texts = {name: values[name] for name in ("title", "framework", "hardware", "command")}
    return Row(name=folder.name, **texts, peer=values.get("peer"), claims=claims, entry=entry, summary=summary)


def _claims(values: dict[str, Any], where: str) -> tuple[Claim, ...]:
    """What ``row.json`` claims; raises InputError where it says too little, too much or something else."""
    listed = values.get("metrics", [{name: values.get(name) for name in ("metric", "images")}])
    known = {"title", "framework", "hardware", "command", "peer", "n", "metrics", "metric", "images"}
    if "metrics" in values:
        known -= {"metric", "images"}
    problems = [f"unknown field {name!r}" for name in sorted(values.keys() - known)]
    texts = {name: values.get(name) for name in ("title", "framework", "hardware", "command")}
    if "peer" in values:
        texts["peer"] = values["peer"]
    if not isinstance(listed, list) or not listed or not all(isinstance(claim, dict) for claim in listed):
        problems, listed = [*problems, "metrics is no list of {metric, images}"], []
    for claim in listed:
        texts["images"] = claim.get("images")
        if claim.get("metric") not in METRICS:
            problems.append(f"metric must be {' or '.join(METRICS)}, got {claim.get('metric')!r}")
        problems += [
            f"{name} must be text of one line, got {text!r}"
            for name, text in texts.items()
            if not (isinstance(text, str) and text.strip() and text.isprintable())
        ]
        texts = {}
    if values.get("framework") not in VERSIONS:
        problems.append(f"framework must be {' or '.join(VERSIONS)}, got {values.get('framework')!r}")
    if problems:
        raise InputError("\n".join(f"{where}/row.json: {problem}" for problem in problems))
    return tuple(Claim(claim["metric"], claim["images"]) for claim in listed)


def _contradictions(run: Any, claims: tuple[Claim, ...]) -> list[str]:
    """Where a seed's summary.json says anything but what its metrics.jsonl does."""
    summary, rows = run.summary, run.rows
    problems = [f"summary.json has no {part}" for part in ("final", "best", "dataset")
                if not isinstance(summary.get(part), dict)]  # fmt: skip
    if problems:
        return problems
    if not summary["dataset"].get("digest"):
        problems.append("summary.json: dataset has no digest")
    if summary.get("seed") != run.config["seed"]:
        problems.append(f"summary.json is of seed {summary.get('seed')!r}")
    for part in ("final", "best"):
        epoch = summary[part].get("epoch")
        if not isinstance(epoch, int) or not 1 <= epoch <= len(rows) or (part == "final" and epoch != len(rows)):
            problems.append(f"summary.json: {part} is of epoch {epoch!r} of {len(rows)}")
            continue
        row = rows[epoch - 1]
        problems += [
            f"summary.json: {part} {problem}, in metrics.jsonl"
            for problem in _differences({name: row.get(name) for name in summary[part]}, summary[part])
        ]
    for metric in ("train_loss", *(claim.metric for claim in claims)):
        if not isinstance(rows[-1].get(metric), int | float):
            problems.append(f"metrics.jsonl has no {metric} of the last epoch")
        elif metric not in summary["final"]:
            problems.append(f"summary.json: final has no {metric}")
    return problems


def _differences(expected: Any, said: Any, name: str = "") -> list[str]:
    """Where two JSON values differ by more than rounding; one image of 10,000 more or less is a difference."""
    if isinstance(expected, dict) and isinstance(said, dict):
        keys = [*expected, *(key for key in said if key not in expected)]
        parts = [(f"{name}.{key}".lstrip("."), expected.get(key), said.get(key)) for key in keys]
    elif isinstance(expected, list) and isinstance(said, list) and len(expected) == len(said):
        parts = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(expected, said, strict=True))]
    else:
        numbers = all(isinstance(value, int | float) for value in (expected, said))
        same = math.isclose(expected, said, rel_tol=1e-6, abs_tol=1e-9) if numbers else expected == said
        return [] if same else [f"{name} is {said}, but {expected}"]
    return [problem for part, wanted, found in parts for problem in _differences(wanted, found, part)]


def block(rows: list[Row]) -> str:
    """What stands between the marks in README.md."""
    if not rows:
        return ""
    columns = ["run", "framework", "images", "accuracy", "n", "train loss", "hardware", "versions", "files"]
    table = [columns, ["---"] * len(columns)]
    for row in rows:
        versions = row.summary["versions"]
        named = ", ".join(f"{name} {versions[name]}" for name in VERSIONS[row.framework])
        for claim in row.claims:
            table.append([
                row.title, row.framework, claim.images, plus_minus(row.over_seeds(claim.metric), percent, " %"),
                str(row.summary["n"]), plus_minus(row.over_seeds("train_loss"), "{:.4f}".format),
                f"{row.hardware}, {row.entry.config['precision']}",
                f"Python {versions['python']}, {named}" if "python" in versions else named,
                f"[{row.name}](results/{row.name})",
            ])  # fmt: skip
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in table]
    lines += ["", "Accuracy and training loss after the last epoch: mean ± sample standard deviation over n seeds."]
    differences = [line for row in rows for line in _peer_lines(row, rows)]
    lines += ["", *differences] if differences else []
    lines += ["", "<details><summary>The commands</summary>", ""]
    lines += [f"* {row.title}, {row.framework}: `{row.command}`" for row in rows]
    return "\n".join([*lines, "", "</details>", ""])


def _peer_lines(row: Row, rows: list[Row]) -> list[str]:
    """A line on the difference to the row's peer for each metric that both have; a pair is compared once."""
    by_name = {other.name: other for other in rows}
    if row.peer is None or (by_name[row.peer].peer == row.name and row.peer < row.name):
        return []
    peer, lines = by_name[row.peer], []
    for claim in row.claims:
        if claim not in peer.claims:
            continue
        ours, theirs = (which.over_seeds(claim.metric) for which in (row, peer))
        counts = len(ours["values"]), len(theirs["values"])
        difference = 100 * (ours["mean"] - theirs["mean"])
        if None in (ours["std"], theirs["std"]):
            error = " points; one seed has no standard error"
        else:
            # Of two independent means with variances of their own (Welch 1947).
            squares = [found["std"] ** 2 / n for found, n in zip((ours, theirs), counts, strict=True)]
            error = f" ± standard error {100 * math.sqrt(sum(squares)):.2f} points"
        lines.append(
            f"* {row.title}, {row.framework} (n = {counts[0]}) less {peer.title}, {peer.framework} (n = {counts[1]}), "
            f"{claim.images}: difference of the means {difference:+.2f}{error}"
        )
    return lines


def add(args: argparse.Namespace, results: Path) -> None:
    """Copies a finished run's small files into ``results``, checked as a row; whole or not at all.

    Raises:
        InputError: where the run is not finished or contradicts itself, or the name is taken.
    """
    target = results / args.name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name, re.ASCII):
        raise InputError(f"NAME must be letters, digits, '.', '_' and '-', got {args.name!r}")
    if target.exists() and not args.force:
        raise InputError(f"{target} exists: --force replaces it")
    entry = read_entry(args.run)
    summaries = [run.summary for run in entry.runs if run.summary is not None]
    if entry.state != "finished":
        raise InputError(f"{args.run} is not finished ({entry.state}): finish it with --resume first")
    summary = summarise(summaries)
    command = args.command or summary.get("command")
    if command is None:
        raise InputError("the seeds were made by different commands: give one with --command")
    claims = [{"metric": metric, "images": images} for metric, images in zip(args.metric, args.images, strict=True)]
    values: dict[str, Any] = {"title": args.title, "framework": args.framework}
    values |= claims[0] if len(claims) == 1 else {"metrics": claims}
    values |= {"n": summary["n"], "command": command, "hardware": args.hardware}
    values |= {"peer": args.peer} if args.peer else {}

    try:
        results.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=results, prefix=".add-") as scratch:
            made = Path(scratch) / args.name
            for run in entry.runs:
                seed = made / f"seed-{run.config['seed']}"
                seed.mkdir(parents=True)
                for name in SEED_FILES:
                    shutil.copyfile(run.folder / name, seed / name)
            for name, content in (("row.json", values), ("summary.json", summary)):
                write_atomically(made / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
            read_row(made)
            if target.exists():
                target.rename(Path(scratch) / "old")
            made.rename(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    print(f"wrote {target}, {summary['n']} seeds; python scripts/results.py puts it into README.md")


if __name__ == "__main__":
    sys.exit(main())
