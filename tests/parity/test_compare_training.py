"""The comparison of two training runs, on two steps of noise."""

from __future__ import annotations

import json
from pathlib import Path

import compare_training
import numpy as np
import pytest

from jresnet import data


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 random images in the place of CIFAR-10."""
    draw = np.random.default_rng(0)
    split = data.Split(
        draw.integers(0, 256, (40, 32, 32, 3), np.uint8),
        draw.integers(0, 10, 40).astype(np.int32),
    )
    dataset = data.Dataset("cifar10", tuple("0123456789"), split, split, "noise", (), {}, "")
    monkeypatch.setattr(data, "load_cifar10", lambda *args, **options: dataset)


@pytest.mark.usefixtures("noise")
def test_the_runs_agree_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["--data-dir", "unused", "--steps", "2", "--batch-size", "8", "--out", str(out), "--exact"]
    assert compare_training.main(arguments) == 0
    report = json.loads((out / "comparison.json").read_text())
    assert report["distance_steps"] == [1, 2]
    assert {len(losses) for losses in report["losses"].values()} == {2}
    assert report["losses"].keys() > {"jresnet", "PyTorch", "PyTorch, channels last", "PyTorch, float64"}
    assert report["losses"]["jresnet"][0] == pytest.approx(report["losses"]["PyTorch"][0], rel=1e-5)
    # Rounding and the ReLUs that it switches; a run without Nesterov, say, is 1e-2 away after one step.
    for pair, distances in report["distances"].items():
        assert distances[0] < 1e-4, pair
        assert all(np.isfinite(distances)), pair
    assert report["distances"]["jresnet to PyTorch, float64"][0] > 0
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.split(" | ")[0] for row in rows] == ["| step", "| ---", "| 1", "| 2"]


@pytest.mark.usefixtures("noise")
def test_more_images_a_step_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data-dir", "unused", "--steps", "0", "--batch-size", "41", "--out", str(tmp_path)]
    assert compare_training.main(arguments) == 1
    assert "error: expected at least one step and 1 to 40 images a step" in capsys.readouterr().err


def test_steps_whose_parameters_are_kept() -> None:
    assert compare_training.kept(3) == [1, 2, 3]
    assert compare_training.kept(22) == [*range(1, 11), 15, 20, 22]
    assert set(compare_training.TABLE) <= set(compare_training.kept(200))
