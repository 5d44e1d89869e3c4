"""Every option of every command, given what no one means: it is refused in one line, before anything is done.

The parsers are asked for their options, so that a new one is walked without a line here. Nothing is read, fetched, compiled
or written on the way: what would do so raises ``Reached``, and a value that comes so far has not been refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY, load_script
from PIL import Image

from convert import verify
from jresnet import commands
from jresnet.models import params, zoo
from jresnet.pytorch import keymap

SECONDS = 10  # of a call, in which a pipe would be waited for
LONGEST = 5000  # letters of a complaint

NUMBERS = {
    "nan": "nan", "inf": "inf", "-inf": "-inf", "1e308": "1e308", "0": "0", "-1": "-1", "huge": "9" * 20,
    "-huge": "-" + "9" * 20, "digits": "9" * 5000,
}  # fmt: skip
TEXTS = {"empty": "", "codes": "\x1b[2J\x07\x9b1m", "long": "x" * 100_000}
PATHS = ("bytes", "pipe", "folder", "full", "zero", "lost")
ALL = (*NUMBERS, *TEXTS, *PATHS)
NAMES = {"bytes", "lost", *NUMBERS} - {"digits"}  # what may be the name of a file or a folder


class Reached(BaseException):
    """A value came so far that something would have been done with it."""


class Hung(BaseException):
    """A call did not end."""


class Command(NamedTuple):
    """How a command is walked."""

    call: Callable[[list[str]], int]
    base: Mapping[str, list[str]]  # a line that is right, by the option or positional; what is not walked stays
    doing: tuple[str, ...]  # module:attribute of what would read or compute; beside NETWORK
    reading: Mapping[str, tuple[str, ...]] = {}  # the same of options whose value is what to read


# What may be given all the same, and why. A value that is listed and refused is a mistake here.
ALLOWED: dict[tuple[str, str], tuple[set[str], str]] = {
    ("train", "--out"): ({*NAMES, "codes", "folder"}, "a folder by that name is made; an empty one is used"),
    ("train", "--data-dir"): ({*NAMES, "codes", "folder"}, "CIFAR-10 is downloaded into that folder"),
    ("train", "--seed"): ({"0"}, "a seed"),
    ("train", "--lr"): ({"huge"}, "the run stops where the loss is not finite"),
    ("train", "--weight-decay"): ({"0", "huge"}, "none; or as for --lr"),
    ("train", "--checkpoint-minutes"): ({"0", "huge"}, "after each stretch of steps; at an epoch's end"),
    ("train", "--checkpoint-seconds"): ({"0", "huge"}, "after each epoch; after the last one alone"),
    ("train", "--warmup-epochs"): ({"0"}, "none"),
    ("train", "--momentum"): ({"0"}, "plain SGD, with --no-nesterov"),
    ("train", "--clip-norm"): ({"0", "huge"}, "no limit"),
    ("train", "--mixup"): ({"0", "huge"}, "none; halves of two images"),
    ("train", "--cutmix"): ({"0", "huge"}, "none; halves of two images"),
    **{
        ("train", option): ({"0"}, "none")
        for option in (
            "--label-smoothing",
            "--ema",
            "--random-erasing",
            "--val-split",
            "--magnitude",
            "--target-threshold",
        )
    },
    ("train", "--process-id"): ({"0"}, "the first"),
    ("evaluate", "--data-dir"): ({*NAMES, "codes", "folder"}, "CIFAR-10 is downloaded into that folder"),
    ("evaluate", "--limit"): ({"huge"}, "all images that there are"),
    ("evaluate", "--batch-size"): ({"huge"}, "at most as many as there are images"),
    ("evaluate", "--mean"): ({"0"}, "of grey images"),
    ("finetune", "--out"): ({*NAMES, "codes", "folder"}, "a folder by that name is made; an empty one is used"),
    ("finetune", "--seed"): ({"0"}, "a seed"),
    ("finetune", "--split-seed"): ({"0"}, "a seed"),
    ("finetune", "--workers"): ({"0"}, "threads"),
    ("finetune", "--freeze"): ({"empty"}, "nothing is frozen"),
    ("finetune", "--lr"): ({"huge"}, "the run stops where the loss is not finite"),
    ("finetune", "--checkpoint-minutes"): ({"0", "huge"}, "after each stretch of steps; at an epoch's end"),
    ("finetune", "--checkpoint-seconds"): ({"0", "huge"}, "after each epoch; after the last one alone"),
    ("finetune", "--warmup-epochs"): ({"0"}, "none"),
    ("finetune", "--momentum"): ({"0"}, "plain SGD"),
    **{
        ("finetune", option): ({"0", "huge"}, "none; no limit; halves of two images")
        for option in ("--weight-decay", "--clip-norm", "--mixup", "--cutmix")
    },
    **{
        (command, option): ({"0"}, "none")
        for command in ("finetune", "train-imagenet")
        for option in ("--label-smoothing", "--ema", "--random-erasing", "--magnitude", "--target-threshold")
    },
    ("train-imagenet", "--out"): ({*NAMES, "codes", "folder"}, "a folder by that name is made; an empty one is used"),
    ("train-imagenet", "--seed"): ({"0"}, "a seed"),
    ("train-imagenet", "--workers"): ({"0"}, "threads"),
    ("train-imagenet", "--lr"): ({"huge"}, "the run stops where the loss is not finite"),
    ("train-imagenet", "--checkpoint-minutes"): ({"0", "huge"}, "after each stretch of steps; at an epoch's end"),
    ("train-imagenet", "--checkpoint-seconds"): ({"0", "huge"}, "after each epoch; after the last one alone"),
    ("train-imagenet", "--warmup-epochs"): ({"0"}, "none"),
    ("train-imagenet", "--momentum"): ({"0"}, "plain SGD"),
    **{
        ("train-imagenet", option): ({"0", "huge"}, "none; no limit; halves of two images")
        for option in ("--weight-decay", "--clip-norm", "--mixup", "--cutmix")
    },
    ("predict", "--top"): ({"huge"}, "all classes that there are"),
    ("predict", "--batch-size"): ({"huge"}, "at most as many as there are images"),
    ("push", "target"): ({*NAMES, "codes", "folder"}, "a folder by that name is made"),
    ("push", "--title"): ({*ALL}, "words"),
    ("push", "--license"): ({"nan", "inf", "1e308", "huge"}, "identifiers of licences"),
    ("convert", "--num-classes"): ({"0"}, "no head"),
    ("convert", "--output"): ({*NAMES, "codes"} - {"lost"}, "a file by that name is written"),
    ("export-torch", "--output"): ({*NAMES, "codes", "folder"}, "a folder by that name is made, for transformers"),
    ("convert", "--prefix"): ({"empty"}, "the names as they are"),
    ("benchmark", "--json"): ({*NAMES, "codes"} - {"lost"}, "a file by that name is written"),
    ("benchmark", "--plots"): ({*NAMES, "codes", "folder"}, "a folder by that name is made"),
    ("benchmark", "--minutes"): ({"1e308", "huge"}, "no limit"),
    ("benchmark", "--data-dir"): ({"folder", "full", "zero", "pipe"}, "the workers say what is wrong with it"),
    ("results add", "name"): ({"nan", "inf", "1e308", "0", "huge"}, "a folder by that name is made"),
    **{
        ("results add", option): ({*ALL} - {"empty", "codes", "long", "digits", "bytes"}, "words")
        for option in ("--title", "--images", "--hardware", "--command", "--peer")
    },
}

NETWORK = ("jresnet.download:_ask", "jresnet.weights.hub:_head", "jresnet.weights.hub:_download")
DATA = ("jresnet.data.cifar10:_read_layout", "jresnet.data.cifar10:_read_store")
TRAINING = ("jresnet.commands.train:fit_seeds", "jresnet.commands.train:Trainer", "jresnet.training.program:Program",
            "jax:distributed.initialize")  # fmt: skip
STREAMING = ("jresnet.training.imagenet:dataset", "jresnet.commands.train_imagenet:Program",
             "jresnet.commands.train_imagenet:Trainer", "jax:distributed.initialize")  # fmt: skip
SCORING = ("jresnet.evaluation:score", "jresnet.cache:compiled")
TUNING = ("jresnet.data.folder:load", "jresnet.training.finetune:embed", "jresnet.commands.finetune:Trainer")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, native_file: Path) -> Path:
    """A folder with what commands are given when they are given something right, and with what is hostile as a path."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("home", "folder", "images/a", "images/b", "site/results", "site/docs"):
        (root / name).mkdir(parents=True)
    (root / "site/README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    for name in "ab":
        Image.new("RGB", (8, 8)).save(root / "images" / name / "x.png")
    os.mkfifo(root / "pipe")
    (root / "weights.safetensors").write_bytes(native_file.read_bytes())
    draw, config = np.random.default_rng(0), zoo.configure("resnet20_cifar")
    tensors = {
        keymap.torch_key(path, "torchvision"): draw.uniform(0.5, 1.5, keymap.torch_shape(shape)).astype(np.float32)
        for path, shape in params.shapes(config).items()
    }
    (root / "torch.safetensors").write_bytes(safetensors.numpy.save(tensors))
    from test_report import make_run

    make_run(root / "run", [0.3, 0.5, 0.7])
    return root


def commands_of(root: Path) -> dict[str, Command]:
    """How to call what there is, and with what."""
    weights, images, torch = str(root / "weights.safetensors"), str(root / "images"), str(root / "torch.safetensors")
    results = load_script("results")
    from benchmark import driver

    def run(name: str) -> Callable[[list[str]], int]:
        return lambda arguments: commands.run(name, arguments, f"jresnet {name}")

    def benchmark(arguments: list[str]) -> int:
        """Without workers; every interpreter but this one is asked what it has."""

        def ask(self: object, worker: str, do: str, **job: Any) -> Any:
            raise Reached(do)

        answer = driver.answer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver.Workplace, "ask", ask)
            patch.setattr(driver, "answer", lambda to, **_: {"python": "3"} if to[0] == sys.executable else answer(to))
            return driver.main(arguments)

    known = {
        "train": Command(
            run("train"), {"--dataset": ["digits"], "--out": ["out"]}, ("jresnet.training.program:load_data", *TRAINING),
            {"--data-dir": (*TRAINING, *DATA)},
        ),
        "train-imagenet": Command(
            run("train-imagenet"), {"--data": [images], "--out": ["out"]}, ("jresnet.data.folder:find", *STREAMING),
            {"--data": STREAMING, "--data-dir": STREAMING},
        ),
        "evaluate": Command(
            run("evaluate"), {"--weights": [weights], "--data": [images]}, ("jresnet.sources:load", *SCORING),
            {"--weights": SCORING, "--data-dir": (*SCORING, *DATA)},
        ),
        "finetune": Command(
            run("finetune"), {"--weights": [weights], "--data": [images], "--out": ["out"]},
            ("jresnet.sources:load", *TUNING),
            {"--weights": TUNING, "--freeze": TUNING, "--data-dir": ("jresnet.sources:load", *TUNING, *DATA)},
        ),
        "predict": Command(
            run("predict"), {"images": [images], "--weights": [weights]}, ("jresnet.sources:load", *SCORING),
            {"--weights": ("jresnet.commands.predict:predict",)},
        ),
        "push": Command(run("push"), {"weights": [weights], "target": ["new"]}, ("jresnet.sources:load",),
                        {"weights": ("jresnet.sharing:_write",)}),
        "pull": Command(run("pull"), {"source": [weights], "out": ["new.safetensors"]}, ("jresnet.sources:load",),
                        {"source": ("jresnet.weights.native:save",)}),
        "report": Command(run("report"), {"runs": [str(root / "run")]}, ("jresnet.commands.report:read_entries",),
                          {"runs": ("jresnet.reports.plots:plot_runs",)}),
        "convert": Command(
            run("convert"), {"what": [torch], "--verify": ["never"], "--output": ["new.safetensors"]},
            ("jresnet.sources:read",),
            dict.fromkeys(("what", "--weights", "--prefix", "--key"), ("jresnet.weights.native:save",)),
        ),
        "export-torch": Command(
            run("export-torch"), {"file": [weights], "--verify": ["never"], "--output": ["new.pth"]},
            ("jresnet.weights.native:read",), {"file": ("jresnet.pytorch.torchsave:write",)},
        ),
        "verify": Command(lambda given: commands.guarded(lambda: verify.main(given), "verify"),
                          {"--arch": ["resnet20_cifar"]}, ("convert.verify:survey",)),
        "benchmark": Command(lambda given: commands.guarded(lambda: benchmark(given), "benchmark"), {"--rounds": ["1"]}, ()),
        "results": Command(lambda given: commands.guarded(lambda: results.main(given, root / "site"), "results"), {},
                           ("results:update",)),
        "results add": Command(
            lambda given: commands.guarded(lambda: results.main(["add", *given], root / "site"), "results"),
            {"run": [str(root / "run")], "name": ["new"], "--title": ["a"], "--framework": ["jresnet"],
             "--metric": ["test_accuracy"], "--images": ["a"], "--hardware": ["a"]},
            ("results:read_entry",), {"run": ("shutil:copyfile",)},
        ),
    }  # fmt: skip
    others = {*commands.OWN, *commands._registered()} - {*known}
    # A command without a line above is walked too, with required arguments that name nothing.
    return known | {name: Command(run(name), {}, ()) for name in others}


