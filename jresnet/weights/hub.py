"""Weights on the Hugging Face Hub: ``hf:ORG/REPO[@REVISION]``, through ``huggingface_hub`` (the extra ``hub``).

Only ``model.safetensors`` and ``config.json`` are fetched, the latter in the format of timm or transformers
(:mod:`jresnet.weights.timm_config`); for transformers also ``preprocessor_config.json``. The files are stored in the cache
of ``huggingface_hub`` (``HF_HUB_CACHE``, ``HF_HOME``), which other libraries share. A folder with these files can be read,
too (:func:`local`), which needs neither the library nor the network.

**Integrity.** The cache stores files of Git LFS or Xet under their SHA-256, which is computed and compared at every load.
On file systems without symbolic links the cache does not keep that name: there the digest is checked only if the Hub
answered the call, and not offline.
"""

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jresnet.errors import DownloadError, InputError, WeightsError
from jresnet.files import few, sha256_of
from jresnet.weights import timm_config
from jresnet.weights.preprocessing import Preprocessing

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

    from jresnet.models.resnet import ResNetConfig

PREFIX = "hf:"
WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
# Weights files in a folder, in order of preference: single files, then indices of sharded checkpoints.
LOCAL = (WEIGHTS, "pytorch_model.bin", f"{WEIGHTS}.index.json", "pytorch_model.bin.index.json")
MAX_BYTES = {
    WEIGHTS: 4 << 30,
    CONFIG: timm_config.MAX_BYTES,
    PREPROCESSOR: timm_config.MAX_BYTES,
}  # the zoo's largest network has 0.5 GB
ANSWER_SECONDS = 4.0  # time limit for the Hub's first answer: without network a command must end within 5 s
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
# a branch, tag or commit; no "..", against traversal
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.+/-]*")


@dataclass(frozen=True)
class Published:
    """Weights fetched from the Hub, or in a folder."""

    spec: str  # with the full commit hash, such as "hf:timm/resnet50.a1_in1k@<40 hex digits>"
    path: Path  # the weights file, in the Hub's cache or in the folder
    sha256: str  # digest of that file
    commit: str  # empty for a folder
    arch: str | None  # a name in the zoo. This and the following fields are None if no config.json states them.
    num_classes: int | None
    preprocessing: Preprocessing | None
    categories: tuple[str, ...] | None  # in the order of the logits
    network: Mapping[str, Any] | None = None  # fields of the network's ResNetConfig
    notes: tuple[str, ...] = ()  # what was ignored in the configuration


def is_spec(text: str | os.PathLike[str]) -> bool:
    """Whether ``text`` is an address on the Hub, even a malformed one."""
    return isinstance(text, str) and text.startswith(PREFIX)


def fetch(spec: str, *, progress: bool = True) -> Published:
    """Fetches weights from the Hub. If the Hub does not answer, weights in the cache are used.

    The Hub is asked for the current commit of a branch or tag. A full commit hash that is in the cache needs no network;
    with ``HF_HUB_OFFLINE=1`` nothing in the cache does. The first request times out after ``ANSWER_SECONDS``, or
    ``HF_HUB_ETAG_TIMEOUT`` if that is set.

    Args:
        spec: ``hf:ORG/REPO`` or ``hf:ORG/REPO@REVISION``; the revision is a branch (default: ``main``), a tag or a full
            commit hash.
        progress: show the downloads on stderr.

    Raises:
        InputError: ``huggingface_hub`` is missing, ``spec`` is malformed, or the network is not in the zoo.
        DownloadError: the files are not in the cache and cannot be downloaded.
        WeightsError: the repository has no safetensors, the file in the cache is damaged, or the configuration is invalid;
            one message lists all its problems.
    """
    repo, revision = parse(spec)
    path = _cached(repo, revision, WEIGHTS)
    head = None
    if path is None or path.parent.name != revision:
        try:
            head = _head(repo, revision, WEIGHTS)
        except DownloadError:  # use the cache, whatever the reason
            if path is None:
                raise
    if head:
        commit = str(head.commit_hash)
    elif path:
        commit = path.parent.name
    else:
        raise WeightsError(_no_weights(repo, revision))
    # The small file is fetched first, because it tells whether the large one can be used.
    config = _beside(repo, commit, CONFIG, progress)
    described = timm_config.Described()
    if config:
        transformers = "model_type" in timm_config.load(config)
        described = timm_config.read(config, _beside(repo, commit, PREPROCESSOR, progress) if transformers else None)
    if head:  # requested by branch or tag, so that the cache stores which commit that is
        path = _download(repo, revision, WEIGHTS, progress)
        if path is None or path.parent.name != commit:
            raise DownloadError(f"{repo}@{revision} changed while it was fetched: run this again")
    assert path is not None
    sha256 = _checked(path, head.etag if head else None)
    return Published(f"{PREFIX}{repo}@{commit}", path, sha256, commit, *described)


