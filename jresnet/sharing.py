"""Shares weights on the Hugging Face Hub, or through a folder of the same layout: ``push`` and ``pull``.

    model.safetensors   the tensors under torchvision's and timm's names
    config.json         architecture, classes and preprocessing, in timm's format
    README.md           the model card

Repositories on the Hub are untrusted: only the first two files are fetched, and both are checked
(:mod:`jresnet.weights.hub`, :mod:`jresnet.weights.timm_config`).
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jresnet import sources
from jresnet.errors import DownloadError, InputError
from jresnet.files import write_atomically
from jresnet.models import params, zoo
from jresnet.models.config import STEMS, ResNetConfig
from jresnet.pytorch import statedict
from jresnet.sources import Weights
from jresnet.version import __version__
from jresnet.weights import hub, native, published
from jresnet.weights.preprocessing import Preprocessing

CARD = "README.md"
FILES = (hub.WEIGHTS, hub.CONFIG, CARD)
NO_SCORES = ("step", "lr", "images_per_second", "seconds")  # metrics of the training that the card leaves out
SHOWN = 50  # number of classes that the model card lists


def push(
    weights: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    title: str | None = None,
    license: str | None = None,
    private: bool = False,
    force: bool = False,
) -> str:
    """Writes weights with their configuration and a model card to a folder or to a repository on the Hub.

    Args:
        weights: the weights, as for :func:`jresnet.sources.load`.
        target: a folder, or ``"hf:ORG/REPO"``, which is created if missing (needs the extra ``hub`` and ``hf auth login``).
        title: title of the model card; ``None``: the architecture and the data.
        license: a licence identifier of the Hub, such as ``"apache-2.0"``.
        private: whether a newly created repository is private.
        force: overwrite a model in the folder.

    Returns:
        The folder, or the URL of the commit in the repository.

    Raises:
        InputError: timm's format cannot describe the network, the folder already contains a model, or ``license`` is
            malformed.
        WeightsError: as :func:`jresnet.sources.load`.
        DownloadError: as :func:`jresnet.sources.load`, or the Hub refuses the upload or does not answer.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", license):
        raise InputError(f"`license` must be an identifier of the Hub such as apache-2.0 or mit, got {license!r}")
    remote = hub.is_spec(target)
    repository = _repository(os.fspath(target)) if remote else None
    if repository is None:
        _check(Path(target).expanduser(), os.fspath(target), force)  # before anything is read
    found = sources.load(weights)
    spec = os.fspath(target) if remote else "hf:ORG/REPO"
    content = contents(found, spec, title, license)
    if repository is None:
        return str(_write(Path(target).expanduser(), content))
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), content)
        return _upload(repository, folder, private)


def pull(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False, progress: bool = True
) -> Weights:
    """Fetches weights from the Hub, a folder or any other source, and writes a native file with all their metadata.

    Args:
        source: ``"hf:ORG/REPO[@REVISION]"``, a folder of :func:`push`, or any source of :func:`jresnet.sources.load`.
        out: the file to write, ``*.safetensors``.
        force: overwrite an existing file.
        progress: show downloads on stderr.

    Returns:
        The weights.

    Raises:
        InputError: the file already exists or cannot be written.
        WeightsError, DownloadError: as :func:`jresnet.sources.load`.
    """
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"`out` must end in .safetensors, got {path}")
    if path.exists() and not force:
        raise InputError(f"`out` {path} already exists: choose another file, or replace it with `force`")
    found = sources.load(source, progress=progress)
    kept = {name: value for name, value in found.metadata.items() if name not in native.RESERVED}
    native.save(path, params.fill(found.config, found.values), found.arch, **kept)
    return found


def contents(found: Weights, spec: str, title: str | None = None, license: str | None = None) -> dict[str, bytes]:
    """The contents of a repository's files, by name.

    Args:
        found: the weights.
        spec: the address of the repository that the model card shows.
        title, license: as in :func:`push`.

    Raises:
        InputError: the network has no name, has no head, or does not take three input channels.
    """
    config, arch = found.config, found.arch
    if arch is None:
        raise InputError(
            f"{found.spec} holds a network without a name, which timm's format needs: share the file itself"
        )
    if config.in_channels != 3 or config.num_classes == 0:
        what = "no head" if config.num_classes == 0 else f"images of {config.in_channels} channels"
        raise InputError(
            f"{found.spec} has {what}, but timm's format expects RGB images and a classifier: share the file itself"
        )
    values = {name: np.asarray(value, np.float32) for name, value in found.values.items()}
    tensors = statedict.state_dict(params.fill(config, values))
    return {
        hub.WEIGHTS: safetensors.numpy.save(tensors, {"format": "pt"}),
        hub.CONFIG: json.dumps(configuration(found), indent=2).encode() + b"\n",
        CARD: card(found, spec, title, license).encode(errors="replace"),  # a folder's name need not be UTF-8
    }


