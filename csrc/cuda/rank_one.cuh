// P_t = (1−ρ) (P − k kᵀ/d) + ρ I, eq. 5: the update of P by k = P h̄ and d = α + h̄ᵀk.
#pragma once

#include "numeric.cuh"

namespace mla_ext::cuda {

template <typename A>
struct RankOne {
  A sign;          // of d: rounding can make P slightly indefinite, and the signed update then corrects it
  A inverse_root;  // 1 / √|d|
  A keep;          // 1 − ρ
  A forget;        // ρ
  bool absorbed;   // false: a d that is 0, infinite or NaN leaves P as it is

  __device__ RankOne(A d, double rho)
      : sign(d < A(0) ? A(-1) : A(1)),
        inverse_root(A(1) / sqrt(fabs(d))),
        keep(static_cast<A>(1.0 - rho)),
        forget(static_cast<A>(rho)),
        absorbed(isfinite(d) && d != A(0)) {}

  /// u = k / √|d|, so that u uᵀ is symmetric to the last bit.
  __device__ A scaled(A k) const { return k * inverse_root; }

  /// The new P_ij. u_i u_j inside the fma is exact, so P_ij and P_ji get the same bits.
  __device__ A updated(A p, A u_i, A u_j, bool diagonal) const {
    return keep * fma(-sign * u_i, u_j, p) + (diagonal ? forget : A(0));
  }

  /// (g P_t)_i from z = (g P)_i, g_i and g·u, without P_t: g P_t = (1−ρ) (z − sign (g·u) uᵀ) + ρ g.
  __device__ A projected(A z, A g_i, A g_dot_u, A u_i) const {
    return keep * fma(-sign * g_dot_u, u_i, z) + forget * g_i;
  }
};

/// Calls visit(row, column, Vector of the updated P) for every vector of `rows` rows of P, which starts at row
/// `first_row`. `p` is where the first of them lies, `stride` elements apart, in global or in shared memory.
/// own_u[row] = u of the rows. All threads of the block call.
template <int kWidth, typename A, typename Visit>
__device__ inline void update_rows(const RankOne<A>& rank_one, const A* p, int64_t stride, int64_t first_row, int rows,
                                   int s, const A* k, const A* own_u, Visit visit) {
  constexpr int kBatch = 4;  // loads in flight: visit() may store to P, so the compiler cannot move later loads up
  for (int column = static_cast<int>(threadIdx.x) * kWidth; column < s;
       column += static_cast<int>(blockDim.x) * kWidth) {
    Vector<A, kWidth> u = load<kWidth>(k + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u.at[i] = rank_one.scaled(u.at[i]);
    for (int first = 0; first < rows; first += kBatch) {
      Vector<A, kWidth> batch[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b < rows) batch[b] = load<kWidth>(p + (first + b) * stride + column);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = first + b;
        if (row >= rows) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          batch[b].at[i] =
              rank_one.updated(batch[b].at[i], own_u[row], u.at[i], first_row + row == int64_t{column} + i);
        }
        visit(row, column, batch[b]);
      }
    }
  }
}

}  // namespace mla_ext::cuda
