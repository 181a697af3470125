#include <climits>

#include "entropy_fusion.h"
#include "grid.cuh"
#include "launch.h"
#include "numeric.cuh"
#include "reduce.cuh"

namespace mla_ext::cuda {
namespace {

constexpr int kMaxThreads = 512;

/// What is known of a softmax after some of its logits: their maximum m, Σ e^(x−m) and Σ e^(x−m) (x−m).
/// Its entropy is log Σ e^(x−m) − Σ e^(x−m) (x−m) / Σ e^(x−m).
template <typename A>
struct OnlineEntropy {
  A maximum = -INFINITY;
  A sum = 0;
  A weighted = 0;

  /// The same sums about another, larger maximum.
  __device__ void raise(A to) {
    if (sum != A(0)) {  // else there is nothing to scale, and the old maximum may be −∞
      const A shift = maximum - to;
      const A scale = exp(shift);
      weighted = scale != A(0) ? (weighted + shift * sum) * scale : A(0);  // the shift may be −∞
      sum *= scale;
    }
    maximum = to;
  }

  template <int kWidth>
  __device__ void add(const A (&x)[kWidth]) {
    A largest = maximum;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) largest = x[i] > largest ? x[i] : largest;
    if (largest > maximum) raise(largest);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (x[i] == A(-INFINITY)) continue;  // p = 0; its x − m would be NaN where m is −∞ too
      const A shift = x[i] - maximum;
      const A e = exp(shift);
      sum += e;
      if (e != A(0)) weighted += e * shift;
    }
  }

  __device__ void merge(OnlineEntropy other) {
    if (other.maximum > maximum) {
      raise(other.maximum);
    } else if (maximum > other.maximum) {
      other.raise(maximum);
    }
    sum += other.sum;
    weighted += other.weighted;
  }

  __device__ void merge_warp() {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      OnlineEntropy other;
      other.maximum = __shfl_xor_sync(kFullWarp, maximum, distance);
      other.sum = __shfl_xor_sync(kFullWarp, sum, distance);
      other.weighted = __shfl_xor_sync(kFullWarp, weighted, distance);
      merge(other);
    }
  }

  __device__ A entropy() const { return log(sum) - weighted / sum; }
};

/// One block for each sample, so that no sample's sums depend on another's.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    entropy_fusion_kernel(const T* logits, const uint8_t* present, const accumulate_t<T>* temperatures, bool equal,
                          int M, int N, int C, bool keep_rows, int rows_offset, T* fused, accumulate_t<T>* weights) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kAligned ? kVector<T> : 1;
  const int64_t sample = blockIdx.x;
  const int warps = warp_count();
  unsigned char* const shared = dynamic_shared_memory();
  auto* const parts = reinterpret_cast<OnlineEntropy<A>*>(shared);  // [modality][warp]
  A* const entropies = reinterpret_cast<A*>(parts + M * warps);     // [modality]
  A* const sample_weights = entropies + M;                          // [modality]
  T* const rows = reinterpret_cast<T*>(shared + rows_offset);       // [modality][class], if kept

  const auto is_present = [&](int m) { return !present || present[int64_t{m} * N + sample] != 0; };
  const auto row_of = [&](int m) { return logits + (int64_t{m} * N + sample) * C; };
  const auto scale_of = [&](int m) { return temperatures ? A(1) / temperatures[m] : A(1); };
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int step = static_cast<int>(blockDim.x) * kWidth;

  for (int m = 0; m < M && !equal; ++m) {
    if (!is_present(m)) continue;
    const T* const row = row_of(m);
    const A scale = scale_of(m);
    OnlineEntropy<A> part;
#pragma unroll 2
    for (int c = first; c < C; c += step) {
      const Vector<T, kWidth> vector = load<kWidth>(row + c);
      if (keep_rows) store(rows + m * C + c, vector);  // only this thread reads it again
      A x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = scale * to_accumulate(vector.at[i]);
      part.add(x);
    }
    part.merge_warp();
    if (lane_index() == 0) parts[m * warps + warp_index()] = part;
  }
  __syncthreads();
  for (int m = static_cast<int>(threadIdx.x); m < M; m += static_cast<int>(blockDim.x)) {
    if (!is_present(m)) {
      entropies[m] = INFINITY;  // λ = 0
      continue;
    }
    if (equal) {
      entropies[m] = A(0);
      continue;
    }
    OnlineEntropy<A> whole = parts[m * warps];
    for (int warp = 1; warp < warps; ++warp) whole.merge(parts[m * warps + warp]);
    entropies[m] = whole.entropy();
  }
  __syncthreads();
  A smallest = INFINITY;
  for (int m = 0; m < M; ++m) smallest = entropies[m] < smallest ? entropies[m] : smallest;
  A total = 0;
  for (int m = 0; m < M; ++m) {
    if (entropies[m] != A(INFINITY)) total += exp(smallest - entropies[m]);
  }
  for (int m = static_cast<int>(threadIdx.x); m < M; m += static_cast<int>(blockDim.x)) {
    const A weight = entropies[m] != A(INFINITY) ? exp(smallest - entropies[m]) / total : A(0);
    sample_weights[m] = weight;
    weights[int64_t{m} * N + sample] = weight;
  }
  __syncthreads();
  for (int c = first; c < C; c += step) {
    A sums[kWidth] = {};
    for (int m = 0; m < M; ++m) {
      if (sample_weights[m] == A(0))
        continue;  // absent: entropies differ by log C at most, which no λ > 0 underflows on
      const A scale = scale_of(m);
      const Vector<T, kWidth> vector = load<kWidth>(keep_rows ? rows + m * C + c : row_of(m) + c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += sample_weights[m] * (scale * to_accumulate(vector.at[i]));
    }
    Vector<T, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.at[i] = from_accumulate<T>(sums[i]);
    store(fused + sample * C + c, result);
  }
}

