"""Which ResNet a state_dict holds: found from its keys and shapes alone. No torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

import jresnet
from convert import torch2flax
from jresnet.errors import WeightsError
from jresnet.models import params, zoo
from jresnet.models.resnet import ResNetConfig
from jresnet.pytorch import infer, keymap, statedict
from jresnet.weights import published

SMALL = ResNetConfig("basic", (1, 1, 1, 1), (4, 8, 12, 16), num_classes=10)
BODY = dataclasses.replace(SMALL, num_classes=0)

_TIMMS = [name for name in zoo.IN_TIMM if not published.names(name)]


def tensors_of(config: ResNetConfig, dialect: str = "torchvision", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors by the dialect's keys, in PyTorch's layout, with their counters."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for path, shape in params.shapes(config).items():
        value = draw.uniform(0.5, 1.5, keymap.torch_shape(shape)).astype(np.float32)
        tensors[keymap.torch_key(path, dialect)] = value
        if path.endswith(".var"):
            tensors[keymap.counter_key(path, dialect)] = np.array(7)
    return tensors


def prefixed(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {prefix + key: value for key, value in tensors.items()}


def body_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors.items() if not key.startswith("fc.")}


@pytest.fixture(scope="module")
def small() -> dict[str, np.ndarray]:
    return tensors_of(SMALL)


def same(found: statedict.Conversion, tensors: dict[str, np.ndarray]) -> bool:
    """Whether every value is the tensor of its name."""
    return all(np.array_equal(value, tensors[key]) for key, value in found.torchvision().items())


# --- What a network is


# Those that timm alone has are in tests/parity/test_timm.py.
@pytest.mark.parametrize("arch", [name for name in zoo.ZOO if name not in ("resnet1202_cifar", *_TIMMS)])
def test_every_row_is_found(arch: str) -> None:
    config = dataclasses.replace(zoo.ZOO[arch].config, num_classes=7)
    shapes = {keymap.torch_key(path): keymap.torch_shape(shape) for path, shape in params.shapes(config).items()}
    found = infer.find(shapes)
    assert found is not None
    assert (found.dialect, found.prefix, found.head) == ("torchvision", "", "fc")
    assert infer.configure(found, shapes) == config
    assert infer.row(config) == arch


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig("basic", (1, 1, 1, 1), (48, 96, 192, 384), num_classes=37, in_channels=5),
        ResNetConfig("basic", (1, 2), (4, 8), num_classes=1, stem="cifar", shortcut="pad"),
        ResNetConfig("basic", (2,), (4,), num_classes=3),
        ResNetConfig("basic", (1, 1), (4, 4), num_classes=3, shortcut="conv"),
        ResNetConfig("basic", (2, 1), (4, 8), num_classes=3, shortcut="projection_first", conv_bias=True),
        ResNetConfig("bottleneck", (1, 2, 1), (8, 12, 20), num_classes=3, groups=4, width_per_group=20, stem="cifar"),
        ResNetConfig("bottleneck", (1, 1), (4, 8), num_classes=3, width_per_group=128),
        ResNetConfig("bottleneck", (1, 1, 1, 1, 1), (8, 16, 8, 16, 8), num_classes=3, conv_bias=True, shortcut="conv"),
    ],
    ids=str,
)
def test_networks_without_a_row(config: ResNetConfig) -> None:
    tensors = tensors_of(config)
    found = statedict.match(tensors)
    assert (found.arch, found.config) == (None, config)
    assert same(found, tensors)
    assert not found.notes
    assert jresnet.ResNet(found.config, rngs=None)


@pytest.mark.parametrize("dialect", keymap.DIALECTS)
@pytest.mark.parametrize("prefix", ["", "module.what.0."])
def test_every_dialect_is_found(dialect: str, prefix: str) -> None:
    row = "resnet20_cifar" if dialect in ("akamaster", "chenyaofo") else "resnet18"
    config = dataclasses.replace(zoo.ZOO[row].config, num_classes=3, in_channels=2, **keymap.DIALECTS[dialect].config)
    found = statedict.match(prefixed(tensors_of(config, dialect), prefix))
    assert (found.dialect, found.config, found.notes) == (dialect, config, ())


def test_what_shapes_do_not_tell_is_said() -> None:
    assert statedict.match(tensors_of(SMALL)).assumed == ("no dilation", "ReLU after each block's sum")
    config = ResNetConfig("bottleneck", (1, 1), (4, 8), num_classes=3, stem="cifar")
    assumed = statedict.match(tensors_of(config)).assumed
    assert assumed[:2] == ("stem at stride 1 without max-pool", "stride on the 3x3 convolution")
    config = ResNetConfig("basic", (1, 1), (8, 16), num_classes=3, attention="se")
    assert "ReLU and sigmoid in the attention" in statedict.match(tensors_of(config)).assumed


def test_no_circle() -> None:
    """The tutorial's ResNet-34 with ten classes: refused under both names once, each message naming the other."""
    config = zoo.configure("resnet34_projection", num_classes=10)
    tensors = tensors_of(config, "resnet34_projection")
    for arch in (None, "resnet34_projection"):
        found = statedict.match(tensors, arch)
        assert (found.arch, found.config) == ("resnet34_projection", config)
    assert statedict.match(tensors, "resnet34").config == config  # its shortcuts are the file's
    with pytest.raises(WeightsError, match=r"contains a resnet34_projection, not a resnet50: name that architecture$"):
        statedict.match(tensors, "resnet50")
    model = torch2flax.convert(tensors, num_classes=3)
    assert (model.config.num_classes, model.config.shortcut) == (3, "projection_first")


