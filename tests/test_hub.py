"""Weights on the Hugging Face Hub: huggingface_hub itself against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import jresnet
from convert import torch2flax
from jresnet import evaluation
from jresnet.errors import DownloadError, InputError, WeightsError
from jresnet.models import params, zoo
from jresnet.pytorch import keymap
from jresnet.weights import hub, native, timm_config
from jresnet.weights.preprocessing import Preprocessing

REPO = "timm/resnet18.a1_in1k"
FIRST, SECOND = "1" * 40, "2" * 40  # commits
BODY = b"weights" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
CONFIG: dict[str, Any] = {
    "architecture": "resnet18",
    "num_classes": 3,
    "num_features": 512,
    "global_pool": "avg",
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "num_classes": 3,
        "pool_size": [7, 7],
        "classifier": "fc",
    },
    "label_names": ["n1", "n2", "n3"],
    "label_descriptions": {"n1": "tench", "n3": "goldfish"},
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        hub_ = self.server
        assert isinstance(hub_, Hub)
        if self.path.startswith("/api/"):  # huggingface_hub asks which programs run it
            return self.refuse(404, None)
        hub_.log.append((self.command, self.path))
        if self.path.startswith("/cdn/"):  # where large files are stored, another host
            content = hub_.stored[self.path.removeprefix("/cdn/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: hub_.cut])
            return
        found = re.fullmatch(r"/(\w+/[\w.]+)/resolve/([^/]+)/([\w.]+)", self.path)
        assert found, self.path
        repo, revision, name = found.groups()
        commit = hub_.refs.get(revision, revision)
        if hub_.refusal:
            self.refuse(*hub_.refusal)
        elif repo != REPO:
            self.refuse(401, "RepoNotFound")
        elif commit not in hub_.commits:
            self.refuse(404, "RevisionNotFound")
        elif name not in hub_.commits[commit]:
            self.refuse(404, "EntryNotFound", commit)
        else:
            content = hub_.commits[commit][name]
            large = name.endswith(".safetensors")
            self.send_response(302 if large else 200)
            if hub_.real:
                self.send_header("X-Repo-Commit", commit)
            if large:
                digest = hashlib.sha256(content).hexdigest()
                hub_.stored.setdefault(digest, content)
                self.send_header("Location", f"http://localhost:{hub_.server_address[1]}/cdn/{digest}")
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(content)))
                content = b""
            else:
                digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.send_header("ETag", f'"{digest}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)
        if hub_.moves:
            hub_.refs["main"] = SECOND

    def refuse(self, status: int, code: str | None, commit: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code" if " " not in code else "X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Hub(http.server.ThreadingHTTPServer):
    """One repository, with two commits of the same weights; ``main`` and the tag ``v1`` are at the first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": BODY, "pytorch_model.bin": b"pickle"}
        self.commits = {FIRST: files, SECOND: files | {"model.safetensors": b"other" * 1000}}
        self.refs = {"main": FIRST, "v1": FIRST}
        self.log: list[tuple[str, str]] = []
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.refusal: tuple[int, str | None] | None = None
        self.real = True  # otherwise it answers as no Hub does
        self.cut: int | None = None  # bytes of a large file after which the connection ends
        self.moves = False  # main moves on after every answer

    def names(self) -> set[str]:
        return {path.rpartition("/")[2] for _, path in self.log if "/cdn/" not in path}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """huggingface_hub with an empty cache, without token and proxy."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield constants
    close_session()


def point(monkeypatch: pytest.MonkeyPatch, constants: Any, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(library: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        point(monkeypatch, library, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def away(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and nothing listens any more where the Hub was."""

    def go() -> None:
        from huggingface_hub import close_session

        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            point(monkeypatch, library, f"http://127.0.0.1:{unused.getsockname()[1]}")
        close_session()

    return go


def fetch(revision: str = "") -> hub.Published:
    return hub.fetch(f"hf:{REPO}{revision}", progress=False)


def configured(server: Hub, config: Any) -> None:
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    server.commits[FIRST] = server.commits[FIRST] | {"config.json": content}


