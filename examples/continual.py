"""Continual learning: five tasks, two digits each, one after the other, without the data of the tasks before.

The projection is that of orthogonal weight modification (Zeng et al. 2019): every linear layer has one, its bias rides
along, and what a layer was fed in earlier tasks keeps its answers. Against SGD and EWC (Kirkpatrick et al. 2017).

python examples/continual.py
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

from mla_ext import ProjectedSGD

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
EPOCHS, LR, EWC_STRENGTH = 20, 0.05, 1000.0


def load(seed=0):
    """Images (N, 64) and labels for training, and for the test."""
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 16, labels[order]
    return (images[:1300], labels[:1300]), (images[1300:], labels[1300:])


def of_task(data, task):
    images, labels = data
    chosen = torch.isin(labels, torch.tensor(task))
    return images[chosen], labels[chosen]


def fisher(model, data):
    """EWC: how much each parameter matters for a task, and its value after it."""
    images, labels = data
    found = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(images, labels, strict=True):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        for total, p in zip(found, model.parameters(), strict=True):
            total += p.grad**2 / len(labels)
    return found, [p.detach().clone() for p in model.parameters()]


def learn(method, train, test, seed=0):
    """The test accuracy on task j after task i, (tasks, tasks)."""
    torch.manual_seed(seed)
    model = Sequential(Linear(64, 100), ReLU(), Linear(100, 10))
    if method == "projection":
        optimizer = ProjectedSGD(model.parameters(), lr=LR, momentum=0.9, project="update", alpha=0.03)
        optimizer.attach(model, bias=True)  # every linear layer, with a P of its own
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    remembered, accuracy = [], torch.zeros(len(TASKS), len(TASKS))
    for i, task in enumerate(TASKS):
        images, labels = of_task(train, task)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(labels)).split(16):
                optimizer.zero_grad()
                loss = cross_entropy(model(images[part]), labels[part])
                for weights, values in remembered:
                    for weight, value, p in zip(weights, values, model.parameters(), strict=True):
                        loss = loss + EWC_STRENGTH / 2 * (weight * (p - value) ** 2).sum()
                loss.backward()
                optimizer.step()
        if method == "EWC":
            remembered.append(fisher(model, (images, labels)))
        with torch.no_grad():
            for j, other in enumerate(TASKS):
                x, y = of_task(test, other)
                accuracy[i, j] = (model(x).argmax(1) == y).float().mean()
    return accuracy


def main(seeds=3):
    train, test = load()
    figure, ax = plt.subplots(figsize=(6, 4))
    print("method       average accuracy   forgetting")
    results = {}
    for method in ("SGD", "EWC", "projection"):
        accuracy = torch.stack([learn(method, train, test, seed) for seed in range(seeds)]).mean(0)
        forgetting = (accuracy.diagonal() - accuracy[-1])[:-1].mean()
        print(f"{method:<12} {accuracy[-1].mean():>16.1%} {forgetting:>12.1%}")
        seen = [accuracy[i, : i + 1].mean() for i in range(len(TASKS))]
        ax.plot(range(1, len(TASKS) + 1), seen, marker="o", label=method)
        results[method] = accuracy
    ax.set(xlabel="tasks learned", ylabel="mean accuracy on them", ylim=(0, 1.02), xticks=range(1, len(TASKS) + 1))
    ax.legend(frameon=False)
    figure.savefig("continual.png", dpi=120)
    return results


if __name__ == "__main__":
    results = main()
