// Z = X P for X = [G; h̄]: the products of the one pass over P, G P and k = P h̄.
//
// P is symmetric, so row i of P is column i: a block that has some rows of P makes those columns of Z, whole. P and X
// come through shared memory in tiles of columns, copied asynchronously, two stages deep. A warp multiplies two rows
// with up to 16 gradients and h̄ at once. More gradients take more passes over the rows, from where they were kept.
// Where a block has fewer pairs of rows than warps, several warps share a pair, each with a part of the columns.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "reduce.cuh"

namespace mla_ext::cuda {

constexpr int kRowsPerWarp = 2;
constexpr int kClassesPerPass = 16;
constexpr int kClassesAtOnce = 4;                // between branches: as many loads are in flight
constexpr int kPartSums = kWarp + kRowsPerWarp;  // of a warp: Z and k
constexpr int kStages = 2;
constexpr int kMinTile = 128;  // columns: one 16-byte load of float32 by each lane
static_assert(kClassesPerPass % kClassesAtOnce == 0);
static_assert(kRowsPerWarp * kClassesPerPass == kWarp, "warp_sum_scattered leaves one sum in each lane");

/// The largest block: the sums of a thread must fit in its registers, and those of float64 take two each.
template <typename A>
struct ProductTraits {
  static constexpr int kMaxWarps = sizeof(A) == 8 ? 8 : 16;
  static constexpr int kMaxThreads = kMaxWarps * kWarp;
  static constexpr int kMaxRows = kMaxWarps * kRowsPerWarp;     // of P
  static constexpr int kStreamBlocks = sizeof(A) == 8 ? 1 : 2;  // at least, on a multiprocessor, where rows stream
  static_assert(kMaxRows <= kWarp, "one lane for each row where k is summed");
};

/// How a block divides its work, and where its shared memory holds what.
template <typename T>
struct Tiling {
  using A = accumulate_t<T>;
  static_assert(kMinTile % kVector<A> == 0 && kMinTile % kVector<T> == 0);

  int rows;        // of P in a block
  int tile;        // columns in a stage, a multiple of kMinTile
  bool keep_rows;  // all columns of the rows stay in shared memory; else only a tile at a time
  int C;
  int s;

  __host__ __device__ int row_stride() const { return keep_rows ? static_cast<int>(round_up(s, kVector<A>)) : tile; }
  __host__ __device__ size_t row_stage() const { return keep_rows ? 0 : static_cast<size_t>(rows) * row_stride(); }
  __host__ __device__ int grad_rows() const { return C < kClassesPerPass ? C : kClassesPerPass; }

  /// Threads of a block: a warp for every two rows, and enough of them to keep many copies in flight.
  __host__ __device__ int threads() const {
    const int warps = pairs();
    return (warps < 8 ? 8 : warps) * kWarp;
  }
  __host__ __device__ int pairs() const { return static_cast<int>(ceil_div(rows, kRowsPerWarp)); }
  /// The warps of a pair of rows.
  __host__ __device__ int parts() const { return threads() / kWarp / pairs(); }
  __host__ __device__ int part_sums() const { return parts() > 1 ? threads() / kWarp * kPartSums : 0; }

  // In elements of A: P, stages of h̄, own k, own u, what warps of a pair hand to each other; then Z where the rows are
  // kept; then in elements of T: stages of G.
  __host__ __device__ size_t h_offset() const {
    return static_cast<size_t>(rows) * row_stride() * (keep_rows ? 1 : kStages);
  }
  __host__ __device__ size_t own_k_offset() const { return h_offset() + static_cast<size_t>(kStages) * tile; }
  __host__ __device__ size_t own_u_offset() const { return own_k_offset() + kWarp; }
  __host__ __device__ size_t part_offset() const { return own_u_offset() + kWarp; }
  __host__ __device__ size_t z_offset() const { return part_offset() + static_cast<size_t>(part_sums()); }
  __host__ __device__ size_t grad_offset_bytes() const {
    const size_t z_elements = keep_rows ? static_cast<size_t>(C) * rows : 0;
    return static_cast<size_t>(round_up((z_offset() + z_elements) * sizeof(A), kVectorBytes));
  }
  __host__ __device__ size_t shared_bytes() const {
    return grad_offset_bytes() + static_cast<size_t>(kStages) * grad_rows() * tile * sizeof(T);
  }