def test_weights_with_what_their_configuration_says(server: Hub, library: Any) -> None:
    found = fetch()
    assert found.path.read_bytes() == BODY
    assert found.path.is_relative_to(library.HF_HUB_CACHE)
    expected = Preprocessing(288, 288, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
    named = ("tench", "n2", "goldfish")
    spec = f"hf:{REPO}@{FIRST}"
    assert found == hub.Published(spec, found.path, SHA256, FIRST, "resnet18", 3, expected, named)
    assert server.names() == {"config.json", "model.safetensors"}
    said = hub.metadata(found)
    assert Preprocessing.from_json(said.pop("preprocessing")) == expected
    assert json.loads(said.pop("categories")) == list(named)
    assert said == {"source": spec, "commit": FIRST}


def test_branch_tag_and_commit(server: Hub) -> None:
    assert fetch("@v1").commit == fetch("@main").commit == FIRST
    server.refs["main"] = SECOND
    assert (fetch().commit, fetch("@v1").commit) == (SECOND, FIRST)
    assert fetch(f"@{SECOND}").path == fetch("@main").path
    server.log.clear()
    assert fetch(f"@{FIRST}").sha256 == SHA256
    assert server.log == []  # a commit never changes


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no server", "HTTP 503", "gated"])
@pytest.mark.parametrize("config", [True, False])
def test_what_is_in_the_cache_needs_no_hub(
    server: Hub, library: Any, monkeypatch: pytest.MonkeyPatch, away: Any, how: str, config: bool
) -> None:
    if not config:
        del server.commits[FIRST]["config.json"]
    online = [fetch(), fetch("@v1"), fetch(f"@{FIRST}")]
    assert [found.arch for found in online] == ["resnet18" if config else None] * 3
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    elif how == "no server":
        away()
    else:
        server.refusal = (503, None) if how == "HTTP 503" else (403, "GatedRepo")
    assert [fetch(), fetch("@v1"), fetch(f"@{FIRST}")] == online
    with pytest.raises(DownloadError):
        fetch("@v2")


def test_no_network_and_nothing_in_the_cache(library: Any, away: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    away()
    with pytest.raises(
        DownloadError, match=r"cannot fetch model.safetensors of timm/.*: Connection refused; check the"
    ):
        fetch()
    monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DownloadError, match=r"not in the cache, .* HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or run hf download "
    ):
        fetch()


def test_a_hub_that_never_answers_is_given_up(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        point(monkeypatch, library, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(DownloadError, match=r"no answer from .* within 0.1 s"):
            fetch()
        monkeypatch.setattr(library, "HF_HUB_ETAG_TIMEOUT", 0.2)
        with pytest.raises(DownloadError, match=r"no answer from .* within 0.2 s"):
            fetch()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((404, "RepoNotFound"), "http.*/timm/resnet18.a1_in1k does not exist or is private: .*hf auth login"),
        ((401, "RepoNotFound"), "or is private: .*hf auth login"),
        ((403, "GatedRepo"), "gated: request access at http.*/timm/resnet18.a1_in1k, then log in with `hf auth login`"),
        ((404, "RevisionNotFound"), "has no branch, tag or commit 'main'"),
        ((401, "Invalid credentials in Authorization header"), "answered HTTP 401: log in again with `hf auth login`"),
        ((429, None), "answered HTTP 429: try again later"),
        ((500, None), "answered HTTP 500: try again later"),
    ],
)
def test_refusals_say_what_to_do(server: Hub, refusal: tuple[int, str | None], words: str) -> None:
    server.refusal = refusal
    with pytest.raises(DownloadError, match=f"cannot fetch model.safetensors of {REPO}@main: .*{words}"):
        fetch()


def test_an_answer_that_is_not_the_hubs(server: Hub) -> None:
    server.real = False
    with pytest.raises(DownloadError, match="does not answer like the Hub: check HF_ENDPOINT"):
        fetch()
    server.real = True
    server.commits["../../x"], server.refs["main"] = server.commits[FIRST], "../../x"
    with pytest.raises(DownloadError, match="does not answer like the Hub: check HF_ENDPOINT"):
        fetch()


def test_pickles_are_never_fetched(server: Hub) -> None:
    del server.commits[FIRST]["model.safetensors"]
    with pytest.raises(
        WeightsError, match=r"@main has no model.safetensors, and pickles \(.bin, .pth\) are not fetched"
    ):
        fetch()
    server.commits[FIRST]["model.safetensors.index.json"] = b"{}"
    with pytest.raises(WeightsError, match="has sharded weights"):
        fetch()
    assert server.names() == {"model.safetensors", "model.safetensors.index.json"}


def test_damage_in_the_cache(server: Hub) -> None:
    found = fetch()
    altered = bytearray(BODY)
    altered[100] ^= 1
    found.path.write_bytes(altered)
    for revision in ("", f"@{FIRST}"):
        with pytest.raises(
            WeightsError, match=f"is damaged: expected SHA-256 {SHA256} as on the Hub, found [0-9a-f]{{64}}"
        ) as e:
            fetch(revision)
    name = re.search("Delete (.*) and run this again", str(e.value))
    assert name
    Path(name[1]).unlink()
    assert fetch() == found
    assert found.path.read_bytes() == BODY


def test_damage_on_the_way(server: Hub) -> None:
    server.stored[SHA256] = BODY[:-1] + b"S"
    with pytest.raises(WeightsError, match="is damaged"):
        fetch()


def test_a_blob_that_is_itself_a_link(server: Hub) -> None:
    """huggingface_hub keeps Xet's files once for all repositories, under the name of another digest."""
    found = fetch()
    shared = found.path.parents[3] / hashlib.sha256(b"Xet's own hash").hexdigest()
    blob = found.path.resolve()
    blob.rename(shared)
    blob.symlink_to(shared)
    assert fetch() == found
    shared.write_bytes(b"altered")
    with pytest.raises(WeightsError, match=f"expected SHA-256 {SHA256} .* Delete {re.escape(str(shared))} and"):
        fetch()


def test_without_symbolic_links(server: Hub, monkeypatch: pytest.MonkeyPatch, away: Any) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_, **__: False)
    found = fetch()
    assert not found.path.is_symlink()
    found.path.write_bytes(b"altered")
    with pytest.raises(WeightsError, match="is damaged"):
        fetch()
    away()
    assert fetch().sha256 == hashlib.sha256(b"altered").hexdigest()  # the cache does not know better


