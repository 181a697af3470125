// Every sample's logits fused, each modality weighted by its certainty, lambda = softmax_m(-entropy), or equally.
#pragma once

#include <algorithm>
#include <cmath>

#include "dtype.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// Calls f with all vectors of x (C); the last is filled up with -inf.
template <class A, class F>
void for_vectors(const A* x, int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) f(load(x + c), c);
  if (c == C) return;
  A rest[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) rest[lane] = c + lane < C ? x[c + lane] : -INFINITY;
  f(load(rest), c);
}

// -sum_c p log p of p = softmax(x): with y = x - max, log(sum e^y) - sum(y e^y) / sum(e^y). `next` is read soon.
template <class A, class T>
A entropy(const A* x, int64_t C, const T* next) {
  Vec<A> largest = broadcast<A>(-INFINITY);
  for_vectors(x, C, [&](Vec<A> v, int64_t) { largest = v > largest ? v : largest; });
  const A top = max<A>(largest);
  Vec<A> sums = {}, moments = {};
  for_vectors(x, C, [&](Vec<A> v, int64_t c) {
    __builtin_prefetch(next + c);
    const Vec<A> y = v - top;
    const Vec<A> clamped = Simd<A>::kLowest > y ? broadcast<A>(Simd<A>::kLowest) : y;  // 0 * -inf would be NaN
    const Vec<A> e = exp_nonpositive<A>(clamped);
    sums += e;
    moments += e * clamped;
  });
  const A total = sum<A>(sums);
  return std::log(total) - sum<A>(moments) / total;
}

// out = sum_j weights[j] rows[j], all of length C.
template <class A>
void weighted_sum(const A* const* rows, const A* weights, int64_t count, int64_t C, A* out) {
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kLanes<A> <= C; c += kVectors * kLanes<A>) {
    Vec<A> v[kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) v[i] += weights[j] * load(rows[j] + c + i * kLanes<A>);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(out + c + i * kLanes<A>, v[i]);
  }
  for (; c < C; ++c) {
    A x = 0;
    for (int64_t j = 0; j < count; ++j) x += weights[j] * rows[j][c];
    out[c] = x;
  }
}

// x (C) in the accumulate type.
template <class T, class A>
void copy_row(const T* x, A* out, int64_t C) {
  if constexpr (sizeof(T) < sizeof(A)) {
    widen(x, out, C);
  } else {
    std::copy(x, x + C, out);
  }
}

template <class T>
void entropy_fusion(const EntropyFusion& fusion, ParallelFor parallel_for) {
  using A = typename Accumulate<T>::type;
  const int64_t M = fusion.M, N = fusion.N, C = fusion.C;
  const T* logits = static_cast<const T*>(fusion.logits);
  T* fused = static_cast<T*>(fusion.fused);
  A* weights = static_cast<A*>(fusion.weights);
  const A* temperatures = static_cast<const A*>(fusion.temperatures);
  constexpr bool kWiden = sizeof(T) < sizeof(A);
  const bool copies = kWiden || temperatures != nullptr;
  constexpr int64_t kLogitsPerTask = 4096;  // an exponential costs some eight multiply-adds

  parallel(parallel_for, N, kLogitsPerTask / (M * C), [&](int64_t begin, int64_t end) {
    Scratch<A> copied(copies ? M * C : 0), lambda(M), sums(kWiden ? C : 0);
    Scratch<const A*> f(M);
    const auto is_present = [&](int64_t m, int64_t n) {
      return fusion.present == nullptr || fusion.present[m * N + n];
    };
    for (int64_t n = begin; n < end; ++n) {
      // lambda_m = e^(lowest entropy - entropy_m) / sum, over the modalities that are present
      int64_t count = 0;
      A lowest = INFINITY;
      for (int64_t m = 0; m < M; ++m) {
        if (!is_present(m, n)) continue;
        const T* x = logits + (m * N + n) * C;
        if (copies) {
          A* row = copied.get() + count * C;
          copy_row(x, row, C);
          if (temperatures != nullptr) {
            const A scale = 1 / temperatures[m];
            for (int64_t c = 0; c < C; ++c) row[c] *= scale;
          }
          f[count] = row;
        } else {
          f[count] = reinterpret_cast<const A*>(x);
        }
        lambda[count] = fusion.equal ? A(0) : entropy(f[count], C, x + C);
        lowest = lambda[count] < lowest ? lambda[count] : lowest;
        ++count;
      }
      A total = 0;
      for (int64_t j = 0; j < count; ++j) total += lambda[j] = std::exp(lowest - lambda[j]);
      for (int64_t m = 0, j = 0; m < M; ++m) weights[m * N + n] = is_present(m, n) ? lambda[j++] /= total : A(0);
      A* out = kWiden ? sums.get() : reinterpret_cast<A*>(fused + n * C);
      weighted_sum(f.get(), lambda.get(), count, C, out);
      if constexpr (kWiden) {
        for (int64_t c = 0; c < C; ++c) narrow(out[c], fused[n * C + c]);
      }
    }
  });
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
