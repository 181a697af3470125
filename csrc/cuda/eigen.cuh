// Eigenvalues and eigenvectors of a small symmetric matrix by one block, always in the same order of operations.
#pragma once

#include "reduce.cuh"

namespace mla_ext::cuda {

/// Σ over the warp of x_i y_i.
__device__ inline double warp_dot(const double* x, const double* y, int n) {
  double sum = 0;
  for (int i = lane_index(); i < n; i += kWarp) sum += x[i] * y[i];
  return warp_sum(sum);
}

/// Turns the rows of the positive semidefinite M (n, n) among themselves until they are orthogonal: row i is then
/// λ_i v_iᵀ, in no order. One-sided Jacobi: a warp turns two rows, all pairs meet in each sweep, and half of them at a
/// time. Every thread of the block calls, after a barrier; another one ends it.
__device__ inline void orthogonalise(double* M, int n) {
  constexpr int kMaxSweeps = 20;        // 64 rows take 7 or 8
  constexpr double kNearlyDone = 1e-8;  // a sweep that meets no larger cosine leaves none above its square
  constexpr double kOrthogonal = 1e-16;
  const int players = n + n % 2;  // of a round-robin tournament, one of them maybe absent
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    int large = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = warp_index(); pair < players / 2; pair += warp_count()) {
        const int a = (round + pair) % (players - 1);
        const int b = pair == 0 ? players - 1 : (round - pair + players - 1) % (players - 1);
        if (a >= n || b >= n) continue;
        double* const x = M + static_cast<int64_t>(a) * n;
        double* const y = M + static_cast<int64_t>(b) * n;
        const double xx = warp_dot(x, x, n), yy = warp_dot(y, y, n), xy = warp_dot(x, y, n);
        const double cosine_between = fabs(xy) / sqrt(xx * yy);
        if (!(cosine_between > kOrthogonal)) continue;  // or NaN: one of them is 0
        large += cosine_between > kNearlyDone;
        const double zeta = (yy - xx) / (2 * xy);
        const double tangent = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        const double cosine = 1 / sqrt(1 + tangent * tangent), sine = cosine * tangent;
        for (int i = lane_index(); i < n; i += kWarp) {
          const double x_i = x[i], y_i = y[i];
          x[i] = cosine * x_i - sine * y_i;
          y[i] = sine * x_i + cosine * y_i;
        }
      }
      __syncthreads();  // the round is over
    }
    if (block_sum(lane_index() == 0 ? large : 0) == 0) return;
  }
}

}  // namespace mla_ext::cuda
