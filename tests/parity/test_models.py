"""The same function as PyTorch: logits, BatchNorm, initial parameters (training: ``test_training.py``).

The yardstick is PyTorch's own: how far its float32 lies from its float64. ``verify.ALLOWED`` of that is the tolerance
for float32; in float64 both must agree to rounding.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch
from flax import nnx

import jresnet
from convert import torch2flax, verify
from jresnet.models import params
from jresnet.models.layers import BatchNorm, Conv
from jresnet.pytorch import keymap, statedict

LARGE = ("resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")  # the same blocks, more
ELSEWHERE = ("resnet34", "resnet56_cifar", "wide_resnet50_2")  # in test_training.py, of 20 layers, in test_golden.py
ARCHS = (*networks.TORCHVISION, "resnet20_cifar", "resnet56_cifar", "resnet34_projection", "resnet18_d2l")
EXACT = 1e-10  # relative, in float64: a few thousand roundings of 1e-16, enlarged by BN's divisions


def converted(arch: str, model: torch.nn.Module) -> jresnet.ResNet:
    return torch2flax.convert(model.state_dict(), arch)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.long) if arch in LARGE + ELSEWHERE else arch for arch in ARCHS]
)
def test_logits_are_pytorchs(arch: str) -> None:
    reference = networks.build(arch)
    model = converted(arch, reference)
    size = 32 if model.config.stem == "cifar" else 64
    found = verify.compare(model, reference, size)
    print(f"{arch}: {found}")
    assert found.is_rounding, found


@pytest.mark.parametrize(
    "arch",
    [pytest.param("resnet18", marks=pytest.mark.long), "resnet50", "resnext50_32x4d", "resnet20_cifar", "resnet18_d2l"],
)
def test_fused_logits_are_pytorchs(arch: str) -> None:
    reference = networks.build(arch)
    model = jresnet.fuse(converted(arch, reference))
    found = verify.compare(model, reference, 32 if model.config.stem == "cifar" else 64)
    print(f"{arch}: {found}")
    assert found.is_rounding, found


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet50", marks=pytest.mark.long)])
def test_logits_of_the_fastest_program_are_pytorchs(arch: str) -> None:
    """The weights as its constants, so that convolutions go by Winograd's algorithm, with one piece and with several."""
    reference = networks.build(arch)
    fused = jresnet.fuse(converted(arch, reference))
    images = np.random.default_rng(0).standard_normal((16, 128, 128, 3), np.float32)
    program = jax.jit(fused, compiler_options=jresnet.compiler_options()).lower(images)
    convolutions = sum(isinstance(module, Conv) for _, module in nnx.iter_modules(fused))
    assert program.as_text().count("stablehlo.convolution") < convolutions
    exact, theirs = verify.torch_logits(reference, images)
    found = verify.relative(np.asarray(program.compile()(images)), exact)
    assert found <= verify.ALLOWED * verify.relative(theirs, exact)


@pytest.mark.parametrize(
    ("arch", "chosen"),
    [
        ("resnet20_cifar", {}),
        ("resnet18", {}),
        pytest.param("resnet56_cifar", {}, marks=pytest.mark.long),
        pytest.param("resnet20_cifar", {"shortcut": "projection"}, marks=pytest.mark.long),
    ],
)
def test_float32_is_as_near_as_pytorchs(arch: str, chosen: dict) -> None:
    """Over several networks, where a draw's luck is averaged out; ``python -m convert.verify --all`` has every row."""
    row = verify.survey(arch, networks=5, **chosen)
    print(verify.line(row))
    assert row.failures() == []


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify.main(["--arch", "resnet20_cifar", "--json"]) == 0  # a single network's ratio is chance
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["rows"][0]["float64"] < verify.EXACT
    monkeypatch.setattr(verify, "ALLOWED_OVERALL", 0.01)
    assert verify.main(["--arch", "resnet20_cifar", "--networks", "1"]) == 1
    printed = capsys.readouterr()
    assert "| resnet20_cifar |" in printed.out
    assert "times PyTorch's, the limit is 0.01" in printed.err


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_logits_with_the_cifar_stem(arch: str) -> None:
    reference = networks.build(arch)
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = torch.nn.Identity()
    model = torch2flax.convert(reference.state_dict(), arch, stem="cifar")
    found = verify.compare(model, reference.eval())
    assert found.is_rounding, found


