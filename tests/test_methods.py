"""The methods of 2024 and 2025 in the evidence: each has the property that defines it."""

import pytest
import torch
import torch.nn.functional as F
from evidence_data import write_data

from benchmarks.evidence.methods import METHODS, Setting
from benchmarks.evidence.methods.cggm import RATE, shares, weight_gradient
from benchmarks.evidence.methods.igm import softened
from benchmarks.evidence.methods.mmpareto import common_direction
from mla_ext import MultimodalData, load_npz
from mla_ext.multimodal.model import Step

SETTING = Setting(lr=0.02, weight_decay=1e-4, own=0.5, seed=0, epochs=2, width=8)


@pytest.fixture
def data(tmp_path) -> MultimodalData:
    return load_npz(write_data(tmp_path / "toy.npz")).standardized()


def built(name, data, own=None):
    torch.manual_seed(0)
    setting = Setting(**{**vars(SETTING), "own": METHODS[name].default if own is None else own})
    return METHODS[name].build(data, setting)


def batch(data, modalities=None, n=12):
    return Step(modalities or data.modalities, data.indices("train")[:n])


def flat(module, loss):
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def stepped(model, optimizer, data, step):
    """One step as `fit` takes it; the gradients that the optimizer was given, flat, by the first part of the name."""
    optimizer.zero_grad(set_to_none=True)
    model.loss(data, step).backward()
    optimizer.step()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    groups = {f"encoders.{m}" for m in model.modalities} | {name.partition(".")[0] for name in named} - {"encoders"}
    found = {g: [grad.flatten() for name, grad in named.items() if name.startswith(g + ".")] for g in groups}
    return {g: torch.cat(grads) for g, grads in found.items() if grads}


# ---- DGL -------------------------------------------------------------------------------------------------------------


def test_dgl_cuts_the_joint_loss_from_the_encoders_and_the_unimodal_ones_from_the_head(data):
    model, _ = built("dgl", data, own=3.0)
    step = batch(data)
    labels = data.labels[step.indices]
    model.loss(data, step).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}

    parts, present = model.features(data, step.indices)
    joint, alone = model.joint(parts, present), model.unimodal(parts, present)
    names, parameters = zip(*model.named_parameters(), strict=True)
    of_joint = dict(
        zip(names, torch.autograd.grad(F.cross_entropy(joint, labels), parameters, retain_graph=True), strict=True)
    )
    unimodal = sum(F.cross_entropy(z, labels) for z in alone)
    of_alone = dict(zip(names, torch.autograd.grad(unimodal, parameters), strict=True))
    for name in names:
        expected = of_joint[name] if name.startswith("head") else 3.0 * of_alone[name]
        torch.testing.assert_close(grads[name], expected)
        assert not torch.allclose(grads[name], of_joint[name] + 3.0 * of_alone[name])


# ---- MMPareto --------------------------------------------------------------------------------------------------------


def test_the_common_direction_increases_no_loss_and_is_the_shortest():
    torch.manual_seed(0)
    conflicts = 0
    for _ in range(200):
        a, b = torch.randn(2, 3, dtype=torch.float64) * torch.rand(2, 1, dtype=torch.float64) * 3
        d = common_direction(a, b)
        assert min(d @ a, d @ b) >= -1e-12
        if a @ b < 0:
            conflicts += min((a + b) @ a, (a + b) @ b) < 0
            between = torch.linspace(0, 1, 1001, dtype=torch.float64).unsqueeze(1)
            assert d.norm() <= (between * a + (1 - between) * b).norm(dim=1).min() + 1e-12
        else:
            torch.testing.assert_close(d, (a + b) / 2)
    assert conflicts > 10  # where the plain sum would increase one of the losses


@pytest.mark.parametrize("conflict", [False, True])
def test_mmpareto_steps_the_encoders_so_and_keeps_the_length(data, conflict):
    model, optimizer = built("mmpareto", data, own=1.5)
    with torch.no_grad():  # the joint head answers what each modality's own head says, or the opposite
        weight = torch.cat([head.weight for head in model.heads], dim=1)
        model.head.weight.copy_(-weight if conflict else weight)
    step = batch(data)
    labels = data.labels[step.indices]
    parts, present = model.features(data, step.indices)
    joint = F.cross_entropy(model.joint(parts, present), labels)
    alone = [F.cross_entropy(z, labels) for z in model.unimodal(parts, present)]
    pairs = [(flat(e, joint), flat(e, own)) for e, own in zip(model.encoders.values(), alone, strict=True)]
    plain = {"head": flat(model.head, joint), "heads": flat(model.heads, sum(alone))}
    grads = stepped(model, optimizer, data, step)
    for m, (g, own) in zip(model.modalities, pairs, strict=True):
        found = grads[f"encoders.{m}"]
        assert (g @ own < 0) == conflict
        assert min(found @ g, found @ own) >= 0
        torch.testing.assert_close(found.norm(), 1.5 * (g + own).norm())
        if not conflict:
            torch.testing.assert_close(found, 1.5 * (g + own))
    for name, expected in plain.items():
        torch.testing.assert_close(grads[name], expected)


