#include <climits>

#include "grid.cuh"
#include "head_step.h"
#include "launch.h"
#include "product.cuh"
#include "rank_one.cuh"
#include "sgd.cuh"

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
  A* z;           // (C, s): G P, of the two-launch step
  A* mean_dot_k;  // (blocks): partial sums of h̄ᵀk
  A* grad_dot_k;  // (C, blocks): partial sums of G k, of the one-launch step
  A* squares;     // (blocks): partial sums of ‖P‖²
  A* first_step;  // 1 or 0, of the two-launch step

  static int64_t max_blocks(int64_t features) { return ceil_div(features, kRowsPerWarp); }
  static size_t elements(int64_t classes, int64_t features) {
    return static_cast<size_t>(features + classes * features + max_blocks(features) * (classes + 2) + 1);
  }
  Workspace(void* memory, int64_t classes, int64_t features)
      : k(static_cast<A*>(memory)),
        z(k + features),
        mean_dot_k(z + classes * features),
        grad_dot_k(mean_dot_k + max_blocks(features)),
        squares(grad_dot_k + classes * max_blocks(features)),
        first_step(squares + max_blocks(features)) {}
};

template <typename T>
struct Arguments {
  using A = accumulate_t<T>;

  T* weight;
  const T* grad;
  A* momentum_buffer;
  A* projection;
  const A* feature_mean;
  float* step;
  const A* projected_grad;  // of the two-launch step
  int classes;
  int features;
  HeadStepScalars scalars;
  Workspace<A> workspace;

  __device__ bool skipped() const { return scalars.found_inf && *scalars.found_inf != 0.0f; }
  __device__ bool first_step() const { return step && *step == 0.0f; }
  __device__ A alpha() const { return static_cast<A>(scalars.alpha_ptr ? *scalars.alpha_ptr : scalars.alpha); }
};

template <typename A, int kWidth>
__device__ inline A squares_of(const Vector<A, kWidth>& v) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += v.at[i] * v.at[i];
  return sum;
}

template <typename A, int kWidth>
__device__ inline Vector<A, kWidth> divided(Vector<A, kWidth> v, A divisor) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v.at[i] /= divisor;
  return v;
}

/// The whole step in one launch: P is read once and written once, and in between its rows stay in shared memory.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(ProductTraits<accumulate_t<T>>::kMaxThreads, 1)
    head_step_fused_kernel(const Arguments<T> a, const Tiling<T> tiling) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  const int64_t features = a.features;
  const int64_t first_row = int64_t{blockIdx.x} * tiling.rows;
  const int rows = static_cast<int>(min(int64_t{tiling.rows}, features - first_row));
  const int stride = tiling.row_stride();
  unsigned char* const shared = dynamic_shared_memory();
  A* const p = reinterpret_cast<A*>(shared);
  A* const own_k = p + tiling.own_k_offset();
  A* const own_u = p + tiling.own_u_offset();
  A* const z = p + tiling.z_offset();

  // All is read here, before the grid barrier: after it one thread increments the step.
  const bool skipped = a.skipped();
  const Sgd<T> sgd(a.weight, a.momentum_buffer, a.scalars, a.first_step());
  const A alpha = a.alpha();

  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.projection, first_row, rows,
                     [&](int row, int c, A value) { z[c * rows + row] = value; });
  if (skipped) return;  // every block does

  const bool absorbs = a.feature_mean != nullptr;
  const bool late = absorbs && a.scalars.absorb_before;  // the gradient waits for P_t
  const auto step_weights = [&](A divisor) {
    for (int i = static_cast<int>(threadIdx.x); i < a.classes * rows; i += static_cast<int>(blockDim.x)) {
      const int c = i / rows;
      sgd.step(c * features + first_row + (i - c * rows), z[i] / divisor);
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
    for (int c = warp_index(); late && c < a.classes; c += warp_count()) {
      const A g = lane < rows ? to_accumulate(a.grad[c * features + first_row + lane]) : A(0);
      const A sum = warp_sum(g * k);
      if (lane == 0) a.workspace.grad_dot_k[int64_t{c} * gridDim.x + blockIdx.x] = sum;
    }
  }
  grid_barrier();
  if (a.step && blockIdx.x == 0 && threadIdx.x == 0) *a.step += 1.0f;
  if (!absorbs) return;

  const RankOne<A> rank_one(alpha + sum_of(a.workspace.mean_dot_k, gridDim.x), a.scalars.forget);
  if (!rank_one.valid) {  // the same d, so the same answer, in every block
    if (late) step_weights(A(1));
    return;
  }
  if (static_cast<int>(threadIdx.x) < rows) own_u[threadIdx.x] = rank_one.scaled(own_k[threadIdx.x]);
  __syncthreads();
  if (late) {
    for (int c = warp_index(); c < a.classes; c += warp_count()) {
      const A g_dot_u = rank_one.scaled(sum_of(a.workspace.grad_dot_k + int64_t{c} * gridDim.x, gridDim.x));
      const int row = lane_index();
      if (row < rows) {
        A& z_c = z[c * rows + row];
        z_c = rank_one.projected(z_c, to_accumulate(a.grad[c * features + first_row + row]), g_dot_u, own_u[row]);
      }
    }
    __syncthreads();
  }

  A* const target = a.projection + first_row * features;
  A norm = 1;
  if (a.scalars.normalize) {
    A squares = 0;
    update_rows<kWidth>(rank_one, p, stride, first_row, rows, a.features, a.workspace.k, own_u,
                        [&](int row, int column, const Vector<A, kWidth>& updated) {
                          store(p + row * stride + column, updated);
                          squares += squares_of(updated);
                        });
    squares = block_sum(squares);
    if (threadIdx.x == 0) a.workspace.squares[blockIdx.x] = squares;
    grid_barrier();
    norm = sqrt(sum_of(a.workspace.squares, gridDim.x));
    for (int column = static_cast<int>(threadIdx.x) * kWidth; column < a.features;
         column += static_cast<int>(blockDim.x) * kWidth) {
      for (int row = 0; row < rows; ++row) {
        store(target + row * features + column, divided(load<kWidth>(p + row * stride + column), norm));
      }
    }
  } else {
    update_rows<kWidth>(rank_one, p, stride, first_row, rows, a.features, a.workspace.k, own_u,
                        [&](int row, int column, const Vector<A, kWidth>& updated) {
                          store(target + row * features + column, updated);
                        });
  }
  if (late) step_weights(norm);
}

