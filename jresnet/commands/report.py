"""Compare training runs in a table and a plot: ``jresnet report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jresnet.commands.flags import Parser, check_output, folder
from jresnet.errors import InputError
from jresnet.files import shown
from jresnet.reports import plots
from jresnet.reports.compare import cells, figures, read_entries, text_table


def parser(prog: str = "jresnet report") -> argparse.ArgumentParser:
    """The command line's options; ``prog`` is what the command calls itself."""
    parser = Parser(
        prog=prog,
        description="Compare training runs in a table and a plot.",
        epilog="Figures are those of the last epoch; of several seeds mean ± sample standard deviation over the finished "
        "ones (over all at the same epoch where none is finished), images/s and time the mean of a seed. Exit code: 0; 1 "
        "for folders that are no run's or have a damaged file; 2 for bad options.",
    )
    parser.add_argument(
        "runs", nargs="+", type=folder, metavar="RUN", help="folder of a run, finished or not, or of a run's seeds"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png",
        help="training loss and accuracy by epoch (default: comparison.png, where there is none yet)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the plot where it exists")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the table (text)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet report") -> int:
    """Runs the command; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    plot, refused = args.plot or Path("comparison.png"), ""
    if plot.suffix.lower() != ".png":
        options.error(f"--plot writes PNG, so its file's name must end in .png, got {str(plot)!r}")
    try:
        try:
            check_output(plot, args.force, "--plot")
        except InputError as error:
            if args.plot:
                raise
            refused = str(error)  # the table is what was asked for
        entries = read_entries(args.runs)
        found = [figures(entry) for entry in entries]
        if args.format == "json":
            print(json.dumps(found, indent=1))
        else:
            print(text_table([cells(row) for row in found]))
        if sys.stdout is not None:
            sys.stdout.flush()
        if not any(run.rows for entry in entries for run in entry.runs):
            print("no plot: no run has an epoch behind it yet", file=sys.stderr)
            return 0
        if refused:
            print(f"no plot: {refused}", file=sys.stderr)
            return 0
        plots.plot_runs({entry.name: [run.rows for run in entry.runs] for entry in entries}, plot)
        print(f"plot     {plot}", file=sys.stderr)  # not among the lines of a table that goes to a file
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {shown(line)}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}: install what plots need with pip install 'jresnet[train]'", file=sys.stderr)
        return 1
    return 0
