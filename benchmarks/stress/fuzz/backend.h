// The kernels under test, with one interface: cpu.cpp and cuda.cpp implement it, operations.cpp calls it.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace fuzz {

using mla_ext::DType;
using mla_ext::HeadStep;
using mla_ext::Hyperparameters;

// What operations.cpp has to know about the implementation.
extern const bool takes_strides;                // of features
extern const bool takes_any_product;            // G P of a step that projects with P_t, too
extern const int64_t largest_size, no_classes;  // no_classes: the smallest number of classes of a head step
extern const int64_t variants;                  // instruction sets, or emulated devices

/// Draws arguments from the input, runs an operation on them and compares; aborts where that finds something.
class Input;
using Target = void (*)(Input& input);
extern const std::vector<Target> targets;

void try_feature_mean(Input& input);
void try_rls_update(Input& input);
void try_entropy_fusion(Input& input);
void try_head_step(Input& input);

struct EntropyFusion {
  const void* logits;
  const bool* present;  // or null
  void* fused;
  void* weights;
  int64_t M, N, C;
  const void* temperatures;  // or null
  bool equal;
};

/// Chooses one of the variants, and the order in which its threads or pieces of work run.
void use(int64_t variant, uint64_t seed);

/// `stride`: elements from row to row.
void feature_mean(DType dtype, const void* features, void* mean, int64_t N, int64_t s, int64_t stride);
void rls_update(DType accumulate, void* base, const void* feature_mean, int64_t s, const Hyperparameters& hyper);
/// `projected_grad`: G P in the accumulate type, or null.
void head_step(const HeadStep& step, const void* projected_grad);
void entropy_fusion(DType dtype, const EntropyFusion& fusion);

}  // namespace fuzz