def test_a_swapped_leaf_is_seen() -> None:
    """The tests above can fail: exchange mean and bias of one BN in the middle of resnet50."""
    reference = networks.build("resnet50")
    model = converted("resnet50", reference)
    norm = model.layer3[2].bn2
    mean, bias = norm.mean[...], norm.bias[...]
    norm.mean[...], norm.bias[...] = bias, mean
    found = verify.compare(model, reference, 64)
    assert found.jresnet > 1000 * found.torch


def test_checked_conversions_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--verify always`` compares, and refuses a model that computes something else."""
    reference = networks.build("resnet18")
    found = statedict.match(reference.state_dict(), "resnet18")
    model = params.fill(found.config, found.values)
    result = verify.check(model, "resnet18", found.torchvision(), "always")
    assert result.done
    assert "PyTorch's float32 logits" in str(result)
    model.fc.bias[...] += 1.0
    with pytest.raises(ValueError, match="is not the network PyTorch computes"):
        verify.check(model, "resnet18", found.torchvision())


def test_batchnorm_over_training_steps() -> None:
    """Batch statistics, running statistics and gradients over five batches, then evaluation."""
    draw = np.random.default_rng(0)
    theirs = torch.nn.BatchNorm2d(6).double()
    networks.randomise(theirs)
    with jax.enable_x64(True):
        ours = BatchNorm(6)
        for name, value in (
            ("scale", theirs.weight), ("bias", theirs.bias), ("mean", theirs.running_mean), ("var", theirs.running_var),
        ):  # fmt: skip
            variable = getattr(ours, name)
            setattr(ours, name, type(variable)(jnp.asarray(value.detach().numpy())))
        for _ in range(5):
            x = draw.normal(3, 2, (4, 5, 3, 6))
            upstream = draw.normal(size=x.shape)
            tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
            expected = theirs.train()(tensor)
            expected.backward(torch.from_numpy(upstream.transpose(0, 3, 1, 2).copy()))
            graph, state = nnx.split(ours)
            result, pull = jax.vjp(lambda x, g=graph, s=state: nnx.merge(g, s, copy=True)(x, True), jnp.asarray(x))
            ours(jnp.asarray(x), train=True)
            for found, wanted in (
                (result, expected.detach().numpy().transpose(0, 2, 3, 1)),
                (pull(jnp.asarray(upstream))[0], tensor.grad.numpy().transpose(0, 2, 3, 1)),
                (ours.mean[...], theirs.running_mean.numpy()),
                (ours.var[...], theirs.running_var.numpy()),
            ):
                assert verify.relative(found, wanted) < EXACT
        x = draw.normal(size=(2, 3, 3, 6))
        expected = (
            theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).detach().numpy().transpose(0, 2, 3, 1)
        )
        assert verify.relative(ours(jnp.asarray(x)), expected) < EXACT


def test_torch_tensors_and_half_precision() -> None:
    reference = networks.build("resnet20_cifar")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in reference.state_dict().items()
        }
        model = torch2flax.convert(narrow, "resnet20_cifar")
        wanted = narrow["conv1.weight"].float().permute(2, 3, 1, 0).numpy()
        np.testing.assert_array_equal(model.conv1.kernel[...], wanted)


def test_initial_parameters_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = networks.models.resnet18().state_dict()
    from jresnet import create

    ours = params.arrays(create("resnet18"))
    for path, value in ours.items():
        wanted = theirs[keymap.torch_key(path)].numpy()
        if path.endswith(("kernel", "fc.bias")):
            assert float(value.std()) == pytest.approx(wanted.std(), rel=0.08), path
            assert abs(float(value.mean())) < 5 * wanted.std() / np.sqrt(value.size), path
        else:
            np.testing.assert_array_equal(value, wanted, path)
