"""A training step captured in a CUDA graph: replays follow the scheduler, since capturable=True keeps lr on the GPU.

    python examples/cuda_graph.py

Without a GPU it says so and ends.
"""

import sys

import torch
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

from mla_ext import ProjectedSGD

if not torch.cuda.is_available():
    print("no GPU here: a CUDA graph needs one")
    sys.exit()

torch.manual_seed(0)
centres = torch.randn(10, 40, device="cuda")
model = Sequential(Linear(40, 64), ReLU(), Linear(64, 10)).cuda()
optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9, capturable=True)
optimizer.attach(model[2])
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50)
x, y = torch.empty(64, 40, device="cuda"), torch.empty(64, dtype=torch.long, device="cuda")  # the graph reads these


def next_batch():
    y.random_(10)
    x.copy_(centres[y] + torch.randn_like(x))


def train_step():
    optimizer.zero_grad(set_to_none=True)
    cross_entropy(model(x), y).backward()
    optimizer.step()


stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):
    for _ in range(3):  # makes state and workspaces before the capture; these are real steps
        next_batch()
        train_step()
torch.cuda.current_stream().wait_stream(stream)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    train_step()
for _ in range(100):
    next_batch()
    graph.replay()
    schedule.step()

next_batch()
accuracy = (model(x).argmax(1) == y).float().mean()
moved = (optimizer.projection(model[2].weight) - torch.eye(64, device="cuda")).norm()
print(f"accuracy {accuracy:.3f}; P is {moved:.3f} from the identity; lr {float(optimizer.param_groups[0]['lr']):.4f}")
