"""Fine-tuning: through the trainer, from a folder, resumed bit for bit, back to a file that says all that belongs to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import jresnet
from convert import flax2torch
from jresnet import evaluation
from jresnet.commands import finetune as command
from jresnet.commands import run
from jresnet.data import folder
from jresnet.data.stream import Files
from jresnet.errors import DataError, InputError
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.training import devices, finetune
from jresnet.training.finetune import Finetune, FinetuneConfig
from jresnet.training.guard import NonFiniteLoss
from jresnet.training.loop import Pace
from jresnet.training.stop import Interrupted, StopRequest
from jresnet.training.trainer import Options, Trainer
from jresnet.weights import native
from jresnet.weights.preprocessing import Preprocessing

TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=5)
HOW = Preprocessing(80, 72)  # more than 64 pixels: images are streamed


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of each of three colours, and a damaged one."""
    root = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(12):
            pixels = draws.integers(0, 160, (84 + i, 80, 3), dtype=np.uint8)
            pixels[..., channel] += 70
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    (root / "red" / "bad.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny network for five other classes."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    native.save(path, ResNet(TINY, rngs=nnx.Rngs(0)), preprocessing=HOW)
    return path


@pytest.fixture(scope="module")
def data(photos: Path) -> Any:
    return folder.load(folder.find(photos), HOW).dataset


def arrays(path: Path) -> dict[str, np.ndarray]:
    return native.read(path)[2]


PROGRAMS: dict[str, Finetune] = {}  # compiled once


def trainer(
    tiny: Path, data: Any, out: Path, stop: StopRequest | None = None, options: Options | None = None, **given: Any
) -> Trainer:
    """Of two epochs of seven steps, whose head is drawn."""
    begin = finetune.resolve(str(tiny))
    config, _ = finetune.choose(begin, data, probe=False, **{"epochs": 2, "batch_size": 4} | given)
    key = f"{config} {data.source}"
    if key not in PROGRAMS:
        PROGRAMS[key] = Finetune(config, data, begin, None, devices.find(1))
    return Trainer(config, data, out, stop, PROGRAMS[key], options)


# The command.


@pytest.fixture(scope="module")
def fitted(photos: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run by the command, and what it printed."""
    import contextlib
    import io

    out, said = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert (
            run("finetune", ["--weights", str(tiny), "--data", str(photos), "--out", str(out), "--epochs", "2"], "x")
            == 0
        )
    return out, said.getvalue()


def test_a_folder_becomes_a_run_like_any_other(fitted: tuple[Path, str]) -> None:
    out, _ = fitted
    for name in (
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "confusion.png",
        "worst.png",
        "checkpoints",
        "tensorboard",
    ):
        assert (out / name).exists(), name
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recipe"] == "finetune"
    assert summary["skipped_images"] == 1
    assert summary["skipped"][0]["file"].endswith("bad.jpg")
    assert summary["final"]["test_accuracy"] == 1.0  # three colours
    assert summary["test_by_class"]["red"] == {"images": 3, "precision": 1.0, "recall": 1.0}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "head" / "summary.json").read_text())["recipe"] == "probe"


def test_it_says_what_it_chose_and_why(fitted: tuple[Path, str]) -> None:
    _, said = fitted
    lines, words = said.splitlines(), " ".join(said.split())
    assert "chosen batch_size 4: a power of two up to 64 that gives about eight steps per epoch of 29 images" in words
    assert "chosen epochs 2: as given" in words
    assert "chosen lr 0.000625: sgd's 0.01 for a batch of 64, in proportion to the batch" in words
    assert words.count("learning rate x0.65 from each stage to the one before it, BatchNorm's statistics frozen") == 1
    assert lines.index("stage    1 of 2: only the head, on embeddings") < lines.index("stage    2 of 2: all layers")
    table = [line.split() for line in lines]
    first = table.index(["class", "images", "precision", "recall"])
    assert table[first + 3] == ["red", "3", "100.0", "%", "100.0", "%"]
    assert "skipped  1 damaged image; summary.json lists them" in lines


def test_the_weights_say_all_that_belongs_to_them(fitted: tuple[Path, str], photos: Path) -> None:
    out, _ = fitted
    weights = jresnet.get_weights(out / "last.safetensors")
    assert weights.categories == ("blue", "green", "red")
    assert weights.preprocessing == HOW
    model = jresnet.load(out / "last.safetensors")
    logits = model(weights.preprocess([Image.open(photos / f"{name}/0.jpg") for name in ("red", "blue", "green")]))
    assert np.argmax(logits, 1).tolist() == [2, 0, 1]
    resolved = evaluation.resolve(str(out / "last.safetensors"))
    scores = evaluation.score(model, HOW, evaluation.folder(resolved, folder.images.list_folder(photos), None), 8)
    assert scores.top1 == 36


def test_a_finished_run_resumes_to_the_same(fitted: tuple[Path, str], photos: Path, tiny: Path, tmp_path: Path) -> None:
    out = shutil.copytree(fitted[0], tmp_path / "run")
    before = arrays(out / "last.safetensors")
    # The same images and weights may lie elsewhere by now.
    moved, start = shutil.copytree(photos, tmp_path / "moved"), shutil.copy(tiny, tmp_path / "start.safetensors")
    assert run("finetune", ["--out", str(out), "--resume", "--data", str(moved), "--weights", str(start)], "x") == 0
    after = arrays(out / "last.safetensors")
    assert all((before[name] == after[name]).all() for name in before)


def test_resume_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetune", ["--out", str(tmp_path), "--resume"], "x") == 1
    assert "there is no run in" in capsys.readouterr().err
    (tmp_path / "head").mkdir()
    assert run("finetune", ["--out", str(tmp_path), "--resume"], "x") == 1
    assert "ended in its first stage: to continue it, give all its options again" in capsys.readouterr().err


def test_resume_refuses_other_images(fitted: tuple[Path, str], photos: Path, tmp_path: Path, capsys: Any) -> None:
    out = shutil.copytree(fitted[0], tmp_path / "run")
    other = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(other / "red" / "1.jpg", other / "red" / "0.jpg")
    assert run("finetune", ["--out", str(out), "--resume", "--data", str(other)], "x") == 1
    err = capsys.readouterr().err
    assert "`data_digest`, SHA-256 of the images and their labels, was" in err
    assert "--data was" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is required: the folder for the results; --weights is required; --data is required"),
        (["--out", "x", "--weights", "none", "--data", "digits"], "--weights none needs --arch"),
        (["--out", "x", "--weights", "w", "--data", "d", "--arch", "resnet18"], "--arch is only for --weights none"),
        (["--out=x", "--weights=none", "--arch=resnet18", "--data=d", "--linear-probe"], "needs trained --weights"),
        (["--out=x", "--weights=w", "--data=d", "--linear-probe", "--freeze=stem"], "--freeze cannot be combined"),
        (["--out=x", "--weights=w", "--data=d", "--linear-probe", "--freeze-bn=all", "--no-head-stage", "--mixup=0.2"],
         "--freeze-bn, --head-stage, --mixup cannot be combined with --linear-probe"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(arguments: list[str], message: str, capsys: Any) -> None:
    assert run("finetune", arguments, "x") == 2
    assert message in capsys.readouterr().err


def test_what_is_wrong_is_told_before_anything_is_compiled(
    photos: Path, tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "embed", lambda *a, **k: pytest.fail("the network was used"))
    base = ["--weights", str(tiny), "--out", str(tmp_path / "run")]
    one = shutil.copytree(photos / "red", tmp_path / "one" / "red").parent
    assert run("finetune", [*base, "--data", str(one)], "x") == 1
    assert "has only one class, red" in capsys.readouterr().err
    assert run("finetune", [*base, "--data", str(photos), "--freeze", "layr1"], "x") == 1
    assert "'layr1' is no part of this network: did you mean 'layer1'" in capsys.readouterr().err
    assert run("finetune", [*base, "--data", str(photos), "--freeze", "backbone,head"], "x") == 1
    assert "--freeze backbone,head leaves nothing to train" in capsys.readouterr().err
    assert run("finetune", [*base, "--data", str(photos), "--lr", "-1"], "x") == 1
    assert "--lr must be above 0" in capsys.readouterr().err
    assert run("finetune", [*base, "--data", str(photos), "--batch-size", "1000"], "x") == 1
    assert "a batch of 1000 is larger than the 29 training images: change --batch-size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_of_many_classes_shows_the_worst() -> None:
    scores = {f"c{i}": {"images": 1, "precision": None, "recall": i / 50} for i in range(50)}
    lines = command.table(scores)
    assert len(lines) == 42
    assert lines[1].split() == ["c0", "1", "-", "0.0", "%"]
    assert lines[-1].startswith("these are the 40 of 50 classes")


def test_precision_and_recall() -> None:
    found = finetune.by_class(np.array([0, 0, 1, 2]), np.array([0, 1, 1, -1]), ("a", "b", "c"))
    assert found["a"] == {"images": 2, "precision": 1.0, "recall": 0.5}
    assert found["b"] == {"images": 1, "precision": 0.5, "recall": 1.0}
    assert found["c"] == {"images": 1, "precision": None, "recall": 0.0}


# The choice.


@pytest.mark.parametrize(
    ("n", "batch", "epochs"), [(50, 4, 60), (200, 16, 60), (1000, 64, 20), (5000, 64, 5), (50_000, 64, 5)]
)
def test_the_recipe_follows_the_number_of_images(n: int, batch: int, epochs: int, data: Any, tiny: Path) -> None:
    import dataclasses

    labels = np.zeros(n, np.int32)
    train = dataclasses.replace(data.train, images=Files([""] * n, HOW), labels=labels)
    begin = finetune.resolve(str(tiny))
    config, reasons = finetune.choose(begin, dataclasses.replace(data, train=train), probe=False)
    assert (config.batch_size, config.epochs) == (batch, epochs)
    assert config.lr == pytest.approx(0.01 * batch / 64)
    assert config.warmup_epochs <= config.epochs
    assert len(reasons) == 3


@pytest.mark.parametrize(("devices", "batch"), [(1, 4), (3, 6), (8, 8), (29, 29)])
def test_the_chosen_batch_can_be_divided_among_the_devices(devices: int, batch: int, data: Any, tiny: Path) -> None:
    begin = finetune.resolve(str(tiny))
    for probe in (False, True):
        config, reasons = finetune.choose(begin, data, probe=probe, devices=devices)
        assert config.batch_size == batch
        assert (f"rounded to a multiple of {devices} devices" in reasons[0]) == (batch not in (4, 29))
    with pytest.raises(InputError, match="a batch of 4 cannot be divided into 3 equal parts"):
        finetune.choose(begin, data, probe=False, devices=3, batch_size=4)


# The stream and the trainer.


class After(StopRequest):
    """A signal that comes after so many questions."""

    def __init__(self, asked: int):
        super().__init__()
        self.left = asked

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signal = 15
        return self.signal is not None


def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(tiny: Path, data: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    trainer(tiny, data, whole).fit()
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        trainer(tiny, data, parts, After(12)).fit()
    steps = [int(path.stem) for path in (parts / "checkpoints").glob("*.safetensors")]
    assert max(steps) % 7  # in the middle of an epoch
    trainer(tiny, data, parts).fit(resume=True)
    one, other = arrays(whole / "last.safetensors"), arrays(parts / "last.safetensors")
    assert all((one[name] == other[name]).all() for name in one)
    rows = [
        [json.loads(line)["train_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (whole, parts)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


def test_what_is_frozen_stays_bit_by_bit(tiny: Path, data: Any, tmp_path: Path) -> None:
    trainer(tiny, data, tmp_path / "run", epochs=1, freeze="stem,layer1", lr=0.1).fit()
    before, after = arrays(tiny), arrays(tmp_path / "run" / "last.safetensors")
    moved = {
        name
        for name in before
        if name in after and before[name].shape == after[name].shape and (before[name] != after[name]).any()
    }
    assert not any(name.startswith(("conv1", "bn1", "layer1")) or name.endswith((".mean", ".var")) for name in moved)
    assert {"layer2.0.conv1.kernel", "layer2.0.bn1.scale"} <= moved


def test_batch_normalisation_is_frozen_whole_or_not_at_all(tiny: Path, data: Any) -> None:
    """The options come to what the optimizer and the network are told; training with them is tested with those."""
    begin, told = finetune.resolve(str(tiny)), {}
    for kind in ("statistics", "all", "none"):
        config, _ = finetune.choose(begin, data, probe=False, freeze_bn=kind)
        model = Finetune(config, data, begin, None, devices.find(1)).model(None)
        told[kind] = (config.frozen, model.bn1.frozen)
    assert told == {"statistics": ((), True), "all": (("norms",), True), "none": ((), False)}


def test_an_image_that_vanishes_ends_the_run_with_its_state_saved(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(photos, tmp_path / "photos")
    data = folder.load(folder.find(copy), HOW).dataset
    one = trainer(tiny, data, tmp_path / "run")
    files: Any = data.train.images
    victim = Path(files.sources[int(one.source.stream.again(3)[1][0])])  # type: ignore[union-attr]
    victim.unlink()
    monkeypatch.setattr(Pace, "stretch", lambda self, steps: steps)  # the batch is in the middle of a look
    with pytest.raises(DataError, match=r"can no longer be decoded: missing[\s\S]*is saved: fix the data and resume"):
        one.fit()
    assert [path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors")] == ["3"]
    shutil.copy(photos / victim.relative_to(copy), victim)
    trainer(tiny, data, tmp_path / "run").fit(resume=True)
    trainer(tiny, data, tmp_path / "whole").fit()
    there, whole = (arrays(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all((there[name] == whole[name]).all() for name in whole)


def test_the_layer_of_a_nan_is_found_in_a_stream(tiny: Path, data: Any, tmp_path: Path) -> None:
    one = trainer(tiny, data, tmp_path / "run", options=Options(debug_nans=True))
    kernel = one.state.params["layer2"][0]["conv1"]["kernel"]
    kernel.set_value(kernel.get_value() * np.nan)
    with pytest.raises(NonFiniteLoss, match=r"at step 0[\s\S]*layer2\.0\.conv1"):
        one.fit()


# The probe.


def test_the_probes_head_is_folded_into_the_network(tiny: Path, data: Any, tmp_path: Path) -> None:
    begin = finetune.resolve(str(tiny))
    vectors = finetune.embed(begin, data, devices.find(1), "float32", 8)
    config, _ = finetune.choose(begin, data, probe=True)
    probe = finetune.Probe(config, data, begin, vectors, devices.find(1))
    one = Trainer(config, data, tmp_path / "run", None, probe, Options())
    summary = one.fit()
    assert summary["final"]["test_accuracy"] == 1.0
    model = jresnet.load(tmp_path / "run" / "last.safetensors")
    weights = jresnet.get_weights(tmp_path / "run" / "last.safetensors")
    files: Any = data.test.images
    images = [Image.open(source) for source in files.sources]
    whole = np.asarray(model(weights.preprocess(images)))
    z = (vectors["test"] - probe.center) / probe.spread
    kernel, bias = (np.asarray(one.state.params["fc"][name][...]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(whole, z @ kernel + bias, atol=2e-4)
    before, after = arrays(tiny), arrays(tmp_path / "run" / "last.safetensors")
    assert all((before[name] == after[name]).all() for name in before if not name.startswith("fc."))


# Small images, in memory.


def test_small_images_are_kept_in_memory_and_go_back_to_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = np.random.default_rng(0)
    for channel, name in enumerate(("a", "b")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = draws.integers(0, 160, (32, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 70
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    out, weights = tmp_path / "run", tmp_path / "w.safetensors"
    native.save(weights, jresnet.create("resnet20_cifar"))
    arguments = ["--weights", str(weights), "--data", str(tmp_path / "photos"), "--out", str(out), "--epochs", "1"]
    assert run("finetune", [*arguments, "--no-head-stage"], "x") == 0
    assert "a guess: the weights do not say" in " ".join(capsys.readouterr().out.split())
    assert not (out / "head").exists()
    config = json.loads((out / "config.json").read_text())["run"]
    assert (config["crop"], config["image_size"]) == ("pad", 32)
    assert flax2torch.main([str(out / "last.safetensors"), "--verify", "never"]) == 0
    back = jresnet.create("resnet20_cifar", weights=out / "last.pth")
    assert back.config.num_classes == 2


def test_weights_must_stay_the_same(tiny: Path, data: Any) -> None:
    begin = finetune.resolve(str(tiny))
    config, _ = finetune.choose(begin, data, probe=False)
    with pytest.raises(InputError, match="started from other weights"):
        Finetune(FinetuneConfig(**{**vars(config), "weights_digest": "0"}), data, begin)


# What it is good for.


@pytest.mark.slow
def test_a_trained_start_beats_a_random_one_on_real_images(cifar10: Path, shared: Path, tmp_path: Path) -> None:
    """Ten images a class: the probe is as good as fine-tuning, and that far better than from scratch in as many steps.

    ``scripts/compare_finetuning.py`` has the full figures, beside PyTorch's.
    """
    from jresnet.data import load_cifar10

    found = load_cifar10(cifar10, download=False)
    for part, split, count in (("train", found.train, 200), ("val", found.test, 300)):
        for number, (pixels, label) in enumerate(zip(split.images[:count], split.labels[:count], strict=True)):
            path = tmp_path / "photos" / part / found.classes[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    trained = str(next((shared / "weights").glob("resnet20-*.th")))
    data = folder.load(folder.find(tmp_path / "photos"), finetune.resolve(trained).preprocessing, limit=10).dataset
    assert len(data.train.labels) == 100
    accuracies = {}
    begin, where, head = finetune.resolve(trained), devices.find(1), None
    random = finetune.resolve(None, "resnet20_cifar")
    for name, start in (("probe", begin), ("finetune", begin), ("scratch", random)):
        given = {} if name == "probe" else {"epochs": 3, "batch_size": 10}
        config, _ = finetune.choose(start, data, probe=name == "probe", **given)
        if name == "probe":
            program: Any = finetune.Probe(config, data, start, finetune.embed(start, data, where, "float32"), where)
        else:
            program = Finetune(config, data, start, head if name == "finetune" else None, where)
        summary = Trainer(config, data, tmp_path / name, None, program, Options()).fit()
        accuracies[name] = summary["final"]["test_accuracy"]
        head = head or finetune.head_of(tmp_path / name / "last.safetensors")
    assert accuracies["probe"] >= 0.85
    assert accuracies["probe"] >= accuracies["finetune"] - 0.01  # three images
    assert accuracies["finetune"] > accuracies["scratch"] + 0.4
