"""Write the tables of architectures: all in docs/models.md, families in README.md.

``python scripts/models.py`` writes the tables between their marks; ``--check`` only compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from jresnet.commands import guarded
from jresnet.commands.flags import Parser
from jresnet.files import write_atomically
from jresnet.models import zoo

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- models -->\n", "<!-- /models -->"


def table() -> str:
    """Returns a table with one line per architecture, in the order of ``jresnet.list_models()``."""
    lines = ["| name | parameters | GMACs | pixels | source |", "|---|---|---|---|---|"]
    for row in zoo.ZOO.values():
        lines.append(f"| {row.name} | {row.parameters:,} | {row.gmacs:g} | {row.image_size} | {row.source} |")
    return "\n".join(lines) + "\n"


# Each family's name and its condition. A row belongs to the first family whose condition it meets.
FAMILIES: dict[str, Callable[[zoo.Row], bool]] = {
    "CIFAR (He et al. 2016)": lambda row: row.name.endswith("_cifar"),
    "tutorial networks": lambda row: row.name in ("resnet34_projection", "resnet18_d2l"),
    "ResNet-RS": lambda row: row.name.startswith("resnetrs"),
    "ECA-ResNet, ECA-ResNeXt": lambda row: row.config.attention == "eca",
    "SENet, SE-ResNet, SE-ResNeXt": lambda row: row.config.attention == "se",
    "anti-aliased": lambda row: row.config.antialias is not None,
    "GroupNorm": lambda row: row.config.norm == "group",
    "ResNeXt": lambda row: row.config.groups > 1,
    "Wide ResNet": lambda row: row.config.width_per_group > 64,
    "ResNet-C, -D, -S, -T": lambda row: row.config.stem.startswith("deep"),
    "ResNet": lambda row: True,
}


def families() -> str:
    """Returns a table with one line per family: number of networks, the smallest and the largest one."""
    of: dict[str, list[zoo.Row]] = {title: [] for title in reversed(FAMILIES)}
    for row in zoo.ZOO.values():
        of[next(title for title, fits in FAMILIES.items() if fits(row))].append(row)
    lines = ["| family | names | parameters, millions |", "|---|---|---|"]
    for title, rows in of.items():
        rows.sort(key=lambda row: row.parameters)
        shown = [rows[0].name] if len(rows) == 1 else [rows[0].name, rows[-1].name]
        names = f"`{'` to `'.join(shown)}`" + (f" ({len(rows)})" if len(rows) > 1 else "")
        sizes = sorted({f"{row.parameters / 1e6:.3g}" for row in (rows[0], rows[-1])}, key=float)
        lines.append(f"| {title} | {names} | {' to '.join(sizes)} |")
    return "\n".join(lines) + "\n"


PAGES = {"docs/models.md": table, "README.md": families}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(description="Generate the tables of architectures in docs/models.md and README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is outdated")
    args = parser.parse_args(argv)
    differing = 0
    for name, made in PAGES.items():
        before = (root / name).read_text()
        head, _, rest = before.partition(BEGIN)
        after = head + BEGIN + made() + END + rest.partition(END)[2]
        if after == before:
            continue
        differing += 1
        if args.check:
            print(f"error: outdated: {name}: run python scripts/models.py", file=sys.stderr)
        else:
            write_atomically(root / name, after.encode())
            print(f"wrote {root / name}")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(guarded(main, "models"))