template <typename T, bool kAligned>
cudaError_t run(const T* logits, const uint8_t* present, const accumulate_t<T>* temperatures, bool equal, int M, int N,
                int C, T* fused, accumulate_t<T>* weights, cudaStream_t stream) {
  constexpr int kWidth = kAligned ? kVector<T> : 1;
  KernelLimits limits;
  const cudaError_t error = kernel_limits<entropy_fusion_kernel<T, kAligned>, kMaxThreads>(&limits);
  if (error != cudaSuccess) return error;

  // Two vectors for each thread, to have more than one load in flight.
  int64_t threads = round_up(ceil_div(C, 2 * kWidth), kWarp);
  if (threads > kMaxThreads) threads = kMaxThreads;
  const size_t modality_bytes = threads / kWarp * sizeof(OnlineEntropy<accumulate_t<T>>) + 2 * sizeof(accumulate_t<T>);
  const size_t parts_bytes = static_cast<size_t>(round_up(M * modality_bytes, kVectorBytes));
  if (parts_bytes > limits.shared_bytes) return cudaErrorInvalidValue;
  // Kept rows are read from memory once. Half of the shared memory, so that two blocks share a multiprocessor.
  const size_t rows_bytes = sizeof(T) * static_cast<size_t>(M) * static_cast<size_t>(C);
  const bool keep_rows = !equal && parts_bytes + rows_bytes <= limits.shared_bytes / 2;
  const LaunchShape shape = {static_cast<unsigned>(N), static_cast<unsigned>(threads),
                             parts_bytes + (keep_rows ? rows_bytes : 0)};
  return launch(entropy_fusion_kernel<T, kAligned>, shape, stream, logits, present, temperatures, equal, M, N, C,
                keep_rows, static_cast<int>(parts_bytes), fused, weights);
}

template <typename T>
cudaError_t run(const void* logits, const uint8_t* present, const void* temperatures, bool equal, int64_t M, int64_t N,
                int64_t C, void* fused, void* weights, cudaStream_t stream) {
  const auto call = [&](auto* kernel_run) {
    return kernel_run(static_cast<const T*>(logits), present, static_cast<const accumulate_t<T>*>(temperatures), equal,
                      static_cast<int>(M), static_cast<int>(N), static_cast<int>(C), static_cast<T*>(fused),
                      static_cast<accumulate_t<T>*>(weights), stream);
  };
  const bool aligned = C % kVector<T> == 0 && is_vector_aligned(logits) && is_vector_aligned(fused);
  return aligned ? call(run<T, true>) : call(run<T, false>);
}

}  // namespace

cudaError_t entropy_fusion(DType dtype, const void* logits, const uint8_t* present, int64_t M, int64_t N, int64_t C,
                           const void* temperatures, bool equal, void* fused, void* weights, cudaStream_t stream) {
  for (const int64_t size : {M, N, C}) {
    if (size < 0 || size > INT_MAX / 2) return cudaErrorInvalidValue;
  }
  if (M == 0 || C == 0) return cudaErrorInvalidValue;
  if (N == 0) return cudaSuccess;
  return for_type(dtype, [&](auto tag) {
    return run<typename decltype(tag)::Type>(logits, present, temperatures, equal, M, N, C, fused, weights, stream);
  });
}

}  // namespace mla_ext::cuda
