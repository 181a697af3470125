#include <climits>

#include "compress.h"
#include "grid.cuh"
#include "launch.h"
#include "rank.cuh"
#include "rank_step.h"
#include "sgd.cuh"
#include "step.cuh"

namespace mla_ext::cuda {
namespace {

constexpr int kClasses = 16;      // rows of G that a block works on, beside h̄
constexpr int kRowsPerWarp = 2;   // of K, where t is made
constexpr int kProductWarps = 4;  // of a block there
constexpr int kProductThreads = kProductWarps * kWarp;
constexpr int kWarps = 8;  // of a block that has a slice of columns
constexpr int kThreads = kWarps * kWarp;
static_assert(kRowsPerWarp * kClasses == kWarp, "warp_sum_scattered leaves one sum in each lane");

template <typename T>
struct Arguments : StepArguments<T> {
  using A = accumulate_t<T>;

  RankForm<A> P;
  const A* Z;  // G P_{t-1}, where a BLAS has made it

  Arguments(const HeadStep& step, const void* Z, void* workspace)
      : StepArguments<T>(step), P(step.projection, step.C, step.s, workspace), Z(static_cast<const A*>(Z)) {}

  // How the columns are divided where t is made: into kMaxChunks at most, of whole accesses of a warp.
  __host__ __device__ int chunk() const {
    return static_cast<int>(round_up(ceil_div(this->s, kMaxChunks), kWarp * kVector<A>));
  }
  __host__ __device__ int chunks() const { return static_cast<int>(ceil_div(this->s, chunk())); }
  // Groups of kClasses rows of G; one where there is none, for h̄.
  __host__ __device__ int groups() const {
    return this->C > kClasses ? static_cast<int>(ceil_div(this->C, kClasses)) : 1;
  }
  __host__ __device__ int row_blocks() const {
    return static_cast<int>(ceil_div(P.capacity - 1, kRowsPerWarp * kProductWarps));
  }

  /// The gradient waits for P_t.
  __device__ bool late() const { return this->hyper.absorb_before && this->feature_mean; }
  /// The rows of K that are in use, with room for one more.
  __device__ int64_t used_rows() const {
    const int64_t count = *P.count;
    return count < 0 ? 0 : count < P.capacity ? count : P.capacity - 1;
  }
};

/// First launch: t = [G; h̄] Kᵀ, in parts. Each warp has two rows of K in a chunk of columns, and a group of gradients.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kProductThreads) rank_products_kernel(const Arguments<T> a) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  constexpr int kAtOnce = 4;  // gradients between branches: as many loads are in flight
  let_next_launch_begin();
  if (a.skipped()) return;
  const int64_t s = a.s, count = a.used_rows();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *a.P.old_count = count;
    *a.P.old_beta = *a.P.beta;
    if (a.P.nu) *a.P.old_nu = *a.P.nu;
    *a.P.first_step = a.first_step() ? A(1) : A(0);
    if (a.step) *a.step += 1.0f;  // no other block of this launch looks at it
  }
  const int chunk = static_cast<int>(blockIdx.x) % a.chunks();
  const int row_block = static_cast<int>(blockIdx.x) / a.chunks() % a.row_blocks();
  const int group = static_cast<int>(blockIdx.x) / a.chunks() / a.row_blocks();
  const int64_t first = (int64_t{row_block} * kProductWarps + warp_index()) * kRowsPerWarp;
  if (first >= count) return;

  const int classes = a.Z ? 0 : min(kClasses, a.C - group * kClasses);
  const bool with_h = group == 0 && a.feature_mean;
  const T* const grad = a.grad + int64_t{group} * kClasses * s;
  const A* rows[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) rows[r] = a.P.rows + min(first + r, count - 1) * s;
  A sums[kWarp] = {};  // of [row][class]
  A h_sums[kRowsPerWarp] = {};
  const int64_t end = min(s, (int64_t{chunk} + 1) * a.chunk());
  for (int64_t column = int64_t{chunk} * a.chunk() + lane_index() * kWidth; column < end; column += kWarp * kWidth) {
    Vector<A, kWidth> u[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) u[r] = load<kWidth>(rows[r] + column);
    if (with_h) {
      const Vector<A, kWidth> h = load<kWidth>(a.feature_mean + column);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) h_sums[r] += u[r].at[i] * h.at[i];
      }
    }
