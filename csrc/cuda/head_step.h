// One step of the shared head, eq. 4-6: W ← W − γ · SGD(G P), and P ← P − k kᵀ/d.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "data_type.h"

namespace mla_ext::cuda {

/// The hyperparameters of torch.optim.SGD and of the projection. Device pointers may stand in for some of them.
struct HeadStepScalars {
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
  const float* lr_ptr = nullptr;
  const float* alpha_ptr = nullptr;
  const float* grad_scale = nullptr;  // the gradient is divided by it
  const float* found_inf = nullptr;   // where it is not 0, nothing changes
};

/// Device pointers. T is the type of the weight, A its accumulate type; C classes, s features.
struct HeadStepTensors {
  void* weight;              // T (C, s), contiguous
  const void* grad;          // T (C, s), contiguous
  void* momentum_buffer;     // A (C, s), contiguous; null: no momentum
  void* projection;          // A (s, s), contiguous, symmetric
  const void* feature_mean;  // A (s); null: project, absorb nothing
  float* step;               // steps taken before, 0-d; one more afterwards. May be null without momentum
};

/// Bytes of `workspace` for head_step, head_step_projected and (with classes = 0) rls_update, on any device.
size_t head_step_workspace_bytes(DataType dtype, int64_t classes, int64_t features);

/// Does the step. The workspace is 16-byte aligned; its contents do not matter. One launch where the rows of P fit on
/// chip, else two (three with normalize). Safe to capture in a CUDA graph.
/// Returns cudaErrorInvalidValue for a null that may not be, or a size over 2³¹.
cudaError_t head_step(DataType dtype, const HeadStepTensors& tensors, int64_t classes, int64_t features,
                      const HeadStepScalars& scalars, void* workspace, cudaStream_t stream);

/// The same, given Z = G P, A (C, s), which a BLAS has made: the faster way where head_step_prefers_product_given().
cudaError_t head_step_projected(DataType dtype, const HeadStepTensors& tensors, const void* projected_grad,
                                int64_t classes, int64_t features, const HeadStepScalars& scalars, void* workspace,
                                cudaStream_t stream);

/// Whether G P is enough work for a BLAS to pay for two more launches. An estimate: it has not been measured.
constexpr bool head_step_prefers_product_given(int64_t classes, int64_t features) {
  return classes > 32 && classes * features > 128 * 1024;
}

/// P ← rls_update(P, h̄), in place: eq. 4-5. dtype is P's own, float32 or float64.
cudaError_t rls_update(DataType dtype, void* projection, const void* feature_mean, int64_t features, double alpha,
                       double forget, bool normalize, void* workspace, cudaStream_t stream);

}  // namespace mla_ext::cuda
