"""Encoders that the command line can choose: a small one that is quick on a CPU, ResNet-18, and those of libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from . import library
from .library import takes_tokens

__all__ = [
    "ENCODERS",
    "WIDTHS",
    "BasicBlock",
    "build_encoder",
    "default_width",
    "resnet18",
    "small",
    "takes_tokens",
]


def build_encoder(name: str, shape: Sequence[int], width: int) -> nn.Module:
    """An encoder by its name, for inputs (N, *shape) -> features (N, width).

    shape: (d,), (height, width) or (channels, height, width), each at least 1. Those of ENCODERS give non-negative
    features. A vector (d,) gets the small one whatever the name; a transformer of transformers takes it as token ids.
    Weights are drawn from the global random generator, as He et al. (2015) do for ReLU. A name such as
    `torchvision:resnet18` is one of `library`, which says where its weights come from; if it has another width of its
    own, a linear layer and a ReLU follow.

    ValueError for another name, shape or width; ImportError where the library is not installed.
    """
    if name not in ENCODERS and not library.is_library(name):
        raise ValueError(f"encoder: expected one of {tuple(ENCODERS)}, got {name!r}")
    shape = tuple(shape)
    if len(shape) not in (1, 2, 3) or min(shape) < 1:
        raise ValueError(f"shape: expected (d,), (height, width) or (channels, height, width), each >= 1, got {shape}")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width: expected a positive integer, got {width!r}")
    if library.is_library(name) and (len(shape) > 1 or takes_tokens(name, shape)):
        own, encoder = library.width_of(name), library.build(name, shape)
        return encoder if own == width else nn.Sequential(encoder, nn.Linear(own, width), nn.ReLU())
    if len(shape) == 1:
        layers = [nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    elif len(shape) == 2:
        height, breadth = shape
        layers = [nn.Unflatten(1, (1, height)), *ENCODERS[name](1, height, breadth, width)]
    else:
        channels, height, breadth = shape
        layers = ENCODERS[name](channels, height, breadth, width)
    encoder = nn.Sequential(*layers)
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return encoder


def default_width(names: Iterable[str]) -> int:
    """The features that encoders of these names give by default: the most that one of them has of its own.

    The small encoder has no width of its own.
    """
    own = [library.width_of(n) if library.is_library(n) else WIDTHS.get(n, 0) for n in names if n != "small"]
    return max(own, default=WIDTHS["small"])


def small(channels: int, height: int, breadth: int, width: int) -> list[nn.Module]:
    """Up to three convolutions, each halving the image, and a linear layer.

    There is no normalisation: a batch may hold a single sample.
    """
    layers: list[nn.Module] = []
    for out_channels in (16, 32, 64):
        if channels >= 16 and min(height, breadth) <= 4:
            break
        layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1), nn.ReLU()]
        channels, height, breadth = out_channels, (height + 1) // 2, (breadth + 1) // 2
    return [*layers, nn.Flatten(), nn.Linear(channels * height * breadth, width), nn.ReLU()]


def resnet18(channels: int, height: int, breadth: int, width: int) -> list[nn.Module]:
    """ResNet-18 (He et al. 2016) up to its pooled 512 features; another width adds a linear layer and a ReLU.

    11.2 million parameters; images of any size, made for 224 × 224 and sensible from about 32 × 32.

    Group normalisation (Wu and He 2018), in 32 groups, stands where the paper's encoder has batch normalisation, so
    that a sample's features depend on that sample alone: a batch may hold a single one, of a single pixel in the last
    stages, where batch normalisation raises; ranks that train in parallel, each on its share of a batch, do what one
    process does, and have no running statistics to drift apart; training and evaluation mode agree.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False), nn.GroupNorm(32, 64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    inner = 64
    for out_channels in (64, 128, 256, 512):
        layers += [BasicBlock(inner, out_channels), BasicBlock(out_channels, out_channels)]
        inner = out_channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return layers if width == inner else [*layers, nn.Linear(inner, width), nn.ReLU()]


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut around them; where the channels grow, the image is halved."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        stride = 1 if channels == out_channels else 2
        self.first = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(32, out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(32, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            projection = nn.Conv2d(channels, out_channels, 1, stride=2, bias=False)
            self.shortcut = nn.Sequential(projection, nn.GroupNorm(32, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


ENCODERS: dict[str, Callable[[int, int, int, int], list[nn.Module]]] = {"small": small, "resnet18": resnet18}
WIDTHS = {"small": 128, "resnet18": 512}  # features that each gives by default
