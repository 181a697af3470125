#include "compress.h"
#include "eigen.cuh"
#include "grid.cuh"
#include "launch.h"

namespace mla_ext::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxBlocks = 64;  // in most steps they have nothing to do

/// What a block keeps in shared memory beside the decomposition.
__host__ __device__ inline size_t beside_bytes(int R) { return R * (sizeof(double) + sizeof(int)); }

/// With K Kᵀ = V Λ Vᵀ, P has the eigenvalue p_i = β − λ_i on the direction of v_iᵀ K. The largest λ stay, and all else
/// becomes β' I, of the same trace: a row is √(β' − p_i) times its direction. Each block decomposes K Kᵀ for itself, as
/// nobody could use the time otherwise, and makes slices of the new rows.
template <typename A>
__global__ void __launch_bounds__(kMaxThreads)
    rank_compress_kernel(const RankForm<A> P, const Hyperparameters hyper, const float* found_inf, bool on_chip) {
  wait_for_previous_launch();
  if (found_inf && *found_inf != 0.0f) return;
  const int R = P.capacity, keep = R / 2, s = P.s;
  if (*P.old_count + 1 < R) return;
  const RankUpdate<A> update(P, hyper);
  if (!update.is_full) return;

  unsigned char* const shared = dynamic_shared_memory();
  double* const lambda = reinterpret_cast<double*>(shared);
  double* const M = on_chip ? lambda + R : P.columns;
  int* const place = reinterpret_cast<int*>(on_chip ? M + R * R : lambda + R);  // among the λ by size
  for (int i = static_cast<int>(threadIdx.x); i < R * R; i += static_cast<int>(blockDim.x)) M[i] = P.gram[i];
  __syncthreads();
  orthogonalise(M, R);
  for (int i = warp_index(); i < R; i += warp_count()) {
    const double* const row = M + int64_t{i} * R;
    const double squares = warp_dot(row, row, R);
    if (lane_index() == 0) lambda[i] = sqrt(squares);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < R; i += static_cast<int>(blockDim.x)) {
    int larger = 0;
    for (int m = 0; m < R; ++m) larger += lambda[m] > lambda[i] || (lambda[m] == lambda[i] && m < i);
    place[i] = larger;
  }
  __syncthreads();

  const double beta = update.beta;
  // At least what is rounding: none becomes negative over the compressions. NaN stays visible.
  const double least = double(kRankNoise<A>) * beta;
  const auto p = [&](int i) { return beta - lambda[i] < least ? least : beta - lambda[i]; };
  double dropped = 0;
  for (int i = lane_index(); i < R; i += kWarp) dropped += place[i] < keep ? 0.0 : p(i);
  dropped = warp_sum(dropped);
  double rest = s > keep ? (dropped + double(s - R) * beta) / double(s - keep) : beta;
  rest = rest < 0 ? 0 : rest;  // more rows than s: their sum is 0 to rounding

  // Row i of M becomes what K's rows are multiplied by. p_i ≤ β' ≤ β; a direction that is not there becomes a row of 0.
  for (int i = warp_index(); i < R; i += warp_count()) {
    const bool is_there = lambda[i] > 1e-15 * beta && rest > p(i);
    const double factor = is_there ? sqrt((rest - p(i)) / lambda[i]) / lambda[i] : 0.0;
    for (int m = lane_index(); m < R; m += kWarp) M[int64_t{i} * R + m] *= factor * double(update.scale(m + 1 == R));
  }
  __syncthreads();

  const auto for_columns = [&](auto visit) {  // visit(i, column): row i and column, of the new rows
    for (int slice = static_cast<int>(blockIdx.x); slice < slices(s); slice += static_cast<int>(gridDim.x)) {
      const int column = slice * kSlice + lane_index();
      for (int i = warp_index(); i < R && column < s; i += warp_count()) {
        if (place[i] < keep) visit(i, column);
      }
    }
  };
  for_columns([&](int i, int column) {
    A sum = 0;
    for (int m = 0; m < R; ++m) sum += static_cast<A>(M[int64_t{i} * R + m]) * P.row(m)[column];
    P.kept[int64_t{place[i]} * s + column] = sum;
  });
  __syncthreads();  // all of the old rows in this block's columns have been read
  for_columns([&](int i, int column) {
    const int64_t at = int64_t{place[i]} * s + column;
    P.rows[at] = P.kept[at];
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *P.beta = static_cast<A>(rest);
    *P.count = keep;
  }
}

}  // namespace

template <typename A>
cudaError_t compress(const RankForm<A>& P, const Hyperparameters& hyper, const float* found_inf, cudaStream_t stream) {
  KernelLimits limits;
  const cudaError_t error = kernel_limits<rank_compress_kernel<A>, kMaxThreads>(&limits);
  if (error != cudaSuccess) return error;
  const int64_t R = P.capacity;
  const int64_t threads = ceil_div(R, 2) * kWarp;  // a warp for every pair of rows
  LaunchShape shape = {1, static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads)};
  shape.chained = limits.can_chain;
  const size_t matrix_bytes = static_cast<size_t>(R * R) * sizeof(double);
  const bool on_chip = beside_bytes(P.capacity) + matrix_bytes <= limits.shared_bytes;
  shape.shared_bytes = beside_bytes(P.capacity) + (on_chip ? matrix_bytes : 0);
  if (shape.shared_bytes > limits.shared_bytes) return cudaErrorInvalidValue;
  // In memory there is room for one decomposition.
  if (on_chip) shape.blocks = static_cast<unsigned>(slices(P.s) < kMaxBlocks ? slices(P.s) : kMaxBlocks);
  return launch(rank_compress_kernel<A>, shape, stream, P, hyper, found_inf, on_chip);
}

template cudaError_t compress(const RankForm<float>&, const Hyperparameters&, const float*, cudaStream_t);
template cudaError_t compress(const RankForm<double>&, const Hyperparameters&, const float*, cudaStream_t);

}  // namespace mla_ext::cuda
