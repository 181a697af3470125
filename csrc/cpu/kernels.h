// The operations of mla_ext for CPUs: raw pointers and sizes, no torch header. csrc/arguments.h says what they are
// given.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace mla_ext::cpu {

// Calls body(begin, end, context) over a partition of [begin, end) into pieces of at least `grain`, maybe in parallel,
// and returns when all are done: the signature of torch_parallel_for, which is what the bindings pass.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// What the caller of a head step with a dense B lends to it.
struct Workspace {
  void* projected;                 // A (C + 1, s), for [G; h] P
  void (*product)(void* context);  // makes the first C rows of it G B, by a BLAS; null: the kernels do
  void* context;
};

// Weighting every sample's logits by the certainty of each modality, or equally.
struct EntropyFusion {
  const void* logits;   // (M, N, C)
  const bool* present;  // (M, N), or null: all are
  void* fused;          // (N, C), in the dtype of logits
  void* weights;        // A (M, N)
  int64_t M, N, C;
  const void* temperatures = nullptr;  // A (M), what the logits are divided by, or null: all 1
  bool equal = false;                  // present modalities weigh the same
};

// torch.optim.SGD's step of several tensors (plain_sgd.h).
struct PlainSgd;

// One instruction set's build of every operation. Scratch memory that cannot be had raises std::bad_alloc.
struct Kernels {
  void (*feature_mean)(DType dtype, const void* features, void* mean, int64_t N, int64_t s, ParallelFor parallel_for);
  // B absorbs h.
  void (*rls_update)(DType accumulate, void* base, const void* feature_mean, int64_t s, const Hyperparameters& hyper,
                     ParallelFor parallel_for);
  void (*head_step)(const HeadStep& step, const Workspace& workspace, ParallelFor parallel_for);
  // Folds the rows of K into B. Of the rank form: compresses it if it is full.
  void (*settle)(DType accumulate, const Projection& P, int64_t s, ParallelFor parallel_for);
  void (*entropy_fusion)(DType dtype, const EntropyFusion& fusion, ParallelFor parallel_for);
  void (*plain_sgd)(const PlainSgd& step, ParallelFor parallel_for);
};

}  // namespace mla_ext::cpu
