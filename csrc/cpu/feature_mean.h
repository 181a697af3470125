// h = (1/N) sum_k h(x_k), column by column.
#pragma once

#include "dtype.h"
#include "kernels.h"
#include "product.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

template <class T>
void feature_mean(const void* features, void* mean, int64_t N, int64_t s, ParallelFor parallel_for) {
  using A = typename Accumulate<T>::type;
  constexpr int64_t kColumnsAtOnce = 64, kRowsAtOnce = 32;  // partial sums of few rows keep rounding errors small
  const T* H = static_cast<const T*>(features);
  A* h = static_cast<A*>(mean);
  const int64_t blocks = (s + kColumnsAtOnce - 1) / kColumnsAtOnce;
  parallel(parallel_for, blocks, kElementsPerTask / (N * kColumnsAtOnce), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumnsAtOnce;
      const int64_t width = s - first < kColumnsAtOnce ? s - first : kColumnsAtOnce;
      A total[kColumnsAtOnce] = {};
      for (int64_t row = 0; row < N; row += kRowsAtOnce) {
        const int64_t stop = row + kRowsAtOnce < N ? row + kRowsAtOnce : N;
        A part[kColumnsAtOnce] = {};
        for (int64_t i = row; i < stop; ++i) {
          const T* x = H + i * s + first;
          if (width == kColumnsAtOnce) {  // a constant trip count is what makes this loop vectorise
            for (int64_t j = 0; j < kColumnsAtOnce; ++j) part[j] += widen(x[j]);
          } else {
            for (int64_t j = 0; j < width; ++j) part[j] += widen(x[j]);
          }
        }
        for (int64_t j = 0; j < kColumnsAtOnce; ++j) total[j] += part[j];
      }
      for (int64_t j = 0; j < width; ++j) h[first + j] = total[j] / A(N);
    }
  });
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
