"""Encoders of torchvision and transformers by name: LIBRARY:MODEL, or LIBRARY:MODEL@WEIGHTS. Nothing is downloaded.

MODEL is a classifier of torchvision, such as `resnet18`; or what transformers finds in its own cache, such as
`bert-base-uncased`, or a folder that its `save_pretrained` wrote. WEIGHTS say what the encoder starts from:

- not given: the trained weights in the library's own cache, or in the folder that MODEL names;
- `random`: weights drawn anew. Only transformers' configuration is read;
- a path: a state dict in a file of torch.save (torchvision), or a folder of `save_pretrained` (transformers).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LIBRARIES", "PictureEncoder", "TextEncoder", "build", "is_library", "takes_tokens", "untrained", "width_of"]

LIBRARIES = ("torchvision", "transformers")
RANDOM = "random"


class _Name(NamedTuple):
    library: str
    model: str
    weights: str  # RANDOM, a path, or "": the library's own cache


def is_library(name: str) -> bool:
    return ":" in name


def takes_tokens(name: str, shape: Sequence[int]) -> bool:
    """Whether the encoder of that name reads recordings of that shape as token ids."""
    return is_library(name) and _parse(name).library == "transformers" and len(shape) == 1


def untrained(name: str) -> str:
    """The same encoder with random weights: for a model whose weights come from a checkpoint."""
    library, model, _ = _parse(name)
    return f"{library}:{model}@{RANDOM}"


def width_of(name: str) -> int:
    """The features that the encoder gives. ValueError for an unknown one, ImportError without its library."""
    library, model, _ = _parse(name)
    if library == "transformers":
        return _hidden_size(name, _configuration(name, model))
    with torch.device("meta"):
        return _without_classifier(name, _torchvision(name, model, {}))[1]


def build(name: str, shape: Sequence[int]) -> nn.Module:
    """The encoder: inputs (N, *shape) -> features (N, width_of(name)), of any sign for most.

    shape: (d,) token ids, of transformers only; (height, width), one grey picture such as a spectrogram; or (3k,
    height, width), k colour pictures whose features are averaged. Pictures should be standardised, as the weights
    expect. Random weights are drawn from the global generator. ValueError for another name or shape, or for weights
    that are not there or do not fit; ImportError where the library is missing.
    """
    library, model, weights = _parse(name)
    text = len(shape) == 1
    if text and library == "torchvision":
        raise ValueError(f"encoder: expected one for vectors of shape {tuple(shape)}, got {name!r}, one for pictures")
    if len(shape) == 3 and shape[0] != 1 and shape[0] % 3:
        raise ValueError(
            f"encoder: {name!r} expects pictures of 1 channel or 3 for each frame, got {shape[0]} channels"
        )
    if library == "torchvision":
        return PictureEncoder(_build_torchvision(name, model, weights, shape))
    encoder, pad = _build_transformers(name, model, weights)
    return TextEncoder(encoder, pad) if text else PictureEncoder(_FirstToken(encoder))


class TextEncoder(nn.Module):
    """A transformer on token ids (N, length), of any dtype -> its output at the first token, (N, s)."""

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, x: Tensor) -> Tensor:
        ids = x.long()
        mask = ids != self.pad
        mask[:, 0] = True  # where every token is padding, attention would have nothing to look at
        features: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        return features


class PictureEncoder(nn.Module):
    """A network on colour pictures, for (N, height, width) grey ones or (N, 3k, height, width), k frames -> (N, s)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            x = x.unsqueeze(1)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        features: Tensor = self.model(x.reshape(-1, 3, *x.shape[2:]))
        mean: Tensor = features.unflatten(0, (len(x), -1)).mean(dim=1)
        return mean


class _FirstToken(nn.Module):
    """A vision transformer's output at the first token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=x).last_hidden_state[:, 0]
        return features


def _parse(name: str) -> _Name:
    library, _, rest = name.partition(":")
    model, _, weights = rest.partition("@")
    if library not in LIBRARIES or not model:
        raise ValueError(f"encoder: expected LIBRARY:MODEL[@WEIGHTS], LIBRARY one of {LIBRARIES}, got {name!r}")
    return _Name(library, model, weights)


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        extra = {"torchvision": "vision", "transformers": "text"}[library]
        raise ImportError(f'{library} is not installed: pip install "mla_ext[{extra}]"') from error


def _torchvision(name: str, model: str, options: dict[str, Any]) -> nn.Module:
    models = _import("torchvision").models
    if model not in models.list_models(module=models):
        raise ValueError(f"encoder: expected a classifier of torchvision.models, got {name!r}")
    built: nn.Module = models.get_model(model, weights=None, **options)
    return built


def _build_torchvision(name: str, model: str, weights: str, shape: Sequence[int]) -> nn.Module:
    # A vision transformer is made for pictures of one size.
    options = {"image_size": shape[-1]} if model.startswith("vit_") else {}
    encoder, _ = _without_classifier(name, _torchvision(name, model, options))
    if weights != RANDOM:
        _load(name, encoder, Path(weights) if weights else _cached(name, model))
    return encoder


def _without_classifier(name: str, model: nn.Module) -> tuple[nn.Module, int]:
    """The network up to the input of its last linear layer, and how many features that has."""
    *_, (path, last) = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return model, last.in_features


def _cached(name: str, model: str) -> Path:
    url: str = _import("torchvision").models.get_model_weights(model).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        raise ValueError(
            f"encoder: expected the weights of {name!r} as {path}, from {url}; or {name}@PATH, or {name}@{RANDOM} to "
            "train from scratch"
        )
    return path


def _load(name: str, encoder: nn.Module, path: Path) -> None:
    """Whatever the weights of the classifier are, which is cut off."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = encoder.load_state_dict(state, strict=False).missing_keys
    except Exception as error:  # a file that is no state dict, or that of another model, can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"encoder: expected weights that fit {name!r} in {path}: {reason}") from error
    if missing:
        raise ValueError(f"encoder: expected weights that fit {name!r} in {path}, which lacks {missing[0]}")


def _configuration(name: str, model: str) -> Any:
    return _local(name, _import("transformers").AutoConfig.from_pretrained, model)


def _build_transformers(name: str, model: str, weights: str) -> tuple[nn.Module, int]:
    """The model, and the id of its padding."""
    transformers = _import("transformers")
    configuration = _configuration(name, model)
    if weights == RANDOM:
        encoder = transformers.AutoModel.from_config(configuration)
    else:
        encoder = _local(name, transformers.AutoModel.from_pretrained, weights or model)
    if _hidden_size(name, encoder.config) != _hidden_size(name, configuration):
        raise ValueError(f"encoder: expected weights of width {configuration.hidden_size} for {name!r}")
    return encoder.float().train(), getattr(configuration, "pad_token_id", None) or 0


def _hidden_size(name: str, configuration: Any) -> int:
    size = getattr(configuration, "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(f"encoder: expected a transformer with one hidden_size, got {name!r}")
    return size


def _local(name: str, load: Callable[..., Any], source: str) -> Any:
    """What transformers finds on this machine."""
    try:
        return load(source, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"encoder: expected {source!r} of {name!r} in transformers' cache, or a folder of save_pretrained: {reason}"
        ) from error
