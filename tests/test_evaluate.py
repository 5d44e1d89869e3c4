"""Scores against numpy's on the same logits, and the command as a person runs it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command, randomise, written_anyway
from PIL import Image

import jresnet
from jresnet import commands, sources
from jresnet import evaluation as evaluate
from jresnet.data import images
from jresnet.data.cifar10 import CLASSES as CIFAR10_CLASSES
from jresnet.errors import DataError, InputError, WeightsError
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.weights import native as weights
from jresnet.weights import published
from jresnet.weights.preprocessing import STATISTICS, Preprocessing

SCRIPT = "scripts/evaluate.py"
CLASSES = ("auk", "bee", "cat", "dog", "eel", "fox", "gnu")
RECIPE = Preprocessing(36, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic")


@pytest.fixture(scope="module")
def model() -> jresnet.ResNet:
    """A random network of 7 classes whose predictions differ from image to image."""
    model = jresnet.create("resnet20_cifar", num_classes=len(CLASSES), seed=5)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def file(model: jresnet.ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its native file, with preprocessing and categories."""
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    weights.save(
        path, model, "resnet20_cifar", preprocessing=RECIPE.to_json(), categories=json.dumps(CLASSES)
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in folders named as the categories, unevenly."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(23):
        height, width = draw.integers(30, 70, 2)
        pixels = draw.normal(40 + 9 * i, 60, (height, width, 3)).clip(0, 255).astype(np.uint8)
        (root / CLASSES[i * i % 7]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / CLASSES[i * i % 7] / f"{i:02}.png")
    for name in CLASSES:
        (root / name).mkdir(exist_ok=True)
    return root


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """The same with two bad files."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    (root / "bee" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (root / "cat" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def by_hand(model: jresnet.ResNet, folder: Path) -> tuple[int, int, float]:
    """top-1, top-5 and loss of the folder in numpy and float64."""
    found = images.list_folder(folder)
    pixels = np.stack([images.load(path, RECIPE) for path in found.paths]) / 255
    logits = np.asarray(model(((pixels - RECIPE.mean) / RECIPE.std).astype(np.float32)), np.float64)
    labels = np.array(found.labels)
    order = np.argsort(-logits, axis=1, stable=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(23), labels]
    top1, top5 = int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).sum())
    assert 0 < top1 < top5 < 23  # else a comparison with them says little
    return top1, top5, float(losses.mean())


# Scores --------------------------------------------------------------------------------------------------------------


def test_rank() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 9)).round(0).astype(np.float32)  # many ties
    labels = np.arange(50, dtype=np.int32) % 9
    order = np.argsort(-logits, axis=1, stable=True)
    assert np.array_equal(evaluate.rank(logits, labels), np.argmax(order == labels[:, None], axis=1))
    assert np.array_equal(np.asarray(evaluate.rank(logits, labels)) == 0, logits.argmax(1) == labels)


@pytest.mark.parametrize("batch_size", [8, 23, 64])
def test_every_image_counts_once(model: jresnet.ResNet, folder: Path, by_hand: tuple, batch_size: int) -> None:
    found = images.list_folder(folder)
    resolved = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    data = evaluate.folder(resolved, found, None)
    told: list[int] = []
    scores = evaluate.score(model, RECIPE, data, batch_size, told.append)
    assert told == [*range(batch_size, 23, batch_size), 23]
    top1, top5, loss = by_hand
    assert (scores.images, scores.top1, scores.topk, scores.k) == (23, top1, top5, 5)
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.bad == ()


def test_bad_images_are_named_and_change_nothing_else(model: jresnet.ResNet, folder: Path, damaged: Path) -> None:
    resolved = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    whole, lacking = (
        evaluate.score(model, RECIPE, evaluate.folder(resolved, images.list_folder(root), None), 8)
        for root in (folder, damaged)
    )
    assert (lacking.images, lacking.top1, lacking.topk) == (whole.images, whole.top1, whole.topk)
    assert lacking.loss == pytest.approx(whole.loss, rel=1e-6)
    assert [Path(name).name for name, _ in lacking.bad] == ["empty.png", "cut.jpg"]


def test_photos_are_seen_as_in_prediction_and_on_demand_as_stored(
    file: Path, model: jresnet.ResNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, exif = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo = tmp_path / "photos" / "cat" / "phone.jpg"
    photo.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(photo, exif=exif, quality=95)
    losses = []
    for more in ([], ["--as-stored"]):
        arguments = ["--weights", str(file), "--data", str(photo.parents[1]), "--json", *more]
        assert commands.run("evaluate", arguments, "x") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["as_stored"] == bool(more)
        losses.append(report["loss"])
    assert commands.run("predict", ["--weights", str(file), str(photo), "--json", "--top", "7"], "x") == 0
    classes = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    (predicted,) = (entry["probability"] for entry in classes if entry["class"] == "cat")
    stored = ((images.load(photo, RECIPE) / 255 - RECIPE.mean) / RECIPE.std).astype(np.float32)
    chances = np.exp(np.asarray(model(stored[None]), np.float64)[0])
    assert losses == pytest.approx([-np.log(predicted), -np.log(chances[2] / chances.sum())], rel=1e-4)
    assert abs(losses[0] - losses[1]) > 0.01
    assert commands.run("evaluate", ["--weights", str(file), "--data", "cifar10", "--as-stored"], "x") == 2
    assert "--as-stored is for image files" in capsys.readouterr().err


def test_logits_that_are_not_finite(folder: Path) -> None:
    broken = jresnet.create("resnet20_cifar", num_classes=7)
    broken.fc.bias[...] = jnp.full(7, jnp.nan)
    resolved = evaluate.Resolved("resnet20_cifar", broken, RECIPE, None)
    data = evaluate.folder(resolved, images.list_folder(folder), None)
    with pytest.raises(WeightsError, match="the logits of 23 of 23 images are NaN or infinite"):
        evaluate.score(broken, RECIPE, data, 8)


def test_grey_and_fewer_than_five_classes() -> None:
    model = jresnet.create("resnet20_cifar", num_classes=3, in_channels=1)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    data = evaluate.Labelled(pixels, np.array([0, 1, 2, 0]), "", ())
    scores = evaluate.score(model, Preprocessing(None, 32, (0.5,), (0.5,)), data, 4)
    assert (scores.images, scores.k, scores.topk) == (4, 3, 4)


# What is evaluated ---------------------------------------------------------------------------------------------------


def test_a_native_file_says_all(file: Path, native_file: Path) -> None:
    resolved = evaluate.resolve(str(file), jnp.bfloat16)
    assert (resolved.arch, resolved.preprocessing, resolved.categories) == ("resnet20_cifar", RECIPE, CLASSES)
    assert resolved.model.conv1.dtype == jnp.bfloat16
    silent = evaluate.resolve(str(native_file))
    assert (silent.preprocessing, silent.categories) == (None, None)


def test_published_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(row: published.Row, progress: bool) -> Path:
        asked.append(row)
        return tmp_path / row.filename

    small = jresnet.create("resnet20_cifar", num_classes=1000)
    conversion = statedict.Conversion("resnet50", small.config, params.arrays(small), "torchvision", {}, (), ())
    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(sources, "open_file", lambda path: ({}, {}))
    monkeypatch.setattr(statedict, "match", lambda *arguments, **options: conversion)
    for name, expected, resize in (
        ("resnet50", "IMAGENET1K_V2", 232),
        ("ResNet50:imagenet1k_v1", "IMAGENET1K_V1", 256),
    ):
        resolved = evaluate.resolve(name)
        assert (resolved.arch, asked[-1].name) == ("resnet50", expected)
        assert resolved.preprocessing == Preprocessing(resize, 224)
        assert resolved.categories is not None
        assert resolved.categories[207] == "golden retriever"
    with pytest.raises(InputError, match="resnet50 has no weights 'V3'"):
        evaluate.resolve("resnet50:V3")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"preprocessing": "{}"}, "resize is missing; crop must be .* got None; mean must be"),
        ({"categories": "["}, "are not 7 names"),
        ({"categories": json.dumps(CLASSES[1:])}, "are not 7 names"),
        ({"categories": json.dumps([1, 2, 3, 4, 5, 6, 7])}, "are not 7 names"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, model: jresnet.ResNet, metadata: dict, message: str) -> None:
    path = tmp_path / "odd.safetensors"
    written_anyway(path, model, **metadata)
    with pytest.raises(WeightsError, match=message):
        evaluate.resolve(str(path))


CIFAR_STATISTICS, IMAGENET_STATISTICS = STATISTICS["cifar10"], STATISTICS["imagenet"]


@pytest.mark.parametrize(
    ("arch", "own", "dataset", "expected", "origin"),
    [
        ("resnet20_cifar", RECIPE, "cifar10", RECIPE, "as the weights say"),
        ("resnet20_cifar", RECIPE, None, RECIPE, "as the weights say"),
        ("resnet20_cifar", None, "cifar10", Preprocessing(None, 32, *CIFAR_STATISTICS), "a guess"),
        ("resnet20_cifar", None, "cifar100", Preprocessing(None, 32, *STATISTICS["cifar100"]), "a guess"),
        ("resnet20_cifar", None, None, Preprocessing(32, 32, *CIFAR_STATISTICS), "a guess"),
        ("resnet18", None, "cifar10", Preprocessing(None, 32, *CIFAR_STATISTICS), "a guess"),
        ("resnet18", None, None, Preprocessing(256, 224, *IMAGENET_STATISTICS), "a guess"),
    ],
)
def test_preprocessing_is_the_weights_own_or_said_to_be_a_guess(arch, own, dataset, expected, origin) -> None:
    model = jresnet.ResNet(jresnet.weights.native.configure(arch), rngs=None)
    chosen, found = evaluate.choose_preprocessing(evaluate.Resolved(arch, model, own, None), dataset=dataset)
    assert chosen == expected
    assert found.startswith(origin)


def test_other_statistics(model: jresnet.ResNet) -> None:
    resolved = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    half = (0.5, 0.5, 0.5)
    chosen, origin = evaluate.choose_preprocessing(resolved, dataset="cifar10", std=half)
    assert (chosen, origin) == (
        Preprocessing(36, 32, RECIPE.mean, half, "bicubic"),
        "as the weights say, but for std",
    )
    for mean, std, message in (
        ((1.5, 0.5, 0.5), (0.0, 0.5, 0.5), "mean must be .*; std must be"),
        ((0.5,), None, "mean has 1 values and std 3"),
        ((0.5,), (0.5,), "takes images of 3 channels, but there are 1 values .* give 3 as"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.choose_preprocessing(resolved, dataset="cifar10", mean=mean, std=std)
    grey = jresnet.ResNet(weights.configure("resnet18_d2l"), rngs=None)
    with pytest.raises(InputError, match=r"takes images of 1 channel, but there are 3 values .* give 1 as"):
        evaluate.choose_preprocessing(evaluate.Resolved("resnet18_d2l", grey, None, None))
    four = jresnet.ResNet(weights.configure("resnet18", in_channels=4), rngs=None)
    with pytest.raises(InputError, match="4 channels; only RGB and grey"):
        evaluate.choose_preprocessing(evaluate.Resolved("resnet18", four, None, None))


def listed(*names: str) -> images.Folder:
    """Two images of each class."""
    paths = tuple(Path(name, f"{i}.png") for name in names for i in range(2))
    return images.Folder(Path("root"), names, paths, tuple(i for i in range(len(names)) for _ in range(2)), 0)


def test_labels_by_name_or_by_position(model: jresnet.ResNet) -> None:
    unsorted = CLASSES[::-1]
    named = evaluate.Resolved("resnet20_cifar", model, RECIPE, unsorted)
    unnamed = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    assert evaluate.folder(named, listed("bee", "gnu"), None).labels.tolist() == [5, 0, 5, 0]
    assert evaluate.folder(named, listed(*CLASSES), None).labels.tolist() == [6, 5, 4, 3, 2, 1, 0] * 2
    assert evaluate.folder(unnamed, listed(*CLASSES), None).labels.tolist() == [0, 1, 2, 3, 4, 5, 6] * 2
    assert evaluate.folder(unnamed, listed(*"abcdefg"), None).labels.tolist() == [0, 1, 2, 3, 4, 5, 6] * 2
    for names in ("abcdef", "abcdefgh"):
        with pytest.raises(DataError, match=rf"root has {len(names)} class folders \(a, b, c, .*network has 7 classes"):
            evaluate.folder(unnamed, listed(*names), None)


@pytest.mark.parametrize("names", [("bee", "ox"), ("bee", "ox", *CLASSES[2:], "auk"), tuple("abcdefg"), ("1", "2")])
def test_names_that_match_in_part_or_not_at_all_are_an_error(model: jresnet.ResNet, names: tuple[str, ...]) -> None:
    """Weights that name their categories are never overruled by the sorted order, however many folders there are."""
    named = evaluate.Resolved("resnet20_cifar", model, RECIPE, CLASSES)
    strange = [name for name in names if name not in CLASSES]
    if names == ("1", "2"):  # positions, said so
        data = evaluate.folder(named, listed(*names), None)
        assert data.labels.tolist() == [1, 2, 1, 2]
        assert "class = the number" in data.description
        return
    with pytest.raises(
        DataError, match=rf"root has {len(strange)} of {len(names)} class folders \({strange[0]}"
    ) as info:
        evaluate.folder(named, listed(*names), None)
    absent = next((name for name in CLASSES if name not in names), "categories that the weights name:")
    assert "are not among the 7 categories" in str(info.value)
    assert absent in str(info.value)
    assert "`class_names`" in str(info.value)


def test_umlauts_match_however_they_are_encoded(model: jresnet.ResNet) -> None:
    """macOS's archives hold names whose umlauts are a letter and a mark."""
    categories = ("L\u00f6we", *CLASSES[1:])
    named = evaluate.Resolved("resnet20_cifar", model, RECIPE, categories)
    assert evaluate.folder(named, listed("Lo\u0308we", CLASSES[2]), None).labels.tolist() == [0, 2, 0, 2]
    unnamed = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    by_file = evaluate.folder(unnamed, listed("L\u00f6we"), None, ("Lo\u0308we", *CLASSES[1:]))
    assert by_file.labels.tolist() == [0, 0]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("title", ["{}", "class_{}", "{:02d}"])
def test_numbers_are_positions(named: bool, title: str) -> None:
    model = jresnet.create("resnet20_cifar", num_classes=12)
    resolved = evaluate.Resolved("resnet20_cifar", model, RECIPE, tuple("abcdefghijkl") if named else None)
    for numbers in (range(12), (0, 2, 11)):
        names = sorted(title.format(number) for number in numbers)
        data = evaluate.folder(resolved, listed(*names), None)
        assert data.labels[: len(names)].tolist() == [int(name.removeprefix("class_")) for name in names]
        assert "class = the number in the folder's name" in data.description
        assert len(data.notes) == (names != [title.format(i) for i in range(len(names))])


def test_numbers_that_are_no_positions() -> None:
    model = jresnet.create("resnet20_cifar", num_classes=3)
    named, unnamed = (evaluate.Resolved("resnet20_cifar", model, RECIPE, names) for names in (("x", "y", "z"), None))
    for folders in (("1", "2", "3"), ("site1", "site2", "site3")):
        data = evaluate.folder(unnamed, listed(*folders), None)
        assert data.labels[:3].tolist() == [0, 1, 2]
        assert "numbered from 1" in data.notes[0]
        with pytest.raises(DataError, match="are not among the 3 categories"):
            evaluate.folder(named, listed(*folders), None)
    assert "sorted list" in evaluate.folder(unnamed, listed("7", "8", "10"), None).description
    with pytest.raises(DataError, match="has 2 class folders"):
        evaluate.folder(unnamed, listed("site1", "site2"), None)


def test_wordnet_ids() -> None:
    """Of ImageNet's thousand, of a subset of them by their English names, and of weights that name nothing."""
    wnids, english = published.wnids(), published.categories()
    assert len(wnids) == len(set(wnids)) == len(english) == 1000
    assert list(wnids) == sorted(wnids)
    known = {
        "n01440764": "tench",
        "n02086240": "Shih-Tzu",
        "n02979186": "cassette player",
        "n15075141": "toilet tissue",
    }
    assert {wnid: english[wnids.index(wnid)] for wnid in known} == known
    assert [wnids.index(name) for name in ("n02012849", "n03126707")] == [134, 517]  # two that are called "crane"
    some = ("n02979186", "n01440764", "n03126707")
    thousand, three = (jresnet.create("resnet20_cifar", num_classes=count) for count in (1000, 3))
    for categories in (english, None):
        resolved = evaluate.Resolved("resnet20_cifar", thousand, RECIPE, categories)
        data = evaluate.folder(resolved, listed(*some), None)
        assert data.labels[:3].tolist() == [482, 0, 517]
        assert "by WordNet id" in data.description
    subset = evaluate.Resolved("resnet20_cifar", three, RECIPE, ("church", "cassette player", "tench"))
    assert evaluate.folder(subset, listed(*some[:2]), None).labels[:2].tolist() == [1, 2]
    with pytest.raises(DataError, match="are not among the 3 categories"):
        evaluate.folder(subset, listed(*some), None)
    own = evaluate.Resolved("resnet20_cifar", three, RECIPE, some)  # weights whose categories are ids
    assert evaluate.folder(own, listed(*sorted(some)), None).labels[:3].tolist() == [1, 0, 2]


def test_class_names_map_the_rest(tmp_path: Path, model: jresnet.ResNet) -> None:
    path = tmp_path / "names.txt"
    path.write_text("auk\nbee\n\nhound\neel\nfox\ngnu\n")
    names = evaluate.read_names(path)
    assert names == ("auk", "bee", "", "hound", "eel", "fox", "gnu")
    named = evaluate.Resolved("resnet20_cifar", model, RECIPE, CLASSES)
    assert evaluate.folder(named, listed("hound", "auk"), None, names).labels.tolist() == [3, 0, 3, 0]
    with pytest.raises(DataError, match=r"1 of 2 class folders \(dog\) .* are not among the 7 names given"):
        evaluate.folder(named, listed("auk", "dog"), None, names)
    with pytest.raises(DataError, match=r"several classes share \(auk\)"):
        evaluate.folder(named, listed("auk"), None, ("auk",) * 7)
    with pytest.raises(DataError, match="`class_names` has 2 names, but the network has 7 classes"):
        evaluate.folder(named, listed("auk"), None, ("auk", "bee"))
    path.write_bytes(b"\xff\n" * 7)
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="cannot read the class names"):
            evaluate.read_names(wrong)


