"""The operations as Triton kernels, for any device Triton compiles for. Importing this imports Triton."""

from .entropy_fusion import entropy_fusion
from .feature_mean import feature_mean
from .head_step import head_step_, rls_update_
from .rank_step import rank_step_

__all__ = ["entropy_fusion", "feature_mean", "head_step_", "rank_step_", "rls_update_"]
