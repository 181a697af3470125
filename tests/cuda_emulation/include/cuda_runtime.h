// Stands in for the CUDA headers of the same names, so that the kernels' own sources compile with a host compiler and
// run on host memory. Covers what csrc/cuda uses, no more. How the threads run is in emulation.cpp.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One copy per OS thread: the emulation gives each block its own by saving and restoring the thread's whole storage.
#define __shared__ thread_local

using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs now

struct cudaLaunchConfig_t;

namespace emulation {

struct Device {
  int multiprocessors;
  int blocks_per_multiprocessor;
  int shared_bytes;     // the most that one block may have
  int held_blocks = 0;  // by another process: a cooperative launch has so many fewer than occupancy promises
};
void use_device(int index, uint64_t seed);  // the seed orders threads, blocks and asynchronous copies
int64_t launches();                         // since then

/// One thread's call of a kernel, with the arguments of its launch.
struct Kernel {
  void (*call)(const void* arguments);
  const void* arguments;
};
void run(const cudaLaunchConfig_t& launch, bool cooperative, bool chained, Kernel kernel);
const void* exchange(const void* value, size_t bytes, int source_lane_mask);
void block_barrier();
void grid_barrier();
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(size_t groups_left);

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }

template <typename T>
__attribute__((no_sanitize("thread"))) T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  T result;
  if (mask != 0xffffffffu) std::abort();  // only whole warps are emulated
  std::memcpy(&result, emulation::exchange(&value, sizeof(T), lane_mask), sizeof(T));
  return result;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
int emulated_architecture();
cudaError_t emulated_raise_shared_memory(const void* kernel, int bytes);
cudaError_t emulated_launch_check(const void* kernel, unsigned blocks, size_t shared_bytes, bool cooperative);
cudaError_t emulated_occupancy(int* blocks, int threads, size_t shared_bytes);

template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->sharedSizeBytes = 1024;  // more than any kernel's own: the emulation does not know it
  attributes->ptxVersion = emulated_architecture();
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  return emulated_raise_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads, size_t shared) {
  return emulated_occupancy(blocks, threads, shared);
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const bool cooperative = config->numAttrs == 1 && config->attrs->id == cudaLaunchAttributeCooperative;
  const bool chained = config->numAttrs == 1 && !cooperative;
  const cudaError_t error = emulated_launch_check(reinterpret_cast<const void*>(kernel), config->gridDim.x,
                                                  config->dynamicSmemBytes, cooperative);
  if (error != cudaSuccess) return error;
  // No accesses for a recorder: on the device the arguments are constants.
  const auto call = [=]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<P>(arguments)...); };
  const auto call_it = [](const void* it)
                           __attribute__((no_sanitize("thread"))) { (*static_cast<decltype(call)*>(it))(); };
  emulation::run(*config, cooperative, chained, {call_it, &call});
  return cudaSuccess;
}
