// The element types that the kernels take, named at run time.
#pragma once

#include <cstddef>

namespace mla_ext::cuda {

enum class DataType { kFloat32, kFloat64, kFloat16, kBFloat16 };

/// Bytes of one element of P, of h̄, of a momentum buffer or of a fusion weight: float64 for float64, else float32.
constexpr size_t accumulate_bytes(DataType dtype) { return dtype == DataType::kFloat64 ? 8 : 4; }

}  // namespace mla_ext::cuda
