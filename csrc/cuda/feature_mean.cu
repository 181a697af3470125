#include "feature_mean.h"
#include "launch.h"
#include "numeric.cuh"
#include "reduce.cuh"

namespace mla_ext::cuda {
namespace {

/// A block sums kColumns columns, each by kRows threads. 32 bytes of a row, one memory sector, keep the accesses whole,
/// and columns so few leave enough blocks to fill the device at s = 512.
template <typename T>
struct MeanTraits {
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 32 / static_cast<int>(sizeof(T));
  static constexpr int kRows = kThreads / kColumns;
  static_assert(kThreads % kWarp == 0 && kThreads % kColumns == 0 && (kRows & (kRows - 1)) == 0);
};

template <typename T>
__global__ void __launch_bounds__(MeanTraits<T>::kThreads)
    feature_mean_kernel(const T* features, int64_t N, int64_t s, int64_t row_stride, accumulate_t<T>* mean) {
  using A = accumulate_t<T>;
  using Traits = MeanTraits<T>;
  __shared__ A sums[Traits::kRows][Traits::kColumns];

  const int thread_column = static_cast<int>(threadIdx.x) % Traits::kColumns;
  const int thread_row = static_cast<int>(threadIdx.x) / Traits::kColumns;
  const int64_t column = int64_t{blockIdx.x} * Traits::kColumns + thread_column;
  A sum = 0;
  if (column < s) {
#pragma unroll 8
    for (int64_t row = thread_row; row < N; row += Traits::kRows) {
      sum += to_accumulate(features[row * row_stride + column]);
    }
  }
  sums[thread_row][thread_column] = sum;
#pragma unroll
  for (int half = Traits::kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread_row < half) sums[thread_row][thread_column] += sums[thread_row + half][thread_column];
  }
  if (thread_row == 0 && column < s) mean[column] = sums[0][thread_column] / static_cast<A>(N);
}

template <typename T>
cudaError_t run(const void* features, int64_t N, int64_t s, int64_t row_stride, void* mean, cudaStream_t stream) {
  using Traits = MeanTraits<T>;
  const auto blocks = static_cast<unsigned>(ceil_div(s, Traits::kColumns));
  return launch(feature_mean_kernel<T>, {blocks, Traits::kThreads}, stream, static_cast<const T*>(features), N, s,
                row_stride, static_cast<accumulate_t<T>*>(mean));
}

}  // namespace

cudaError_t feature_mean(DType dtype, const void* features, int64_t N, int64_t s, int64_t row_stride, void* mean,
                         cudaStream_t stream) {
  if (s == 0) return cudaSuccess;
  return for_type(
      dtype, [&](auto tag) { return run<typename decltype(tag)::Type>(features, N, s, row_stride, mean, stream); });
}

}  // namespace mla_ext::cuda
