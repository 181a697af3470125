// The product X P of a few rows X with the symmetric P, as dot products with P's rows.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// What repays handing a piece of work to a thread: multiply-adds of a product, or elements of a pass over memory.
constexpr int64_t kWorkPerTask = 1 << 18, kElementsPerTask = 1 << 15;

// How many rows of P and of X meet in registers: kRows * kColumns sums, and the operands, fill the register file.
#if defined(__AVX512F__)
constexpr int kRows = 4, kColumns = 7;
#elif defined(__aarch64__)
constexpr int kRows = 4, kColumns = 6;
#else
constexpr int kRows = 3, kColumns = 4;
#endif

// So far ahead each row of P is fetched: what the hardware fetches by itself does not keep up when P comes from memory.
constexpr int64_t kBytesAhead = 1024;

// out[q * stride + r] = P[r] . X[q] over s columns, for Q rows of X and R rows of P, which are `pitch` elements apart.
template <class A, int R, int Q>
void dots(const A* P, int64_t pitch, const A* const* X, int64_t s, A* out, int64_t stride) {
  Vec<A> sums[R][Q] = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= s; j += kLanes<A>) {
    Vec<A> p[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      p[r] = load(P + r * pitch + j);
      __builtin_prefetch(P + r * pitch + j + kBytesAhead / int64_t(sizeof(A)));
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Vec<A> x = load(X[q] + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][q] += p[r] * x;
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int r = 0; r < R; ++r) {
      A total = sum<A>(sums[r][q]);
      for (int64_t tail = j; tail < s; ++tail) total += P[r * pitch + tail] * X[q][tail];
      out[q * stride + r] = total;
    }
  }
}

template <class A, int R, int Q>
void dots_of_rest(const A* P, int64_t pitch, const A* const* X, int rest, int64_t s, A* out, int64_t stride) {
  if constexpr (Q > 0) {
    if (rest == Q) return dots<A, R, Q>(P, pitch, X, s, out, stride);
    dots_of_rest<A, R, Q - 1>(P, pitch, X, rest, s, out, stride);
  }
}

// The same for at most kColumns rows of X, and the rows [begin, end) of P.
template <class A>
void dots_of_rows(const A* P, int64_t pitch, const A* const* X, int columns, int64_t s, int64_t begin, int64_t end,
                  A* out, int64_t stride) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    dots_of_rest<A, kRows, kColumns>(P + i * pitch, pitch, X, columns, s, out + i, stride);
  }
  for (; i < end; ++i) dots_of_rest<A, 1, kColumns>(P + i * pitch, pitch, X, columns, s, out + i, stride);
}

// out[q * stride + i] = (X P^T)[q][i] over s columns, for n rows of X and the rows [begin, end) of P.
template <class A>
void product(const A* P, int64_t pitch, const A* const* X, int64_t n, int64_t s, int64_t begin, int64_t end, A* out,
             int64_t stride) {
  constexpr int64_t kBytesOfP = 256 * 1024;  // stay in the L2 cache while all rows of X meet them
  const int64_t rows = kBytesOfP / (s * int64_t(sizeof(A))) / kRows * kRows, step = rows > 0 ? rows : kRows;
  for (int64_t i = begin; i < end; i += step) {
    const int64_t stop = i + step < end ? i + step : end;
    for (int64_t q = 0; q < n; q += kColumns) {
      const int columns = int(n - q < kColumns ? n - q : kColumns);
      dots_of_rows<A>(P, pitch, X + q, columns, s, i, stop, out + q * stride, stride);
    }
  }
}

// out = [X; h] P for n rows of X, one after the other as those of `out`, and h or null: one pass over P, which is
// symmetric.
template <class A>
void project(const A* P, const A* X, int64_t n, const A* h, int64_t s, A* out, ParallelFor parallel_for) {
  Scratch<const A*> rows(n + 1);
  for (int64_t q = 0; q < n; ++q) rows[q] = X + q * s;
  rows[n] = h;
  const int64_t count = h == nullptr ? n : n + 1, blocks = count == 0 ? 0 : (s + kRows - 1) / kRows;
  const int64_t per_task = count > 8 ? kWorkPerTask / count : kElementsPerTask;  // of P; few rows are soon multiplied
  parallel(parallel_for, blocks, per_task / (s * kRows), [&](int64_t begin, int64_t end) {
    product<A>(P, s, rows.get(), count, s, begin * kRows, end * kRows < s ? end * kRows : s, out, s);
  });
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
