// Sums over a warp or a block. Every order is fixed, so that results have the same bits in every run.
#pragma once

#include "numeric.cuh"

namespace mla_ext::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

/// The sum of the warp's values, with the same bits in every lane.
template <typename A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

/// Sums 32 values over the warp at once: lane l gets the sum of every lane's values[l].
/// Each exchange halves the number of values a lane still carries: 31 shuffles instead of 32 × 5.
/// A template of kHalf, as the values stay in registers only where every index is a constant.
template <int kHalf = kWarp / 2, typename A>
__device__ inline A warp_sum_scattered(A (&values)[kWarp]) {
  if constexpr (kHalf == 0) {
    return values[0];
  } else {
    const bool upper = (lane_index() & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A kept = upper ? values[i + kHalf] : values[i];
      const A sent = upper ? values[i] : values[i + kHalf];
      values[i] = kept + __shfl_xor_sync(kFullWarp, sent, kHalf);
    }
    return warp_sum_scattered<kHalf / 2>(values);
  }
}

/// The sum of n values in memory, worked out by each warp for itself: the same bits in every thread of every block.
template <typename A>
__device__ inline A sum_of(const A* values, int64_t n) {
  A sum = 0;
  for (int64_t i = lane_index(); i < n; i += kWarp) sum += values[i];
  return warp_sum(sum);
}

/// The sum over the block, in every thread. Called by all of them; may be called again after it returns.
template <typename A>
__device__ inline A block_sum(A value) {
  __shared__ A sums[kWarp];
  value = warp_sum(value);
  __syncthreads();  // a previous call's sums have been read
  if (lane_index() == 0) sums[warp_index()] = value;
  __syncthreads();
  return warp_sum(lane_index() < warp_count() ? sums[lane_index()] : A(0));
}

}  // namespace mla_ext::cuda
