// Element types and the accumulate type of each, 16-byte vectors, conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>
#include <type_traits>

#include "arguments.h"

namespace mla_ext::cuda {

template <typename T>
struct Accumulate {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};

/// What T is computed in: float64 for float64, else float32.
template <typename T>
using accumulate_t = typename Accumulate<T>::Type;

__device__ inline float to_accumulate(float x) { return x; }
__device__ inline double to_accumulate(double x) { return x; }
__device__ inline float to_accumulate(__half x) { return __half2float(x); }
__device__ inline float to_accumulate(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_accumulate(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

/// A type as a value.
template <typename T>
struct Tag {
  using Type = T;
};

/// call(Tag<T>()) with the T of a dtype.
template <typename Call>
cudaError_t for_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::Float32:
      return call(Tag<float>());
    case DType::Float64:
      return call(Tag<double>());
    case DType::Float16:
      return call(Tag<__half>());
    case DType::BFloat16:
      return call(Tag<__nv_bfloat16>());
  }
  return cudaErrorInvalidValue;
}

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest access of one thread

/// Elements of E in a 16-byte access.
template <typename E>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(E));

/// N elements moved by one access.
template <typename E, int N>
struct alignas(sizeof(E) * N) Vector {
  static_assert(sizeof(E) * N <= kVectorBytes && (N & (N - 1)) == 0);
  E at[N];
};

template <int N, typename E>
__device__ inline Vector<E, N> load(const E* from) {
  return *reinterpret_cast<const Vector<E, N>*>(from);
}

template <int N, typename E>
__device__ inline void store(E* to, const Vector<E, N>& value) {
  *reinterpret_cast<Vector<E, N>*>(to) = value;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool is_vector_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

}  // namespace mla_ext::cuda
