"""The layers whose steps can be projected: each multiplies rows of features (N, s) by a weight of C rows of s numbers.

A convolution does so with the patches that it sees, and s = C_in · k · k: as in orthogonal weight modification (Zeng et
al. 2019).
"""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import describe
from .links import see
from .reference import accumulate_dtype

__all__ = ["CANNOT_ATTACH", "LAYERS", "check_layer", "find_heads", "named_heads", "patch_mean", "row_size"]

LAYERS = (nn.Linear, nn.Conv2d)
CANNOT_ATTACH = see("troubleshooting#a-head-that-cannot-be-attached")


def row_size(weight: Tensor) -> int:
    """s of a weight (C, s), or (C, C_in, k, k)."""
    return math.prod(weight.shape[1:])


def check_layer(layer: nn.Module) -> None:
    """Raises ValueError for a convolution in groups, whose weight is several that see different features."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(f"head: expected a convolution with groups=1, got groups={layer.groups}{CANNOT_ATTACH}")


def patch_mean(layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, int]:
    """The mean (s,) of all patches that a convolution of images (N, C_in, H, W) multiplies, and how many they are.

    Padding counts, as the weight meets it too. The mean image has the same mean patch, so only its patches are made.
    """
    image = images.to(accumulate_dtype(images.dtype)).mean(dim=0, keepdim=True)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    image = F.pad(image, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(image, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # (1, s, positions)
    return patches[0].mean(dim=1), len(images) * patches.shape[2]


def find_heads(model: nn.Module, pattern: str) -> list[nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of `model` that a regular expression names, for `heads=` of an optimizer.

    pattern must match the whole name, as in `model.named_modules()`, of a layer or of a module that holds some.
    Raises ValueError, with the names there are, where no layer is found, or for what is no regular expression,
    TypeError for a model that is no nn.Module or a pattern that is no str.
    """
    return [*named_heads(model, pattern).values()]


def named_heads(model: nn.Module, pattern: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """`find_heads`, each under its own name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {describe(model)}")
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected a str, got {describe(pattern)}")
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: expected a regular expression, got {pattern!r}: {error}") from error
    chosen = [module for name, module in model.named_modules() if expression.fullmatch(name)]
    within = {layer for module in chosen for layer in module.modules()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    found = {name: layer for name, layer in layers.items() if layer in within}
    if not found:
        raise ValueError(f"pattern: expected one that matches the name of a layer, {[*layers]}, got {pattern!r}")
    return found
