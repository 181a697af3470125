// Test-time dynamic fusion, eq. 7-9: each sample's modalities, weighted by the certainty of each.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arguments.h"

namespace mla_ext::cuda {

/// fused = Σ_m λ_m f_m with λ = softmax_m(−entropy of softmax(f_m)), over the modalities that are present, or, where
/// `equal`, the same λ for each of them. f_m are the logits over temperatures[m]: the accumulate type (M), or null: 1.
/// logits T (M, N, C), contiguous; present bytes (M, N), 0 where absent, or null: all are present;
/// fused T (N, C); weights λ in the accumulate type (M, N). Device pointers. A row of logits that is absent is not
/// read. Returns cudaErrorInvalidValue for a size over 2³¹, or for so many modalities (thousands) that shared memory is
/// short.
cudaError_t entropy_fusion(DType dtype, const void* logits, const uint8_t* present, int64_t M, int64_t N, int64_t C,
                           const void* temperatures, bool equal, void* fused, void* weights, cudaStream_t stream);

}  // namespace mla_ext::cuda
