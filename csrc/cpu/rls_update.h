// P <- P - k k^T / d with k = P h and d = alpha nu + h.k, then forgetting, then normalisation.
#pragma once

#include <cmath>

#include "kernels.h"
#include "product.h"
#include "scratch.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

inline double alpha_of(const Hyperparameters& hyper) {
  return hyper.alpha_tensor == nullptr ? hyper.alpha : *hyper.alpha_tensor;
}

// The alpha of d: hyper's, times the nu that |h|^2 = squares makes of `nu`, where there is one.
template <class A>
struct Alpha {
  A next = 0, value;

  Alpha(const Hyperparameters& hyper, const void* nu, A squares) : value(A(alpha_of(hyper))) {
    if (nu == nullptr) return;
    const A old = *static_cast<const A*>(nu);
    next = old == 0 ? squares : old + A(kNuRate) * (squares - old);
    value *= next;
  }
  // Once the mean is absorbed.
  void keep(void* nu) const {
    if (nu != nullptr) *static_cast<A*>(nu) = next;
  }
};

// What an update subtracts from P: sign * u u^T, with u = k / sqrt|d|.
template <class A>
struct RankOne {
  A sign;
  bool absorbed;  // false: d is not usable, P stays
};

// Turns k into u, in place; nu, or null, takes in |h|^2.
template <class A>
RankOne<A> scale_to_u(A* k, const A* h, int64_t s, const Hyperparameters& hyper, void* nu) {
  Vec<A> sums = {}, square_sums = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= s; j += kLanes<A>) {
    const Vec<A> x = load(h + j);
    sums += x * load(k + j);
    square_sums += x * x;
  }
  A d = sum<A>(sums), squares = sum<A>(square_sums);
  for (; j < s; ++j) d += h[j] * k[j], squares += h[j] * h[j];
  const Alpha<A> alpha(hyper, nu, squares);
  d += alpha.value;
  if (!std::isfinite(d) || d == 0) return {0, false};
  alpha.keep(nu);
  const A root = std::sqrt(std::fabs(d));
  for (j = 0; j < s; ++j) k[j] /= root;
  return {d > 0 ? A(1) : A(-1), true};
}

// Row i of P. u_i u_j is the same as u_j u_i to the last bit, so P stays symmetric.
template <class A>
void update_row(A* row, const A* u, int64_t i, int64_t s, A sign, A forget) {
  const A keep = A(1) - forget, factor = sign * u[i];
  const Vec<A> keeps = broadcast(keep), factors = broadcast(factor);
  int64_t j = 0;
  for (; j + kLanes<A> <= s; j += kLanes<A>) store<A>(row + j, keeps * (load(row + j) - factors * load(u + j)));
  for (; j < s; ++j) row[j] = keep * (row[j] - factor * u[j]);
  row[i] += forget;
}

template <class A>
A sum_of_squares(const A* row, int64_t s) {
  A total = 0;
  for (int64_t j = 0; j < s; ++j) total += row[j] * row[j];
  return total;
}

// P / |P|_F. The sums of the rows are added in order, whatever the threads.
template <class A>
void normalize(A* P, int64_t s, ParallelFor parallel_for) {
  Scratch<A> squares(s);
  const int64_t grain = kElementsPerTask / s;
  parallel(parallel_for, s, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) squares[i] = sum_of_squares(P + i * s, s);
  });
  A total = 0;
  for (int64_t i = 0; i < s; ++i) total += squares[i];
  const A norm = std::sqrt(total);
  parallel(parallel_for, s, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * s; i < end * s; ++i) P[i] /= norm;
  });
}

template <class A>
void rls_update(A* P, const A* h, int64_t s, const Hyperparameters& hyper, void* nu, ParallelFor parallel_for) {
  Scratch<A> k(s);
  project<A>(P, nullptr, 0, h, s, k.get(), parallel_for);
  const RankOne<A> rank_one = scale_to_u(k.get(), h, s, hyper, nu);
  if (!rank_one.absorbed) return;
  parallel(parallel_for, s, kElementsPerTask / s, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) update_row(P + i * s, k.get(), i, s, rank_one.sign, A(hyper.forget));
  });
  if (hyper.normalize) normalize(P, s, parallel_for);
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
