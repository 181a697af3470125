"""Properties of the mathematics, on the specification itself and on what "auto" runs."""

import math

import pytest
import torch
from helpers import needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_ext import ops, reference
from mla_ext.reference import Hyperparameters

seeds = st.integers(0, 2**31)
settings.register_profile("mla_ext", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("mla_ext")


def features(seed: int, N: int, s: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(N, s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


@given(
    seed=seeds, s=st.integers(1, 40), steps=st.integers(1, 30), alpha=st.floats(1e-3, 10), scale=st.floats(1e-3, 1e2)
)
def test_projection_is_symmetric_with_eigenvalues_in_0_1(seed, s, steps, alpha, scale):
    P = torch.eye(s, dtype=torch.float64)
    for t in range(steps):
        h = features(seed + t, 4, s, scale).mean(0)
        k = P @ h
        ops.rls_update_(P, h, alpha)
        d = alpha + h @ k
        # The RLS identity: what was absorbed keeps the fraction α/d of its image under P.
        torch.testing.assert_close(P @ h, alpha / d * k, rtol=1e-6, atol=1e-9)
        assert h @ P @ h < alpha
    assert torch.equal(P, P.T)
    eigenvalues = torch.linalg.eigvalsh(P)
    assert eigenvalues.min() > 0 and eigenvalues.max() <= 1 + 1e-6


@given(seed=seeds, s=st.integers(2, 20), C=st.integers(1, 5))
def test_a_projected_step_hardly_moves_the_answer_to_what_was_absorbed(seed, s, C):
    P, alpha = torch.eye(s, dtype=torch.float64), 1e-6
    absorbed = features(seed, 4, s).mean(0) + 0.1
    ops.rls_update_(P, absorbed, alpha)
    weight = torch.zeros(C, s, dtype=torch.float64)
    grad = torch.ones(C, s, dtype=torch.float64)
    ops.head_step_(weight, grad, None, P, None, torch.zeros(()), Hyperparameters(lr=1.0))
    assert (weight @ absorbed).abs().max() <= 1e-4 * (grad @ absorbed).abs().max()


def test_the_first_step_is_not_projected():
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad, expected = torch.ones_like(weight), weight - 0.5
    P = torch.eye(5, dtype=torch.float64)
    ops.head_step_(weight, grad, None, P, torch.ones(5, dtype=torch.float64), torch.zeros(()), Hyperparameters(lr=0.5))
    torch.testing.assert_close(weight, expected)
    assert not torch.equal(P, torch.eye(5, dtype=torch.float64))


def test_absorb_before_projects_with_the_new_p():
    h = torch.tensor([1.0, 0.0], dtype=torch.float64)
    grad = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for absorb, expected in (("after", [[-1.0, -1.0]]), ("before", [[-1.0 / 11, -1.0]])):
        weight, P = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        hyper = Hyperparameters(lr=1.0, alpha=0.1, absorb=absorb)
        ops.head_step_(weight, grad, None, P, h, torch.zeros(()), hyper)
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(P, torch.diag(torch.tensor([1 / 11, 1.0], dtype=torch.float64)))


@given(seed=seeds, s=st.integers(1, 20), forget=st.floats(0, 1))
def test_forgetting_draws_p_back_to_the_identity(seed, s, forget):
    P = torch.eye(s, dtype=torch.float64)
    h = features(seed, 3, s).mean(0)
    plain = reference.rls_update(P, h, 0.1)
    torch.testing.assert_close(
        reference.rls_update(P, h, 0.1, forget), (1 - forget) * plain + forget * torch.eye(s, dtype=torch.float64)
    )


@given(seed=seeds, s=st.integers(1, 20))
def test_normalised_p_has_unit_norm(seed, s):
    P = torch.eye(s, dtype=torch.float64)
    ops.rls_update_(P, features(seed, 3, s).mean(0), normalize=True)
    assert math.isclose(torch.linalg.matrix_norm(P), 1, rel_tol=1e-9)


logits_shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 40))


def some_logits(seed: int, shape: tuple[int, int, int], scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64), torch.rand(
        *shape[:2], generator=generator
    ) > 0.3


@given(seed=seeds, shape=logits_shapes, scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
def test_fusion_weights_sum_to_one_over_the_present(seed, shape, scale):
    logits, present = some_logits(seed, shape, scale)
    fused, weights = ops.entropy_fusion(logits, present)
    assert not fused.isnan().any()
    expected = present.any(0).double()
    torch.testing.assert_close(weights.sum(0), expected)
    assert (weights[~present] == 0).all() and (weights >= 0).all()


@given(seed=seeds, shape=logits_shapes)
def test_permuting_modalities_permutes_the_weights(seed, shape):
    logits, present = some_logits(seed, shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    fused, weights = ops.entropy_fusion(logits, present)
    permuted_fused, permuted_weights = ops.entropy_fusion(logits[order], present[order])
    torch.testing.assert_close(permuted_weights, weights[order])
    torch.testing.assert_close(permuted_fused, fused)


@given(seed=seeds, shape=logits_shapes, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_batch_composition_never_changes_a_sample(seed, shape, dtype):
    logits, present = some_logits(seed, shape)
    logits = logits.to(dtype)
    fused, weights = ops.entropy_fusion(logits, present)
    for n in range(shape[1]):
        alone, weights_alone = ops.entropy_fusion(logits[:, n : n + 1], present[:, n : n + 1])
        assert torch.equal(alone[0], fused[n]) and torch.equal(weights_alone[:, 0], weights[:, n])


@pytest.mark.parametrize("C", [2, 10, 1000, 100_000])
def test_a_uniform_distribution_has_entropy_log_c(C):
    """Against a modality of entropy 0 the weights are 1/(1+1/C) and 1/(C+1): e^-log C is 1/C."""
    logits = torch.zeros(2, 1, C, dtype=torch.float64)
    logits[1, 0, 0] = 1e4
    for weights in (reference.entropy_fusion(logits)[1], ops.entropy_fusion(logits)[1]):
        expected = torch.tensor([[1 / (C + 1)], [C / (C + 1)]], dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@given(seed=seeds, M=st.integers(2, 4))
def test_the_more_certain_modality_weighs_more(seed, M):
    logits, _ = some_logits(seed, (1, 5, 6), 1.0)
    logits = torch.cat([logits * 2.0**m for m in range(M)])  # sharper and sharper
    weights = ops.entropy_fusion(logits)[1]
    assert (weights[1:] > weights[:-1]).all()


@needs_kernels
@pytest.mark.parametrize(("s", "alpha", "kind"), [(32, 0.1, "classes"), (32, 0.01, "same"), (96, 0.1, "low rank")])
def test_20000_steps_in_float32_stay_with_float64(s, alpha, kind):
    """Rounding errors neither pile up nor make P indefinite enough to hurt; symmetry is exact."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(4, s, generator=generator, dtype=torch.float64)
    single, double = torch.eye(s), torch.eye(s, dtype=torch.float64)
    for t in range(20_000):
        noise = torch.randn(s, generator=generator, dtype=torch.float64)
        if kind == "classes":
            h = base[t % 4] + 0.1 * noise.relu()
        elif kind == "same":
            h = base[0]
        else:
            h = noise[:4] @ base + 0.01 * noise
        h = h.float()
        torch.ops.mla_ext.rls_update_(single, h, alpha, 0.0, False)
        torch.ops.mla_ext.rls_update_(double, h.double(), alpha, 0.0, False)
    assert torch.equal(single, single.T)
    # P's entries begin at 1, where a rounding is 6e-8; what is left of them after 20,000 steps may be far smaller.
    assert (single.double() - double).abs().max() <= 5e-5
    eigenvalues = torch.linalg.eigvalsh(single.double())
    assert eigenvalues.min() > -1e-6 and eigenvalues.max() <= 1 + 1e-5
