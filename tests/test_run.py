"""Whole runs, as commands and from Python: results, resumption, signals, NaN, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, command
from flax import nnx
from safetensors import safe_open

import jresnet
from jresnet import commands
from jresnet.data.cifar10 import CLASSES as CIFAR10_CLASSES
from jresnet.errors import InputError, WeightsError
from jresnet.kernels.compiler import ONEDNN
from jresnet.models import params
from jresnet.reports.metrics_file import read_metrics
from jresnet.training import initial
from jresnet.training import step as train
from jresnet.training.checkpoint import Checkpoints
from jresnet.training.config import RunConfig, default_config
from jresnet.training.console import introduction
from jresnet.training.guard import NonFiniteLoss
from jresnet.training.outputs import Lock
from jresnet.training.program import Program, load_data
from jresnet.training.seeds import fit_seeds
from jresnet.training.stop import Interrupted, StopRequest
from jresnet.training.trainer import Options, Trainer
from jresnet.weights import native as weights
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

SCRIPT = "scripts/train_cifar10.py"
# Small enough for a test: 4 steps an epoch on 64 digits.
SHORT = (
    "--depth", "8", "--dataset", "digits", "--limit-train", "64", "--limit-test", "40", "--batch-size", "16",
    "--milestones", "1", "3",
)  # fmt: skip


def config(**changes) -> RunConfig:
    short = {
        "arch": "resnet8_cifar",
        "dataset": "digits",
        "limit_train": 64,
        "limit_test": 40,
        "batch_size": 16,
        "epochs": 2,
    }
    if not {"recipe", "schedule"} & changes.keys():
        short["milestones"] = (1.0, 3.0)  # one schedule, and so one compiled step, whatever the number of epochs
    return default_config(**{**short, **changes})


PROGRAMS: dict[str, tuple[Program, Any, Any]] = {}  # compiled once


def trainer(out: Path, stop: StopRequest | None = None, options: Options | None = None, **changes) -> Trainer:
    """With the program of all runs of its configuration, from which what a test put into it is taken away."""
    chosen = config(**changes)
    data, key = load_data(chosen, None), str(dataclasses.replace(chosen, seed=0))
    if key not in PROGRAMS:
        program = Program(chosen, data)
        PROGRAMS[key] = (program, program.loop, program.finite)
    program, program.loop, program.finite = PROGRAMS[key]
    vars(program).pop("evaluate", None)
    return Trainer(chosen, data, out, stop, program, options)


def values_of(path: Path) -> dict[str, np.ndarray]:
    return weights.read(path)[2]


@pytest.fixture(scope="module", autouse=True)
def programs_that_are_kept():
    """With oneDNN's calls none is (docs/explanation/jax-versions.md); each of these runs would compile anew."""
    with pytest.MonkeyPatch.context() as patched:
        if jresnet.compiler_options().get(ONEDNN):
            patched.setenv("JRESNET_COMPILER_OPTIONS", "off")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("run") / "out"
    trainer(out, val_split=100).fit()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(8, 0.75), pytest.param(20, 0.95, marks=pytest.mark.long)])
def test_digits_are_learnt(tmp_path: Path, depth: int, accuracy: float) -> None:
    """The README's first command, at depth 20, in a fresh process and compiled as a user's."""
    out = tmp_path / "out"
    began = time.monotonic()
    optimised = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}
    done = command(SCRIPT, "--depth", depth, "--dataset", "digits", "--out", out, env=optimised)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["final"]["test_accuracy"] >= accuracy
    print(f"{time.monotonic() - began:.0f} s")
    for start in ("device ", "network ", "data ", "recipe ", "time ", "epoch 4/4: ", "done ", "results "):
        assert any(line.startswith(start) for line in done.stdout.splitlines()), start
    assert "\r" not in done.stdout  # no terminal: plain lines


