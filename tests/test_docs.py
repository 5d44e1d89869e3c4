"""Every block of Python and every command of README.md and the site, as a reader would run them.

In a short form: the architectures have their names and a few channels in one block a stage, published weights and the Hub
are random networks of that size, and files that a page takes for granted are made before it asks for them. So a page takes
seconds and no network. :data:`SHORTER` has the options that are added to a command, :data:`PARSED` the commands whose
options are parsed and which are not run, with the reason, :data:`OTHERS` those of other programs. The dated pages of
docs/log are not to be typed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, load_script
from PIL import Image

import jresnet
from convert import flax2torch, torch2flax, verify
from jresnet import commands, sharing, sources
from jresnet.commands import finetune, train
from jresnet.models import zoo
from jresnet.pytorch import statedict, torchsave
from jresnet.weights import hub, published

docs = load_script("docs")

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES = [path for path in DOCUMENTS if "log" not in path.parts]

# What is added to a command, so that it takes seconds.
SHORTER: dict[str, list[str]] = {
    "jresnet finetune": ["--epochs", "1", "--image-size", "32"],
    "jresnet convert": ["--verify", "never"],
    "jresnet export-torch": ["--verify", "never"],
    "jresnet train": ["--epochs", "1", "--limit-train", "64"],
    "jresnet evaluate": [],
    "jresnet export": [],
    "jresnet info": [],
    "jresnet predict": [],
    "jresnet pull": [],
    "jresnet push": [],
    "jresnet report": ["--force"],
}
# Commands whose options are parsed and no more: a pattern, the reason.
PARSED: dict[str, str] = {
    r"jresnet train-imagenet": "wants ImageNet; tests/test_imagenet.py trains by it",
    r"jresnet train .*--dataset digits --runs": "four runs; the single one stands for them",
    r"jresnet train .*--dataset digits": "",  # is run
    r"jresnet train-": "trains on ImageNet for days",
    r"jresnet train": "trains on CIFAR-10 for hours; the run on the digits stands for it",
    r"jresnet evaluate .*--data cifar": "wants CIFAR-10; tests/test_evaluate.py has it",
    r"jresnet export .*\.onnx": "wants jax2onnx, which CI has in another environment; tests/test_exporting.py has it",
    r"jresnet report runs/three": "wants the run before it, which is not made",
    r"jresnet finetune .*tfds:": "wants a store of TFDS; tests/test_folder.py has one",
    r"python -m convert\.verify": "minutes of PyTorch; tests/parity has a row of it",
    r"python scripts/(benchmark(_loader)?|results|compare_finetuning|docs|pictures|gpu_\w+)\.py": "measures, or writes here",
}
TRAINING = re.compile(r"jresnet (train|finetune)(-\w+)? ")  # is run by the long test alone
OTHERS: dict[str, str] = {
    r"python3?(\.\d+)? -m (venv|pip|build|pytest)|pip install|git clone|cd |ruff |mypy|mkdocs|pytest": "what CI does",
    r"\. \.venv|source ": "the reader's shell",
    r"bash (\.ci/run|scripts/gpu/)": "what CI or a machine with a GPU does",
    r"hf auth": "a login",
    r"tensorboard ": "a server",
    r"export [A-Z]+=|rm -r": "the reader's shell",
    r"python my_\w+\.py": "a script of the reader's",
    r"python tests/parity/\w+\.py": "minutes of PyTorch; tests/test_readme.py asks that it is there",
    r"python -c ": "",  # is run
    r"printf ": "",  # is run
}
SCRIPTS: dict[str, str] = {
    "train_cifar10": "train",
    "train_imagenet": "train-imagenet",
    "evaluate": "evaluate",
    "finetune": "finetune",
    "predict": "predict",
}
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "python -m convert.verify": verify.parser,
    "python scripts/results.py": lambda: load_script("results").parser(),
    "python scripts/docs.py": docs.parser,
}


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, with those inside lists and admonitions."""
    text = path.read_text()
    found = re.finditer(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(
            match[2], re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE), text.count("\n", 0, match.start()) + 1
        )
        for match in found
    ]


