// The kernels under test, with one interface: cpu.cpp and cuda.cpp implement it, operations.cpp calls it.
#pragma once

#include <cstdint>

namespace fuzz {

enum class DType { Float32, Float64, BFloat16, Float16 };

/// What operations.cpp has to know about the implementation.
extern const bool takes_scalars_from_memory;    // lr, alpha, grad_scale and found_inf through pointers
extern const int64_t largest_size, no_classes;  // no_classes: the smallest number of classes of a head step
extern const int64_t variants;                  // instruction sets, or emulated devices

struct RlsUpdate {
  void* projection;
  const void* feature_mean;
  int64_t s;
  double alpha, forget;
  bool normalize;
};

struct HeadStep {
  RlsUpdate rls;  // its feature_mean may be null
  int64_t C;
  void* weight;
  const void* grad;
  void* momentum_buffer;       // or null
  const void* projected_grad;  // G P in the accumulate type, or null
  float* step;
  bool absorb_before, nesterov, maximize;
  float grad_scale;
  double lr, momentum, dampening, weight_decay;
  bool scalars_from_memory, found_inf;
};

struct EntropyFusion {
  const void* logits;
  const bool* present;  // or null
  void* fused;
  void* weights;
  int64_t M, N, C;
};

/// Chooses one of the variants, and the order in which its threads or pieces of work run.
void use(int64_t variant, uint64_t seed);

/// `stride`: elements from row to row.
void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t stride);
void rls_update(DType accumulate, const RlsUpdate& update);
void head_step(DType dtype, const HeadStep& step);
void entropy_fusion(DType dtype, const EntropyFusion& fusion);

}  // namespace fuzz