def test_branch_that_moves_meanwhile(server: Hub) -> None:
    server.moves = True
    with pytest.raises(DownloadError, match="changed while it was fetched: run this again"):
        fetch()


def test_connection_that_ends_early(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    server.cut = 1000
    with pytest.raises(
        DownloadError, match=r"cannot fetch model.safetensors of .*RemoteProtocolError; check the network"
    ):
        fetch()
    server.cut = None
    assert fetch().sha256 == SHA256


def test_full_disk(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(DownloadError, match="hub: No space left on device; free some space there"):
            fetch()
    assert fetch().sha256 == SHA256


def test_cache_that_is_no_folder(server: Hub, library: Any) -> None:
    Path(library.HF_HUB_CACHE).write_bytes(b"")
    with pytest.raises(DownloadError, match=r"hub.*; choose another folder with HF_HOME"):
        fetch()


@pytest.mark.parametrize(
    ("token", "words"),
    [("hf_secret", "answered HTTP 401: log in again"), ("hf_sécret", "the token in HF_TOKEN is not valid")],
)
def test_the_token_is_never_shown(server: Hub, monkeypatch: pytest.MonkeyPatch, token: str, words: str) -> None:
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", token)
    server.refusal = (401, "Invalid credentials in Authorization header")
    with pytest.raises(DownloadError, match=words) as caught:
        fetch()
    assert "cret" not in "".join(traceback.format_exception(caught.value))

    def quote(*args: object, **options: object) -> None:
        raise huggingface_hub.errors.HTTPError(f"Illegal header value b'Bearer {token}'")  # as h11 does

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", quote)
    with pytest.raises(DownloadError, match="HTTPError; check the network") as caught:
        fetch()
    assert "cret" not in "".join(traceback.format_exception(caught.value))


def test_progress(server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # huggingface_hub shows bars only on a terminal, or so
    hub.fetch(f"hf:{REPO}", progress=False)
    assert capsys.readouterr() == ("", "")
    hub.fetch(f"hf:{REPO}@{SECOND}", progress=True)
    assert "5.00k/5.00k" in capsys.readouterr().err


def test_sizes_are_known_before_the_download(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.MAX_BYTES, "model.safetensors", 6999)
    with pytest.raises(WeightsError, match=r"model.safetensors of .* has 7,000 bytes, which is too large for a ResNet"):
        fetch()
    monkeypatch.setitem(hub.MAX_BYTES, "model.safetensors", 7000)
    monkeypatch.setitem(hub.MAX_BYTES, "config.json", 10)
    with pytest.raises(WeightsError, match=r"config.json of .* bytes, which is too large"):
        fetch()
    assert {command for command, _ in server.log} == {"HEAD"}


def test_another_network_is_told_before_the_download(server: Hub) -> None:
    configured(server, CONFIG | {"architecture": "resnest50d"})
    with pytest.raises(
        InputError, match=r"holds a network 'resnest50d', which jresnet does not have .*There are resnet18, "
    ):
        fetch()
    assert not any("/cdn/" in path for _, path in server.log)


TRANSFORMERS: dict[str, Any] = {  # as microsoft/resnet-50 has it, for a small network
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 4,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "id2label": {"0": "tench, Tinca tinca", "1": "goldfish", "2": "shark"},
    "label2id": {"tench, Tinca tinca": 0, "goldfish": 1, "shark": 2},
    "torch_dtype": "float32",
}
PROCESSOR: dict[str, Any] = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def test_transformers_on_the_hub(server: Hub) -> None:
    configured(server, TRANSFORMERS)
    server.commits[FIRST]["preprocessor_config.json"] = json.dumps(PROCESSOR).encode()
    found = fetch()
    assert server.names() == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert (found.arch, found.num_classes, found.categories) == (None, 3, ("tench, Tinca tinca", "goldfish", "shark"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert found.preprocessing == Preprocessing(256, 224, mean, std, "bicubic")
    assert found.network == {
        "block": "bottleneck", "depths": (1, 1), "widths": (4, 8), "in_channels": 3, "stem": "imagenet",
        "shortcut": "projection", "stride_in": "3x3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "the configuration of a 'resnet' of the transformers library, got that of a 'vit'"),
        ({"hidden_act": "gelu"}, "hidden_act should be 'relu', not 'gelu'"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage puts a stride"),
        ({"embedding_size": 8}, "embedding_size 8 is not the first stage's width, 4"),
        ({"hidden_sizes": [15, 32]}, r"hidden_sizes \[15, 32\] are not multiples of 4"),
        ({"hidden_sizes": [16]}, "there are 1 hidden_sizes and 2 depths"),
        ({"hidden_sizes": "x"}, "hidden_sizes should be a list"),
        ({"depths": [1, -1]}, "depths should be whole numbers"),
        ({"layer_type": "x"}, "layer_type should be 'basic' or 'bottleneck', not 'x'"),
        ({"id2label": {"0": "a", "7": "b"}}, "id2label should name the classes from 0 on"),
        ({"id2label": {"0": "\x1b"}}, "id2label should give printable texts"),
        ({"downsample_in_bottleneck": "yes"}, "downsample_in_bottleneck should be a bool"),
    ],
)
def test_configurations_of_transformers_that_cannot_be_used(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS | change))
    with pytest.raises(WeightsError, match=message):
        timm_config.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"crop_pct": 1.0, "size": {"shortest_edge": 100}, "resample": 2}, (100, 100, "bilinear")),
        (
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            (256, 224, "bicubic"),
        ),
        ({"size": {"shortest_edge": 384}}, "without keeping the aspect ratio"),
        ({"crop_pct": None}, "without keeping the aspect ratio"),
        ({"resample": 0}, "interpolation must be bilinear or bicubic"),
        ({"rescale_factor": 1}, "scaled by 1/255"),
        ({"image_mean": None}, "image_mean should be numbers"),
    ],
)  # fmt: skip
def test_preprocessing_of_transformers(tmp_path: Path, change: dict, expected: Any) -> None:
    """What it cannot do is said, and the network is of use without it."""
    for name, content in (("config.json", TRANSFORMERS), ("preprocessor_config.json", PROCESSOR | change)):
        (tmp_path / name).write_text(json.dumps(content))
    found = timm_config.read(tmp_path / "config.json", tmp_path / "preprocessor_config.json")
    if isinstance(expected, str):
        assert found.preprocessing is None
        assert re.search(expected, found.notes[0])
    else:
        assert found.preprocessing is not None
        assert (found.preprocessing.resize, found.preprocessing.crop, found.preprocessing.interpolation) == expected