/// First launch of the step whose rows of P do not fit on chip: Z (unless it is given), k, and sums of h̄ᵀk.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads, ProductTraits<accumulate_t<T>>::kStreamBlocks)
    head_step_product_kernel(const Arguments<T> a, const Tiling<T> tiling) {
  using A = accumulate_t<T>;
  const int64_t features = a.features;
  const int64_t first_row = int64_t{blockIdx.x} * tiling.rows;
  const int rows = static_cast<int>(min(int64_t{tiling.rows}, features - first_row));
  unsigned char* const shared = dynamic_shared_memory();
  A* const own_k = reinterpret_cast<A*>(shared) + tiling.own_k_offset();

  if (a.skipped()) return;
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.step) {
    // The second launch steps the weights, and no other block of this one looks at the step.
    *a.workspace.first_step = a.first_step() ? A(1) : A(0);
    *a.step += 1.0f;
  }
  if (tiling.classes == 0 && !a.feature_mean) return;

  multiply<kAligned>(tiling, shared, a.grad, a.feature_mean, a.projection, first_row, rows,
                     [&](int row, int c, A value) { a.workspace.z[c * features + first_row + row] = value; });
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
  const int64_t features = a.features;
  const int64_t first_row = int64_t{blockIdx.x} * kUpdateRows;
  const int rows = static_cast<int>(min(int64_t{kUpdateRows}, features - first_row));

  if (a.skipped()) return;
  const RankOne<A> rank_one(a.alpha() + sum_of(a.workspace.mean_dot_k, product_blocks), a.scalars.forget);
  make_own_u(rank_one, a.workspace.k, first_row, rows, own_u);
  A squares = 0;
  update_rows<kWidth>(rank_one, a.projection + first_row * features, features, first_row, rows, a.features,
                      a.workspace.k, own_u,
                      [&](int, int, const Vector<A, kWidth>& updated) { squares += squares_of(updated); });
  squares = block_sum(squares);
  if (threadIdx.x == 0) a.workspace.squares[blockIdx.x] = squares;
}

