"""Ignite: a training step that takes the modalities in turn, alpha on a schedule, checkpoints with P, resuming.

python examples/ignite_engine.py        (needs `pip install pytorch-ignite`)
"""

import tempfile
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, LinearCyclicalScheduler
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mla_ext

torch.manual_seed(0)
data = mla_ext.digits().standardized()
train = data.indices("train")
loader = DataLoader(
    TensorDataset(*(data.inputs(m, train) for m in data.modalities), data.labels[train]), batch_size=32, shuffle=True
)


def build(folder):
    width = {m: data.features[m][0].numel() for m in data.modalities}
    encoders = {m: nn.Sequential(nn.Flatten(), nn.Linear(width[m], 64), nn.ReLU()) for m in data.modalities}
    model = mla_ext.SharedHeadModel(encoders, nn.Linear(64, 10))
    optimizer = mla_ext.ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.attach(model.head)

    def step(engine, batch):
        turn = engine.state.iteration % len(data.modalities)
        optimizer.zero_grad()
        loss = cross_entropy(model(data.modalities[turn], batch[turn]), batch[-1])
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(step)
    alpha = LinearCyclicalScheduler(optimizer, "alpha", 1.0, 0.1, cycle_size=20 * len(loader), monotonic=True)
    trainer.add_event_handler(Events.ITERATION_STARTED, alpha)
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "alpha": alpha}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(parts, DiskSaver(folder, require_empty=False)))
    return trainer, model, optimizer, parts


folder = Path(tempfile.mkdtemp())
build(folder)[0].run(loader, max_epochs=5)

trainer, model, optimizer, parts = build(folder)
(last,) = folder.glob("checkpoint_*.pt")
Checkpoint.load_objects(parts, torch.load(last, weights_only=True))  # P, momentum and alpha go on where they were
trainer.run(loader, max_epochs=10)

accuracy = mla_ext.evaluate(model, data, split="test").fusions["entropy"].accuracy
moved = (optimizer.projection(model.head.weight) - torch.eye(64)).norm()
print(f"accuracy {accuracy:.3f} after {trainer.state.epoch} epochs; P is {moved:.3f} from the identity")
