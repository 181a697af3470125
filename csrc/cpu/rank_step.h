// A step of the shared head with P = beta I - K^T K: no matrix (s, s) anywhere.
#pragma once

#include <cmath>

#include "compress.h"
#include "rls_update.h"
#include "rows.h"
#include "sgd.h"

namespace mla_ext::cpu::MLA_EXT_ISA {

// Columns that the rows of [G; h] go through at once; K's stay in a core's cache from one pass to the next.
constexpr int64_t kChunk = 512;

// The rows of [G; h], G (C, s) or none of it, h or null, widened where they must be.
template <class T, class A>
struct Stacked {
  const T* G;
  const A* h;
  int64_t C, s;

  int64_t count() const { return C + (h == nullptr ? 0 : 1); }
  // Pointers to the columns from j on, n of them, of `rows` rows from `first` on; memory: rows * n elements.
  void read(int64_t first, int64_t rows, int64_t j, int64_t n, A* memory, const A** X) const {
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t row = first + q;
      if (row == C) {
        X[q] = h + j;
      } else if constexpr (sizeof(T) < sizeof(A)) {
        widen(G + row * s + j, memory + q * n, n);
        X[q] = memory + q * n;
      } else {
        X[q] = G + row * s + j;
      }
    }
  }
};

// Z = beta X - t K with t = X K^T, for the rows X of [G; h]: Z's rows of G go to SGD, that of h is k.
template <class T, class A>
void rank_project(const HeadStep& step, const Stacked<T, A>& stacked, A* k, ParallelFor parallel_for) {
  constexpr int64_t kMemory = sizeof(T) < sizeof(A) ? kColumns : 0;  // rows to widen
  constexpr int64_t kFew = 4 * kColumns;
  const int64_t s = step.s, rows = stacked.count(), count = *step.projection.count;
  const A* K = static_cast<const A*>(step.projection.rows);
  const A beta = *static_cast<const A*>(step.projection.beta);

  // What is left for columns [j, j + n) of at most kColumns rows, given their t.
  const auto finish = [&](int64_t first, int64_t j, int64_t n, const A* t, A* memory, A* z) {
    const int64_t here = rows - first < kColumns ? rows - first : kColumns;
    const A* X[kColumns];
    A* Z[kColumns];
    stacked.read(first, here, j, n, memory, X);
    for (int64_t q = 0; q < here; ++q) Z[q] = first + q == stacked.C ? k + j : z + q * n;
    subtract_rows<A>(X, int(here), beta, t, K + j, s, count, n, Z);
    for (int64_t q = 0; q < here && first + q < stacked.C; ++q) {
      sgd<T, A>(step, Z[q], (first + q) * s + j, (first + q) * s + j + n);
    }
  };

  if (rows > kFew) {  // blocks of rows
    const int64_t blocks = (rows + kColumns - 1) / kColumns;
    parallel(parallel_for, blocks, kWorkPerTask / (2 * kColumns * (count + 1) * s), [&](int64_t begin, int64_t end) {
      Scratch<A> memory(kMemory * s), t(kColumns * count), z(kColumns * kChunk);
      for (int64_t first = begin * kColumns; first < end * kColumns && first < rows; first += kColumns) {
        const int64_t here = rows - first < kColumns ? rows - first : kColumns;
        const A* X[kColumns];
        stacked.read(first, here, 0, s, memory.get(), X);
        product<A>(K, s, X, here, s, 0, count, t.get(), count);
        for (int64_t j = 0; j < s; j += kChunk) {
          finish(first, j, s - j < kChunk ? s - j : kChunk, t.get(), memory.get(), z.get());
        }
      }
    });
    return;
  }

  // Chunks of columns: first each one's part of t, then, with all parts, its columns of Z. The same whatever the
  // threads.
  const int64_t chunks = (s + kChunk - 1) / kChunk, size = rows * count;
  const int64_t grain = kWorkPerTask / (rows * (count + 1) * kChunk);
  Scratch<A> parts(chunks * size);
  const auto width = [&](int64_t chunk) { return s - chunk * kChunk < kChunk ? s - chunk * kChunk : kChunk; };
  parallel(parallel_for, chunks, grain, [&](int64_t begin, int64_t end) {
    Scratch<A> memory(kMemory * kChunk);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t first = 0; first < rows; first += kColumns) {
        const int64_t here = rows - first < kColumns ? rows - first : kColumns, j = chunk * kChunk;
        const A* X[kColumns];
        stacked.read(first, here, j, width(chunk), memory.get(), X);
        product<A>(K + j, s, X, here, width(chunk), 0, count, parts.get() + chunk * size + first * count, count);
      }
    }
  });
  parallel(parallel_for, chunks, grain, [&](int64_t begin, int64_t end) {
    Scratch<A> memory(kMemory * kChunk), t(size), z(kColumns * kChunk);
    std::memcpy(t.get(), parts.get(), sizeof(A) * size);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < size; ++i) t[i] += parts[chunk * size + i];
    }
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t first = 0; first < rows; first += kColumns) {
        finish(first, chunk * kChunk, width(chunk), t.get() + first * count, memory.get(), z.get());
      }
    }
  });
}