def test_any_other_configuration_says_nothing(server: Hub) -> None:
    configured(server, {"author": "someone"})
    found = fetch()
    assert (found.arch, found.num_classes, found.preprocessing, found.categories) == (None, None, None, None)
    assert hub.metadata(found) == {"source": found.spec, "commit": FIRST}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf:", "Repo id must use alphanumeric"),
        ("hf:timm", "ORG and REPO are both needed"),
        ("hf://timm/resnet18", "'repo_name' or 'namespace/repo_name'"),
        ("hf:timm/res net", "Repo id must use alphanumeric"),
        ("hf:../x", "Repo id must use alphanumeric|Cannot have -- or"),
        ("hf:timm/resnet18@", "REVISION is a branch, a tag or a commit, not ''"),
        ("hf:timm/resnet18@../../x", "REVISION is a branch, a tag or a commit, not '../../x'"),
        ("hf:timm/resnet18@/etc", "REVISION is"),
        ("hf:timm/resnet18@main@v1", "REVISION is"),
        ("hf:timm@/../v1", "ORG and REPO are both needed; REVISION is"),
    ],
)
def test_malformed(library: Any, spec: str, words: str) -> None:
    assert hub.is_spec(spec)
    with pytest.raises(InputError, match=rf"is not of the form hf:ORG/REPO\[@REVISION\], such as .*({words})"):
        hub.fetch(spec)


