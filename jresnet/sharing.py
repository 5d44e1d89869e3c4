"""Weights to and from the Hugging Face Hub, or a folder of the same layout: ``push`` and ``pull``.

    model.safetensors   the tensors by torchvision's and timm's names
    config.json         architecture, classes and preprocessing, in timm's form
    README.md           the model card

What comes from a Hub comes from strangers: of a repository only the first two are fetched, and both are checked
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
SHOWN = 50  # classes that the card names


def push(
    weights: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    title: str | None = None,
    license: str | None = None,
    private: bool = False,
    force: bool = False,
) -> str:
    """Writes weights with their configuration and model card into a folder, or a repository of the Hub.

    Args:
        weights: as :func:`jresnet.sources.load`.
        target: a folder, or ``"hf:ORG/REPO"``, which is made where it is missing (with the extra ``hub``, after
            ``hf auth login``).
        title: of the card; ``None``: the architecture and the data.
        license: an identifier of the Hub's, such as ``"apache-2.0"``.
        private: whether a repository that is made is private.
        force: write over a model that the folder holds.

    Returns:
        Where it is now: the folder, or the address of the repository's commit.

    Raises:
        InputError: the network has no name or no place in timm's form, the folder holds a model, or ``license`` is none.
        WeightsError, DownloadError: as :func:`jresnet.sources.load`; the Hub refuses, or does not answer.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,40}", license):
        raise InputError(f"`license` is an identifier of the Hub's such as apache-2.0 or mit, not {license!r}")
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
    """Fetches weights from the Hub, a folder or anywhere else, and writes a native file that says all they say.

    Args:
        source: ``"hf:ORG/REPO[@REVISION]"``, a folder of :func:`push`, or whatever :func:`jresnet.sources.load` takes.
        out: the file, ``*.safetensors``.
        force: write over a file that is there.
        progress: show downloads on stderr.

    Raises:
        InputError: the file is there, or cannot be written.
        WeightsError, DownloadError: as :func:`jresnet.sources.load`.
    """
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"`out` {path} should end in .safetensors")
    if path.exists() and not force:
        raise InputError(f"`out` {path} is there already: choose another file, or `force` it")
    found = sources.load(source, progress=progress)
    kept = {name: value for name, value in found.metadata.items() if name not in native.RESERVED}
    native.save(path, params.fill(found.config, found.values), found.arch, **kept)
    return found


def contents(found: Weights, spec: str, title: str | None = None, license: str | None = None) -> dict[str, bytes]:
    """The files of a repository, by name; arguments as :func:`push`, ``spec`` being what the card calls it.

    Raises:
        InputError: the network has no name, takes images of other than three channels, or has no head.
    """
    config, arch = found.config, found.arch
    if arch is None:
        raise InputError(
            f"{found.spec} holds a network that has no name, which the Hub's form needs: share the file itself"
        )
    if config.in_channels != 3 or config.num_classes == 0:
        what = "no head" if config.num_classes == 0 else f"images of {config.in_channels} channels"
        raise InputError(f"{found.spec} has {what}: timm's form is for RGB images and classes; share the file itself")
    values = {name: np.asarray(value, np.float32) for name, value in found.values.items()}
    tensors = statedict.state_dict(params.fill(config, values))
    return {
        hub.WEIGHTS: safetensors.numpy.save(tensors, {"format": "pt"}),
        hub.CONFIG: json.dumps(configuration(found), indent=2).encode() + b"\n",
        CARD: card(found, spec, title, license).encode(errors="replace"),  # a folder's name need not be UTF-8
    }


def in_timm(arch: str, config: ResNetConfig) -> bool:
    """Whether timm has the network: one of its names, with its own stem and shortcuts."""
    return arch in zoo.IN_TIMM and config == zoo.configure(arch, num_classes=config.num_classes)


def configuration(found: Weights) -> dict[str, Any]:
    """``config.json`` in timm's form.

    Raises:
        InputError: timm's form has no place for the preprocessing.
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
    """timm resizes the shorter side to ``floor(size / crop_pct)``."""
    resize = how.crop if how.resize is None else how.resize
    share = how.crop / resize
    while math.floor(how.crop / share) < resize:  # rounded down
        share = math.nextafter(share, 0)
    if math.floor(how.crop / share) != resize or share > 1:
        raise InputError(
            f"timm's form has no place for a crop of {how.crop} from images whose shorter side is {resize} pixels"
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
    """What the weights say of their accuracy, and on which images it was measured."""
    metadata, rows = found.metadata, []
    for name in ("scores", "metrics"):
        try:
            said = json.loads(metadata.get(name, "{}"))
        except (ValueError, RecursionError):
            said = {}
        if isinstance(said, dict) and said:
            rows += [
                (key, value) for key, value in said.items() if isinstance(value, int | float | str) and key != "seconds"
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
        "JAX, with [jresnet](https://pypi.org/project/jresnet/):",
        f"""
import jresnet

weights = jresnet.get_weights({spec!r})
model = jresnet.create(weights=weights)
logits = model(weights.preprocess(picture))  # a picture of Pillow's
""",
    )
    if not timm:
        what = f"{arch}, {config.stem} stem, {config.shortcut} shortcuts"
        return [
            *lines,
            f"timm and torchvision have no such network ({what}); `jresnet export-torch` writes PyTorch's weights.",
        ]
    lines += code(
        "timm:",
        f"""
import timm

model = timm.create_model({"hf_hub:" + repository!r}, pretrained=True).eval()
""",
    )
    if not published.names(arch):  # torchvision has it not
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
    """Text that a page shows as it is: strangers choose names of classes."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&-])", r"\\\1", text)[:1000]


def _check(folder: Path, text: str, force: bool) -> None:
    """Raises InputError where a model must not, or cannot, be written into a folder."""
    if not text:
        raise InputError("`target` is an empty text: expected hf:ORG/REPO, or a folder")
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"`target` {folder} is no folder: choose another one")
        os.lstat(folder)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use `target` {folder}: {getattr(error, 'strerror', None) or error}") from error
    if (taken := [name for name in FILES if (folder / name).exists()]) and not force:
        raise InputError(f"{folder} holds a model already ({', '.join(taken)}): choose another folder, or `force` it")


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
        raise InputError(f"a repository is pushed to its main branch: leave @{revision} out of {spec}")
    return repository


def _upload(repository: str, folder: str, private: bool) -> str:
    """Commits a folder's files to a repository; returns the commit's address.

    Raises:
        DownloadError: the Hub refuses, or does not answer. Messages below HTTP are not repeated: one may quote the token.
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
            "log in with `hf auth login` and a token that may write there"
            if code in (401, 403, 404)
            else "try again later"
        )
        raise DownloadError(f"cannot push to {page}: it answers HTTP {code}; {advice}") from None
    except errors.LocalTokenNotFoundError:
        raise DownloadError(f"cannot push to {page}: log in with `hf auth login`") from None
    except Exception as error:  # httpx's, hf_xet's and the file system's: no closed set
        why = hub.reason(error)
        raise DownloadError(
            f"cannot push to {page}: {why}; check the network, HF_ENDPOINT and the proxy settings"
        ) from None
    return str(done)
