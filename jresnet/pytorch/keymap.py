"""Maps the paths of a jresnet model to PyTorch's keys and layouts: a renaming of leaves, then one table per dialect.

Every dialect is a bijection on the keys of a model, built from the model's own paths, so that missing or unexpected keys in
a file are detected.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# jresnet's leaf -> PyTorch's leaf. A kernel and a BN's scale are both "weight"; no module has both.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# PyTorch's BatchNorm counts its batches beside the running variance. It reads the count only if momentum is None, which no
# ResNet uses.
COUNTER = "num_batches_tracked"

# Entries that wrappers add: torch.optim.swa_utils.AveragedModel counts its updates.
IGNORED = ("n_averaged",)

# Buffers that profilers add to every module: thop counts operations and parameters.
PROFILED = ("total_ops", "total_params")

# Module names that wrappers insert into keys: FSDP, activation checkpointing, torch.compile of single blocks.
BETWEEN = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")

# Names by which one of several networks of the same size in a file is preferred (FIRST) or not (LAST): averaged weights are
# used for evaluation (timm's load_checkpoint prefers them, DINO evaluates its teacher), and MoCo trains its encoder_q.
FIRST = re.compile(r"(^|[._])(ema|teacher)([._]|$)|(^|[._])ema_|model_ema")
LAST = re.compile(r"(^|[._])(student|encoder_k|momentum_encoder|target_encoder)([._]|$)")

# Parts of networks that jresnet does not support, by patterns of their keys. Error messages name them.
OTHER_PARTS = (
    (r"\.(se|se_module|se_block|senet|attn_se)\.|layer\d+\.\d+\.fc[12]?\.", "squeeze-and-excitation"),
    (r"\.(eca|cbam|ca|sa|attn|attention|gc|sk|bam)\.|conv2\.fc\d", "attention in the blocks"),
    (
        r"(^|\.)conv1\.[36]\.weight|stem\.[036]\.weight|downsample\.2\.weight",
        "a deep stem, or a pool in the shortcuts (ResNet-D)",
    ),
    (r"\.convs\.\d|\.bns\.\d", "blocks of several scales (Res2Net)"),
    (r"(^|\.)gn\d?\.", "GroupNorm"),
    (r"\.weight_(orig|mask)$", "pruning masks (torch.nn.utils.prune.remove makes weights of them)"),
    (r"\.parametrizations\.|\.weight_[guv]$", "reparametrised weights (remove_parametrizations makes weights of them)"),
    (r"(^|\.)attnpool\.", "an attention pool (CLIP's ResNet)"),
    (r"\.(zero_point|_packed_params)|\.scale$", "quantised layers"),
    (r"\.(IN|BN)\.(weight|bias)", "InstanceNorm beside BatchNorm (IBN-Net)"),
)

# Networks that are not ResNets, by patterns of their keys.
OTHER_NETWORKS = (
    (r"stages\.\d+\.blocks\.\d+\.norm1\.", "a pre-activation ResNet of timm (resnetv2)"),
    (r"(^|\.)res\d\.\d+\.conv1\.|(^|\.)res\d_\d+_branch", "a ResNet with detectron2's or Caffe's names"),
    (r"stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw)\.", "a ConvNeXt"),
    (r"blocks\.\d+\.attn\.|encoder\.layer\.\d+\.attention\.|encoder_layer_\d+\.", "a Vision Transformer"),
    (r"features\.denseblock\d", "a DenseNet"),
    (r"features\.\d+\.block\.|blocks\.\d+\.\d+\.conv_pwl", "an EfficientNet"),
    (r"features\.\d+\.conv\.\d", "a MobileNet"),
    (r"features\.\d+\.weight", "a VGG or AlexNet"),
    (r"(down_blocks|up_blocks|inc\.double_conv)", "a U-Net"),
)

# Names of modules that may contain the last layer, if it does not have the dialect's name.
HEADS = ("fc", "linear", "classifier", "last_linear", "head", "cls_head", "logits", "output")

# Names of layers behind the body that are no last layer: the projection heads of self-supervised training.
PROJECTIONS = re.compile(r"proj|predict|prototype|queue|embed|contrast|mlp", re.IGNORECASE)


@dataclass(frozen=True)
class Dialect:
    """The names of tensors in one family of PyTorch networks, and the common properties of these networks."""

    # (pattern, replacement), applied in order: torchvision's key -> the dialect's
    renames: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()  # the same, for second names under which tensors are registered again
    root: str = ""  # prefix of all names but the head's; a file with only the body omits it
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of ResNetConfig that its networks share
    parts: bool = False  # whether its networks may have timm's parts, such as deep stems and attention
    stages: int | None = None  # number of stages, if only that distinguishes the dialect from another one
    num_classes: int | None = None  # number of classes of the data set; None: the architecture's default
    statistics: str | None = (
        None  # statistics that normalise its images, a name in jresnet.weights.preprocessing.STATISTICS
    )


DIALECTS: Mapping[str, Dialect] = {
    # pytorch/vision, and timm (huggingface/pytorch-image-models), which uses the same names
    "torchvision": Dialect(parts=True),
    # akamaster/pytorch_resnet_cifar10, with the paper's option A
    "akamaster": Dialect(
        renames=((r"^fc\.", "linear."),),
        config={"stem": "cifar", "shortcut": "pad"},
        num_classes=10,
        statistics="imagenet",
    ),
    # kuangliu/pytorch-cifar; akamaster's option B has the same names at the depths of the CIFAR family
    "kuangliu": Dialect(
        renames=((r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut.")),
        config={"stem": "cifar", "shortcut": "projection"},
        num_classes=10,
        statistics="kuangliu",
    ),
    # weiaicunzai/pytorch-cifar100: nn.Sequential of convolution, BN and ReLU; the ReLU takes an index but has no tensors
    "weiaicunzai": Dialect(
        renames=(
            (r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."),
            (r"^layer1\.", "conv2_x."), (r"^layer2\.", "conv3_x."), (r"^layer3\.", "conv4_x."), (r"^layer4\.", "conv5_x."),
            (r"\.conv1\.", ".residual_function.0."), (r"\.bn1\.", ".residual_function.1."),
            (r"\.conv2\.", ".residual_function.3."), (r"\.bn2\.", ".residual_function.4."),
            (r"\.conv3\.", ".residual_function.6."), (r"\.bn3\.", ".residual_function.7."),
            (r"\.downsample\.", ".shortcut."),
        ),
        config={"stem": "cifar", "shortcut": "projection"},
        num_classes=100,
        statistics="cifar100",
    ),
    # chenyaofo/pytorch-cifar-models: torchvision's names at the depths of the CIFAR family, with the paper's option B
    "chenyaofo": Dialect(
        config={"stem": "cifar", "shortcut": "projection"},
        stages=3,
        num_classes=10,
        statistics="kuangliu",
    ),
    # The tutorial's ResNet-34, which registers the stages twice: by name and in a list
    "resnet34_projection": Dialect(
        renames=(
            (r"^conv1\.", "pre.0."), (r"^bn1\.", "pre.1."),
            (r"\.conv1\.", ".left.0."), (r"\.bn1\.", ".left.1."), (r"\.conv2\.", ".left.3."), (r"\.bn2\.", ".left.4."),
            (r"\.downsample\.", ".right."),
        ),
        aliases=(
            (r"^layer1\.", "Conv.0."), (r"^layer2\.", "Conv.1."), (r"^layer3\.", "Conv.2."), (r"^layer4\.", "Conv.3."),
        ),
        config={"shortcut": "projection_first"},
    ),
    # Dive into Deep Learning, section 8.6: Sequential(b1, ..., b5, AdaptiveAvgPool2d, Flatten, Linear)
    "resnet18_d2l": Dialect(
        renames=(
            (r"^conv1\.", "0.0."), (r"^bn1\.", "0.1."), (r"^fc\.", "7."), (r"\.downsample\.0\.", ".conv3."),
            (r"^layer1\.", "1."), (r"^layer2\.", "2."), (r"^layer3\.", "3."), (r"^layer4\.", "4."),
        ),
        config={"shortcut": "conv", "conv_bias": True},
    ),
    # ResNetForImageClassification of huggingface/transformers, such as microsoft/resnet-50; ResNetModel has no "resnet."
    "transformers": Dialect(
        renames=(
            (r"^conv1\.", "resnet.embedder.embedder.convolution."),
            (r"^bn1\.", "resnet.embedder.embedder.normalization."),
            (r"^fc\.", "classifier.1."),
            (r"^layer1\.", "resnet.encoder.stages.0.layers."), (r"^layer2\.", "resnet.encoder.stages.1.layers."),
            (r"^layer3\.", "resnet.encoder.stages.2.layers."), (r"^layer4\.", "resnet.encoder.stages.3.layers."),
            (r"\.conv1\.", ".layer.0.convolution."), (r"\.bn1\.", ".layer.0.normalization."),
            (r"\.conv2\.", ".layer.1.convolution."), (r"\.bn2\.", ".layer.1.normalization."),
            (r"\.conv3\.", ".layer.2.convolution."), (r"\.bn3\.", ".layer.2.normalization."),
            (r"\.downsample\.0\.", ".shortcut.convolution."), (r"\.downsample\.1\.", ".shortcut.normalization."),
        ),
        root="resnet.",
        config={"stem": "imagenet", "shortcut": "projection"},
    ),
    # nn.Sequential(*resnet.children()), without the last layers or with a Flatten before the last one; fastai's body
    "children": Dialect(
        renames=(
            (r"^conv1\.", "0."), (r"^bn1\.", "1."), (r"^maxpool\.", "3."), (r"^fc\.", "10."),
            (r"^layer1\.", "4."), (r"^layer2\.", "5."), (r"^layer3\.", "6."), (r"^layer4\.", "7."),
        ),
        config={"stem": "imagenet", "shortcut": "projection"},
        parts=True,
    ),
}  # fmt: skip


@functools.lru_cache(1 << 16)
def torch_key(path: str, dialect: str = "torchvision") -> str:
    """Converts a path to the key in ``dialect``: ``layer1.0.bn1.scale`` -> ``layer1.0.bn1.weight``."""
    module, _, leaf = path.rpartition(".")
    return _replaced(f"{module}.{LEAVES[leaf]}", DIALECTS[dialect].renames)


def counter_key(path: str, dialect: str = "torchvision") -> str:
    """The key of the counter beside a running variance: ``bn1.var`` -> ``bn1.num_batches_tracked``."""
    return f"{torch_key(path, dialect).rpartition('.')[0]}.{COUNTER}"


def alias(key: str, dialect: str) -> str | None:
    """The second name of the tensor with this key in ``dialect``; None if it has only one name."""
    second = _replaced(key, DIALECTS[dialect].aliases)
    return second if second != key else None


def _replaced(key: str, replacements: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in replacements:
        key = re.sub(pattern, replacement, key)
    return key


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Converts a shape to PyTorch's layout: HWIO -> OIHW, IO -> OI."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def to_flax(value: np.ndarray) -> np.ndarray:
    """Transposes OIHW -> HWIO, OI -> IO. The result is contiguous, because safetensors scrambles other arrays."""
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)


def to_torch(value: np.ndarray) -> np.ndarray:
    """Transposes HWIO -> OIHW, IO -> OI: the inverse of :func:`to_flax`. The result is contiguous."""
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)
