// h̄ = (1/N) Σ_k h(x_k), eq. 4.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arguments.h"

namespace mla_ext::cuda {

/// Writes the column means h̄ of `features`, (N, s) with `row_stride` elements from row to row, to `mean`,
/// A (s). Device pointers.
cudaError_t feature_mean(DType dtype, const void* features, int64_t N, int64_t s, int64_t row_stride, void* mean,
                         cudaStream_t stream);

}  // namespace mla_ext::cuda