def local(folder: Path) -> Published:
    """Reads a folder as written by transformers' ``save_pretrained`` or timm's ``save_for_hf``.

    Raises:
        InputError: its configuration names a network that is not in the zoo.
        WeightsError: the folder has no weights, or an invalid configuration; one message lists all problems.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise WeightsError(f"cannot read {folder}: {error.strerror or error}") from error
    path = next((folder / name for name in LOCAL if name in names), None)
    if path is None:
        raise WeightsError(_no_weights_in(folder, names))
    return beside(path)


def beside(path: Path) -> Published:
    """The weights in a file, described by the configuration in its folder; errors as in :func:`local`."""
    config, preprocessor = (path.parent / name for name in (CONFIG, PREPROCESSOR))
    described = timm_config.Described()
    if config.is_file():
        described = timm_config.read(config, preprocessor if preprocessor.is_file() else None)
    return Published(str(path), path, sha256_of(path), "", *described)


def _no_weights_in(folder: Path, names: list[str]) -> str:
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            f"{folder} is a sharded torch.distributed checkpoint: merge it into one file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth"
        )
    if "zero_to_fp32.py" in names:
        return f"{folder} is a sharded DeepSpeed checkpoint: merge it into one file with the zero_to_fp32.py inside"
    if "saved_model.pb" in names:
        return f"{folder} is a TensorFlow SavedModel, but only PyTorch weights can be converted"
    if any(name.startswith("_CHECKPOINT") or name in ("_METADATA", "manifest.ocdbt") for name in names):
        return f"{folder} is an Orbax checkpoint: restore it with the library that wrote it"
    weights = [name for name in names if Path(name).suffix in (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt")]
    advice = f"name one of its files, {few(weights)}" if weights else f"there are {few(names) or 'no files'}"
    return f"{folder} is a folder without {' or '.join(LOCAL[:2])}: {advice}"


def metadata(published: Published) -> dict[str, str]:
    """The metadata entries of a native file for weights from the Hub; preprocessing and categories are JSON."""
    entries = {"source": published.spec, "commit": published.commit}
    if not published.commit:  # a local file: its folder is private and must not be stored
        entries = {"source": os.fsencode(Path(published.spec).name).decode(errors="replace")}
    if published.preprocessing:
        entries["preprocessing"] = published.preprocessing.to_json()
    if published.categories:
        entries["categories"] = json.dumps(published.categories)
    return entries


def check(published: Published, arch: str, config: "ResNetConfig | None" = None) -> None:
    """Raises :class:`WeightsError` if ``arch`` or ``config`` differs from the description in config.json."""
    problems = []
    if published.arch not in (None, arch):
        problems.append(f"a {published.arch}, not a {arch}")
    if (
        config
        and published.num_classes not in (None, config.num_classes)
        and not (published.network and not config.num_classes)
    ):
        problems.append(f"{published.num_classes} classes, not {config.num_classes}")
    for name, value in (published.network or {}).items() if config else ():
        if getattr(config, name) != value:
            problems.append(f"{name} {value!r}, not {getattr(config, name)!r}")
    if config and published.preprocessing and len(published.preprocessing.mean) != config.in_channels:
        problems.append(f"images of {len(published.preprocessing.mean)} channels, not {config.in_channels}")
    if problems:
        raise WeightsError(f"{published.spec} has a {CONFIG} that describes {'; '.join(problems)}")


def parse(spec: str) -> tuple[str, str]:
    """Splits ``hf:ORG/REPO[@REVISION]`` into repository and revision; raises InputError for anything else."""
    if not is_spec(spec):
        raise InputError(f"expected weights on the Hub as {PREFIX}ORG/REPO[@REVISION], got {spec!r}")
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise InputError(f"{spec} needs the huggingface_hub library: pip install 'jresnet[hub]'") from error
    repo, at, revision = spec.removeprefix(PREFIX).partition("@")
    problems = []
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        problems.append(str(error))
    if not problems and repo.count("/") != 1:
        problems.append("ORG and REPO are both needed")
    if at and not _REVISION.fullmatch(revision):
        problems.append(f"REVISION is a branch, a tag or a commit, not {revision!r}")
    if problems:
        raise InputError(
            f"{spec!r} is not of the form {PREFIX}ORG/REPO[@REVISION], such as {PREFIX}timm/resnet50.a1_in1k: "
            f"{'; '.join(problems)}"
        )
    return repo, revision or "main"


def _cached(repo: str, revision: str, filename: str) -> Path | None:
    """The path of a file in the cache; None if it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _beside(repo: str, commit: str, filename: str, progress: bool) -> Path | None:
    """A small file of a commit, from the cache or the Hub; None if the commit does not have it."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, revision=commit)
    if isinstance(found, str):
        return Path(found)
    if found is _CACHED_NO_EXIST:
        return None
    _head(repo, commit, filename)
    return _download(repo, commit, filename, progress)


def _no_weights(repo: str, revision: str) -> str:
    if _head(repo, revision, f"{WEIGHTS}.index.json"):
        return f"{repo}@{revision} has sharded weights, but only a single {WEIGHTS} is supported"
    return (
        f"{repo}@{revision} has no {WEIGHTS}, and pickles (.bin, .pth) are not fetched from the Hub: look for a revision "
        f"or a repository with safetensors"
    )


def _seconds() -> float:
    from huggingface_hub import constants

    chosen = constants.HF_HUB_ETAG_TIMEOUT
    return ANSWER_SECONDS if chosen == constants.DEFAULT_ETAG_TIMEOUT else chosen


def _head(repo: str, revision: str, filename: str) -> "HfFileMetadata | None":
    """Asks the Hub for the metadata of a file; None if the revision does not have the file.

    It is called before ``hf_hub_download``, which retries for minutes if there is no network. The request runs in a daemon
    thread, because socket timeouts do not apply to name look-ups; a daemon thread does not keep the program from exiting.

    Raises:
        DownloadError: the Hub does not answer, or refuses.
        WeightsError: the file is larger than that of any supported network.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    future: futures.Future[HfFileMetadata] = futures.Future()
    seconds = _seconds()

    def ask() -> None:
        try:
            url = hf_hub_url(repo, filename, revision=revision)
            future.set_result(get_hf_file_metadata(url, timeout=seconds + 1))  # the timeout ends the thread
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        with _explained(repo, revision, filename):
            found = future.result(timeout=seconds)
    except errors.EntryNotFoundError:
        return None
    if not _COMMIT.fullmatch(found.commit_hash or "") or not found.etag:
        raise DownloadError(f"{found.location} does not answer like the Hub: check HF_ENDPOINT and the proxy settings")
    if found.size is not None and found.size > MAX_BYTES[WEIGHTS if filename == WEIGHTS else CONFIG]:
        raise WeightsError(f"{filename} of {repo}@{revision} has {found.size:,} bytes, which is too large for a ResNet")
    return found


