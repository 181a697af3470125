// Half of the rows of P = beta I - K^T K: its strongest directions as they are, the others made one number.
#pragma once

#include <cmath>

#include "eigen.h"
#include "rows.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// Columns of K that are worked on at once.
constexpr int64_t kStrip = 256;

// gram = K K^T for R rows, in double. The sums do not depend on the number of threads.
template <class A>
void gram(const A* K, int64_t R, int64_t s, double* gram, ParallelFor parallel_for) {
  constexpr int64_t kParts = 8;
  const int64_t strips = (s + kStrip - 1) / kStrip, parts = strips < kParts ? strips : kParts;
  Scratch<double> partial(parts * R * R);
  std::memset(partial.get(), 0, sizeof(double) * parts * R * R);
  parallel(parallel_for, parts, kWorkPerTask * parts / (R * R * s), [&](int64_t begin, int64_t end) {
    Scratch<double> widened(R * kStrip), products(R * R);
    Scratch<const double*> rows(R);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t j = part * kStrip; j < s; j += parts * kStrip) {
        const int64_t n = s - j < kStrip ? s - j : kStrip;
        for (int64_t i = 0; i < R; ++i) {
          for (int64_t c = 0; c < n; ++c) widened[i * kStrip + c] = K[i * s + j + c];
          rows[i] = widened.get() + i * kStrip;
        }
        for (int64_t q = 0; q < R; q += kColumns) {  // the lower triangle
          const int64_t stop = q + kColumns < R ? q + kColumns : R;
          product<double>(widened.get(), kStrip, rows.get() + q, stop - q, n, 0, stop, products.get() + q * R, R);
          for (int64_t i = q; i < stop; ++i) {
            for (int64_t m = 0; m <= i; ++m) partial[(part * R + i) * R + m] += products[i * R + m];
          }
        }
      }
    }
  });
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t m = 0; m <= i; ++m) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partial[(part * R + i) * R + m];
      gram[i * R + m] = gram[m * R + i] = total;
    }
  }
}

// With K K^T = V diag(lambda) V^T, P has the eigenvalue beta - lambda_i on the direction of V_i^T K. The largest lambda
// stay, and all else becomes beta_new I, of the same trace: a row is sqrt(beta_new - p_i) times its direction.
template <class A>
void compress(const Projection& P, int64_t s, ParallelFor parallel_for) {
  const int64_t R = *P.count, keep = P.capacity / 2;
  A* K = static_cast<A*>(P.rows);
  A& beta = *static_cast<A*>(P.beta);
  Scratch<double> V(R * R), lambda(R);
  gram(K, R, s, V.get(), parallel_for);
  eigen(V.get(), lambda.get(), R);

  // At least what is rounding: none becomes negative over the compressions. NaN stays visible.
  const double least = double(kRankNoise<A>) * beta;
  const auto p = [&](int64_t i) { return beta - lambda[i] < least ? least : beta - lambda[i]; };
  double dropped = 0;
  for (int64_t i = keep; i < R; ++i) dropped += p(i);
  double rest = beta;
  if (s > keep) rest = (dropped + double(s - R) * beta) / double(s - keep);
  rest = rest < 0 ? 0 : rest;  // more rows than s: their sum is 0 to rounding

  // p_i <= rest <= beta, so a factor is at most 1; a direction that is not there becomes a row of 0.
  Scratch<A> factors(keep * R);
  for (int64_t i = 0; i < keep; ++i) {
    const bool is_there = lambda[i] > 1e-15 * beta && rest > p(i);
    const double factor = is_there ? std::sqrt((rest - p(i)) / lambda[i]) : 0;
    for (int64_t m = 0; m < R; ++m) factors[i * R + m] = A(-factor * V[i * R + m]);
  }
  const int64_t strips = (s + kStrip - 1) / kStrip;
  parallel(parallel_for, strips, kWorkPerTask / (keep * R * kStrip + 1), [&](int64_t begin, int64_t end) {
    Scratch<A> old(R * kStrip);
    for (int64_t j = begin * kStrip; j < end * kStrip && j < s; j += kStrip) {
      const int64_t n = s - j < kStrip ? s - j : kStrip;
      for (int64_t i = 0; i < R; ++i) std::memcpy(old.get() + i * kStrip, K + i * s + j, sizeof(A) * n);
      for (int64_t i = 0; i < keep; i += kColumns) {
        const int count = int(keep - i < kColumns ? keep - i : kColumns);
        A* out[kColumns];
        const A* none[kColumns];
        for (int q = 0; q < count; ++q) out[q] = K + (i + q) * s + j, none[q] = old.get();
        subtract_rows<A>(none, count, A(0), factors.get() + i * R, old.get(), kStrip, R, n, out);
      }
    }
  });
  beta = A(rest);
  *P.count = keep;
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
