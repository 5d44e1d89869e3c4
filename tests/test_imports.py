"""Who may import whom: read from the source of every file, imports inside functions and for type checkers included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

# A file imports from lower ranks and from its own room: a folder of jresnet/ or a file beside them, convert/ or scripts/.
RANKS = {
    "errors": 0, "version": 0,
    "files": 1, "cache": 1, "kernels": 1,
    "download": 2, "models": 2,
    "weights": 3, "pytorch": 3,
    "sources": 4,
    "factory": 5,
    "data": 6,
    "sharing": 7, "evaluation": 7, "pretrained": 7, "explain": 7, "exporting": 7,
    "reports": 8,
    "training": 9,
    "__init__": 10,  # jresnet's own, which shows what is public; it imports from anywhere below
    "commands": 11,
    "__main__": 12, "hub": 12,
    "convert": 13,
    "scripts": 14,
}  # fmt: skip
# Rooms that import less than their rank would allow.
ONLY: dict[str, set[str]] = {
    "files": {"errors"},
    "cache": set(),
    "kernels": {"errors"},
    "reports": {"errors", "files"},
}
# torch's own networks and numbers, to compare with. TensorFlow is imported nowhere.
TORCH = (
    "convert/verify.py", "convert/reference.py", "convert/installed.py", "scripts/benchmark/torch_worker.py",
    "scripts/benchmark/torch_loader.py",
    "scripts/compare_finetuning.py", "tests/parity/", "tests/golden/",
)  # fmt: skip

# What is known and to be removed, as the beginning of a problem; one that nothing begins with fails as well.
KNOWN: tuple[str, ...] = ()


def problems(root: Path) -> Iterator[str]:
    """What the files under ``root`` do against the rules, a line each."""
    sources = [
        path for part in ("jresnet", "convert", "scripts", "tests") for path in sorted((root / part).rglob("*.py"))
    ]
    trees = {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in sources}
    ruled = {name: tree for name, tree in trees.items() if not name.startswith("tests/")}
    arrows: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for module in imports(tree, name):
            package = module.partition(".")[0]
            if package in ("torch", "torchvision", "timm") and not name.startswith(TORCH):
                yield f"{name} imports {package}"
            if package in ("tensorflow", "keras"):
                yield f"{name} imports {package}"
            target = file_of(module, ruled)
            if name in ruled and target and target != name:
                arrows.setdefault(name, set()).add(target)
    for name, targets in arrows.items():
        yield from dict.fromkeys(filter(None, (forbidden(name, target) for target in sorted(targets))))
    yield from circles(arrows)
    for name, tree in ruled.items():
        if name.startswith("jresnet/") and not name.startswith("jresnet/commands/"):
            yield from (f"{name}:{line} names the flag {flag}" for line, flag in flags(tree))


def imports(tree: ast.Module, name: str) -> Iterator[str]:
    """The modules that a file imports by dotted name; of ``from a import b`` a.b, which may be a name in a."""
    folder = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "runpy.run_module",
            "__import__",
        ):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def file_of(module: str, files: dict[str, ast.Module]) -> str | None:
    """The file of a module, or of the one that holds the name; scripts find each other without ``scripts.``."""
    parts = module.split(".")
    for length in (len(parts), len(parts) - 1):
        path = "/".join(parts[:length])
        if path:
            for candidate in (f"{path}.py", f"{path}/__init__.py", f"scripts/{path}.py", f"scripts/{path}/__init__.py"):
                if candidate in files:
                    return candidate
    return None


def room(name: str) -> str:
    """``jresnet/data/tfds.py`` -> ``data``, ``jresnet/cache.py`` -> ``cache``, ``scripts/x.py`` -> ``scripts``."""
    parts = name.removesuffix(".py").split("/")
    return parts[1] if parts[0] == "jresnet" else parts[0]


def forbidden(name: str, target: str) -> str | None:
    """Why a file may not import another one."""
    here, there = room(name), room(target)
    if here == there:
        return None
    if here not in RANKS or there not in RANKS:
        return f"{name} imports {target}: one of them is in a room that RANKS does not know"
    if RANKS[there] >= RANKS[here] or there not in ONLY.get(here, {there}):
        return f"{name} imports {target}: {here} may not import {there}"
    return None


def circles(arrows: dict[str, set[str]]) -> Iterator[str]:
    """Files that import each other, along a path of any length: each circle once, by one of its paths."""
    seen: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in seen:
            for target in sorted(arrows.get(name, ())):
                yield from visit(target, [*path, name])
            seen.add(name)

    for name in sorted(arrows):
        yield from visit(name, [])


def flags(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Command-line flags in strings, but for docstrings: a library's error names the value, the command's the flag."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in docstrings | parts or not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        values = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in values)
        text = re.split("pip install|hf download", text)[0]  # other programs have flags of their own
        yield from ((node.lineno, flag) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_the_rules_hold() -> None:
    found = list(problems(REPOSITORY))
    assert [problem for problem in found if not problem.startswith(KNOWN)] == []
    assert [known for known in KNOWN if not any(problem.startswith(known) for problem in found)] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"jresnet/models/a.py": "from jresnet.kernels import b", "jresnet/kernels/b.py": ""}, None),
        ({"jresnet/kernels/b.py": "import jresnet.models.a", "jresnet/models/a.py": ""}, "kernels may not import models"),
        ({"jresnet/models/a.py": "def f():\n import jresnet.data.b", "jresnet/data/b.py": ""}, "models may not import data"),
        (
            {"jresnet/models/a.py": "if TYPE_CHECKING:\n from jresnet.data.b import C", "jresnet/data/b.py": ""},
            "models may not import data",
        ),
        ({"jresnet/models/a.py": "from ..data import b", "jresnet/data/b.py": ""}, "models may not import data"),
        (
            {"jresnet/models/a.py": "importlib.import_module('jresnet.data.b')", "jresnet/data/b.py": ""},
            "models may not import data",
        ),
        ({"jresnet/pytorch/a.py": "import jresnet.weights.b", "jresnet/weights/b.py": ""}, "pytorch may not import weights"),
        ({"jresnet/reports/a.py": "import jresnet.models.b", "jresnet/models/b.py": ""}, "reports may not import models"),
        ({"jresnet/new/a.py": "from jresnet.models import b", "jresnet/models/b.py": ""}, "RANKS does not know"),
        ({"jresnet/cache.py": "import jresnet", "jresnet/__init__.py": ""}, "cache may not import __init__"),
        ({"jresnet/sources.py": "from convert import a", "convert/a.py": ""}, "sources may not import convert"),
        ({"jresnet/sources.py": "import evaluate", "scripts/evaluate.py": ""}, "sources may not import scripts"),
        ({"convert/a.py": "import evaluate", "scripts/evaluate.py": ""}, "convert may not import scripts"),
        ({"convert/a.py": "import jresnet", "jresnet/__init__.py": "import jresnet.cache", "jresnet/cache.py": ""}, None),
        ({"jresnet/models/a.py": "import jresnet.models.b", "jresnet/models/b.py": "def f():\n import jresnet.models.a"},
         "jresnet/models/a.py -> jresnet/models/b.py -> jresnet/models/a.py"),
        ({"jresnet/data/__init__.py": "from jresnet.data import a", "jresnet/data/a.py": "from jresnet.data import C"},
         "jresnet/data/__init__.py -> jresnet/data/a.py -> jresnet/data/__init__.py"),
        ({"scripts/a.py": "import b", "scripts/b.py": "import c", "scripts/c.py": "import a"},
         "scripts/a.py -> scripts/b.py -> scripts/c.py -> scripts/a.py"),
        ({"convert/verify.py": "import torch", "tests/parity/a.py": "import torch"}, None),
        ({"scripts/benchmark/torch_worker.py": "import timm", "tests/golden/a.py": "import torch"}, None),
        ({"convert/a.py": "def f():\n import torch.nn"}, "convert/a.py imports torch"),
        ({"tests/test_a.py": "from torchvision import models"}, "tests/test_a.py imports torchvision"),
        ({"tests/parity/a.py": "import tensorflow as tf"}, "tests/parity/a.py imports tensorflow"),
        ({"jresnet/data/a.py": "import tensorflow_datasets"}, None),
        ({"jresnet/data/a.py": "def f(x):\n raise E(f'hf download {x} --revision {x}')"}, None),
        ({"jresnet/data/a.py": "def f():\n \"\"\"The script has --data-dir for it.\"\"\""}, None),
        ({"jresnet/data/a.py": "\nraise E(f'give {x} with --data-dir')"}, "jresnet/data/a.py:2 names the flag --data-dir"),
        ({"jresnet/commands/a.py": "E('--out')", "scripts/a.py": "E('--out')", "jresnet/data/a.py": "E('a -- b')"}, None),
    ],
)  # fmt: skip
def test_what_is_seen(files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(problems(tmp_path))
    if expected is None:
        assert found == []
    else:
        (problem,) = found
        assert problem.endswith(expected)
