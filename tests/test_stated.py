"""What a checkpoint says beside its tensors is taken, contradicted aloud, or refused by its name. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from test_infer import tensors_of

from convert import torch2flax
from jresnet.errors import WeightsError
from jresnet.models import zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import stated, statedict
from jresnet.pytorch.torchfile import Module

DEEP = ResNetConfig("bottleneck", (1, 1, 1, 1), (4, 8, 12, 16), num_classes=10)
SMALL = ResNetConfig("basic", (1, 1, 1, 1), (4, 8, 12, 16), num_classes=10)
CIFAR = dataclasses.replace(SMALL, stem="cifar")


@pytest.fixture(scope="module")
def deep() -> dict[str, np.ndarray]:
    return tensors_of(DEEP)


# --- By the user


def test_what_tensors_do_not_tell_can_be_forced(deep: dict[str, np.ndarray]) -> None:
    assert statedict.match(deep).config.stride_in == "3x3"
    found = statedict.match(deep, stride_in="1x1", output_stride=8, stem="imagenet_no_pool")
    assert (found.config.stride_in, found.config.stem) == ("1x1", "imagenet_no_pool")
    assert found.config.output_stride == 8
    assert found.assumed == ("ReLU after each block's sum",)
    for stem in ("cifar", "cifar_pool"):
        assert statedict.match(tensors_of(CIFAR), stem=stem).config.stem == stem  # type: ignore[arg-type]
    model = torch2flax.convert(deep, stride_in="1x1")
    assert (model.layer2[0].conv1.stride, model.layer2[0].conv2.stride) == (2, 1)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"stem": "cifar_pool"}, "whose stem is 'imagenet', not 'cifar_pool'"),
        ({"stride_in": "1x1"}, "whose stride_in is '3x3', not '1x1'"),
        ({"output_stride": 7}, "output_stride must be 4 or 8 or 16 or 32"),
    ],
)
def test_what_the_tensors_contradict(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        statedict.match(tensors_of(SMALL), **chosen)


# --- By the checkpoint

CAFFE = (
    "model = dict(backbone=dict(type='ResNet', depth=50, out_indices=(3, ), style='caffe', norm_cfg=dict(type='BN')))"
)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"hyper_parameters": {"backbone": "resnet50_caffe"}}, {"stride_in": "1x1"}),
        ({"meta": {"cfg": CAFFE}}, {"stride_in": "1x1"}),
        ({"meta": {"config": CAFFE.replace("caffe", "pytorch")}}, {"stride_in": "3x3"}),
        ({"args": {"stride_in_1x1": True}}, {"stride_in": "1x1"}),
        ({"hyper_parameters": {"replace_stride_with_dilation": [False, True, True]}}, {"output_stride": 8}),
        (
            {"hyper_parameters": {"model": {"replace_stride_with_dilation": (False, False, True)}}},
            {"output_stride": 16},
        ),
        ({"config": {"output_stride": 16}}, {"output_stride": 16}),
        ({"args": {"output_stride": 32, "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)}}, {"output_stride": None}),
        (
            {"cfg": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}},
            {"output_stride": 8},
        ),
        ({"args": {"use_maxpool": False}}, {"stem": "imagenet_no_pool"}),
        ({"args": {"act_layer": "relu", "aa_layer": "", "preact": False, "strides": (1, 2, 2, 2)}}, {}),
    ],
)
def test_it_is_believed(deep: dict[str, np.ndarray], beside: dict[str, Any], expected: dict[str, Any]) -> None:
    found = statedict.match({"state_dict": deep, **beside})
    assert found.config == dataclasses.replace(DEEP, **expected)
    if expected and expected != {"output_stride": None}:
        assert any(note.startswith("settings stated by the file: ") for note in found.notes)
        (name,) = expected
        assert not any("stride on" in phrase for phrase in found.assumed if name == "stride_in")


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"arch": "resnetaa51"}, "is a resnetaa51, which averages or blurs before its strides"),
        ({"args": {"model": "skresnet50"}}, "is a skresnet50, which has attention in its blocks"),
        ({"args": {"arch": "preact_resnet18"}}, r"is a preact_resnet18, .*\(pre-activation\)"),
        ({"model_name": "resnetv2_50"}, r"\(pre-activation\)"),
        ({"hyper_parameters": {"preact": True}}, r"normalises before it convolves \(preact=True\)"),
        ({"hyper_parameters": {"act_layer": "silu"}}, r"another activation than ReLU \(act_layer='silu'\)"),
        ({"args": {"last_stride": 1}}, "its last stage at stride 1"),
        ({"args": {"strides": [1, 2, 2, 1]}}, "a stage at stride 1"),
        ({"args": {"replace_stride_with_dilation": [True, False, False]}}, "dilated before a stage that is not"),
        ({"args": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)}}, "dilated in another way than torchvision's"),
        ({"meta": {"cfg": CAFFE.replace("ResNet", "ResNetV1d")}}, "ResNetV1d, which has a deep stem"),
    ],
)
def test_another_function_is_refused(deep: dict[str, np.ndarray], beside: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=f"says that its network .*{message}.* by giving their key 'state_dict'"):
        statedict.match({"state_dict": deep, **beside})
    assert statedict.match({"state_dict": deep, **beside}, key="state_dict").config == DEEP  # the way out


def test_the_user_goes_before_the_checkpoint(deep: dict[str, np.ndarray]) -> None:
    found = statedict.match({"state_dict": deep, "args": {"stride_in_1x1": True}}, stride_in="3x3")
    assert found.config == DEEP
    assert "the file says stride_in '1x1', but the requested '3x3' is used" in found.notes


def test_a_name_that_the_tensors_contradict(deep: dict[str, np.ndarray]) -> None:
    found = statedict.match({"state_dict": deep, "arch": "resnet18"})
    assert found.notes == (
        "the file calls its network 'resnet18', but its tensors are those of a ResNet that is not in the zoo",
    )
    found = statedict.match({"state_dict": deep, "meta": {"cfg": CAFFE}})
    assert found.notes == ("settings stated by the file: style='caffe'",)  # type='ResNet' is any of them
    config = zoo.configure("resnet18", num_classes=2)
    assert statedict.match({"state_dict": tensors_of(config), "args": {"arch": "resnet18"}}).notes == ()


def test_arguments_of_other_things_are_left_alone(deep: dict[str, np.ndarray]) -> None:
    beside = {
        "args": {"activation": "softmax", "dilation": 2, "optimizer": "sgd", "style": 3, "strides": "x", "model": None},
        "arch": 7, "config": "backbone", "meta": {"cfg": "backbone=dict(" + "(" * 10_000}, "opt": {"model": {"model": {}}},
    }  # fmt: skip
    assert statedict.match({"state_dict": deep, **beside}).config == DEEP


# --- By a module saved whole


def whole(config: ResNetConfig, **changes: dict[str, Any]) -> Module:
    """As torchfile reads ``torch.save(model)``: tensors, and what each layer says; ``changes`` by the layer's name."""
    module = Module(tensors_of(config))
    module.kind, module.settings = "my.ResNet", {"": {"class": "my.ResNet"}, "maxpool": {"class": "torch.nn.MaxPool2d"}}
    for key in module:
        name = key.rpartition(".")[0]
        if "bn" in name or name.endswith("downsample.1"):
            module.settings[name] = {"class": "torch.nn.modules.batchnorm.BatchNorm2d", "eps": 1e-5}
        elif name != "fc":
            said = stated._stride(name, config)
            assert said
            module.settings[name] = {"class": "torch.nn.modules.conv.Conv2d", "stride": said[0], "dilation": said[1]}
    for name, change in changes.items():
        module.settings[name] = module.settings.get(name, {}) | change
    return module


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    "change", [{}, {"stride_in": "1x1"}, {"output_stride": 8}, {"output_stride": 16, "stride_in": "1x1"}]
)
def test_its_layers_say_where_they_stride(change: dict[str, Any], wrapped: bool) -> None:
    config = dataclasses.replace(DEEP, **change)
    module = whole(config)
    if wrapped:
        inside, module = module, Module({f"module.{key}": value for key, value in module.items()})
        module.settings = {f"module.{name}".rstrip("."): said for name, said in inside.settings.items()}
    found = statedict.match({"epoch": 3, "model": module} if wrapped else module)
    assert found.config == config
    assert not any("stride" in phrase for phrase in found.assumed)