def typed(block: Block) -> list[str]:
    """The commands of a block of the shell's, one a line; of a block without a language what looks like one.

    >>> typed(Block("bash", "a && b \\\\\\n  c  # why\\n", 1))
    ['a', 'b c']
    """
    text = re.sub(r"\\\n\s*", "", block.text)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    if block.language in ("", "console"):  # with what the command prints
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        known = re.compile(r"(jresnet|python3?|pip|bash) [\w./-]")
        lines = prompted or (lines if all(known.match(line) for line in lines if line) else [])
    elif block.language not in ("bash", "sh", "shell"):
        return []
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def normal(line: str) -> str:
    """A command as ``jresnet NAME ...``, whichever way it is called; variables before it are left out."""
    line = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
    if re.match("(srun|gcloud) ", line):  # what they start
        line = line[line.index("jresnet train") :].rstrip('"')
    line = re.sub(r"^python -m jresnet ", "jresnet ", line)
    line = re.sub(r"^python -m convert\.torch2flax", "jresnet convert", line)
    line = re.sub(r"^python -m convert\.flax2torch", "jresnet export-torch", line)
    line = re.sub(r"^python -m jresnet\.hub ", "jresnet ", line)
    script = re.match(r"python scripts/(\w+)\.py", line)
    return f"jresnet {SCRIPTS[script[1]]}{line[script.end() :]}" if script and script[1] in SCRIPTS else line


def matched(table: dict[str, str], line: str) -> str | None:
    """What a table says of a command."""
    return next((reason for pattern, reason in table.items() if re.match(pattern, line)), None)


def parsed(line: str) -> argparse.Namespace | None:
    """A command's options by its own parser; None of another program's.

    Raises:
        AssertionError: it has no such option.
    """
    words = shlex.split(line)
    options: argparse.ArgumentParser | None = None
    if words[0] == "jresnet":
        if words[1:] == ["--help"]:
            return None
        assert words[1] in docs.PARSERS, f"no command of jresnet's: {line}"
        options, given = docs.PARSERS[words[1]](" ".join(words[:2])), words[2:]
    else:
        start = " ".join(words[: 3 if words[1:2] == ["-m"] else 2])
        given = words[len(start.split()) :]
        if start in PROGRAMS:
            options = PROGRAMS[start]()
        elif script := re.fullmatch(r"python scripts/(\w+)\.py", start):
            options = parser_of(script[1])
    if options is None:
        return None
    try:
        args = options.parse_args(given)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"not accepted: {line}") from end
        return None  # --help
    wrong = train.mistakes(args) if words[:2] == ["jresnet", "train"] else []
    wrong += finetune.mistakes(args) if words[:2] == ["jresnet", "finetune"] else []
    assert not wrong, f"{line}: {wrong}"
    return args


def parser_of(script: str) -> argparse.ArgumentParser | None:
    """That of a script, or of the module behind it: scripts/gpu_check.py is gpu.check. None where it has no function."""
    room, _, name = script.partition("_")
    if script == "benchmark":
        return importlib.import_module("benchmark.driver").parser()
    module = importlib.import_module(f"gpu.{name}") if room == "gpu" else load_script(script)
    return module.parser() if hasattr(module, "parser") else None


# A place to work in.


