"""skorch: a scikit-learn classifier with our optimizer, and a grid search over its alpha.

python examples/skorch_search.py        (needs `pip install skorch scikit-learn`)
"""

import torch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch.nn import CrossEntropyLoss, Linear, Module, ReLU, Sequential

import mla_ext


class Network(Module):
    def __init__(self, width=64):
        super().__init__()
        self.encoder, self.head = Sequential(Linear(64, width), ReLU()), Linear(width, 10)

    def forward(self, x):
        return self.head(self.encoder(x))


class Classifier(NeuralNetClassifier):
    def initialize_optimizer(self, *args, **kwargs):
        super().initialize_optimizer(*args, **kwargs)
        self.optimizer_.attach(self.module_.head)
        return self


torch.manual_seed(0)
data = mla_ext.digits().standardized()
train, test = data.indices("train"), data.indices("test")
images, labels = data.inputs("image", torch.arange(len(data))).flatten(1).numpy(), data.labels.numpy()

net = Classifier(
    Network,
    criterion=CrossEntropyLoss,
    optimizer=mla_ext.ProjectedSGD,
    optimizer__momentum=0.9,
    lr=0.02,
    batch_size=32,
    max_epochs=5,
    train_split=None,
    verbose=0,
)
search = GridSearchCV(net, {"optimizer__alpha": [0.01, 0.1, 1.0]}, cv=2, scoring="accuracy")
search.fit(images[train], labels[train])

best = search.best_estimator_
accuracy = best.score(images[test], labels[test])
moved = (best.optimizer_.projection(best.module_.head.weight) - torch.eye(64)).norm()
alpha = search.best_params_["optimizer__alpha"]
print(f"accuracy {accuracy:.3f} with alpha {alpha}; P is {moved:.3f} from the identity")
