"""jresnet.data: every source gives the same arrays, what is not official is named, bad input ends in one clear error.

The archives and stores are tiny ones that the tests write; the real images are used where JRESNET_SHARED names a folder
that holds them.
"""

import contextlib
import copyreg
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jresnet.data
from jresnet.data import cifar10 as data
from jresnet.data import load_digits, prepare_tfds
from jresnet.errors import DataError, DownloadError, InputError

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
BATCHES = [*TRAIN, "test_batch"]
SIZES = dict.fromkeys(TRAIN, 4) | {"test_batch": 6}


# What the tests write ------------------------------------------------------------------------------------------------


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def binary_batch(images, labels):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, planes(images), strict=True))


def python2_batch(images, labels, *, shape=None, dtype=b"u1", fortran=False):
    """The opcodes Python 2's cPickle wrote in the official batches: byte strings (U, T), numpy 1's module names."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    raw = planes(images).tobytes("F" if fortran else "C")
    rows, columns = shape or (len(images), 3072)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    kind = (
        b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + integer(-1) * 2 + b"K\x00tb"
    )
    state = b"(K\x01" + integer(rows) + integer(columns) + b"\x86" + kind + (b"\x88" if fortran else b"\x89")
    state += b"T" + struct.pack("<i", len(raw)) + raw + b"t"
    entries = text(b"batch_label") + text(b"a batch") + text(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + entries + text(b"data") + array + state + b"bu."


def python3_batch(images, labels, protocol):
    key = str if protocol > 2 else str.encode
    return pickle.dumps({key("data"): planes(images), key("labels"): list(labels)}, protocol=protocol)


def write_folder(folder, batches, kind="py"):
    """``batches``: {name: (images, labels)} -> an extracted folder as the official archive gives it."""
    folder.mkdir(parents=True)
    for name, batch in batches.items():
        if kind == "py":
            (folder / name).write_bytes(python2_batch(*batch))
        else:
            (folder / f"{name}.bin").write_bytes(binary_batch(*batch))
    (folder / "readme.html").write_text("not a batch")
    return folder


def write_archive(path, folder):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return path


@pytest.fixture(autouse=True)
def nothing_else_around(tmp_path, monkeypatch):
    """No store or ./data of the machine may be found, and no test may use the network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(data, "fetch", no_network)


def no_network(urls, path, **_):
    path.parent.mkdir(parents=True, exist_ok=True)  # as the real one does
    raise DownloadError("no route to host")


@pytest.fixture(scope="session")
def batches():
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n).tolist())
        for name, n in SIZES.items()
    }


@pytest.fixture(scope="session")
def layouts(batches, tmp_path_factory):
    """A folder with every official layout of the same images, each in a place of its own."""
    root = tmp_path_factory.mktemp("layouts")
    py = write_folder(root / "py" / "cifar-10-batches-py", batches)
    binary = write_folder(root / "bin" / "cifar-10-batches-bin", batches, "bin")
    for place, name, folder in (("py-tar", data.ARCHIVE, py), ("bin-tar", "cifar-10-binary.tar.gz", binary)):
        (root / place).mkdir()
        write_archive(root / place / name, folder)
    return root


@pytest.fixture(scope="session")
def store(layouts, tmp_path_factory):
    """The data_dir of a TFDS store that prepare_tfds made of the same images."""
    root = tmp_path_factory.mktemp("store")
    folder = prepare_tfds(data.load_cifar10(layouts / "py"), root, progress=False)
    assert folder == root / "cifar10" / "3.0.2"
    return root


def check(dataset, batches):
    """The dataset is these batches, in this order."""
    train = [batches[name] for name in TRAIN]
    for split, parts in ((dataset.train, train), (dataset.test, [batches["test_batch"]])):
        images = np.concatenate([images for images, _ in parts])
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        np.testing.assert_array_equal(split.images, images)
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.labels, np.concatenate([labels for _, labels in parts]))
    assert dataset.digest == hashlib.sha256(b"".join(binary_batch(*batches[name]) for name in BATCHES)).hexdigest()
    assert (dataset.name, dataset.classes[0], len(dataset.classes)) == ("cifar10", "airplane", 10)
    assert "\n" not in dataset.source
    assert list(dataset.verified) == [f"{name}.bin" for name in BATCHES]


def official(monkeypatch, batches):
    """Let these batches be the official ones."""
    digests = {f"{name}.bin": hashlib.sha256(binary_batch(*batch)).hexdigest() for name, batch in batches.items()}
    monkeypatch.setattr(data, "OFFICIAL", digests)


def refused(path, *expected):
    """The one error that loading ``path`` ends in; it names the path."""
    with pytest.raises(DataError) as caught:
        data.load_cifar10(path, download=False)
    message = str(caught.value)
    for text in (str(path), *expected):
        assert text in message
    return message


# The same from everywhere --------------------------------------------------------------------------------------------

PLACES = [
    "py",  # torchvision's ./data
    "py/cifar-10-batches-py",
    "bin",
    "bin/cifar-10-batches-bin",
    "py-tar",
    "py-tar/cifar-10-python.tar.gz",
    "bin-tar",
    "bin-tar/cifar-10-binary.tar.gz",
]


@pytest.mark.parametrize("place", PLACES)
def test_official_layouts(place, layouts, batches):
    dataset = data.load_cifar10(str(layouts / place), download=False)
    check(dataset, batches)
    assert str(layouts / place) in dataset.source
    assert not any(dataset.verified.values())
    (note,) = dataset.notes
    assert "\n" not in note
    assert all(f"{name} ({SIZES[name]} images)" in note for name in BATCHES)