def test_a_runs_folder_holds_everything(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "last.safetensors", "best.safetensors", "checkpoints",
        "curves.png", "confusion.png", "worst.png", "tensorboard", "lock",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [4, 8]
    assert {
        "epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_second", "seconds",
    } <= rows[0].keys()  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert {
        "arch", "recipe", "parameters", "dataset", "final", "best", "best_chosen_on", "test_accuracy_by_class", "rollbacks",
        "seconds", "compile_seconds", "images_per_second", "device", "devices", "precision", "seed", "versions", "command",
    } <= summary.keys()  # fmt: skip
    assert summary["parameters"] == 75_290
    assert len(summary["dataset"]["digest"]) == 64
    assert "held out for validation" in summary["best_chosen_on"]
    assert summary["best"]["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    assert summary["final"]["test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["final"]["val_accuracy"] == rows[-1]["val_accuracy"]
    assert list(summary["test_accuracy_by_class"]) == list("0123456789")
    for name in ("curves.png", "confusion.png", "worst.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_the_weights_load_and_classify_as_the_run_says(finished: Path) -> None:
    model = jresnet.create("resnet8_cifar", weights=finished / "last.safetensors")
    chosen = config(val_split=100)
    test = load_data(chosen, None).test
    logits = model(chosen.pipeline().evaluate(test.images[:40]))
    accuracy = float((np.asarray(logits).argmax(1) == test.labels[:40]).mean())
    assert accuracy == json.loads((finished / "summary.json").read_text())["final"]["test_accuracy"]
    assert jresnet.create("resnet8_cifar", weights=finished / "best.safetensors")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Preprocessing(None, 32, *STATISTICS["digits"])),
        (
            {"recipe": "blog", "arch": "resnet20_cifar", "image_size": 56},
            Preprocessing(64, 56, *STATISTICS["imagenet"]),
        ),
    ],
)
def test_the_weights_say_how_to_prepare_images(tmp_path: Path, changes: dict, expected: Preprocessing) -> None:
    first = trainer(tmp_path, **changes)
    first.outputs.weights("last.safetensors", first.state, {})
    metadata = weights.read(tmp_path / "last.safetensors")[3]
    assert Preprocessing.from_json(metadata["preprocessing"]) == expected
    assert json.loads(metadata["categories"]) == list("0123456789")


def test_a_run_is_a_function_of_its_seed(finished: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "same", val_split=100).fit()
    trainer(tmp_path / "other", val_split=100, seed=1).fit()
    expected = values_of(finished / "last.safetensors")
    same, other = (values_of(tmp_path / name / "last.safetensors") for name in ("same", "other"))
    assert all(np.array_equal(same[name], expected[name]) for name in expected)
    assert not np.array_equal(other["fc.kernel"], expected["fc.kernel"])


@pytest.mark.parametrize("stop_after", [pytest.param(2, marks=pytest.mark.long), 4, 7])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(finished: Path, tmp_path: Path, stop_after: int) -> None:
    """Bit for bit, also from the middle of an epoch."""
    out, stop = tmp_path / "out", StopRequest()
    first = trainer(out, stop, val_split=100)
    steps = []

    def after_step(count: int = 1) -> None:
        steps.append(count)
        if len(steps) == stop_after:
            stop.signal = signal.SIGTERM

    first.console.step = after_step  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.fit()
    assert weights.load(out / "last.safetensors")
    assert not (out / "summary.json").exists()
    summary = trainer(out, val_split=100).fit(resume=True)
    expected, found = values_of(finished / "last.safetensors"), values_of(out / "last.safetensors")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    rows, again = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (finished, out)
    )
    same = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "test_loss", "test_accuracy")
    assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in again]
    assert summary["best"]["epoch"] == json.loads((finished / "summary.json").read_text())["best"]["epoch"]


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    expected = values_of(finished / "last.safetensors")
    done = command(SCRIPT, "--out", finished, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed  at step 8 of 8" in done.stdout
    assert (finished / "metrics.jsonl").read_text() == before
    found = values_of(finished / "last.safetensors")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("number", "code", "more", "folder"),
    [
        (signal.SIGTERM, 143, [], "out"),
        pytest.param(signal.SIGINT, 130, ["--runs", "2", "--deterministic"], "out/seed-0", marks=pytest.mark.long),
    ],
)
def test_signals_save_and_exit(tmp_path: Path, number: int, code: int, more: list[str], folder: str) -> None:
    whole, out = tmp_path / "out", tmp_path / folder
    arguments = [sys.executable, "-u", SCRIPT, *SHORT, "--epochs", "50", "--out", str(whole), *more]
    with subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1/50"):
                break
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == code
    assert f"the state is saved to continue, run the same command with --out {whole} --resume" in " ".join(rest.split())
    options = json.loads((out / "config.json").read_text())["options"]
    assert options["deterministic"] == ("--deterministic" in more)
    assert weights.load(out / "last.safetensors")
    assert list((out / "checkpoints").iterdir())
    resumed = trainer(out, epochs=50)
    resumed.stop.signal = number  # go no further than the checkpoint
    with pytest.raises(Interrupted):
        resumed.fit(resume=True)
    assert int(resumed.state.step) >= 4


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    out, weights_file = tmp_path / "out", digits_file(tmp_path / "large.safetensors", kernel=1e38)
    done = command(SCRIPT, *SHORT, "--epochs", 2, "--weights", weights_file, "--out", out)
    assert done.returncode == 1
    assert re.search(r"error: the loss is (nan|inf) at step 0 \(epoch 1\)", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "last.safetensors").exists()


