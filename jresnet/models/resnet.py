"""ResNets (He et al. 2016, arXiv:1512.03385) in Flax NNX: the file to read first.

    images [N, H, W, C] -> stem -> layer1 ... layer4 (or layer3) -> global average -> fc -> logits [N, num_classes]

Submodules have torchvision's names, so that the path of a weight differs from PyTorch's key only in its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jresnet.errors import InputError
from jresnet.kernels import add_relu, every_second, global_average_pool, relu
from jresnet.models import paths, zoo
from jresnet.models.config import EXPANSION, ResNetConfig
from jresnet.models.layers import BatchNorm, Conv, Images, Linear, as_dtype
from jresnet.models.parts import Parts, through


class BasicBlock(nnx.Module):
    """Residual block of two 3x3 convolutions, with the stride in the first (figure 5, left, of the paper).

    Args:
        inputs: number of input channels.
        outputs: output channels of the first convolution, of the second, and of the block.
        stride: stride of the block.
        dilations: dilation and padding of the first 3x3 convolution, and of the second if there is one.
        parts: builds the layers of the network.
        stage: index of the stage, from 0.
        downsample: layers of the shortcut; empty if the input is added unchanged or zero-padded.
    """

    expansion = EXPANSION["basic"]

    def __init__(
        self,
        inputs: int,
        outputs: tuple[int, int, int],
        stride: int,
        dilations: tuple[int, int],
        parts: Parts,
        stage: int,
        downsample: nnx.List,
    ):
        (width, _, planes), (first, second) = outputs, dilations
        self.aa = parts.antialias(stride, dilations)
        self.conv1 = parts.conv(inputs, width, 3, 1 if self.aa else stride, first, dilation=first)
        self.bn1 = parts.norm(width)
        self.conv2 = parts.conv(width, planes, 3, 1, second, dilation=second)
        self.bn2 = parts.norm(planes)
        self.se = parts.attention(stage, planes)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "n h w c"], train: bool | None = None) -> Float[Array, "n h2 w2 c2"]:
        y = relu(self.bn1(self.conv1(x), train))
        y = self.aa(y) if self.aa else y
        y = self.bn2(self.conv2(y), train)
        y = self.se(y) if self.se else y
        return add_relu(y, shortcut(self.downsample, x, y.shape, train))


class Bottleneck(nnx.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions; the arguments are those of :class:`BasicBlock`.

    The stride is in the 3x3 convolution ("v1.5", torchvision) or in the first 1x1 (paper).
    """

    expansion = EXPANSION["bottleneck"]

    def __init__(
        self,
        inputs: int,
        outputs: tuple[int, int, int],
        stride: int,
        dilations: tuple[int, int],
        parts: Parts,
        stage: int,
        downsample: nnx.List,
    ):
        narrow, width, planes = outputs
        self.aa = parts.antialias(stride, dilations)
        first, second = (stride, 1) if parts.config.stride_in == "1x1" else (1, 1 if self.aa else stride)
        self.conv1 = parts.conv(inputs, narrow, 1, first)
        self.bn1 = parts.norm(narrow)
        self.conv2 = parts.conv(narrow, width, 3, second, dilations[0], parts.config.groups, dilation=dilations[0])
        self.bn2 = parts.norm(width)
        self.conv3 = parts.conv(width, planes, 1)
        self.bn3 = parts.norm(planes)
        self.se = parts.attention(stage, planes)
        self.downsample = downsample

    def __call__(self, x: Float[Array, "n h w c"], train: bool | None = None) -> Float[Array, "n h2 w2 c2"]:
        y = relu(self.bn1(self.conv1(x), train))
        y = relu(self.bn2(self.conv2(y), train))
        y = self.aa(y) if self.aa else y
        y = self.bn3(self.conv3(y), train)
        y = self.se(y) if self.se else y
        return add_relu(y, shortcut(self.downsample, x, y.shape, train))


def shortcut(
    downsample: nnx.List, x: Float[Array, "n h w c"], shape: tuple[int, ...], train: bool | None
) -> Float[Array, "n h2 w2 c2"]:
    """The shortcut connection: projects ``x`` with ``downsample``, zero-pads it (option A), or returns it unchanged."""
    if downsample:
        return through(downsample, x, train)
    if x.shape == shape:
        return x
    new = shape[-1] - x.shape[-1]
    if x.shape[1:3] != shape[1:3]:  # they are equal if the block is dilated instead of strided
        x = every_second(x)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


# block(x, train) with rematerialisation: only x is stored for the backward pass
_rematerialized: Callable = nnx.remat(lambda block, x, train: block(x, train), static_argnums=2)