class Found(BaseException):
    """A parser, in the place of what it would parse."""


def parsers(call: Callable[[list[str]], int]) -> Iterator[argparse.ArgumentParser]:
    """The parser that a command makes."""

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Found) as caught:
            call([])
    found = caught.value.args[0]
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()
            return
    yield found


def name_of(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def options_of(command: Command) -> list[argparse.Action]:
    """What takes a value."""
    (parser,) = parsers(command.call)
    return [action for action in parser._actions if action.nargs != 0]


def lines(name: str, command: Command, action: argparse.Action, value: str) -> list[str]:
    """The command's line with ``value`` for one of its options."""
    mine = name_of(action)
    base = {key: given for key, given in command.base.items() if key != mine}
    for other in options_of(command) if not command.base else ():
        if other is not action and other.required:
            base[name_of(other)] = ["none.safetensors"]
    if name == "train" and mine == "--data-dir":
        base["--dataset"] = ["cifar10"]
    if name == "train" and mine == "--arch":
        base.pop("--depth", None)
    if name == "train" and mine == "--momentum":
        base["--no-nesterov"] = []
    if name == "train" and mine in ("--coordinator", "--num-processes", "--process-id"):
        base |= {"--coordinator": ["localhost:1"], "--num-processes": ["2"], "--process-id": ["1"]}
        del base[mine]
    if name == "evaluate" and mine == "--data-dir":
        base["--data"] = ["cifar10"]
    if name == "evaluate" and mine in ("--mean", "--std"):
        base["--mean" if mine == "--std" else "--std"] = ["0.5"]
    if name == "convert" and mine == "--weights":
        base["what"] = ["resnet20_cifar"]
    if name == "benchmark" and mine == "--plots":
        base["--suite"] = ["scaling"]
    if name == "verify" and mine == "--arch":
        base.pop("--all", None)
    options = [part for key, given in base.items() if key.startswith("-") for part in (key, *given)]
    rest = [part for key, given in base.items() if not key.startswith("-") for part in given]
    order = [key for key in command.base if not key.startswith("-")]
    if mine.startswith("-"):
        return [*options, f"{mine}={value}", *(["--", *rest] if rest else [])]
    if mine in order and order.index(mine) < len(rest):
        rest.insert(order.index(mine), value)
    else:
        rest.append(value)
    return [*options, "--", *rest]


def values(root: Path) -> dict[str, str]:
    paths = {
        "bytes": os.fsdecode(b"\xff\xfe"), "pipe": str(root / "pipe"), "folder": str(root / "folder"),
        "full": "/dev/full", "zero": "/dev/zero", "lost": "none/none",
    }  # fmt: skip
    return NUMBERS | TEXTS | paths


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything under a folder, and whether it was touched."""
    found = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def attempt(call: Callable[[list[str]], int], arguments: list[str]) -> tuple[int | str, str, str]:
    """The exit code, or what was reached, and what was printed on stdout and stderr, as streams of a terminal would."""

    def hung(*_: object) -> NoReturn:
        raise Hung

    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: int | str = call(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else str(end.code)
    except Reached as reached:
        code = f"came to {reached}"
    except Hung:
        code = "hung"
    except Exception as error:
        code = f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return code, said[0], said[1]


def patched(patch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Lets everything that is named raise ``Reached``."""
    for name in names:
        module, _, attribute = name.partition(":")

        def stop(*_: object, name: str = name, **__: object) -> NoReturn:
            raise Reached(name)

        target: Any = __import__(module, fromlist=["x"])
        *path, last = attribute.split(".")
        for part in path:
            target = getattr(target, part)
        patch.setattr(target, last, stop)


def complaints(code: int | str, out: str, err: str) -> Iterator[str]:
    """What is wrong with a refusal."""
    if code not in (1, 2):
        yield f"it is not refused: {code}"
        return
    if len(told := [line for line in err.splitlines() if "error:" in line]) != 1:
        yield f"{len(told)} lines with an error: {err[:300]!r}"
    if len(told) and max(map(len, told)) > LONGEST:
        yield f"it is told in {max(map(len, told)):,} letters"
    if "Traceback" in err:
        yield "there is a traceback"
    if any(not (c.isprintable() or c == "\n") for c in out + err):
        yield f"control codes are printed: {(out + err)[:300]!r}"


WALKED = [
    ("train", 35), ("evaluate", 8), ("report", 3), ("info", 0), ("convert", 10), ("export-torch", 4), ("verify", 3),
    ("benchmark", 10), ("results add", 9), ("finetune", 38), ("predict", 5), ("push", 4), ("pull", 2),
]  # fmt: skip


def test_every_command_is_walked(place: Path) -> None:
    found = commands_of(place)
    assert {name for name, _ in WALKED} <= {*found}
    assert {*commands.OWN, "convert", "export-torch"} <= {*found}
    for name, least in WALKED:
        assert len(options_of(found[name])) >= least, name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "walked" in metafunc.fixturenames:
        names = [*dict.fromkeys([*(name for name, _ in WALKED), *commands.OWN, *commands._registered()])]
        metafunc.parametrize("walked", names)


def test_hostile_values_are_refused(walked: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "home"))
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    command, wrong, before = commands_of(place)[walked], [], tree(place)
    for action in options_of(command):
        option = name_of(action)
        allowed = ALLOWED.get((walked, option), (set(), ""))[0]
        for label, value in values(place).items():
            with pytest.MonkeyPatch.context() as patch:
                patched(patch, (*NETWORK, *command.reading.get(option, command.doing)))
                code, out, err = attempt(command.call, lines(walked, command, action, value))
            where = f"{walked} {option} {label}"
            if label in allowed:
                if not str(code).startswith("came to "):
                    wrong.append(f"{where}: is said to be allowed, but: {code}, {err[-300:]}")
                clear(tmp_path)
                clear(place / "folder")
                before = tree(place)
                continue
            wrong += [f"{where}: {complaint}" for complaint in complaints(code, out, err)]
            if list(tmp_path.iterdir()) or tree(place) != before:
                changed = [*tmp_path.iterdir(), *(path for path in tree(place) if path not in before)]
                pytest.fail(f"{where}: {code} after writing {changed}; before that: {wrong}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name, least in WALKED if least])
def test_the_lines_themselves_are_right(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a value would be refused for what stands beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "home"))
    command = commands_of(place)[name]
    patched(monkeypatch, (*NETWORK, *command.doing))
    options = [part for key, given in command.base.items() if key.startswith("-") for part in (key, *given)]
    rest = [part for key, given in command.base.items() if not key.startswith("-") for part in given]
    code, _, err = attempt(command.call, [*options, *rest])
    assert str(code).startswith("came to"), err