def small() -> dict[str, zoo.Row]:
    """The zoo with a block a stage and as few channels as groups allow, the same in all rows so that they share programs."""
    rows = {}
    for row in zoo.ZOO.values():
        if row.name == "resnet8_cifar":  # is as small as that
            continue
        stages = len(row.config.depths)
        for channels in (16, 32, 64):  # as few as its groups and norms allow
            with contextlib.suppress(jresnet.InputError):
                config = dataclasses.replace(row.config, depths=(1,) * stages, widths=(channels,) * stages)
                rows[row.name] = dataclasses.replace(row, config=config)
                break
    return rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, a small zoo, no network, and programs that compile fast and run slowly."""
    for name, row in small().items():
        monkeypatch.setitem(zoo.ZOO, name, row)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    fetch = sources.fetch

    def fetched(source: sources.Source, *, progress: bool = True) -> sources.Source:
        if source.row:
            path = shelf / source.row.filename
            torchsave.write(path, statedict.state_dict(jresnet.create(source.row.arch, seed=1)))
            return dataclasses.replace(source, path=path, sha256=None)
        if source.path is None:
            folder = shelf / source.spec.replace("/", "+")
            if not folder.exists():
                file = native_file(shelf / f"{folder.name}.safetensors", "resnet50", published.categories())
                sharing.push(file, folder)
            found = dataclasses.replace(hub.local(folder), spec=f"{source.spec}@{'0' * 40}")
            return dataclasses.replace(source, path=found.path, arch=found.arch, sha256=found.sha256, repository=found)
        return fetch(source, progress=progress)

    monkeypatch.setattr(sources, "fetch", fetched)
    monkeypatch.setattr(sharing, "_upload", lambda repository, folder, private: f"https://hub.test/{repository}")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CLASSES = ("tench", "goldfish")  # the first two of ImageNet's


def native_file(path: Path, arch: str, names: tuple[str, ...] | None = None) -> Path:
    model = jresnet.create(arch, seed=1)
    names = names or (*CLASSES, *map(str, range(2, model.config.num_classes)))
    preprocessing = jresnet.Preprocessing(36, 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    jresnet.save(path, model, categories=names, preprocessing=preprocessing)
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, str(path)))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(path)


def provide(name: str | Path, arch: str | None = None, classes: tuple[str, ...] = CLASSES) -> None:
    """Makes what a page takes for granted, by its name: weights, a picture, a folder of pictures."""
    path = Path(name)
    if path.exists():
        return
    if path.suffix == ".safetensors":
        native_file(path, arch or "resnet20_cifar")
    elif path.suffix in (".pth", ".pt", ".th"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torchsave.write(path, statedict.state_dict(jresnet.create(arch or "resnet50", num_classes=10)))
    elif path.suffix in (".jpg", ".png"):
        picture(path)
    elif not path.suffix and not str(name).startswith(("hf:", "tfds:")):
        for label, number in itertools.product(classes, range(6)):
            picture(path / label / f"{number}.jpg")


def is_a_place(text: str) -> bool:
    """Whether weights are a file, and no name."""
    return Path(text).suffix in (".safetensors", ".pth", ".pt", ".th")


def prepare(line: str, args: argparse.Namespace | None) -> None:
    """Makes what a command reads."""
    named = vars(args) if args else {}
    for option in ("weights", "what", "file", "model"):
        if named.get(option) and is_a_place(str(named[option])):
            provide(named[option])
    for name in named.get("images", []) if line.startswith("jresnet predict") else []:
        provide(name)
    if named.get("data") and named["data"] not in (*sources_in_memory(), None):
        names = named.get("class_names")
        provide(named["data"], classes=tuple(names.read_text().split()[:2]) if names else CLASSES)


def sources_in_memory() -> tuple[str, ...]:
    return ("cifar10", "cifar100", "digits")


READ = re.compile(
    r'(?:create\(\s*"(?P<arch>\w+)", )?(?:weights=|load\(|get_weights\(|safe_open\(|push\()"(?P<weights>[^"]+)"'
    r'|(?:Image\.open|Path)\("(?P<file>[^"]+)"\)'
)


def run_python(block: Block, names: dict[str, Any], document: Path) -> None:
    """Runs a block; what it reads is made before."""
    for match in READ.finditer(block.text):
        if match["weights"] and is_a_place(match["weights"]):
            provide(match["weights"], match["arch"])
        elif match["file"]:
            provide(match["file"])
    if "torch_model" in block.text:
        names.setdefault("torch_model", torch_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new head|.*adapted", UserWarning)  # heads that a page asks for
        warnings.simplefilter("ignore", ResourceWarning)  # open() without a name, in two lines that show one call
        exec(compile("\n" * block.line + block.text, str(document), "exec"), names)


def torch_model() -> Any:
    """A network of PyTorch's, as a reader has one."""
    pytest.importorskip("torch")
    from convert import reference

    network = reference.ResNet(zoo.configure("resnet50", num_classes=10))
    reference.randomise(network)
    return network.eval()


