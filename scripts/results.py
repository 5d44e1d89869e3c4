"""Generate tables from the files under ``results/``: ``python scripts/results.py``, ``--check``, ``add RUN NAME``.

A published row is a folder ``results/NAME`` with ``row.json``, which describes it, and one folder ``seed-N`` per seed with
``config.json``, ``metrics.jsonl`` and ``summary.json``. Every figure is computed from the metrics. The table of rows is
written between ``<!-- results -->`` and ``<!-- /results -->`` in README.md and under docs/. Tables of speeds come from
``results/speed/NAME.json``, which ``scripts/benchmark.py --json`` writes, and are written between ``<!-- speed/NAME -->``
and ``<!-- /speed/NAME -->``.
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

from benchmark import table

from jresnet.commands import failed, guarded
from jresnet.commands.flags import Parser, folder
from jresnet.errors import InputError
from jresnet.files import write_atomically
from jresnet.reports.compare import Entry, percent, plus_minus, read_entry, read_json, spread, summarise

ROOT = Path(__file__).resolve().parent.parent
SEED_FILES = ("config.json", "metrics.jsonl", "summary.json")
VERSIONS = {"jresnet": ("jax", "flax"), "PyTorch": ("torch",)}  # packages whose versions a row shows
MAX_WORDS = 1000  # characters of a cell; commands are the longest cells
METRICS = ("val_accuracy", "test_accuracy")


class Claim(NamedTuple):
    """A published figure: an accuracy after the last epoch, and the images it was measured on."""

    metric: str
    images: str


class Row(NamedTuple):
    """A published row."""

    name: str  # name of the folder
    title: str
    framework: str
    hardware: str
    command: str
    peer: str | None  # name of the row that it is compared with
    claims: tuple[Claim, ...]
    entry: Entry
    versions: dict[str, str]
    digest: str  # digest of the data set

    def over_seeds(self, metric: str) -> dict[str, Any]:
        """Mean, sample standard deviation and values of a metric after the last epoch."""
        return spread([run.rows[-1][metric] for run in self.entry.runs])


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Generate the tables of accuracies and speeds in README.md and docs/ from results/.",
        epilog="Exit codes: 0 success; 1 unusable results, or --check found a difference; 2 wrong options.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; print the differences and fail if there are any"
    )
    add = parser.add_subparsers(dest="verb", metavar="add").add_parser(
        "add", help="copy the small files of a finished run into results/ (add --help)"
    )
    add.add_argument("run", type=folder, metavar="RUN", help="folder of a finished run, with one or several seeds")
    add.add_argument("name", metavar="NAME", help="name of the folder in results/")
    add.add_argument("--title", required=True, type=words, help='such as "ResNet-20, fast, 10 epochs"')
    add.add_argument("--framework", required=True, choices=VERSIONS)
    add.add_argument(
        "--metric", required=True, action="append", choices=METRICS, help="metric that the row shows; can be repeated"
    )
    add.add_argument(
        "--images", required=True, action="append", metavar="WORDS", type=words,
        help='images that the metric was measured on, such as "CIFAR-10, 45k/5k, validation"; once for each --metric',
    )  # fmt: skip
    add.add_argument("--hardware", required=True, type=words, help='such as "2-core AMD EPYC (AVX2)"')
    add.add_argument("--command", type=words, help="command that produced the run (default: the one in its files)")
    add.add_argument("--peer", metavar="NAME", type=words, help="row to compare it with")
    add.add_argument("--force", action="store_true", help="replace results/NAME")
    return parser


def words(text: str) -> str:
    """Checks an argument that becomes a cell of a table."""
    if not text.strip() or not text.isprintable() or len(text) > MAX_WORDS:
        raise argparse.ArgumentTypeError(
            f"expected one line of 1 to {MAX_WORDS:,} printable characters, got {text!r:.80}"
        )
    return text


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command on ``root``, the folder of README.md, docs/ and results/; returns its exit code."""
    options = parser()
    args = options.parse_args(argv)
    try:
        if args.verb == "add":
            if len(args.metric) != len(args.images):
                options.error(f"every --metric needs its --images: got {len(args.metric)} and {len(args.images)}")
            add(args, root / "results")
            return 0
        return update(root, args.check)
    except InputError as error:
        for line in str(error).splitlines():
            failed(line)
        return 1


