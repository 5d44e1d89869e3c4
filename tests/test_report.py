"""Runs side by side: the table's figures and states, the summary of several seeds, and folders that are refused."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import command

from jresnet.commands.report import main
from jresnet.errors import InputError
from jresnet.reports import compare as report

CONFIG = {"arch": "resnet20_cifar", "dataset": "cifar10", "recipe": "fast", "epochs": 3, "batch_size": 128, "lr": 0.1,
          "precision": "float32", "milestones": [1.5, 2.25], "limit_train": None, "val_split": 5000, "seed": 0}  # fmt: skip
VERSIONS = {"python": "3.11.7", "jax": "0.10.1", "flax": "0.12.8"}


def make_run(
    folder: Path, accuracies: list[float], finished: bool = True, versions: dict[str, str] = VERSIONS, **config: Any
) -> Path:
    """A run's folder with made-up numbers: ``accuracies`` are those on the test images, validation's 0.01 lower."""
    config = CONFIG | config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"run": config, "command": "train.py --runs 3"}))
    rows = [
        {"epoch": epoch, "step": 351 * epoch, "lr": 0.1, "train_loss": 2 / epoch + accuracy, "train_accuracy": 0.5,
         "val_loss": 1.25, "val_accuracy": accuracy - 0.01, "test_loss": 1.5, "test_accuracy": accuracy,
         "images_per_second": 90.0 + epoch, "seconds": 100.0 * epoch + config["seed"]}
        for epoch, accuracy in enumerate(accuracies, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary_of(rows, config, versions)))
    return folder


def summary_of(rows: list[dict], config: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in rows[-1].items() if name == "epoch" or name.endswith(("_loss", "_accuracy"))}
    best = max(rows, key=lambda row: row["val_accuracy"])
    dataset = {"name": "cifar10", "digest": "ed25", "train_images": 45000, "val_images": 5000, "test_images": 1000}
    return {
        "arch": config["arch"], "parameters": 269722, "dataset": dataset, "final": kept,
        "best": {name: best[name] for name in best if name == "epoch" or name.startswith("val_")},
        "best_chosen_on": "validation", "test_accuracy_by_class": {"cat": 0.5}, "rollbacks": 0,
        "seconds": rows[-1]["seconds"], "compile_seconds": 20.0, "images_per_second": rows[-1]["images_per_second"],
        "device": "cpu (cpu)", "precision": "float32", "seed": config["seed"], "versions": versions,
        "command": "train.py --runs 3",
    }  # fmt: skip


def make_seeds(folder: Path, finals: list[float], planned: int | None = None, **options: Any) -> Path:
    """A folder of seeds that are finished; ``planned`` writes the shared config.json too."""
    for seed, final in enumerate(finals):
        make_run(folder / f"seed-{seed}", [0.3, 0.5, final], seed=seed, **options)
    if planned:
        (folder / "config.json").write_text(json.dumps({"run": CONFIG, "runs": planned, "command": "x"}))
    return folder


def figures(*folders: Path) -> list[dict[str, Any]]:
    return [report.figures(entry) for entry in report.read_entries(folders)]


def test_a_finished_run(tmp_path: Path) -> None:
    (found,) = figures(make_run(tmp_path / "a", [0.3, 0.5, 0.7]))
    assert found == {
        "name": "a", "folder": str(tmp_path / "a"), "arch": "resnet20_cifar", "recipe": "fast", "dataset": "cifar10",
        "epochs": 3, "batch_size": 128, "lr": 0.1, "precision": "float32",
        "images": {"train": 45000, "val": 5000, "test": 1000}, "seeds": [0], "n": 1,
        "train_loss": {"mean": 2 / 3 + 0.7, "std": None, "values": [2 / 3 + 0.7]},
        "val_accuracy": {"mean": 0.69, "std": None, "values": [0.69]},
        "test_accuracy": {"mean": 0.7, "std": None, "values": [0.7]},
        "images_per_second": {"mean": 93.0, "std": None, "values": [93.0]},
        "seconds": {"mean": 300.0, "std": None, "values": [300.0]}, "state": "finished",
    }  # fmt: skip


def test_runs_that_are_not_finished(tmp_path: Path) -> None:
    make_run(tmp_path / "half", [0.3, 0.5], finished=False)
    make_run(tmp_path / "begun", [], finished=False)
    make_run(tmp_path / "bare", [], finished=False)
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    with (tmp_path / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # being written, or killed
    half, begun, bare = figures(*(tmp_path / name for name in ("half", "begun", "bare")))
    assert (half["state"], begun["state"], bare["state"]) == ("epoch 2 of 3", "empty", "empty")
    assert half["test_accuracy"]["mean"] == 0.5
    assert begun["test_accuracy"] is None
    assert half["images"] == {"train": None, "val": None, "test": None}


def test_several_seeds(tmp_path: Path) -> None:
    make_seeds(tmp_path / "a", [0.7, 0.72, 0.77], planned=3)
    make_seeds(tmp_path / "b", [0.7, 0.72, 0.77])
    for found in figures(tmp_path / "a", tmp_path / "b"):
        assert (found["n"], found["seeds"], found["state"]) == (3, [0, 1, 2], "finished")
        assert found["test_accuracy"]["mean"] == pytest.approx(0.73)
        assert found["test_accuracy"]["std"] == pytest.approx(statistics.stdev([0.7, 0.72, 0.77]))
        assert found["seconds"]["mean"] == 301


def test_several_seeds_under_way(tmp_path: Path) -> None:
    out = make_seeds(tmp_path / "a", [0.7, 0.72], planned=4)
    make_run(out / "seed-2", [0.3], finished=False, seed=2)
    (found,) = figures(out)
    assert found["state"] == "2 of 4 seeds finished, seed 2 epoch 1 of 3"
    assert found["test_accuracy"]["values"] == [0.7, 0.72]
    for seed in (0, 1):
        (out / f"seed-{seed}" / "summary.json").unlink()
    (found,) = figures(out)  # none is finished: all at the epoch that each has reached
    assert (found["n"], found["test_accuracy"]["values"]) == (3, [0.3, 0.3, 0.3])
    (out / "seed-3").mkdir()  # made, and nothing in it yet
    assert len(report.read_entry(out).runs) == 3
    empty = make_seeds(tmp_path / "empty", [], planned=None)
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"run": CONFIG, "runs": 2}))
    assert figures(empty)[0]["state"] == "empty"


def test_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_seeds(tmp_path / "jresnet", [0.7, 0.72], planned=2)
    make_run(tmp_path / "half", [0.3], finished=False)
    assert main([str(tmp_path / "jresnet"), str(tmp_path / "half"), "--plot", str(tmp_path / "x.png")]) == 0
    out, err = capsys.readouterr()
    common, empty, *table = out.splitlines()
    assert common == "arch resnet20_cifar, recipe fast, epochs 3, batch 128, lr 0.1, precision float32"
    assert empty == ""
    assert [re.split(r" {2,}", line) for line in table] == [
        ["run", "data", "seeds", "train loss", "val accuracy", "test accuracy", "images/s", "time", "state"],
        ["jresnet", "cifar10 (45,000 train, 5,000 val, 1,000 test)", "2", "1.3767 ± 0.0141", "70.00 ± 1.41 %",
         "71.00 ± 1.41 %", "93", "5 min", "finished"],
        ["half", "cifar10", "1", "2.3000", "29.00 %", "30.00 %", "91", "1 min 40 s", "epoch 1 of 3"],
    ]  # fmt: skip
    assert len({line.index(word) for line, word in zip(table, ("state", "finished", "epoch 1"), strict=True)}) == 1
    assert (
        len({line.index(word) + len(word) for line, word in zip(table, ("images/s", " 93", " 91"), strict=True)}) == 1
    )
    assert err == f"plot     {tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", [0.3, 0.5, 0.7])
    make_run(tmp_path / "c", [], finished=False)
    assert main(["a", "c", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures(Path("a"), Path("c"))
    assert Path("comparison.png").exists()


def test_a_plot_that_exists_is_replaced_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "x.png"
    plot.write_text("mine")
    arguments = [str(make_run(tmp_path / "a", [0.3, 0.5, 0.7])), "--plot", str(plot)]
    assert main(arguments) == 1
    assert capsys.readouterr() == ("", f"error: {plot} exists: --force replaces it, or name another file with --plot\n")
    assert plot.read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_the_default_name_that_exists_leaves_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second look at the same runs shows their table, and what is there stays."""
    monkeypatch.chdir(tmp_path)
    Path("comparison.png").write_text("mine")
    assert main([str(make_run(tmp_path / "a", [0.3, 0.5, 0.7]))]) == 0
    table, said = capsys.readouterr()
    assert "a" in table
    assert said.startswith("no plot: comparison.png exists: --force replaces it")
    assert Path("comparison.png").read_text() == "mine"