def test_what_is_a_specification() -> None:
    assert not any(map(hub.is_spec, ("IMAGENET1K_V1", "a/hf:b", "", Path("hf:x"))))
    with pytest.raises(InputError, match=r"as hf:ORG/REPO\[@REVISION\], got 'timm/resnet18'"):
        hub.fetch("timm/resnet18")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs the huggingface_hub library: pip install 'jresnet\[hub\]'"):
        fetch()


def read(tmp_path: Path, config: Any) -> timm_config.Described:
    path = tmp_path / "config.json"
    path.write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return timm_config.read(path)


def timm(**changed: Any) -> dict[str, Any]:
    """CONFIG with other entries, which are not to be hidden by those for evaluation."""
    hidden = {"test_input_size": None, "test_crop_pct": None}
    return CONFIG | {"pretrained_cfg": CONFIG["pretrained_cfg"] | hidden | changed}


def test_sizes_for_evaluation_go_before_those_of_training(tmp_path: Path) -> None:
    found = read(tmp_path, timm(test_input_size=[3, 256, 256], test_crop_pct=0.8))
    assert (found.preprocessing.resize, found.preprocessing.crop) == (320, 256)
    with pytest.raises(WeightsError, match="a square, not \\[3, 1, 2\\]"):
        read(tmp_path, timm(test_input_size=[3, 1, 2]))


