#include <climits>

#include "grid.cuh"
#include "head_step.h"
#include "launch.h"
#include "product.cuh"
#include "rank_one.cuh"
#include "sgd.cuh"
#include "step.cuh"

namespace mla_ext::cuda {
namespace {

constexpr int kFusedTile = 512;   // columns in a stage of a block that keeps its rows of P
constexpr int kStreamRows = 16;   // rows of P in a block that does not keep them
constexpr int kStreamTile = 256;  // and columns in its stage: several such blocks fit on a multiprocessor
constexpr int kStreamThreads = kStreamRows / kRowsPerWarp * kWarp;
constexpr int kUpdateRows = 8;  // rows of P in a block that only updates them
constexpr int kUpdateThreads = 256;

/// What blocks hand to each other, in the caller's memory.
template <typename A>
struct Workspace {
  A* k;           // (s): first, since it is read by vectors
  A* Z;           // (C, s): G P, of the two-launch step
  A* mean_dot_k;  // (blocks): partial sums of h̄ᵀk
  A* grad_dot_k;  // (C, blocks): partial sums of G k, of the one-launch step
  A* squares;     // (blocks): partial sums of ‖P‖²
  A* first_step;  // 1 or 0, of the two-launch step

  static int64_t max_blocks(int64_t s) { return ceil_div(s, kRowsPerWarp); }
  static size_t elements(int64_t C, int64_t s) { return static_cast<size_t>(s + C * s + max_blocks(s) * (C + 2) + 1); }
  Workspace(void* memory, int64_t C, int64_t s)
      : k(static_cast<A*>(memory)),
        Z(k + s),
        mean_dot_k(Z + C * s),
        grad_dot_k(mean_dot_k + max_blocks(s)),
        squares(grad_dot_k + C * max_blocks(s)),
        first_step(squares + max_blocks(s)) {}
};

template <typename T>
struct Arguments : StepArguments<T> {
  using A = accumulate_t<T>;

  A* P;
  const A* Z;  // of the two-launch step
  Workspace<A> workspace;

  Arguments(const HeadStep& step, const void* Z, void* memory)
      : StepArguments<T>(step),
        P(static_cast<A*>(step.projection.base)),
        Z(static_cast<const A*>(Z)),
        workspace(memory, step.C, step.s) {}
};

template <typename A, int kWidth>
__device__ inline A squares_of(const Vector<A, kWidth>& v) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += v.at[i] * v.at[i];
  return sum;
}

template <typename A, int kWidth>
__device__ inline Vector<A, kWidth> scaled(Vector<A, kWidth> v, A factor) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v.at[i] *= factor;
  return v;
}