def test_pipes_in_the_place_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        run = make_run(tmp_path / name, [0.3, 0.5, 0.7])
        (run / name).unlink()
        os.mkfifo(run / name)
        assert main([str(run), "--plot", str(tmp_path / "x.png")]) == 1
        error = f"error: cannot read {run / name}: it is a folder, a device or a pipe\n"
        assert capsys.readouterr().err == error


def test_nothing_to_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", [], finished=False)
    assert main([str(tmp_path / "a"), "--plot", str(tmp_path / "x.png")]) == 0
    assert "no plot" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_names_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/out", "y/out", "z"):
        make_run(tmp_path / name, [0.3, 0.5, 0.7])
    monkeypatch.chdir(tmp_path / "z")
    entries = report.read_entries([Path("../x/out"), Path("../y/out"), Path(), Path("../y/../x/out")])
    assert [entry.name for entry in entries] == ["../x/out", "../y/out", "z"]


def test_a_loss_that_was_not_finite_and_odd_names(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [0.3, 0.5, 0.7], arch="\x1b[2Jevil\n")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"train_loss": [\d.]+', '"train_loss": null', text))
    (found,) = figures(folder)
    row = report.cells(found)
    assert (row["train loss"], row["arch"]) == ("nan", "?[2Jevil?")
    json.dumps(found, allow_nan=False)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_everything_that_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", [0.3, 0.5, 0.7])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("json", "list", "norun", "types", "line", "number", "epoch", "short", "summary"):
        make_run(tmp_path / name, [0.3, 0.5, 0.7])
    (tmp_path / "json/config.json").write_text("{")
    (tmp_path / "list/config.json").write_text("[" * 10**5)
    (tmp_path / "norun/config.json").write_text("{}")
    edit(tmp_path / "types/config.json", '"lr": 0.1, ', '"lr": true, ')
    edit(tmp_path / "types/config.json", '"arch": "resnet20_cifar", ', "")
    edit(tmp_path / "line/metrics.jsonl", '"step": 351,', '"step"')
    edit(tmp_path / "number/metrics.jsonl", '"val_loss": 1.25', '"val_loss": "x"')
    edit(tmp_path / "epoch/metrics.jsonl", '"epoch": 2', '"epoch": 3')
    edit(tmp_path / "short/config.json", '"epochs": 3', '"epochs": 4')
    (tmp_path / "summary/summary.json").write_text("[]")
    different = make_seeds(tmp_path / "different", [0.7, 0.8])
    edit(different / "seed-1/config.json", '"lr": 0.1', '"lr": 0.2')
    edit(different / "seed-1/config.json", '"val_split": 5000, ', "")
    wrong_seed = make_seeds(tmp_path / "wrong-seed", [0.7])
    edit(wrong_seed / "seed-0/config.json", '"seed": 0', '"seed": 7')
    expected = {
        "missing": "is not a folder", "empty": "is not the folder of a run: it has no config.json",
        "file": "is not a folder", "json": "config.json is damaged: it is not JSON",
        "list": "config.json is damaged: it is not JSON",
        "norun": 'config.json is not the configuration of a run: it has no "run"',
        "types": "config.json is not the configuration of a run: arch, lr missing or of a wrong type",
        "line": "metrics.jsonl is damaged: line 1 is not a JSON object",
        "number": "metrics.jsonl is damaged: line 1: invalid value of val_loss",
        "epoch": "metrics.jsonl is damaged: line 2: it is epoch 3",
        "short": "metrics.jsonl has 3 complete lines, but the finished run has 4 epochs",
        "summary": "summary.json is damaged: it is not a JSON object",
        "different": "seed-1 differs from seed-0 in lr, val_split", "wrong-seed": "seed-0 has seed 7",
    }  # fmt: skip
    assert main(["--plot", str(tmp_path / "x.png"), *(str(tmp_path / name) for name in ["good", *expected])]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == len(expected)
    for line, (name, message) in zip(err.splitlines(), expected.items(), strict=True):
        assert line.startswith(f"error: {tmp_path / name}")
        assert message in line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("module", ["jresnet.reports.compare", "jresnet.reports.plots", "jresnet.commands.report"])
def test_reports_need_no_jax(module: str) -> None:
    code = f"import {module}, sys; sys.exit(str({{'jax', 'torch', 'matplotlib'}} & set(sys.modules) or ''))"
    done = command("-c", code)
    assert done.stderr.strip() == ""


def test_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.3, 0.5, 0.7])
    done = command("-m", "jresnet", "report", tmp_path / "a", "--plot", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert "70.00 %" in done.stdout
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "a"), "--plot", "x.svg"])
    assert refused.value.code == 2