def test_its_max_pool() -> None:
    identity = {"maxpool": {"class": "torch.nn.modules.linear.Identity"}}
    assert statedict.match(whole(CIFAR)).config.stem == "cifar_pool"
    assert statedict.match(whole(CIFAR, **identity)).config.stem == "cifar"
    assert statedict.match(whole(SMALL, **identity)).config.stem == "imagenet_no_pool"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer4.0.conv2": {"stride": (1, 1)}}, r"layer4\.0\.conv2 has stride \(1, 1\), not \(2, 2\)"),
        ({"layer1.0.bn1": {"eps": 1e-3}}, r"layer1\.0\.bn1 has eps 0\.001, not 1e-05"),
        ({"conv1": {"padding_mode": "reflect"}}, "conv1 has padding_mode reflect, not zeros"),
        ({"relu": {"class": "torch.nn.modules.activation.LeakyReLU"}}, "relu is a LeakyReLU"),
        ({"": {"class": "my.PreActResNet"}}, r"it is a my\.PreActResNet, pre-activation"),
    ],
)
def test_layers_that_are_no_resnets_of_jresnet(change: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(WeightsError, match=f"another function than jresnet's or the requested one: .*{message}"):
        statedict.match(whole(DEEP, **change))


# --- By the tensors


def test_pre_activation_shows_in_the_shapes(deep: dict[str, np.ndarray]) -> None:
    """Where a block changes the width, its first BN is as wide as its input."""
    other = dict(deep)
    for stage in (1, 2, 3, 4):
        inputs = deep[f"layer{stage}.0.conv1.weight"].shape[1]
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            other[f"layer{stage}.0.bn1.{leaf}"] = np.ones(inputs, np.float32)
    with pytest.raises(WeightsError, match="contains a pre-activation ResNet"):
        statedict.match(other)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["layer1.0.se.fc1.weight", "layer1.0.se.fc2.weight"], "squeeze-and-excitation"),
        (["layer1.0.gn1.weight"], "GroupNorm"),
        (["layer2.0.downsample.2.weight"], "ResNet-D"),
        (["layer1.0.cbam.mlp.weight"], "attention in the blocks"),
    ],
)
def test_parts_of_other_networks_are_named(deep: dict[str, np.ndarray], keys: list[str], what: str) -> None:
    with pytest.raises(WeightsError, match=rf"it has [^;]*{what}[^;]*, which jresnet does not support; \d+ unexpected"):
        statedict.match(deep | {key: np.ones(4, np.float32) for key in keys})