# ---- CGGM ------------------------------------------------------------------------------------------------------------


def test_cggm_shares_slow_down_who_gains_most():
    assert shares(torch.tensor([0.3, 0.1])).tolist() == pytest.approx([0.25, 0.75])
    assert shares(torch.tensor([0.2, 0.2, 0.4])).tolist() == pytest.approx([0.75, 0.75, 0.5])
    assert shares(torch.tensor([0.5, -0.5])).tolist() == [0.5, 0.5]
    assert shares(torch.tensor([0.3, -0.1])).tolist() == [0.0, 1.0]


def test_weight_gradient_is_autograds():
    torch.manual_seed(0)
    h, y, layer = torch.randn(7, 5), torch.randint(0, 3, (7,)), torch.nn.Linear(5, 3)
    z = layer(h)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, y), layer.weight, retain_graph=True)
    torch.testing.assert_close(weight_gradient(z, h, y), expected)


def test_cggm_scales_the_encoders_and_turns_the_joint_gradient_to_the_classifiers(data):
    model, optimizer = built("cggm", data, own=0.0)
    step = batch(data)
    joint = F.cross_entropy(model.joint(*model.features(data, step.indices)), data.labels[step.indices])
    plain = {m: flat(encoder, joint) for m, encoder in model.encoders.items()}
    head = flat(model.head, joint)
    model.accuracies.copy_(torch.tensor([-0.2, 0.1]))
    before = model.accuracies.clone()
    grads = stepped(model, optimizer, data, step)
    expected = RATE * shares(model.accuracies - before)
    assert expected[0] != expected[1]
    for m, coefficient in zip(model.modalities, expected, strict=True):
        torch.testing.assert_close(grads[f"encoders.{m}"], coefficient * plain[m])
    torch.testing.assert_close(grads["head"], head)

    model, optimizer = built("cggm", data, own=0.5)  # the direction: a step down the loss turns the gradients together

    def cosines():
        parts, present = model.features(data, step.indices)
        labels, z, alone = data.labels[step.indices], model.joint(parts, present), model.unimodal(parts, present)
        pairs = [
            (weight_gradient(z, p, labels), weight_gradient(a, p, labels)) for p, a in zip(parts, alone, strict=True)
        ]
        return torch.stack([F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs])

    loss = model.loss(data, step)
    parts, present = model.features(data, step.indices)
    labels = data.labels[step.indices]
    rest = F.cross_entropy(model.joint(parts, present), labels)
    rest = rest + sum(F.cross_entropy(z, labels) for z in model.unimodal(parts, present))
    expected = 0.5 * (model.coefficients.abs() - model.coefficients * cosines()).mean()
    torch.testing.assert_close(loss - rest, expected)
    assert not torch.equal(flat(model.head, loss), flat(model.head, rest))
    torch.testing.assert_close(flat(model.classifiers, loss), flat(model.classifiers, rest))


# ---- IGM -------------------------------------------------------------------------------------------------------------


def test_softened_shuts_no_direction_and_damps_the_strongest():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    P = softened(basis @ values.diag() @ basis.T, 2.0)
    torch.testing.assert_close(P @ basis, basis * torch.exp(-2.0 * values / 4))
    torch.testing.assert_close(softened(torch.eye(4), 2.0), torch.eye(4))


def test_igm_projects_the_head_by_what_the_others_fed_in(data):
    model, optimizer = built("igm", data, own=2.0)
    first, second = data.modalities

    def features(m):
        return model.encoders[m](model.inputs(data, m, batch(data).indices)).detach()

    def plain(m):
        loss = F.cross_entropy(model.head(features(m)), data.labels[batch(data).indices])
        return torch.autograd.grad(loss, model.head.weight)[0]

    means, G = [features(first).mean(0)], plain(first)
    stepped(model, optimizer, data, batch(data, (first,)))
    torch.testing.assert_close(model.head.weight.grad, G)  # the others have fed in nothing yet
    G, seen = plain(second), features(second)
    stepped(model, optimizer, data, batch(data, (second,)))
    other = torch.outer(means[0], means[0])
    torch.testing.assert_close(model.head.weight.grad, G @ softened(other, 2.0))
    strongest = means[0] / means[0].norm()
    torch.testing.assert_close(model.head.weight.grad @ strongest, torch.exp(torch.tensor(-2.0)) * (G @ strongest))
    G = plain(first)
    stepped(model, optimizer, data, batch(data, (first,)))
    mean = seen.mean(0)
    torch.testing.assert_close(model.head.weight.grad, G @ softened(torch.outer(mean, mean), 2.0))


def test_igm_predicts_by_the_mean_of_the_probabilities(data):
    model, _ = built("igm", data.with_missing(0.5, 0))
    logits = model.logits(data.with_missing(0.5, 0), data.indices("test"))
    for i in range(len(data.indices("test"))):
        expected = torch.stack(
            [z[i].softmax(0) for z, has in zip(logits.unimodal, logits.present, strict=True) if has[i]]
        )
        torch.testing.assert_close(logits.joint[i].exp(), expected.mean(0))