def test_defaults_are_timms(tmp_path: Path) -> None:
    found = read(tmp_path, {"architecture": "resnet18", "pretrained_cfg": {}})
    assert found == timm_config.Described("resnet18", None, Preprocessing(256, 224, interpolation="bicubic"), None)
    old = {"architecture": "resnet18", "num_classes": 2, "crop_pct": 0.9, "labels": ["cat", "dog"]}  # one object
    expected = Preprocessing(248, 224, interpolation="bicubic")
    assert read(tmp_path, old) == timm_config.Described("resnet18", 2, expected, ("cat", "dog"))


def test_names_by_number_may_have_gaps(tmp_path: Path) -> None:
    named = CONFIG | {"label_names": {"0": "n1", "2": "horse"}}
    assert read(tmp_path, named).categories == ("tench", "1", "horse")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "should have 1 to 4,194,304 bytes of JSON, but has 0 bytes"),
        (b" " * (4 << 20) + b"1", "should have 1 to 4,194,304 bytes of JSON, but has 4,194,305 bytes"),
        (b"{", "is not a JSON file"),
        (b"\xff\xfe{", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b'{"num_classes": ' + b"1" * 5000 + b"}", "is not a JSON file"),
        ([CONFIG], "should contain an object"),
        (CONFIG | {"pretrained_cfg": []}, "pretrained_cfg in .* should be an object"),
        (CONFIG | {"num_classes": -1}, "num_classes should be 0 to 1,000,000, not -1"),
        (CONFIG | {"num_classes": True}, "num_classes should be"),
        (CONFIG | {"num_classes": 10**12}, "num_classes should be"),
        (CONFIG | {"global_pool": "max"}, "'global_pool' = 'max' is not supported"),
        (CONFIG | {"model_args": {"output_stride": 8, "drop_rate": 0.1}}, "'output_stride' = 8 is not supported"),
        (CONFIG | {"model_args": {"in_chans": 1}}, "'in_chans' = 1 is not supported"),
        (CONFIG | {"model_args": 1}, "model_args should be an object"),
        (timm(input_size=[3, 224, 256]), r"input_size should be 3 channels and a square, not \[3, 224, 256\]"),
        (timm(input_size=[1, 224, 224]), "input_size should be 3 channels and a square"),
        (timm(input_size=224), "input_size should be 3 channels and a square"),
        (timm(input_size=[3, 10**400, 10**400]), "input_size should be 1 to 4096 pixels"),
        (timm(input_size=[3, 4096, 4096], crop_pct=0.5), "resize must be .* got 8192"),
        (timm(crop_pct=1.1), "crop_pct should be a number from 0.01 to 1, not 1.1"),
        (timm(crop_pct="1"), "crop_pct should be"),
        (timm(crop_pct=float("nan")), "crop_pct should be"),
        (timm(crop_mode="squash"), "crop_mode should be 'center', not 'squash'"),
        (timm(crop_mode="border"), "crop_mode should be 'center', not 'border'"),
        (timm(interpolation="lanczos"), "interpolation must be bilinear or bicubic, got 'lanczos'"),
        (timm(mean=[0.5]), "mean should be three numbers"),
        (timm(mean=[0.5, "0", 0.5]), "mean must be"),
        (timm(std=[0, 1, 1]), "std must be"),
        (timm(std=[float("inf")] * 3), "std must be"),
        (CONFIG | {"label_names": ["one", "two"]}, "label_names should be 3 printable names"),
        (CONFIG | {"label_names": ["one", "two", 3]}, "label_names should be 3 printable names"),
        (CONFIG | {"label_names": ["one", "two", "\x1b[2J"]}, "label_names should be 3 printable names"),
        (CONFIG | {"label_names": {"3": "four"}}, "label_names should be 3 printable names"),
        (CONFIG | {"label_descriptions": {"n1": "\ud800"}}, "label_descriptions should give printable texts"),
        (CONFIG | {"label_descriptions": []}, None),
    ],
)
def test_what_a_configuration_may_not_say(tmp_path: Path, config: Any, words: str | None) -> None:
    if words is None:
        assert read(tmp_path, config).categories == ("n1", "n2", "n3")
        return
    with pytest.raises(WeightsError, match=words):
        read(tmp_path, config)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    config = timm(mean=1, std=[2, 2, 2], crop_pct=0, crop_mode="border", input_size=[], interpolation=["x" * 1000])
    config |= {"num_classes": -1, "global_pool": 5, "label_names": 5}
    with pytest.raises(WeightsError) as caught:
        read(tmp_path, config)
    for name in ("mean", "std", "crop_pct", "crop_mode", "input_size", "num_classes", "global_pool", "label_names"):
        assert name in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "value", [None, True, -1, 10**400, 1e308, float("nan"), "x", [], [None], {}, {"x": [1]}], ids=lambda v: str(v)[:9]
)
def test_no_type_is_unexpected(tmp_path: Path, value: Any) -> None:
    """A value of any type in any place is taken or refused, and nothing else happens."""
    for name in ("architecture", "pretrained_cfg", "num_classes", "model_args", "label_names", "label_descriptions"):
        for config in (CONFIG | {name: value}, *(timm(**{key: value}) for key in CONFIG["pretrained_cfg"])):
            with contextlib.suppress(InputError):
                read(tmp_path, config)