/// Last launch: the first C blocks step the weights of a class each, the others update P.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kUpdateThreads)
    head_step_update_kernel(const Arguments<T> a, int64_t product_blocks, int64_t update_blocks) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<A> : 1;
  __shared__ A own_u[kUpdateRows];
  const int64_t features = a.features;
  const A* const k = a.workspace.k;

  if (a.skipped()) return;
  const bool absorbs = a.feature_mean != nullptr;
  const A d = absorbs ? a.alpha() + sum_of(a.workspace.mean_dot_k, product_blocks) : A(0);
  const RankOne<A> rank_one(d, a.scalars.forget);
  A norm = 1;
  if (rank_one.valid && a.scalars.normalize) norm = sqrt(sum_of(a.workspace.squares, update_blocks));

  if (static_cast<int>(blockIdx.x) < a.classes) {
    const int64_t row = blockIdx.x * features;  // of this class, in G, Z and W
    const bool late = rank_one.valid && a.scalars.absorb_before;
    const Sgd<T> sgd(a.weight, a.momentum_buffer, a.scalars, a.step && *a.workspace.first_step != A(0));
    A g_dot_u = 0;
    if (late) {
      for (int i = static_cast<int>(threadIdx.x); i < a.features; i += static_cast<int>(blockDim.x)) {
        g_dot_u += to_accumulate(a.grad[row + i]) * k[i];
      }
      g_dot_u = rank_one.scaled(block_sum(g_dot_u));
    }
    for (int i = static_cast<int>(threadIdx.x); i < a.features; i += static_cast<int>(blockDim.x)) {
      A z = a.projected_grad[row + i];
      if (late) {
        z = rank_one.projected(z, to_accumulate(a.grad[row + i]), g_dot_u, rank_one.scaled(k[i])) / norm;
      }
      sgd.step(row + i, z);
    }
  } else if (rank_one.valid) {
    const int64_t first_row = (int64_t{blockIdx.x} - a.classes) * kUpdateRows;
    const int rows = static_cast<int>(min(int64_t{kUpdateRows}, features - first_row));
    A* const p = a.projection + first_row * features;
    make_own_u(rank_one, k, first_row, rows, own_u);
    update_rows<kWidth>(rank_one, p, features, first_row, rows, a.features, k, own_u,
                        [&](int row, int column, const Vector<A, kWidth>& updated) {
                          store(p + row * features + column, a.scalars.normalize ? divided(updated, norm) : updated);
                        });
  }
}

/// How the one-launch step divides its work, or rows = 0 where it cannot: every block keeps its rows of P.
template <typename T, bool kAligned>
cudaError_t plan_fused(int classes, int features, Tiling<T>* tiling) {
  using Traits = ProductTraits<accumulate_t<T>>;
  *tiling = {0, 0, true, classes, features};
  KernelLimits limits;
  const cudaError_t error = kernel_limits<head_step_fused_kernel<T, kAligned>, Traits::kMaxThreads>(&limits);
  if (error != cudaSuccess || limits.resident_blocks == 0) return error;
  const int64_t rows = ceil_div(features, limits.resident_blocks);
  if (rows > Traits::kMaxRows) return cudaSuccess;
  tiling->rows = static_cast<int>(rows < kRowsPerWarp ? kRowsPerWarp : rows);
  if (!tiling->fit(kFusedTile, limits.shared_bytes)) tiling->rows = 0;
  return cudaSuccess;
}

template <typename T, bool kAligned>
cudaError_t run_split(Arguments<T> a, cudaStream_t stream) {
  const bool given = a.projected_grad != nullptr;
  if (!given) a.projected_grad = a.workspace.z;
  const bool absorbs = a.feature_mean != nullptr;
  Tiling<T> tiling = {kStreamRows, 0, false, given ? 0 : a.classes, a.features};
  const int64_t product_blocks = absorbs || !given ? ceil_div(a.features, kStreamRows) : 1;
  const int64_t update_blocks = absorbs ? ceil_div(a.features, kUpdateRows) : 0;
  KernelLimits limits;  // raises the kernel's shared memory as well
  cudaError_t error = kernel_limits<head_step_product_kernel<T, kAligned>, kStreamThreads>(&limits);
  if (error != cudaSuccess) return error;
  if (!tiling.fit(kStreamTile, limits.shared_bytes)) return cudaErrorInvalidConfiguration;

  const LaunchShape product = {static_cast<unsigned>(product_blocks), kStreamThreads, tiling.shared_bytes()};
  error = launch(head_step_product_kernel<T, kAligned>, product, stream, a, tiling);
  if (error == cudaSuccess && absorbs && a.scalars.normalize) {
    error = launch(head_step_norm_kernel<T, kAligned>, {static_cast<unsigned>(update_blocks), kUpdateThreads}, stream,
                   a, product_blocks);
  }
  if (error != cudaSuccess || a.classes + update_blocks == 0) return error;
  return launch(head_step_update_kernel<T, kAligned>,
                {static_cast<unsigned>(a.classes + update_blocks), kUpdateThreads}, stream, a, product_blocks,
                update_blocks);
}

