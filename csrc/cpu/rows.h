// The rows of K in P = B - K^T K or P = beta I - K^T K: X P = (X B or beta X) - (X K^T) K.
#pragma once

#include "product.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// So many vectors of a row of K meet kColumns rows of X in registers.
constexpr int kVectors = 3;

// out[q] = scale * X[q] - sum over i of t[q * count + i] K[i], for Q rows of X and V vectors from column j on. Part: V
// is 1, and only n columns are there.
template <class A, int Q, int V, bool Part = false>
void subtract_at(const A* const* X, A scale, const A* t, const A* K, int64_t pitch, int64_t count, int64_t j,
                 A* const* out, int64_t n = 0) {
  const auto read = [&](const A* p) {
    if constexpr (Part)
      return load_part(p, n);
    else
      return load(p);
  };
  Vec<A> sums[Q][V];
  for (int q = 0; q < Q; ++q) {
    for (int v = 0; v < V; ++v) sums[q][v] = broadcast(scale) * read(X[q] + j + v * kLanes<A>);
  }
  for (int64_t i = 0; i < count; ++i) {
    Vec<A> k[V];
    for (int v = 0; v < V; ++v) k[v] = read(K + i * pitch + j + v * kLanes<A>);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Vec<A> factor = broadcast(t[q * count + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[q][v] -= factor * k[v];
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int v = 0; v < V; ++v) {
      if constexpr (Part) {
        store_part<A>(out[q] + j, sums[q][v], n);
      } else {
        store<A>(out[q] + j + v * kLanes<A>, sums[q][v]);
      }
    }
  }
}

// The same for at most kColumns rows of X, and all s columns. `out` may be X.
template <class A, int Q = kColumns>
void subtract_rows(const A* const* X, int n, A scale, const A* t, const A* K, int64_t pitch, int64_t count, int64_t s,
                   A* const* out) {
  if constexpr (Q > 0) {
    if (n < Q) return subtract_rows<A, Q - 1>(X, n, scale, t, K, pitch, count, s, out);
    int64_t j = 0;
    for (; j + kVectors * kLanes<A> <= s; j += kVectors * kLanes<A>) {
      subtract_at<A, Q, kVectors>(X, scale, t, K, pitch, count, j, out);
    }
    for (; j + kLanes<A> <= s; j += kLanes<A>) subtract_at<A, Q, 1>(X, scale, t, K, pitch, count, j, out);
    if (j < s) subtract_at<A, Q, 1, true>(X, scale, t, K, pitch, count, j, out, s - j);
  }
}

// K folded into R rows of B, from row i on. Each element's sum has the same terms in the same order as its mirror
// image's, and is made of the same vector operations in the last columns too, so that P stays symmetric to the last
// bit.
template <class A, int R>
void fold_rows(A* P, int64_t i, int64_t s, const A* K, int64_t count, A last_sign, A* factors) {
  for (int64_t m = 0; m < count; ++m) {
    for (int r = 0; r < R; ++r) factors[m * R + r] = (m + 1 == count ? last_sign : A(1)) * K[m * s + i + r];
  }
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= s; j += 2 * kLanes<A>) {
    Vec<A> left[R], right[R];
    for (int r = 0; r < R; ++r) {
      left[r] = load(P + (i + r) * s + j);
      right[r] = load(P + (i + r) * s + j + kLanes<A>);
    }
    for (int64_t m = 0; m < count; ++m) {
      const Vec<A> u_left = load(K + m * s + j), u_right = load(K + m * s + j + kLanes<A>);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> factor = broadcast(factors[m * R + r]);
        left[r] -= factor * u_left;
        right[r] -= factor * u_right;
      }
    }
    for (int r = 0; r < R; ++r) {
      store<A>(P + (i + r) * s + j, left[r]);
      store<A>(P + (i + r) * s + j + kLanes<A>, right[r]);
    }
  }
  for (; j < s; j += kLanes<A>) {
    const int64_t n = s - j < kLanes<A> ? s - j : kLanes<A>;
    for (int r = 0; r < R; ++r) {
      Vec<A> p = load_part(P + (i + r) * s + j, n);
      for (int64_t m = 0; m < count; ++m) p -= broadcast(factors[m * R + r]) * load_part(K + m * s + j, n);
      store_part<A>(P + (i + r) * s + j, p, n);
    }
  }
}

template <class A>
void fold(const Projection& projection, int64_t s, A last_sign, ParallelFor parallel_for) {
  constexpr int R = 4;
  A* P = static_cast<A*>(projection.base);
  const A* K = static_cast<const A*>(projection.rows);
  const int64_t count = *projection.count, blocks = (s + R - 1) / R;
  if (count == 0) return;
  parallel(parallel_for, blocks, kWorkPerTask / (R * s * count), [&](int64_t begin, int64_t end) {
    Scratch<A> factors(R * count);
    for (int64_t i = begin * R; i < end * R && i < s; i += R) {
      if (i + R <= s) {
        fold_rows<A, R>(P, i, s, K, count, last_sign, factors.get());
      } else {
        for (int64_t row = i; row < s; ++row) fold_rows<A, 1>(P, row, s, K, count, last_sign, factors.get());
      }
    }
  });
  *projection.count = 0;
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
