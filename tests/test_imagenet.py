"""train-imagenet: recipes, images from a folder and from shards, one process and two, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import command
from PIL import Image
from test_devices import environment, processes
from test_index import tar

from jresnet import commands
from jresnet.data import folder
from jresnet.errors import DataError, InputError
from jresnet.models import zoo
from jresnet.models.config import ResNetConfig
from jresnet.training import devices, imagenet, optim
from jresnet.training.imagenet import RECIPES
from jresnet.training.program import Program
from jresnet.training.stop import Interrupted
from jresnet.training.trainer import Trainer

CLASSES = tuple(f"n{i}" for i in range(10))
# As any network that is trained at one size and judged at another.
SMALL = {"image_size": 24, "test_size": 32, "test_resize": 36, "batch_size": 40, "arch": "resnet20_cifar"}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 20 images to learn from and 5 to judge by, each of a colour of its own."""
    root, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 5)):
        for number, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 80, (40 + i % 3, 48, 3))
                pixels += np.array([number % 3, number // 3 % 3, 2 * (number // 9)]) * 80
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / part / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Puts a network that compiles in seconds in the place of a small one."""
    row = zoo.ZOO["resnet20_cifar"]
    with pytest.MonkeyPatch.context() as patch:
        config = ResNetConfig("basic", (1, 1), (8, 16), num_classes=row.config.num_classes, stem="cifar")
        patch.setitem(zoo.ZOO, "resnet20_cifar", dataclasses.replace(row, config=config))
        yield


PROGRAMS: dict[str, Program] = {}  # compiled once


def trainer(data: Path, out: Path, workers: int = 0, **given: Any) -> Trainer:
    """Of two epochs of five steps, with all that tv2 has."""
    config, _ = imagenet.choose(**{"recipe": "tv2", "epochs": 2, "lr": 0.1} | SMALL | given)
    found = imagenet.dataset(folder.find(data), config)
    config = dataclasses.replace(config, data_digest=found.digest)
    key = f"{config} {found.source} {workers}"
    if key not in PROGRAMS:
        PROGRAMS[key] = Program(config, found, devices.find(1), workers=workers)
    return Trainer(config, found, out, None, PROGRAMS[key])


def arrays(path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path)


def same(one: Path, other: Path) -> bool:
    a, b = arrays(one / "last.safetensors"), arrays(other / "last.safetensors")
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


# Recipes.


def test_recipes_are_their_sources() -> None:
    """Of each the numbers that its source names in epochs and steps."""
    classic, a3, tv2 = (imagenet.choose(name)[0] for name in ("classic", "a3", "tv2"))
    assert (classic.milestones, classic.warmup_epochs, classic.weights) == ((30, 60), 0, None)
    assert (a3.warmup_epochs, a3.optimizer, a3.preprocessing().resize, a3.image_size) == (5, "lamb", 235, 160)
    assert tv2.warmup_epochs == pytest.approx(5)
    assert (tv2.preprocessing().resize, tv2.preprocessing().crop, tv2.repeats) == (232, 224, 4)
    # torchvision: alpha = (1 - 0.99998) * (batch * steps / epochs) every 32 steps
    assert 1 - tv2.ema**32 == pytest.approx(2e-5 * 1024 * 32 / 600, rel=0.01)
    for config in (classic, a3, tv2):
        steps = 1_281_167 // config.batch_size
        rates = optim.schedule(
            config.schedule, config.lr, config.epochs, steps, warmup_epochs=config.warmup_epochs,
            milestones=config.milestones, gamma=config.gamma,
        )  # fmt: skip
        assert float(rates(round(config.warmup_epochs * steps))) == pytest.approx(config.lr, rel=1e-3)
        assert float(rates(config.epochs * steps - 1)) <= config.lr / 100 * 1.001


def test_the_rate_goes_with_the_batch() -> None:
    assert imagenet.choose("classic", batch_size=1024)[0].lr == pytest.approx(0.4)
    config, notes = imagenet.choose("a3", batch_size=512)
    assert config.lr == pytest.approx(4e-3)
    assert notes == ["lr 0.004: the recipe's 0.008 for a batch of 2,048, scaled with the square root of the batch"]
    assert imagenet.choose("classic", batch_size=1024, lr=0.3)[0].lr == 0.3
    assert imagenet.choose("classic", epochs=45)[0].milestones == (15, 30)
    assert imagenet.choose("classic", schedule="cosine")[0].milestones == ()
    for given, message in (
        ({"recipe": "a4"}, "unknown `recipe`"),
        ({"repeats": 3}, "multiple of `repeats` 3"),
        ({"target_threshold": 0.5}, "is only for `loss` sigmoid"),
    ):
        with pytest.raises(InputError, match=message):
            imagenet.choose(**given)


def test_every_recipe_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("train-imagenet", ["--help"], "x") == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, row in RECIPES.items():
        assert f"{name}: {row.epochs} epochs, batch {row.batch_size}" in said
    assert "classic: 1, a3: 1, tv2: 4" in said


# Runs.


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer(photos, out).fit()
    return out


def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(photos, tmp_path / "run")
    stream: Any = one.source.stream  # type: ignore[union-attr]

    def batch(number: int, batch: Any = stream.batch) -> Any:
        one.stop.signal = 15 if number == 6 else None
        return batch(number)

    monkeypatch.setattr(stream, "batch", batch)
    with pytest.raises(Interrupted):
        one.fit()
    assert {path.stem for path in (tmp_path / "run/checkpoints").glob("*.safetensors")} == {"5", "7"}
    trainer(photos, tmp_path / "run").fit(resume=True)
    assert same(whole, tmp_path / "run")


def test_shards_and_workers_train_the_same_network(photos: Path, whole: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for shard in range(2):  # the order of the folder's own list
            members = []
            for number, name in list(enumerate(CLASSES))[shard * 5 : shard * 5 + 5]:
                for path in sorted((photos / part / name).iterdir()):
                    members += [(f"{name}/{path.name}", path.read_bytes()), (f"{name}/{path.stem}.cls", b"%d" % number)]
            tar(tmp_path / "shards" / part / f"{shard}.tar", members)
    (tmp_path / "shards/classes.txt").write_text("\n".join(CLASSES))
    trainer(tmp_path / "shards", tmp_path / "run", workers=1).fit()
    assert same(whole, tmp_path / "run")


def test_a_worker_that_dies_ends_the_run_by_name_with_its_state_saved(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(photos, tmp_path / "run", workers=1)
    stream: Any = one.source.stream  # type: ignore[union-attr]
    batch, killed = stream.batch, []

    def then_kill(number: int) -> Any:
        found = batch(number)
        if number == 2:
            (worker,) = [child for child in multiprocessing.active_children() if child not in stream._others]
            worker.kill()
            worker.join()
            killed.append(worker.pid)
        return found

    monkeypatch.setattr(stream, "batch", then_kill)
    with pytest.raises(DataError, match=r"died \(process \d+, exit code -9\)[\s\S]*is saved") as caught:
        one.fit()
    assert f"process {killed[0]}," in str(caught.value)
    assert list((tmp_path / "run/checkpoints").glob("*.safetensors"))
    trainer(photos, tmp_path / "run").fit(resume=True)
    assert same(whole, tmp_path / "run")


def test_a_folder_without_validation_images_is_told(photos: Path) -> None:
    with pytest.raises(DataError, match="no validation images: put some into a folder val"):
        imagenet.dataset(folder.find(photos / "train"), imagenet.choose()[0])


def test_imagenets_folders_get_english_names(photos: Path) -> None:
    from jresnet.weights import published

    listing = folder.find(photos)
    listing = dataclasses.replace(listing, classes=published.wnids())
    assert imagenet.dataset(listing, imagenet.choose()[0]).classes == published.categories()


def test_the_command_runs_and_resumes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data", str(photos), "--out", str(tmp_path / "run"), "--devices", "1"]
    assert commands.run("train-imagenet", [*base, *FLAGS, "--recipe", "a3", "--epochs", "3"], "x") == 0
    said = capsys.readouterr().out
    assert "RandAugment 6" in said
    assert "binary cross-entropy" in said
    assert "chosen   lr 0.0011" in said
    moved = shutil.copytree(photos, tmp_path / "moved")
    again = ["--data", str(moved), "--out", str(tmp_path / "run"), "--resume", "--devices", "1"]
    assert commands.run("train-imagenet", again, "x") == 0
    (moved / "train/n0/0.jpg").unlink()
    assert commands.run("train-imagenet", again, "x") == 1
    assert "SHA-256 of the images' names and labels" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on(photos: Path, tmp_path: Path) -> None:
    """The script itself: an epoch in two processes, each with its rows of every batch, the next one in one process.

    Beside the same two epochs in one process: the same images in the same order; another order of sums alone, which a
    small learning rate keeps small.
    """
    script = (
        "scripts/train_imagenet.py", "--data", photos, *FLAGS, "--arch", "resnet8_cifar", "--recipe", "classic",
        "--lr", 1e-4,
    )  # fmt: skip
    ends = ("--epochs", 2, "--milestones", 1)
    one, two = tmp_path / "one", tmp_path / "two"
    many = ("--coordinator", "127.0.0.1:{port}", "--num-processes", 2, "--process-id", "{id}")
    started = processes(tmp_path, *script, "--epochs", 1, "--milestones", 1, "--out", two, *many)
    codes = [process.wait(timeout=600) for process in started]
    assert codes == [0, 0], [(tmp_path / str(i)).read_text()[-2000:] for i in range(2)]
    assert "4 x cpu" in (tmp_path / "0").read_text()
    for out, resume in ((one, []), (two, ["--resume"])):
        done = command(*script, *ends, "--out", out, *resume, env=environment(1))
        assert done.returncode == 0, done.stderr
    assert "resumed  at step 5 of 10" in done.stdout
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["train_accuracy"] == b["train_accuracy"]
    ours, theirs = arrays(one / "last.safetensors"), arrays(two / "last.safetensors")
    distance = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
    assert distance < 1e-3, distance