def test_without_a_folder_data_is_looked_into(layouts, batches, monkeypatch):
    Path("data").symlink_to(layouts / "py-tar")
    check(data.load_cifar10(), batches)


def test_a_path_with_a_newline_gives_one_line(layouts, batches, tmp_path):
    (tmp_path / "a\nb").symlink_to(layouts / "bin")
    dataset = data.load_cifar10(tmp_path / "a\nb")
    check(dataset, batches)
    assert "\n" not in dataset.notes[0]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3(protocol, batches, tmp_path):
    folder = write_folder(tmp_path / "py", batches)
    for name, batch in batches.items():
        (folder / name).write_bytes(python3_batch(*batch, protocol))
    check(data.load_cifar10(folder), batches)


def test_pickles_with_old_numpy_names_and_column_order(batches, tmp_path):
    images, labels = batches["test_batch"]
    theirs = pickle.loads(python2_batch(images, labels), encoding="bytes")  # what the tests write is what numpy reads
    np.testing.assert_array_equal(theirs[b"data"], planes(images))
    folder = write_folder(tmp_path / "py", batches)
    (folder / "test_batch").write_bytes(python2_batch(images, labels, fortran=True))
    check(data.load_cifar10(folder), batches)


@pytest.mark.parametrize("place", ["py-tar", "bin", "store"])
def test_official_batches_are_known_by_their_content(place, layouts, store, batches, monkeypatch):
    official(monkeypatch, batches)
    dataset = data.load_cifar10(layouts / place if place != "store" else store)
    if place == "store":  # there a batch is 10,000 images, so all 20 are in the first one
        assert dataset.verified == dict.fromkeys(data.OFFICIAL, False) | {"test_batch.bin": True}
        assert "data_batch_1 (20 images), data_batch_2 (0 images)" in dataset.notes[0]
    else:
        assert dataset.verified == dict.fromkeys(data.OFFICIAL, True)
        assert dataset.notes == ()


def test_one_altered_pixel_and_another_test_size_are_named(batches, tmp_path, monkeypatch):
    official(monkeypatch, batches)
    images = batches["data_batch_2"][0].copy()
    images[1, 2, 3, 0] ^= 1
    test_images, test_labels = batches["test_batch"]
    mine = batches | {
        "data_batch_2": (images, batches["data_batch_2"][1]),
        "test_batch": (test_images[:3], test_labels[:3]),
    }
    folder = write_folder(tmp_path / "here", mine)
    dataset = data.load_cifar10(folder)
    check(dataset, mine)
    named = "data_batch_2 (4 images), test_batch (3 images)"
    assert dataset.notes == (f"differs from the official CIFAR-10: {named} of folder {folder}",)
    assert [name for name, same in dataset.verified.items() if not same] == ["data_batch_2.bin", "test_batch.bin"]


# TFDS stores ---------------------------------------------------------------------------------------------------------


def test_store_is_read_back_in_the_official_order(store, batches):
    dataset = data.load_cifar10(store, download=False)
    check(dataset, batches)
    assert dataset.source == f"TFDS store {store / 'cifar10' / '3.0.2'} (array_record)"


def test_stock_tfds_reads_the_store(store, batches):
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", data_dir=store, download=False)
    images = np.concatenate([batches[name][0] for name in TRAIN])
    ids = [example["id"].decode() for example in source["train"]]
    assert sorted(ids) == [f"train_{i:05d}" for i in range(20)]
    assert ids != sorted(ids)  # TFDS shuffles: else this would not test that the order is restored
    for example in source["train"]:
        np.testing.assert_array_equal(example["image"], images[int(example["id"][-5:])])
    assert [len(source[split]) for split in ("train", "test")] == [20, 6]
    assert "tensorflow" not in sys.modules


def test_order_of_the_sources(store, layouts, batches, tmp_path, monkeypatch):
    other = {name: (images[::-1], labels[::-1]) for name, (images, labels) in batches.items()}
    monkeypatch.setenv("TFDS_DATA_DIR", str(store))
    mine = tmp_path / "mine"
    mine.mkdir()
    assert data.load_cifar10(mine).source.startswith("TFDS store")  # nothing in mine
    write_folder(mine / "cifar-10-batches-bin", other, "bin")
    check(data.load_cifar10(mine), other)  # what is named goes before the environment
    assert data.load_cifar10().source.startswith("TFDS store")
    write_folder(Path("data"), other)
    assert data.load_cifar10().source.startswith("TFDS store")
    (mine / "cifar10").symlink_to(store / "cifar10")
    assert data.load_cifar10(mine).source == f"TFDS store {mine}/cifar10/3.0.2 (array_record)"