def run_command(line: str, environment: dict[str, Any], training: bool = False) -> None:
    """Parses a command; runs it in its short form where no table says why not, training only where that is asked for."""
    if (reason := matched(OTHERS, line)) is not None:
        if not reason and line.startswith("python -c "):
            exec(shlex.split(line)[2], {"images": np.zeros((2, 64, 64, 3), np.float32)})
        elif not reason:
            subprocess.run(["bash", "-c", line], check=True)
        return
    args = parsed(line)
    if matched(PARSED, line) or args is None or (TRAINING.match(line) and not training):
        return
    prepare(line, args)
    words = shlex.split(line)
    command = " ".join(words[:2])
    assert command in SHORTER, f"say in SHORTER how {command} takes seconds, or in PARSED why it is not run"
    more = SHORTER[command]
    if words[1] == "finetune" and "--resume" in words:
        more = []  # the run's own
    if words[1] == "report" and not all(run.exists() for run in args.runs):
        return  # of runs that are parsed alone
    if words[1] == "report" and not args.plot:
        more = [*more, "--plot", "comparison.png"]
    name, given = words[1], [*words[2:], *more]
    code = commands.run(name, given, f"jresnet {name}") if name in commands.OWN else other(name, given)
    assert code == 0, f"{line}: exit code {code}"


def other(name: str, given: list[str]) -> int:
    """A command of the package convert."""
    return commands.guarded(
        lambda: {"convert": torch2flax.main, "export-torch": flax2torch.main}[name](given, f"jresnet {name}"), name
    )


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_pages_blocks_run(document: Path, place: None, capsys: pytest.CaptureFixture[str]) -> None:
    """All but commands that train, whose options are parsed."""
    run_page(document, capsys)


@pytest.mark.long
@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_pages_commands_train(document: Path, place: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A page with commands that train, all of it, on a few images."""
    lines = [normal(line) for block in blocks(document) for line in typed(block)]
    if not any(TRAINING.match(line) and not matched(PARSED, line) for line in lines):
        pytest.skip("nothing trains")
    run_page(document, capsys, training=True)


def run_page(document: Path, capsys: pytest.CaptureFixture[str], training: bool = False) -> None:
    """Runs a page's blocks in order, in one namespace and one folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = [block for block in blocks(document) if block.language in ("python", "", "bash", "sh", "shell", "console")]
    done = 0
    with contextlib.redirect_stderr(sys.stdout):
        for block in found:
            try:
                if block.language == "python":
                    run_python(block, names, document)
                    done += 1
                for line in map(normal, typed(block)):
                    run_command(line, names, training)
                    done += 1
            except BaseException as error:
                error.add_note(f"{document.relative_to(REPOSITORY)}, line {block.line}:\n{block.text}")
                print(capsys.readouterr().out[-3000:])
                raise
    if not done:
        pytest.skip("nothing to run")


NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path, place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script, of networks that compile faster; its commands in their short form."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    dispatch = commands.dispatch

    def shorter(arguments: list[str]) -> int:
        code = dispatch([*arguments, *SHORTER[f"jresnet {arguments[0]}"]])
        assert code == 0, arguments
        return code

    monkeypatch.setattr(commands, "dispatch", shorter)
    names: dict[str, Any] = {"__name__": "__main__"}
    text = source.read_text().replace("--depth 20", "--depth 8").replace('"resnet20_cifar"', '"resnet8_cifar"')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new head", UserWarning)
        exec(compile(text, str(source), "exec"), names)
    names["plt"].close("all") if "plt" in names else None


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_source(source: Path) -> None:
    """``python scripts/docs.py --notebooks`` would write nothing; no outputs are kept."""
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    text = source.read_text().split("# ---\n\n", 1)[1]
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        markdown = kind.strip() == "[markdown]"
        body = re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE) if markdown else body.strip("\n")
        cells.append(("markdown" if markdown else "code", body))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


def test_generated_pages_are_current() -> None:
    """``python scripts/docs.py`` would write nothing."""
    assert docs.main(["--check"]) == 0


def test_generated_pages_have_every_option() -> None:
    text = docs.commands_page()
    for name, make in docs.PARSERS.items():
        for flag in make(name)._option_string_actions:
            assert flag in text or flag in ("-h", "--help"), (name, flag)


