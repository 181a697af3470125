"""Random arguments for the public functions, and mutated files for those that read them.

Whatever comes in, what comes out is a result, or an error of a kind that is meant, which names argument or file.
"""

from __future__ import annotations

import io
import math
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contents import contents
from torch import Tensor, nn

from mla_ext import MultimodalData, ProjectedSGD, SharedHeadModel, _library, fit, load_npz, ops
from mla_ext.multimodal import checkpoint
from mla_ext.projection import Projection
from mla_ext.reference import Hyperparameters, accumulate_dtype
from mla_ext.step import HeadStep, PlainStep

ERRORS = (TypeError, ValueError, OSError, RuntimeError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)


def _tensor(rng: random.Random, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of any shape, dtype, layout and values, unless they are given."""
    if shape is None:
        shape = tuple(rng.choice((0, 1, 2, 3, 7)) for _ in range(rng.randrange(4)))
    if dtype is None:
        dtype = rng.choice(DTYPES * 2 + OTHERS)
    if dtype == torch.float8_e4m3fn:
        return torch.zeros(shape).to(dtype)
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 10.0 ** rng.choice(
        (-45, -20, -3, 0, 0, 0, 3, 20, 38)
    )
    if value.numel() and rng.random() < 0.2:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice((math.nan, math.inf, -math.inf, 0.0))
    value = value.to(dtype)
    layout = rng.randrange(8)
    if layout == 0 and value.dim() >= 2:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == 1 and value.dim() >= 1:
        return torch.stack([value, value], dim=-1)[..., 0]
    if layout == 2 and value.dim() >= 1 and value.shape[0] > 0:
        return torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape)  # not aligned
    return value


def _anything(rng: random.Random) -> Any:
    kind = rng.randrange(12)
    if kind < 6:
        return _tensor(rng)
    if kind == 6:
        return torch.eye(2, 3).to_sparse()
    if kind == 7:
        return torch.empty(2, 3, device="meta")
    if kind == 8:
        return torch.ones(1, 3).expand(2, 3)
    return rng.choice((None, 1, 1.0, "1", [1.0], math.nan, b"", True, np.ones(3), nn.Linear(2, 2), 10**400))


def _number(rng: random.Random) -> Any:
    usual = (0.0, 0.1, 0.9, 1.0, 1e-30, 1e30, -1.0, math.nan, math.inf, 1, True, None, "x", 10**400)
    if rng.random() < 0.1:
        return _tensor(rng, rng.choice(((), (1,), (2,))), rng.choice(DTYPES + OTHERS))
    return np.float32(0.5) if rng.random() < 0.05 else rng.choice(usual)


def _hyperparameters(rng: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {"lr": 0.1, "momentum": rng.choice((0.0, 0.9)), "alpha": 0.1}
    for _ in range(rng.randrange(3)):
        name = rng.choice([field.name for field in fields(Hyperparameters)])
        choices = {"absorb": ("after", "before", "x", 1), "nesterov": (True, False, 1), "normalize": (True, False, "")}
        values[name] = rng.choice(choices[name]) if name in choices else _number(rng)
    return values


def _call(function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...] = ()) -> str:
    """ "returned", or "refused" with an error that begins with the name of an argument."""
    try:
        function(**arguments)
    except ERRORS as error:
        named = re.match(r"(?:\w+_, \S+:\d+, )?(\w+)", str(error))  # a compiled op says first who and where it is
        known = {*arguments, *names, *(field.name for field in fields(Hyperparameters))}
        assert named and named[1] in known, f"{type(error).__name__} names no argument: {error}"
        return "refused"
    return "returned"


def _spoil(rng: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
    """None, one or two of the arguments replaced by anything."""
    names = rng.sample(sorted(arguments), min(rng.choice((0, 0, 1, 1, 2)), len(arguments)))
    return arguments | {name: _anything(rng) for name in names}


def _sizes(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice((1, 2, 5, 64)), rng.choice((1, 2, 7, 33, 129)), rng.choice((1, 3, 40))


def call_feature_mean(rng: random.Random, folder: Path) -> str:
    N, s, _ = _sizes(rng)
    return _call(ops.feature_mean, _spoil(rng, {"features": _tensor(rng, (N, s), rng.choice(DTYPES))}))


def call_rls_update(rng: random.Random, folder: Path) -> str:
    _, s, _ = _sizes(rng)
    dtype = rng.choice(DTYPES[:2])
    arguments = {"projection": _tensor(rng, (s, s), dtype), "feature_mean": _tensor(rng, (s,), dtype)}
    values = _hyperparameters(rng)
    options = {name: values[name] for name in ("alpha", "forget", "normalize") if name in values}
    return _call(ops.rls_update_, _spoil(rng, arguments) | options)


def _head(rng: random.Random) -> dict[str, Any]:
    """The arguments of a head step, except P and the hyperparameters."""
    _, s, C = _sizes(rng)
    dtype = rng.choice(DTYPES)
    accumulate = accumulate_dtype(dtype)
    return {
        "weight": _tensor(rng, (C, s), dtype),
        "grad": _tensor(rng, (C, s), dtype),
        "momentum_buffer": _tensor(rng, (C, s), accumulate),
        "feature_mean": rng.choice((None, _tensor(rng, (s,), accumulate))),
        "step": torch.tensor(float(rng.randrange(2))),
        "grad_scale": rng.choice((None, torch.tensor(8.0))),
        "found_inf": rng.choice((None, torch.tensor(float(rng.randrange(2))))),
    }


def call_head_step(rng: random.Random, folder: Path) -> str:
    arguments = _head(rng)
    s = arguments["weight"].shape[1]
    arguments["projection"] = _tensor(rng, (s, s), accumulate_dtype(arguments["weight"].dtype))
    return _call(ops.head_step_, _spoil(rng, arguments) | {"hyper": Hyperparameters(**_hyperparameters(rng))})


def _bits(*values: Any) -> list[torch.Tensor]:
    """What the tensors among the values hold, to compare."""
    tensors = (value for value in values if isinstance(value, torch.Tensor) and value.layout == torch.strided)
    return [
        tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for tensor in tensors
        if not tensor.is_meta
    ]


def call_rank_step(rng: random.Random, folder: Path) -> str:
    """A head step in the rank form. A refused one changes nothing."""
    arguments = _head(rng)
    s, accumulate = arguments["weight"].shape[1], accumulate_dtype(arguments["weight"].dtype)
    capacity = rng.choice((1, 2, 3, 16, 65))
    P = {
        "base": None,
        "beta": torch.tensor(rng.choice((1.0, 1.0, 0.5, 0.0, math.nan)), dtype=accumulate),
        "rows": _tensor(rng, (capacity, s), accumulate),
        "count": torch.tensor(rng.randrange(capacity)),
    }
    spoiled = _spoil(rng, arguments | P)
    arguments = {name: spoiled[name] for name in arguments}
    parts = {name: spoiled[name] for name in P}
    before = _bits(*spoiled.values())
    hyper = Hyperparameters(**_hyperparameters(rng))
    outcome = _call(ops.head_step_, arguments | {"projection": Projection(**parts), "hyper": hyper}, tuple(parts))
    if outcome == "refused":
        assert all(map(torch.equal, before, _bits(*spoiled.values()))), "a refused step changed something"
    return outcome


def call_entropy_fusion(rng: random.Random, folder: Path) -> str:
    N, C, M = _sizes(rng)
    arguments = {
        "logits": _tensor(rng, (M, N, C), rng.choice(DTYPES)),
        "present": rng.choice((None, torch.rand(M, N) < 0.5)),
    }
    return _call(ops.entropy_fusion, _spoil(rng, arguments))


def call_optimizer(rng: random.Random, folder: Path) -> str:
    """Constructed, fed and stepped: with any options, features and gradients."""
    _, s, C = _sizes(rng)
    head = nn.Linear(s, C, dtype=rng.choice(DTYPES))

    def use(**options: Any) -> None:
        optimizer = ProjectedSGD(head.parameters(), **options)
        features = _tensor(rng, (3, s), head.weight.dtype) if rng.random() < 0.8 else _anything(rng)
        for _ in range(rng.choice((1, 1, 3))):
            optimizer.observe(head.weight, features)
            grad = _tensor(rng, (C, s), head.weight.dtype)
            head.weight.grad = grad.to_sparse() if rng.random() < 0.1 else grad
            optimizer.step()
        optimizer.projection(head.weight)

    options = _hyperparameters(rng) | {"rank": rng.choice(("auto", "auto", None, 2, 3, 64, 1, -1, 2.5, "x", True))}
    return _call(use, options, ("weight", "features", "grad"))


def call_step(rng: random.Random, folder: Path) -> str:
    """The one call for a whole step. Where it takes not all of it, everything stays as it was."""
    dtype, s, C = rng.choice(DTYPES[:2]), rng.choice((1, 3, 8)), rng.choice((1, 2, 40))
    momentum = rng.choice((0.0, 0.9))
    hyper = Hyperparameters(lr=0.1, momentum=momentum, weight_decay=rng.choice((0.0, 0.1)), forget=rng.choice((0, 0.5)))
    shapes = [(rng.choice((0, 1, 7, 40000)),) for _ in range(rng.choice((0, 1, 3)))]
    lists = [[_tensor(rng, shape, dtype) for shape in shapes] for _ in range(3)]
    plain = PlainStep(*lists[:2], lists[2] if momentum else [], rng.random() < 0.5, hyper)
    P = Projection.identity(s, rng.choice((None, 2, 5)), rng.choice((0, 4)), dtype, torch.device("cpu"))
    weight, grad, buffer = (_tensor(rng, (C, s), dtype) for _ in range(3))
    mean = _tensor(rng, (s,), dtype) if rng.random() < 0.8 else None
    head = HeadStep(weight, grad, buffer if momentum else None, P, mean, torch.zeros(()), hyper)
    owner: Any = rng.choice((plain, head, P))
    name = rng.choice([*type(owner).__dataclass_fields__])
    parts = [
        weight,
        grad,
        buffer,
        mean,
        P.base,
        P.beta,
        P.rows,
        P.count,
        head.step,
        *(t for part in lists for t in part),
    ]
    if rng.random() < 0.6:
        spoiled = _anything(rng)
        if isinstance(getattr(owner, name), list) and getattr(owner, name) and rng.random() < 0.7:
            rng.choice((lists[0], lists[1]))[0] = spoiled
        else:
            setattr(owner, name, spoiled)
        parts.append(spoiled)
    values = [part for part in parts if isinstance(part, Tensor)]
    before = _bits(*values)
    done = _library.module.step([plain], [head], rng.random() < 0.5)
    if not done:
        assert all(map(torch.equal, before, _bits(*values))), "what was refused has changed"
    return "returned" if done else "refused"


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, removed, repeated, overwritten, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if not changed:
            break
        at, length = rng.randrange(len(changed)), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif rng.random() < 0.3:
            del changed[at:]
        else:
            changed[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
    return bytes(changed)


def mutate_members(rng: random.Random, archive: bytes) -> bytes:
    """A whole zip file with right checksums, one member of it mutated: what no checksum finds."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        spoiled = rng.choice(names)
        for name in names:
            data = old.read(name)
            new.writestr(name, mutate(rng, data) if name == spoiled else data)
    return file.getvalue()


def _read(function: Callable[[Path], Any], path: Path, content: bytes, rng: random.Random) -> str:
    path.write_bytes(mutate_members(rng, content) if rng.random() < 0.5 else mutate(rng, content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error), f"{type(error).__name__} names no file: {error}"
        return "refused"
    return "returned"


def read_npz(rng: random.Random, folder: Path) -> str:
    file = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(file, **contents())
    return _read(load_npz, folder / "mutated.npz", file.getvalue(), rng)


def train(out: Path, resume: bool = False) -> None:
    """Two epochs on a few samples, or what is left of them."""
    arrays = {name: torch.from_numpy(value) for name, value in contents().items() if value.dtype.kind != "U"}
    data = MultimodalData(
        ("a", "b"),
        {"a": arrays["x_a"], "b": arrays["x_b"] / 255},
        {"a": arrays["row_a"], "b": torch.arange(12)},
        arrays["y"],
        ("x", "y", "z"),
        arrays["split"],
    )
    torch.manual_seed(0)
    encoders = {"a": nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), "b": nn.Linear(4, 4)}
    model = SharedHeadModel(encoders, nn.Linear(4, 3))
    optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.attach(model.head)
    fit(model, optimizer, data, epochs=2, batch_size=4, out=out, resume=resume, progress=False)


def _checkpoint(folder: Path) -> Path:
    path = folder / "run" / "last.pt"
    if not path.exists():
        train(path.parent)
    return path


def read_checkpoint(rng: random.Random, folder: Path) -> str:
    return _read(checkpoint.load, folder / "mutated.pt", _checkpoint(folder).read_bytes(), rng)


TARGETS = {
    "feature_mean": call_feature_mean,
    "rls_update_": call_rls_update,
    "head_step_": call_head_step,
    "rank form": call_rank_step,
    "step": call_step,
    "entropy_fusion": call_entropy_fusion,
    "ProjectedSGD": call_optimizer,
    "load_npz": read_npz,
    "checkpoint.load": read_checkpoint,
}


def run_one(name: str, seed: int, folder: Path) -> str:
    """Input number `seed` of a target: "returned" or "refused". AssertionError, or any other, is a find."""
    try:
        return TARGETS[name](random.Random(f"{name} {seed}"), folder)
    except Exception as error:
        error.add_note(f"input {seed} of {name}")
        raise