def test_check_against_the_network(tmp_path: Path) -> None:
    described = hub.Published("hf:a/b@c", tmp_path, SHA256, FIRST, "resnet18", 3, Preprocessing(256, 224), None)
    config = zoo.configure("resnet18", num_classes=3)
    hub.check(described, "resnet18", config)
    with pytest.raises(WeightsError, match="describes a resnet18, not a resnet34; 3 classes, not 10; images of 3 chan"):
        hub.check(described, "resnet34", zoo.configure("resnet34", num_classes=10, in_channels=1))
    silent = dataclasses.replace(described, arch=None, num_classes=None, preprocessing=None)
    hub.check(silent, "resnet34", zoo.configure("resnet34", in_channels=1))


def test_models_commands_and_evaluation_take_them(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``create``, the converter and evaluation: the same arrays, the configuration's classes and preprocessing."""
    shapes = params.shapes(zoo.configure("resnet20_cifar", num_classes=3))
    draw = np.random.default_rng(0)
    tensors = {
        keymap.torch_key(path): draw.uniform(0.5, 1.5, keymap.torch_shape(shape)).astype(np.float32)
        for path, shape in shapes.items()
    }
    content = {"model.safetensors": safetensors.numpy.save(tensors)}
    content["config.json"] = json.dumps(CONFIG | {"architecture": "resnet20_cifar"}).encode()
    server.commits[FIRST] = server.commits[FIRST] | content
    spec = f"hf:{REPO}"

    model = jresnet.create("resnet20_cifar", weights=spec)
    np.testing.assert_array_equal(model.fc.bias[...], tensors["fc.bias"])
    with pytest.warns(UserWarning, match="new head for 5 classes"):
        assert jresnet.create("resnet20_cifar", weights=spec, num_classes=5).fc.bias[...].shape == (5,)
    with pytest.raises(WeightsError, match="describes a resnet20_cifar, not a resnet32_cifar"):
        jresnet.create("resnet32_cifar", weights=spec)
    resolved = evaluation.resolve(spec)
    assert (resolved.arch, resolved.categories) == ("resnet20_cifar", ("tench", "n2", "goldfish"))

    output = tmp_path / "out.safetensors"
    arguments = ["resnet20_cifar", "--weights", spec, "--output", str(output), "--verify", "never"]
    assert torch2flax.main(arguments) == 0
    assert f"weights  {spec}@{FIRST}" in capsys.readouterr().out
    _, config, values, metadata = native.read(output)
    assert config.num_classes == 3
    np.testing.assert_array_equal(values["fc.bias"], tensors["fc.bias"])
    assert Preprocessing.from_json(metadata["preprocessing"]).resize == 288
    assert (metadata["source"], metadata["commit"]) == (f"{spec}@{FIRST}", FIRST)
    assert torch2flax.main([*arguments, "--force", "--num-classes", "4"]) == 0
    assert "new head for 4 classes" in capsys.readouterr().out
    assert "categories" not in native.read(output)[3]