class ResNet(nnx.Module):
    """A ResNet; :func:`jresnet.create` builds one by name.

    A new model is in evaluation mode. ``model.train()`` and ``model.eval()`` set the mode of ``model(x)``;
    ``model(x, train=True)`` and ``model(x, train=False)`` choose the mode of one call. In training mode BatchNorm normalises
    with the batch's statistics and updates the running statistics in place. The mode also applies to a custom head, such as
    ``model.fc = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(512, 7, rngs=rngs))``.

    Args:
        config: the architecture.
        zero_init_residual: initialise each block's last BN scale to 0, so that every block starts as its shortcut
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        dtype: compute dtype of the convolutions, such as ``jnp.bfloat16``. Parameters, BN statistics, the global average
            and the logits stay float32. ``None``: the wider of the input's and the parameters' dtypes.
        remat: rematerialisation: in training, store only each block's input for the backward pass and recompute the rest,
            which saves memory and costs a third more arithmetic (Chen et al. 2016, arXiv:1604.06174;
            ``torch.utils.checkpoint``).
        rngs: source of the initial parameters; ``None``: parameters have only shapes, to be filled from a file.
    """

    def __init__(
        self,
        config: ResNetConfig,
        *,
        zero_init_residual: bool = False,
        dtype: DTypeLike | None = None,
        remat: bool = False,
        rngs: nnx.Rngs | None,
    ):
        parts = Parts(config, partial(Conv, bias=config.conv_bias, dtype=as_dtype(dtype), rngs=rngs), rngs)
        self.config, self.remat = config, remat
        self.deterministic = True  # evaluation mode, set by train() and eval(), which set use_running_average in a BN
        channels = config.stem_outputs
        self.conv1 = parts.stem()
        self.bn1 = parts.norm(channels)
        self.maxpool = parts.stem_pool()
        dilation = 1
        for i, (kind, depth) in enumerate(zip(config.blocks, config.depths, strict=True)):
            blocks = []
            stride, last_dilation = config.strides[i]
            for j in range(depth):
                outputs, dilations = config.channels(i, j), (dilation, last_dilation)
                # Does not depend on dilation: a network has the same parameters at every output stride.
                projects = (i > 0 and j == 0) or channels != outputs[-1]
                projects = projects or (config.shortcut == "projection_first" and j == 0)
                downsample: nnx.List = nnx.List([])
                if projects and config.shortcut != "pad":
                    downsample = parts.projection(channels, outputs[-1], stride, dilations)
                block: Any = Bottleneck if kind == "bottleneck" else BasicBlock
                blocks.append(block(channels, outputs, stride, dilations, parts, i, downsample))
                if zero_init_residual:
                    last = blocks[-1].bn3 if kind == "bottleneck" else blocks[-1].bn2
                    last.scale[...] = jnp.zeros_like(last.scale[...])
                channels, stride, dilation = outputs[-1], 1, last_dilation
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.fc = nnx.data(Linear(channels, config.num_classes, rngs=rngs) if config.num_classes else None)

    @property
    def arch(self) -> str | None:
        """The model's name in :func:`jresnet.list_models`, regardless of classes and channels; None if it has no name."""
        return zoo.name_of(self.config)

    @property
    def num_features(self) -> int:
        """The number of features that :meth:`embed` returns and the head takes."""
        return self.config.num_features

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a copy; called by ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic

    def features(
        self, x: Images, train: bool | None = None, names: str | Sequence[str] | None = None
    ) -> dict[str, Float[Array, "n _ _ _"]]:
        """Returns the outputs of stages and blocks by name.

        Args:
            x: images, as in :meth:`__call__`.
            train: mode, as in :meth:`__call__`.
            names: ``"stem"``, stages such as ``"layer2"`` and blocks such as ``"layer2.0"``. Layers after the last of them
                are not computed. ``None``: the stem and every stage.

        Returns:
            Feature maps ``[N, H', W', C']`` by name.

        Raises:
            InputError: unknown name; the message suggests similar ones. Other errors as in :meth:`__call__`.
        """
        stages = ["stem", *(f"layer{i + 1}" for i in range(len(self.config.depths)))]
        wanted = stages if names is None else [names] if isinstance(names, str) else list(names)
        last = max((self._position(name) for name in wanted), default=0)
        found = {}
        y = checked(x, self.config.in_channels)
        y = through(self.conv1, y, train) if isinstance(self.conv1, nnx.List) else self.conv1(y)
        y = found["stem"] = through(self.maxpool, relu(self.bn1(y, train)), train)
        for name, block in list(self._blocks())[:last]:
            y = self._apply(block, y, train)
            found[name] = found[name.partition(".")[0]] = y
        return {name: found[name] for name in wanted}

    def logits_from(
        self, name: str, y: Float[Array, "n _ _ _"], train: bool | None = None
    ) -> Float[Array, "n classes"]:
        """Computes the logits from the output ``y`` of a stage or block, by applying the layers after it.

        ``model.logits_from("layer2.0", model.features(x, names="layer2.0")["layer2.0"])`` is ``model(x)``.

        Args:
            name: name of the stage or block, as in :meth:`features`.
            y: its output.
            train: mode, as in :meth:`__call__`.

        Returns:
            Logits, as in :meth:`__call__`.

        Raises:
            InputError: unknown name.
        """
        for _, block in list(self._blocks())[self._position(name) :]:
            y = self._apply(block, y, train)
        return self._head(global_average_pool(y), train)

    def _blocks(self) -> Iterator[tuple[str, Callable]]:
        """Yields the name and the block of every block in order; names are such as ``layer1.0``."""
        for i in range(len(self.config.depths)):
            for j, block in enumerate(getattr(self, f"layer{i + 1}")):
                yield f"layer{i + 1}.{j}", block

    def _position(self, name: str) -> int:
        """The number of blocks to apply to obtain the output of that name."""
        known = {"stem": 0}
        for number, (block, _) in enumerate(self._blocks(), 1):
            known[block] = known[block.partition(".")[0]] = number
        if name not in known:
            raise paths.unknown(name, known, "stage or block of this network")
        return known[name]

    def _apply(self, block: Callable, y: Float[Array, "n h w c"], train: bool | None) -> Float[Array, "n h2 w2 c2"]:
        return _rematerialized(block, y, train) if self.remat and self._trains(train) else block(y, train)

    def freeze_statistics(self, *names: str, frozen: bool = True) -> None:
        """Freezes BatchNorm statistics: these layers use their running statistics in training too and do not update them.

        This is like ``eval()`` on these modules in PyTorch, but later calls of ``model.train()`` or ``model(x, train=True)``
        do not undo it. Scale and bias are still trained; :func:`jresnet.optim.freeze` freezes them. Copies of the model keep
        the setting, native files do not store it.

        Args:
            names: parts such as ``"stem"``, ``"layer1"``, ``"layer*.bn1"`` (:mod:`jresnet.models.paths`); none: all layers.
            frozen: ``False`` undoes it.

        Raises:
            InputError: no part with a jresnet BatchNorm has such a name; the model is then left unchanged.
        """
        norms = {".".join(map(str, path)): m for path, m in nnx.iter_modules(self) if isinstance(m, BatchNorm)}
        if not norms:
            raise InputError(
                "this model has no BatchNorm whose statistics could be frozen: it is fused or uses GroupNorm"
            )
        for path in set().union(*(paths.select(name, norms) for name in names or ("*",))):
            norms[path].frozen = frozen

    def embed(self, x: Images, train: bool | None = None) -> Float[Array, "n features"]:
        """Returns the features that the head takes, ``[N, num_features]``: the last stage's output averaged over its pixels.

        Arguments and errors are those of :meth:`__call__`.
        """
        last = f"layer{len(self.config.depths)}"
        return global_average_pool(self.features(x, train, last)[last])

    def __call__(self, x: Images, train: bool | None = None) -> Float[Array, "n classes"]:
        """Computes the logits of normalised images.

        Args:
            x: floating-point images ``[N, H, W, in_channels]``. H and W are free; 224 for the ImageNet stem and 32 for the
                CIFAR stem are usual.
            train: ``True``: BatchNorm normalises with this batch's statistics and updates the running ones. ``None``: the
                mode that ``model.train()`` or ``model.eval()`` set last. Each BatchNorm has its own mode, so that calling
                ``eval()`` on a part of the model freezes that part.

        Returns:
            Logits ``[N, num_classes]``, float32 or wider; without a head the result of :meth:`embed`.

        Raises:
            ValueError: wrong rank or number of channels; or, in training, only one value per channel.
            TypeError: the images are integers.
        """
        return self._head(self.embed(x, train), train)

    def _head(self, features: Float[Array, "n features"], train: bool | None) -> Float[Array, "n classes"]:
        if self.fc is None:
            return features
        if isinstance(self.fc, Linear) or not isinstance(self.fc, nnx.Module):
            return self.fc(features)
        still = not self._trains(train)  # Flax's Dropout starts in training mode, whatever the model's mode
        head = nnx.view(self.fc, deterministic=still, use_running_average=still, raise_if_not_found=False)
        return head(features)

    def _trains(self, train: bool | None) -> bool:
        return not self.deterministic if train is None else train


def checked(x: Images, channels: int) -> Float[Array, "n h w c"]:
    """Checks images and converts them to a JAX array.

    Raises:
        ValueError: wrong rank or number of channels, or height or width is 0.
        TypeError: the images are integers.
    """
    array = jnp.asarray(x)  # converts numpy's float64 to JAX's default dtype
    if array.ndim != 4 or array.shape[-1] != channels:
        raise ValueError(f"expected images [N, H, W, {channels}] (channels last), got shape {tuple(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"expected normalised floating-point images, got {array.dtype}: use (x / 255 - mean) / std")
    if any(isinstance(size, int) and size == 0 for size in array.shape[1:3]):  # sizes may be symbolic, in jax.export
        raise ValueError(f"expected images of at least one pixel, got shape {tuple(array.shape)}")
    return array
