"""What the frameworks do to an optimizer: save, resume, wrap, copy, reset it. `make test-frameworks` installs them."""

import copy
import importlib
import os
import pickle

import pytest
import torch
from helpers import batch, network
from helpers import train as train_plain
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mla_ext import ProjectedAdamW, ProjectedSGD, find_heads

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # the libraries' own


def needs(library):
    """The library, or a skip without it; where all should be there, a failure."""
    if not os.environ.get("MLA_EXT_FRAMEWORKS"):
        pytest.importorskip(library, reason=f"{library} is not installed; make test-frameworks installs it")
    return importlib.import_module(library)


def dataset(n=24):
    return TensorDataset(*batch(0, n))


def assert_same(model, optimizer, other, other_optimizer):
    """The same bits, of weights and of a P that has moved."""
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    P = optimizer.projection(model[2].weight)
    assert torch.equal(P, other_optimizer.projection(other[2].weight))
    assert (P - torch.eye(8)).norm() > 0.1


def test_lightning_resumes_to_the_same_bits(tmp_path):
    lightning = needs("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            x, y = batch
            return cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = ProjectedSGD(self.parameters(), lr=0.05, momentum=0.9)
            optimizer.attach(self.net[2])
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def run(epochs, checkpoint=None):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
        )
        model = Module()
        trainer.fit(model, DataLoader(dataset(), batch_size=8), ckpt_path=checkpoint)
        return trainer, model

    run(2)[0].save_checkpoint(tmp_path / "half.ckpt")
    whole, model = run(4)
    resumed, other = run(4, tmp_path / "half.ckpt")
    assert resumed.global_step == 12
    assert_same(model.net, whole.optimizers[0], other.net, resumed.optimizers[0])


class Rows(Dataset):
    """What the Trainer of transformers reads."""

    def __init__(self):
        self.rows = dataset()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return {"x": x, "labels": y}


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@pytest.mark.usefixtures("own_accelerate")
@pytest.mark.parametrize("kind", [ProjectedSGD, ProjectedAdamW])
def test_the_trainer_of_transformers_resumes_to_the_same_bits(kind, tmp_path):
    transformers = needs("transformers")
    needs("accelerate")

    def run(folder, epochs, resume=False):
        model = WithLoss()
        settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "epoch", "seed": 3}
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), num_train_epochs=epochs, per_device_train_batch_size=8, **settings
        )
        # The schedule does not depend on the number of epochs, so the first half of a run is a run.
        arguments.lr_scheduler_type = transformers.SchedulerType.CONSTANT
        options = {"lr": 0.05, "heads": find_heads(model, r".*\.2")}
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=(kind, options))
        trainer.train(resume_from_checkpoint=resume)
        return model.net, trainer.optimizer.optimizer

    model, optimizer = run("whole", 4)
    run("halves", 2)
    other, other_optimizer = run("halves", 4, resume=True)
    assert_same(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize(("name", "kind"), [("projectedsgd", ProjectedSGD), ("projectedadamw", ProjectedAdamW)])
def test_timm_makes_what_the_class_makes(name, kind):
    factory = needs("timm.optim")
    register = importlib.import_module("mla_ext.integrations.timm").register
    register()
    register()
    model, other = network(), network()
    optimizer = factory.create_optimizer_v2(model, name, lr=0.05, weight_decay=0.01, heads=[model[2]])
    assert type(optimizer) is kind and [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.01]
    momentum = {"momentum": 0.9} if kind is ProjectedSGD else {}
    vectors, matrices = ([p for p in other.parameters() if p.dim() == d] for d in (1, 2))
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.01}]
    other_optimizer = kind(groups, lr=0.05, heads=[other[2]], **momentum)
    train_plain(model, optimizer, 4)
    train_plain(other, other_optimizer, 4)
    assert_same(model, optimizer, other, other_optimizer)


