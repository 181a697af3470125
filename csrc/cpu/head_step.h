// One step of the shared head: the gradient projected, SGD with the result, and P's update.
#pragma once

#include "dtype.h"
#include "pending.h"
#include "rls_update.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// torch.optim.SGD's step for the elements [begin, end), with the projected gradient for the gradient.
template <class T, class A>
void sgd(const HeadStep& step, const A* projected, int64_t begin, int64_t end) {
  T* weight = static_cast<T*>(step.weight);
  A* momentum_buffer = static_cast<A*>(step.momentum_buffer);
  const A lr = A(step.lr), weight_decay = A(step.weight_decay), momentum = A(step.momentum);
  const A undamped = A(1 - step.dampening), scale = A((step.maximize ? -1 : 1) / step.grad_scale);
  const bool is_first = step.is_first, nesterov = step.nesterov;
  if (momentum_buffer == nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      const A w = widen(weight[i]);
      narrow(w - lr * (scale * projected[i] + weight_decay * w), weight[i]);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const A w = widen(weight[i]);
    const A g = scale * projected[i] + weight_decay * w;
    const A v = is_first ? g : momentum * momentum_buffer[i] + undamped * g;
    momentum_buffer[i] = v;
    narrow(w - lr * (nesterov ? g + momentum * v : v), weight[i]);
  }
}

// The rest of a step whose update of P waits, from Z = [G; h] B on: Z becomes [G; h] P, and u joins the rows of K.
template <class T, class A>
void defer(const HeadStep& step, const A* G, A* Z, ParallelFor parallel_for) {
  const int64_t s = step.rls.s, C = step.C;
  A* K = static_cast<A*>(step.pending.rows);
  const A* h = static_cast<const A*>(step.rls.feature_mean);
  int64_t& count = *step.pending.count;
  RankOne<A> rank_one{1, false};
  if (h != nullptr) {
    A* k = Z + C * s;
    Scratch<A> dots(count);
    correct_row(h, k, s, K, count, A(1), dots.get());
    rank_one = scale_to_u(k, h, s, A(step.rls.alpha));
    if (rank_one.absorbed) std::memcpy(K + count * s, k, sizeof(A) * s);
  }
  const int64_t absorbed = count + (rank_one.absorbed ? 1 : 0);
  const int64_t used = step.absorb_before ? absorbed : count;
  const A last_sign = used > count ? rank_one.sign : A(1);
  parallel(parallel_for, C, kWorkPerTask / (2 * s * (used + 1)), [&](int64_t begin, int64_t end) {
    Scratch<A> dots(used);
    for (int64_t c = begin; c < end; ++c) {
      if (!step.is_projected) correct_row(G + c * s, Z + c * s, s, K, used, last_sign, dots.get());
      sgd<T, A>(step, Z, c * s, (c + 1) * s);
    }
  });
  count = absorbed;
  // A negative sign cannot wait: only the last row has one.
  if (rank_one.absorbed && (count == step.pending.capacity || rank_one.sign < 0)) {
    fold<A>(step.rls.projection, s, step.pending, rank_one.sign, parallel_for);
  }
}

template <class T>
void head_step(const HeadStep& step, ParallelFor parallel_for) {
  using A = typename Accumulate<T>::type;
  const int64_t s = step.rls.s, C = step.C;
  A* P = static_cast<A*>(step.rls.projection);
  A* K = static_cast<A*>(step.pending.rows);
  const A* h = static_cast<const A*>(step.rls.feature_mean);
  if (step.absorb_before && h != nullptr && K == nullptr) {
    rls_update<A>(step.rls, parallel_for);
    h = nullptr;
  }

  A* Z = static_cast<A*>(step.projected);
  A* k = Z + C * s;
  constexpr bool kWiden = sizeof(T) < sizeof(A);
  Scratch<A> widened(kWiden && !step.is_projected ? C * s : 0);
  const A* G = kWiden ? widened.get() : static_cast<const A*>(step.grad);
  if (!step.is_projected) {
    if constexpr (kWiden) widen(static_cast<const T*>(step.grad), widened.get(), C * s);
    project<A>(P, G, C, h, s, Z, parallel_for);  // k = P h comes with G P
  }

  if (K != nullptr) return defer<T, A>(step, G, Z, parallel_for);

  const RankOne<A> rank_one = h == nullptr ? RankOne<A>{0, false} : scale_to_u(k, h, s, A(step.rls.alpha));
  parallel(parallel_for, s, kElementsPerTask / (C + s), [&](int64_t begin, int64_t end) {
    sgd<T, A>(step, Z, begin * C, end * C);
    if (!rank_one.absorbed) return;
    for (int64_t i = begin; i < end; ++i) update_row(P + i * s, k, i, s, rank_one.sign, A(step.rls.forget));
  });
  if (rank_one.absorbed && step.rls.normalize) normalize(P, s, parallel_for);
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
