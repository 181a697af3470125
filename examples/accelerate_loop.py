"""Accelerate: bf16, gradient accumulation, several processes, and a run that is saved and continued.

torchrun --nproc-per-node 2 examples/accelerate_loop.py        (needs `pip install accelerate`)

Attach the head before `prepare`. P sees the micro-batches of a step, of all processes. One process will do too.
"""

import accelerate
import torch
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mla_ext


def build():
    model = Sequential(Flatten(), Linear(384, 64), ReLU(), Linear(64, 10))
    optimizer = mla_ext.ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.attach(model[3])
    return *accelerator.prepare(model, optimizer, loader), optimizer


def train(model, prepared, loader, epochs):
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                prepared.step()
                prepared.zero_grad()


accelerate.utils.set_seed(0)
accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
data = mla_ext.digits().standardized()
chosen = data.indices("train")
loader = DataLoader(TensorDataset(data.inputs("audio", chosen), data.labels[chosen]), batch_size=16, shuffle=True)

model, prepared, batches, optimizer = build()
train(model, prepared, batches, epochs=4)
accelerator.save_state("accelerate_state")
saved = optimizer.projection(accelerator.unwrap_model(model)[3].weight)

accelerator.free_memory()
model, prepared, batches, optimizer = build()
accelerator.load_state("accelerate_state")  # P and momentum are back
head = accelerator.unwrap_model(model)[3]
resumed = torch.equal(optimizer.projection(head.weight), saved)
train(model, prepared, batches, epochs=4)

model.eval()
test = data.indices("test")
accuracy = (model(data.inputs("audio", test)).argmax(1) == data.labels[test]).float().mean()
moved = (optimizer.projection(head.weight) - torch.eye(64)).norm()
processes = accelerator.num_processes
accelerator.print(f"accuracy {accuracy:.3f} of {processes} processes; P resumed: {resumed}; it moved {moved:.3f}")
