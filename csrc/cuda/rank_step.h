// One step of the shared head in the rank form, P = βI − KᵀK: `reference.rank_head_step`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "arguments.h"

namespace mla_ext::cuda {

/// Bytes of `workspace` for rank_step, on any device.
size_t rank_step_workspace_bytes(const HeadStep& step);

/// Does the step. The workspace is 16-byte aligned; its contents do not matter. Four small launches, two without h̄; the
/// last compresses K where the device finds it full, so nothing waits for the host. Safe to capture in a CUDA graph.
/// A count that is not in [0, capacity) is taken for the nearest number that is.
/// Launches nothing and returns cudaErrorNotSupported for a dense P, or cudaErrorInvalidValue for a null that may not
/// be, a capacity below 2, `normalize`, or a size over 2³⁰.
cudaError_t rank_step(const HeadStep& step, void* workspace, cudaStream_t stream);

/// The same, given Z = G P, A (C, s), which a BLAS has made: for many classes, where tensor cores may help.
cudaError_t rank_step_projected(const HeadStep& step, const void* Z, void* workspace, cudaStream_t stream);

}  // namespace mla_ext::cuda
