"""Weights into a folder or a repository and back: nothing is lost, and what strangers wrote does no harm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from benchmark.networks import randomise

import jresnet
from jresnet import sharing, sources
from jresnet.commands import run
from jresnet.errors import DownloadError, InputError, WeightsError
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

NAMES = [f"class {i}" for i in range(9)] + ["<script>`x`|y"]
HOW = Preprocessing(36, 32, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet20_cifar with everything that training writes beside it."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model = jresnet.create("resnet20_cifar", seed=3)
    randomise(model)
    scores = {
        "test_accuracy": 0.9135,
        "test_loss": 0.3,
        "epoch": 200,
        "seconds": 1.0,
        "lr": 0.0,
        "images_per_second": 9.0,
    }
    native.save(
        path, model, source="trained by jresnet on folder", preprocessing=HOW, categories=NAMES,
        metrics=json.dumps(scores), judged_on="1,000 test images of cifar10",
    )  # fmt: skip
    return path


def test_what_was_pushed_is_pulled_bit_by_bit(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, back = tmp_path / "model", tmp_path / "back.safetensors"
    assert run("push", [str(file), str(folder), "--license", "mit"], "x") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert run("pull", [str(folder), str(back)], "x") == 0
    assert "resnet20_cifar, 10 classes, named" in capsys.readouterr().out
    before, after = native.read(file), native.read(back)
    assert before[:2] == after[:2]
    assert native.digest(before[2]) == native.digest(after[2])
    weights = jresnet.get_weights(back)
    assert weights.categories == tuple(NAMES)
    assert weights.preprocessing == HOW
    assert weights.source == "model.safetensors"  # not where it lay on this machine
    # And a folder is weights anywhere.
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    assert (jresnet.create(weights=str(folder))(x) == jresnet.load(file)(x)).all()


def test_the_card_says_what_it_is_and_how_it_was_judged(file: Path) -> None:
    text = sharing.card(sources.load(file), "hf:me/flowers", license="mit")
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines() == [
        "library_name: jresnet", "pipeline_tag: image-classification", "tags:", "- image-classification", "- jax",
        "- jresnet", "license: mit",
    ]  # fmt: skip
    assert "| test\\_accuracy | 0.9135 |" in body
    assert "Measured on 1,000 test images of cifar10." in body
    assert "| epoch | 200 |" in body
    assert not any(name in body for name in ("seconds", "per\\_second", "| lr |"))
    assert "jresnet.get_weights('hf:me/flowers')" in body
    assert "timm and torchvision have no such network" in body
    assert "<script>" not in body
    assert "\\<script\\>\\`x\\`\\|y" in body


@pytest.mark.parametrize("crop", [32, 224, 299])
@pytest.mark.parametrize("resize", [None, 256, 300, 331, 448])
def test_timm_reads_the_same_resize(crop: int, resize: int | None, file: Path, tmp_path: Path) -> None:
    if resize is not None and resize < crop:
        with pytest.raises(InputError, match="cannot express a crop of 299 pixels from"):
            sharing._timm_preprocessing(Preprocessing(resize, crop))
        return
    found = sharing._timm_preprocessing(Preprocessing(resize, crop))
    assert int(crop / found["crop_pct"]) == (resize or crop)


def test_what_has_no_place_in_the_form_is_refused(tmp_path: Path) -> None:
    for model, message in (
        (jresnet.create("resnet20_cifar", num_classes=0), "has no head"),
        (jresnet.create("resnet20_cifar", in_channels=1), "images of 1 channels"),
    ):
        native.save(tmp_path / "w.safetensors", model)
        with pytest.raises(InputError, match=message):
            sharing.push(tmp_path / "w.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    assert run("push", [str(file), str(tmp_path / "model")], "x") == 1
    assert (
        "already contains a model (README.md): choose another folder, or replace it with --force"
        in capsys.readouterr().err
    )
    assert run("push", [str(file), str(tmp_path / "model" / "README.md")], "x") == 1
    assert capsys.readouterr().err.startswith("error: `target` ")  # once, not within another message
    assert run("push", [str(file), str(tmp_path / "model"), "--force"], "x") == 0
    assert run("pull", [str(tmp_path / "model"), str(file)], "x") == 1
    assert "already exists" in capsys.readouterr().err
    assert run("pull", [str(tmp_path / "model"), str(tmp_path / "x.pth")], "x") == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert run("push", [str(file), str(tmp_path / "new"), "--license", "MIT\nx: y"], "x") == 1
    assert "--license must be an identifier" in capsys.readouterr().err


def test_a_strangers_folder_is_checked(file: Path, tmp_path: Path) -> None:
    folder = Path(sharing.push(file, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"architecture": "vit_base"}, "which jresnet does not have"),
        ({"num_classes": 11, "label_names": [str(i) for i in range(11)]}, "describes 11 classes, not 10"),
        ({"architecture": "resnet18"}, "resnet18"),
        ({"label_names": ["\x1b[31m"] * 10}, "printable names"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises((InputError, WeightsError), match=message):
            sharing.pull(folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        sharing.pull(folder, tmp_path / "out.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"a folder without model\.safetensors"):
        sharing.pull(folder, tmp_path / "out.safetensors")


class Api:
    """What push asks of huggingface_hub."""

    def __init__(self, error: Exception | None = None):
        self.error, self.asked = error, []  # type: ignore[var-annotated]

    def __call__(self, **about: Any) -> Api:
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.asked.append((name, private, exist_ok))
        if self.error:
            raise self.error

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.asked.append(sorted(path.name for path in Path(folder_path).iterdir()))
        self.tensors = safetensors.numpy.load_file(Path(folder_path) / "model.safetensors")
        return f"https://hub/{repo_id}/commit/1"


def test_a_repository_gets_the_same_files(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    library = pytest.importorskip("huggingface_hub")
    api = Api()
    monkeypatch.setattr(library, "HfApi", api)
    assert run("push", [str(file), "hf:me/flowers", "--private"], "x") == 0
    assert api.asked == [("me/flowers", True, True), ["README.md", "config.json", "model.safetensors"]]
    assert api.tensors["conv1.weight"].shape == (16, 3, 3, 3)
    assert "https://hub/me/flowers/commit/1" in capsys.readouterr().out
    for target, message in (("hf:flowers", "ORG and REPO are both needed"), ("hf:me/x@v1", "leave out @v1")):
        with pytest.raises(InputError, match=message):
            sharing.push(file, target)


def test_a_refusal_says_what_to_do_and_never_the_token(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", Api(ValueError("illegal header Bearer hf_secret")))
    with pytest.raises(DownloadError, match=r"cannot push to .*me/flowers: ValueError; check the network") as caught:
        sharing.push(file, "hf:me/flowers")
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    monkeypatch.setattr(library, "HfApi", Api(ConnectionRefusedError(111, "Connection refused")))
    with pytest.raises(DownloadError, match="Connection refused"):
        sharing.push(file, "hf:me/flowers")


def test_the_module_is_a_command_as_well(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    monkeypatch.delitem(sys.modules, "jresnet.hub", raising=False)
    for arguments, code in (([], 2), (["--help"], 0), (["push", str(file), str(tmp_path / "model")], 0)):
        monkeypatch.setattr(sys, "argv", ["hub", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("jresnet.hub", run_name="__main__")
        assert ended.value.code == code
    assert (tmp_path / "model" / "README.md").exists()


def test_the_hub_is_a_name_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(jresnet), "hub", raising=False)  # as before anything imported it
    assert jresnet.hub.push is sharing.push
