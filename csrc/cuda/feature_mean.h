// h̄ = (1/N) Σ_k h(x_k), eq. 4.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "data_type.h"

namespace mla_ext::cuda {

/// Writes the column means of `features`, (rows, columns) with `row_stride` elements from row to row, to `mean`,
/// (columns) in the accumulate type. Device pointers.
cudaError_t feature_mean(DataType dtype, const void* features, int64_t rows, int64_t columns, int64_t row_stride,
                         void* mean, cudaStream_t stream);

}  // namespace mla_ext::cuda