// k = P h becomes a row u = k / sqrt(d) of K; then forgetting.
template <class A>
void append_row(const HeadStep& step, const A* h, const A* k, ParallelFor parallel_for) {
  const int64_t s = step.s;
  A* K = static_cast<A*>(step.projection.rows);
  A& beta = *static_cast<A*>(step.projection.beta);
  int64_t& count = *step.projection.count;
  const A* rows[] = {h, k};
  A dots[2], squares;
  product<A>(k, s, rows, 2, s, 0, 1, dots, 1);
  product<A>(h, s, rows, 1, s, 0, 1, &squares, 1);
  // h.k >= |k|^2 / beta, as P lies between 0 and beta I. The larger one, as rounding may break that where k is almost
  // 0. k is P h only to within epsilon beta |h|: a smaller d would let its error make P indefinite.
  const A noise = kRankNoise<A> * beta * squares;
  const A least = dots[1] / beta;
  const Alpha<A> alpha(step.hyper, step.projection.nu, squares);
  const A d = (noise > alpha.value ? noise : alpha.value) + (least > dots[0] ? least : dots[0]);
  if (!std::isfinite(d) || !(d > 0)) return;
  alpha.keep(step.projection.nu);
  if (dots[0] >= noise) {  // else P has nothing left along h
    const A root = std::sqrt(d);
    for (int64_t j = 0; j < s; ++j) K[count * s + j] = k[j] / root;
    ++count;
  }
  if (step.hyper.forget == 0) return;
  const A forget = A(step.hyper.forget), kept = A(1) - forget, factor = std::sqrt(kept);
  beta = kept * beta + forget;
  parallel(parallel_for, count, kElementsPerTask / s, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * s; i < end * s; ++i) K[i] *= factor;
  });
}

template <class T, class A>
void rank_step(const HeadStep& step, ParallelFor parallel_for) {
  const A* h = static_cast<const A*>(step.feature_mean);
  Stacked<T, A> stacked{static_cast<const T*>(step.grad), h, step.C, step.s};
  Scratch<A> k(step.s);
  if (step.hyper.absorb_before && h != nullptr) {
    rank_project(step, Stacked<T, A>{nullptr, h, 0, step.s}, k.get(), parallel_for);
    append_row(step, h, k.get(), parallel_for);
    stacked.h = nullptr;
  }
  rank_project(step, stacked, k.get(), parallel_for);
  if (stacked.h != nullptr) append_row(step, h, k.get(), parallel_for);
  if (*step.projection.count == step.projection.capacity) compress<A>(step.projection, step.s, parallel_for);
}

}  // namespace mla_ext::cpu::MLA_EXT_ISA