def rewrite_as_tfrecord(store, root, change=lambda feature: None):
    """The store's records, changed, in TFRecord files, framed by tensorboardX; the metadata says so."""
    from array_record.python import array_record_module
    from tensorboardX.record_writer import RecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    old, new = store / "cifar10" / "3.0.2", root / "cifar10" / "3.0.2"
    new.mkdir(parents=True)
    for file in old.glob("*.json"):
        (new / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    for file in old.glob("*array_record*"):
        writer = RecordWriter(str(new / file.name.replace("array_record", "tfrecord")))
        for record in array_record_module.ArrayRecordReader(str(file)).read_all():
            example = tf_example_pb2.Example.FromString(record)
            change(example.features.feature)
            writer.write(example.SerializeToString())
        writer.close()
    return new


def test_tfrecord_store(store, batches, tmp_path):
    rewrite_as_tfrecord(store, tmp_path)
    dataset = data.load_cifar10(tmp_path)
    check(dataset, batches)
    assert dataset.source.endswith("(tfrecord)")


def test_a_store_without_ids_keeps_its_order(store, batches, tmp_path):
    rewrite_as_tfrecord(store, tmp_path, lambda feature: feature.pop("id"))
    dataset = data.load_cifar10(tmp_path)
    expected = np.concatenate([batches[name][0] for name in TRAIN])
    assert not np.array_equal(dataset.train.images, expected)
    rows = sorted(image.tobytes() for image in dataset.train.images)
    assert rows == sorted(image.tobytes() for image in expected)


def test_ids_tell_the_batch(store, batches, tmp_path, monkeypatch):
    """Images 0, 2,500, ... 47,500: four in each batch, as the official ones of this test have."""

    def spread(feature):
        name, number = feature["id"].bytes_list.value[0].split(b"_")
        feature["id"].bytes_list.value[0] = b"%s_%05d" % (name, 2500 * int(number))

    official(monkeypatch, batches)
    rewrite_as_tfrecord(store, tmp_path, spread)
    dataset = data.load_cifar10(tmp_path)
    check(dataset, batches)
    assert dataset.verified == dict.fromkeys(data.OFFICIAL, True)
    assert dataset.notes == ()


def png(*args):
    buffer = io.BytesIO()
    Image.new(*args).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", b"train_00001"),  # all the same
        ("id", b"train_x"),
        ("id", b"other_00001"),
        ("id", b"\xff"),
        ("label", 10),
        ("label", -1),
        ("image", b"no image"),
        ("image", png("L", (32, 32))),
        ("image", png("RGB", (64, 16))),
        ("image", png("RGB", (32, 32))[:-30]),
    ],
    ids=["all the same", "a letter", "other split", "no text", "10", "-1", "no image", "grey", "64x16", "torn"],
)
def test_records_that_are_not_of_cifar10(key, value, store, tmp_path):
    def change(feature):
        if feature["id"].bytes_list.value[0].startswith(b"test"):
            return  # one bad split is enough
        values = feature[key].int64_list.value if key == "label" else feature[key].bytes_list.value
        values[0] = value

    rewrite_as_tfrecord(store, tmp_path, change)
    refused(
        tmp_path,
        "cannot be used",
        "remove it",
        f"label {value}" if key == "label" else "",
    )


def test_a_store_with_too_few_records(store, tmp_path):
    (file,) = rewrite_as_tfrecord(store, tmp_path).glob("*train*")
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    file.write_bytes(content[: 12 + length + 4])
    refused(tmp_path, "has 1 records; expected 20", "remove it")


@pytest.mark.parametrize("cut", [1, 5000, 20_000])
def test_a_damaged_tfrecord_store(cut, store, tmp_path):
    (file,) = rewrite_as_tfrecord(store, tmp_path).glob("*train*")
    file.write_bytes(file.read_bytes()[:-cut])
    refused(tmp_path, "truncated", "remove it")


def test_tfrecord_with_a_huge_length(store, tmp_path):
    (file,) = rewrite_as_tfrecord(store, tmp_path).glob("*train*")
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
    refused(tmp_path, "damaged")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "pipe", "format", "names", "json", "foreign id"])