def update(root: Path, check: bool) -> int:
    """Writes the documents' tables, or with ``check`` prints the differences; returns the exit code."""
    tables = {"results": block(read_rows(root / "results"))} | read_speeds(root / "results" / "speed")
    documents = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    before = {path: path.read_text() for path in documents}
    after, problems = dict(before), []
    for name, text in tables.items():
        marks = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        places = [path for path in documents for _ in marks.findall(before[path])]
        if not places or len(places) != len({*places}):
            problems.append(
                f"the table {name} needs the lines <!-- {name} --> and <!-- /{name} --> in README.md or a page under docs/, "
                f"once per page: found {len(places)}"
            )
            continue
        for path in places:
            here = text if path.parent == root else of_the_site(text)
            after[path] = marks.sub(lambda found, here=here: found[1] + here + found[2], after[path])
    for path in documents:
        for name in re.findall(r"^<!-- (speed/.*) -->$", before[path], re.MULTILINE):
            if name not in tables:
                problems.append(f"{path.name} has the line <!-- {name} -->, but results/{name}.json does not exist")
    if problems:
        raise InputError("\n".join(problems))
    differing = [path for path in documents if after[path] != before[path]]
    for path in differing:
        if check:
            old, new = (texts[path].splitlines(keepends=True) for texts in (before, after))
            sys.stdout.writelines(difflib.unified_diff(old, new, path.name, f"{path.name} from results/"))
        else:
            write_atomically(path, after[path].encode())
    names = ", ".join(path.name for path in differing)
    if check and differing:
        print(f"error: outdated: {names}: run python scripts/results.py", file=sys.stderr)
        return 1
    print(f"wrote {names}" if differing else "README.md and docs/ are up to date")
    return 0


def of_the_site(text: str) -> str:
    """The table for a page under docs/: without links to results/, which the site does not contain, and without details."""
    text = re.sub(r"\[[^]]+\]\((results/[^)]+)\)", r"`\1`", text)
    return text.replace("<details><summary>The commands</summary>", "The commands:").replace("\n</details>\n", "")


def read_speeds(folder: Path) -> dict[str, str]:
    """The benchmarks' tables by ``speed/NAME``.

    Raises:
        InputError: some files are not complete reports; one line per file.
    """
    found, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            found[f"speed/{path.stem}"] = table.summary(read_json(path)) + "\n"
        except (InputError, LookupError, TypeError, AttributeError) as error:
            problems.append(
                f"results/speed/{path.name} is not a complete report of scripts/benchmark.py --json: {error!r}"
            )
    if problems:
        raise InputError("\n".join(problems))
    return found


def read_rows(results: Path) -> list[Row]:
    """The rows under ``results``, in the order of their folders' names.

    Raises:
        InputError: some rows are invalid; one line per problem.
    """
    rows, problems = {}, []
    for path in sorted(results.glob("[!.]*/row.json")):
        try:
            rows[path.parent.name] = read_row(path.parent)
        except InputError as error:
            problems += [f"results/{path.parent.name}: {line}" for line in str(error).splitlines()]
    for row in rows.values():
        peer = rows.get(row.peer or "")
        if row.peer and (
            peer is None or peer is row or peer.digest != row.digest or not {*row.claims} & {*peer.claims}
        ):
            problems.append(
                f"results/{row.name}: its peer {row.peer!r} must be another row, of the same data, "
                "with a metric of the same images"
            )
    if problems:
        raise InputError("\n".join(problems))
    return list(rows.values())


