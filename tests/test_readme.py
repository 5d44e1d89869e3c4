"""What the documents tell people to type and to look at."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

import jresnet
from jresnet.models import params
from jresnet.pytorch import statedict
from jresnet.weights import native

PYTHON = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


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


def test_the_readmes_training_step_trains() -> None:
    (example,) = (block for block in PYTHON if "def step(" in block)
    # All but the lines that take weights from elsewhere, of a network that compiles faster.
    text = "\n".join(line for line in example.splitlines() if "weights=" not in line)
    assert text.count('"resnet18", num_classes=10, stem="cifar"') == 1
    names: dict = {}
    exec(text.replace('"resnet18", num_classes=10, stem="cifar"', '"resnet20_cifar"'), names)
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    before = jax.tree.map(np.array, names["params"])
    trained, _, _, loss = names["step"](
        names["params"], names["batch_stats"], names["opt_state"], images, jnp.arange(8)
    )
    assert np.isfinite(loss)
    changed = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), trained, before)
    assert all(jax.tree.leaves(changed))


def test_the_readmes_way_back_to_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there,) = (block for block in PYTHON if "torch_model" in block)
    (back,) = (block for block in PYTHON if "torchsave" in block)
    monkeypatch.chdir(tmp_path)
    small = jresnet.create("resnet20_cifar")
    exec(back, {"model": small})
    names = {"torch_model": SimpleNamespace(state_dict=lambda: statedict.state_dict(small))}
    exec(there, names)
    loaded = jresnet.create("resnet20_cifar", weights="model.pth")
    for model in (names["model"], loaded):
        assert native.digest(params.arrays(model)) == native.digest(params.arrays(small))


def test_the_readmes_five_names_of_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = (block for block in PYTHON if "photo.jpg" in block)
    assert len(example.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    names, preprocessing = tuple("abcdefghij"), jresnet.Preprocessing(36, 32)
    jresnet.save("mine.safetensors", jresnet.create("resnet20_cifar"), categories=names, preprocessing=preprocessing)
    assert example.count('"resnet50", "IMAGENET1K_V2"') == 1
    exec(example.replace('"resnet50", "IMAGENET1K_V2"', '"mine.safetensors"'), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    chances = [float(line.split("%")[0]) for line in lines]
    assert chances == sorted(chances, reverse=True)
    assert {line.split()[1] for line in lines} < set(names)
