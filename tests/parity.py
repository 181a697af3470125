"""The rule every backend is held to: no more than twice the error of plain PyTorch in the same precision."""

from torch import Tensor


def error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, tiny: float = 1e-6) -> None:
    """`truth` is the reference in float64, `plain` the reference in the precision of `actual`.

    `tiny` is relative to the largest entry of truth; in float64, where plain is the truth itself, it is all there is.
    """
    assert actual.shape == truth.shape and actual.dtype == plain.dtype and actual.isfinite().all()
    scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
    tiny = tiny if actual.element_size() < 8 else 1e-12
    assert error(actual, truth) <= 2 * error(plain, truth) + tiny * scale
