"""The shim for BalanceMM, in a stand-in that makes the calls of its MLA trainer and its MLA model.

The stand-in is ours: it has the names, the arguments and the order of the calls, and no line of that repository.
"""

import pytest
import torch
from helpers import randn
from torch import nn
from torch.nn.functional import cross_entropy

from mla_ext import ProjectedSGD, entropy_fusion, reference
from mla_ext.integrations.balancemm import GSPlugin

SIZES, S, C = {"audio": 5, "visual": 7, "text": 3}, 9, 4


class Model(nn.Module):
    """Encoders, and the head that all share, as `fusion_module.fc_out`."""

    from mla_ext.integrations.balancemm import calculate_gating_weights  # as a user imports it

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.modalitys = SIZES.keys()
        self.modality_encoder = nn.ModuleDict({name: nn.Linear(size, S) for name, size in SIZES.items()})
        self.fusion_module = nn.Module()
        self.fusion_module.fc_out = nn.Linear(S, C)
        self.to(dtype)

    def feature_extract(self, batch, modality):
        return self.modality_encoder[modality](batch[modality]).relu()

    def unimodality_calculate(self, batch):
        result = {name: self.fusion_module.fc_out(self.feature_extract(batch, name)) for name in self.modalitys}
        weights = self.calculate_gating_weights(result)
        return result | {"output": sum(result[name] * weights[name] for name in self.modalitys)}


def batch_of(seed, n=6, dtype=torch.float32):
    batch = {name: randn(n, size, seed=10 * seed + i, dtype=dtype) for i, (name, size) in enumerate(SIZES.items())}
    return batch | {"label": torch.arange(n) % C}


def train(model, optimizer, plugin, batches):
    """As its `training_step`: a step for each modality, with the plugin between backward and step."""
    for index, batch in enumerate(batches):
        for modality in model.modalitys:
            feature = model.feature_extract(batch, modality=modality)
            cross_entropy(model.fusion_module.fc_out(feature), batch["label"]).backward()
            head = model.fusion_module.fc_out
            plugin.before_update(head, feature.detach(), index, len(batches), plugin.exp_count)
            optimizer.step()
            optimizer.zero_grad()
            plugin.exp_count += 1


def test_before_update_is_the_reference():
    head, plugin = nn.Linear(S, C), GSPlugin(" ", alpha=0.3)
    P, nu = torch.eye(S, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step in range(5):
        G, features = randn(C, S, seed=step), randn(6, S, seed=100 + step) + 1
        head.weight.grad = G.clone()
        plugin.before_update(head, features, step, 5, step)
        torch.testing.assert_close(head.weight.grad, (G.double() @ P).float())
        mean = features.double().mean(dim=0)
        nu = reference.next_nu(nu, mean)
        P = reference.rls_update(P, mean, 0.3 * nu)
    torch.testing.assert_close(plugin.Pl, P.float())
    assert (P - torch.eye(S)).norm() > 1


def test_its_loop_with_torchs_sgd_steps_as_projected_sgd():
    """Momentum too: what torch's SGD gets as the gradient is what ours makes of it."""
    batches, settings = [batch_of(seed) for seed in range(4)], {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    theirs = Model()
    train(theirs, torch.optim.SGD(theirs.parameters(), **settings), GSPlugin(" "), batches)

    ours = Model()
    optimizer = ProjectedSGD(ours.parameters(), **settings, heads=[ours.fusion_module.fc_out])
    for batch in batches:
        for modality in ours.modalitys:
            optimizer.zero_grad()
            logits = ours.fusion_module.fc_out(ours.feature_extract(batch, modality))
            cross_entropy(logits, batch["label"]).backward()
            optimizer.step()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(theirs.fusion_module.fc_out.weight, Model().fusion_module.fc_out.weight)


def test_fusion_is_that_of_each_sample():
    model, batch = Model().double(), batch_of(0, dtype=torch.float64)
    result = model.unimodality_calculate(batch)
    logits = torch.stack([result[name] for name in SIZES])
    fused, _ = reference.entropy_fusion(logits)
    torch.testing.assert_close(result["output"], fused)
    torch.testing.assert_close(entropy_fusion(logits)[0], fused)


def test_fusion_of_certain_logits_is_finite():
    model = Model()
    certain, even = torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, C)
    weights = model.calculate_gating_weights({"audio": certain, "visual": even, "text": even})
    assert all(weight.shape == (1, 1) for weight in weights.values())
    assert sum(weights.values()).item() == pytest.approx(1)
    assert weights["audio"] / weights["visual"] == pytest.approx(C)  # exp of the entropies' difference, log C


def test_half_precision_and_any_width():
    head, plugin = nn.Linear(33, 2).bfloat16(), GSPlugin("0")
    head.weight.grad = randn(2, 33, dtype=torch.bfloat16)
    plugin.before_update(head, randn(4, 33, seed=1, dtype=torch.bfloat16), 0, 1, 0)
    assert plugin.Pl.shape == (33, 33) and plugin.Pl.dtype == torch.float32


def test_bad_input_is_named():
    plugin, features = GSPlugin(" "), randn(4, S)
    with pytest.raises(ValueError, match="model: expected a head with a gradient"):
        plugin.before_update(nn.Linear(S, C), features, 0, 1, 0)
    with pytest.raises(ValueError, match="Pl: expected a call of before_update first"):
        _ = plugin.Pl
    for width in (S, S + 1):
        head = nn.Linear(width, C)
        head.weight.grad = torch.ones_like(head.weight)
        if width == S:
            plugin.before_update(head, features, 0, 1, 0)
    before = plugin.Pl
    with pytest.raises(ValueError, match=r"model.weight: expected shape \(4, 9\)"):
        plugin.before_update(head, features, 0, 1, 0)
    head = nn.Linear(S, C)
    head.weight.grad = torch.ones_like(head.weight)
    with pytest.raises(ValueError, match="features: expected shape"):
        plugin.before_update(head, features[:, :3], 0, 1, 0)
    assert torch.equal(plugin.Pl, before) and head.weight.grad.eq(1).all()