def test_data_sets_and_the_classes_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of other classes are an error; the same classes in another order are put in order."""
    digits = tuple("0123456789")
    model = jresnet.create("resnet20_cifar")
    resolved = evaluate.Resolved("resnet20_cifar", model, RECIPE, digits)
    data = evaluate.dataset(resolved, "digits", None, 50)
    assert data.labels.tolist() == [0] * 36 + [1] * 14
    assert "digits: 50 of 360 test images" in data.description
    turned = evaluate.Resolved("resnet20_cifar", model, RECIPE, digits[::-1])
    assert evaluate.dataset(turned, "digits", None, 50).labels.tolist() == [9] * 36 + [8] * 14
    other = evaluate.Resolved("resnet20_cifar", model, RECIPE, CIFAR10_CLASSES)
    with pytest.raises(
        DataError, match=r"classes are airplane, automobile, .* those of digits are 0, 1, .*`class_names`"
    ):
        evaluate.dataset(other, "digits", None, None)
    assert evaluate.dataset(other, "digits", None, 1, digits).labels.tolist() == [0]
    unnamed = evaluate.Resolved("resnet20_cifar", model, RECIPE, None)
    assert evaluate.dataset(unnamed, "digits", None, 1).labels.tolist() == [0]
    seven = evaluate.Resolved("", jresnet.create("resnet20_cifar", num_classes=7), RECIPE, None)
    with pytest.raises(DataError, match="digits has 10 classes, but the network has 7"):
        evaluate.dataset(seven, "digits", None, None)


def test_limit_takes_classes_in_turn(model: jresnet.ResNet) -> None:
    data = evaluate.folder(evaluate.Resolved("resnet20_cifar", model, RECIPE, None), listed(*CLASSES), 9)
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert [str(path) for path in data.sources[6:8]] == ["gnu/0.png", "auk/1.png"]
    assert "9 of 14 images in 7 class folders, evenly from all classes" in data.description


# The command ---------------------------------------------------------------------------------------------------------


def test_json_alone_on_stdout(file: Path, folder: Path, by_hand: tuple) -> None:
    """In a fresh process, as a person runs it."""
    fresh = {
        name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"
    }  # the tests' JAX sets it
    done = command(SCRIPT, "--weights", file, "--data", folder, "--batch-size", 8, "--json", env=fresh)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    top1, top5, loss = by_hand
    assert (found["images"], found["top1_correct"], found["top5_correct"]) == (23, top1, top5)
    assert (found["top1"], found["top5"]) == (top1 / 23, top5 / 23)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["bad"] == []
    assert Preprocessing.from_json(json.dumps(found["preprocessing"])) == RECIPE
    assert found["preprocessing_origin"] == "as the weights say"
    assert found["images_per_second"] > 0


def test_bad_images_on_stderr(file: Path, damaged: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--weights", str(file), "--data", str(damaged), "--batch-size", "8"]
    assert commands.run("evaluate", arguments, "evaluate.py") == 1
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines() if line[0] != " "] == [
        "jresnet", "weights", "data", "note", "images", "device", "compile", "top-1", "top-5", "loss", "speed",
    ]  # fmt: skip
    assert "of 23)" in printed.out
    assert "note     class folders that contain no images: 3" in printed.out
    assert f"bad image {damaged}/cat/empty.png: empty\n" in printed.err
    assert f"bad image {damaged}/bee/cut.jpg: " in printed.err
    assert printed.err.endswith("error: 2 of 25 images are bad and were skipped; use --skip-bad to accept this\n")
    assert commands.run("evaluate", [*arguments, "--skip-bad", "--json"], "evaluate.py") == 0
    printed = capsys.readouterr()
    assert [Path(bad["file"]).name for bad in json.loads(printed.out)["bad"]] == ["empty.png", "cut.jpg"]
    assert "error" not in printed.err
    assert "bad image" in printed.err


def test_bfloat16_and_limit(file: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        arguments = ["--weights", str(file), "--data", str(folder), "--limit", "7", "--dtype", dtype, "--json"]
        assert commands.run("evaluate", arguments, "evaluate.py") == 0
        found[dtype] = json.loads(capsys.readouterr().out)
        assert found[dtype]["images"] == 7
    difference = abs(found["bfloat16"]["loss"] - found["float32"]["loss"])
    assert 0 < difference < 0.1 * found["float32"]["loss"]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"--weights": "nowhere.safetensors"}, 1, "error: cannot read nowhere.safetensors"),
        ({"--weights": "resnet51"}, 1, "error: no weights are published for 'resnet51' (did you mean resnet50"),
        ({"--weights": "net.pth"}, 1, "error: net.pth cannot be read (No such file"),
        ({"--data": "nowhere"}, 1, "error: there is no folder nowhere: expected FOLDER/CLASS/*.JPEG"),
        ({"--data": "cifar10"}, 1, "error: cifar10 has 10 classes, but the network has 7\n"),
        ({"--mean": "1,2,3"}, 2, "argument --mean: expected one or three numbers from 0 to 1, got '1,2,3'"),
        ({"--mean": "red"}, 2, "argument --mean: expected R,G,B, got 'red'"),
        ({"--limit": "0"}, 2, "argument --limit: expected a whole number of at least 1, got '0'"),
        ({"--batch-size": "x"}, 2, "argument --batch-size: expected a whole number of at least 1, got 'x'"),
        ({"--data-dir": "here"}, 2, "--data-dir is the location of CIFAR, but --data is a folder"),
        ({"--dtype": "float16"}, 2, "argument --dtype: invalid choice"),
    ],
)
def test_bad_input(file: Path, folder: Path, capsys, changes: dict, code: int, message: str) -> None:
    options = {"--weights": str(file), "--data": str(folder)} | changes
    try:
        found = commands.run("evaluate", [part for option in options.items() for part in option], "evaluate.py")
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr()
    assert found == code
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_not_one_good_image(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(7):
        (tmp_path / CLASSES[i]).mkdir()
        (tmp_path / CLASSES[i] / "x.jpg").write_text("no image")
    assert commands.run("evaluate", ["--weights", str(file), "--data", str(tmp_path), "--json"], "evaluate.py") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: none of the 7 images can be used, among them:\n  ")
    assert len(printed.err.splitlines()) == 6


@pytest.mark.parametrize("missing", ["PIL", "tqdm"])
def test_what_is_not_installed_is_named_with_its_extra(missing: str) -> None:
    begin = f"import sys, runpy; sys.path.insert(0, 'scripts'); sys.modules[{missing!r}] = None; "
    code = begin + f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    done = command("-c", code, "--weights", "resnet18", "--data", ".")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert missing in done.stderr
    assert "pip install -e '.[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_network_trained_elsewhere(
    shared: Path, cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """akamaster's ResNet-20 gets 915 of the 1,000 clean test images, as in PyTorch."""
    from convert import torch2flax

    output, source = tmp_path / "resnet20.safetensors", shared / "weights" / "resnet20-12fca82f.th"
    arguments = ["resnet20_cifar", "--weights", str(source), "--output", str(output), "--verify", "never"]
    assert torch2flax.main(arguments) == 0
    capsys.readouterr()
    arguments = ["--weights", str(output), "--data", "cifar10", "--data-dir", str(cifar10)]
    statistics = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    assert commands.run("evaluate", [*arguments, *statistics], "evaluate.py") == 0
    printed = capsys.readouterr()
    assert "top-1    91.50 % (915 of 1,000)" in printed.out
    assert "data     cifar10: 1,000 test images, from" in printed.out
    assert "note     differs from the official CIFAR-10" in printed.out
    assert printed.err == ""
    assert commands.run("evaluate", [*arguments, *statistics, "--limit", "100", "--json"], "evaluate.py") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 100