/// The whole step in one launch: P is read once and written once, and in between its rows stay in shared memory.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(ProductTraits<accumulate_t<T>>::kMaxThreads, 1)
    head_step_fused_kernel(const Arguments<T> a, const Tiling<T> tiling) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  const int64_t s = a.s;
  const int64_t first_row = int64_t{blockIdx.x} * tiling.rows;
  const int rows = static_cast<int>(min(int64_t{tiling.rows}, s - first_row));
  const int stride = tiling.row_stride();
  unsigned char* const shared = dynamic_shared_memory();
  A* const p = reinterpret_cast<A*>(shared);
  A* const own_k = p + tiling.own_k_offset();
  A* const own_u = p + tiling.own_u_offset();
  A* const z = p + tiling.z_offset();

  // All is read here, before the grid barrier: after it one thread increments the step.
  const bool skipped = a.skipped();
  const Sgd<T> sgd(a.weight, a.momentum_buffer, a.hyper, a.grad_scale, a.first_step());
  const A alpha = alpha_of<A>(a.hyper);

  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.P, first_row, rows,
                     [&](int row, int c, A value) { z[c * rows + row] = value; });
  if (skipped) return;  // every block does

  const bool absorbs = a.feature_mean != nullptr;
  const bool late = absorbs && a.hyper.absorb_before;  // the gradient waits for P_t
  const auto step_weights = [&](A factor) {
    for (int i = static_cast<int>(threadIdx.x); i < a.C * rows; i += static_cast<int>(blockDim.x)) {
      const int c = i / rows;
      sgd.step(c * s + first_row + (i - c * rows), z[i] * factor);
    }
  };
  if (!late) step_weights(A(1));

  if (absorbs) {
    const int lane = lane_index();
    const A k = lane < rows ? own_k[lane] : A(0);
    if (static_cast<int>(threadIdx.x) < rows) a.workspace.k[first_row + lane] = k;
    if (warp_index() == 0) {
      const A sum = warp_sum(lane < rows ? a.feature_mean[first_row + lane] * k : A(0));
      if (lane == 0) a.workspace.mean_dot_k[blockIdx.x] = sum;
    }
    for (int c = warp_index(); late && c < a.C; c += warp_count()) {
      const A g = lane < rows ? to_accumulate(a.grad[c * s + first_row + lane]) : A(0);
      const A sum = warp_sum(g * k);
      if (lane == 0) a.workspace.grad_dot_k[int64_t{c} * gridDim.x + blockIdx.x] = sum;
    }
  }
  grid_barrier();
  if (a.step && blockIdx.x == 0 && threadIdx.x == 0) *a.step += 1.0f;
  if (!absorbs) return;

  const RankOne<A> rank_one(alpha + sum_of(a.workspace.mean_dot_k, gridDim.x), a.hyper.forget);
  if (!rank_one.absorbed) {  // the same d, so the same answer, in every block
    if (late) step_weights(A(1));
    return;
  }
  if (static_cast<int>(threadIdx.x) < rows) own_u[threadIdx.x] = rank_one.scaled(own_k[threadIdx.x]);
  __syncthreads();
  if (late) {
    for (int c = warp_index(); c < a.C; c += warp_count()) {
      const A g_dot_u = rank_one.scaled(sum_of(a.workspace.grad_dot_k + int64_t{c} * gridDim.x, gridDim.x));
      const int row = lane_index();
      if (row < rows) {
        A& z_c = z[c * rows + row];
        z_c = rank_one.projected(z_c, to_accumulate(a.grad[c * s + first_row + row]), g_dot_u, own_u[row]);
      }
    }
    __syncthreads();
  }

  A* const target = a.P + first_row * s;
  A inverse_norm = 1;
  if (a.hyper.normalize) {
    A squares = 0;
    update_rows<kWidth>(rank_one, p, stride, first_row, rows, a.s, a.workspace.k, own_u,
                        [&](int row, int column, const Vector<A, kWidth>& updated) {
                          store(p + row * stride + column, updated);
                          squares += squares_of(updated);
                        });
    squares = block_sum(squares);
    if (threadIdx.x == 0) a.workspace.squares[blockIdx.x] = squares;
    grid_barrier();
    inverse_norm = A(1) / sqrt(sum_of(a.workspace.squares, gridDim.x));
    for (int column = static_cast<int>(threadIdx.x) * kWidth; column < a.s;
         column += static_cast<int>(blockDim.x) * kWidth) {
      for (int row = 0; row < rows; ++row) {
        store(target + row * s + column, scaled(load<kWidth>(p + row * stride + column), inverse_norm));
      }
    }
  } else {
    update_rows<kWidth>(
        rank_one, p, stride, first_row, rows, a.s, a.workspace.k, own_u,
        [&](int row, int column, const Vector<A, kWidth>& updated) { store(target + row * s + column, updated); });
  }
  if (late) step_weights(inverse_norm);
}

/// First launch of the step whose rows of P do not fit on chip: Z (unless it is given), k, and sums of h̄ᵀk.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads, ProductTraits<accumulate_t<T>>::kStreamBlocks)
    head_step_product_kernel(const Arguments<T> a, const Tiling<T> tiling) {
  using A = accumulate_t<T>;
  const int64_t s = a.s;
  const int64_t first_row = int64_t{blockIdx.x} * tiling.rows;
  const int rows = static_cast<int>(min(int64_t{tiling.rows}, s - first_row));
  unsigned char* const shared = dynamic_shared_memory();
  A* const own_k = reinterpret_cast<A*>(shared) + tiling.own_k_offset();

  if (a.skipped()) return;
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.step) {
    // The second launch steps the weights, and no other block of this one looks at the step.
    *a.workspace.first_step = a.first_step() ? A(1) : A(0);
    *a.step += 1.0f;
  }
  if (tiling.C == 0 && !a.feature_mean) return;

  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.P, first_row, rows,
                     [&](int row, int c, A value) { a.workspace.Z[c * s + first_row + row] = value; });
  if (a.feature_mean && warp_index() == 0) {
    const int lane = lane_index();
    A product = 0;
    if (lane < rows) {
      const A k = own_k[lane];
      a.workspace.k[first_row + lane] = k;
      product = a.feature_mean[first_row + lane] * k;
    }
    const A sum = warp_sum(product);
    if (lane == 0) a.workspace.mean_dot_k[blockIdx.x] = sum;
  }
}

/// u of the rows that a block updates. Every thread of the block calls.
template <typename A>
__device__ inline void make_own_u(const RankOne<A>& rank_one, const A* k, int64_t first_row, int rows, A* own_u) {
  if (static_cast<int>(threadIdx.x) < rows) own_u[threadIdx.x] = rank_one.scaled(k[first_row + threadIdx.x]);
  __syncthreads();
}