#pragma unroll
    for (int c = 0; c < kClasses; c += kAtOnce) {
      if (c >= classes) break;
      Vector<T, kWidth> g[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) g[q] = load<kWidth>(grad + min(c + q, classes - 1) * s + column);
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sums[r * kClasses + c + q] += u[r].at[i] * to_accumulate(g[q].at[i]);
        }
      }
    }
  }
  const auto t_at = [&](int64_t row, int c) -> A& {
    return a.P.t[(int64_t{chunk} * a.P.capacity + row) * (a.C + 1) + c];
  };
  const A sum = warp_sum_scattered(sums);
  const int r = lane_index() / kClasses, c = lane_index() % kClasses;
  if (c < classes && first + r < count) t_at(first + r, group * kClasses + c) = sum;
  if (with_h) {
#pragma unroll
    for (int row = 0; row < kRowsPerWarp; ++row) {
      const A h_sum = warp_sum(h_sums[row]);
      if (lane_index() == 0 && first + row < count) t_at(first + row, a.C) = h_sum;
    }
  }
}

/// Second launch: Z = β [G; h̄] − t K. Each block has a slice of columns and a group of gradients, each warp some rows
/// of K. The weights step, unless the gradient waits for P_t, and k is written with its parts of h̄ᵀk, |k|² and |h̄|².
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) rank_project_kernel(const Arguments<T> a) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kVector<A>;
  constexpr int kTile = 32;  // rows of K whose t is in shared memory
  constexpr int kVectors = kClasses / kWidth;
  __shared__ Vector<A, kWidth> t[kTile][kVectors + 1];  // of the classes, then of h̄
  __shared__ A parts[kWarps][kClasses + 1][kWarp];
  let_next_launch_begin();
  wait_for_previous_launch();
  if (a.skipped()) return;
  const int64_t s = a.s;
  const int slice = static_cast<int>(blockIdx.x) % slices(a.s);
  const int group = static_cast<int>(blockIdx.x) / slices(a.s);
  const int64_t count = a.Z && group > 0 && !a.late() ? 0 : *a.P.old_count;  // then nothing is left to multiply
  const int lane = lane_index(), warp = warp_index();
  const int64_t column = int64_t{slice} * kSlice + lane;
  const bool is_there = column < s;
  const int first_class = group * kClasses;
  const int classes = min(kClasses, a.C - first_class);
  const int multiplied = a.Z ? 0 : classes;  // of them, here
  const A beta = *a.P.old_beta;

  A sums[kClasses] = {};
  A k = 0;
  for (int64_t first = 0; first < count; first += kTile) {
    const int here = static_cast<int>(min(int64_t{kTile}, count - first));
    __syncthreads();  // the last tile has been used
    for (int i = static_cast<int>(threadIdx.x); i < here * (kClasses + kWidth); i += kThreads) {
      const int row = i / (kClasses + kWidth), x = i % (kClasses + kWidth);
      const int c = x == kClasses && a.feature_mean ? a.C : x < multiplied ? first_class + x : -1;
      A sum = 0;
      for (int chunk = 0; c >= 0 && chunk < a.chunks(); ++chunk) {
        sum += a.P.t[(int64_t{chunk} * a.P.capacity + first + row) * (a.C + 1) + c];
      }
      t[row][x / kWidth].at[x % kWidth] = sum;
    }
    __syncthreads();
#pragma unroll 4
    for (int row = warp; row < here; row += kWarps) {
      const A u = is_there ? a.P.rows[(first + row) * s + column] : A(0);
      k += t[row][kVectors].at[0] * u;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v * kWidth >= multiplied) break;
        const Vector<A, kWidth> factors = t[row][v];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums[v * kWidth + i] += factors.at[i] * u;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (c < multiplied) parts[warp][c][lane] = sums[c];
  }
  parts[warp][kClasses][lane] = k;
  __syncthreads();
  const auto projected = [&](A x, int c) {
    A removed = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) removed += parts[w][c][lane];
    return beta * x - removed;
  };

  if (a.feature_mean) {
    const A h = is_there ? a.feature_mean[column] : A(0);
    k = projected(h, kClasses);  // 0 where the column is not there
    if (group == 0 && warp == 0) {
      if (is_there) a.P.k[column] = k;
      const A mean_dot_k = warp_sum(h * k), k_dot_k = warp_sum(k * k), h_dot_h = warp_sum(h * h);
      if (lane == 0) {
        a.P.mean_dot_k[slice] = mean_dot_k;
        a.P.k_dot_k[slice] = k_dot_k;
        a.P.h_dot_h[slice] = h_dot_h;
      }
    }
  }
  const Sgd<T> sgd(a.weight, a.momentum_buffer, a.hyper, a.grad_scale, *a.P.first_step != A(0));
  for (int c = warp; c < classes; c += kWarps) {
    const int64_t index = (int64_t{first_class} + c) * s + column;
    const A g = is_there ? to_accumulate(a.grad[index]) : A(0);
    const A z = !a.Z ? projected(g, c) : is_there ? a.Z[index] : A(0);
    if (a.late()) {
      const A grad_dot_k = warp_sum(g * k);
      if (lane == 0) a.P.grad_dot_k[(int64_t{first_class} + c) * slices(a.s) + slice] = grad_dot_k;
      if (is_there) a.P.Z[index] = z;
    } else if (is_there) {
      sgd.step(index, z);
    }
  }
}