def in_timm(arch: str, config: ResNetConfig) -> bool:
    """Whether timm has this network: the name is one of timm's, and stem and shortcuts are timm's."""
    return arch in zoo.IN_TIMM and config == zoo.configure(arch, num_classes=config.num_classes)


def configuration(found: Weights) -> dict[str, Any]:
    """The content of ``config.json`` in timm's format.

    Raises:
        InputError: timm's format cannot express the preprocessing.
    """
    config = found.config
    chosen: dict[str, Any] = {
        "tag": "jresnet", "custom_load": False, "fixed_input_size": False, "num_classes": config.num_classes,
        "first_conv": "conv1.0" if STEMS[config.stem].inner else "conv1", "classifier": "fc",
    }  # fmt: skip
    if (how := found.preprocessing) is not None:
        chosen |= _timm_preprocessing(how)
    return {
        "architecture": found.arch,
        "num_classes": config.num_classes,
        "num_features": config.num_features,
        "global_pool": "avg",
        **({"label_names": list(found.categories)} if found.categories else {}),
        "pretrained_cfg": chosen,
    }


def _timm_preprocessing(how: Preprocessing) -> dict[str, Any]:
    """The preprocessing in timm's format, where the shorter side is resized to ``floor(size / crop_pct)``."""
    resize = how.crop if how.resize is None else how.resize
    share = how.crop / resize
    while math.floor(how.crop / share) < resize:  # rounded down
        share = math.nextafter(share, 0)
    if math.floor(how.crop / share) != resize or share > 1:
        raise InputError(
            f"timm's format cannot express a crop of {how.crop} pixels from images whose shorter side is {resize} pixels"
        )
    return {
        "input_size": [3, how.crop, how.crop], "interpolation": how.interpolation, "crop_pct": share,
        "crop_mode": "center", "mean": list(how.mean), "std": list(how.std),
    }  # fmt: skip


def card(found: Weights, spec: str, title: str | None = None, license: str | None = None) -> str:
    """The model card: architecture, data, scores with their conditions, and how to load it in JAX, timm and PyTorch."""
    arch, config = found.arch, found.config
    assert arch is not None
    timm = in_timm(arch, config)
    front = ["library_name: " + ("timm" if timm else "jresnet"), "pipeline_tag: image-classification"]
    front += ["tags:", *(f"- {tag}" for tag in ("image-classification", "jax", "jresnet", *(["timm"] if timm else [])))]
    front += [f"license: {license}"] if license else []
    parameters = sum(value.size for name, value in found.values.items() if not name.endswith((".mean", ".var")))
    row = zoo.find(arch)
    about = {
        "Architecture": f"{arch} ({row.source}), {config.stem} stem, {config.shortcut} shortcuts",
        "Parameters": f"{parameters:,}",
        "Classes": f"{config.num_classes:,}",
        "Images": str(found.preprocessing or "the weights do not say how images are prepared"),
        "From": found.metadata.get("source", found.spec),
        "Begun from": found.metadata.get("begun_from"),
        "SHA-256 of the arrays": native.digest(found.values),
    }
    lines = ["---", *front, "---", "", f"# {_plain(title or f'{arch} of jresnet')}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_plain(text)} |" for name, text in about.items() if text), ""]
    lines += ["## Scores", "", *_scores(found), ""]
    if found.categories:
        names = ", ".join(_plain(name) for name in found.categories[:SHOWN])
        more = f", and {len(found.categories) - SHOWN:,} more" if len(found.categories) > SHOWN else ""
        lines += ["## Classes", "", f"In the order of the logits: {names}{more}.", ""]
    lines += ["## How to load it", "", *_loading(arch, config, spec, timm), ""]
    lines += [f"Written by jresnet {__version__}."]
    return "\n".join(lines) + "\n"


