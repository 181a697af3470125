// The operations of mla_ext for CPUs: raw pointers and sizes, no torch header.
//
// Shapes: N samples, s features, C classes, M modalities; every matrix is dense and row-major. "A" is the accumulate
// type of a dtype: double for Float64, else float. The specification is mla_ext/reference.py.
#pragma once

#include <cstdint>

namespace mla_ext::cpu {

enum class DType { Float32, Float64, BFloat16, Float16 };

// Calls body(begin, end, context) over a partition of [begin, end) into pieces of at least `grain`, maybe in parallel,
// and returns when all are done: the signature of torch_parallel_for, which is what the bindings pass.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// How P absorbs a feature mean.
struct RlsUpdate {
  void* projection;          // A (s, s), in place
  const void* feature_mean;  // A (s), or null: nothing to absorb
  int64_t s;
  double alpha;
  double forget;
  bool normalize;
};

// Updates of P that wait until there are many: P = B - sum of u u^T over the rows u, with B what `projection` holds.
struct Pending {
  void* rows;        // A (capacity, s), or null: every update is made at once
  int64_t capacity;  // when so many wait, they are made
  int64_t* count;    // how many wait, in place
};

// One step of the shared head: W <- W - lr SGD(G P), P <- rls(P, h).
struct HeadStep {
  RlsUpdate rls;
  int64_t C;
  void* weight;           // (C, s), in place
  const void* grad;       // (C, s), in the dtype of weight
  void* momentum_buffer;  // A (C, s), in place, or null: no momentum
  void* projected;        // A (C + 1, s), workspace for [G; h] P; with `is_projected` it holds [G P; h B] already
  bool is_projected;
  Pending pending;  // without forgetting and normalisation only; "before" not with `is_projected`
  bool is_first;    // the momentum buffer starts as the gradient
  bool absorb_before;
  bool nesterov;
  bool maximize;
  double grad_scale;
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
};

// Weighting every sample's logits by the certainty of each modality.
struct EntropyFusion {
  const void* logits;   // (M, N, C)
  const bool* present;  // (M, N), or null: all are
  void* fused;          // (N, C), in the dtype of logits
  void* weights;        // A (M, N)
  int64_t M, N, C;
};

// torch.optim.SGD's step of several tensors (plain_sgd.h).
struct PlainSgd;

// One instruction set's build of every operation. Scratch memory that cannot be had raises std::bad_alloc.
struct Kernels {
  void (*feature_mean)(DType dtype, const void* features, void* mean, int64_t N, int64_t s, ParallelFor parallel_for);
  void (*rls_update)(DType accumulate, const RlsUpdate& update, ParallelFor parallel_for);
  void (*head_step)(DType dtype, const HeadStep& step, ParallelFor parallel_for);
  // out = [X; h] B, for n rows of X, and h or null.
  void (*project)(DType accumulate, const void* projection, const void* X, int64_t n, const void* h, int64_t s,
                  void* out, ParallelFor parallel_for);
  // Makes the updates that wait.
  void (*fold)(DType accumulate, void* projection, int64_t s, const Pending& pending, ParallelFor parallel_for);
  // From Z = X B to X P, for n rows of X and Z.
  void (*correct)(DType accumulate, const void* X, void* Z, int64_t n, int64_t s, const Pending& pending,
                  ParallelFor parallel_for);
  void (*entropy_fusion)(DType dtype, const EntropyFusion& fusion, ParallelFor parallel_for);
  void (*plain_sgd)(const PlainSgd& step, ParallelFor parallel_for);
};

}  // namespace mla_ext::cpu