def test_a_damaged_store(damage, store, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for file in (store / "cifar10" / "3.0.2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (train,) = folder.glob("*train*")
    info = folder / "dataset_info.json"
    if damage == "cut":
        train.write_bytes(train.read_bytes()[:70_000])
    elif damage == "flipped":
        content = bytearray(train.read_bytes())
        content[30_000] ^= 1  # in an image; the end is padding
        train.write_bytes(content)
    elif damage == "missing":
        train.unlink()
    elif damage == "pipe":
        train.unlink()
        os.mkfifo(train)
    elif damage == "names":
        info.write_text(info.read_text().replace("{DATASET}-", "../{DATASET}-"))
    elif damage == "format":
        info.write_text(info.read_text().replace("array_record", "parquet"))
    elif damage == "foreign id":
        (test,) = folder.glob("*test*")
        test.write_bytes(train.read_bytes())
        described = json.loads(info.read_text())
        for split in described["splits"]:
            split["shardLengths"] = ["20"]
        info.write_text(json.dumps(described))
    else:
        info.write_text("{")
    refused(tmp_path, "cannot be used", "remove it", "array_record or tfrecord" if damage == "format" else "")


def test_no_code_of_a_store_is_run(store, batches, tmp_path):
    """TFDS's own reader imports the modules that features.json and dataset_info.json name."""
    shutil.copytree(store, tmp_path / "data")
    folder = tmp_path / "data" / "cifar10" / "3.0.2"
    for name, key in (("features.json", "pythonClassName"), ("dataset_info.json", "moduleName")):
        described = json.loads((folder / name).read_text())
        assert key in described
        described[key] = "data.evil.X" if key == "pythonClassName" else "data.evil"
        (folder / name).write_text(json.dumps(described))
    (tmp_path / "data" / "evil.py").write_text("open('ran', 'w')")
    read = "from jresnet.data import load; print(load('cifar10', 'data').digest)"
    stock = "import tensorflow_datasets as tfds; tfds.builder_from_directory('data/cifar10/3.0.2').info"
    environment = os.environ | {"PYTHONPATH": f"{Path(jresnet.data.__file__).parents[2]}{os.pathsep}{tmp_path}"}
    found = subprocess.run(
        [sys.executable, "-c", read], cwd=tmp_path, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert found.stdout.strip() == data.load_cifar10(store).digest, found.stderr
    assert not (tmp_path / "ran").exists()
    subprocess.run([sys.executable, "-c", stock], cwd=tmp_path, env=environment, capture_output=True)
    assert (tmp_path / "ran").exists()  # else this test would show nothing


def test_a_store_of_other_pictures_is_not_given_to_a_program(store, tmp_path):
    """Pillow would run Ghostscript for PostScript."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "EPS")

    def change(feature):
        feature["image"].bytes_list.value[0] = buffer.getvalue()

    rewrite_as_tfrecord(store, tmp_path, change)
    refused(tmp_path, "cannot be used", "cannot identify image")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"20"', '"-1"'), ('"20"', '"2000000000"'), ('"20"', '"9' + "0" * 5000 + '"'), ('"name": "train"', '"name": "trian"')],
)  # fmt: skip
def test_counts_that_cannot_be(old, new, store, tmp_path):
    info = rewrite_as_tfrecord(store, tmp_path) / "dataset_info.json"
    assert info.read_text().count(old) == 1
    info.write_text(info.read_text().replace(old, new))
    refused(tmp_path, "cannot be used", "remove it")


def test_a_store_of_an_old_tfds(store, batches, tmp_path):
    """Before 4.8 it names neither the format nor the files."""
    info = rewrite_as_tfrecord(store, tmp_path) / "dataset_info.json"
    described = json.loads(info.read_text())
    del described["fileFormat"]
    for split in described["splits"]:
        del split["filepathTemplate"]
    info.write_text(json.dumps(described))
    check(data.load_cifar10(tmp_path), batches)


def test_prepare_refuses(store, layouts, tmp_path):
    dataset = data.load_cifar10(layouts / "bin")
    with pytest.raises(DataError, match="already exists"):
        prepare_tfds(dataset, store)
    with pytest.raises(DataError, match="digits"):
        prepare_tfds(replace(dataset, name="digits"), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        prepare_tfds(dataset, tmp_path / "file")
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def at_the_tenth_image(monkeypatch, action):
    """While a store is being prepared."""
    seen = []

    def fromarray(*args, original=Image.fromarray):
        seen.append(args)
        if len(seen) == 10:
            action()
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", fromarray)
        yield


def raising(error):
    def action():
        raise error

    return action


def test_interrupted_preparation_leaves_no_store(layouts, tmp_path, monkeypatch):
    dataset = data.load_cifar10(layouts / "bin")
    with at_the_tenth_image(monkeypatch, raising(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        prepare_tfds(dataset, tmp_path / "new")
    assert not list((tmp_path / "new").rglob("*.json"))
    refused(tmp_path / "new", "found no CIFAR-10")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write() failed")])
def test_a_full_disk_leaves_no_store(error, layouts, tmp_path, monkeypatch):
    dataset = data.load_cifar10(layouts / "bin")
    full = pytest.raises(DataError, match=f"cannot write the TFDS store .*{error.args[-1]}".replace("()", ".."))
    with at_the_tenth_image(monkeypatch, raising(error)), full:
        prepare_tfds(dataset, tmp_path / "new")
    refused(tmp_path / "new", "found no CIFAR-10")


def test_two_preparations_at_once(store, layouts, batches, tmp_path, monkeypatch):
    def the_other_one_is_done():
        shutil.copytree(store, tmp_path / "new", dirs_exist_ok=True)

    with at_the_tenth_image(monkeypatch, the_other_one_is_done):
        prepare_tfds(data.load_cifar10(layouts / "bin"), tmp_path / "new", progress=False)
    check(data.load_cifar10(tmp_path / "new"), batches)


def test_what_a_killed_preparation_leaves_is_no_store(store, tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "incomplete.ABCDEF_3.0.2").symlink_to(store / "cifar10" / "3.0.2")
    (tmp_path / "cifar10" / "3.0.2").mkdir()  # without the two json files
    refused(tmp_path, "found no CIFAR-10")


def test_prepare_says_so_on_stderr_only(layouts, tmp_path, capfd):
    dataset = data.load_cifar10(layouts / "bin")
    prepare_tfds(dataset, tmp_path / "quiet", progress=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "prepar" not in err.lower()
    prepare_tfds(dataset, tmp_path / "loud")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1  # no terminal, so no bars
    assert "26 images" in err


# Download ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(layouts, tmp_path, monkeypatch):
    """The real fetch, with a file of this machine in the place of the official archive."""
    from jresnet.download import fetch

    archive = tmp_path / "mirror.tar.gz"
    archive.write_bytes((layouts / "py-tar" / data.ARCHIVE).read_bytes())
    monkeypatch.setattr(data, "fetch", fetch)
    monkeypatch.setattr(data, "URLS", (archive.as_uri(),))
    monkeypatch.setattr(data, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return archive


@pytest.mark.parametrize("given", [True, False])
def test_download_is_prepared_as_a_store(given, mirror, batches, tmp_path):
    home = tmp_path / ("new" if given else "tfds")
    data_dir = home if given else None
    first = data.load_cifar10(data_dir, progress=False)
    check(first, batches)
    assert "download" in first.source
    mirror.unlink()
    second = data.load_cifar10(data_dir, progress=False)
    check(second, batches)
    assert second.source == f"TFDS store {home}/cifar10/3.0.2 (array_record)"


def test_interrupted_preparation_resumes_from_the_archive(mirror, batches, tmp_path, monkeypatch):
    with at_the_tenth_image(monkeypatch, raising(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        data.load_cifar10(tmp_path / "new", progress=False)
    mirror.unlink()
    check(data.load_cifar10(tmp_path / "new", download=False, progress=False), batches)
    assert data.load_cifar10(tmp_path / "new", download=False).source.startswith("TFDS store")


def test_a_download_with_another_digest_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ARCHIVE_SHA256", "0" * 64)
    with pytest.raises(DataError, match="SHA-256"):
        data.load_cifar10(tmp_path / "new", progress=False)
    assert not (tmp_path / "new" / "cifar10").exists()


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("given", ["missing", "empty", None])
def test_no_data_and_no_network(given, download, tmp_path):
    data_dir = given and tmp_path / given
    if given == "empty":
        data_dir.mkdir()
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        data.load_cifar10(data_dir, download=download)
    assert time.monotonic() - start < 1  # fetch has 4 of the 5 seconds
    message = str(caught.value)
    helps = ["a data_dir that holds", "cs.toronto.edu", "storage.googleapis.com", "HTTPS_PROXY", '"digits"']
    for text in [*helps, str(data_dir or "data"), str(tmp_path / "tfds")]:
        assert text in message
    assert ("no route to host" if download else "not allowed") in message
    assert not list(tmp_path.rglob("downloads"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "empty"][: 1 + (given == "empty")]


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, layout):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "_find_layout", refuse)
    refused(tmp_path, "Permission denied")


def test_a_missing_archive_is_not_taken_for_a_new_folder(tmp_path):
    refused(tmp_path / "cifar-10-pyhton.tar.gz", "there is no file")


def test_a_store_without_tfds(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r'pip install "jresnet\[train\]"'):
        data.load_cifar10(store)


@pytest.mark.parametrize("why", ["no TFDS", "full disk", "broken package"])
def test_images_that_cannot_be_kept_are_there_all_the_same(why, mirror, batches, tmp_path, monkeypatch):
    """A note says why; the archive, which stays, is read the next time."""
    told = {"no TFDS": 'pip install "jresnet[train]"', "full disk": "No space left", "broken package": "out of memory"}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        if why == "no TFDS":
            patch.setitem(sys.modules, "tensorflow_datasets", None)
        elif why == "full disk":
            stack.enter_context(at_the_tenth_image(patch, raising(OSError(28, "No space left on device"))))
        else:
            stack.enter_context(at_the_tenth_image(patch, raising(ImportError("out of memory"))))
        found = data.load_cifar10(tmp_path / "new", progress=False)
    check(found, batches)
    official, kept = found.notes
    assert official.startswith("differs from the official CIFAR-10")
    assert kept.startswith("not stored as a TFDS store: ")
    assert told[why] in kept
    mirror.unlink()
    again = data.load_cifar10(tmp_path / "new", download=False, progress=False)
    check(again, batches)
    assert again.notes == (official,)  # now it is kept


def test_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a pipe")
    for place in (tmp_path / "a" / data.ARCHIVE, tmp_path / "b" / "downloads" / data.ARCHIVE):
        place.parent.mkdir(parents=True)
        os.mkfifo(place)
    refused(tmp_path / "a", "found no CIFAR-10")
    with pytest.raises(DataError, match="not a regular file"):
        data.load_cifar10(tmp_path / "b")


def test_data_sets_by_name(layouts, batches):
    check(jresnet.data.load("cifar10", layouts / "py"), batches)
    assert jresnet.data.load("digits").name == "digits"
    with pytest.raises(InputError, match="unknown data set 'mnist': there are cifar10, cifar100, digits"):
        jresnet.data.load("mnist")


# Bad input -----------------------------------------------------------------------------------------------------------


def with_batch(tmp_path, batches, content, kind="py"):
    """A folder whose data_batch_3 is ``content``."""
    folder = write_folder(tmp_path / f"cifar-10-batches-{kind}", batches, kind)
    (folder / ("data_batch_3" + (".bin" if kind == "bin" else ""))).write_bytes(content)
    return folder


def test_empty_folder(tmp_path):
    for name in ("py", "bin"):
        (tmp_path / name / f"cifar-10-batches-{name}").mkdir(parents=True)
        refused(
            tmp_path / name, "missing: data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch"
        )


def test_all_problems_at_once(batches, tmp_path):
    images, _ = batches["data_batch_4"]
    folder = with_batch(tmp_path, batches, b"no pickle")
    for name in ("data_batch_1", "data_batch_5", "test_batch"):
        (folder / name).unlink()
    (folder / "data_batch_4").write_bytes(python2_batch(images, [1, 2, 10, 3]))
    refused(
        folder,
        "missing: data_batch_1, data_batch_5, test_batch",
        "data_batch_3 is not a pickle",
        "data_batch_4 has the label 10 at image 2; expected 0 to 9",
        "official",
        "https://",
    )


@pytest.mark.parametrize("label", [10, -1, 2**31 - 1])
def test_labels_of_pickles(label, batches, tmp_path):
    images, labels = batches["data_batch_3"]
    refused(with_batch(tmp_path, batches, python2_batch(images, [*labels[:3], label])), f"label {label} at image 3")


@pytest.mark.parametrize("labels", ["1234", [0, 1, 2.0, 3], [0, 1, None, 3], [0, 1, True, 3], [], {0: 1}, 5])
def test_labels_that_are_none(labels, batches, tmp_path):
    images, _ = batches["data_batch_3"]
    content = pickle.dumps({b"data": planes(images), b"labels": labels}, protocol=2)
    refused(with_batch(tmp_path, batches, content), "data_batch_3 has ", "label")


def test_a_pickle_without_images(batches, tmp_path):
    refused(with_batch(tmp_path, batches, python2_batch(np.zeros((0, 32, 32, 3), np.uint8), [])), "with n > 0")


def test_a_pickle_with_other_bytes(batches, tmp_path):
    """The array's content as numpy would take it too, but of another codec, or none at all."""
    images, labels = batches["data_batch_3"]
    content = python3_batch(images, labels, 2)
    assert content.count(b"latin1") == 1
    refused(with_batch(tmp_path / "1", batches, content.replace(b"latin1", b"utf_16")), "data_batch_3 ")
    raw = b"T" + struct.pack("<i", 4 * 3072) + planes(images).tobytes() + b"t"
    content = python2_batch(images, labels).replace(raw, b"Nt")
    refused(with_batch(tmp_path / "2", batches, content), "data_batch_3 has data of dtype")


def test_labels_of_binary_files(batches, tmp_path):
    content = bytearray(binary_batch(*batches["data_batch_3"]))
    content[2 * 3073] = 255
    refused(with_batch(tmp_path, batches, content, "bin"), "data_batch_3.bin has the label 255 at image 2")


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 4 * 3073 - 1])
def test_size_of_binary_files(size, batches, tmp_path):
    content = binary_batch(*batches["data_batch_3"])[:size]
    refused(with_batch(tmp_path, batches, content, "bin"), "data_batch_3.bin", f"{size:,} bytes", "multiple of 3,073")


def test_counts_and_shapes_of_pickles(batches, tmp_path):
    images, labels = batches["data_batch_3"]
    for i, content in enumerate(
        [
            python2_batch(images, labels[:3]),
            python2_batch(images, [*labels, 0]),
            python2_batch(images[:3], labels),
            python2_batch(images, labels, shape=(4, 3071)),
            python2_batch(images, labels, shape=(2, 6144)),
            python2_batch(images[:3], labels, shape=(4, 3072)),
            pickle.dumps({b"data": images, b"labels": labels}, protocol=2),
        ]
    ):
        refused(with_batch(tmp_path / str(i), batches, content), "data_batch_3 has", "labels and data of shape")


def test_dtypes_of_pickles(batches, tmp_path):
    images, labels = batches["data_batch_3"]
    for dtype in (np.int8, np.float32, object):
        content = pickle.dumps({b"data": planes(images).astype(dtype), b"labels": labels}, protocol=2)
        refused(
            with_batch(tmp_path / dtype.__name__, batches, content), "data_batch_3 has data of dtype", "expected u1"
        )
    refused(with_batch(tmp_path / "O8", batches, python2_batch(images, labels, dtype=b"O8")), "dtype b'O8'")


def test_pickles_of_something_else(batches, tmp_path):
    cifar100 = {b"data": planes(batches["data_batch_3"][0]), b"fine_labels": [1, 2, 3, 4]}
    for i, thing in enumerate([cifar100, {b"labels": [1], b"data": [[1] * 3072]}, [1, 2], None, {1: 2}, b"x"]):
        content = pickle.dumps(thing, protocol=2)
        refused(with_batch(tmp_path / str(i), batches, content), "data_batch_3 is not a pickle of CIFAR-10 images")


def test_any_damage_to_a_pickle_is_a_data_error(batches):
    """Cut anywhere, or with bytes altered in its head and tail: an error of ours, or an array of the right kind."""
    images, labels = batches["data_batch_3"]
    whole, rng = python2_batch(images[:1], labels[:1]), np.random.default_rng(0)
    outside = [*range(300), *range(len(whole) - 20, len(whole))]
    damaged = [whole[:cut] for cut in outside]
    for _ in range(3000):
        content = bytearray(whole)
        for position in rng.choice(outside, rng.integers(1, 4)):
            content[position] = rng.integers(256)
        damaged.append(bytes(content))
    survived = 0
    for content in damaged:
        with contextlib.suppress(DataError):
            records = data._parse_pickle(content, data.LAYOUT)
            assert (records.dtype, records.shape) == (np.uint8, (1, 3073))
            survived += 1
    assert 0 < survived < len(damaged) / 2


# Archives


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("name", ["py-tar/cifar-10-python.tar.gz", "bin-tar/cifar-10-binary.tar.gz"])
def test_archive_cut_short(name, kept, layouts, tmp_path):
    content = (layouts / name).read_bytes()
    path = tmp_path / Path(name).name
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "cannot be read completely", "https://")