/// K Kᵀ of the rows as the step leaves them, in double: tiles of 8 × 8 elements on and below the diagonal.
template <typename A>
__device__ inline void make_gram(const RankForm<A>& P, const RankUpdate<A>& update) {
  constexpr int kTile = kWarps;  // rows: one for each warp
  const int R = P.capacity;
  const int64_t tiles = ceil_div(R, kTile) * (ceil_div(R, kTile) + 1) / 2;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int64_t above = 0;  // tiles in the rows of tiles before this one's
    int tile_row = 0;
    while (above + tile_row + 1 <= tile) above += ++tile_row;
    const int i = tile_row * kTile + warp_index();
    const int first = static_cast<int>(tile - above) * kTile;
    if (i >= R) continue;
    const A* const row = P.row(i);
    double sums[kTile] = {};
    for (int column = lane_index(); column < P.s; column += kWarp) {
      const double x = row[column];
#pragma unroll
      for (int q = 0; q < kTile; ++q) sums[q] += x * static_cast<double>(P.row(min(first + q, R - 1))[column]);
    }
#pragma unroll
    for (int q = 0; q < kTile; ++q) {
      const int m = first + q;
      const double sum = warp_sum(sums[q]) * update.scale(i + 1 == R) * update.scale(m + 1 == R);
      if (lane_index() == 0 && m <= i) P.gram[int64_t{i} * R + m] = P.gram[int64_t{m} * R + i] = sum;
    }
  }
}

/// Third launch: K and β absorb h̄, and weights that waited for P_t step. Where K is now full it stays as it is, for the
/// next launch, and K Kᵀ is made.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) rank_absorb_kernel(const Arguments<T> a) {
  using A = accumulate_t<T>;
  let_next_launch_begin();
  wait_for_previous_launch();
  if (a.skipped()) return;
  const int64_t s = a.s, column = int64_t{blockIdx.x} * kSlice + lane_index();
  const bool is_there = column < s;
  const RankUpdate<A> update(a.P, a.hyper);
  const A k = is_there ? a.P.k[column] : A(0);
  if (a.late()) {
    const Sgd<T> sgd(a.weight, a.momentum_buffer, a.hyper, a.grad_scale, *a.P.first_step != A(0));
    for (int c = warp_index(); c < a.C; c += kWarps) {
      const A grad_dot_k = sum_of(a.P.grad_dot_k + int64_t{c} * slices(a.s), slices(a.s));
      const int64_t index = c * s + column;
      if (is_there) sgd.step(index, update.projected(a.P.Z[index], to_accumulate(a.grad[index]), grad_dot_k, k));
    }
  }
  if (!update.absorbed) return;
  if (a.P.nu && blockIdx.x == 0 && threadIdx.x == 0) *a.P.nu = update.nu;
  if (update.is_full) return make_gram(a.P, update);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *a.P.beta = update.beta;
    *a.P.count = update.count;
  }
  if (!is_there) return;
  const int64_t old_count = *a.P.old_count;
  if (update.forget != A(0)) {
    for (int64_t i = warp_index(); i < old_count; i += kWarps) a.P.rows[i * s + column] *= update.factor;
  }
  if (update.adds_row && warp_index() == 0) a.P.rows[old_count * s + column] = k / update.root * update.factor;
}