# ---- AMST ------------------------------------------------------------------------------------------------------------


def test_amst_skips_steps_of_all_but_the_weakest(data):
    model, _ = built("amst", data, own=3)
    modalities = list(data.modalities)

    def turns(seed=0):
        steps = model.steps(data, 2, "given", torch.Generator().manual_seed(seed))
        return [s.indices.tolist() for s in steps if s.modalities == (modalities[0],)], steps

    of_first, everything = turns()
    assert len(of_first) == 11 and len(everything) == 22  # nothing is known: nothing is skipped
    model.losses.copy_(torch.tensor([0.1, 0.9]))  # the first modality is the strong one
    kept, steps = turns()
    assert kept in [of_first[first::3] for first in range(3)] and len(steps) == 11 + len(kept)
    assert {len(turns(seed)[0]) for seed in range(20)} == {3, 4}  # over the epochs a third is taken
    taken = [len(model.steps(data, 64, "given", torch.Generator().manual_seed(seed))) for seed in range(300)]
    assert 1 / 4 < taken.count(2) / 300 < 5 / 12  # also of the epochs that have one batch
    model.losses.copy_(torch.tensor([0.9, 0.1]))
    assert turns()[0] == of_first
    before = model.losses.clone()
    loss = model.loss(data, batch(data, (modalities[1],))).item()
    assert model.losses.tolist() == pytest.approx([before[0].item(), 0.9 * before[1].item() + 0.1 * loss])


# ---- ReconBoost ------------------------------------------------------------------------------------------------------


def test_reconboost_learns_what_the_others_do_not_know(data):
    model, optimizer = built("reconboost", data, own=1.0)
    first, second = data.modalities
    step = batch(data, (first,))
    labels = data.labels[step.indices]
    with torch.no_grad():  # the second modality knows the first half of the batch for certain
        logits = model.logits(data, step.indices)
    certain = torch.where(torch.arange(12).unsqueeze(1) < 6, 50.0 * F.one_hot(labels, 3), -50.0 * F.one_hot(labels, 3))
    known = logits._replace(unimodal=torch.stack([logits.unimodal[0], certain]), joint=logits.unimodal[0] + certain)
    model.logits = lambda data, indices: known
    loss = model.loss(data, step)
    own = model(first, model.inputs(data, first, step.indices))
    expected = F.cross_entropy(own, labels, reduction="none")[6:].sum() / 12
    torch.testing.assert_close(loss, expected)
    del model.logits
    grads = stepped(model, optimizer, data, step)
    assert f"encoders.{first}" in grads and f"encoders.{second}" not in grads  # what is idle stays


def test_reconboost_takes_whole_turns_and_then_rectifies(data):
    model, _ = built("reconboost", data)
    steps = model.steps(data, 8, "reversed", torch.Generator().manual_seed(0))
    first, second = data.modalities
    assert [s.modalities for s in steps] == [(second,)] * 3 + [(first,)] * 3 + [(first, second)] * 3
    for part in (steps[:3], steps[3:6], steps[6:]):
        assert sorted(torch.cat([s.indices for s in part]).tolist()) == data.indices("train").tolist()
    labels = data.labels[steps[-1].indices]
    z = model.logits(data, steps[-1].indices)
    torch.testing.assert_close(z.joint, z.unimodal.sum(0))
    torch.testing.assert_close(model.loss(data, steps[-1]), F.cross_entropy(z.joint, labels))


# ---- The head's own learning rate, and the form of P -----------------------------------------------------------------


def test_the_slower_head_steps_a_tenth_as_far(data):
    step = batch(data, (data.modalities[0],))
    moved = {}
    for name in ("alternating", "slow-head"):
        model, optimizer = built(name, data, own=0.1)
        before = model.head.weight.detach().clone(), model.encoders[data.modalities[0]][0].weight.detach().clone()
        stepped(model, optimizer, data, step)
        now = model.head.weight.detach(), model.encoders[data.modalities[0]][0].weight.detach()
        moved[name] = [b - a for a, b in zip(before, now, strict=True)]
    torch.testing.assert_close(moved["slow-head"][0], 0.1 * moved["alternating"][0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved["slow-head"][1], moved["alternating"][1])


def test_mla_is_dense_and_the_rank_form_has_rows(data):
    forms = {}
    for name in ("mla", "mla-rank"):
        model, optimizer = built(name, data)
        stepped(model, optimizer, data, batch(data, (data.modalities[0],)))
        forms[name] = optimizer.param_groups[0]["rank"], optimizer.projection(model.head.weight)
    assert [rank for rank, _ in forms.values()] == [None, 16]
    torch.testing.assert_close(forms["mla"][1], forms["mla-rank"][1])  # exact until the rows are full
    assert not torch.equal(forms["mla"][1], torch.eye(8))
