"""The documents' tables from the files under ``results/``: ``python scripts/results.py``, ``--check``, ``add RUN NAME``.

A published row is a folder ``results/NAME`` with ``row.json``, which says what it is about, and a folder ``seed-N`` a seed
with its ``config.json``, ``metrics.jsonl`` and ``summary.json``; every figure is computed from the metrics. The table's
places are in README.md and under docs/, between ``<!-- results -->`` and ``<!-- /results -->``. Speeds are those of
``results/speed/NAME.json``, which ``scripts/benchmark.py --json`` writes; the places of each are between
``<!-- speed/NAME -->`` and ``<!-- /speed/NAME -->``.
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
VERSIONS = {"jresnet": ("jax", "flax"), "PyTorch": ("torch",)}  # what decides a framework's figures
MAX_WORDS = 1000  # letters of a cell; commands are the longest
METRICS = ("val_accuracy", "test_accuracy")


class Claim(NamedTuple):
    """What a row is about: an accuracy after the last epoch, and of which images."""

    metric: str
    images: str


class Row(NamedTuple):
    """A published row."""

    name: str  # of its folder
    title: str
    framework: str
    hardware: str
    command: str
    peer: str | None  # the name of the row it is compared with
    claims: tuple[Claim, ...]
    entry: Entry
    versions: dict[str, str]
    digest: str  # of the data

    def over_seeds(self, metric: str) -> dict[str, Any]:
        """Mean, sample standard deviation and values of a metric after the last epoch."""
        return spread([run.rows[-1][metric] for run in self.entry.runs])


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = Parser(
        description="Write the tables of accuracies and of speeds between their marks in README.md and docs/ from results/.",
        epilog="Exit code: 0; 1 where a row cannot be read or a document differs; 2 for bad options.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; print how the documents differ, if they do"
    )
    add = parser.add_subparsers(dest="verb", metavar="add").add_parser(
        "add", help="copy the small files of a finished run into results/ (add --help)"
    )
    add.add_argument("run", type=folder, metavar="RUN", help="folder of a finished run, or of a run's finished seeds")
    add.add_argument("name", metavar="NAME", help="of the folder in results/")
    add.add_argument("--title", required=True, type=words, help='such as "ResNet-20, fast, 10 epochs"')
    add.add_argument("--framework", required=True, choices=VERSIONS)
    add.add_argument(
        "--metric", required=True, action="append", choices=METRICS, help="what the row shows; may be given again"
    )
    add.add_argument(
        "--images", required=True, action="append", metavar="WORDS", type=words,
        help='which images that is of, exactly, such as "CIFAR-10, 45k/5k, validation"; once for each --metric',
    )  # fmt: skip
    add.add_argument("--hardware", required=True, type=words, help='such as "2-core AMD EPYC (AVX2)"')
    add.add_argument("--command", type=words, help="what made it (default: the one in the run's files)")
    add.add_argument("--peer", metavar="NAME", type=words, help="the row it is compared with")
    add.add_argument("--force", action="store_true", help="replace results/NAME")
    return parser


def words(text: str) -> str:
    """An argument that becomes a cell of a table."""
    if not text.strip() or not text.isprintable() or len(text) > MAX_WORDS:
        raise argparse.ArgumentTypeError(f"expected a line of 1 to {MAX_WORDS:,} printable letters, got {text!r:.80}")
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
                f"{name} has {len(places)} places: one is needed, in README.md or under docs/, between the lines "
                f"<!-- {name} --> and <!-- /{name} -->; a document has it once"
            )
            continue
        for path in places:
            here = text if path.parent == root else of_the_site(text)
            after[path] = marks.sub(lambda found, here=here: found[1] + here + found[2], after[path])
    for path in documents:
        for name in re.findall(r"^<!-- (speed/.*) -->$", before[path], re.MULTILINE):
            if name not in tables:
                problems.append(f"{path.name} has a place for results/{name}.json, which is not there")
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
        print(f"error: {names}: not what results/ says: run python scripts/results.py", file=sys.stderr)
        return 1
    print(f"wrote {names}" if differing else "README.md and docs/ say what results/ says")
    return 0


def of_the_site(text: str) -> str:
    """A table as a page under docs/ has it, where results/ is not at hand to be linked, and nothing is folded."""
    text = re.sub(r"\[[^]]+\]\((results/[^)]+)\)", r"`\1`", text)
    return text.replace("<details><summary>The commands</summary>", "The commands:").replace("\n</details>\n", "")


def read_speeds(folder: Path) -> dict[str, str]:
    """The benchmarks' tables by ``speed/NAME``.

    Raises:
        InputError: a line for each file that is no whole report.
    """
    found, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            found[f"speed/{path.stem}"] = table.summary(read_json(path)) + "\n"
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
    """A row's folder.

    Raises:
        InputError: something in it is missing, not finished, or does not go together.
    """
    values, entry = read_json(folder / "row.json"), read_entry(folder)
    try:
        texts = {name: values[name] for name in ("title", "framework", "hardware", "command")}
        claims = tuple(Claim(claim["metric"], claim["images"]) for claim in values["metrics"])
        needed = VERSIONS[texts["framework"]]
    except (LookupError, TypeError) as error:
        raise InputError(f"row.json lacks something, or it is wrong: {error!r}") from error
    if entry.state != "finished":
        raise InputError(f"is not finished: {entry.state}")
    for metric in ("train_loss", *(claim.metric for claim in claims)):
        if any(not isinstance(run.rows[-1].get(metric), int | float) for run in entry.runs):
            raise InputError(f"a seed has no {metric} of the last epoch")
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
    """What stands between the marks in README.md."""
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
    """Copies a finished run's small files into ``results``, read back as a row; whole or not at all.

    Raises:
        InputError: where the run is not finished, or the name is taken.
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
        raise InputError("the seeds were made by different commands: give one with --command")
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
    print(f"wrote {target}, {summary['n']} seeds; python scripts/results.py puts it into README.md")


if __name__ == "__main__":
    sys.exit(guarded(main, "results.py"))
