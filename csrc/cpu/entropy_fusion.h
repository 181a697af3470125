// Every sample's logits fused, each modality weighted by its certainty: lambda = softmax_m(-entropy).
#pragma once

#include <cmath>

#include "dtype.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// -sum_c p log p of p = softmax(x): with y = x - max, log(sum e^y) - sum(y e^y) / sum(e^y).
template <class A>
A entropy(const A* x, int64_t C) {
  A largest = x[0];
  for (int64_t c = 1; c < C; ++c) largest = x[c] > largest ? x[c] : largest;
  Vec<A> sums = {}, moments = {};
  const auto add = [&](Vec<A> y) {
    const Vec<A> e = exp_nonpositive<A>(y);
    sums += e;
    moments += e * (y < Simd<A>::kLowest ? broadcast<A>(Simd<A>::kLowest) : y);  // 0 * -inf would be NaN
  };
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) add(load(x + c) - largest);
  if (c < C) {
    Vec<A> y = broadcast<A>(-INFINITY);
    for (int lane = 0; lane < C - c; ++lane) y[lane] = x[c + lane] - largest;
    add(y);
  }
  const A total = sum<A>(sums);
  return std::log(total) - sum<A>(moments) / total;
}

template <class T>
void entropy_fusion(const EntropyFusion& fusion, ParallelFor parallel_for) {
  using A = typename Accumulate<T>::type;
  const int64_t M = fusion.M, N = fusion.N, C = fusion.C;
  const T* logits = static_cast<const T*>(fusion.logits);
  T* fused = static_cast<T*>(fusion.fused);
  A* weights = static_cast<A*>(fusion.weights);
  constexpr bool kWiden = sizeof(T) < sizeof(A);
  constexpr int64_t kLogitsPerTask = 4096;  // an exponential costs some eight multiply-adds

  parallel(parallel_for, N, kLogitsPerTask / (M * C), [&](int64_t begin, int64_t end) {
    Scratch<A> widened(kWiden ? M * C : 0), lambda(M), sums(kWiden ? C : 0);
    Scratch<const A*> f(M);
    for (int64_t n = begin; n < end; ++n) {
      // lambda_m = e^(lowest entropy - entropy_m) / sum over the modalities that are present
      A lowest = INFINITY;
      for (int64_t m = 0; m < M; ++m) {
        f[m] = nullptr;
        if (fusion.present != nullptr && !fusion.present[m * N + n]) continue;
        const T* x = logits + (m * N + n) * C;
        if constexpr (kWiden) {
          widen(x, widened.get() + m * C, C);
          f[m] = widened.get() + m * C;
        } else {
          f[m] = x;
        }
        lambda[m] = entropy(f[m], C);
        lowest = lambda[m] < lowest ? lambda[m] : lowest;
      }
      A total = 0;
      for (int64_t m = 0; m < M; ++m) {
        lambda[m] = f[m] == nullptr ? A(0) : std::exp(lowest - lambda[m]);
        total += lambda[m];
      }
      A* out = kWiden ? sums.get() : reinterpret_cast<A*>(fused + n * C);
      for (int64_t c = 0; c < C; ++c) out[c] = 0;
      for (int64_t m = 0; m < M; ++m) {
        const A weight = f[m] == nullptr ? A(0) : lambda[m] / total;  // 0 even where another's logits are NaN
        weights[m * N + n] = weight;
        if (f[m] == nullptr) continue;
        for (int64_t c = 0; c < C; ++c) out[c] += weight * f[m][c];
      }
      if constexpr (kWiden) {
        for (int64_t c = 0; c < C; ++c) narrow(out[c], fused[n * C + c]);
      }
    }
  });
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
