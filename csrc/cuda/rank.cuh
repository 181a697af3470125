// P = β I − KᵀK on the device: its parts, what the launches of a step hand to each other, and what h̄ does to it.
#pragma once

#include "numeric.cuh"
#include "reduce.cuh"
#include "step.cuh"

namespace mla_ext::cuda {

constexpr int kSlice = kWarp;  // columns of a block: one for each lane
constexpr int kMaxChunks = 8;  // parts of the columns that t = [G; h̄] Kᵀ is summed over

__host__ __device__ inline int slices(int s) { return static_cast<int>(ceil_div(s, kSlice)); }

template <typename A>
struct RankForm {
  A* beta;
  A* rows;         // K: (capacity, s)
  int64_t* count;  // rows of K in use
  A* nu;           // or null
  int capacity, s;

  // In the caller's memory.
  double* gram;        // (capacity, capacity): K Kᵀ
  double* columns;     // (capacity, capacity), for a decomposition that does not fit on chip
  int64_t* old_count;  // before the step, as the launches that write count and beta must not read them
  A* old_beta;
  A* old_nu;
  A* first_step;  // 1 or 0
  A* t;           // (kMaxChunks, capacity, C + 1): parts of t
  A* k;           // (s)
  A* Z;           // (C, s): G P_{t-1}, where the gradient waits for P_t
  A* mean_dot_k;  // (slices): parts of h̄ᵀk
  A* k_dot_k;     // (slices): of |k|²
  A* h_dot_h;     // (slices): of |h̄|²
  A* grad_dot_k;  // (C, slices): and of G k
  A* kept;        // (capacity / 2, s): the rows after a compression
  uintptr_t end;  // of that memory

  RankForm(const Projection& P, int64_t C, int64_t s, void* memory)
      : beta(static_cast<A*>(P.beta)),
        rows(static_cast<A*>(P.rows)),
        count(P.count),
        nu(static_cast<A*>(P.nu)),
        capacity(static_cast<int>(P.capacity)),
        s(static_cast<int>(s)),
        end(reinterpret_cast<uintptr_t>(memory)) {
    const int64_t R = P.capacity, parts = slices(static_cast<int>(s));
    take(gram, R * R);
    take(columns, R * R);
    take(old_count, 1);
    take(old_beta, 1);
    take(old_nu, 1);
    take(first_step, 1);
    take(t, kMaxChunks * R * (C + 1));
    take(k, s);
    take(Z, C * s);
    take(mean_dot_k, parts);
    take(k_dot_k, parts);
    take(h_dot_h, parts);
    take(grad_dot_k, C * parts);
    take(kept, R / 2 * s);
  }

  /// Row i, where k is the last one, not yet divided by √d.
  __device__ const A* row(int i) const { return i + 1 < capacity ? rows + int64_t{i} * s : k; }

 private:
  template <typename E>
  void take(E*& array, int64_t elements) {
    array = reinterpret_cast<E*>(end);
    end += static_cast<uintptr_t>(round_up(elements * static_cast<int64_t>(sizeof(E)), kVectorBytes));
  }
};

/// `reference.rank_update`: k / √d becomes a row, then β ← (1−ρ) β + ρ and K ← √(1−ρ) K. The same in every thread.
template <typename A>
struct RankUpdate {
  bool absorbed;  // d is finite and above 0; else all stays as it is
  bool adds_row;  // P has something left along h̄
  bool is_full;   // the row is the last that there is room for
  A root;         // √d
  A keep;         // 1 − ρ
  A forget;       // ρ
  A factor;       // √(1−ρ)
  A beta;         // the new one
  A nu;           // the new one, where there is one
  int64_t count;  // the new one

  __device__ RankUpdate(const RankForm<A>& P, const Hyperparameters& hyper)
      : keep(static_cast<A>(1.0 - hyper.forget)), forget(static_cast<A>(hyper.forget)), factor(sqrt(keep)) {
    const A mean_dot_k = sum_of(P.mean_dot_k, slices(P.s));
    // In exact arithmetic h̄ᵀk ≥ |k|²/β, as 0 ⪯ P ⪯ βI. The larger of the two, as rounding may break that. And k is
    // P h̄ only to within ε β |h̄|: a smaller d would let its error make P indefinite.
    const A least = sum_of(P.k_dot_k, slices(P.s)) / *P.old_beta;
    const A squares = sum_of(P.h_dot_h, slices(P.s));
    const A noise = kRankNoise<A> * *P.old_beta * squares;
    const Alpha<A> scaled_alpha(hyper, P.nu ? P.old_nu : nullptr);
    const A alpha = scaled_alpha(squares);
    nu = scaled_alpha.next_nu(squares);
    const A d = (noise > alpha ? noise : alpha) + (least > mean_dot_k ? least : mean_dot_k);
    absorbed = isfinite(d) && d > A(0);
    adds_row = absorbed && mean_dot_k >= noise;
    root = sqrt(d);
    beta = absorbed ? keep * *P.old_beta + forget : *P.old_beta;
    count = *P.old_count + (adds_row ? 1 : 0);
    is_full = adds_row && count == P.capacity;
  }

  /// What a row of K, or k, is multiplied by.
  __device__ A scale(bool is_new) const { return is_new ? factor / root : factor; }

  /// (g P_t)_i from z = (g P_{t-1})_i, g_i, g·k and k_i.
  __device__ A projected(A z, A g_i, A g_dot_k, A k_i) const {
    if (!absorbed) return z;
    const A removed = adds_row ? g_dot_k / root * (k_i / root) : A(0);
    return keep * (z - removed) + forget * g_i;
  }
};

}  // namespace mla_ext::cuda
