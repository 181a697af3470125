"""Accelerate: attach the head before `prepare`. The feature means of all processes are joined, as under DDP.

python examples/accelerate_loop.py        (needs `pip install accelerate`; or: accelerate launch ...)
"""

import accelerate
import torch
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mla_ext import ProjectedSGD

torch.manual_seed(0)
centres = torch.randn(10, 40)
labels = torch.randint(10, (2048,))
inputs = centres[labels] + torch.randn(2048, 40)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)

encoder, head = Sequential(Linear(40, 64), ReLU()), Linear(64, 10)
model = Sequential(encoder, head)
optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer.attach(head)
accelerator = accelerate.Accelerator(cpu=True)
model, prepared, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(3):
    for x, y in loader:
        prepared.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        prepared.step()

accuracy = (model(inputs).argmax(1) == labels).float().mean()
moved = (optimizer.projection(head.weight) - torch.eye(64)).norm()
accelerator.print(f"accuracy {accuracy:.3f}; P is {moved:.3f} from the identity")
