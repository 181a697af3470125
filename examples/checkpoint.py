"""Save a run, load it elsewhere, go on: P and the momentum are part of optimizer.state_dict().

python examples/checkpoint.py
"""

import tempfile
from pathlib import Path

import torch
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

from mla_ext import ProjectedSGD


def build():
    model = Sequential(Linear(40, 64), ReLU(), Linear(64, 10))
    optimizer = ProjectedSGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer.attach(model[2])  # before load_state_dict
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 40, generator=generator), torch.randint(10, (32,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
model, optimizer = build()
train(model, optimizer, range(50))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

other_model, other_optimizer = build()
saved = torch.load(path, weights_only=True)
other_model.load_state_dict(saved["model"])
other_optimizer.load_state_dict(saved["optimizer"])

train(model, optimizer, range(50, 100))
train(other_model, other_optimizer, range(50, 100))
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
print(f"{path.stat().st_size} bytes; the resumed run has the bits of the uninterrupted one: {same}")