def _scores(found: Weights) -> list[str]:
    """The lines of the model card on accuracy, and on which images it was measured."""
    metadata, rows = found.metadata, []
    for name in ("scores", "metrics"):
        try:
            said = json.loads(metadata.get(name, "{}"))
        except (ValueError, RecursionError):
            said = {}
        if isinstance(said, dict) and said:
            rows += [
                (key, value)
                for key, value in said.items()
                if isinstance(value, int | float | str) and key not in NO_SCORES
            ]
    if not rows:
        return ["The weights state none."]
    conditions = metadata.get("judged_on")
    table = ["| | |", "|---|---|", *(f"| {_plain(str(key))} | {_plain(_number(value))} |" for key, value in rows)]
    where = f"Measured on {_plain(conditions)}." if conditions else "As the weights' own metadata states them."
    how = "Every image once, one view, with the preprocessing above; accuracies are shares, top1 and top5 per cent, "
    return [*table, "", f"{where} {how}losses mean cross-entropies in nats."]


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _loading(arch: str, config: ResNetConfig, spec: str, timm: bool) -> list[str]:
    """Code for JAX, timm and PyTorch."""
    repository = spec.removeprefix(hub.PREFIX)

    def code(title: str, text: str) -> list[str]:
        return [title, "", "```python", *text.strip().splitlines(), "```", ""]

    lines = code(
        "JAX, with jresnet:",
        f"""
import jresnet

weights = jresnet.get_weights({spec!r})
model = jresnet.create(weights=weights)
logits = model(weights.preprocess(image))  # a Pillow image
""",
    )
    if not timm:
        what = f"{arch}, {config.stem} stem, {config.shortcut} shortcuts"
        return [
            *lines,
            f"timm and torchvision have no such network ({what}); `jresnet export-torch` writes PyTorch's weights.",
        ]
    lines += code(
        "PyTorch, with timm:",
        f"""
import timm

model = timm.create_model({"hf_hub:" + repository!r}, pretrained=True).eval()
""",
    )
    if not published.names(arch):  # torchvision does not have this architecture
        return lines
    return lines + code(
        "PyTorch, with torchvision:",
        f"""
import torchvision
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

model = torchvision.models.{arch}(num_classes={config.num_classes})
model.load_state_dict(load_file(hf_hub_download({repository!r}, {hub.WEIGHTS!r})))
model.eval()
""",
    )


def _plain(text: str) -> str:
    """Escapes Markdown and HTML, because class names and titles are untrusted text."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&-])", r"\\\1", text)[:1000]


def _check(folder: Path, text: str, force: bool) -> None:
    """Raises InputError if a model may not or cannot be written into a folder."""
    if not text:
        raise InputError("`target` is empty: expected hf:ORG/REPO or a folder")
    try:
        a_file = folder.exists() and not folder.is_dir()
        os.lstat(folder)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use `target` {folder}: {getattr(error, 'strerror', None) or error}") from error
    if a_file:
        raise InputError(f"`target` {folder} is not a folder: choose another one")
    if (taken := [name for name in FILES if (folder / name).exists()]) and not force:
        raise InputError(
            f"{folder} already contains a model ({', '.join(taken)}): choose another folder, or replace it with `force`"
        )


def _write(folder: Path, content: Mapping[str, bytes]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use the folder {folder}: {error.strerror or error}; choose another one") from error
    for name, data in content.items():
        write_atomically(folder / name, data)
    return folder


def _repository(spec: str) -> str:
    """ORG/REPO of ``hf:ORG/REPO``; raises InputError for anything else."""
    repository, revision = hub.parse(spec)
    if "@" in spec:
        raise InputError(f"cannot push to {spec}: only the main branch is supported; leave out @{revision}")
    return repository


def _upload(repository: str, folder: str, private: bool) -> str:
    """Commits the files of a folder to a repository; returns the URL of the commit.

    Raises:
        DownloadError: the Hub refuses or does not answer. Its message never repeats text of lower-level errors, because
            that text may contain the token.
    """
    from huggingface_hub import HfApi, constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    try:
        api = HfApi(library_name="jresnet", library_version=__version__)
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Push weights with jresnet")
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        advice = (
            "log in with `hf auth login` and a token with write access"
            if code in (401, 403, 404)
            else "try again later"
        )
        raise DownloadError(f"cannot push to {page}: the Hub answered HTTP {code}; {advice}") from None
    except errors.LocalTokenNotFoundError:
        raise DownloadError(f"cannot push to {page}: log in with `hf auth login`") from None
    except Exception as error:  # from httpx, hf_xet or the file system: there is no common base class
        why = hub.reason(error)
        raise DownloadError(
            f"cannot push to {page}: {why}; check the network, HF_ENDPOINT and the proxy settings"
        ) from None
    return str(done)
