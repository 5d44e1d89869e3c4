"""Helpers for command lines: a parser, flags made from the fields of a dataclass, and checks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import stat
import sys
import typing
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from jresnet.errors import InputError
from jresnet.files import shown
from jresnet.training.fields import hints_of
from jresnet.training.recipes import DATASETS, RECIPES, in_words, value_in_words

MAX_PROCESSES = 1_000_000


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are formatted like all others: control codes escaped, long values cut."""

    def error(self, message: str) -> NoReturn:
        """Prints usage and error, and ends the process with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {shown(message)}\n")


def folder(text: str) -> Path:
    """Parses the path of a folder. An empty string, perhaps from an unset variable, is refused: Path reads it as '.'."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def check_output(path: Path, force: bool, flag: str = "--output") -> None:
    """Raises :class:`InputError` if a file may not be written, so that no existing file is lost without permission.

    It is called before anything is read, downloaded or computed.

    Args:
        path: the file.
        force: whether the user allows replacing it.
        flag: name of the flag, for messages.
    """
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InputError(f"{flag} {path}: there is no folder {path.parent}") from None
        return
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise InputError(f"{flag} {path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is a link, a folder, a device or a pipe: name another file with {flag}")
    if not force:
        raise InputError(f"{path} exists: --force replaces it, or name another file with {flag}")


def add_flags(groups: Mapping[str, Any], record: type, defaults: Mapping[str, str] | None = None) -> None:
    """Adds a flag for each field of ``record`` whose option names one of the ``groups``. Omitted flags are None.

    Args:
        groups: argument groups of the parser, by name.
        record: a dataclass whose fields are made by :func:`jresnet.training.fields.option`.
        defaults: descriptions of defaults by field, if they are not those of the training recipes.
    """
    for field in dataclasses.fields(record):
        if field.metadata["option"].group in groups:
            add_flag(groups[field.metadata["option"].group], record, field.name, (defaults or {}).get(field.name))


def add_flag(group: Any, record: type, name: str, default: str | None = None) -> None:
    """Adds the flag for one field: --batch-size for ``batch_size``."""
    (field,) = (field for field in dataclasses.fields(record) if field.name == name)
    option, hint = field.metadata["option"], hints_of(record)[name]
    text = f"{option.help} ({f'default: {default}' if default else _default(field, hint)})".replace("%", "%%")
    given: dict[str, Any] = {"help": text, "default": None}
    if hint is bool:
        given["action"] = "store_true" if option.switch else argparse.BooleanOptionalAction
    elif option.choices:
        given["choices"] = (("auto",) if option.automatic else ()) + option.choices
    else:
        (kind, *_) = [part for part in (hint, *typing.get_args(hint)) if part in (int, float, str)]
        given |= {"type": kind, "metavar": option.metavar}
        if typing.get_origin(hint) is tuple:
            given["nargs"] = "*"
    group.add_argument(f"--{name.replace('_', '-')}", **given)


def add_process_flags(group: Any) -> None:
    """Adds the flags of a training command for devices and processes."""
    group.add_argument(
        "--devices", type=int, metavar="N", help="number of devices of this machine (of each process) (default: all)"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="with several processes: address of process 0; use only in trusted networks",
    )  # fmt: skip
    group.add_argument("--num-processes", type=int, metavar="N", help="with several processes: their number")
    group.add_argument("--process-id", type=int, metavar="N", help="with several processes: index of this one, from 0")
    group.add_argument(
        "--distributed", choices=("auto",),
        help="let JAX find the processes: SLURM, Open MPI, Kubernetes, Cloud TPU",
    )  # fmt: skip


def process_mistakes(args: argparse.Namespace) -> list[str]:
    """Contradictions among the flags of :func:`add_process_flags` and ``--out``."""
    by_hand, found = (args.coordinator, args.num_processes, args.process_id), []
    if args.distributed and any(value is not None for value in by_hand):
        found.append("--distributed auto determines --coordinator, --num-processes and --process-id: leave these out")
    elif any(value is not None for value in by_hand) and any(value is None for value in by_hand):
        found.append("--coordinator, --num-processes and --process-id must be given together")
    elif args.coordinator is not None and not 0 <= args.process_id < args.num_processes <= MAX_PROCESSES:
        found.append(
            f"--process-id must be at least 0 and below --num-processes, which must be at most {MAX_PROCESSES:,}, "
            f"got {args.process_id} of {args.num_processes}"
        )
    if (args.distributed or args.coordinator is not None) and args.out is None:
        found.append("--out is required with several processes, which would otherwise use different folders")
    return found


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    """Describes the default of a flag, from the tables of recipes and data sets."""
    if field.default is not dataclasses.MISSING:
        return f"default: {field.metadata['option'].none if field.default is None else in_words(field.default)}"
    if field.metadata["option"].automatic:
        return "default: auto"
    if field.name in ("recipe", "dataset"):  # the first row
        return f"default: {field.metadata['option'].choices[0]}"
    words = {name: value_in_words(row, field.name) for name, row in RECIPES.items()}
    same = len(set(words.values())) == 1
    parts = [f"default: {next(iter(words.values()))}" if same else ", ".join(map(": ".join, words.items()))]
    parts += [f"{name}: {in_words(row[field.name])}" for name, row in DATASETS.items() if field.name in row]
    return "; ".join(parts)


@contextlib.contextmanager
def naming_flags(parser: argparse.ArgumentParser, **others: str) -> Iterator[None]:
    """Replaces names of values in backticks, such as `batch_size`, by flags in the messages of exceptions.

    ``others`` gives the flags whose names differ from those of the values: ``images="data"``.
    """

    def flag(match: re.Match[str]) -> str:
        name = f"--{others.get(match[1], match[1]).replace('_', '-')}"
        return name if name in parser._option_string_actions else match[0]

    try:
        yield
    except Exception as error:
        error.args = tuple(re.sub(r"`(\w+)`", flag, part) if isinstance(part, str) else part for part in error.args)
        raise


def wandb_mistakes(project: str | None) -> list[str]:
    """Problems with ``--wandb``, which would otherwise be reported only after compilation."""
    if project == "":
        return ["--wandb must be the name of a project, got ''"]
    return ["--wandb needs the package wandb: pip install wandb"] if project and not find_spec("wandb") else []


def given_for(args: argparse.Namespace, record: type) -> dict[str, Any]:
    """The values that the user gave for the fields of a dataclass."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(record)}
    given = {name: value for name, value in values.items() if value is not None and value != "auto"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
