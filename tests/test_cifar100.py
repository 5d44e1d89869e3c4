"""CIFAR-100 from every layout, on tiny archives that the tests write: the same arrays, fine labels, one clear error."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

import jresnet.data
from jresnet.data import cifar10, cifar100
from jresnet.data.tfds import TEMPLATE
from jresnet.errors import DataError, DownloadError

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # images, coarse labels, fine labels
SIZES = {"train": 7, "test": 3}


@pytest.fixture(autouse=True)
def nothing_else_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store or ./data of the machine may be found, and no test may use the network."""

    def no_network(urls: object, path: Path, **_: object) -> Path:
        path.parent.mkdir(parents=True)
        raise DownloadError("no route to host")

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for module in (cifar10, cifar100):
        monkeypatch.setattr(module, "fetch", no_network)


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    draw = np.random.default_rng(0)
    return {
        name: (draw.integers(0, 256, (n, 32, 32, 3), np.uint8), draw.integers(0, 20, n), draw.integers(0, 100, n))
        for name, n in SIZES.items()
    }


def planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def binary(batch: Batch) -> bytes:
    images, coarse, fine = batch
    return np.concatenate([coarse[:, None], fine[:, None], planes(images)], axis=1).astype(np.uint8).tobytes()


def pickled(batch: Batch) -> bytes:
    images, coarse, fine = batch
    entries = {
        "filenames": [f"{i}.png" for i in range(len(fine))],
        "batch_label": "training batch 1 of 1",
        "fine_labels": fine.tolist(),
        "coarse_labels": coarse.tolist(),
        "data": planes(images),
    }
    return pickle.dumps(entries, protocol=2)


def write(root: Path, batches: dict[str, Batch], kind: str, archive: bool) -> Path:
    """An extracted folder or an archive with everything that the official ones hold."""
    folder = root / f"cifar-100-{kind}"
    folder.mkdir(parents=True)
    for name, batch in batches.items():
        path = folder / (name if kind == "python" else f"{name}.bin")
        path.write_bytes(pickled(batch) if kind == "python" else binary(batch))
    for other in ("meta", "file.txt~") if kind == "python" else ("fine_label_names.txt", "coarse_label_names.txt"):
        (folder / other).write_text("no batch")
    if not archive:
        return folder
    with tarfile.open(root / f"cifar-100-{kind}.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return root / f"cifar-100-{kind}.tar.gz"


def check(dataset: jresnet.data.Dataset, batches: dict[str, Batch]) -> None:
    for split, name in ((dataset.train, "train"), (dataset.test, "test")):
        images, _, fine = batches[name]
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, fine)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert (dataset.name, dataset.classes) == ("cifar100", cifar100.CLASSES)
    assert list(dataset.verified) == ["train.bin", "test.bin"]


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_official_layouts(tmp_path: Path, batches: dict[str, Batch], kind: str, archive: bool) -> None:
    there = write(tmp_path / "here", batches, kind, archive)
    digests = set()
    for place in (there, tmp_path / "here"):
        dataset = jresnet.data.load("cifar100", place)
        check(dataset, batches)
        assert dataset.source == f"{'archive' if archive else 'folder'} {there}"
        assert dataset.notes == (
            f"differs from the official CIFAR-100: train (7 images), test (3 images) of {dataset.source}",
        )
        digests.add(dataset.digest)
    assert len(digests) == 1


