// One step of the shared head, eq. 4-6: W ← W − γ · SGD(G P), and P ← P − k kᵀ/d.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace mla_ext::cuda {

/// Bytes of `workspace` for head_step, head_step_projected and (with C = 0) rls_update, on any device.
size_t head_step_workspace_bytes(DType dtype, int64_t C, int64_t s);

/// Does the step. The workspace is 16-byte aligned; its contents do not matter. One launch where the rows of P fit on
/// chip, else two (three with normalize). Safe to capture in a CUDA graph.
/// Launches nothing and returns cudaErrorNotSupported for a P in the rank form or with rows of its own: P must be a
/// dense B. Returns cudaErrorInvalidValue for a null that may not be, or a size over 2³¹.
cudaError_t head_step(const HeadStep& step, void* workspace, cudaStream_t stream);

/// The same, given Z = G P, A (C, s), which a BLAS has made: the faster way where head_step_prefers_product_given().
cudaError_t head_step_projected(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream);

/// Whether G P is enough work for a BLAS to pay for two more launches. An estimate: it has not been measured.
constexpr bool head_step_prefers_product_given(int64_t C) { return C >= 32; }

/// P ← rls_update(P, h̄), in place: eq. 4-5. dtype is that of P, A (s, s), and h̄, A (s): float32 or float64.
cudaError_t rls_update(DType dtype, void* projection, const void* feature_mean, int64_t s, double alpha, double forget,
                       bool normalize, void* workspace, cudaStream_t stream);

}  // namespace mla_ext::cuda
