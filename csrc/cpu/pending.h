// Updates of P that wait: P = B - sum of u u^T over the rows u of a small matrix K. P itself is then written once in
// many steps, and read once a step.
#pragma once

#include "product.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// z = x B becomes x P, with the first `count` rows u of K; the last one counts with `last_sign`. `dots` has room for
// count.
template <class A>
void correct_row(const A* x, A* z, int64_t s, const A* K, int64_t count, A last_sign, A* dots) {
  if (count == 0) return;
  product<A>(K, &x, 1, s, 0, count, dots, s);
  dots[count - 1] *= last_sign;
  int64_t j = 0;
  for (; j + kLanes<A> <= s; j += kLanes<A>) {
    Vec<A> v = load(z + j);
    for (int64_t i = 0; i < count; ++i) v -= broadcast(dots[i]) * load(K + i * s + j);
    store<A>(z + j, v);
  }
  for (; j < s; ++j) {
    for (int64_t i = 0; i < count; ++i) z[j] -= dots[i] * K[i * s + j];
  }
}

template <class A>
void correct(const void* X, void* Z, int64_t n, int64_t s, const Pending& pending, ParallelFor parallel_for) {
  const A* K = static_cast<const A*>(pending.rows);
  const int64_t count = *pending.count;
  parallel(parallel_for, n, kWorkPerTask / (2 * s * count + 1), [&](int64_t begin, int64_t end) {
    Scratch<A> dots(count);
    for (int64_t q = begin; q < end; ++q) {
      correct_row(static_cast<const A*>(X) + q * s, static_cast<A*>(Z) + q * s, s, K, count, A(1), dots.get());
    }
  });
}

// R rows of P, from row i on. Each element's sum has the same terms in the same order as its mirror image's, and is
// made of the same vector operations in the last columns too, so that P stays symmetric to the last bit.
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
void fold(void* projection, int64_t s, const Pending& pending, A last_sign, ParallelFor parallel_for) {
  constexpr int R = 4;
  A* P = static_cast<A*>(projection);
  const A* K = static_cast<const A*>(pending.rows);
  const int64_t count = *pending.count, blocks = (s + R - 1) / R;
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
  *pending.count = 0;
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
