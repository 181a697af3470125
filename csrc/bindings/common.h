// What the bindings of every device share: checks of what the ops are given, and the product that PyTorch makes.
//
// The checks keep a direct call of torch.ops.mla_ext from touching wrong memory; mla_ext/ops.py checks first, with
// messages for people.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>

#include "arguments.h"

namespace mla_ext::bindings {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::Double:
      return DType::Float64;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
  return DType::Float32;
}

inline void* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

inline void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType type,
                  DeviceType device) {
  bool fits = tensor.dim() == int64_t(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) fits = fits && tensor.size(dim++) == size;
  STD_TORCH_CHECK(fits, name, ": the shape does not fit the other arguments");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": the dtype does not fit the other arguments");
  STD_TORCH_CHECK(tensor.device().type() == device, name, ": the device does not fit the other arguments");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape,
                  ScalarType type, DeviceType device) {
  if (tensor.has_value()) check(*tensor, name, shape, type, device);
}

inline void check_features(const Tensor& features, DeviceType device) {
  STD_TORCH_CHECK(features.dim() == 2 && features.numel() > 0, "features: expected a non-empty (N, s) tensor");
  check(features, "features", {features.size(0), features.size(1)}, features.scalar_type(), device);
}

inline void check_rls_update(const Tensor& projection, const Tensor& feature_mean, DeviceType device) {
  STD_TORCH_CHECK(projection.dim() == 2 && projection.numel() > 0, "projection: expected a non-empty (s, s) tensor");
  const int64_t s = projection.size(0);
  check(projection, "projection", {s, s}, accumulate_type(projection), device);
  check(feature_mean, "feature_mean", {s}, projection.scalar_type(), device);
}

inline void check_head_step(const Tensor& weight, const Tensor& grad, const std::optional<Tensor>& momentum_buffer,
                            const std::optional<Tensor>& base, const std::optional<Tensor>& feature_mean,
                            const Tensor& step, DeviceType device) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "weight: expected a non-empty (C, s) tensor");
  const int64_t C = weight.size(0), s = weight.size(1);
  check(weight, "weight", {C, s}, weight.scalar_type(), device);
  check(grad, "grad", {C, s}, weight.scalar_type(), device);
  check(momentum_buffer, "momentum_buffer", {C, s}, accumulate_type(weight), device);
  check(base, "base", {s, s}, accumulate_type(weight), device);
  check(feature_mean, "feature_mean", {s}, accumulate_type(weight), device);
  check(step, "step", {}, ScalarType::Float, device);
}

// P with rows: K and its count beside either B or beta.
inline void check_rows(const std::optional<Tensor>& base, const std::optional<Tensor>& beta,
                       const std::optional<Tensor>& rows, const std::optional<Tensor>& count, int64_t s,
                       ScalarType accumulate, DeviceType device) {
  STD_TORCH_CHECK(base.has_value() != beta.has_value(), "base: expected either base or beta, got ",
                  base.has_value() ? "both" : "neither");
  STD_TORCH_CHECK(rows.has_value() || !beta.has_value(), "rows: expected beside beta");
  STD_TORCH_CHECK(rows.has_value() == count.has_value(), "count: expected beside rows, and only there");
  check(base, "base", {s, s}, accumulate, device);
  check(beta, "beta", {}, accumulate, device);
  if (!rows.has_value()) return;
  STD_TORCH_CHECK(rows->dim() == 2 && rows->size(0) > 0, "rows: expected a (capacity, s) tensor");
  check(*rows, "rows", {rows->size(0), s}, accumulate, device);
  check(*count, "count", {}, ScalarType::Long, device);
}

inline void check_fusion(const Tensor& logits, const std::optional<Tensor>& present,
                         const std::optional<Tensor>& temperatures, DeviceType device) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(0) > 0 && logits.size(2) > 0,
                  "logits: expected an (M, N, C) tensor with at least one modality and one class");
  check(logits, "logits", {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type(), device);
  check(present, "present", {logits.size(0), logits.size(1)}, ScalarType::Bool, device);
  check(temperatures, "temperatures", {logits.size(0)}, accumulate_type(logits), device);
}

// One number in memory of the device, or null.
inline const float* number(const std::optional<Tensor>& tensor, const char* name, DeviceType device) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->dim() <= 1 && tensor->numel() == 1, name, ": expected one number, of shape () or (1,)");
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float, name, ": expected float32");
  STD_TORCH_CHECK(tensor->device().type() == device, name, ": the device does not fit the other arguments");
  return static_cast<const float*>(tensor->data_ptr());
}

// out = a b, by PyTorch's BLAS and under the user's precision setting.
inline void matmul_into(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  Tensor result = torch::stable::detail::to<Tensor>(stack[0]);  // the dispatcher's reference to `out`
}

}  // namespace mla_ext::bindings