@pytest.mark.parametrize("asked", ["resnetaa50", "resnet50_gn", "resnet34_projection"])
def test_the_architecture_in_a_message_is_the_files(asked: str) -> None:
    """What tensors do not determine is not taken from an architecture that they contradict."""
    shapes = params.shapes(zoo.configure("resnet18", num_classes=3))
    tensors = {keymap.torch_key(path): np.zeros(keymap.torch_shape(shape), "e") for path, shape in shapes.items()}
    with pytest.raises(WeightsError, match=f"contains a resnet18, not a {asked}: name that architecture$"):
        statedict.match(tensors, asked)


def test_one_name_of_two_is_enough() -> None:
    """A file of tensors without copies keeps either name of the tutorial's stages."""
    config = ResNetConfig("basic", (1, 1, 1, 1), (4, 8, 12, 16), num_classes=3, shortcut="projection_first")
    tensors = tensors_of(config, "resnet34_projection")
    second = {keymap.alias(key, "resnet34_projection") or key: value for key, value in tensors.items()}
    assert "Conv.3.0.left.0.weight" in second
    found = statedict.match(second)
    assert found.config == config
    np.testing.assert_array_equal(
        found.values["layer4.0.conv1.kernel"], keymap.to_flax(second["Conv.3.0.left.0.weight"])
    )


# --- Where it lies


def test_a_network_among_other_things(small: dict[str, np.ndarray]) -> None:
    loss = {"loss.weight": np.zeros(10, np.float32), "profiler.total_ops": np.zeros(1), "n_averaged": np.array(3)}
    found = statedict.match({"state_dict": prefixed(small, "net.") | loss, "epoch": 3, "lr": np.zeros(())})
    assert same(found, small)
    assert found.notes == ("ignored, not part of the network: loss.weight, profiler.total_ops",)


@pytest.mark.parametrize("prefix", ["net/", "net_", "a:", "what.net|", "module.net."])
def test_a_prefix_may_end_in_any_character(small: dict[str, np.ndarray], prefix: str) -> None:
    for chosen in ({}, {"prefix": prefix}):
        assert same(statedict.match(prefixed(small, prefix), **chosen), small)
    with pytest.raises(
        WeightsError, match=r"contains no ResNet under 'x': there is one under .* in torchvision naming$"
    ):
        statedict.match(prefixed(small, prefix), prefix="x")
    assert same(statedict.match(prefixed(small, "any"), prefix="any"), small)  # only if it is named


