"""The scripts that run on a lent GPU: nothing may be missing there, and no option misspelt."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from flax import nnx
from gpu import accuracy, check, finetune, trace, variants
from PIL import Image

import jresnet
from jresnet.commands import finetune as finetune_command
from jresnet.commands import train as train_command
from jresnet.models import zoo
from jresnet.models.resnet import ResNetConfig

SHELL = ("first", "second", "third", "fourth", "fifth")
TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")

# A machine without these packages, on which jresnet is not installed.
BARE = """
import importlib.metadata, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tensorboardX", "tensorflow_datasets", "array_record", "grain", "torch", "portpicker"}:
            raise ModuleNotFoundError(f"No module named {name!r}")

version = importlib.metadata.version
def asked(name):
    if name == "jresnet":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = asked
sys.meta_path.insert(0, Missing())
sys.path.insert(0, "scripts")
from gpu import accuracy, check, finetune, floors, trace, variants
from benchmark import driver
import jresnet.commands.train, jresnet.training.trainer
assert floors.main(["--arch", "resnet20_cifar", "--batch", "8"]) == 0
assert finetune.main(["--out", sys.argv[1], "--small"]) == 1  # it needs grain
"""


def test_they_need_no_package_that_the_machine_lacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "grain" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_scripts_are_sound(name: str) -> None:
    path = REPOSITORY / "scripts" / "gpu" / f"{name}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    for script in re.findall(r"scripts/\S+\.(?:py|sh)", path.read_text()):
        assert (REPOSITORY / script).exists(), script
    assert f"bash scripts/gpu/{name}.sh" in (REPOSITORY / "docs" / "gpu.md").read_text()


def test_the_runs_are_commands(tmp_path: Path) -> None:
    """As they are and as they are rehearsed."""
    parser = train_command.parser("train")
    for run in accuracy.RUNS:
        for small in (False, True):
            args = argparse.Namespace(data_dir=tmp_path, small=small, precision="bfloat16")
            line = accuracy.command(run, args, tmp_path / "out")
            assert Path(line[2]).exists()
            if run.script == accuracy.JRESNET:
                assert parser.parse_args(line[3:]).depth == (8 if small else int(run.options[1]))
    names = re.findall(r"resnet\d+-[\w-]+", (REPOSITORY / "scripts" / "gpu" / "third.sh").read_text())
    assert sorted(names) == sorted(run.name for run in accuracy.RUNS if not run.usual)


def test_a_stem_by_depth_is_the_stem() -> None:
    model = jresnet.ResNet(dataclasses.replace(TINY, stem="imagenet"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 30, 34, 3)), jnp.float32)
    expected = model.conv1(x)
    variants.by_depth(model)
    np.testing.assert_allclose(model.conv1(x), expected, rtol=1e-4, atol=1e-5)


def test_variants_are_measured_beside_the_usual_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(zoo.ZOO, "resnet8_cifar", dataclasses.replace(zoo.ZOO["resnet8_cifar"], config=TINY))
    monkeypatch.setattr(
        variants, "VARIANTS", (*variants.VARIANTS, variants.Variant("a typo", {"xla_gpu_no_option": 1}))
    )
    assert variants.main(["--out", str(tmp_path), "--small", "--only", "saving", "stem", "passes", "typo"]) == 1
    report = json.loads((tmp_path / "variants.json").read_text())
    two = report["rows"]["resnet8_cifar 32 4: BatchNorm in two passes"]
    assert two["seconds"] > 0
    assert report["rows"]["training waits for a checkpoint"]["seconds"] > 0
    assert two["first loss, relative"] < 1e-2  # bfloat16
    assert "xla_gpu_no_option" in report["rows"]["resnet8_cifar 32 4: a typo"]["error"]
    assert not any("stem" in name for name in report["rows"])  # this network has none
    assert "not reached: none" in capsys.readouterr().out


def test_references_are_those_of_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.ZOO, "resnet8_cifar", dataclasses.replace(zoo.ZOO["resnet8_cifar"], config=TINY))
    monkeypatch.setattr(check, "outcome", lambda values, *_: {"logits": check.flat(values), "gradient": np.arange(3.0)})
    path = tmp_path / "references.npz"
    assert check.main(["--write-references", str(path), "--small"]) == 0
    case = check.Case("resnet8_cifar", small=True)
    found = check.read_references(path, case)
    assert found
    assert found.keys() == {"float64", "float32"}
    assert found["float64"].keys() == {"logits", "gradient"}
    np.testing.assert_array_equal(found["float64"]["logits"], check.flat(case.values))
    case.values["fc.bias"] = case.values["fc.bias"] + 1
    assert check.read_references(path, case) is None
    assert check.read_references(None, case) is None


def test_a_trace_counts_each_kernel_once(tmp_path: Path) -> None:
    """The lines of modules and operations sum up what the streams' have; the host's are not of the device."""
    names = {1: "/device:GPU:0", 2: "/host:CPU"}
    lines = {(1, 1): "Stream #1(Compute)", (1, 2): "XLA Modules", (1, 3): "XLA Ops", (2, 1): "python"}
    events = [{"name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in names.items()]
    events += [{"name": "thread_name", "pid": p, "tid": t, "args": {"name": name}} for (p, t), name in lines.items()]
    for pid, tid in lines:
        for name, microseconds in (("sm90_xmma_fprop", 3e6), ("loop_add_fusion", 2e6)):
            events.append({"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": microseconds})
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = trace.summed(tmp_path)["seconds a step by kind"]
    assert {kind: seconds * trace.STEPS for kind, seconds in found.items()} == {"convolution": 3.0, "fusion": 2.0}


def test_photos_of_a_folder(tmp_path: Path) -> None:
    finetune.photos(tmp_path, 5)
    found = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in found] == ["blue", "blue", "green", "red", "white"]
    with Image.open(found[0]) as image:
        assert image.size == (500, 375)
    assert 40_000 < found[0].stat().st_size < 90_000
    line = ["--weights", "w", "--data", "d", "--out", "o", "--no-head-stage", "--epochs", "1", "--batch-size", "4",
            "--workers", "0"]  # fmt: skip
    assert not finetune_command.mistakes(finetune_command.parser("finetune").parse_args(line))