  /// Makes the tile as wide as fits, at most `widest`. False where not even the narrowest does.
  bool fit(int widest, size_t available_bytes) {
    for (tile = widest; tile >= kMinTile; tile /= 2) {
      if (shared_bytes() <= available_bytes) return true;
    }
    return false;
  }
};

/// Starts to copy `rows` rows of `width` elements into shared memory. Unaligned rows are filled with zeros up to a
/// multiple of kPadding, so that a product may read whole vectors.
template <bool kAligned, int kPadding, typename E>
__device__ inline void copy_rows(E* to, int64_t to_stride, const E* from, int64_t from_stride, int rows, int width) {
  constexpr int kWidth = kAligned ? kVector<E> : 1;
  const E zero = from_accumulate<E>(0);
  const int padded = static_cast<int>(round_up(width, kPadding));
  for (int row = warp_index(); row < rows; row += warp_count()) {
    E* target = to + row * to_stride;
    const E* source = from + row * from_stride;
    for (int column = lane_index() * kWidth; column < padded; column += kWarp * kWidth) {
      if (!kAligned && column >= width) {
        target[column] = zero;
      } else if constexpr (kWidth * sizeof(E) >= 4) {
        __pipeline_memcpy_async(target + column, source + column, kWidth * sizeof(E));
      } else {
        target[column] = source[column];  // there is no asynchronous copy of two bytes
      }
    }
  }
}

/// Makes columns [first_row, first_row + rows) of Z, and k in own_k (shared memory) where there is a feature mean.
/// Calls write_z(row, class, value), from one thread each; what that writes and own_k are seen after a barrier.
/// With C = 0 it makes k alone.
template <bool kAligned, typename T, typename WriteZ>
__device__ inline void multiply(const Tiling<T>& tiling, unsigned char* shared, const T* grad, const accumulate_t<T>* h,
                                const accumulate_t<T>* P, int64_t first_row, int rows, WriteZ write_z) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kVector<A>;
  const int s = tiling.s;
  const int tile = tiling.tile;
  const int stride = tiling.row_stride();
  A* const shared_rows = reinterpret_cast<A*>(shared);
  A* const shared_h = shared_rows + tiling.h_offset();
  A* const own_k = shared_rows + tiling.own_k_offset();
  T* const shared_grad = reinterpret_cast<T*>(shared + tiling.grad_offset_bytes());

  const int tiles = static_cast<int>(ceil_div(s, tile));
  const int passes = tiling.C > kClassesPerPass ? static_cast<int>(ceil_div(tiling.C, kClassesPerPass)) : 1;
  const auto classes_in = [&](int pass) { return min(kClassesPerPass, tiling.C - pass * kClassesPerPass); };
  const auto rows_at = [&](int step, int begin) {
    return tiling.keep_rows ? shared_rows + begin : shared_rows + (step % kStages) * tiling.row_stage();
  };
  const auto grad_at = [&](int step) {
    return shared_grad + static_cast<size_t>(step % kStages) * tiling.grad_rows() * tile;
  };
  const auto h_at = [&](int step) { return shared_h + (step % kStages) * tile; };

  const auto start_copy = [&](int step) {
    if (step < passes * tiles) {
      const int pass = step / tiles;
      const int begin = step % tiles * tile;
      const int width = min(tile, s - begin);
      if (pass == 0 || !tiling.keep_rows) {
        copy_rows<kAligned, kWidth>(rows_at(step, begin), stride, P + first_row * s + begin, s, rows, width);
      }
      if (tiling.C > 0) {
        copy_rows<kAligned, kWidth>(grad_at(step), tile, grad + int64_t{pass} * kClassesPerPass * s + begin, s,
                                    classes_in(pass), width);
      }
      if (pass == 0 && h) {
        copy_rows<kAligned, kWidth>(h_at(step), tile, h + begin, s, 1, width);
      }
    }
    __pipeline_commit();  // an empty one too: the wait below counts them
  };