template <typename T>
cudaError_t run(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  const Arguments<T> a(step, Z, workspace);
  const auto launch_one = [&](auto kernel, const KernelLimits& limits, int64_t blocks, int threads) {
    LaunchShape shape = {static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
    shape.chained = limits.can_chain;
    return launch(kernel, shape, stream, a);
  };
  KernelLimits project, absorb;
  cudaError_t error = kernel_limits<rank_project_kernel<T>, kThreads>(&project);
  if (error == cudaSuccess) error = kernel_limits<rank_absorb_kernel<T>, kThreads>(&absorb);
  if (error != cudaSuccess) return error;

  const bool aligned = a.has_aligned_rows() && is_vector_aligned(a.P.rows);
  const int64_t product_blocks = int64_t{a.chunks()} * a.row_blocks() * (Z ? 1 : a.groups());
  const int64_t project_blocks = int64_t{slices(a.s)} * a.groups();
  if (product_blocks > INT_MAX || project_blocks > INT_MAX) return cudaErrorInvalidValue;
  error = launch_one(aligned ? rank_products_kernel<T, true> : rank_products_kernel<T, false>, KernelLimits{},
                     product_blocks, kProductThreads);
  if (error == cudaSuccess) error = launch_one(rank_project_kernel<T>, project, project_blocks, kThreads);
  if (error != cudaSuccess || !a.feature_mean) return error;
  error = launch_one(rank_absorb_kernel<T>, absorb, slices(a.s), kThreads);
  return error == cudaSuccess ? compress(a.P, a.hyper, a.found_inf, stream) : error;
}

bool is_valid(const HeadStep& step) {
  const Projection& P = step.projection;
  const bool has_parts =
      P.beta && P.rows && P.count && step.weight && step.grad && (step.step || !step.momentum_buffer);
  const auto fits = [](int64_t n, int64_t least) { return n >= least && n <= INT_MAX / 2; };
  return has_parts && !step.hyper.normalize && fits(step.C, 1) && fits(step.s, 1) && fits(P.capacity, 2) &&
         P.capacity <= INT_MAX / P.capacity;
}

cudaError_t dispatch(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  if (step.projection.base) return cudaErrorNotSupported;
  if (!workspace || !is_vector_aligned(workspace) || !is_valid(step)) return cudaErrorInvalidValue;
  return for_type(step.dtype, [&](auto tag) { return run<typename decltype(tag)::Type>(step, Z, workspace, stream); });
}

}  // namespace

size_t rank_step_workspace_bytes(const HeadStep& step) {
  const auto bytes = [&](auto tag) {
    return static_cast<size_t>(RankForm<typename decltype(tag)::Type>(step.projection, step.C, step.s, nullptr).end);
  };
  return step.dtype == DType::Float64 ? bytes(Tag<double>()) : bytes(Tag<float>());
}

cudaError_t rank_step(const HeadStep& step, void* workspace, cudaStream_t stream) {
  return dispatch(step, nullptr, workspace, stream);
}

cudaError_t rank_step_projected(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  return Z ? dispatch(step, Z, workspace, stream) : cudaErrorInvalidValue;
}

}  // namespace mla_ext::cuda