def break_after(trainer: Trainer, step: int, times: int = 1) -> None:
    """Makes the loss NaN in the next stretch that ends after ``step``, ``times`` times."""
    loop, left = trainer.program.loop, [times]

    class Breaking:
        on_device, compile, stretch = loop.on_device, loop.compile, loop.stretch

        def __call__(self, *arguments, **options):
            state, metrics = loop(*arguments, **options)
            if int(state.step) > step and left[0]:
                left[0] -= 1
                metrics.loss[-1] = np.nan
            return state, metrics

    trainer.program.loop = Breaking()  # type: ignore[assignment]


def test_a_nan_leaves_the_last_good_checkpoint_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = trainer(out)
    break_after(first, 4)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step [4-7] \(epoch 2\)"):
        first.fit()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["4.safetensors"]
    summary = trainer(out).fit(resume=True)
    assert np.isfinite(summary["final"]["test_loss"])


def test_rollback_goes_back_and_on_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path / "out", on_nan="rollback")
    break_after(first, 4, times=2)
    summary = first.fit()
    said = capsys.readouterr().out
    assert "rollback 1 of 3: the loss is nan at step" in said
    assert "rollback 2 of 3" in said
    assert "resumed  at step 4 of 8" in said
    assert summary["rollbacks"] == 2
    assert [row["epoch"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    undisturbed = trainer(tmp_path / "other").fit()
    assert summary["final"]["train_loss"] != undisturbed["final"]["train_loss"]


def test_rollback_gives_up_after_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path / "out", on_nan="rollback")
    break_after(first, 0, times=9)  # before any checkpoint: it begins again
    with pytest.raises(NonFiniteLoss):
        first.fit()
    assert capsys.readouterr().out.count("rollback ") == 3


@pytest.mark.parametrize("bad", [4, 8])
def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, bad: int) -> None:
    """Neither in a checkpoint, nor as the best, nor as a row."""
    first = trainer(tmp_path / "out")
    first.program.finite = lambda state: int(state.step) < bad  # type: ignore[assignment]
    with pytest.raises(NonFiniteLoss, match=f"a weight is not finite after a finite loss at step {bad - 1}"):
        first.fit()
    good = bad - 4
    expected = [f"{good}.safetensors"] if good else []
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == expected
    assert (tmp_path / "out" / "best.safetensors").exists() == bool(good)
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == good // 4


@pytest.mark.parametrize("good", [0, 1])
def test_an_epoch_whose_logits_are_not_finite_is_never_the_best(tmp_path: Path, good: int) -> None:
    first = trainer(tmp_path)
    evaluate, seen = first.program.evaluate, []

    def flattering(state, name, *more):
        seen.append(int(state.step))
        found = evaluate(state, name, *more)
        return found._replace(loss=float("nan"), accuracy=1.0) if int(state.step) > 4 * good else found

    first.program.evaluate = flattering  # type: ignore[method-assign]
    summary = first.fit()
    assert first.done.best_epoch == good
    assert summary["best"].get("epoch", 0) == good
    assert (tmp_path / "best.safetensors").exists() == bool(good)
    assert summary["final"]["test_loss"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_an_epoch_that_was_interrupted_in_its_evaluation_gets_its_score(tmp_path: Path) -> None:
    first = trainer(tmp_path)

    def interrupted(*_: object) -> None:
        first.stop.signal = signal.SIGTERM

    first.program.evaluate = interrupted  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        first.fit()

    def score() -> float | None:
        with safe_open(tmp_path / "checkpoints" / "4.safetensors", "numpy") as file:
            return json.loads(file.metadata()["about"])["score"]

    assert score() is None
    trainer(tmp_path).fit(resume=True)
    assert score() == read_metrics(tmp_path / "metrics.jsonl")[0]["test_accuracy"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".best.safetensors.ab12", ".summary.json.x"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".mine").write_text("")
    trainer(tmp_path).fit()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".mine"]


