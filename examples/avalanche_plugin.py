"""Avalanche: two classes after two others, on a head that grows. The plugin keeps P, whatever becomes of the optimizer.

python examples/avalanche_plugin.py        (needs `pip install avalanche-lib`)
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import IncrementalClassifier
from avalanche.training import Naive
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.utils.data import TensorDataset

import mla_ext
from mla_ext.integrations.avalanche import ProjectionPlugin

data = mla_ext.digits().standardized()


def split(name):
    indices = data.indices(name)
    dataset = TensorDataset(data.inputs("image", indices), data.labels[indices])
    dataset.targets = data.labels[indices].tolist()  # where Avalanche looks for the classes
    return dataset


def learn(projected):
    """The accuracy over all classes after the last experience."""
    torch.manual_seed(0)
    model = Sequential(Flatten(), Linear(64, 100), ReLU(), IncrementalClassifier(100))
    if projected:
        optimizer = mla_ext.ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9, project="update", alpha=0.03)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        train_mb_size=16,
        train_epochs=10,
        eval_mb_size=450,
        plugins=[ProjectionPlugin(bias=True)] if projected else [],
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.model.eval()
    test = data.indices("test")
    return strategy, (strategy.model(data.inputs("image", test)).argmax(1) == data.labels[test]).float().mean()


benchmark = nc_benchmark(split("train"), split("test"), n_experiences=5, task_labels=False, shuffle=False)
_, plain = learn(projected=False)
strategy, accuracy = learn(projected=True)
moved = (strategy.optimizer.projection(strategy.model[3].classifier.weight) - torch.eye(101)).norm()
print(f"accuracy {accuracy:.3f}, with SGD {plain:.3f}; P of the head is {moved:.3f} from the identity")