def test_a_profilers_counters(small: dict[str, np.ndarray]) -> None:
    """thop adds them to every module. Other tensors inside the network are errors."""
    counters = {f"{name}total_ops": np.zeros(1) for name in ("", "layer1.", "layer1.0.", "layer1.0.conv1.", "fc.")}
    found = statedict.match(small | counters)
    assert same(found, small)
    assert found.notes == (f"ignored, not part of the network: {', '.join(counters)}",)
    with pytest.raises(WeightsError, match=r"1 unexpected: layer1\.0\.alpha$"):
        statedict.match(small | counters | {"layer1.0.alpha": np.zeros(1)})


def test_mmpretrain(small: dict[str, np.ndarray]) -> None:
    tensors = prefixed(body_of(small), "backbone.") | {f"head.{k}": small[k] for k in ("fc.weight", "fc.bias")}
    found = statedict.match({"meta": {}, "state_dict": tensors})
    assert same(found, small)
    assert not found.notes


def test_moco_trains_its_query_encoder(small: dict[str, np.ndarray]) -> None:
    other = tensors_of(SMALL, seed=1)
    both = prefixed(other, "module.encoder_k.") | prefixed(small, "module.encoder_q.")
    found = statedict.match({"state_dict": both | {"module.queue": np.zeros((8, 64), np.float32)}})
    assert same(found, small)
    assert found.notes == (
        "read from 'module.encoder_q.'; also found: 'module.encoder_k.'",
        "ignored, not part of the network: module.queue",
    )
    forced = statedict.match({"state_dict": both}, prefix="module.encoder_k")
    assert same(forced, other)


@pytest.mark.parametrize("nested", [True, False])
def test_dino_evaluates_its_teacher(small: dict[str, np.ndarray], nested: bool) -> None:
    other = tensors_of(SMALL, seed=1)
    if nested:
        saved = {"student": prefixed(other, "module.backbone."), "teacher": prefixed(small, "backbone.")}
        note = "read from 'teacher'; also found: 'student'"
    else:
        saved = prefixed(other, "student.") | prefixed(small, "teacher.")
        note = "read from 'teacher.'; also found: 'student.'"
    found = statedict.match(saved)
    assert same(found, small)
    assert found.notes[0] == note
    assert same(statedict.match(saved, **({"key": "student"} if nested else {"prefix": "student."})), other)


def test_the_largest_dict_wins_whatever_its_name(small: dict[str, np.ndarray]) -> None:
    optimizer = {"state": {i: {"exp_avg": value} for i, value in enumerate(small.values())}}
    found = statedict.match({"opt": optimizer, "a": {"b": {"my weights": small}}, "ema_decay": 0.9})
    assert same(found, small)
    both = {**small, "ema": tensors_of(SMALL, seed=1)}
    assert statedict.match(both).notes == ("read from 'ema'; also found: '.'",)
    assert same(statedict.match(both, key="."), small)
    assert same(statedict.match({3: {"x": small}}, key="3.x"), small)  # by epoch
    assert same(statedict.match({"a": {"b": small}, "c": tensors_of(SMALL, seed=1)}, key="a.b"), small)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_wrappers_between(small: dict[str, np.ndarray], wrapper: str) -> None:
    found = statedict.match({key.replace("layer2.", f"layer2.{wrapper}"): value for key, value in small.items()})
    assert same(found, small)


def test_transformers_body_alone() -> None:
    """ResNetModel has neither ``resnet.`` before its names nor a head."""
    tensors = tensors_of(SMALL, "transformers")
    body = {k.removeprefix("resnet."): value for k, value in tensors.items() if not k.startswith("classifier")}
    found = statedict.match(body, num_classes=10)
    assert (found.dialect, found.config, found.headless) == ("transformers", BODY, True)


def test_fastais_body() -> None:
    tensors = prefixed(body_of(tensors_of(SMALL, "children")), "0.")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("0.10.")}
    head = {"1.2.weight": np.zeros(32), "1.4.weight": np.zeros((8, 32)), "1.8.weight": np.zeros((10, 8))}
    found = statedict.match({"model": tensors | head}, num_classes=10)
    assert (found.dialect, found.config, found.headless) == ("children", BODY, True)
    assert found.notes[-1] == "ignored, not part of the network: 1.2.weight, 1.4.weight, 1.8.weight"