def summaries(*finals: float) -> list[dict[str, Any]]:
    rows = [
        [{"epoch": 1, "val_accuracy": a, "test_accuracy": a, "seconds": 10 * a, "images_per_second": 5.0}]
        for a in finals
    ]
    return [
        summary_of(rows[seed], CONFIG | {"seed": seed}, VERSIONS) | {"best": {"epoch": seed}}
        for seed in range(len(rows))
    ]


def test_the_summary_of_seeds() -> None:
    found = report.summarise(summaries(0.1, 0.2, 0.6))
    assert found == {
        "n": 3, "seeds": [0, 1, 2], "runs": ["seed-0", "seed-1", "seed-2"], "arch": "resnet20_cifar", "parameters": 269722,
        "dataset": summaries(0.1)[0]["dataset"], "device": "cpu (cpu)", "precision": "float32",
        "best_chosen_on": "validation", "versions": VERSIONS, "command": "train.py --runs 3",
        "final": {
            "epoch": {"mean": 1.0, "std": 0.0, "values": [1, 1, 1]},
            "val_accuracy": {"mean": pytest.approx(0.3), "std": pytest.approx(0.07**0.5), "values": [0.1, 0.2, 0.6]},
            "test_accuracy": {"mean": pytest.approx(0.3), "std": pytest.approx(0.07**0.5), "values": [0.1, 0.2, 0.6]},
        },
        "best": {"epoch": {"mean": 1.0, "std": 1.0, "values": [0, 1, 2]}},
        "seconds": {"mean": pytest.approx(3), "std": pytest.approx(7**0.5), "values": [1, 2, 6]},
        "compile_seconds": {"mean": 20.0, "std": 0.0, "values": [20, 20, 20]},
        "images_per_second": {"mean": 5.0, "std": 0.0, "values": [5, 5, 5]},
    }  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_the_summary_of_one_seed_and_of_unlike_ones() -> None:
    assert report.summarise(summaries(0.1))["final"]["test_accuracy"] == {"mean": 0.1, "std": None, "values": [0.1]}
    first, second = summaries(0.1, 0.2)
    second |= {"device": "gpu", "versions": VERSIONS | {"jax": "0.12"}}
    first["final"]["test_accuracy"] = float("nan")
    del second["final"]["val_accuracy"]
    found = report.summarise([first, second])
    assert not {"device", "versions"} & found.keys()
    assert found["final"].keys() == {"epoch", "test_accuracy"}
    assert found["final"]["test_accuracy"] == {"mean": None, "std": None, "values": [None, 0.2]}


@pytest.mark.parametrize("seeds", [[], [0, 0], [None], [0, None]])
def test_seeds_that_cannot_be_summarised(seeds: list) -> None:
    with pytest.raises(InputError, match="one or more different seeds"):
        report.summarise([summary | {"seed": seed} for summary, seed in zip(summaries(0.1, 0.2), seeds, strict=False)])
