"""The table of all architectures in docs/models.md, from the zoo's rows: ``python scripts/models.py``, ``--check``."""

from __future__ import annotations

import sys
from pathlib import Path

from jresnet.commands import guarded
from jresnet.commands.flags import Parser
from jresnet.files import write_atomically
from jresnet.models import zoo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- models -->\n", "<!-- /models -->"


def table() -> str:
    """A line a row, in the order of ``jresnet.list_models()``."""
    lines = ["| name | parameters | GMACs | pixels | source |", "|---|---|---|---|---|"]
    for row in zoo.ZOO.values():
        lines.append(f"| {row.name} | {row.parameters:,} | {row.gmacs:g} | {row.image_size} | {row.source} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, page: Path = PAGE) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(description="Write the table of architectures between its marks in docs/models.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    args = parser.parse_args(argv)
    before = page.read_text()
    head, _, rest = before.partition(BEGIN)
    after = head + BEGIN + table() + END + rest.partition(END)[2]
    if args.check and after != before:
        print(f"error: {page.name} is not what the zoo says: run python scripts/models.py", file=sys.stderr)
        return 1
    if not args.check and after != before:
        write_atomically(page, after.encode())
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, "models"))
