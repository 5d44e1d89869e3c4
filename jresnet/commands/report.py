"""``jresnet report RUN [RUN ...]`` compares training runs in a table and a plot."""

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
    """The command line's options; ``prog`` is the name of the program."""
    parser = Parser(
        prog=prog,
        description="Compare training runs in a table and a plot.",
        epilog="Figures are those of the last epoch. For several seeds they are mean ± sample standard deviation over the "
        "finished runs (if none is finished, over all at the same epoch); images/s and time are means. Exit code: 0 on "
        "success; 1 if a folder is not that of a run or has a damaged file; 2 for invalid options.",
    )
    parser.add_argument(
        "runs", nargs="+", type=folder, metavar="RUN", help="folder of a run, finished or not, or of several seeds"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png",
        help="plot of training loss and accuracy by epoch (default: comparison.png, if it does not exist yet)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the plot if it exists")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="format of the table (default: text)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "jresnet report") -> int:
    """Runs the command; returns its exit code."""
    options = parser(prog)
    args = options.parse_args(argv)
    plot, refused = args.plot or Path("comparison.png"), ""
    if plot.suffix.lower() != ".png":
        options.error(f"--plot must be a file name that ends in .png, got {str(plot)!r}")
    try:
        try:
            check_output(plot, args.force, "--plot")
        except InputError as error:
            if args.plot:
                raise
            refused = str(error)  # not an error, because the user did not request a plot
        entries = read_entries(args.runs)
        found = [figures(entry) for entry in entries]
        if args.format == "json":
            print(json.dumps(found, indent=1))
        else:
            print(text_table([cells(row) for row in found]))
        if sys.stdout is not None:
            sys.stdout.flush()
        if not any(run.rows for entry in entries for run in entry.runs):
            print("no plot: no run has finished an epoch yet", file=sys.stderr)
            return 0
        if refused:
            print(f"no plot: {refused}", file=sys.stderr)
            return 0
        plots.plot_runs({entry.name: [run.rows for run in entry.runs] for entry in entries}, plot)
        print(f"plot     {plot}", file=sys.stderr)  # not on stdout, which may be redirected to a file
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {shown(line)}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}: install the packages for plots with pip install 'jresnet[train]'", file=sys.stderr)
        return 1
    return 0