def test_official_batches_are_known_by_their_records(
    tmp_path: Path, batches: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official binary files', whatever the layout; the coarse labels count too."""
    official = {f"{name}.bin": hashlib.sha256(binary(batch)).hexdigest() for name, batch in batches.items()}
    monkeypatch.setattr(cifar100, "OFFICIAL", official)
    for kind in ("python", "binary"):
        dataset = cifar100.load_cifar100(write(tmp_path / kind, batches, kind, archive=False))
        assert (dataset.verified, dataset.notes) == (dict.fromkeys(official, True), ())
    images, coarse, fine = batches["test"]
    altered = batches | {"test": (images, (coarse + 1) % 20, fine)}
    dataset = cifar100.load_cifar100(write(tmp_path / "altered", altered, "python", archive=False))
    assert dataset.verified == {"train.bin": True, "test.bin": False}


def test_a_tfds_store(tmp_path: Path, batches: dict[str, Batch]) -> None:
    """As TFDS's own builder writes it, in TFRecord files, shuffled."""
    import io
    import json

    from PIL import Image
    from tensorboardX.record_writer import RecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    store = tmp_path / "cifar100" / "3.0.2"
    store.mkdir(parents=True)
    splits = [{"name": name, "shardLengths": [str(n)], "filepathTemplate": TEMPLATE} for name, n in SIZES.items()]
    (store / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord", "splits": splits}))
    (store / "features.json").write_text("{}")
    for name, (images, coarse, fine) in batches.items():
        writer = RecordWriter(str(store / f"cifar100-{name}.tfrecord-00000-of-00001"))
        for i in np.random.default_rng(1).permutation(SIZES[name]):
            example, png = tf_example_pb2.Example(), io.BytesIO()
            Image.fromarray(images[i]).save(png, "PNG")
            feature = example.features.feature
            feature["image"].bytes_list.value.append(png.getvalue())
            feature["label"].int64_list.value.append(int(fine[i]))
            feature["coarse_label"].int64_list.value.append(int(coarse[i]))
            feature["id"].bytes_list.value.append(f"{name}_{i:05d}".encode())
            writer.write(example.SerializeToString())
        writer.close()
    dataset = cifar100.load_cifar100(tmp_path)
    check(dataset, batches)
    assert dataset.source == f"TFDS store {store} (tfrecord)"


def test_a_download_is_read_from_its_archive(
    tmp_path: Path, batches: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write(tmp_path / "there", batches, "python", archive=True)

    def fetch(urls: object, path: Path, *, sha256: str, progress: bool, **_: object) -> Path:
        assert sha256 == cifar100.ARCHIVE_SHA256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read_bytes())
        return path

    monkeypatch.setattr(cifar100, "fetch", fetch)
    check(cifar100.load_cifar100(tmp_path / "new"), batches)
    check(cifar100.load_cifar100(tmp_path / "new", download=False), batches)


def test_what_is_wrong_is_told_at_once(tmp_path: Path, batches: dict[str, Batch]) -> None:
    images, coarse, fine = batches["train"]
    for kind in ("python", "binary"):
        folder = write(tmp_path / kind, {"train": (images, coarse, fine + 100)}, kind, archive=False)
        with pytest.raises(
            DataError, match=r"cannot be used as CIFAR-100:\n.*label 1\d\d at .* 0 to 99\n.*missing: test"
        ):
            cifar100.load_cifar100(folder)
    folder = write(tmp_path / "coarse", batches | {"test": (images, coarse + 20, fine)}, "python", archive=False)
    with pytest.raises(DataError, match="expected 0 to 19"):
        cifar100.load_cifar100(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no CIFAR-100: .*no route to host\n.*\n.*cifar-100-python.tar.gz"):
        cifar100.load_cifar100(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("archive", [False, True])
def test_the_other_of_the_two_is_named(tmp_path: Path, batches: dict[str, Batch], archive: bool) -> None:
    there = write(tmp_path, batches, "python", archive)
    with pytest.raises(DataError, match=f"found no CIFAR-10, but {there} is CIFAR-100: choose the dataset cifar100"):
        cifar10.load_cifar10(tmp_path)
    with pytest.raises(DataError, match="is CIFAR-100: choose the dataset cifar100"):
        cifar10.load_cifar10(there)
    (tmp_path / "x" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(DataError, match="is CIFAR-10: choose the dataset cifar10"):
        cifar100.load_cifar100(tmp_path / "x")