def test_whole_kinds_of_missing_tensors_are_named(deep: dict[str, np.ndarray]) -> None:
    parameters = {key: value for key, value in deep.items() if "running" not in key}
    with pytest.raises(
        WeightsError, match=r"no running statistics: either only the parameters were saved .save model\.state_dict"
    ):
        statedict.match(parameters)
    with pytest.raises(WeightsError, match="has no BatchNorm: convert the weights from before BatchNorm was folded"):
        statedict.match(
            {key: value for key, value in parameters.items() if "bn" not in key and "downsample.1" not in key}
        )
    pruned = {key.replace("conv1.weight", "conv1.weight_orig"): value for key, value in deep.items()}
    with pytest.raises(WeightsError, match=r"has pruning masks \(torch\.nn\.utils\.prune\.remove"):
        statedict.match(pruned)
    with pytest.raises(WeightsError, match="found an empty dict"):
        statedict.match({})


@pytest.mark.parametrize(
    ("key", "what"),
    [("stages.0.blocks.1.norm1.weight", "resnetv2"), ("blocks.3.attn.qkv.weight", "a Vision Transformer")],
)
def test_other_networks_are_named(key: str, what: str) -> None:
    with pytest.raises(WeightsError, match=f"contains no ResNet but .*{what}"):
        statedict.match({key: np.ones(4, np.float32)})