def read_row(folder: Path) -> Row:
    """Reads a row from its folder.

    Raises:
        InputError: a file is missing or invalid, the run is not finished, or the seeds are inconsistent.
    """
    values, entry = read_json(folder / "row.json"), read_entry(folder)
    try:
        texts = {name: values[name] for name in ("title", "framework", "hardware", "command")}
        claims = tuple(Claim(claim["metric"], claim["images"]) for claim in values["metrics"])
        needed = VERSIONS[texts["framework"]]
    except (LookupError, TypeError) as error:
        raise InputError(f"row.json is incomplete or invalid: {error!r}") from error
    if entry.state != "finished":
        raise InputError(f"the run is not finished: {entry.state}")
    for metric in ("train_loss", *(claim.metric for claim in claims)):
        if any(not isinstance(run.rows[-1].get(metric), int | float) for run in entry.runs):
            raise InputError(f"a seed has no {metric} for the last epoch")
    summary = summarise([run.summary for run in entry.runs if run.summary is not None])
    versions, dataset = summary.get("versions", {}), summary.get("dataset", {})
    if missing := [name for name in needed if name not in versions]:
        raise InputError(f"the seeds' versions of {', '.join(missing)} are missing or differ")
    if not dataset.get("digest"):
        raise InputError("the digests of the seeds' data are missing or differ")
    return Row(
        name=folder.name, **texts, peer=values.get("peer"), claims=claims, entry=entry, versions=versions,
        digest=dataset["digest"],
    )  # fmt: skip


def block(rows: list[Row]) -> str:
    """The text between the marks in README.md."""
    if not rows:
        return ""
    columns = ["run", "framework", "images", "accuracy", "n", "train loss", "hardware", "versions", "files"]
    cells = [columns, ["---"] * len(columns)]
    for row in rows:
        named = [f"{name} {row.versions[name]}" for name in VERSIONS[row.framework]]
        for claim in row.claims:
            cells.append([
                row.title, row.framework, claim.images, plus_minus(row.over_seeds(claim.metric), percent, " %"),
                str(len(row.entry.runs)), plus_minus(row.over_seeds("train_loss"), "{:.4f}".format),
                f"{row.hardware}, {row.entry.config['precision']}",
                ", ".join([f"Python {row.versions['python']}"] * ("python" in row.versions) + named),
                f"[{row.name}](results/{row.name})",
            ])  # fmt: skip
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in cells]
    lines += ["", "Accuracy and training loss after the last epoch: mean ± sample standard deviation over n seeds."]
    differences = [line for row in rows for line in _peer_lines(row, rows)]
    lines += ["", *differences] if differences else []
    lines += ["", "<details><summary>The commands</summary>", ""]
    lines += [f"* {row.title}, {row.framework}: `{row.command}`" for row in rows]
    return "\n".join([*lines, "", "</details>", ""])


def _peer_lines(row: Row, rows: list[Row]) -> list[str]:
    """One line on the difference to the row's peer per common metric. Each pair of rows is compared once."""
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
            error = " points; no standard error, as one side has one seed"
        else:
            # Standard error of the difference of two means with unequal variances (Welch 1947).
            squares = [found["std"] ** 2 / n for found, n in zip((ours, theirs), counts, strict=True)]
            error = f" ± standard error {100 * math.sqrt(sum(squares)):.2f} points"
        lines.append(
            f"* {row.title}, {row.framework} (n = {counts[0]}) minus {peer.title}, {peer.framework} (n = {counts[1]}), "
            f"{claim.images}: difference of the means {difference:+.2f}{error}"
        )
    return lines


def add(args: argparse.Namespace, results: Path) -> None:
    """Copies the small files of a finished run into ``results`` and checks them as a row; copies nothing on an error.

    Raises:
        InputError: the run is not finished, the row is invalid, or the name is taken.
    """
    target = results / args.name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{,99}", args.name, re.ASCII):
        raise InputError(f"NAME must be letters, digits, '.', '_' and '-', at most 100, got {args.name!r:.80}")
    if target.exists() and not args.force:
        raise InputError(f"{target} exists: --force replaces it")
    entry = read_entry(args.run)
    if entry.state != "finished":
        raise InputError(f"{args.run} is not finished ({entry.state}): finish it with --resume first")
    summary = summarise([run.summary for run in entry.runs if run.summary is not None])
    command = args.command or summary.get("command")
    if command is None:
        raise InputError("the commands of the seeds differ: give one with --command")
    claims = [{"metric": metric, "images": images} for metric, images in zip(args.metric, args.images, strict=True)]
    values = {"title": args.title, "framework": args.framework, "metrics": claims, "n": summary["n"]}
    values |= {"command": command, "hardware": args.hardware} | ({"peer": args.peer} if args.peer else {})
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
    print(f"wrote {target}, {summary['n']} seeds; python scripts/results.py adds it to the tables")


if __name__ == "__main__":
    sys.exit(guarded(main, "results.py"))