def test_a_network_of_another_function_with_the_same_keys(small: dict[str, np.ndarray]) -> None:
    """timm's train.py says under "arch" what no tensor tells."""
    for beside in ({"arch": "resnetaa50"}, {"args": {"model": "resnetblur18", "lr": 0.1}}):
        found = statedict.match({"epoch": 5, "state_dict": small} | beside)
        assert found.config == dataclasses.replace(SMALL, antialias="average" if "arch" in beside else "blur")
        assert any("settings stated by the file: antialias" in note for note in found.notes)
    with pytest.raises(WeightsError, match=r"says that its network is a resnetblur9.*does not have this function"):
        statedict.match({"arch": "resnetblur9", "state_dict": small})
    found = statedict.match({"arch": "my_net", "state_dict": small})
    assert found.notes == (
        "the file calls its network 'my_net', but its tensors are those of a ResNet that is not in the zoo",
    )
    assert not statedict.match({"arch": "resnet18", "state_dict": tensors_of(zoo.configure("resnet18"))}).notes


def test_parts_of_timms() -> None:
    """Sizes of attention, of a stem, of first convolutions; and what is told by a name alone."""
    deep = {"stem": "deep", "stem_channels": 16, "shortcut": "average"}
    for config in (
        ResNetConfig("bottleneck", (1, 2), (8, 16), 3, attention="se", reduction=4, **deep),
        ResNetConfig("basic", (1, 1), (8, 16), 3, attention="eca", stem="deep_tiered"),
        ResNetConfig(("basic", "bottleneck"), (1, 1), (8, 16), 3, stem="deep_conv", stem_channels=24),
        ResNetConfig("bottleneck", (1, 1), (16, 24), 3, groups=4, width_per_group=32, reduce_first=2, attention="se"),
        ResNetConfig("bottleneck", (1, 1), (16, 24), 3, shortcut="projection_3x3"),
        dataclasses.replace(SMALL, stem_channels=8),
    ):
        found = statedict.match(tensors_of(config))
        assert (found.config, found.notes) == (config, ())
        assert same(found, tensors_of(config))
        again = infer.find({key: value.shape for key, value in tensors_of(config, "children").items()})
        assert again is not None
        assert again.dialect == "children"


def test_groupnorm_is_told_by_a_name() -> None:
    """A file of parameters alone has the same tensors."""
    config = dataclasses.replace(SMALL, widths=(32, 64, 96, 128), norm="group")
    with pytest.raises(WeightsError, match=r"no running statistics.*GroupNorm .name the architecture"):
        statedict.match(tensors_of(config))
    found = statedict.match({"arch": "resnet50_gn", "state_dict": tensors_of(config)})
    assert found.config == config


def test_a_dialect_without_names_for_parts() -> None:
    model = jresnet.ResNet(ResNetConfig("basic", (1, 1), (8, 16), 3, attention="se"), rngs=nnx.Rngs(0))
    assert len(statedict.state_dict(model)) == len(statedict.state_dict(model, "children"))
    with pytest.raises(jresnet.InputError, match=r"no names for the parts .* Use one of torchvision, children"):
        statedict.state_dict(model, "transformers")


# --- The head


@pytest.mark.parametrize("name", ["fc.1", "fc.0", "last_linear", "classifier", "classifier.1", "head", "head.fc"])
def test_heads_of_other_names(small: dict[str, np.ndarray], name: str) -> None:
    found = statedict.match({key.replace("fc.", f"{name}."): value for key, value in small.items()})
    assert same(found, small)
    assert (found.config, found.notes) == (SMALL, ())


@pytest.mark.parametrize("name", ["my_head", "out", "1"])
def test_the_only_layer_behind_the_body_is_the_head(small: dict[str, np.ndarray], name: str) -> None:
    """``1`` is that of Sequential(body, Linear)."""
    tensors = prefixed(body_of(small), "0." if name == "1" else "")
    tensors |= {f"{name}.{leaf}": small[f"fc.{leaf}"] for leaf in ("weight", "bias")}
    found = statedict.match(tensors)
    assert same(found, small)
    assert found.notes == (f"{name} is taken as the last layer: it is the only other layer",)
    for other in ({"z.weight": np.zeros((3, 10))}, {"bn.running_mean": np.zeros(16)}, {f"{name}.gain": np.zeros(1)}):
        assert statedict.match(tensors | other).headless
    wrong = tensors | {f"{name}.weight": np.zeros((10, 15), np.float32)}
    assert statedict.match(wrong).headless