  const int parts = tiling.parts();
  const int pair = warp_index() % tiling.pairs(), part = warp_index() / tiling.pairs();
  const int row = pair * kRowsPerWarp;  // this warp's first
  A* const part_sums = shared_rows + tiling.part_offset();
  // A lane writes what it has of Z after a pass, and of k.
  const auto write = [&](int pass, A z, A k) {
    const int r = lane_index() / kClassesPerPass, c = lane_index() % kClassesPerPass;
    if (c < classes_in(pass) && row + r < rows) write_z(row + r, pass * kClassesPerPass + c, z);
    if (pass == 0 && h && lane_index() < kRowsPerWarp && row + lane_index() < rows) own_k[row + lane_index()] = k;
  };
  A sums[kWarp];  // of [row][class]
  A k_sums[kRowsPerWarp] = {};
  start_copy(0);
  for (int step = 0; step < passes * tiles; ++step) {
    const int pass = step / tiles;
    const int begin = step % tiles * tile;
    const int classes = classes_in(pass);
    if (begin == 0) {
#pragma unroll
      for (int i = 0; i < kWarp; ++i) sums[i] = 0;
    }
    start_copy(step + 1);
    __pipeline_wait_prior(1);
    __syncthreads();  // the step's tiles have arrived
    const bool completes_pass = begin + tile >= s;
    if (part < parts && row < rows) {
      const A* p[kRowsPerWarp];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) p[r] = rows_at(step, begin) + min(row + r, rows - 1) * stride;
      const T* g = grad_at(step);
      const A* h_tile = h_at(step);
      const bool with_h = pass == 0 && h;
      const int width = min(tile, s - begin);
      for (int column = (part * kWarp + lane_index()) * kWidth; column < width; column += parts * kWarp * kWidth) {
        Vector<A, kWidth> row_vector[kRowsPerWarp];
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) row_vector[r] = load<kWidth>(p[r] + column);
        if (with_h) {
          const Vector<A, kWidth> x = load<kWidth>(h_tile + column);
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) k_sums[r] += row_vector[r].at[i] * x.at[i];
          }
        }
#pragma unroll
        for (int first = 0; first < kClassesPerPass; first += kClassesAtOnce) {
          if (first >= classes) break;
          Vector<T, kWidth> x[kClassesAtOnce];
#pragma unroll
          for (int q = 0; q < kClassesAtOnce; ++q) {  // past the last class its own again, whose sums nobody reads
            x[q] = load<kWidth>(g + min(first + q, classes - 1) * tile + column);
          }
#pragma unroll
          for (int q = 0; q < kClassesAtOnce; ++q) {
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
              for (int i = 0; i < kWidth; ++i) {
                sums[r * kClassesPerPass + first + q] += row_vector[r].at[i] * to_accumulate(x[q].at[i]);
              }
            }
          }
        }
      }
      if (completes_pass) {
        const A z = classes > 0 ? warp_sum_scattered(sums) : A(0);
        A k = 0;  // of row r in lane r
#pragma unroll
        for (int r = 0; with_h && r < kRowsPerWarp; ++r) {
          const A sum = warp_sum(k_sums[r]);
          if (lane_index() == r) k = sum;
        }
        if (parts == 1) {
          write(pass, z, k);
        } else {
          A* const own = part_sums + warp_index() * kPartSums;
          own[lane_index()] = z;
          if (lane_index() < kRowsPerWarp) own[kWarp + lane_index()] = k;
        }
      }
    }
    __syncthreads();  // the stage may be overwritten
    if (completes_pass && parts > 1) {
      if (part == 0 && row < rows) {
        A z = 0, k = 0;
        for (int other = pair; other < parts * tiling.pairs(); other += tiling.pairs()) {
          z += part_sums[other * kPartSums + lane_index()];
          k += part_sums[other * kPartSums + kWarp + lane_index() % kRowsPerWarp];
        }
        write(pass, z, k);
      }
      __syncthreads();
    }
  }
}

}  // namespace mla_ext::cuda
