"""What the documents tell people to type and to look at."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from flax import nnx
from PIL import Image

import jresnet
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.weights import native

DOCUMENTS = sorted(
    path for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")] if "log" not in path.parts
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document: Path) -> None:
    """Links, and the commands that are to be typed; what the dated pages of docs/log name may have gone since."""
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
    scripts = re.findall(r"python ((?:scripts|tests)/\S+\.py)", text)
    assert [script for script in scripts if not (REPOSITORY / script).is_file()] == []
    modules = re.findall(r"python -m ((?:jresnet|convert)[\w.]*)", text)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def python(page: str) -> list[str]:
    """The blocks of Python of a page under docs/."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)


def test_the_training_step_of_the_tutorial_trains() -> None:
    """Both of its forms, of a network that compiles faster; tests/test_docs.py runs the rest of the pages."""
    nnx_step, pure_step = python("tutorials/cifar10.md")
    names: dict = {}
    assert nnx_step.count('"resnet20_cifar"') == 1
    exec(nnx_step.replace('"resnet20_cifar"', '"resnet8_cifar"'), names)
    first = names["step"](names["model"], names["optimizer"], names["images"], names["labels"])
    assert np.isfinite(first)
    before = jax.tree.map(np.array, nnx.state(names["model"], nnx.Param))
    exec(pure_step, names)
    assert np.isfinite(names["loss"])
    changed = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), names["params"], before)
    assert all(jax.tree.leaves(changed))


def test_the_way_back_to_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there,) = (block for block in python("howto/convert.md") if "torch_model.state_dict()" in block)
    (back,) = (block for block in python("howto/back-to-pytorch.md") if "torchsave" in block)
    monkeypatch.chdir(tmp_path)
    small = jresnet.create("resnet8_cifar")
    exec("\n".join(line for line in back.splitlines() if "create(" not in line), {"model": small})
    names = {"torch_model": SimpleNamespace(state_dict=lambda: statedict.state_dict(small))}
    exec(there, names)
    loaded = jresnet.create("resnet8_cifar", weights="model.pth")
    for model in (names["model"], loaded):
        assert native.digest(params.arrays(model)) == native.digest(params.arrays(small))


@pytest.mark.parametrize("page", ["../README.md", "tutorials/predict.md"])
def test_the_five_names_of_a_photo(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = (block for block in python(page) if "photo.jpg" in block)
    assert len(example.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    names, preprocessing = tuple("abcdefghij"), jresnet.Preprocessing(36, 32)
    jresnet.save("mine.safetensors", jresnet.create("resnet8_cifar"), categories=names, preprocessing=preprocessing)
    assert example.count('"resnet50", "IMAGENET1K_V2"') == 1
    exec(example.replace('"resnet50", "IMAGENET1K_V2"', '"mine.safetensors"'), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(lines) == 5
    chances = [float(line.split("%")[0]) for line in lines]
    assert chances == sorted(chances, reverse=True)
    assert {line.split()[1] for line in lines} < set(names)


def test_the_converter_is_shown_first() -> None:
    """A user's own file is what most people come with."""
    section = (REPOSITORY / "README.md").read_text().partition("## Bring your own PyTorch file\n")[2]
    assert section.lstrip().startswith("```\npython -m convert.torch2flax my_resnet.pth\n```")


def test_readme_has_at_most_150_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
