"""timm's 81 ResNets: the names and shapes of its tensors, its logits, its training.

Names and shapes are compared on torch's meta device, where a network takes no memory. Logits are compared in float64 with
shallow and narrow networks of every part, and in float32 with timm's own networks: most of these with ``-m long``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import jresnet
from convert import reference, torch2flax, verify
from convert.installed import import_torchvision
from jresnet.models import params, zoo
from jresnet.models.config import ResNetConfig
from jresnet.models.layers import BatchNorm
from jresnet.pytorch import infer, keymap, statedict

import_torchvision()  # which timm imports, and which does not import by itself beside a CPU build of torch

import timm  # noqa: E402

NAMES = timm.list_models(module="resnet")
EXACT = 1e-10  # relative, in float64

WIDTHS = (8, 16, 24, 32)
PARTS = {
    "resnet-d": ResNetConfig("bottleneck", (1, 2, 1, 1), WIDTHS, 5, stem="deep", shortcut="average", stem_channels=16),
    "tiered, eca": ResNetConfig(
        "basic", (1, 1, 1, 1), WIDTHS, 5, stem="deep_tiered", shortcut="average", stem_channels=16, attention="eca"
    ),
    "resnet-rs": ResNetConfig(
        "bottleneck", (1, 1, 1, 1), WIDTHS, 5, stem="deep_conv", shortcut="average", stem_channels=16, attention="se",
        reduction=4,
    ),
    "senet": ResNetConfig(
        "bottleneck", (1, 1, 1, 1), (16, 24, 32, 40), 5, stem="deep", shortcut="projection_3x3", attention="se", groups=8,
        width_per_group=16, reduce_first=2, stem_channels=32,
    ),
    "blur": ResNetConfig("basic", (1, 1, 2, 1), WIDTHS, 5, antialias="blur", stem_channels=64),
    "average": ResNetConfig(
        "bottleneck", (1, 1, 2, 1), WIDTHS, 5, antialias="average", stem="deep", shortcut="average", stem_channels=16
    ),
    "group": ResNetConfig("bottleneck", (1, 1, 1, 1), (32, 64, 96, 128), 5, norm="group", stem_channels=64),
    "unequal": ResNetConfig(
        ("basic", "basic", "bottleneck", "basic"), (1, 1, 1, 1), (32, 48, 48, 96), 5, stem="deep", shortcut="average"
    ),
}  # fmt: skip

# Of every part one, in as few networks of as few stages as may be: most of such a test is compilation.
TRAINED = {
    "resnet-rs": dataclasses.replace(PARTS["resnet-rs"], depths=(1, 1), widths=(8, 16)),
    "unequal, tiered, eca": ResNetConfig(
        ("basic", "bottleneck", "basic"), (1, 1, 1), (8, 16, 32), 5, stem="deep_tiered", shortcut="average",
        stem_channels=16, attention="eca",
    ),
    "senet, average": dataclasses.replace(PARTS["senet"], antialias="average", depths=(1, 1), widths=(16, 24)),
    "group, blur": dataclasses.replace(PARTS["group"], antialias="blur", depths=(1, 1), widths=(32, 64)),
}  # fmt: skip
DILATED = {
    "resnet-d": 8,
    "senet": 8,
    "blur": 16,
}  # parts with their own way with dilation: a stage or two keeps its stride


def images(config: ResNetConfig, batch: int = 3) -> np.ndarray:
    """Of an odd size in the later stages, but where pairs of pixels are averaged in the blocks."""
    size = (64, 96) if config.antialias == "average" else (72, 56)
    return np.random.default_rng(0).standard_normal((batch, *size, config.in_channels))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def pair(config: ResNetConfig) -> tuple[Any, torch.nn.Module]:
    """jresnet's and timm's network of the same random float64 weights."""
    torch.manual_seed(0)
    theirs: Any = reference.network(None, config)
    for stage in range(len(config.depths), 4):  # timm's has four
        setattr(theirs, f"layer{stage + 1}", torch.nn.Identity())
    reference.randomise(theirs)
    told = {name: getattr(config, name) for name in infer.UNTOLD}
    found = statedict.match(theirs.state_dict(), **told)
    assert found.config == config
    return params.fill(
        config, {path: value.astype(np.float64) for path, value in found.values.items()}
    ), theirs.double()


def test_the_zoo_has_all_of_timms_names() -> None:
    assert len(NAMES) == 81
    assert set(NAMES) == zoo.IN_TIMM


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_timms(name: str) -> None:
    """Names, shapes, their order and their number; and the network is found from them."""
    with torch.device("meta"):
        theirs: Any = timm.create_model(name, pretrained=False)
    config = zoo.ZOO[name].config
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = {}
    shapes = params.shapes(config)
    for path in sorted(shapes, key=statedict._rank):
        found[keymap.torch_key(path)] = keymap.torch_shape(shapes[path])
        if path.endswith(".var"):
            found[keymap.counter_key(path)] = ()
    assert list(found.items()) == list(wanted.items())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == zoo.ZOO[name].parameters
    network = infer.find(wanted)
    assert network is not None
    told = infer.configure(network, wanted, antialias=config.antialias, norm=config.norm)
    assert (told, infer.row(told)) == (config, name)


@pytest.mark.parametrize(
    ("part", "output_stride"),
    [
        *((part, DILATED.get(part)) for part in PARTS),
        *(pytest.param(part, None, marks=pytest.mark.long) for part in DILATED),
    ],
)
def test_parts_are_timms_in_float64(part: str, output_stride: int | None) -> None:
    """Whole, fused, and by its stages; dilated where a part has its own way with dilation."""
    config = dataclasses.replace(PARTS[part], output_stride=output_stride)
    with jax.enable_x64(True):
        model, theirs = pair(config)
        x = images(config)
        stages: dict[str, np.ndarray] = {}
        for name, module in theirs.named_children():
            if name.startswith("layer") or name == "maxpool":
                key = "stem" if name == "maxpool" else name
                module.register_forward_hook(
                    lambda module, inputs, output, key=key: stages.update({key: output.numpy().transpose(0, 2, 3, 1)})
                )
        with torch.no_grad():
            expected = theirs.eval()(nchw(x)).numpy()
        features = model.features(jnp.asarray(x))
        assert features.keys() == stages.keys()
        for name, value in features.items():
            assert verify.relative(value, stages[name]) < EXACT, name
        assert verify.relative(model(jnp.asarray(x)), expected) < EXACT
        fused = jresnet.fuse(model)
        assert not [module for _, module in nnx.iter_modules(fused) if isinstance(module, BatchNorm)]
        assert verify.relative(fused(jnp.asarray(x)), expected) < EXACT


@pytest.mark.parametrize("part", TRAINED)
def test_three_training_steps_are_timms(part: str) -> None:
    """Losses, gradients, parameters and running statistics over three steps of SGD, in float64."""
    config, rate = TRAINED[part], 0.01
    labels = np.array([0, 3, 4])
    with jax.enable_x64(True):
        model, theirs = pair(config)
        x = images(config)
        graph, weights, rest = nnx.split(model, nnx.Param, ...)
        theirs.train()
        optimizer = torch.optim.SGD(theirs.parameters(), rate)

        @jax.jit
        def step(weights: nnx.State, rest: nnx.State) -> Any:
            def loss(weights: nnx.State) -> Any:
                model = nnx.merge(graph, weights, rest, copy=True)
                logits = model(jnp.asarray(x), train=True)
                chosen = jax.nn.log_softmax(logits)[jnp.arange(3), labels]
                return -chosen.mean(), nnx.split(model, nnx.Param, ...)[2]

            (value, rest_), slopes = jax.value_and_grad(loss, has_aux=True)(weights)
            return value, slopes, jax.tree.map(lambda w, s: w - rate * s, weights, slopes), rest_

        for i in range(3):
            value, slopes, weights, rest = step(weights, rest)
            expected = F.cross_entropy(theirs(nchw(x)), torch.from_numpy(labels))
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            assert float(value) == pytest.approx(expected.item(), rel=EXACT)
            if i == 0:
                gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
                compare(slopes, gradients)
        nnx.update(model, weights, rest)
        compare(nnx.state(model, (nnx.Param, nnx.BatchStat)), theirs.state_dict())


def compare(state: Any, tensors: dict[str, Any]) -> None:
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wanted = keymap.to_flax(tensors[keymap.torch_key(name)].detach().numpy())
        assert verify.relative(leaf[...], wanted) < EXACT, name


def small(name: str) -> bool:
    return name in ("test_resnet", "resnet10t")


@pytest.mark.as_users_do
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if small(name) else [pytest.mark.long]) for name in NAMES]
)
def test_logits_are_timms(name: str) -> None:
    """timm's own network of the name, whose float32 lies as far from its float64 as jresnet's does."""
    torch.manual_seed(0)
    theirs: Any = timm.create_model(name, pretrained=False)
    networks.randomise(theirs)
    model = torch2flax.convert(theirs.state_dict(), name)
    found = verify.compare(model, theirs, 64)
    print(f"{name}: {found}")
    assert found.is_rounding, found


def test_odd_maps_cannot_be_averaged() -> None:
    """timm's resnetaa50d fails at 72 pixels, too: its blocks leave out what its shortcuts average."""
    model = jresnet.ResNet(PARTS["average"], rngs=nnx.Rngs(0))
    with pytest.raises(
        jresnet.InputError, match=r"averages 2x2 pixels in its blocks, but a block's input has 9x9 pixels: give images"
    ):
        jax.eval_shape(model, jnp.zeros((1, 72, 72, 3)))