# What only a process of its own shows: its streams, and its memory.


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """A line of bash, in which $0 is this Python and $1, $2, ... the arguments; its output is bytes."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}  # XLA tells of compiled programs of other CPUs
    options: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "timeout": 100, "env": quiet}
    return subprocess.run(["bash", "-c", line, sys.executable, *map(os.fsencode, map(str, arguments))], **options)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ('"$0" -m jresnet report "$1" --plot "$2/x.png"', 1, rb"error: .*\\udcff is not a folder\n"),  # in any locale
        (
            'LC_ALL=C PYTHONUTF8=0 "$0" -m jresnet report "$1" --plot "$2/x.png"',
            1,
            rb"error: .*\\udcff is not a folder\n",
        ),
        ('"$0" -m jresnet report "$3" --plot "$2/x.png" >&-', 0, rb"plot     .*x.png\n"),
        ('"$0" -m jresnet report "$1" --plot "$2/x.png" 2>&-', 1, b""),
        (
            '"$0" -m convert.flax2torch "$4" --verify never --output "$2/x.pth" | head -0; exit ${PIPESTATUS[0]}',
            141,
            b"",
        ),
        (
            '"$0" scripts/benchmark.py --suite data --data-dir "$1" >&-',
            1,
            rb"error: --data-dir .*\\udcff does not exist\n",
        ),
        ('ulimit -v 400000; "$0" -m jresnet report "$1" --plot "$2/x.png"', 1, rb"error: .*\\udcff is not a folder\n"),
    ],
)
def test_odd_streams_and_little_memory(place: Path, tmp_path: Path, line: str, code: int, said: bytes) -> None:
    done = shell(line, place / "run" / os.fsdecode(b"\xff"), tmp_path, place / "run", place / "weights.safetensors")
    assert (done.returncode, bool(re.fullmatch(said, done.stderr))) == (code, True), (done.returncode, done.stderr)
