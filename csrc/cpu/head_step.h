// One step of the shared head: the gradient projected, SGD with the result, and P's update.
#pragma once

#include "compress.h"
#include "dtype.h"
#include "rank_step.h"
#include "rls_update.h"
#include "rows.h"
#include "sgd.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// The rest of a step whose update of P becomes a row of K, from Z = [G; h] B on: Z becomes [G; h] P.
template <class T, class A>
void deferred_step(const HeadStep& step, const A* G, const A* h, A* Z, ParallelFor parallel_for) {
  const int64_t s = step.s, C = step.C;
  A* K = static_cast<A*>(step.projection.rows);
  int64_t& count = *step.projection.count;
  // z = x B becomes x P for n rows, at most kColumns, with `used` rows of K.
  const auto correct = [&](const A* x, A* z, int n, int64_t used, A last_sign, A* t) {
    const A* X[kColumns];
    A* out[kColumns];
    for (int q = 0; q < n; ++q) X[q] = x + q * s, out[q] = z + q * s;
    if (used == 0) return;
    product<A>(K, s, X, n, s, 0, used, t, used);
    for (int q = 0; q < n; ++q) t[(q + 1) * used - 1] *= last_sign;
    subtract_rows<A>(out, n, A(1), t, K, s, used, s, out);
  };
  RankOne<A> rank_one{1, false};
  if (h != nullptr) {
    A* k = Z + C * s;
    Scratch<A> t(count);
    correct(h, k, 1, count, A(1), t.get());
    rank_one = scale_to_u(k, h, s, step.hyper, step.projection.nu);
    if (rank_one.absorbed) std::memcpy(K + count * s, k, sizeof(A) * s);
  }
  const int64_t absorbed = count + (rank_one.absorbed ? 1 : 0);
  const int64_t used = step.hyper.absorb_before ? absorbed : count;
  const A last_sign = used > count ? rank_one.sign : A(1);
  parallel(parallel_for, C, kWorkPerTask / (2 * s * (used + 1)), [&](int64_t begin, int64_t end) {
    Scratch<A> t(kColumns * used);
    for (int64_t c = begin; c < end; c += kColumns) {
      const int n = int(end - c < kColumns ? end - c : kColumns);
      correct(G + c * s, Z + c * s, n, used, last_sign, t.get());
      sgd<T, A>(step, Z + c * s, c * s, (c + n) * s);
    }
  });
  count = absorbed;
  // B absorbs a negative sign at once: only the last row may have one.
  if (rank_one.absorbed && (count == step.projection.capacity || rank_one.sign < 0)) {
    fold<A>(step.projection, s, rank_one.sign, parallel_for);
  }
}

// A step with a dense B.
template <class T, class A>
void dense_step(const HeadStep& step, const Workspace& workspace, ParallelFor parallel_for) {
  const int64_t s = step.s, C = step.C;
  const bool deferred = step.projection.rows != nullptr;
  A* B = static_cast<A*>(step.projection.base);
  const A* h = static_cast<const A*>(step.feature_mean);
  if (step.hyper.absorb_before && h != nullptr && (!deferred || workspace.product != nullptr)) {
    if (deferred) fold<A>(step.projection, s, A(1), parallel_for);
    rls_update<A>(B, h, s, step.hyper, step.projection.nu, parallel_for);
    h = nullptr;
  }

  A* Z = static_cast<A*>(workspace.projected);
  A* k = Z + C * s;
  constexpr bool kWiden = sizeof(T) < sizeof(A);
  const bool needs_grad = workspace.product == nullptr || deferred;
  Scratch<A> widened(kWiden && needs_grad ? C * s : 0);
  if (kWiden && needs_grad) widen(static_cast<const T*>(step.grad), widened.get(), C * s);
  const A* G = kWiden ? widened.get() : static_cast<const A*>(step.grad);
  if (workspace.product != nullptr) {
    workspace.product(workspace.context);
    project<A>(B, nullptr, 0, h, s, k, parallel_for);
  } else {
    project<A>(B, G, C, h, s, Z, parallel_for);  // k = B h comes with G B
  }
  if (deferred) return deferred_step<T, A>(step, G, h, Z, parallel_for);

  const RankOne<A> rank_one = h == nullptr ? RankOne<A>{0, false} : scale_to_u(k, h, s, step.hyper, step.projection.nu);
  parallel(parallel_for, s, kElementsPerTask / (C + s), [&](int64_t begin, int64_t end) {
    sgd<T, A>(step, Z + begin * C, begin * C, end * C);
    if (!rank_one.absorbed) return;
    for (int64_t i = begin; i < end; ++i) update_row(B + i * s, k, i, s, rank_one.sign, A(step.hyper.forget));
  });
  if (rank_one.absorbed && step.hyper.normalize) normalize(B, s, parallel_for);
}

template <class T>
void head_step(const HeadStep& step, const Workspace& workspace, ParallelFor parallel_for) {
  using A = typename Accumulate<T>::type;
  if (step.found_inf != nullptr && *step.found_inf != 0) return;
  if (step.projection.base != nullptr) {
    dense_step<T, A>(step, workspace, parallel_for);
  } else {
    rank_step<T, A>(step, parallel_for);
  }
  if (step.step != nullptr) *step.step += 1;
}

template <class A>
void settle(const Projection& P, int64_t s, ParallelFor parallel_for) {
  if (P.base != nullptr) {
    fold<A>(P, s, A(1), parallel_for);
  } else if (*P.count == P.capacity) {
    compress<A>(P, s, parallel_for);
  }
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
