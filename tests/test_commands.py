"""The command jresnet: its help, its subcommands and those of other packages, errors, and flags made from fields."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, command

import jresnet
from jresnet import commands
from jresnet.commands import flags
from jresnet.commands.train import mistakes, parser
from jresnet.errors import InputError
from jresnet.training import recipes
from jresnet.training.config import RunConfig
from jresnet.training.trainer import Options
from jresnet.version import installed


def test_help_lists_the_commands() -> None:
    done = command("-m", "jresnet", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, line in commands.OWN.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.M)
    assert "install -e ." in done.stdout


def test_help_needs_no_jax() -> None:
    done = command("-X", "importtime", "-m", "jresnet", "--help")
    assert done.returncode == 0
    assert not re.search(r"\| +(jax|flax|numpy)$", done.stderr, re.M)


def test_python_m_jresnet_is_the_command() -> None:
    done = command("-m", "jresnet", "info")
    assert done.returncode == 0, done.stderr
    for start in ("versions python ", "device   ", "cache    ", "compiler "):
        assert re.search(rf"^{start}", done.stdout, re.M), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "the following arguments are required: COMMAND"), (["fly"], "invalid choice: 'fly'")],
)
def test_no_or_an_unknown_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.dispatch(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that registers the commands greet, fail and train."""
    metadata = tmp_path / "strange-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    names = ("greet", "fail", "train")
    lines = "".join(f"{name} = strange_commands:{name}\n" for name in names)
    (metadata / "entry_points.txt").write_text(f"[jresnet.commands]\n{lines}")
    (tmp_path / "strange_commands.py").write_text(
        "from jresnet.errors import DownloadError\n"
        "def greet(argv, prog):\n    print(prog, argv)\n    return 7\n"
        "def fail(argv, prog):\n    raise {'net': DownloadError('no network'), 'pipe': BrokenPipeError(),\n"
        "        'disk': OSError(28, 'No space left on device'), 'key': KeyboardInterrupt(),\n"
        "        'import': ModuleNotFoundError('No module named x'),\n"
        "        'library': ImportError('a.so:\\n cannot be mapped'), 'memory': MemoryError()}[argv[0]]\n"
        "def train(argv, prog):\n    raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_commands_of_other_packages(elsewhere: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert commands.dispatch(["greet", "--loud", "x"]) == 7
    assert capfd.readouterr().out == "jresnet greet ['--loud', 'x']\n"
    with pytest.raises(SystemExit):
        commands.dispatch(["--help"])
    assert "\n  greet " in capfd.readouterr().out
    assert commands.dispatch(["train", "--bad"]) == 2  # jresnet's own are not taken over


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("net", 1, "error: no network\n"),
        ("disk", 1, "error: [Errno 28] No space left on device\n"),
        (
            "import",
            1,
            "error: No module named x: install the packages that fail needs with pip install -e '.[train]'\n",
        ),
        ("library", 1, "error: fail cannot be started: a.so: cannot be mapped\n"),
        (
            "memory",
            1,
            "error: out of memory: raise the limit (ulimit -v), or use a smaller batch or network\n",
        ),
        ("key", 130, "interrupted\n"),
    ],
)
def test_errors_look_the_same(
    elsewhere: None, capsys: pytest.CaptureFixture[str], how: str, code: int, said: str
) -> None:
    assert commands.dispatch(["fail", how]) == code
    assert capsys.readouterr().err == said