def _download(repo: str, revision: str, filename: str, progress: bool) -> Path | None:
    """A file of a revision, from the cache or downloaded; None if the revision does not have it."""
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

    try:
        with _explained(repo, revision, filename):
            bar = None if progress else Silent
            return Path(
                hf_hub_download(repo, filename, revision=revision, etag_timeout=_seconds(), tqdm_class=bar)  # type: ignore[arg-type]
            )
    except errors.EntryNotFoundError:
        return None


@contextlib.contextmanager
def _explained(repo: str, revision: str, filename: str) -> Iterator[None]:
    """Converts exceptions of huggingface_hub into a :class:`DownloadError` that says what to do.

    ``EntryNotFoundError`` (the revision does not have the file) is passed on. Messages and causes of errors below the HTTP
    level are dropped, because the message about a malformed header contains the token.
    """
    from huggingface_hub import constants, errors

    def failed(why: str) -> DownloadError:
        return DownloadError(f"cannot fetch {filename} of {repo}@{revision}: {why}")

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.LocalEntryNotFoundError:  # "not found" means here that the Hub stopped answering
        raise failed(f"{constants.ENDPOINT} does not answer: try again later") from None
    except errors.EntryNotFoundError:
        raise
    except errors.OfflineModeIsEnabled:
        raise failed(
            f"it is not in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or run "
            f"hf download {repo} {WEIGHTS} {CONFIG} --revision {revision} on another machine, and copy the cache"
        ) from None
    except errors.GatedRepoError as error:
        raise failed(f"the repository is gated: request access at {page}, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise failed(f"{page} does not exist or is private: check the name, or log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise failed(f"{page} has no branch, tag or commit {revision!r}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        advice = "log in again with `hf auth login`" if code in (401, 403) else "try again later"
        raise failed(f"{constants.ENDPOINT} answered HTTP {code}: {advice}") from error
    except TimeoutError:
        raise failed(
            f"no answer from {constants.ENDPOINT} within {_seconds():g} s: check the network, or set HF_HUB_ETAG_TIMEOUT"
        ) from None
    except UnicodeEncodeError:
        raise failed("the token in HF_TOKEN is not valid: log in with `hf auth login`") from None
    except Exception as error:  # from httpx, hf_xet or the file system: there is no common base class
        if isinstance(error, OSError) and error.errno:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space there" if full else "choose another folder with HF_HOME"
            raise failed(f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}; {advice}") from error
        raise failed(f"{reason(error)}; check the network, HF_ENDPOINT and the proxy settings, or try again") from None


def reason(error: BaseException | None) -> str:
    """The operating system's message in an error or its causes, else the type of the error."""
    kind = type(error).__name__
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return kind


def _checked(path: Path, etag: str | None) -> str:
    """Computes the SHA-256 of a file in the cache and compares it with the Hub's.

    Raises:
        WeightsError: the digests differ, or the file cannot be read.
    """
    # Follow one link only: its target may itself be a link, to a file named by another kind of digest.
    name = Path(os.readlink(path)).name if path.is_symlink() else etag
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    if _SHA256.fullmatch(name or "") and actual != name:
        raise WeightsError(
            f"{path} is damaged: expected SHA-256 {name} as on the Hub, found {actual}. "
            f"Delete {path.resolve()} and run this again."
        )
    return actual