template <typename T, bool kAligned>
cudaError_t run(const Arguments<T>& a, cudaStream_t stream) {
  if (!a.projected_grad) {
    Tiling<T> tiling;
    const cudaError_t error = plan_fused<T, kAligned>(a.classes, a.features, &tiling);
    if (error != cudaSuccess) return error;
    if (tiling.rows > 0) {
      const LaunchShape shape = {static_cast<unsigned>(ceil_div(a.features, tiling.rows)),
                                 static_cast<unsigned>(tiling.threads()), tiling.shared_bytes(), true};
      return launch(head_step_fused_kernel<T, kAligned>, shape, stream, a, tiling);
    }
  }
  return run_split<T, kAligned>(a, stream);
}

template <typename T>
cudaError_t run(const HeadStepTensors& tensors, const void* projected_grad, int64_t classes, int64_t features,
                const HeadStepScalars& scalars, void* workspace, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Arguments<T> a = {static_cast<T*>(tensors.weight),
                          static_cast<const T*>(tensors.grad),
                          static_cast<A*>(tensors.momentum_buffer),
                          static_cast<A*>(tensors.projection),
                          static_cast<const A*>(tensors.feature_mean),
                          tensors.step,
                          static_cast<const A*>(projected_grad),
                          static_cast<int>(classes),
                          static_cast<int>(features),
                          scalars,
                          Workspace<A>(workspace, classes, features)};
  // Every row of P, G and h̄ then starts on a vector of its own type.
  const bool aligned = features % kVector<A> == 0 && features % kVector<T> == 0 && is_vector_aligned(a.grad) &&
                       is_vector_aligned(a.projection) && is_vector_aligned(a.feature_mean);
  return aligned ? run<T, true>(a, stream) : run<T, false>(a, stream);
}

cudaError_t dispatch(DataType dtype, const HeadStepTensors& tensors, const void* projected_grad, int64_t classes,
                     int64_t features, const HeadStepScalars& scalars, void* workspace, cudaStream_t stream) {
  const bool has_weights = tensors.weight && tensors.grad;
  if (classes < 0 || classes > INT_MAX / 2 || features < 0 || features > INT_MAX / 2 || !tensors.projection ||
      !workspace || !is_vector_aligned(workspace) || (classes > 0 && !has_weights) ||
      (tensors.momentum_buffer && !tensors.step)) {
    return cudaErrorInvalidValue;
  }
  switch (dtype) {
    case DataType::kFloat32:
      return run<float>(tensors, projected_grad, classes, features, scalars, workspace, stream);
    case DataType::kFloat64:
      return run<double>(tensors, projected_grad, classes, features, scalars, workspace, stream);
    case DataType::kFloat16:
      return run<__half>(tensors, projected_grad, classes, features, scalars, workspace, stream);
    case DataType::kBFloat16:
      return run<__nv_bfloat16>(tensors, projected_grad, classes, features, scalars, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t head_step_workspace_bytes(DataType dtype, int64_t classes, int64_t features) {
  return accumulate_bytes(dtype) * Workspace<float>::elements(classes, features);
}

cudaError_t head_step(DataType dtype, const HeadStepTensors& tensors, int64_t classes, int64_t features,
                      const HeadStepScalars& scalars, void* workspace, cudaStream_t stream) {
  return dispatch(dtype, tensors, nullptr, classes, features, scalars, workspace, stream);
}

cudaError_t head_step_projected(DataType dtype, const HeadStepTensors& tensors, const void* projected_grad,
                                int64_t classes, int64_t features, const HeadStepScalars& scalars, void* workspace,
                                cudaStream_t stream) {
  if (!projected_grad) return cudaErrorInvalidValue;
  return dispatch(dtype, tensors, projected_grad, classes, features, scalars, workspace, stream);
}

cudaError_t rls_update(DataType dtype, void* projection, const void* feature_mean, int64_t features, double alpha,
                       double forget, bool normalize, void* workspace, cudaStream_t stream) {
  if (!feature_mean || (dtype != DataType::kFloat32 && dtype != DataType::kFloat64)) return cudaErrorInvalidValue;
  HeadStepScalars scalars;
  scalars.alpha = alpha;
  scalars.forget = forget;
  scalars.normalize = normalize;
  const HeadStepTensors tensors = {nullptr, nullptr, nullptr, projection, feature_mean, nullptr};
  return dispatch(dtype, tensors, nullptr, 0, features, scalars, workspace, stream);  // a head step of no classes
}

}  // namespace mla_ext::cuda
