// What the CPU and the CUDA kernels share: element types and the arguments of the operations. No torch header.
//
// Shapes: N samples, s features, C classes, M modalities, R rows of K; every matrix is dense and row-major. "A" is the
// accumulate type of a dtype: double for Float64, else float. Pointers are to memory of the device that works on it.
// The specification is mla_ext/reference.py; the names are those of the table in CONTRIBUTING.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace mla_ext {

enum class DType { Float32, Float64, BFloat16, Float16 };

/// Bytes of one element of P, of h, of a momentum buffer or of a fusion weight.
constexpr size_t accumulate_bytes(DType dtype) { return dtype == DType::Float64 ? 8 : 4; }

/// In the rank form, an eigenvalue of P below this part of beta is nothing but rounding.
template <class A>
constexpr A kRankNoise = 64 * std::numeric_limits<A>::epsilon();

/// How fast nu follows |h|^2: the exponential mean's weight of the newest.
constexpr double kNuRate = 0.1;

/// P = B - K^T K, or with no B: P = beta I - K^T K (the rank form).
struct Projection {
  void* base;          // B: A (s, s), in place; null: beta I
  void* beta;          // A, one number, in place; null where there is a B
  void* rows;          // K: A (capacity, s), in place; null: every update goes into B at once
  int64_t* count;      // how many rows of K are in use, in place
  int64_t capacity;    // full: the rows are folded into B, or the rank form is compressed to capacity / 2 rows
  void* nu = nullptr;  // A, one number, in place: the mean of |h|^2 so far, 0 before the first; null: d = alpha + h.k
};

/// The hyperparameters of torch.optim.SGD and of the projection. Pointers, where not null, stand in for the numbers.
struct Hyperparameters {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double alpha = 0.1;
  double forget = 0;
  bool nesterov = false;
  bool maximize = false;
  bool absorb_before = false;  // project with P_t, not P_{t-1}
  bool normalize = false;      // divide P by its Frobenius norm
  const float* lr_tensor = nullptr;
  const float* alpha_tensor = nullptr;
};

/// One step of the shared head, eq. 4-6: W <- W - lr SGD(G P), and P <- P - k k^T / d with d = alpha nu + h.k.
struct HeadStep {
  DType dtype;  // of weight and grad
  int64_t C, s;
  void* weight;              // W: (C, s), in place
  const void* grad;          // G: (C, s)
  void* momentum_buffer;     // A (C, s), in place; null: no momentum
  Projection projection;     // P
  const void* feature_mean;  // h: A (s); null: project, absorb nothing
  float* step;  // updates that momentum_buffer has seen, 0-d; one more afterwards. Null only without momentum
  Hyperparameters hyper;
  const float* grad_scale;  // G is divided by it; null: by 1
  const float* found_inf;   // where it is not 0, nothing changes; null: 0
};

}  // namespace mla_ext