def test_debug_nans_names_the_layer(tmp_path: Path) -> None:
    first = trainer(tmp_path / "out", options=Options(debug_nans=True))
    params = first.state.params
    params["layer2"][0]["bn2"]["scale"][...] = params["layer2"][0]["bn2"]["scale"][...].at[3].set(np.inf)
    with pytest.raises(NonFiniteLoss, match=r"at step 0 \(epoch 1\)\n  .*layer2\.0\.bn2"):
        first.fit()


def test_deterministic_is_a_flag_that_xla_knows(tmp_path: Path) -> None:
    """Of a flag that it does not know, XLA dies when JAX starts; this command goes on to its own mistake."""
    done = command(SCRIPT, *SHORT, "--devices", 1000, "--deterministic", "--out", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "--devices must be from 1 to" in done.stderr


def test_checkpoints_by_the_minute(tmp_path: Path) -> None:
    first = trainer(tmp_path / "out", options=Options(checkpoint_minutes=0))
    saved = []
    save = Checkpoints.save

    def noting(self, state, progress, score=None):
        saved.append((int(state.step), score is not None))
        save(self, state, progress, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", noting)
        first.fit()
    assert saved == [(step, step % 4 == 0) for step in range(1, 9)]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with Lock(tmp_path), pytest.raises(InputError, match=r"another run is using .* \(process \d+"):
        trainer(tmp_path).fit()


def test_a_signal_while_compiling(tmp_path: Path) -> None:
    chosen = config()
    first = Trainer(chosen, load_data(chosen, None), tmp_path / "out")  # whose program is not compiled yet
    first.stop.signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        first.fit()
    assert not (tmp_path / "out" / "last.safetensors").exists()
    assert trainer(tmp_path / "out").fit(resume=True)["final"]["epoch"] == 2


def test_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = config(seed=3)
    data = load_data(chosen, None)
    out = tmp_path / "out"
    summary = fit_seeds(chosen, data, out, 2)
    said = capsys.readouterr().out
    assert said.count("compiled in") == 1
    assert "seed 3\n" in said
    assert "seed 4\n" in said
    for n in (3, 4):
        assert json.loads((out / f"seed-{n}" / "config.json").read_text())["run"]["seed"] == n
    assert (summary["n"], summary["seeds"]) == (2, [3, 4])
    values = [json.loads((out / f"seed-{n}" / "summary.json").read_text())["final"]["test_accuracy"] for n in (3, 4)]
    assert summary["final"]["test_accuracy"]["values"] == values
    assert summary["final"]["test_accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert summary["final"]["test_accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    trainer(tmp_path / "single", seed=4).fit()
    single, one_of_two = (values_of(tmp_path / name / "last.safetensors") for name in ("single", "out/seed-4"))
    assert all(np.array_equal(single[name], one_of_two[name]) for name in single)

    capsys.readouterr()
    (out / "seed-4" / "summary.json").unlink()
    again = fit_seeds(chosen, data, out, 2, resume=True)  # the finished one is left alone
    assert again["final"]["test_accuracy"] == summary["final"]["test_accuracy"]
    assert capsys.readouterr().out.count("done  ") == 1
    with pytest.raises(InputError, match="already contains a run"):
        fit_seeds(chosen, data, out, 2)
    before = (out / "summary.json").read_bytes()
    for runs in (1, 3):
        with pytest.raises(InputError, match=f"`runs` was 2, now {runs}"):
            fit_seeds(chosen, data, out, runs, resume=True)
    with pytest.raises(InputError, match="`runs` was 2, now not given"):
        Trainer(chosen, data, out).fit(resume=True)
    assert (out / "summary.json").read_bytes() == before
    for damaged in ("{", "[]", "{}", "[" * 10**5):
        (out / "seed-3" / "summary.json").write_text(damaged)
        with pytest.raises(InputError, match=r"summary\.json|different seeds"):
            fit_seeds(chosen, data, out, 2, resume=True)


def test_seeds_end_where_numpys_do(tmp_path: Path) -> None:
    chosen = config(seed=2**32 - 1)
    with pytest.raises(InputError, match="`seed` must be from 0 to 4294967295, got 4294967296"):
        fit_seeds(chosen, load_data(chosen, None), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--depth", "35"], 2, "unknown --depth 35: there are 8, 18, 20, 32, 34"),
        (["--depth", "20", "--arch", "resnet18"], 2, "not allowed with"),
        (["--arch", "resnet2O_cifar"], 1, "unknown architecture 'resnet2O_cifar': did you mean resnet"),
        (["--recipe", "fasst"], 2, "invalid choice: 'fasst'"),
        (
            ["--epochs", "0", "--lr", "-1", "--momentum", "1"],
            1,
            "--epochs must be from 1 to 1000000, got 0; --lr must be above 0, got -1.0; --momentum must be at least 0",
        ),
        (["--schedule", "cosine", "--milestones", "5"], 1, "--milestones are only for --schedule step, not cosine"),
        (["--warmup-epochs", "120"], 1, "milestone 100 is within the warm-up"),
        (
            ["--ema", "1", "--label-smoothing", "2"],
            1,
            "--label-smoothing must be at least 0 and below 1, got 2.0; --ema must be at least 0 and below 1, got 1.0",
        ),
        (["--runs", "0"], 2, "--runs must be from 1 to 10000, got 0"),
        (["--checkpoint-minutes", "-1"], 1, "--checkpoint-minutes must be at least 0, got -1.0"),
        (["--checkpoint-minutes", "nan"], 1, "--checkpoint-minutes must be finite, got nan"),
        (["--milestones", "nan"], 1, "--milestones must be finite, got [nan]"),
        (["--milestones", "5", "inf"], 1, "--milestones must be finite, got [5.0, inf]"),
        (["--lr", "inf"], 1, "--lr must be finite, got inf"),
        (["--gamma", "1e300"], 1, "--gamma must be finite"),
        (["--epochs", "99999999999999999999"], 1, "--epochs must be from 1 to 1000000"),
        (["--seed", "4294967295", "--runs", "2", "--dataset", "digits", "--out", "x"], 1, "--seed must be from 0 to"),
        (["--coordinator", "x", "--num-processes", "2", "--process-id", "0", "--out", "x"], 1,
         "--coordinator must be HOST:PORT, got 'x'"),
        (["--dataset", "digits", "--out", ""], 2, "argument --out: expected a folder, got ''"),
        (["--devices", "1000", "--dataset", "digits"], 1, "--devices must be from 1 to"),
        (["--distributed", "auto", "--process-id", "0"], 2, "determines --coordinator, --num-processes and --process-id"),
        (["--epochs", "many"], 2, "invalid int value"),
        (["--resume"], 2, "--resume needs --out"),
        (["--dataset", "digits", "--batch-size", "2000"], 1, "a batch of 2000 is larger than the 1437 training images"),
        (["--dataset", "digits", "--val-split", "1437"], 1, "leaves none of the 1437 training images"),
        (["--data-dir", "{empty}"], 1, "{empty}"),
        (["--dataset", "digits", "--depth", "8", "--out", "{file}/x"], 1, "cannot use --out"),
        (["--dataset", "digits", "--out", "{run}"], 1, "already contains a run (config.json"),
        (["--out", "{run}", "--resume", "--depth", "32"], 1, "--arch was 'resnet8_cifar', now 'resnet32_cifar'"),
        (["--out", "{run}", "--resume", "--lr", "0.2", "--seed", "5"], 1, "--lr was 0.025, now 0.2; --seed was 0, now 5. "
         "To start a new run from its weights, give --weights {run}/last.safetensors and another --out"),
        (["--out", "{run}", "--resume", "--epochs", "1"], 1, "--epochs was 2, now 1 (2 epochs have already been started)"),
        (["--out", "{run}", "--resume", "--epochs", "4", "--milestones", "1.5"], 1, "before epoch 2 cannot change"),
        (["--weights", "{file}", "--dataset", "digits"], 1, "file"),
        (["--weights", "{run}/last.safetensors", "--depth", "32"], 1, "are of another network"),
        (["--weights", "{run}/missing.safetensors", "--lr", "inf"], 1, "--lr must be finite"),
        (["--weights", ""], 1, "weights are an empty string"),
        (["--out", "{run}", "--resume", "--runs", "3"], 1, "--runs was not given, now 3"),
        (["--out", "{broken}", "--resume"], 1, "is not the configuration of a run"),
    ],
)  # fmt: skip
def test_bad_input(
    finished: Path, tmp_path: Path, arguments: list[str], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {name: tmp_path / name for name in ("empty", "file", "broken")}
    places["empty"].mkdir()
    places["broken"].mkdir()
    (places["broken"] / "config.json").write_text("{")
    places["file"].write_text("")
    names = {**places, "run": finished}
    content = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    before = sorted(tmp_path.rglob("*"))
    for name, value in (("HOME", tmp_path), ("HTTPS_PROXY", "http://127.0.0.1:9")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    found = commands.run("train", [argument.format(**names) for argument in arguments], "train_cifar10.py")
    said = capsys.readouterr().err
    assert found == code, said
    assert message.format(**names) in said
    assert "`" not in said
    assert sorted(path for path in tmp_path.rglob("*") if ".cache" not in path.parts) == before
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == content


def digits_file(path: Path, head: float = 0.0, kernel: float = 1.0, **said: object) -> Path:
    """A native file of a resnet8_cifar whose head has known biases, and its kernel times ``kernel``."""
    model = jresnet.create("resnet8_cifar", seed=7, num_classes=said.pop("classes", 10))
    model.fc.bias[...] = jax.numpy.full_like(model.fc.bias[...], head)
    model.fc.kernel[...] *= kernel
    weights.save(path, model, **said)
    return path


def test_a_run_starts_from_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the same classes as it is; then the command, whose steps hardly move the weights."""
    names = tuple("0123456789")
    same = digits_file(tmp_path / "same.safetensors", head=3.0, categories=names)
    first = trainer(tmp_path / "out", weights=str(same))
    state, notes = first.program.pretrained(0)
    assert notes == []
    found = train.model_of(first.program.graph, state)
    expected = values_of(same)
    assert all(np.array_equal(value, expected[name]) for name, value in params.arrays(found).items())
    out = tmp_path / "command"
    arguments = [*SHORT[2:], "--epochs", "2", "--lr", "1e-30", "--weight-decay", "0", "--weights", str(same)]
    assert commands.run("train", [*arguments, "--out", str(out)], "train") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"weights  the run starts from {same}".split() == said[said.index("weights  the") :].split()[:6]
    ended, metadata = weights.read(out / "last.safetensors")[2:]
    learned = [name for name in expected if not name.endswith(("mean", "var"))]
    assert all(np.allclose(ended[name], expected[name], rtol=0, atol=1e-20) for name in learned)
    assert metadata["started_from"] == same.name
    assert json.loads((out / "config.json").read_text())["run"]["arch"] == "resnet8_cifar"  # not the default
    same.unlink()  # a run that has checkpoints needs them no more
    assert commands.run("train", ["--out", str(out), "--resume"], "train") == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "note"),
    [
        (
            {"categories": CIFAR10_CLASSES},
            "new head for 10 classes, to be trained: the weights have a head for airplane",
        ),
        ({"classes": 7}, "new head for 10 classes, to be trained: the weights have a head for 7"),
        ({}, "the head for 10 classes is that of the weights, but the weights do not name their classes"),
    ],
)
def test_a_head_for_other_classes_is_a_fresh_one(tmp_path: Path, said: dict, note: str) -> None:
    path = digits_file(tmp_path / "other.safetensors", head=3.0, **said)
    program = trainer(tmp_path / "out", weights=str(path)).program
    heads = []
    for seed in (0, 1):
        state, notes = program.pretrained(seed)
        assert len(notes) == 1
        assert notes[0].startswith(note)
        model = train.model_of(program.graph, state)
        heads.append(np.asarray(model.fc.bias[...]))
        assert np.array_equal(model.conv1.kernel[...], values_of(path)["conv1.kernel"])
    if said:
        assert abs(heads[0]).max() < 1
        assert not np.array_equal(*heads)
    else:
        assert (heads[0] == 3).all()


def test_weights_that_no_run_starts_from(tmp_path: Path) -> None:
    grey = jresnet.create("resnet8_cifar", in_channels=1)
    odd = jresnet.ResNet(jresnet.ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar"), rngs=nnx.Rngs(0))
    for name, model, message in (
        ("grey", grey, "of 1 channels"),
        ("odd", odd, "to a network without a name|unmodified"),
    ):
        weights.save(tmp_path / name, model)
        with pytest.raises(WeightsError, match=message):
            initial.load(str(tmp_path / name))


def test_a_run_by_steps_goes_on_for_more_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends, bit for bit, where a run of that length does; its figures are written anew."""
    out = tmp_path / "out"
    trainer(out).fit()
    summary = trainer(out, epochs=4).fit(resume=True)
    assert summary["final"]["epoch"] == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "note the run continues with another configuration: `epochs` was 2, now 4" in said
    trainer(tmp_path / "whole", epochs=4).fit()
    expected = values_of(tmp_path / "whole" / "last.safetensors")
    assert all(np.array_equal(value, expected[name]) for name, value in values_of(out / "last.safetensors").items())
    with pytest.raises(
        InputError, match=r"milestones before epoch 4 cannot change any more.*`weights` .*last\.safetensors"
    ):
        trainer(out, milestones=(1.0,), epochs=5).fit(resume=True)
    assert (out / "summary.json").exists()


def test_seeds_go_on_for_more_epochs(tmp_path: Path) -> None:
    short, longer = (config(epochs=epochs) for epochs in (2, 3))
    data = load_data(short, None)
    fit_seeds(short, data, tmp_path / "out", 2)
    assert fit_seeds(longer, data, tmp_path / "out", 2, resume=True)["final"]["epoch"]["values"] == [3, 3]


def test_a_line_a_minute_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(tmp_path / "out")
    ask = first._watched("test")
    first.console.last -= 100
    assert not ask()
    assert not ask()
    assert capsys.readouterr().out == "evaluating test: 0 of 3 batches\n"
    first.stop.signal = signal.SIGTERM
    assert ask()
    assert not first._watched("test", stops=False)()


def test_a_schedule_that_depends_on_the_length_does_not_go_on(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    begun = json.loads((out / "config.json").read_text())
    begun["run"] |= {"schedule": "cosine", "milestones": []}
    (out / "config.json").write_text(json.dumps(begun))
    with pytest.raises(InputError, match="with `schedule` cosine all learning rates depend on the number of epochs"):
        trainer(out, val_split=100, schedule="cosine", epochs=3).fit(resume=True)


@pytest.mark.long
def test_every_architecture_trains_on_cifar10s_shape(tmp_path: Path) -> None:
    """Rows with one input channel or the ImageNet stem by default, and the blog's recipe at a small size.

    64 pixels leave layer4 four values an image: BatchNorm over a batch of two single pixels divides by almost nothing.
    """
    for changes in ({"arch": "resnet18_d2l"}, {"arch": "resnet34_projection", "recipe": "blog", "image_size": 64}):
        chosen = config(limit_train=8, limit_test=4, batch_size=4, epochs=1, **changes)
        out = tmp_path / chosen.arch
        summary = Trainer(chosen, load_data(chosen, None), out).fit()
        assert summary["final"]["test_loss"] < 100, chosen.arch


def test_the_run_says_what_decays(tmp_path: Path) -> None:
    for recipe, expected in (("step", "on all parameters"), ("fast", "on kernels only, not on BN and biases")):
        program = trainer(tmp_path / recipe, recipe=recipe, epochs=1, limit_train=16).program
        assert f"weight decay 0.0005 {expected}" in "\n".join(introduction(program.config, program, 1))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jresnet.training import checkpoint

    out = tmp_path / "out"
    first = trainer(out)
    usage = checkpoint.shutil.disk_usage

    def filling(folder: Path):
        return usage(folder)._replace(free=0) if int(first.state.step) > 4 else usage(folder)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", filling)
    with pytest.raises(InputError, match=r"cannot write a checkpoint to .*the disk has 0 free"):
        first.fit()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["4.safetensors"]
    monkeypatch.undo()
    assert trainer(out).fit(resume=True)["final"]["epoch"] == 2