def test_nobody_listens_any_more() -> None:
    """As with ``| head -1``: no traceback."""
    read, write = os.pipe()
    os.close(read)
    done = command("-c", "import sys; from jresnet.commands import run; sys.exit(run('info', [], 'x'))", stdout=write,
                   capture_output=False, stderr=-1)  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_scripts_are_the_commands() -> None:
    for script, name in (("train_cifar10", "train"), ("evaluate", "evaluate")):
        environment = os.environ | {"COLUMNS": "100"}
        one = command(f"scripts/{script}.py", "--help", env=environment)
        other = command("-m", "jresnet", name, "--help", env=environment)
        assert one.returncode == other.returncode == 0, one.stderr + other.stderr
        body = [done.stdout[done.stdout.index("\n\n") :] for done in (one, other)]
        assert body[0] == body[1]
        assert one.stdout.startswith(f"usage: {script}.py ")
        assert other.stdout.startswith(f"usage: jresnet {name} ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_signals_are_heard_while_data_are_read(number: signal.Signals, code: int) -> None:
    """The download may take an hour."""
    program = """
import signal, sys, time
from jresnet.commands import run, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT, and so do their children
def load_data(*_):
    print("reading", flush=True)
    time.sleep(60)
train.program.load_data = load_data
sys.exit(run("train", ["--dataset", "digits"], "x"))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)][1:] == ["reading  the data set digits\n", "reading\n"]
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert said == ("interrupted\n" if number == signal.SIGINT else "")


# Flags.


def options_of(record: type) -> dict[str, argparse.Action]:
    made = argparse.ArgumentParser()
    names = {field.metadata["option"].group for field in dataclasses.fields(record)} - {""}
    flags.add_flags({name: made.add_argument_group(name) for name in names}, record)
    return {action.dest: action for action in made._actions}


def test_every_field_has_its_flag() -> None:
    found = parser("train")._option_string_actions
    without = {"crop", "image_size", "imagenet_statistics", "stem"}
    for record in (RunConfig, Options):
        for field in dataclasses.fields(record):
            assert (f"--{field.name.replace('_', '-')}" in found) == (field.name not in without), field.name
    for flag in ("--no-nesterov", "--no-remat", "--depth", "--runs", "--data-dir", "--out", "--resume", "--devices",
                 "--coordinator", "--num-processes", "--process-id", "--distributed"):  # fmt: skip
        assert flag in found


def test_what_is_not_given_is_none() -> None:
    given = vars(parser("train").parse_args([]))
    assert {name for name, value in given.items() if value is not None} == {"resume"}


def test_help_takes_its_numbers_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(step: 0.1, fast: 0.4, blog: 0.001)" in options_of(RunConfig)["lr"].help
    assert "(step: 200, fast: 20, blog: 100; digits: 4)" in options_of(RunConfig)["epochs"].help
    assert "(default: 0.9)" in options_of(RunConfig)["momentum"].help
    assert "(default: all)" in options_of(RunConfig)["limit_train"].help
    assert "(default: 10)" in options_of(Options)["checkpoint_minutes"].help
    assert "(step: at 50%% and 75%%, fast: none, blog: every 10)" in options_of(RunConfig)["milestones"].help
    changed = dataclasses.replace(recipes.RECIPES["fast"], lr=0.7)
    monkeypatch.setitem(recipes.RECIPES, "fast", changed)
    assert "(step: 0.1, fast: 0.7, blog: 0.001)" in options_of(RunConfig)["lr"].help


def test_errors_name_flags_where_there_are_some() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--batch-size")
    with pytest.raises(InputError) as caught, flags.naming_flags(made):
        raise InputError("`batch_size` and `image_size` do not fit")
    assert str(caught.value) == "--batch-size and `image_size` do not fit"
    with pytest.raises(OSError, match="a") as other, flags.naming_flags(made):
        raise OSError(28, "a", "`batch_size`")
    assert other.value.errno == 28


def test_what_does_not_go_together() -> None:
    assert mistakes(parser("x").parse_args(["--distributed", "auto", "--out", "y"])) == []
    assert len(mistakes(parser("x").parse_args(["--process-id", "0", "--resume", "--depth", "35"]))) == 3


@pytest.mark.parametrize("room", ["training", "cache.py"])
def test_the_library_names_values_and_no_flags(room: str) -> None:
    root = REPOSITORY / "jresnet" / room
    files = sorted(root.glob("*.py")) if root.is_dir() else [root]
    assert files
    for file in files:
        found = re.findall(r"--[a-z][a-z-]+", re.sub(r"pip install --upgrade", "", file.read_text()))
        assert not [flag for flag in found if flag != "--help"], (file.name, found)


def test_standard_output_may_be_closed() -> None:
    done = command("-c", "import sys; sys.stdout = None; from jresnet.commands import run; sys.exit(run('train', "
                   "['--depth', '20', '--limit-train', '0'], 'x'))")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: --limit-train must be at least 1, got 0\n"
    assert sys.stdout is not None


def test_a_command_may_write_into_closed_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert commands.guarded(lambda: csv.writer(sys.stdout).writerow(["x"]) * 0, "convert") == 0


@pytest.mark.parametrize("name", commands.PRINTING)
def test_what_is_only_printed_needs_standard_output(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert commands.guarded(lambda: pytest.fail("ran"), name) == 1
    assert f"error: standard output is closed, but {name} prints its result there" in capsys.readouterr().err


def test_the_first_line_comes_before_jax() -> None:
    program = "import sys; from jresnet import commands; commands.greet('train', []); print('jax' in sys.modules)"
    done = command("-c", program)
    assert done.stdout == f"jresnet  {jresnet.__version__}, starting JAX ...\nFalse\n"


@pytest.mark.parametrize("module", ["convert.torch2flax", "convert.flax2torch"])
def test_the_converters_first_line_comes_before_jax(module: str) -> None:
    program = (
        "import sys, runpy; sys.argv[1:] = ['x.pth']; sys.modules['jax'] = None; "
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    done = command("-c", program)
    assert done.stdout == f"jresnet  {jresnet.__version__}, starting JAX ...\n"
    assert "import of jax halted" in done.stderr


def test_commands_that_are_asked_for_help_or_json_greet_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in (("train", ["--help"]), ("evaluate", ["--json"]), ("report", ["x"]), ("info", [])):
        commands.greet(name, arguments)
    assert capsys.readouterr().out == ""


def test_a_platform_that_is_not_there_is_one_line() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = command("scripts/train_cifar10.py", "--dataset", "digits", env=environment)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: JAX found no device (")
    assert "JAX_PLATFORMS is cuda: install jax for this device, or set JAX_PLATFORMS=cpu" in line


def test_versions_need_no_installation() -> None:
    found = installed("numpy", "no-such-distribution")
    assert found == {"numpy": np.__version__, "no-such-distribution": "unknown"}