def test_the_api_page_has_every_public_name() -> None:
    text = (REPOSITORY / "docs" / "reference" / "api.md").read_text()
    assert [name for name in jresnet.__all__ if not re.search(rf"\b{name}\b", text)] == []
    for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        room, _, leaf = name.rpartition(".")
        owner = getattr(jresnet, room.partition(".")[2]) if room in ("jresnet.hub", "jresnet.optim") else None
        assert hasattr(owner or importlib.import_module(room), leaf), name


def test_the_navigation_has_every_page() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/.-]+\.md", text[text.index("\nnav:") :]))
    there = {str(path.relative_to(REPOSITORY / "docs")) for path in DOCUMENTS[1:]}
    assert listed - there == set()
    assert there - listed <= {"models.md", "imagenet.md"}  # pages that README.md leads to


def test_jresnets_side_of_the_tables_exists() -> None:
    """Every name ``jresnet.x``, method ``model.x`` and command in the second column of docs/coming-from."""
    model = jresnet.create("resnet20_cifar")
    for page in (REPOSITORY / "docs" / "coming-from").glob("*.md"):
        for row in re.findall(r"^\| .* \|$", page.read_text(), re.MULTILINE)[2:]:
            right = re.split(r" \| ", row)[1]
            for code in re.findall(r"`([^`]+)`", right):
                for room, leaf in re.findall(r"\bjresnet\.(?:(optim|explain|hub)\.)?(\w+)", code):
                    assert hasattr(getattr(jresnet, room) if room else jresnet, leaf), (page.name, code)
                for leaf in re.findall(r"\bmodel\.(\w+)", code):
                    assert hasattr(model, leaf), (page.name, code)
                if code.startswith("jresnet "):
                    words = shlex.split(code)
                    if set(words) & {"--ema", "--mixup"}:
                        words += ["--out", "x"]
                    parsed(shlex.join(words))


def test_the_citation_has_the_version() -> None:
    text = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {jresnet.__version__}\n" in text


@pytest.mark.parametrize("name", docs.PARSERS)
def test_help_fits_a_screen_or_groups_its_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 lines of 100 letters; the usage leaves the rest of the first screen to what the command does."""
    monkeypatch.setenv("COLUMNS", "100")
    made = docs.PARSERS[name](f"jresnet {name}")
    text = made.format_help()
    titled = [title for title, _ in docs.groups(made) if title not in ("arguments", "options")]
    assert len(text.splitlines()) <= 40 or len(titled) >= 2
    assert text.splitlines().index("") <= 5


@pytest.mark.parametrize("name", docs.PARSERS)
def test_errors_of_usage_look_as_others_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        docs.PARSERS[name](f"jresnet {name}").parse_args(["--no-such-option\x1b"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"usage: jresnet {name}")
    assert said.splitlines()[-1].startswith("error: ")
    assert "\x1b" not in said


def test_a_commands_short_form_is_of_its_own_options() -> None:
    """A flag of :data:`SHORTER` that went would leave the command unknown."""
    for name, more in SHORTER.items():
        known = docs.PARSERS[name.split()[1]](name)._option_string_actions
        assert all(word in known for word in more if word.startswith("--")), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\njresnet train --depht 20\n```\n", "not accepted"),
        ("```\n$ jresnet fly\n```\n", "no command"),
        ("```bash\njresnet train --depth 35\n```\n", "unknown --depth 35"),
        ("```bash\npython scripts/results.py --chek\n```\n", "not accepted"),
    ],
)
def test_a_wrong_command_of_a_page_is_found(text: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    (block,) = blocks(page)
    with pytest.raises(AssertionError, match=message):
        run_command(normal(typed(block)[0]), {})


def test_what_is_typed() -> None:
    block = Block("bash", "a --x && b \\\n  c  # why\nX=1 d\n# all\n", 1)
    assert typed(block) == ["a --x", "b c", "X=1 d"]
    assert normal("X=1 python scripts/train_cifar10.py --depth 20") == "jresnet train --depth 20"
    assert typed(Block("", "$ jresnet info\nversions 1\n", 1)) == ["jresnet info"]
    assert typed(Block("", "jresnet  0.1.0, starting\nreading\n", 1)) == []
    assert typed(Block("text", "$ x\n", 1)) == []