def test_altered_archive(layouts, tmp_path):
    """Wherever a byte is wrong, gzip's checksum tells, at the latest at its end."""
    content = (layouts / "bin-tar/cifar-10-binary.tar.gz").read_bytes()
    for i, position in enumerate(np.linspace(40, len(content) - 5, 12).astype(int)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path = tmp_path / f"{i}.tar.gz"
        path.write_bytes(damaged)
        refused(path, "cannot be used")


def test_archive_with_a_bad_header(tmp_path):
    """tarfile has more errors than TarError: here a ValueError."""
    path = tmp_path / "sparse.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("data_batch_1")
        entry.pax_headers = {"GNU.sparse.map": "a,b", "GNU.sparse.size": "c"}
        tar.addfile(entry)
    refused(path, "cannot be read completely")


def test_files_that_are_no_archives(tmp_path):
    for name, content in {"a": b"text", "b": gzip.compress(b""), "c": gzip.compress(b"x" * 2000)}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be")


def archive_of(path, members):
    """``members``: (name, content or a type of tar entry)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if len(content) > 1:
                entry.size = len(content)
            else:
                entry.type, entry.linkname = content, "/etc/passwd"
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_archives_with_other_entries(batches, tmp_path):
    good = [(f"../../x/{name}.bin", binary_batch(*batches[name])) for name in TRAIN]
    test = binary_batch(*batches["test_batch"])
    twice = archive_of(tmp_path / "twice.tar.gz", [*good, ("test_batch.bin", test), ("y/data_batch_2.bin", test)])
    refused(twice, "data_batch_2.bin occurs twice")
    both = archive_of(tmp_path / "both.tar.gz", [*good, ("test_batch.bin", test), ("test_batch", b"xx")])
    refused(both, "test_batch occurs twice")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        path = archive_of(tmp_path / f"kind{kind[0]}.tar.gz", [*good, ("test_batch.bin", kind)])
        refused(path, "missing: test_batch")
    dataset = data.load_cifar10(archive_of(tmp_path / "good.tar.gz", [*good, ("test_batch.bin", test)]))
    check(dataset, batches)
    assert not (tmp_path.parent / "x").exists()  # nothing was extracted


def test_sizes_are_capped(layouts, batches, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(data, "LAYOUT", replace(data.LAYOUT, largest=2 * 3073))
        refused(layouts / "bin", "test_batch.bin has 18,438 bytes")
        refused(layouts / "bin-tar" / "cifar-10-binary.tar.gz", "test_batch.bin has 18,438 bytes")
    huge = write_folder(tmp_path / "cifar-10-batches-bin", batches, "bin")
    with open(huge / "data_batch_3.bin", "wb") as file:
        file.truncate(2**40)  # sparse; reading it would fill the memory
    refused(huge, "data_batch_3.bin has 1,099,511,627,776 bytes")


def test_archive_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNPACKED", 2**20)
    zeros = gzip.compress(bytes(2**23))
    entry = tarfile.TarInfo("readme.html")
    entry.size = 2**33
    skipped = gzip.compress(entry.tobuf()) + zeros * 20
    entry.type, entry.name = tarfile.GNUTYPE_LONGNAME, "././@LongLink"
    long_name = gzip.compress(entry.tobuf()) + zeros * 20
    for i, content in enumerate((skipped, long_name, zeros * 20)):
        path = tmp_path / f"{i}.tar.gz"
        path.write_bytes(content)
        tracemalloc.start()
        refused(path, "cannot be read completely")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24


def test_archives_of_many_members_and_of_large_headers(batches, tmp_path):
    """Refused at once; tarfile would take minutes over the members and keep the headers in memory."""
    entry = tarfile.TarInfo("x")
    many = gzip.compress(entry.tobuf() * 200_000, 1)
    named = tarfile.TarInfo("data_batch_1.bin")
    named.pax_headers = {"comment": "x" * 2**25}
    large = gzip.compress(named.tobuf(tarfile.PAX_FORMAT), 1)
    for name, content, expected in (("many", many, "more than 1,000 members"), ("large", large, "header of 33,55")):
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(content)
        tracemalloc.start()
        began = time.monotonic()
        refused(path, expected)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert time.monotonic() - began < 2
        assert peak < 2**24


def test_a_label_of_many_digits(batches, tmp_path):
    images, _ = batches["data_batch_3"]
    content = pickle.dumps({b"data": planes(images), b"labels": [0, 1, 10**5000, 3]}, protocol=2)
    message = refused(with_batch(tmp_path, batches, content), "data_batch_3 ")
    assert "cannot be read completely" not in message  # the others are read, and what is wrong with them is said too
    assert len(message) < 1000


# Hostile pickles


def call(module, name, *args):
    """Opcodes that push the result of a call."""
    return f"c{module}\n{name}\n".encode() + pickle.dumps(args, protocol=2)[2:-1] + b"R"


class Exploit:
    def __reduce__(self):
        return os.system, ("touch ran",)


HUGE = struct.pack("<Q", 2**28)  # small enough to be allocated, were it tried
# Tuples of tuples, each the one before twice by the memo: to hash or to print them takes 2^60 steps.
NESTED = b")" + b"".join(b"q\x00h\x00\x86" for _ in range(60))
HOSTILE = {
    "os.system, protocol 0": pickle.dumps(Exploit(), 0),
    "os.system, protocol 2": pickle.dumps({b"data": Exploit(), b"labels": [1]}, 2),
    "os.system, protocol 4": pickle.dumps({b"data": Exploit(), b"labels": [1]}, 4),
    "eval": b"\x80\x02" + call("__builtin__", "eval", "open('ran', 'w')") + b".",
    "a sub-module's name": b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93.",
    "numpy's own loader": b"\x80\x02" + call("numpy", "load", "ran") + b".",
    "numpy.core.multiarray.scalar": b"\x80\x02" + call("numpy.core.multiarray", "scalar") + b".",
    "inst": b"(S'touch ran'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch ran'\no.",
    "build on a global": b"\x80\x02cnumpy\nndarray\nN}U\x04nameU\x01xs\x86b.",
    "build on a dict": b"\x80\x02}}U\x04nameU\x01xsb.",
    "state of a codec": b"\x80\x02" + call("_codecs", "encode", "a", "zlib") + b"}b.",
    "newobj": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
    "persistent id": b"Px\n.",
    "extension": b"\x80\x02\x82\xf0U\x09touch ran\x85R.",
    "a billion labels": b"\x80\x02" + call("numpy.core.multiarray", "_reconstruct", (2**40,), "O8") + b".",
    "huge string": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "huge bytes": b"\x80\x04\x8e" + HUGE + b"abc.",
    "huge bytearray": b"\x80\x05\x96" + HUGE + b"abc.",
    "huge frame": b"\x80\x04\x95" + HUGE + b"abc.",
    "huge memo": b"\x80\x02Nr" + struct.pack("<I", 2**25) + b".",
    "many copies": b"\x80\x02c_codecs\nencode\nq\x00X"
    + struct.pack("<i", 10**6)
    + b"x" * 10**6
    + b"U\x06latin1\x86q\x01"
    + b"h\x00h\x01R" * 10**4
    + b".",
    "tuples as a key": b"\x80\x02}" + NESTED + b"Ns.",
    "tuples as a label": b"\x80\x02}(U\x06labels]("
    + NESTED
    + b"eU\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01M"
    + struct.pack("<H", 3072)
    + b"\x86cnumpy\ndtype\nU\x02u1\x85R\x89T"
    + struct.pack("<i", 3072)
    + bytes(3072)
    + b"tbu.",
    "tuples as a shape": b"\x80\x02}(U\x06labels](K\x01eU\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01"
    + NESTED
    + b"cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtbu.",
    "recursion": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name, batches, tmp_path, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)
    folder = with_batch(tmp_path, batches, HOSTILE[name])
    tracemalloc.start()
    message = refused(folder, "data_batch_3 ")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25, "allocates what the pickle claims"
    assert not Path("ran").exists()
    if name.startswith("os.system"):
        assert f"uses the forbidden global {os.system.__module__}.system" in message


def test_a_hostile_pickle_in_an_archive(batches, tmp_path):
    folder = with_batch(tmp_path, batches, HOSTILE["os.system, protocol 2"])
    refused(write_archive(tmp_path / data.ARCHIVE, folder), "uses the forbidden global")
    assert not Path("ran").exists()


# Digits --------------------------------------------------------------------------------------------------------------


def test_digits():
    dataset = load_digits()
    assert dataset.train.images.shape == (1437, 32, 32, 3)
    assert dataset.test.images.shape == (360, 32, 32, 3)
    assert (dataset.name, dataset.notes, dataset.verified) == ("digits", (), {})
    assert dataset.classes == tuple("0123456789")
    assert dataset.source == "scikit-learn's digits (1,797 images, 8x8 scaled to 32x32)"
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.full(10, 36))
    assert dataset.train.labels.dtype == np.int32
    # The bytes and the split are the same on every machine and with every version, or results cannot be compared.
    assert dataset.digest == "91913cad0fd0d6d16335fdb1659b6fcb2f1bdcbc8188e328921eb425e760eb79"

    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert (images == images[..., :1]).all()
    # Each of the 1,797 is there once, with its label, and scaled as pillow does it.
    theirs = {}
    for pixels, label in zip(digits.images, digits.target, strict=True):
        picture = Image.fromarray((pixels * (255 / 16)).astype(np.float32))
        scaled = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
        theirs.setdefault(int(label), []).append(scaled)
    theirs = {label: np.stack(stack) for label, stack in theirs.items()}
    used = set()
    for image, label in zip(images[..., 0], [*dataset.train.labels, *dataset.test.labels], strict=True):
        distance = abs(theirs[int(label)] - image).max(axis=(1, 2))
        assert distance.min() <= 0.51  # rounded to whole numbers
        used.add((int(label), int(distance.argmin())))
    assert len(used) == 1797


def test_digits_do_not_import_sklearn(monkeypatch):
    expected = load_digits()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_digits().digest == expected.digest  # by scikit-learn's own function
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert load_digits().digest == expected.digest


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'pip install "jresnet\[train\]"'):
        load_digits()
    broken = types.ModuleType("sklearn.datasets")  # installed, but it fails to load, as where memory is short
    monkeypatch.setitem(sys.modules, "sklearn.datasets", broken)
    with pytest.raises(DataError, match="scikit-learn cannot be imported: cannot import name") as caught:
        load_digits()
    assert "pip install" not in str(caught.value)


# Imports and real images ---------------------------------------------------------------------------------------------


def test_imports_stay_light(layouts):
    """Official layouts need numpy alone."""
    code = f"""
import sys
from jresnet.data import load
load("cifar10", {str(layouts / "py")!r})
heavy = {{"tensorflow", "torch", "tensorflow_datasets", "sklearn", "array_record", "PIL"}}
sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    root = Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr


def test_the_real_training_images_are_official(tmp_path):
    """50,000 images from every source; the test batch here is the official one's first 1,000."""
    script = Path(os.environ.get("JRESNET_SHARED") or "/nowhere") / "cifar10" / "make_cifar10.py"
    if not script.is_file():
        pytest.skip("JRESNET_SHARED names no folder that holds cifar10/make_cifar10.py")
    subprocess.run([sys.executable, script, tmp_path, "--test", "clean"], check=True, capture_output=True)
    digests = set()
    for name in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        dataset = data.load_cifar10(tmp_path / name)
        digests.add(dataset.digest)
        assert dataset.verified == dict.fromkeys(data.OFFICIAL, True) | {"test_batch.bin": False}
        assert dataset.notes == (
            f"differs from the official CIFAR-10: test_batch (1,000 images) of folder {tmp_path / name}",
        )
        np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.full(10, 5000))
        for file in (tmp_path / name).iterdir():  # 150 MB, which pytest would keep
            file.unlink()
    assert len(digests) == 1