/// With normalize, between the two launches: sums of the updated P's squares, which nothing stores yet.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kUpdateThreads) head_step_norm_kernel(const Arguments<T> a, int64_t product_blocks) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  __shared__ A own_u[kUpdateRows];
  const int64_t s = a.s;
  const int64_t first_row = int64_t{blockIdx.x} * kUpdateRows;
  const int rows = static_cast<int>(min(int64_t{kUpdateRows}, s - first_row));

  if (a.skipped()) return;
  const RankOne<A> rank_one(alpha_of<A>(a.hyper) + sum_of(a.workspace.mean_dot_k, product_blocks), a.hyper.forget);
  make_own_u(rank_one, a.workspace.k, first_row, rows, own_u);
  A squares = 0;
  update_rows<kWidth>(rank_one, a.P + first_row * s, s, first_row, rows, a.s, a.workspace.k, own_u,
                      [&](int, int, const Vector<A, kWidth>& updated) { squares += squares_of(updated); });
  squares = block_sum(squares);
  if (threadIdx.x == 0) a.workspace.squares[blockIdx.x] = squares;
}

/// Last launch: the first blocks update P, which takes longest, and the last C step the weights of a class each.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kUpdateThreads)
    head_step_update_kernel(const Arguments<T> a, int64_t product_blocks, int64_t update_blocks) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  __shared__ A own_u[kUpdateRows];
  const int64_t s = a.s;
  const A* const k = a.workspace.k;

  if (a.skipped()) return;
  const bool absorbs = a.feature_mean != nullptr;
  const A d = absorbs ? alpha_of<A>(a.hyper) + sum_of(a.workspace.mean_dot_k, product_blocks) : A(0);
  const RankOne<A> rank_one(d, a.hyper.forget);
  A inverse_norm = 1;
  if (rank_one.absorbed && a.hyper.normalize) inverse_norm = A(1) / sqrt(sum_of(a.workspace.squares, update_blocks));

  if (blockIdx.x < update_blocks) {
    if (!rank_one.absorbed) return;
    const int64_t first_row = int64_t{blockIdx.x} * kUpdateRows;
    const int rows = static_cast<int>(min(int64_t{kUpdateRows}, s - first_row));
    A* const p = a.P + first_row * s;
    make_own_u(rank_one, k, first_row, rows, own_u);
    update_rows<kWidth>(rank_one, p, s, first_row, rows, a.s, k, own_u,
                        [&](int row, int column, const Vector<A, kWidth>& updated) {
                          store(p + row * s + column, a.hyper.normalize ? scaled(updated, inverse_norm) : updated);
                        });
    return;
  }
  const int64_t first = (int64_t{blockIdx.x} - update_blocks) * s;  // of this class, in G, Z and W
  const bool late = rank_one.absorbed && a.hyper.absorb_before;
  const Sgd<T> sgd(a.weight, a.momentum_buffer, a.hyper, a.grad_scale, a.step && *a.workspace.first_step != A(0));
  A g_dot_u = 0;
  if (late) {
    for (int i = static_cast<int>(threadIdx.x); i < a.s; i += static_cast<int>(blockDim.x)) {
      g_dot_u += to_accumulate(a.grad[first + i]) * k[i];
    }
    g_dot_u = rank_one.scaled(block_sum(g_dot_u));
  }
  for (int i = static_cast<int>(threadIdx.x) * kWidth; i < a.s; i += static_cast<int>(blockDim.x) * kWidth) {
    Vector<A, kWidth> z = load<kWidth>(a.Z + first + i);
    if (late) {
      const Vector<T, kWidth> g = load<kWidth>(a.grad + first + i);
      const Vector<A, kWidth> k_i = load<kWidth>(k + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        z.at[j] = rank_one.projected(z.at[j], to_accumulate(g.at[j]), g_dot_u, rank_one.scaled(k_i.at[j]));
      }
      z = scaled(z, inverse_norm);
    }
    sgd.step(first + i, z);
  }
}

/// How the one-launch step divides its work, or rows = 0 where it cannot: every block keeps its rows of P.
template <typename T, bool kAligned>
cudaError_t plan_fused(int C, int s, Tiling<T>* tiling) {
  using Traits = ProductTraits<accumulate_t<T>>;
  *tiling = {0, 0, true, C, s};
  KernelLimits limits;
  const cudaError_t error = kernel_limits<head_step_fused_kernel<T, kAligned>, Traits::kMaxThreads>(&limits);
  if (error != cudaSuccess || limits.resident_blocks == 0) return error;
  const int64_t rows = ceil_div(s, limits.resident_blocks);
  if (rows > Traits::kMaxRows) return cudaSuccess;
  tiling->rows = static_cast<int>(rows < kRowsPerWarp ? kRowsPerWarp : rows);
  if (!tiling->fit(kFusedTile, limits.shared_bytes)) tiling->rows = 0;
  return cudaSuccess;
}

