"""ProjectedSGD in place of torch.optim.SGD: an ordinary training loop in which two lines are new.

python examples/drop_in.py
"""

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
optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)  # instead of torch.optim.SGD
optimizer.attach(head)  # from now on the head's gradient is projected; the encoder steps as with SGD

for _ in range(3):
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

accuracy = (model(inputs).argmax(1) == labels).float().mean()
eigenvalues = torch.linalg.eigvalsh(optimizer.projection(head.weight))
print(f"accuracy {accuracy:.3f}")
print(f"eigenvalues of P from {eigenvalues.min():.3f} to {eigenvalues.max():.3f}")