def test_timms_lookahead_is_saved_with_p():
    factory = needs("timm.optim")
    importlib.import_module("mla_ext.integrations.timm").register()

    def build():
        model = network()
        return model, factory.create_optimizer_v2(model, "lookahead_projectedsgd", lr=0.05, heads=[model[2]])

    model, optimizer = build()
    train_plain(model, optimizer, 8)  # Lookahead acts in every sixth
    other, other_optimizer = build()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_plain(model, optimizer, 8, first=8)
    train_plain(other, other_optimizer, 8, first=8)
    assert_same(model, optimizer._base_optimizer, other, other_optimizer._base_optimizer)


def skorch_net():
    skorch = needs("skorch")

    class Net(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_.attach(self.module_[2])
            return self

    # A pickle names the class.
    Net.__qualname__ = "Net"
    globals()["Net"] = Net
    fixed = {"train_split": None, "verbose": 0, "batch_size": 8, "iterator_train__shuffle": False}
    return Net(network, criterion=nn.CrossEntropyLoss, optimizer=ProjectedSGD, lr=0.05, max_epochs=2, **fixed)


def test_skorch_copies_and_saves_a_net_with_its_p(tmp_path):
    net = skorch_net()
    x, y = (part.numpy() for part in dataset().tensors)
    net.fit(x, y)
    files = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    net.save_params(**files)
    copied = pickle.loads(pickle.dumps(net))
    loaded = skorch_net().initialize()
    loaded.load_params(**files)
    for other in (copied, loaded):
        assert other.optimizer_ is not net.optimizer_
        assert_same(net.module_, net.optimizer_, other.module_, other.optimizer_)
    for each in (net, copied, loaded):
        each.partial_fit(x, y)
    for other in (copied, loaded):
        assert_same(net.module_, net.optimizer_, other.module_, other.optimizer_)


def test_skorch_changes_alpha_and_keeps_the_head_attached():
    net = skorch_net()
    x, y = (part.numpy() for part in dataset().tensors)
    net.fit(x, y)
    before = net.optimizer_.projection(net.module_[2].weight)
    net.set_params(optimizer__alpha=1.0)  # makes a new optimizer
    net.partial_fit(x, y)
    after = net.optimizer_.projection(net.module_[2].weight)
    assert (after - torch.eye(8)).norm() > 0.1 and not torch.equal(before, after)


def test_the_lr_finder_of_ignite_puts_p_back():
    ignite = needs("ignite.engine")
    finder = importlib.import_module("ignite.handlers").FastaiLRFinder()
    model = network()
    optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9, heads=[model[2]])
    train_plain(model, optimizer, 3)
    P = optimizer.projection(model[2].weight)
    trainer = ignite.create_supervised_trainer(model, optimizer, cross_entropy)
    with finder.attach(trainer, {"model": model, "optimizer": optimizer}, end_lr=1.0, num_iter=9) as found:
        found.run(DataLoader(dataset(), batch_size=8), max_epochs=3)
    assert len(finder.get_results()["lr"]) >= 8
    assert torch.equal(optimizer.projection(model[2].weight), P)
    assert optimizer.param_groups[0]["lr"] == 0.05


class Labelled(TensorDataset):
    def __init__(self, x, y):
        super().__init__(x, y)
        self.targets = y.tolist()


def avalanche_strategy(grows, bias, **options):
    needs("avalanche")
    from avalanche.benchmarks import nc_benchmark
    from avalanche.models import IncrementalClassifier
    from avalanche.training import Naive

    plugins = importlib.import_module("mla_ext.integrations.avalanche")
    torch.manual_seed(0)
    head = IncrementalClassifier(8, masking=False) if grows else nn.Linear(8, 4)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), head)
    optimizer = ProjectedSGD(model.parameters(), lr=0.05, momentum=0.9)
    x, _ = batch(0, 32)
    data = Labelled(x, torch.arange(32) % 4)
    benchmark = nc_benchmark(data, data, n_experiences=2, task_labels=False, shuffle=False)
    plugin = plugins.ProjectionPlugin("2|2.classifier", bias=bias)
    strategy = Naive(model=model, optimizer=optimizer, train_mb_size=8, evaluator=None, plugins=[plugin], **options)
    return strategy, [*benchmark.train_stream]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("grows", "resets"), [(False, True), (True, False), (True, True)])
