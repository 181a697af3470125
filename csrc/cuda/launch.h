// The one way a kernel is launched, and what the launchers ask of the device.
//
// The kernels' sources also compile with a plain host compiler: the tests then supply the CUDA headers, and
// cudaLaunchKernelEx runs the kernel's own code on the host.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <mutex>
#include <utility>

namespace mla_ext::cuda {

struct LaunchShape {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  bool cooperative = false;  // all blocks resident at once, as grid_barrier() needs
  bool chained = false;      // may begin before the last launch has ended: see wait_for_previous_launch()
};

/// Runs kernel(arguments...) on the stream.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchAttribute attribute = {};
  if (shape.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative || shape.chained ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // it is returned: a later, unrelated check must not find it
  return error;
}

/// What one kernel may use on the current device.
struct KernelLimits {
  size_t shared_bytes = 0;      // dynamic shared memory of a block
  int64_t resident_blocks = 0;  // of kThreads threads and shared_bytes each, on the whole device; 0: no grid barrier
  bool can_chain = false;       // it was compiled for an architecture that can wait for the launch before
};

/// The limits of a kernel launched with at most kThreads threads. Asked once per device: a step must cost no queries.
/// kPrefersShared: L1 gives up what it can to shared memory, so that several blocks fit on a multiprocessor.
template <auto kKernel, int kThreads, bool kPrefersShared = false>
cudaError_t kernel_limits(KernelLimits* limits) {
  constexpr int kMaxDevices = 64;
  static std::mutex mutex;
  static std::array<bool, kMaxDevices> known = {};
  static std::array<KernelLimits, kMaxDevices> cache;

  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known[device]) {
    int multiprocessors = 0, shared_bytes = 0, cooperative = 0, blocks = 0;
    cudaFuncAttributes attributes = {};
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&cooperative, cudaDevAttrCooperativeLaunch);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kKernel);
    if (error != cudaSuccess) return error;
    shared_bytes -= static_cast<int>(attributes.sharedSizeBytes);
    // Above 48 KB a block gets dynamic shared memory only once the kernel has asked for it.
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess && kPrefersShared) {
      error =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, shared_bytes);
    }
    if (error != cudaSuccess) return error;
    cache[device].shared_bytes = shared_bytes;
    cache[device].resident_blocks = cooperative ? int64_t{multiprocessors} * blocks : 0;
    cache[device].can_chain = attributes.ptxVersion >= 90;
    known[device] = true;
  }
  *limits = cache[device];
  return cudaSuccess;
}

}  // namespace mla_ext::cuda
