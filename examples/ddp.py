"""DistributedDataParallel: every rank's P absorbs the same feature mean, so the heads stay equal to the bit.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import sys

import torch
import torch.distributed as dist
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mla_ext import ProjectedSGD


def main():
    torch.manual_seed(0)  # the same data on every rank
    centres = torch.randn(10, 40)
    labels = torch.randint(10, (2048,))
    inputs = centres[labels] + torch.randn(2048, 40)
    data = TensorDataset(inputs, labels)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    encoder, head = Sequential(Linear(40, 64), ReLU()), Linear(64, 10)
    model = DistributedDataParallel(Sequential(encoder, head))
    optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.attach(head)  # the head itself, not the wrapped model
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    P = optimizer.projection(head.weight)
    all_P = [torch.empty_like(P) for _ in range(dist.get_world_size())]
    dist.all_gather(all_P, P)
    if dist.get_rank() == 0:
        accuracy = (model.module(inputs).argmax(1) == labels).float().mean()
        equal = all(torch.equal(P, other) for other in all_P)
        print(f"accuracy {accuracy:.3f}; P equal on all {len(all_P)} ranks: {equal}", flush=True)
    dist.barrier()  # no rank leaves before the first one has spoken


if __name__ == "__main__":
    if not dist.is_torchelastic_launched():
        sys.exit("start this with: torchrun --nproc-per-node 2 examples/ddp.py")
    dist.init_process_group("gloo")  # "nccl" on GPUs
    main()
    dist.destroy_process_group()