def test_a_head_without_bias(small: dict[str, np.ndarray]) -> None:
    found = statedict.match({key: value for key, value in small.items() if key != "fc.bias"})
    np.testing.assert_array_equal(found.values["fc.bias"], np.zeros(10, np.float32))
    assert found.notes == ("fc has no bias: zeros are used",)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"fc.0.weight": (16, 16), "fc.0.bias": (16,), "fc.2.weight": (8, 16), "fc.2.bias": (8,)},
        {"projector.weight": (8, 16)},
        {"projection_head.0.weight": (8, 16), "prototypes.weight": (30, 8)},
    ],
)
def test_a_file_without_a_head(small: dict[str, np.ndarray], head: dict[str, tuple[int, ...]]) -> None:
    tensors = body_of(small) | {key: np.zeros(shape, np.float32) for key, shape in head.items()}
    assert torch2flax.convert(tensors).fc is None
    model = torch2flax.convert(tensors, num_classes=5, seed=3)
    assert model.fc.kernel[...].shape == (16, 5)
    assert np.abs(model.fc.kernel[...]).max() <= 16**-0.5  # drawn as PyTorch's
    np.testing.assert_array_equal(model.bn1.var[...], small["bn1.running_var"])
    (*_, note) = statedict.match(tensors, num_classes=5).notes
    assert all(key in note for key in head)


# --- Messages


def test_a_message_names_at_most_five_keys_of_a_kind() -> None:
    tensors = tensors_of(zoo.configure("resnet50"))
    tensors = {key: value for key, value in tensors.items() if "running_mean" not in key}
    tensors |= {f"layer1.0.se.{i}.weight": np.zeros(1, np.float32) for i in range(50)}
    with pytest.raises(WeightsError) as caught:
        statedict.match(tensors)
    message = str(caught.value)
    assert "53 missing: bn1.running_mean, " in message
    assert "and 48 more; 50 unexpected: " in message
    assert len(message) < 700


@pytest.mark.parametrize("dtype", [np.int8, np.complex64])
def test_wrong_dtypes_are_one_kind(small: dict[str, np.ndarray], dtype: type) -> None:
    with pytest.raises(WeightsError, match=r"\): 62 of type \w+, not floating point: (\S+, ){4}\S+ and 57 more$"):
        statedict.match({key: value.astype(dtype) for key, value in small.items()})


def test_no_resnet_at_all() -> None:
    tensors = {f"blocks.{i}.qkv.weight": np.zeros((3, 3), np.float32) for i in range(12)}
    with pytest.raises(WeightsError, match=r"contains no ResNet: expected tensors such as conv1\.weight.*and 7 more$"):
        statedict.match(tensors)


@pytest.mark.parametrize("key", ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.0.downsample.0.weight"])
@pytest.mark.parametrize("wrong", [True, False])
def test_one_wrong_tensor_is_the_one_that_is_named(small: dict[str, np.ndarray], key: str, wrong: bool) -> None:
    tensors = {name: value for name, value in small.items() if name != key}
    if wrong:
        tensors[key] = np.zeros((3, 2), np.float32)
    said = rf"1 misshapen: {key} is \[3, 2\], not \[.*\]$" if wrong else rf"1 missing: {key}$"
    with pytest.raises(WeightsError, match=said):
        statedict.match(tensors)


def test_a_strangers_sizes_reserve_no_memory(small: dict[str, np.ndarray]) -> None:
    """An empty tensor may have any shape and takes no byte of a file; a network of that width would."""
    for key in ("conv1.weight", "fc.weight"):
        with pytest.raises(WeightsError, match=r"misshapen"):
            statedict.match(small | {key: np.zeros((10**12, 0, 3, 3)[: small[key].ndim], np.float32)})
    wide = {key: np.zeros((10**12, 0), np.float32) for key in small}
    with pytest.raises(WeightsError, match=r"misshapen"):
        statedict.match(wide)