def test_p_survives_what_avalanche_does_between_experiences(grows, resets, bias):
    strategy, experiences = avalanche_strategy(grows, bias)
    options = {"reset_optimizer_state": resets}
    strategy.train(experiences[0], **options)
    head = strategy.model[2].classifier if grows else strategy.model[2]
    P = strategy.optimizer.projection(head.weight)
    assert P.shape == (8 + bias, 8 + bias) and (P - torch.eye(8 + bias)).norm() > 0.1

    started = []
    step = strategy.optimizer.step
    strategy.optimizer.step = lambda *a: (started.append(strategy.optimizer.projection(head_now().weight)), step(*a))

    def head_now():
        return strategy.model[2].classifier if grows else strategy.model[2]

    strategy.train(experiences[1], **options)
    assert torch.equal(started[0], P)
    assert (head_now() is not head) == grows and len(head_now().weight) == 4
    assert len(head_now()._forward_hooks) == 1
    assert strategy.optimizer.projection(head_now().weight).trace() < P.trace()  # it goes on to absorb


def test_p_survives_evaluation_that_grows_the_head():
    strategy, experiences = avalanche_strategy(grows=True, bias=False)
    strategy.train(experiences[0])
    head = strategy.model[2].classifier
    P = strategy.optimizer.projection(head.weight)
    strategy.eval(experiences)  # of classes that the head does not have yet
    assert strategy.model[2].classifier is not head
    strategy.train(experiences[1])
    after = strategy.optimizer.projection(strategy.model[2].classifier.weight)
    assert after.trace() < P.trace() and torch.linalg.eigvalsh(P - after).min() > -1e-5  # it only shrinks, from P


def test_p_survives_the_reset_of_a_loaded_optimizer():
    first, experiences = avalanche_strategy(grows=False, bias=False)
    first.train(experiences[0])
    second, experiences = avalanche_strategy(grows=False, bias=False)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    P = second.optimizer.projection(second.model[2].weight)
    second.train(experiences[1])
    after = second.optimizer.projection(second.model[2].weight)
    assert (P - torch.eye(8)).norm() > 0.1
    assert after.trace() < P.trace() and torch.linalg.eigvalsh(P - after).min() > -1e-5


def test_avalanche_saves_a_strategy_with_its_p(tmp_path):
    strategy, experiences = avalanche_strategy(grows=True, bias=True)
    checkpoints = importlib.import_module("avalanche.checkpointing")
    strategy.train(experiences[0])
    checkpoints.save_checkpoint(strategy, tmp_path / "strategy.pkl")
    fresh, _ = avalanche_strategy(grows=True, bias=True)
    loaded, trained = checkpoints.maybe_load_checkpoint(fresh, tmp_path / "strategy.pkl")
    assert trained == 1
    for each in (strategy, loaded):
        torch.manual_seed(1)
        each.train(experiences[1])
    ours, theirs = (each.model[2].classifier.weight for each in (strategy, loaded))
    assert torch.equal(ours, theirs)
    assert torch.equal(strategy.optimizer.projection(ours), loaded.optimizer.projection(theirs))


def test_without_the_plugin_avalanche_drops_p():
    """What the plugin is for."""
    strategy, experiences = avalanche_strategy(grows=False, bias=False)
    strategy.train(experiences[0])
    strategy.plugins = [p for p in strategy.plugins if type(p).__name__ != "ProjectionPlugin"]
    strategy.make_optimizer(reset_optimizer_state=True)
    assert torch.equal(strategy.optimizer.projection(strategy.model[2].weight), torch.eye(8))


def test_the_plugin_names_an_optimizer_without_projections():
    strategy, experiences = avalanche_strategy(grows=False, bias=False)
    strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer: expected a ProjectedSGD or ProjectedAdamW, got SGD"):
        strategy.train(experiences[0])