template <typename T, bool kAligned>
cudaError_t run_split(Arguments<T> a, cudaStream_t stream) {
  const bool given = a.Z != nullptr;
  if (!given) a.Z = a.workspace.Z;
  const bool absorbs = a.feature_mean != nullptr;
  Tiling<T> tiling = {kStreamRows, 0, false, given ? 0 : a.C, a.s};
  const int64_t product_blocks = absorbs || !given ? ceil_div(a.s, kStreamRows) : 1;
  const int64_t update_blocks = absorbs ? ceil_div(a.s, kUpdateRows) : 0;
  KernelLimits limits;  // raises the kernel's shared memory as well
  cudaError_t error = kernel_limits<head_step_product_kernel<T, kAligned>, kStreamThreads, true>(&limits);
  if (error != cudaSuccess) return error;
  if (!tiling.fit(kStreamTile, limits.shared_bytes)) return cudaErrorInvalidConfiguration;

  const LaunchShape product = {static_cast<unsigned>(product_blocks), kStreamThreads, tiling.shared_bytes()};
  error = launch(head_step_product_kernel<T, kAligned>, product, stream, a, tiling);
  if (error == cudaSuccess && absorbs && a.hyper.normalize) {
    error = launch(head_step_norm_kernel<T, kAligned>, {static_cast<unsigned>(update_blocks), kUpdateThreads}, stream,
                   a, product_blocks);
  }
  if (error != cudaSuccess || a.C + update_blocks == 0) return error;
  return launch(head_step_update_kernel<T, kAligned>, {static_cast<unsigned>(a.C + update_blocks), kUpdateThreads},
                stream, a, product_blocks, update_blocks);
}

template <typename T, bool kAligned>
cudaError_t run(const Arguments<T>& a, cudaStream_t stream) {
  if (!a.Z) {
    Tiling<T> tiling;
    const cudaError_t error = plan_fused<T, kAligned>(a.C, a.s, &tiling);
    if (error != cudaSuccess) return error;
    if (tiling.rows > 0) {
      const LaunchShape shape = {static_cast<unsigned>(ceil_div(a.s, tiling.rows)),
                                 static_cast<unsigned>(tiling.threads()), tiling.shared_bytes(), true};
      const cudaError_t launched = launch(head_step_fused_kernel<T, kAligned>, shape, stream, a, tiling);
      // Another process may hold a part of the device: then fewer blocks fit than were promised.
      if (launched != cudaErrorCooperativeLaunchTooLarge) return launched;
    }
  }
  return run_split<T, kAligned>(a, stream);
}

template <typename T>
cudaError_t run(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  const Arguments<T> a(step, Z, workspace);
  const bool aligned = a.has_aligned_rows() && is_vector_aligned(a.P) && is_vector_aligned(Z);
  return aligned ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

cudaError_t dispatch(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  if (!step.projection.base || step.projection.rows) return cudaErrorNotSupported;
  const bool has_weights = step.weight && step.grad;
  if (step.C < 0 || step.C > INT_MAX / 2 || step.s < 0 || step.s > INT_MAX / 2 || !workspace ||
      !is_vector_aligned(workspace) || (step.C > 0 && !has_weights) || (step.momentum_buffer && !step.step)) {
    return cudaErrorInvalidValue;
  }
  return for_type(step.dtype, [&](auto tag) { return run<typename decltype(tag)::Type>(step, Z, workspace, stream); });
}

}  // namespace

size_t head_step_workspace_bytes(DType dtype, int64_t C, int64_t s) {
  return accumulate_bytes(dtype) * Workspace<float>::elements(C, s);
}

cudaError_t head_step(const HeadStep& step, void* workspace, cudaStream_t stream) {
  return dispatch(step, nullptr, workspace, stream);
}

cudaError_t head_step_projected(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream) {
  if (!Z) return cudaErrorInvalidValue;
  return dispatch(step, Z, workspace, stream);
}

cudaError_t rls_update(DType dtype, void* projection, const void* feature_mean, int64_t s, double alpha, double forget,
                       bool normalize, void* workspace, cudaStream_t stream) {
  if (!feature_mean || (dtype != DType::Float32 && dtype != DType::Float64)) return cudaErrorInvalidValue;
  HeadStep step = {};  // of no classes
  step.dtype = dtype;
  step.s = s;
  step.projection.base = projection;
  step.feature_mean = feature_mean;
  step.hyper.alpha = alpha;
  step.hyper.forget = forget;
  step.hyper.normalize = normalize;
  return dispatch(step, nullptr, workspace, stream);
}

}  // namespace mla_ext::cuda
